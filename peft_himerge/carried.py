"""What adapters hold beside B and A, and how much of it a merge can carry over.

    modules_to_save           full copies of modules: by the user's policy
    trainable_token_indices   trained rows of an embedding: their changes are added up like deltas
    lora_bias                 a bias behind B: added up like deltas
    alora_invocation_tokens   when the adapter is active: the same for all, or refused
    target_parameters         factors of bare parameters (fused experts): summed expert by expert

Nothing is dropped quietly: what this room can't carry, `adapters` refuses by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .adapters import check_values, lora_layers
from .errors import AdapterError, ConfigError, suggest

__all__ = ["FIELDS", "Carried", "SavedPolicy", "carried_of", "fill"]

FIELDS = (
    *("modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "lora_bias"),
    "target_parameters",
)
# Where PEFT keeps it: parts of parameter names.
_PLACES = frozenset({"modules_to_save", "trainable_tokens_delta"})
SavedPolicy = Literal["error", "sole", "first", "average"]


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What the merged adapter takes over beside its factors.

    Attributes:
        settings: fields of its config.
        names: the adapters, in the user's order.
        weights: their weights.
        policy: what happens to modules_to_save.
        rank: the rank that holds the sum of the experts' factors; 0 if there are none.
    """

    settings: Mapping[str, Any]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    policy: SavedPolicy
    rank: int = 0


def carried_of(
    model: PeftModel, names: Sequence[str], weights: Sequence[float], policy: str
) -> Carried:
    """Return what the merged adapter of these adapters takes over; nothing is touched.

    Args:
        model: the user's model.
        names: the adapters, in the user's order; all known to the model.
        weights: their weights.
        policy: "error" refuses modules_to_save, trained token rows and LoRA biases; "sole" takes a
            saved module over if only one adapter has it; "first" takes the first adapter's;
            "average" the weighted average of those that have it.

    Raises:
        ConfigError: no such policy, or "average" with weights that cancel.
        AdapterError: an adapter holds what the policy refuses, or NaN or infinity, or settings
            don't agree.
    """
    if policy not in get_args(SavedPolicy):
        hint = suggest(str(policy), get_args(SavedPolicy))
        raise ConfigError(f"modules_to_save got {policy!r}.{hint}")
    configs = {name: model.peft_config[name] for name in names}
    settings: dict[str, Any] = {}
    _invocation(configs, settings)
    for name, config in configs.items():
        for field in (f for f in FIELDS if f != "alora_invocation_tokens"):
            if policy == "error" and getattr(config, field, None):
                raise AdapterError(
                    f"adapter {name!r} uses {field}={getattr(config, field)!r}, which is not a "
                    f"low-rank delta. Choose what becomes of it: modules_to_save='sole', 'first' "
                    f"or 'average'."
                )
    saved = [m for config in configs.values() for m in config.modules_to_save or ()]
    if saved:
        _check_saved(model, list(names), weights, policy)
        settings["modules_to_save"] = list(dict.fromkeys(saved))
    tokens = [t for c in configs.values() if (t := getattr(c, "trainable_token_indices", None))]
    if tokens:
        settings["trainable_token_indices"] = _all_tokens(tokens)
    if any(getattr(config, "lora_bias", False) for config in configs.values()):
        settings["lora_bias"] = True
    bare = [getattr(config, "target_parameters", None) or () for config in configs.values()]
    if any(bare):
        settings["target_parameters"] = sorted({name for one in bare for name in one})
    _check_values(model, names)
    rank = max([sum(layer.r.get(n, 0) for n in names) for layer in _experts(model)], default=0)
    return Carried(settings, tuple(names), tuple(weights), policy, rank)  # type: ignore[arg-type]


def _check_values(model: PeftModel, names: Sequence[str]) -> None:
    """Refuse NaN and infinity in what is carried over, which the reader of factors never sees."""
    for path, parameter in model.named_parameters():
        parts = set(path.split("."))
        found = [name for name in names if name in parts]
        if found and (parts & _PLACES or {"lora_B", "bias"} <= parts):
            check_values(f"adapter {found[0]!r}", **{path: parameter})
    for layer in _experts(model):
        for name in (n for n in names if n in layer.r):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            check_values(f"adapter {name!r}, parameter {layer.parameter_name!r}", A=a, B=b)


def _invocation(configs: Mapping[str, Any], settings: dict[str, Any]) -> None:
    found = {n: getattr(c, "alora_invocation_tokens", None) for n, c in configs.items()}
    different = {tuple(tokens) if tokens else None for tokens in found.values()}
    if len(different) > 1:
        raise AdapterError(
            f"the adapters become active at different moments, alora_invocation_tokens: {found}. "
            f"Only adapters with the same invocation tokens have one sum."
        )
    if (tokens := different.pop()) is not None:
        settings["alora_invocation_tokens"] = list(tokens)


