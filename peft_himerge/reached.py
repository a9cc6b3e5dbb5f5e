"""Which adapted modules a run ever called: one that never was, was not scored as the user thinks.

A model may read a module's weight without calling it (transformers' Mamba does so with `dt_proj`).
Then PEFT's adapter has no effect there, but a folded delta has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import nn

from .adapters import lora_layers

__all__ = ["Reached"]


class Reached:
    """Watches the base modules of adapted ones; a context manager around any number of runs."""

    def __init__(self, model: PeftModel, modules: Iterable[str]) -> None:
        layers = lora_layers(model)
        self._bases = {module: layers[module].get_base_layer() for module in modules}
        self._hooks: list[Any] = []
        self._seen: set[str] = set()

    def __enter__(self) -> Reached:
        # They stay to the end: a hook that goes in mid-call looks like an eval function's doing.
        for module, base in self._bases.items():
            self._hooks.append(base.register_forward_pre_hook(self._noting(module)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def missed(self) -> list[str]:
        """The modules that were not called yet."""
        return [module for module in self._bases if module not in self._seen]

    def _noting(self, module: str) -> Any:
        def note(_module: nn.Module, _args: Any) -> None:
            self._seen.add(module)

        return note

    def warn(self) -> None:
        """Warn of modules that were never called, if others were: a score may need no forward."""
        missed = self.missed
        if 0 < len(missed) < len(self._bases):
            warnings.warn(
                f"no eval function ran {len(missed)} of the modules that the adapters change, "
                f"the first of them {missed[0]!r}. Either the eval functions do not reach "
                f"them, or the model reads their weights without calling them: then an adapter has "
                f"no effect there, and the scores of deltas, but for 'exported', say otherwise.",
                stacklevel=3,
            )
