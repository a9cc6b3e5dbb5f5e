"""Which adapted modules form one layer: the unit that contribution analysis judges.

A layer is one transformer block. Its label is the module path up to and including the first
integer component (`model.layers.7` for `model.layers.7.self_attn.q_proj`), so encoder and decoder
blocks of one model stay apart, and experts inside a block stay inside it. Adapted modules outside
any block (embedding, head) form one more layer, `outside`. Source: DESIGN part 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["OUTSIDE", "LayerGroup", "group_modules", "layer_of"]

OUTSIDE = "outside"
_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """One layer: its place in the model, its label and its adapted modules."""

    index: int
    label: str
    modules: tuple[str, ...]


def layer_of(module: str) -> str:
    """Return the label of the layer that `module` (a dotted path in the base model) belongs to."""
    found = _BLOCK.match(module)
    return found.group(0) if found else OUTSIDE


def group_modules(modules: Iterable[str]) -> tuple[LayerGroup, ...]:
    """Group module names into layers, in the order of their numbers; `outside` comes last.

    Args:
        modules: dotted module paths relative to the base model, in any order, repeats allowed.

    Returns:
        One `LayerGroup` per layer. The order depends on the names alone, never on the order in
        which they were given: blocks by prefix (encoders first), then by number.
    """
    members: dict[str, list[str]] = {}
    for module in sorted(set(modules)):
        members.setdefault(layer_of(module), []).append(module)
    labels = sorted(members, key=_place)
    return tuple(
        LayerGroup(index, label, tuple(members[label])) for index, label in enumerate(labels)
    )


def _place(label: str) -> tuple[bool, bool, str, int, str]:
    if label == OUTSIDE:
        return (True, False, "", 0, "")
    prefix, _, number = label.rpartition(".")
    digits = number.lstrip("0")  # not as an int: the name may have more digits than one may have
    return (False, "encoder" not in prefix, prefix, len(digits), digits)