def _check_saved(
    model: PeftModel, names: Sequence[str], weights: Sequence[float], policy: str
) -> None:
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    holders = [[n for n in names if n in w.modules_to_save] for w in wrappers]
    shared = [held for held in holders if len(held) > 1]
    if policy == "sole" and shared:
        raise AdapterError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, "
            f"but found {len(shared)} such instance(s). The adapters are {shared[0]}. Choose "
            f"modules_to_save='first' or 'average', or train without."
        )
    if policy == "average":
        of = dict(zip(names, weights, strict=True))
        for held in holders:
            if held and math.fsum(of[n] for n in held) == 0.0:
                raise ConfigError(f"the weights of {held} sum to 0: modules_to_save has no average")


def _all_tokens(tokens: Sequence[Any]) -> Any:
    if all(isinstance(t, Mapping) for t in tokens):
        keys = dict.fromkeys(key for t in tokens for key in t)
        return {key: sorted({i for t in tokens for i in t.get(key, ())}) for key in keys}
    if any(isinstance(t, Mapping) for t in tokens):
        raise AdapterError(
            "some adapters give trainable_token_indices as a list, others per module; train them "
            "alike."
        )
    return sorted({i for t in tokens for i in t})


@torch.no_grad()
def fill(model: PeftModel, name: str, carried: Carried) -> None:
    """Give the new adapter `name` the values of what it carries over."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            _fill_saved(module, name, carried)
        elif isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            if name in layer.token_indices and not layer.tied_adapter:
                _fill_tokens(layer, name, carried)
    if carried.settings.get("lora_bias"):
        for layer in lora_layers(model).values():
            _fill_bias(layer, name, carried)
    for layer in _experts(model):
        if name in layer.r:
            _fill_experts(layer, name, carried)


def _experts(model: PeftModel) -> list[Any]:
    """Return the layers around bare parameters."""
    return [layer for layer in lora_layers(model).values() if isinstance(layer, ParamWrapper)]


def _fill_experts(layer: Any, name: str, carried: Carried) -> None:
    """Stack the factors of each expert: sum_i w_i * s_i * B_i @ A_i is one product of them.

    PEFT's layout (`ParamWrapper.get_delta_factors`): A (experts * rank, in), experts first; B
    (out, rank * experts), experts last.
    """
    holders = layer.lora_A[name], layer.lora_B[name]
    width, out, count = layer.in_features, layer.out_features, layer.num_experts
    a = torch.zeros(count, layer.r[name], width, dtype=torch.float64)
    b = torch.zeros(out, layer.r[name], count, dtype=torch.float64)
    dtype, done = holders[0].weight.dtype, 0
    for source, weight in zip(carried.names, carried.weights, strict=True):
        if source in layer.r:
            own, rank = layer.lora_A[source].weight, layer.r[source]
            dtype = own.dtype if done == 0 else torch.promote_types(dtype, own.dtype)
            a[:, done : done + rank] = own.reshape(count, rank, width)
            other = layer.lora_B[source].weight.double().reshape(out, rank, count)
            b[:, done : done + rank] = weight * layer.scaling[source] * other
            done += rank
    for holder, value in zip(holders, (a.flatten(0, 1), b.flatten(1)), strict=True):
        moved = value.to(holder.weight.device, dtype)
        holder.weight = nn.Parameter(moved, requires_grad=False)


def _fill_saved(wrapper: Any, name: str, carried: Carried) -> None:
    held = [
        (wrapper.modules_to_save[source], weight)
        for source, weight in zip(carried.names, carried.weights, strict=True)
        if source in wrapper.modules_to_save
    ]
    if carried.policy == "average":
        whole = math.fsum(weight for _, weight in held)
        held = [(module, weight / whole) for module, weight in held]
    else:
        held = [(module, 1.0) for module, _ in held[:1]]
    states = [(dict(module.state_dict()), weight) for module, weight in held]
    for key, value in wrapper.modules_to_save[name].state_dict().items():
        if value.is_floating_point() and len(states) > 1:
            mixed = sum(state[key].double() * weight for state, weight in states)
            value.copy_(mixed)
        else:
            value.copy_(states[0][0][key])


def _fill_tokens(layer: Any, name: str, carried: Carried) -> None:
    places = list(layer.token_indices[name])
    base: Tensor = layer.base_layer.weight
    rows = base[places].double()
    for source, weight in zip(carried.names, carried.weights, strict=True):
        if source not in layer.token_indices:
            continue
        trained = layer.trainable_tokens_delta[source].double()
        for row, place in zip(trained, layer.token_indices[source], strict=True):
            rows[places.index(place)] += weight * (row - base[place].double())
    held = layer.trainable_tokens_delta[name]
    layer.trainable_tokens_delta[name] = nn.Parameter(rows.to(held), requires_grad=False)


def _fill_bias(layer: Any, name: str, carried: Carried) -> None:
    if name not in layer.lora_B or layer.lora_B[name].bias is None:
        return
    bias = layer.lora_B[name].bias
    total = torch.zeros_like(bias, dtype=torch.float64)
    for source, weight in zip(carried.names, carried.weights, strict=True):
        if layer.lora_bias.get(source):
            own = layer.lora_B[source].bias.to(total.device, torch.float64)
            total += weight * layer.scaling[source] * own
    layer.lora_B[name].bias = nn.Parameter(total.to(bias.dtype), requires_grad=False)
