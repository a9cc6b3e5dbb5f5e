"""Options of Hi-Merging as published, which the naive oracles compute step by step."""

from __future__ import annotations

from typing import Any

from peft_himerge import HiMergeConfig


def paper(**options: Any) -> HiMergeConfig:
    """Return the options of the paper's variant, with these ones changed."""
    return HiMergeConfig(**{"variant": "paper", **options})
