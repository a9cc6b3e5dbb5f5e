"""Merged delta -> a PEFT adapter in the live model or in a folder, or a full checkpoint.

The adapter follows the portable profile, the one form that PEFT, vLLM and llama.cpp read alike: one
rank for all modules (zero-padded), lora_alpha equal to it so that the scaling is exactly 1, rsLoRA
off, no patterns, nothing but A and B.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import common_base, lora_layers
from .combine import Combiner, Term, add_to_weight
from .errors import ConfigError, ExportError, PlanError
from .factors import as_matrix
from .lowrank import LowRank, Rank, low_rank
from .plan import MergePlan
from .threads import spread

__all__ = [
    "WEIGHTS",
    "add_adapter",
    "approximate",
    "iter_approximate",
    "merge_in_place",
    "replacing",
    "save_adapter",
    "save_checkpoint",
    "stored_dtype",
    "stream_tensors",
    "write_text",
]

WEIGHTS = "adapter_model.safetensors"
_DENSE_ENTRIES = 1 << 28  # of the dense deltas held at once: 1 GB of float32


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
    combiner: Combiner, plan: MergePlan, rank: Rank
) -> Iterator[tuple[str, LowRank]]:
    """Yield (module, exported factors) module by module; see `approximate`.

    Modules are spread over the cores, as many at a time as have room for their dense deltas.
    """
    if rank == "auto":
        rank = "exact" if not plan.pruned else _sum_of_ranks(combiner, plan)
    limit: Rank = rank
    todo = [(module, combiner.terms(plan, module)) for module in combiner.modules]

    def work(item: tuple[str, Sequence[Term]]) -> tuple[str, LowRank]:
        return item[0], low_rank(combiner, *item, limit)

    dense = [math.prod(combiner.shape(m)) for m, terms in todo if any(t.cut > 0.0 for t in terms)]
    most = max(1, _DENSE_ENTRIES // max(dense, default=1))
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
    rank = max(least_rank, *(part.rank for part in parts.values()))
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


def _device(made: Tensor, value: Tensor) -> torch.device:
    """Return where PEFT put the new factor; where the value is, if the base is offloaded."""
    return value.device if made.is_meta else made.device


def _fill(layer: Any, name: str, part: LowRank, rank: int, dtype: torch.dtype) -> None:
    b = torch.nn.functional.pad(part.b, (0, rank - part.rank)).to(dtype).contiguous()
    a = torch.nn.functional.pad(part.a, (0, 0, 0, rank - part.rank)).to(dtype).contiguous()
    if name in layer.lora_embedding_A:
        device = _device(layer.lora_embedding_A[name], a)
        layer.lora_embedding_A[name] = nn.Parameter(a.to(device), requires_grad=False)
        layer.lora_embedding_B[name] = nn.Parameter(b.to(device), requires_grad=False)
        return
    for holder, value in ((layer.lora_A[name], a), (layer.lora_B[name], b)):
        shaped = value.reshape(holder.weight.shape).to(_device(holder.weight, value))
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes the place of `path` at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either absent, as it was, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save_adapter(model: PeftModel, name: str, folder: str | Path) -> Path:
    """Write one adapter of `model` to `folder` in PEFT's layout, flat, and return the folder.

    The config is written last: a folder with a config is a whole adapter.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with replacing(target / WEIGHTS) as beside:
        save_file(tensors, str(beside), metadata={"format": "pt"})
        (target / "adapter_config.json").unlink(missing_ok=True)  # weights are whole by now
    fields = model.peft_config[name].to_dict()
    text = json.dumps(fields, indent=2, sort_keys=True, default=_plain)
    write_text(target / "adapter_config.json", text + "\n")
    return target


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


