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
    """Watches the base modules of adapted ones; a context manager around any number of runs.

    Attributes:
        missed: modules that were not called yet.
    """

    def __init__(self, model: PeftModel, modules: Iterable[str]) -> None:
        layers = lora_layers(model)
        self._bases = {module: layers[module].get_base_layer() for module in modules}
        self._hooks: dict[str, Any] = {}
        self.missed = list(self._bases)

    def __enter__(self) -> Reached:
        for module, base in self._bases.items():
            self._hooks[module] = base.register_forward_pre_hook(self._seen(module))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _seen(self, module: str) -> Any:
        def seen(_module: nn.Module, _args: Any) -> None:
            self.missed.remove(module)
            self._hooks.pop(module).remove()

        return seen

    def warn(self) -> None:
        """Warn of modules that were never called, if others were: a score may need no forward."""
        if 0 < len(self.missed) < len(self._bases):
            warnings.warn(
                f"no eval function ran {len(self.missed)} of the modules that the adapters change, "
                f"the first of them {self.missed[0]!r}. Either the eval functions do not reach "
                f"them, or the model reads their weights without calling them: then an adapter has "
                f"no effect there, and the scores of deltas, but for 'exported', say otherwise.",
                stacklevel=3,
            )
