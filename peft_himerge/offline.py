"""From adapter folders to an adapter folder, without a base model: for merges that need no score.

Factors are views of the mapped files, one module's delta exists per core, and what is written
streams module by module. The arithmetic is that of the live path (`combine`, `lowrank`).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import card, export, files, geometry
from .adapters import common_base
from .combine import Combiner
from .config import HiMergeConfig
from .errors import AdapterError, ConfigError, PlanError, suggest
from .factors import Adapter, LoraFactors
from .folders import read_folder
from .lowrank import LowRank
from .names import check_new_name
from .outputs import publishing
from .plan import DROP, MergePlan
from .result import ModuleError, module_records, relative_error, save_reports, versions
from .shards import stream_tensors

__all__ = ["FolderMerge", "merge_folders"]

_DENSE_ENTRIES = 1 << 28  # of the dense deltas held at once, over all cores: 1 GB of float32
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class FolderMerge:
    """A finished merge from folder to folder.

    Attributes:
        folder: where the adapter, plan.json, report.json, .md and .html, and README.md are.
        adapter_name: its name in the report and the model card.
        plan: what was merged; `apply_plan` replays it on a live model.
        rank: the exported adapter's rank.
        modules: per-module export error.
        seconds: wall time of the whole call.
        peak_bytes: the most memory the process has held so far, mapped files included; None where
            the system does not tell.
    """

    folder: Path
    adapter_name: str
    plan: MergePlan
    rank: int
    modules: tuple[ModuleError, ...]
    seconds: float
    peak_bytes: int | None

    @property
    def export_error(self) -> float:
        """Relative Frobenius error of the exported adapter over all modules together."""
        return relative_error(self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json; as `MergeResult.to_dict`, without what was scored."""
        rows = module_records(self.modules)
        exported = {"rank": self.rank, "relative_error": self.export_error, "drop": None}
        return {
            "format": "peft_himerge.report/1",
            "adapter_name": self.adapter_name,
            "plan": self.plan.to_dict(),
            "scores": {},
            "standard_errors": {},
            "metrics": {},
            "contributions": [],
            "conflicts": [],
            "search": [],
            "export": {**exported, "modules": rows},
            "cost": {"scores": 0, "seconds": self.seconds, "peak_bytes": self.peak_bytes},
            "versions": versions(),
        }


def merge_folders(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    plan: MergePlan | None = None,
    config: HiMergeConfig | None = None,
    adapter_name: str = "merged",
    strict_base: bool = True,
) -> FolderMerge:
    """Merge adapters from folders into one adapter folder, without loading the base model.

    Nothing is scored, so nothing can be searched or analysed: either a plan says what to do, or
    `config` gives density and scale as numbers, and the merge is the paper's initial one (pruned
    and scaled deltas, summed; DESIGN 1.1 and 1.2).

    Args:
        adapters: name -> folder in PEFT's layout, at least one. Their order does not matter.
        out: folder to write; files of the same names are replaced when all new ones are whole.
        plan: from `MergeResult.plan` or `MergePlan.from_json`; must merge exactly `adapters`.
        config: density, scale, prune_scope and rank are read; with a plan, rank alone.
        adapter_name: what report and model card call the result.
        strict_base: refuse adapters that name different base models.

    Returns:
        A `FolderMerge`. Load the adapter with ``PeftModel.from_pretrained(base, out)``.

    Raises:
        ConfigError: an argument is not allowed, or a number is missing.
        AdapterError: an adapter cannot be merged exactly; see `read_folder`.
        PlanError: the plan was made for other adapters or other weights.
        OutputError: `out` is in use or cannot be written; it is as it was.
    """
    start = time.perf_counter()
    target = Path(out)
    _check_arguments(adapters, target, plan, config, adapter_name)
    config = config or HiMergeConfig(density=1.0, scale=1.0)
    read = [read_folder(name, folder) for name, folder in adapters.items()]
    if strict_base:
        common_base(read)
    _check_shapes(read)
    combiner = Combiner(read)
    if plan is None:
        edits = {a.name: DROP if a.is_zero else config.model_wise_edit(a.name) for a in read}
        plan = combiner.plan(edits, prune_scope=config.prune_scope)
    else:
        combiner.check(plan)
    licences = card.licences_of(adapters, adapters)
    return _write(combiner, plan, config, target, adapter_name, licences, start)


