"""What a merged model must say: a float64 base with dense merged deltas; no code of the library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import oracle
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from matrix import bases

__all__ = ["activated", "add_carried", "of_plan", "weighted_sum", "wide", "with_deltas"]

# An expert as transformers 4 named it: layer, number, which of its weights.
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")


def weighted_sum(table: oracle.Table, weights: Mapping[str, float]) -> oracle.Deltas:
    """Return sum_m w_m * delta_m, dense, per module."""
    return oracle.plain_sum(
        {name: {m: weights[name] * d for m, d in one.items()} for name, one in table.items()}
    )


def of_plan(table: oracle.Table, plan: Any) -> oracle.Deltas:
    """Return the merged deltas that a plan's numbers stand for, with thresholds of our own."""
    edited = {}
    for name, whole in plan.adapters.items():
        one = oracle.prune_and_scale(table[name], whole.density, whole.scale, plan.prune_scope)
        for layer, row in plan.edits.items():
            edit = row.get(name)
            if edit is not None and (edit.density, edit.scale) != (1.0, 1.0):
                one = oracle.prune_layer_again(one, layer, edit.density, edit.scale)
        edited[name] = one
    return oracle.plain_sum(edited)


def wide(base: str, plain: nn.Module) -> nn.Module:
    """Return a float64 twin of a base: the same numbers, as its dtype or quantiser rounds them."""
    twin = bases.build(base, torch.float64)
    twin.load_state_dict({key: _number(plain, key) for key in twin.state_dict()})
    return twin


def _number(plain: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    module = plain.get_submodule(path)
    held: Tensor = getattr(module, name)
    ordinary = type(held) in (nn.Parameter, Tensor)
    return (held if ordinary else dequantize_module_weight(module)).detach().double()


def with_deltas(twin: nn.Module, deltas: oracle.Deltas) -> nn.Module:
    """Add the deltas to a float64 model; a weight tied to a changed one keeps its value."""
    for path, delta in deltas.items():
        if (single := _EXPERT.fullmatch(path)) is not None:
            _add_expert(twin, *single.groups(), delta)
            continue
        module = twin.get_submodule(path)
        moved = module.weight.detach() + oracle.weight_delta(module, delta)
        module.weight = nn.Parameter(moved, requires_grad=False)
    return twin


def _add_expert(twin: nn.Module, layer: str, expert: str, name: str, delta: Tensor) -> None:
    """Mixtral's w1 and w3 are the halves of the fused gate_up_proj, w2 is down_proj."""
    fused = twin.get_submodule(f"model.layers.{layer}.mlp.experts")
    down, width = fused.down_proj, fused.gate_up_proj.shape[1] // 2
    rows = {"w1": slice(0, width), "w3": slice(width, None), "w2": slice(None)}[name]
    with torch.no_grad():
        (down if name == "w2" else fused.gate_up_proj)[int(expert), rows] += delta


def activated(twin: nn.Module, deltas: oracle.Deltas, first: int) -> nn.Module:
    """Let linear deltas of a float64 model act on positions from `first` on alone."""
    for path, delta in deltas.items():

        def add(_: nn.Module, args: Any, out: Tensor, delta: Tensor = delta) -> Tensor:
            later = torch.arange(out.shape[1])[:, None] >= first
            return out + later * (args[0] @ delta.T)

        twin.get_submodule(path).register_forward_hook(add)
    return twin


@torch.no_grad()
def add_carried(
    model: PeftModel, twin: nn.Module, weights: Mapping[str, float], policy: str
) -> None:
    """Put what is beside the factors into `twin`: biases behind B, bare parameters and token rows
    (summed), saved modules (by policy)."""
    for path, layer in model.base_model.model.named_modules():
        module = _twin_of(path, twin)
        if isinstance(layer, ParamWrapper):
            _add_experts(layer, module, weights)
        elif isinstance(layer, LoraLayer):
            _add_bias(layer, module, weights)
        elif isinstance(layer, ModulesToSaveWrapper):
            _add_saved(layer.modules_to_save, module, weights, policy)
        elif isinstance(layer, TrainableTokensWrapper):
            _add_rows(layer.token_adapter, module, weights)


def _twin_of(path: str, twin: nn.Module) -> Any:
    """Return the plain module at a path inside PEFT's wrappers; None for parts of a wrapper."""
    plain = path.replace(".base_layer", "")
    return dict(twin.named_modules()).get(plain)


def _add_bias(layer: LoraLayer, module: nn.Module, weights: Mapping[str, float]) -> None:
    for name in weights:
        if layer.lora_bias.get(name):
            added = weights[name] * layer.scaling[name] * layer.lora_B[name].bias.double()
            old = 0.0 if module.bias is None else module.bias
            module.bias = nn.Parameter(old + added, requires_grad=False)


def _add_saved(held: Any, module: nn.Module, weights: Mapping[str, float], policy: str) -> None:
    """The one saved copy, or the average by weight."""
    names = [name for name in weights if name in held]
    assert len(names) == 1 or policy == "average"
    whole = sum(weights[name] for name in names)
    for key, value in module.named_parameters():
        copies = [weights[n] / whole * held[n].get_parameter(key).double() for n in names]
        value.copy_(sum(copies))


def _add_experts(layer: Any, module: nn.Module, weights: Mapping[str, float]) -> None:
    """Expert by expert, row of A and column of B found by their numbers (PEFT's layout)."""
    stacked = module.get_parameter(layer.parameter_name)
    for name, weight in weights.items():
        if name in layer.r:
            rank, scaling = layer.r[name], layer.scaling[name]
            a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            for expert in range(len(stacked)):
                for j in range(rank):
                    row, column = a[expert * rank + j], b[:, j * len(stacked) + expert]
                    stacked[expert] += weight * scaling * torch.outer(column, row)


def _add_rows(layer: Any, module: nn.Module, weights: Mapping[str, float]) -> None:
    """In place, so that a head tied to the embedding follows."""
    start = module.weight.detach().clone()
    for name in weights:
        places, rows = layer.token_indices[name], layer.trainable_tokens_delta[name].double()
        for place, row in zip(places, rows, strict=True):
            module.weight[place] += weights[name] * (row - start[place])
