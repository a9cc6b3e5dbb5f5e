"""What a merge by a method of the registry gives back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from . import card, checkpoint, export, files
from .combine import Combiner
from .errors import AdapterError, ConfigError, suggest
from .factors import Adapter
from .methods.registry import MethodInfo
from .methods.stack import Delta
from .outputs import owning, publishing, told
from .result import (
    MergeResult,
    ModuleError,
    deltas_of,
    module_records,
    relative_error,
    save_reports,
    versions,
)
from .spool import waiting

__all__ = ["AdapterMerge"]


@dataclass(frozen=True, eq=False)
class AdapterMerge:
    """A finished merge by a method of the registry.

    Attributes:
        adapter_name: name of the merged adapter in `model`; frozen, and not active.
        model: the model it was added to.
        method: what was done.
        weights: adapter -> weight, in the user's order.
        options: the method's options, defaults included.
        space: where it was done.
        seed: what random masks were drawn from.
        modules: per module, the rank and the error of the adapter against the exact result.
        rank: the adapter's rank.
        notes: what had to be done differently (an SVD that did not converge); usually empty.
        fitted: what the method learned from data (`Fitted.report`); {} if it needed none.
        hi: for the method "hi", what `merge_adapters_hi` found; otherwise None.
        seconds: wall time.
    """

    adapter_name: str
    model: PeftModel
    method: MethodInfo
    weights: Mapping[str, float]
    options: Mapping[str, Any]
    space: str
    seed: int
    modules: tuple[ModuleError, ...]
    rank: int
    notes: tuple[str, ...]
    fitted: Mapping[str, Any]
    seconds: float
    _deltas: Callable[[], Iterator[tuple[str, Delta]]] = field(repr=False)
    _sources: Mapping[str, tuple[Adapter, int]] = field(repr=False)
    _carried: Mapping[str, Any] = field(repr=False)
    hi: MergeResult | None = field(default=None, repr=False)

    @property
    def export_error(self) -> float:
        """Relative Frobenius error of the adapter over all modules together."""
        return relative_error(self.modules)

    def delta(self, module: str) -> Tensor:
        """Return the exact merged delta of one module, (out, in), which the adapter approximates.

        The method runs again for it: free for sums, as long as the merge for the others.

        Raises:
            AdapterError: no adapter changes that module, or a source's weights have changed since.
        """
        self._check_sources()
        for found, delta in self._deltas():
            if found == module:
                return delta.dense()
        raise AdapterError(
            f"no module {module!r}.{suggest(module, [m.module for m in self.modules])}"
        )

    def _check_sources(self) -> Combiner:
        for name, (adapter, version) in self._sources.items():
            if adapter.version() != version:
                raise AdapterError(
                    f"the weights of adapter {name!r} changed since the merge. Merge again, or "
                    f"keep a copy of the adapter."
                )
        return Combiner([adapter for adapter, _ in self._sources.values()])

    def save(
        self,
        folder: str | Path,
        *,
        sources: Mapping[str, str | Path] | None = None,
        page: bool = True,
    ) -> Path:
        """Write the merged adapter in PEFT's layout, report.json, report.md and README.md.

        Also report.html, a page of about 5 MB that opens from disk without a network. The report
        holds norms, cosines and signs of the sources' deltas and the singular values of the merged
        ones. For the method "hi" all is as by `MergeResult.save`, with plan.json.

        Args:
            folder: created if it is not there; files of these names are replaced, all or none.
            sources: adapter -> folder it was loaded from, as far as you like: licences that their
                model cards name go into ours.
            page: False leaves out report.html; ``himerge report FOLDER`` makes it later.

        Returns:
            The folder. Load it with ``PeftModel.from_pretrained(base, folder)``.

        Raises:
            ConfigError: `sources` names another adapter.
            OutputError: the folder is in use or cannot be written; it is as it was.
        """
        if self.hi is not None:
            return self.hi.save(folder, sources=sources, page=page)
        licences = card.licences_of(sources, self._sources)
        shown = deltas_of(self.model, self.adapter_name, self._check_sources)
        facts = self.to_dict() | {"geometry": shown}
        base = self.model.peft_config[self.adapter_name].base_model_name_or_path
        with publishing(folder) as new:
            save_reports(new, facts, page=page)
            files.write_text(new / "README.md", card.render_card(facts, base, licences))
            export.write_adapter(self.model, self.adapter_name, new)
        return Path(folder)

    def save_merged(self, base: str | Path, folder: str | Path) -> Path:
        """Write base + exact merged delta as a full checkpoint, streamed from the folder `base`.

        The method runs once more. Deltas that are no product of thin factors wait on disk, beside
        the checkpoint, for their turn.

        Raises:
            ConfigError: the adapter also holds what is no delta (saved modules, trained tokens,
                biases), or `base` is no plain checkpoint.
            AdapterError: a source's weights have changed since the merge.
            PlanError: `base` is not the adapters' base.
        """
        combiner = self._check_sources()
        if self._carried:
            raise ConfigError(
                f"the merged adapter also holds {', '.join(self._carried)}, which are no deltas of "
                f"base weights. Use model.merge_and_unload() for them."
            )
        with owning(folder), told(Path(folder)), tempfile.TemporaryFile(dir=folder) as spool:
            blocks = waiting(self._deltas, spool)
            return checkpoint.save_checkpoint(base, combiner, blocks, folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the merge as plain JSON values; the content of report.json.

        `save` adds the key "geometry" (`geometry.to_records`). `page.Report` says what each key
        holds. For the method "hi" it is `MergeResult.to_dict`.
        """
        if self.hi is not None:
            return self.hi.to_dict()
        facts = {
            "format": "peft_himerge.adapter_merge/1",
            "adapter_name": self.adapter_name,
            "method": {
                "name": self.method.name,
                "title": self.method.title,
                "url": self.method.url,
                "variant": self.method.variant,
            },
            "weights": dict(self.weights),
            "options": dict(self.options),
            "space": self.space,
            "seed": self.seed,
            "sources": {name: adapter.digest() for name, (adapter, _) in self._sources.items()},
            **_scores(self.fitted),
            "export": {
                "rank": self.rank,
                "relative_error": self.export_error,
                "drop": None,
                "modules": module_records(self.modules),
            },
            "cost": {
                "scores": self.fitted.get("scores_computed", 0),
                "seconds": self.seconds,
            },
            "notes": list(self.notes),
            "fitted": dict(self.fitted),
            "versions": versions(),
        }
        return {key: _plain(value) for key, value in facts.items()}


def _scores(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a method that looks at scores found of its result: state -> task -> value."""
    found: Mapping[str, Any] = fitted.get("scores", {})
    if not found:
        return {"scores": {}, "standard_errors": {}, "metrics": {}}
    return {
        "scores": {"merged": {task: told["value"] for task, told in found.items()}},
        "standard_errors": {"merged": {task: told["se"] for task, told in found.items()}},
        "metrics": {"merged": {task: told.get("metrics", {}) for task, told in found.items()}},
    }


def _plain(value: Any) -> Any:
    """Return options and findings as JSON values; what JSON has no word for becomes a text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