def _check_arguments(
    adapters: Mapping[str, str | Path],
    target: Path,
    plan: MergePlan | None,
    config: HiMergeConfig | None,
    adapter_name: str,
) -> None:
    check_new_name(adapter_name, (), "choose another")
    if not isinstance(adapters, Mapping) or not adapters:
        raise ConfigError(f"adapters must map at least one name to a folder, got {adapters!r}.")
    for name, folder in adapters.items():
        if target.resolve() == Path(folder).resolve():
            raise ConfigError(f"out is the folder of adapter {name!r}; choose another.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"out {str(target)!r} is a file; give a folder.")
    if plan is None:
        if config is None or config.searches() or config.focus:
            raise ConfigError(
                "without eval functions nothing can be focused or searched: give density and scale "
                "as numbers, e.g. HiMergeConfig(density=0.3, scale=0.9), or a plan."
            )
        config.check_names(list(adapters), list(adapters))
        return
    if not plan.adapters:
        raise ConfigError("the plan merges no adapter: it is the base model's.")
    for name in adapters:
        if name not in plan.adapters:
            raise PlanError(
                f"the plan does not merge the adapter {name!r}.{suggest(name, plan.adapters)}"
            )


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            other = first.setdefault(module, adapter)
            known = other.factors[module]
            if known.shape != factors.shape or known.kernel != factors.kernel:
                raise AdapterError(
                    f"module {module!r}: the delta of adapter {adapter.name!r} has the shape "
                    f"{factors.shape}, that of {other.name!r} {known.shape}. They are adapters of "
                    f"different base models."
                )
            if (known.kind == "embedding") != (factors.kind == "embedding"):
                raise AdapterError(
                    f"module {module!r} is an embedding for one of the adapters "
                    f"{adapter.name!r}, {other.name!r} and not for the other."
                )


def _write(
    combiner: Combiner,
    plan: MergePlan,
    config: HiMergeConfig,
    target: Path,
    adapter_name: str,
    licences: Mapping[str, str],
    start: float,
) -> FolderMerge:
    with publishing(target) as new:
        parts = export.iter_approximate(combiner, plan, config.rank, dense_entries=_DENSE_ENTRIES)
        rank, done, spectra = _write_factors(new / export.WEIGHTS, combiner, parts)
        modules = tuple(ModuleError(m, p.rank, p.error, p.norm) for m, p in done)
        fields = _fields(combiner, rank)
        text = json.dumps(fields, indent=2, sort_keys=True)
        files.write_text(new / "adapter_config.json", text + "\n")
        files.write_text(new / "plan.json", plan.to_json())
        merge = FolderMerge(
            target, adapter_name, plan, rank, modules, time.perf_counter() - start, _peak()
        )
        shape = geometry.to_records(geometry.layer_geometry(combiner), spectra)
        facts = merge.to_dict() | {"geometry": shape}
        save_reports(new, facts)
        text = card.render_card(facts, fields["base_model_name_or_path"], licences)
        files.write_text(new / "README.md", text)
    return merge


def _write_factors(
    path: Path, combiner: Combiner, parts: Iterable[tuple[str, LowRank]]
) -> tuple[int, tuple[tuple[str, LowRank], ...], dict[str, list[float] | None]]:
    """Write A and B of every module in PEFT's layout, without holding them all.

    Args:
        path: the file, replaced at once when it is whole.
        combiner: knows kinds, shapes and dtypes.
        parts: module -> factors, taken one by one.

    Returns:
        The uniform rank, per module its `LowRank` without the values, and its singular values.
    """
    done: list[tuple[str, LowRank]] = []
    where: dict[str, int] = {}
    spectra: dict[str, list[float] | None] = {}
    # The common rank is known at the end only, so the factors wait in a file without a name.
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        for module, part in parts:
            where[module] = spool.tell()
            spectra[module] = geometry.singular_values(LoraFactors(part.a, part.b, 1.0))
            for factor in (part.b, part.a):
                raw = factor.to(export.stored_dtype(combiner, module)).contiguous().flatten()
                spool.write(raw.view(torch.uint8).cpu().numpy().data)
            empty = replace(part, b=part.b[:0].clone(), a=part.a[:, :0].clone())
            done.append((module, empty))
        rank = max(1, *(part.rank for _, part in done))
        ranks = {module: part.rank for module, part in done}
        entries = [e for module, _ in done for e in _entries(combiner, module, rank)]
        # Wide dtypes first, so that every tensor is aligned to its own size.
        entries.sort(key=lambda e: -e.dtype.itemsize)

        def tensor(key: str) -> Tensor:
            entry = by_key[key]
            out, width = combiner.shape(entry.module)
            own, size = ranks[entry.module], entry.dtype.itemsize
            rows, columns, at = (out, own, 0) if entry.side == "B" else (own, width, out * own)
            spool.seek(where[entry.module] + at * size)
            raw = bytearray(spool.read(rows * columns * size))
            if not raw:
                return torch.zeros(entry.shape, dtype=entry.dtype)
            value = torch.frombuffer(raw, dtype=entry.dtype).view(rows, columns)
            missing = rank - own
            padding = (0, missing) if entry.side == "B" else (0, 0, 0, missing)
            return torch.nn.functional.pad(value, padding)

        by_key = {e.key: e for e in entries}
        layout = {e.key: (_CODES[e.dtype], list(e.shape)) for e in entries}
        with files.replacing(path) as beside:
            stream_tensors(beside, layout, tensor, {"format": "pt"})
    return rank, tuple(done), spectra


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of an adapter file."""

    key: str
    module: str
    side: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _entries(combiner: Combiner, module: str, rank: int) -> tuple[_Entry, _Entry]:
    out, width = combiner.shape(module)
    some = next(a.factors[module] for a in combiner.adapters.values() if module in a.factors)
    stem, tail = f"base_model.model.{module}.lora_", ".weight"
    if some.kind == "embedding":
        stem, tail = f"{stem}embedding_", ""
    a: tuple[int, ...] = (rank, width)
    b: tuple[int, ...] = (out, rank)
    if some.kind == "conv":
        a = (rank, width // math.prod(some.kernel), *some.kernel)
        b = (out, rank, *(1 for _ in some.kernel))
    dtype = export.stored_dtype(combiner, module)
    return (
        _Entry(f"{stem}A{tail}", module, "A", a, dtype),
        _Entry(f"{stem}B{tail}", module, "B", b, dtype),
    )


def _fields(combiner: Combiner, rank: int) -> dict[str, Any]:
    """Return the portable config: only fields that PEFT has had for years (NEEDS part 4)."""
    adapters = list(combiner.adapters.values())
    kinds = {f.kind for a in adapters for f in a.factors.values()}
    return {
        "peft_type": "LORA",
        "task_type": _agreed(adapters, "task_type"),
        "auto_mapping": _agreed(adapters, "auto_mapping"),
        "base_model_name_or_path": _agreed_base(adapters),
        "revision": _agreed(adapters, "revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _targets(adapters),
        "fan_in_fan_out": "conv1d" in kinds,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _agreed(adapters: Sequence[Adapter], key: str) -> Any:
    values = [a.settings.get(key) for a in adapters]
    return values[0] if all(value == values[0] for value in values) else None


def _agreed_base(adapters: Sequence[Adapter]) -> str | None:
    named = {a.base for a in adapters if a.base}
    return named.pop() if len(named) == 1 else None


def _targets(adapters: Sequence[Adapter]) -> list[str]:
    """Return last components where a source shows that they pick no other module; else paths.

    A source that targets the bare name "q_proj" without narrowing has a delta for every q_proj of
    the model, so the name means the same modules in the merged adapter.
    """
    safe: set[str] = set()
    for adapter in adapters:
        names = adapter.settings.get("target_modules")
        if adapter.settings.get("whole_names") and isinstance(names, list):
            safe.update(name for name in names if "." not in name)
    modules = {module for adapter in adapters for module in adapter.factors}
    short = {module.rpartition(".")[2] for module in modules}
    return sorted(short if short <= safe else modules)


def _peak() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
