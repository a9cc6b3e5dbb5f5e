"""Reading LoRA adapters out of a PeftModel, and refusing by name what s*B*A cannot hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, MultiheadAttention, ParamWrapper
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from torch import nn

from .errors import AdapterError, suggest
from .factors import Adapter, Kind, LoraFactors

__all__ = [
    "check_config",
    "check_factors",
    "check_model",
    "check_values",
    "common_base",
    "lora_layers",
    "plain_factors",
    "plain_weight",
    "read_adapters",
    "warn_if_zero",
]

# What merges adapters that hold more than factors; scores of deltas alone would not show the rest.
_CARRY = (
    "merge by a method without scores, in a model that holds the adapters, as in "
    "merge_adapters(method='cat', modules_to_save='sole')"
)
# Config fields that change more than the product B @ A, and what the user can do about each.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "modules_to_save": f"full copies of modules are not a low-rank delta; {_CARRY}",
        "trainable_token_indices": f"trained token rows are not a low-rank delta; {_CARRY}",
        "lora_bias": f"a bias behind B is no low-rank delta; {_CARRY}",
        "target_parameters": f"factors of bare parameters (fused experts) are no delta of a "
        f"module; {_CARRY}",
        "layer_replication": "the second adapter would replicate the layers again; replicate those "
        "of the base (peft.tuners.tuners_utils.replicate_layers), save it as a base of its own, "
        "and remove layer_replication from the configs",
        "alora_invocation_tokens": f"activated LoRA works only after its invocation tokens; "
        f"{_CARRY}",
        "use_dora": "the delta of DoRA depends on the base weight; make plain LoRA of it first: "
        "peft_himerge.densify(model, adapter, 'new_name')",
        "arrow_config": "arrow routing has no single delta; merge the experts it routes to",
    }
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGEST = 1e12  # squares of entries are summed in float32
_MOST_ENTRIES = 1 << 34  # of one module's delta: 64 GiB in float32
# Types that put virtual tokens before the input.
_VIRTUAL = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
# Variants whose forward is scaling * B @ A all the same (PEFT's variants.py).
_PLAIN_VARIANTS = ("MiCA",)
# Initialisations that also change the base weights (PEFT's LoraConfig docs).
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return module path in the base model -> its LoRA layer, for every adapted module."""
    inner = model.base_model.model
    return {name: m for name, m in inner.named_modules() if isinstance(m, LoraLayer)}


def read_adapters(
    model: PeftModel, names: Sequence[str], *, carried: Collection[str] = ()
) -> list[Adapter]:
    """Return the named adapters of `model` as views of its live parameters.

    Args:
        model: a PeftModel that holds the adapters, none of them merged into the weights.
        names: at least one adapter name, each once.
        carried: config fields that are not refused, because the caller takes care of what they
            stand for (`carried`).

    Raises:
        AdapterError: an adapter is not there, is not plain LoRA, holds NaN or infinity, or is
            merged into the base weights at the moment. Everything is checked before any return.
    """
    check_model(model)
    for name in names:
        if name not in model.peft_config:
            raise AdapterError(
                f"the model has no adapter {name!r}.{suggest(str(name), model.peft_config)}"
            )
    for name in names:
        check_config(name, model.peft_config[name], carried)
    layers = lora_layers(model)
    for module, layer in layers.items():
        if layer.merged:
            raise AdapterError(
                f"module {module!r} has adapters {layer.merged_adapters} merged into its weight. "
                f"Call model.unmerge_adapter() first."
            )
    return [_read(name, model.peft_config[name], layers, carried) for name in names]


