"""A tiny base model with explicitly materialised W0 + sum_i c_i D_i, differentiable, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

Batch = Mapping[str, Tensor]


class DenseModel:
    """The oracle of everything that runs the live model: no hooks, no factors.

    Attributes:
        d: module -> adapter -> its delta as the weight is stored; zeros if it has no such module.
        has: module -> the adapters that have it.
    """

    def __init__(self, model: PeftModel, plain: nn.Module) -> None:
        self.plain = plain.eval()
        for module in plain.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # or autograd leaves the padding token's row out
        self.names = sorted(model.peft_config)
        self.d: dict[str, dict[str, Tensor]] = {}
        self.has: dict[str, list[str]] = {}
        for path, layer in model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                weight = plain.get_submodule(path).weight
                self.has[path] = [n for n in self.names if n in layer.scaling]
                self.d[path] = {n: _delta(layer, n, weight) for n in self.names}

    @property
    def modules(self) -> list[str]:
        return sorted(self.d)

    def weights(self, multiples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed weights for module -> (adapters,) multiples."""
        changed = {}
        for path, c in multiples.items():
            w0 = self.plain.get_submodule(path).weight.detach()
            total = sum(c[i] * self.d[path][n] for i, n in enumerate(self.names))
            changed[f"{path}.weight"] = w0 + total
        return changed

    def __call__(self, weights: Mapping[str, Tensor], batch: Batch, **extra: Any) -> Any:
        kwargs = {**batch, **extra}
        return functional_call(self.plain, dict(weights), (), kwargs, tie_weights=False)

    def alone(self, name: str) -> dict[str, Tensor]:
        one = torch.tensor([float(n == name) for n in self.names], dtype=torch.float64)
        return self.weights(dict.fromkeys(self.d, one))

    def inputs(self, weights: Mapping[str, Tensor], batch: Batch) -> dict[str, list[Tensor]]:
        """Return module -> the input of each of its calls."""
        seen: dict[str, list[Tensor]] = {}

        def hook(path: str) -> Callable[..., None]:
            return lambda _m, args, _out: seen.setdefault(path, []).append(args[0].detach())

        hooks = [
            self.plain.get_submodule(path).register_forward_hook(hook(path)) for path in self.d
        ]
        with torch.no_grad():
            self(weights, batch)
        for handle in hooks:
            handle.remove()
        return seen


def _delta(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    if name not in layer.scaling:
        return torch.zeros_like(weight, dtype=torch.float64)
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    flat = layer.scaling[name] * (b.detach().double().flatten(1) @ a.detach().double().flatten(1))
    if weight.dim() > 2:
        return flat.reshape(weight.shape)
    return flat if flat.shape == weight.shape and not _turned(layer) else flat.t()


def _turned(layer: LoraLayer) -> bool:
    base = layer.get_base_layer()
    return isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"
