"""The matrix of adapters and bases: what is merged and what is refused, as data and as proof."""