def check_model(model: Any) -> None:
    """Refuse what is no PeftModel, and one whose module names no base model has.

    Raises:
        AdapterError: with what to pass instead.
    """
    if not isinstance(model, PeftModel):
        compiled = hasattr(model, "_orig_mod")
        raise AdapterError(
            f"model must be a peft.PeftModel with the adapters loaded, got "
            f"{type(model).__name__}. "
            + (
                "It is compiled: pass model._orig_mod, the same model."
                if compiled
                else "Load the first one with PeftModel.from_pretrained(base, folder, "
                "adapter_name=...), the others with model.load_adapter(folder, name)."
            )
        )
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, PeftModel):
            raise AdapterError(
                "the model was wrapped twice by get_peft_model, so that an adapter of it fits no "
                "base model. Wrap it once, and use model.add_adapter(name, config) or "
                "model.load_adapter(folder, name) for the other adapters."
            )
        if hasattr(module, "_orig_mod"):
            raise AdapterError(
                f"the base model's module {name or type(module).__name__!r} is compiled, so that "
                f"an adapter of it fits no plain base model. Put its _orig_mod in its place, and "
                f"compile in place instead (module.compile()), which keeps the names."
            )


def check_config(name: str, config: Any, carried: Collection[str] = ()) -> None:
    """Refuse a config that says more than plain LoRA, or another PEFT type, by name."""
    if config.peft_type != PeftType.LORA:
        advice = (
            "Virtual tokens change no weights: train a LoRA adapter on the same data."
            if config.peft_type.value in _VIRTUAL
            else "PEFT's convert_to_lora turns types that add a delta to linear layers into LoRA."
        )
        raise AdapterError(
            f"adapter {name!r} is {config.peft_type.value}, only LORA can be merged. {advice}"
        )
    for field, reason in _REFUSED.items():
        value = getattr(config, field, None)
        if value and field not in carried:
            raise AdapterError(f"adapter {name!r} uses {field}={value!r:.80}: {reason}.")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REBASED):
        raise AdapterError(
            f"adapter {name!r} was started with init_lora_weights={start!r:.80}, which also "
            f"changed the base weights. Save it with path_initial_model_for_weight_conversion to "
            f"get a plain LoRA adapter of the original base."
        )
    if getattr(config, "bias", "none") != "none":
        raise AdapterError(
            f"adapter {name!r} trained biases (bias={config.bias!r:.80}), which are not a low-rank "
            f"delta. Train with bias='none'."
        )


def _read(
    name: str, config: Any, layers: Mapping[str, LoraLayer], carried: Collection[str]
) -> Adapter:
    factors = {
        module: _read_layer(name, module, layer, carried)
        for module, layer in sorted(layers.items())
        if name in layer.scaling
        and not (isinstance(layer, ParamWrapper) and "target_parameters" in carried)
    }
    bare = "target_parameters" in carried and getattr(config, "target_parameters", None)
    if not factors and not bare:
        raise AdapterError(f"adapter {name!r} changes no module of the model.")
    settings = {"task_type": config.task_type, "revision": config.revision}
    base = config.base_model_name_or_path
    adapter = Adapter(name, MappingProxyType(factors), base, settings)
    if factors:
        warn_if_zero(adapter)
    return adapter


def warn_if_zero(adapter: Adapter) -> None:
    """Warn about an adapter without effect."""
    if adapter.is_zero:
        warnings.warn(
            f"adapter {adapter.name!r} changes nothing (its delta is 0 everywhere): it was never "
            f"trained, or its weights did not load.",
            stacklevel=3,
        )


def _read_layer(name: str, module: str, layer: LoraLayer, carried: Collection[str]) -> LoraFactors:
    where = f"adapter {name!r}, module {module!r}"
    if isinstance(layer, (MultiheadAttention, ParamWrapper)):
        raise AdapterError(
            f"{where}: {type(layer).__name__} is not supported; leave it out of the adapter and "
            f"target nn.Linear modules."
        )
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else ""
    activated = variant.startswith("ALora") and "alora_invocation_tokens" in carried
    if variant and not activated and not variant.startswith(_PLAIN_VARIANTS):
        raise AdapterError(
            f"{where}: {variant} is not plain LoRA, its delta is not scaling * B @ A. Train "
            f"without it."
        )
    base = layer.get_base_layer()
    found = _factors(name, layer)
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        trailing = layer.lora_B[name].weight.shape[2:]
        if base.groups != 1 or any(size != 1 for size in trailing):
            raise AdapterError(
                f"{where}: grouped convolutions are not supported, their delta is no product; "
                f"leave the module out of target_modules."
            )
    check_factors(where, found)
    return found


