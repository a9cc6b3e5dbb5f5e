"""What Hi-Merging starts from: the model, and the recipe's adapters as loaded or focused first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..errors import ConfigError
from ..export import write_adapter
from ..focus import focus_adapters
from ..folders import load_peft_model
from ..outputs import publishing
from .examine import Examined
from .tasks import hi_options

__all__ = ["Start", "load_model", "start"]

_FOCUSED = "focused"


@dataclass(frozen=True, slots=True)
class Start:
    """Arguments of `merge_adapters_hi`.

    Attributes:
        model: holds the adapters.
        names: adapter of the recipe -> the adapter that is merged.
        eval_fns: adapter that is merged, or guard task -> eval function.
        options: those of `HiMergeConfig` that the recipe gives, by the names of what is merged.
    """

    model: PeftModel
    names: Mapping[str, str]
    eval_fns: Mapping[str, Callable[[Any], Any]]
    options: Mapping[str, Any]

    def sources(self, folders: Mapping[str, Path]) -> dict[str, Path]:
        """Return adapter that is merged -> the folder it comes from."""
        return {self.names[name]: folder for name, folder in folders.items()}

    def save_focused(self, out: Path) -> None:
        """Write the focused adapters, from which the plan can be replayed, to `out/focused`."""
        for name, merged in self.names.items():
            if name != merged:
                with publishing(out / _FOCUSED / merged) as new:
                    write_adapter(self.model, merged, new)


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
    """Load a recipe that scores decide, and focus its adapters if it says so.

    Raises:
        ConfigError: a focused adapter's name is taken.
    """
    recipe, model = examined.recipe, load_model(examined)
    names = {name: name for name in recipe.adapters}
    if recipe.focus:
        inputs = {name: examined.inputs[name].batches for name in names}
        names = focus_adapters(model, list(names), inputs)
    eval_fns = {names.get(name, name): task.fn for name, task in examined.validation.items()}
    return Start(model, names, eval_fns, _named(hi_options(recipe), names))


def _named(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return options with what goes by adapter under the names of what is merged."""
    return {
        option: {names.get(name, name): one for name, one in value.items()}
        if isinstance(value, Mapping)
        else value
        for option, value in options.items()
    }
