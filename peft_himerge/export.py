"""Merged delta -> a PEFT adapter in the live model or in a folder, or the live base weights.

The adapter follows the portable profile, the one form that PEFT, vLLM and llama.cpp read alike: one
rank for all modules (zero-padded), lora_alpha equal to it so that the scaling is exactly 1, rsLoRA
off, no patterns, nothing but A and B.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import common_base, lora_layers
from .combine import Combiner, Term, add_to_weight
from .errors import ConfigError, ExportError
from .files import replacing, write_text
from .lowrank import LowRank, Rank, low_rank
from .plan import MergePlan
from .threads import spread

__all__ = [
    "WEIGHTS",
    "add_adapter",
    "approximate",
    "iter_approximate",
    "merge_in_place",
    "stored_dtype",
    "write_adapter",
]

WEIGHTS = "adapter_model.safetensors"
# Fields that PEFT has had for years. Any other is written only if it is set: PEFT before 0.14 fails
# on a field it does not know.
_LASTING = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode r "
    "lora_alpha lora_dropout target_modules fan_in_fan_out bias use_rslora use_dora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern".split()
)


def approximate(combiner: Combiner, plan: MergePlan, rank: Rank) -> dict[str, LowRank]:
    """Return the exported factors of every module, one module's delta in memory at a time.

    Args:
        combiner: makes the deltas.
        plan: what to export.
        rank: see `HiMergeConfig.rank`; "auto" is "exact" for an unpruned plan, otherwise the
            largest sum of the sources' ranks in any module.
    """
    return dict(iter_approximate(combiner, plan, rank))


def iter_approximate(
    combiner: Combiner, plan: MergePlan, rank: Rank, *, dense_entries: int = 1
) -> Iterator[tuple[str, LowRank]]:
    """Yield (module, exported factors) module by module; see `approximate`.

    Args:
        combiner: makes the deltas.
        plan: what to export.
        rank: see `approximate`.
        dense_entries: modules are spread over the cores as long as their dense deltas hold at most
            so many entries together; with the default, one dense delta is held at a time.
            Unpruned modules need none and are always spread.
    """
    if rank == "auto":
        rank = "exact" if not plan.pruned else _sum_of_ranks(combiner, plan)
    limit: Rank = rank
    todo = [(module, combiner.terms(plan, module)) for module in combiner.modules]

    def work(item: tuple[str, Sequence[Term]]) -> tuple[str, LowRank]:
        return item[0], low_rank(combiner, *item, limit)

    dense = [math.prod(combiner.shape(m)) for m, terms in todo if any(t.cut > 0.0 for t in terms)]
    most = max(1, dense_entries // max(dense)) if dense else None
    on_host = all(f.b.device.type == "cpu" for m, ts in todo for f, _ in combiner.factors(m, ts))
    yield from spread(work, todo, most=most if on_host else 1)


def _sum_of_ranks(combiner: Combiner, plan: MergePlan) -> int:
    adapters = [combiner.adapters[name] for name in plan.adapters]
    return max(
        [sum(a.factors[m].rank for a in adapters if m in a.factors) for m in combiner.modules]
    )


def add_adapter(
    model: PeftModel,
    name: str,
    combiner: Combiner,
    parts: Mapping[str, LowRank],
    *,
    least_rank: int = 1,
    settings: Mapping[str, object] | None = None,
) -> int:
    """Add the factors to `model` as a frozen, inactive adapter; return its (uniform) rank.

    The caller keeps flags and RNG states (`probe.preserved`). If anything fails, the adapter is
    taken out again.

    Args:
        model: the user's model.
        name: name of the new adapter; must be free.
        combiner: knows the sources: kinds, dtypes, task type.
        parts: module path -> its factors.
        least_rank: pad with zeros up to this rank.
        settings: further fields of the new adapter's config (`carried`).
    """
    rank = max([least_rank, *(part.rank for part in parts.values())])
    config = _config(model, combiner, parts, rank, settings or {})
    try:
        with warnings.catch_warnings():
            # PEFT repairs fan_in_fan_out per layer by itself and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        layers = lora_layers(model)
        for module, part in parts.items():
            _fill(layers[module], name, part, rank, stored_dtype(combiner, module))
        extra = [m for m, layer in layers.items() if name in layer.scaling and m not in parts]
        if settings and settings.get("target_parameters"):
            extra = [m for m in extra if not isinstance(layers[m], ParamWrapper)]
        if extra:
            raise ExportError(f"the new adapter also targets {extra[0]!r}; please report this.")
    except BaseException:
        remove_adapter(model, name)
        raise
    return rank


def remove_adapter(model: PeftModel, name: str) -> None:
    """Take an adapter out again; who is active is the caller's business (`probe.preserved`)."""
    if name in model.peft_config:
        with warnings.catch_warnings():
            # PEFT says that it switches to another adapter; here somebody puts the right one back.
            warnings.filterwarnings("ignore", message=r"Adapter .* was active which is now deleted")
            model.delete_adapter(name)