def plain_factors(model: PeftModel, name: str) -> dict[str, LoraFactors]:
    """Return module path -> factors of one adapter, without asking whether it can be merged."""
    layers = lora_layers(model)
    return {m: _factors(name, layer) for m, layer in layers.items() if name in layer.scaling}


def _factors(name: str, layer: LoraLayer) -> LoraFactors:
    kernel: tuple[int, ...] = ()
    kind: Kind
    if isinstance(layer, LoraEmbedding):
        a, b, kind = layer.lora_embedding_A[name], layer.lora_embedding_B[name], "embedding"
    else:
        a, b = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
        kind = "conv1d" if getattr(layer, "fan_in_fan_out", False) else "linear"
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        kind, kernel = "conv", tuple(a.shape[2:])
        a, b = a.flatten(1), b.flatten(1)
    return LoraFactors(a.detach(), b.detach(), float(layer.scaling[name]), kind, kernel)


def _weight(holder: Any) -> torch.Tensor:
    """Return a factor: the live parameter, or the offloaded copy that accelerate keeps of it."""
    weight: torch.Tensor = holder.weight
    offloaded = getattr(getattr(holder, "_hf_hook", None), "weights_map", None)
    return offloaded["weight"] if weight.is_meta and offloaded is not None else weight


def check_factors(where: str, factors: LoraFactors) -> None:
    """Refuse factors that don't fit each other, or whose delta could not be held.

    Raises:
        AdapterError: names the factor, what it holds and where.
    """
    a, b = factors.a, factors.b
    check_values(where, A=a, B=b)
    if not math.isfinite(factors.scaling):
        raise AdapterError(f"{where}: the scaling is {factors.scaling}.")
    if a.shape[0] != b.shape[1]:
        raise AdapterError(f"{where}: A is {tuple(a.shape)} but B is {tuple(b.shape)}.")
    if not 0 < factors.numel <= _MOST_ENTRIES:
        raise AdapterError(
            f"{where}: its delta is {factors.shape} (out, in); allowed are 1 to {_MOST_ENTRIES} "
            f"entries, which is more than any base model's weight has."
        )
    if (most := factors.bound) > _LARGEST:
        raise AdapterError(
            f"{where}: entries of its delta may be as large as {most:.1e}; at most {_LARGEST:.0e} "
            f"can be merged. The training diverged, or the file is damaged."
        )


def check_values(where: str, **tensors: torch.Tensor) -> None:
    """Refuse tensors that are not there, are no floats of 16 bits or more, or hold NaN or infinity.

    Args:
        where: whose they are, for messages.
        **tensors: what each is called -> its values.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterError(
                f"{where}: the weights are on the meta device, and nothing says where they are. "
                f"Load the adapter again with low_cpu_mem_usage=False."
            )
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(map(str, _DTYPES))
            raise AdapterError(f"{where}: {name} is {tensor.dtype}. Allowed: {allowed}.")
        wrong = ~torch.isfinite(tensor)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise AdapterError(
                f"{where}: {name} holds NaN or infinity, {int(wrong.sum())} of {tensor.numel()} "
                f"entries, the first at {place}. The training diverged, or the file is damaged."
            )


def plain_weight(module: nn.Module) -> bool:
    """Return True if `module` has an ordinary floating point weight that can be swapped."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and type(weight) in (nn.Parameter, torch.Tensor)
        and weight.is_floating_point()
        and not weight.is_meta
        and not hasattr(module, "_hf_hook")
    )


def common_base(adapters: Iterable[Adapter]) -> str | None:
    """Return the base model the adapters name, if they agree.

    Raises:
        AdapterError: two adapters name different base models.
    """
    named = {a.name: a.base for a in adapters if a.base}
    if len(set(named.values())) > 1:
        raise AdapterError(f"the adapters were trained on different base models: {named}.")
    return next(iter(named.values()), None)
