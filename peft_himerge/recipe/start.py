"""What Hi-Merging starts from: the model with the recipe's adapters, what scores them, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..errors import ConfigError
from ..folders import load_peft_model
from .examine import Examined
from .tasks import hi_options

__all__ = ["Start", "load_model", "start"]


@dataclass(frozen=True, slots=True)
class Start:
    """Arguments of `merge_adapters_hi`.

    Attributes:
        model: holds the adapters.
        eval_fns: adapter, or guard task -> eval function.
        options: those of `HiMergeConfig` that the recipe gives.
    """

    model: PeftModel
    eval_fns: Mapping[str, Callable[[Any], Any]]
    options: Mapping[str, Any]


def load_model(examined: Examined, further: Mapping[str, Path] | None = None) -> PeftModel:
    """Load the base model with the recipe's adapters and `further` ones (name -> folder)."""
    recipe = examined.recipe
    if recipe.base is None:
        raise ConfigError(f"{str(recipe.file)!r} names no base model.")
    model, _ = load_peft_model(
        recipe.place(recipe.base),
        {**recipe.folders, **(further or {})},
        dtype=getattr(torch, recipe.dtype),
        bodies=bool(examined.heads),
    )
    return model


def start(examined: Examined) -> Start:
    """Load a recipe that scores decide."""
    model = load_model(examined)
    eval_fns = {name: task.fn for name, task in examined.validation.items()}
    return Start(model, eval_fns, hi_options(examined.recipe))
