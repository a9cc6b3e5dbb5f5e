"""A DoRA adapter as plain LoRA: its delta depends on the base weight, so it is made once, densely.

W' = m * V / |V|,  V = W0 + scaling * B @ A,  |V| per row        (DoRA, arXiv 2402.09353, eq. 5)
delta = W' - W0                                                   (out, in), of full rank
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .adapters import (
    check_config,
    check_model,
    check_values,
    lora_layers,
    plain_factors,
    plain_weight,
)
from .combine import Combiner
from .errors import AdapterError, suggest
from .export import add_adapter
from .factors import Adapter, LoraFactors, as_matrix, full_precision
from .lowrank import LowRank, low_rank_of_dense
from .names import check_new_name
from .probe import preserved
from .request import check_rank

__all__ = ["densify"]


@torch.no_grad()
def densify(
    model: PeftModel, adapter: str, adapter_name: str, *, rank: int | float | str = "exact"
) -> float:
    """Add a plain LoRA adapter that changes the weights as a DoRA adapter does.

    It can be merged as any other. Exact at full rank, which is as many numbers as the weights
    themselves; a smaller rank keeps the most of it.

    Args:
        model: holds the adapter; comes back bit-identical but for the new one, which is frozen and
            not active.
        adapter: a LoRA adapter of which some or all modules are DoRA.
        adapter_name: name of the new adapter; must be free.
        rank: the largest rank allowed; a share of the energy in (0, 1) to keep; or "exact".

    Returns:
        The relative Frobenius error of the new adapter, over all modules; 0.0 if "exact".

    Raises:
        AdapterError: the adapter is not there, holds more than DoRA and LoRA factors, or a weight
            is quantised or offloaded.
        ConfigError: `adapter_name` or `rank` is not allowed. Nothing was touched.
    """
    check_model(model)
    if adapter not in model.peft_config:
        raise AdapterError(
            f"the model has no adapter {adapter!r}.{suggest(adapter, model.peft_config)}"
        )
    check_new_name(adapter_name, model.peft_config, f"call model.delete_adapter({adapter_name!r})")
    limit = "exact" if rank == "auto" else check_rank(rank)
    config = model.peft_config[adapter]
    check_config(adapter, config, carried=("use_dora",))
    layers, factors = lora_layers(model), plain_factors(model, adapter)
    for module, one in factors.items():
        _check(f"adapter {adapter!r}, module {module!r}", adapter, layers[module], one)
    settings = {"task_type": config.task_type, "revision": config.revision}
    source = Adapter(adapter, MappingProxyType(factors), config.base_model_name_or_path, settings)
    parts = {
        module: low_rank_of_dense(_delta(adapter, layers[module], one), limit, name=module)
        for module, one in sorted(factors.items())
    }
    with preserved(model):
        add_adapter(model, adapter_name, Combiner([source]), parts)
    return _error(parts)


def _check(where: str, name: str, layer: Any, factors: LoraFactors) -> None:
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else ""
    if variant not in ("", "DoraLinearVariant") or layer.lora_bias.get(name):
        raise AdapterError(
            f"{where}: {variant or 'lora_bias=True'} is neither DoRA on a linear layer nor plain "
            f"LoRA. Leave the module out of the adapter."
        )
    if layer.merged:
        raise AdapterError(
            f"{where} is merged into the weight. Call model.unmerge_adapter() first."
        )
    if not plain_weight(layer.get_base_layer()):
        raise AdapterError(
            f"{where}: the base weight is quantised or offloaded. Load the base in full precision."
        )
    magnitude = {"magnitude": layer.lora_magnitude_vector[name].weight} if variant else {}
    check_values(where, A=factors.a, B=factors.b, **magnitude)


def _delta(name: str, layer: Any, factors: LoraFactors) -> Tensor:
    """Return the dense (out, in) delta in float32 or wider; a row without direction stays at 0."""
    b, a = factors.scaled()
    with full_precision(b.device):
        delta = b @ a
    if name not in layer.lora_variant:
        return delta
    base = as_matrix(layer.get_base_layer().weight, factors.kind).to(delta)
    moved = base + delta
    magnitude = layer.lora_magnitude_vector[name].weight.to(delta)
    size = torch.linalg.norm(moved, dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
    growth: Tensor = magnitude / size
    return moved * growth[:, None] - base


def _error(parts: Mapping[str, LowRank]) -> float:
    whole = sum(part.norm**2 for part in parts.values())
    lost = sum((part.error * part.norm) ** 2 for part in parts.values())
    return float((lost / whole) ** 0.5) if whole else 0.0