def stored_dtype(combiner: Combiner, module: str) -> torch.dtype:
    """Return the dtype a module's merged factors are stored in: the widest of its sources."""
    kept = [a.factors[module].a.dtype for a in combiner.adapters.values() if module in a.factors]
    dtype = kept[0]
    for other in kept[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _device(layer: Any, made: Tensor, value: Tensor) -> torch.device:
    """Return where the layer computes, which is not where it is kept if accelerate offloads it."""
    runs_on = getattr(getattr(layer.get_base_layer(), "_hf_hook", None), "execution_device", None)
    if runs_on is not None:
        return torch.device(runs_on)
    return value.device if made.is_meta else made.device


def _fill(layer: Any, name: str, part: LowRank, rank: int, dtype: torch.dtype) -> None:
    b = torch.nn.functional.pad(part.b, (0, rank - part.rank)).to(dtype).contiguous()
    a = torch.nn.functional.pad(part.a, (0, 0, 0, rank - part.rank)).to(dtype).contiguous()
    if name in layer.lora_embedding_A:
        device = _device(layer, layer.lora_embedding_A[name], a)
        layer.lora_embedding_A[name] = nn.Parameter(a.to(device), requires_grad=False)
        layer.lora_embedding_B[name] = nn.Parameter(b.to(device), requires_grad=False)
        return
    for holder, value in ((layer.lora_A[name], a), (layer.lora_B[name], b)):
        shaped = value.reshape(holder.weight.shape).to(_device(layer, holder.weight, value))
        holder.weight = nn.Parameter(shaped, requires_grad=False)


def _config(
    model: PeftModel,
    combiner: Combiner,
    parts: Mapping[str, LowRank],
    rank: int,
    settings: Mapping[str, object],
) -> LoraConfig:
    adapters = combiner.adapters.values()
    kinds = {a.factors[m].kind for a in adapters for m in parts if m in a.factors}
    task_types = {a.settings.get("task_type") for a in adapters}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, list(parts)),
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        fan_in_fan_out="conv1d" in kinds,
        task_type=task_types.pop() if len(task_types) == 1 else None,
        inference_mode=True,
        **settings,
    )
    config.base_model_name_or_path = common_base(adapters)
    return config


def _targets(model: PeftModel, modules: list[str]) -> list[str]:
    """Return the shortest names that pick exactly `modules`: last components, or full paths."""
    wanted = set(modules)
    short = {m.rpartition(".")[2] for m in modules}
    adapted = tuple(f"{m}." for m in lora_layers(model))
    for name, _ in model.base_model.model.named_modules():
        inside = name.startswith(adapted)
        if name and not inside and name not in wanted and name.rpartition(".")[2] in short:
            return sorted(modules)
    return sorted(short)


def write_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter of `model` to an empty folder in PEFT's layout, flat."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with replacing(folder / WEIGHTS) as beside:
        try:
            save_file(tensors, str(beside), metadata={"format": "pt"})
        except SafetensorError as exc:  # for example a full disk
            raise OSError(str(exc)) from exc
    usual = LoraConfig().to_dict()
    fields = {
        field: value
        for field, value in model.peft_config[name].to_dict().items()
        if field in _LASTING or value != usual.get(field)
    }
    text = json.dumps(fields, indent=2, sort_keys=True, default=_plain)
    write_text(folder / "adapter_config.json", text + "\n")


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def merge_in_place(model: PeftModel, combiner: Combiner, plan: MergePlan) -> None:
    """Add the merged delta to the base weights of the live model, for good.

    All deltas are computed in float32 or wider and rounded once to the weight's dtype. Tied
    weights get their own copy. The adapters stay in the model; switch them off or unload them.

    Raises:
        ConfigError: a weight is quantised or offloaded.
    """
    layers = lora_layers(model)
    bases = {m: layers[m].get_base_layer() for m in combiner.modules}
    for module, base in bases.items():
        weight = base._parameters.get("weight")
        if weight is None or weight.is_meta or not weight.is_floating_point():
            raise ConfigError(
                f"module {module!r} is quantised or offloaded; merge into a plain copy of the "
                f"base model instead."
            )
    for module, base in bases.items():
        terms = combiner.terms(plan, module)
        if terms:
            kind = combiner.kind(module)
            old = base._parameters["weight"]
            new = add_to_weight(old.detach(), kind, combiner.blocks(module, terms))
            base._parameters["weight"] = nn.Parameter(new, requires_grad=old.requires_grad)