def save_checkpoint(
    base: str | Path, combiner: Combiner, plan: MergePlan, folder: str | Path
) -> Path:
    """Write base + merged delta as a full checkpoint, streamed: one tensor in memory at a time.

    Args:
        base: folder of the base model (safetensors, one file or shards).
        combiner: makes the deltas.
        plan: what to merge.
        folder: where to write; config, tokenizer and other small files are copied along.

    Raises:
        PlanError: a module of the adapters has no weight in the base checkpoint.
        ConfigError: `base` holds no safetensors, or the weight is quantised or tied.
    """
    source, target = Path(base), Path(folder)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"{str(source)!r} holds no *.safetensors file of a base model.")
    keys = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            keys.update(dict.fromkeys(opened.keys(), shard))
    if target.exists() and target.samefile(source):
        raise ConfigError(f"the merged checkpoint would overwrite the base model in {str(base)!r}.")
    where = {_find_key(module, keys): module for module in combiner.modules}
    _refuse_tied(source, where, keys, combiner)
    _refuse_misfits(where, keys, combiner)
    target.mkdir(parents=True, exist_ok=True)
    for extra in sorted(source.iterdir()):
        small = extra.is_file() and extra.suffix in {".json", ".txt", ".model", ".jinja"}
        if small:
            with replacing(target / extra.name) as beside:
                beside.write_bytes(extra.read_bytes())
    for shard in shards:
        with safe_open(shard, "pt") as opened, replacing(target / shard.name) as beside:
            names = list(opened.keys())
            heads = {key: opened.get_slice(key) for key in names}
            metadata = opened.metadata() or {"format": "pt"}

            def tensor(key: str, opened: Any = opened) -> Tensor:
                value: Tensor = opened.get_tensor(key)
                module = where.get(key)
                if module is None:
                    return value
                if not value.is_floating_point():
                    raise ConfigError(f"{key!r} is quantised ({value.dtype}); use a plain base.")
                terms = combiner.terms(plan, module)
                return add_to_weight(value, combiner.kind(module), combiner.blocks(module, terms))

            layout = {key: (head.get_dtype(), head.get_shape()) for key, head in heads.items()}
            stream_tensors(beside, layout, tensor, metadata)
    return target


def _find_key(module: str, keys: Mapping[str, Path]) -> str:
    """Return the checkpoint's key of a module's weight; a base-model prefix may differ."""
    exact = f"{module}.weight"
    if exact in keys:
        return exact
    ends = [key for key in keys if exact.endswith(f".{key}") or key.endswith(f".{exact}")]
    if len(ends) != 1:
        raise PlanError(
            f"the base checkpoint has no weight {exact!r}"
            + (f" (it could be any of {ends})." if ends else ".")
            + " Is it the base model of these adapters?"
        )
    return ends[0]


def _refuse_misfits(where: Mapping[str, str], keys: Mapping[str, Path], combiner: Combiner) -> None:
    for key, module in where.items():
        with safe_open(keys[key], "pt") as opened:
            shape = tuple(opened.get_slice(key).get_shape())
        got = as_matrix(torch.empty(shape, device="meta"), combiner.kind(module)).shape
        if tuple(got) != combiner.shape(module):
            raise PlanError(
                f"module {module!r}: the delta is {combiner.shape(module)} but the base "
                f"checkpoint's weight is {tuple(got)} (out, in). Is it the base of these adapters?"
            )


def _refuse_tied(
    source: Path, where: Mapping[str, str], keys: Mapping[str, Path], combiner: Combiner
) -> None:
    config = source / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    # A config says only what differs from its class's default; GPT-2 and T5 tie by default. A
    # checkpoint without a weight for the head ties it in any case.
    kinds = {m: combiner.kind(m) for m in where.values()}
    tied = settings.get("tie_word_embeddings", not any("lm_head" in key for key in keys))
    heads = [m for m, kind in kinds.items() if kind == "embedding" or m.endswith("lm_head")]
    if tied and heads:
        raise ConfigError(
            f"the base ties its embedding and head, and {heads[0]!r} has a delta: a checkpoint "
            f"with tied weights cannot hold it. Export as LoRA, or untie the base first."
        )


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[str, list[int]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor: header length, JSON header, raw bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (dtype, shape) in layout.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for key in layout:
            flat = tensor(key).contiguous().flatten().view(torch.uint8)
            out.write(flat.numpy().data)
