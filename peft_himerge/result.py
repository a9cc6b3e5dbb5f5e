"""What the user gets back from a merge."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from . import card, checkpoint, export, files, geometry, report
from .adapters import plain_factors
from .combine import Combiner
from .conflict import Resolution
from .contribution import Contributions
from .errors import AdapterError, suggest
from .focus import write_focused
from .outputs import publishing
from .page import HOW_TO_GET_IT, available, parse_report, render_page
from .plan import MergePlan
from .scoring import Score
from .search import Trial

__all__ = [
    "FOCUSED",
    "MergeResult",
    "ModuleError",
    "deltas_of",
    "module_records",
    "relative_error",
    "save_page",
    "save_reports",
    "versions",
]

FOCUSED = "focused"
"""Folder beside a merge with the focused adapters that it merged."""

_LOG = logging.getLogger("peft_himerge.result")


@dataclass(frozen=True, slots=True)
class ModuleError:
    """How well one module's exported delta follows the exact one.

    Attributes:
        module: module path.
        rank: rank that carries values (the file is padded to one rank for all modules).
        error: relative Frobenius error of the exported delta.
        norm: Frobenius norm of the exact delta.
    """

    module: str
    rank: int
    error: float
    norm: float


@dataclass(frozen=True, eq=False)
class MergeResult:
    """A finished merge: the decision, what it rests on, and the merged adapter in the model.

    Attributes:
        adapter_name: name of the merged adapter in `model`.
        model: the model the adapter was added to.
        plan: the decision; replay it with `apply_plan`.
        contributions: one record per (layer, task); empty after `apply_plan`.
        conflicts: one record per layer, in the order they were treated; empty after `apply_plan`.
        states: state name ("base", each adapter, "model_wise", "merged", "exported") -> task ->
            `Score`.
        search: every density and scale that was tried.
        modules: per-module export error.
        rank: the exported adapter's rank.
        scores_computed: number of calls of eval functions.
        seconds: wall time of the whole call.
        options: the options of the merge, as plain values.
        blocks_run: transformer blocks that this process ran for scores; 0 if they were not counted
            (prefix_cache_gb=0, or a model whose blocks were not found).
        blocks_skipped: blocks that it did not run because another score had.
    """

    adapter_name: str
    model: PeftModel
    plan: MergePlan
    contributions: Contributions
    conflicts: tuple[Resolution, ...]
    states: Mapping[str, Mapping[str, Score]]
    search: tuple[Trial, ...]
    modules: tuple[ModuleError, ...]
    rank: int
    scores_computed: int
    seconds: float
    options: Mapping[str, Any]
    blocks_run: int
    blocks_skipped: int
    _combiner: Combiner = field(repr=False)
    _versions: Mapping[str, int] = field(repr=False)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """State -> task -> score."""
        return {s: {t: x.value for t, x in row.items()} for s, row in self.states.items()}

    @property
    def standard_errors(self) -> dict[str, dict[str, float | None]]:
        """State -> task -> standard error of the score; None without per-example scores."""
        return {s: {t: x.se for t, x in row.items()} for s, row in self.states.items()}

    @property
    def export_error(self) -> float:
        """Relative Frobenius error of the exported adapter over all modules together."""
        return relative_error(self.modules)

    @property
    def export_drop(self) -> float | None:
        """Mean score over tasks lost by export (merged minus exported); None if not scored."""
        if "exported" not in self.states:
            return None
        merged, exported = self.states["merged"], self.states["exported"]
        return sum(merged[t].value - exported[t].value for t in merged) / len(merged)

    def delta(self, module: str) -> Tensor:
        """Return the exact merged delta of one module, (out, in), materialised now.

        Raises:
            AdapterError: no adapter changes that module, or a source adapter's weights have
                changed since the merge, so that its delta is no longer the one that was merged.
        """
        combiner = self._unchanged()
        if module not in combiner.modules:
            raise AdapterError(f"no module {module!r}.{suggest(module, combiner.modules)}")
        return combiner.delta(module, combiner.terms(self.plan, module))

    def _unchanged(self) -> Combiner:
        for name, adapter in self._combiner.adapters.items():
            if adapter.version() != self._versions[name]:
                raise AdapterError(
                    f"the weights of adapter {name!r} changed since the merge (training went "
                    f"on?). Merge again, or keep a copy of the adapter."
                )
        return self._combiner

    def save(
        self,
        folder: str | Path,
        *,
        sources: Mapping[str, str | Path] | None = None,
        page: bool = True,
    ) -> Path:
        """Write the merged adapter in PEFT's layout, plan.json, report.json, report.md, README.md.

        Focused adapters that were merged go to the folder `focused` inside, one folder each: the
        plan is for them. Also report.html, a page of about 5 MB that opens from disk without a
        network. The report holds norms, cosines, signs and singular values of the deltas, which
        takes well under a second for a model of 0.3 billion parameters and some seconds for one of
        7 billion.

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
        licences = card.licences_of(sources, self.plan.sources)
        shown = deltas_of(self.model, self.adapter_name, self._unchanged)
        facts = self.to_dict() | {"geometry": shown}
        base = self.model.peft_config[self.adapter_name].base_model_name_or_path
        with publishing(folder) as new:
            for name, adapter in self._combiner.adapters.items():
                if adapter.focused:
                    write_focused(self.model, adapter, new / FOCUSED / name)
            files.write_text(new / "plan.json", self.plan.to_json())
            save_reports(new, facts, page=page)
            files.write_text(new / "README.md", card.render_card(facts, base, licences))
            export.write_adapter(self.model, self.adapter_name, new)
        return Path(folder)

    def save_merged(self, base: str | Path, folder: str | Path) -> Path:
        """Write base + exact merged delta as a full checkpoint, streamed from the folder `base`.

        Nothing is approximated here, so a pruned merge scores as `scores["merged"]`.
        """
        combiner = self._unchanged()

        def blocks(module: str) -> Iterator[tuple[slice, Tensor]]:
            return combiner.blocks(module, combiner.terms(self.plan, module))

        return checkpoint.save_checkpoint(base, combiner, blocks, folder)

    def merge_into_model(self) -> None:
        """Add the exact merged delta to the live model's base weights, for good.

        The adapters stay in the model: call ``model.unload()`` to get the plain merged model.
        """
        export.merge_in_place(self.model, self._unchanged(), self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole story as plain JSON values; the content of report.json.

        `save` adds the key "geometry" (`geometry.to_records`), which takes a look at every delta.
        `page.Report` says what each key holds.
        """
        return {
            "format": "peft_himerge.report/1",
            "adapter_name": self.adapter_name,
            "plan": self.plan.to_dict(),
            "scores": self.scores,
            "standard_errors": self.standard_errors,
            "metrics": {
                s: {t: dict(x.metrics) for t, x in row.items()} for s, row in self.states.items()
            },
            "contributions": self.contributions.to_records(),
            "conflicts": [report.conflict_record(r) for r in self.conflicts],
            "search": [
                {
                    "adapter": t.adapter,
                    "density": t.edit.density,
                    "scale": t.edit.scale,
                    "value": t.value,
                }
                for t in self.search
            ],
            "export": {
                "rank": self.rank,
                "relative_error": self.export_error,
                "drop": self.export_drop,
                "modules": module_records(self.modules),
            },
            "cost": {
                "scores": self.scores_computed,
                "seconds": self.seconds,
                "blocks_run": self.blocks_run,
                "blocks_skipped": self.blocks_skipped,
            },
            "options": dict(self.options),
            "versions": versions(),
        }


def relative_error(modules: Sequence[ModuleError]) -> float:
    """Return the relative Frobenius error over all modules together; 0 for a zero delta."""
    total = sum(m.norm**2 for m in modules)
    lost = sum((m.error * m.norm) ** 2 for m in modules)
    return (lost / total) ** 0.5 if total else 0.0


def module_records(modules: Sequence[ModuleError]) -> list[dict[str, Any]]:
    """Return what report.json says of each module's export."""
    return [
        {"module": m.module, "rank": m.rank, "relative_error": m.error, "norm": m.norm}
        for m in modules
    ]


def deltas_of(
    model: PeftModel, adapter_name: str, sources: Callable[[], Combiner]
) -> dict[str, Any] | None:
    """Return the key "geometry" of report.json; None if the sources are no longer those merged.

    Args:
        model: holds the merged adapter.
        adapter_name: its name.
        sources: gives the merged adapters; raises an AdapterError if they have changed.
    """
    try:
        combiner = sources()
    except AdapterError as exc:
        _LOG.warning("the report is without norms, cosines and spectra: %s", exc)
        return None
    exported = plain_factors(model, adapter_name)
    return geometry.to_records(geometry.layer_geometry(combiner), geometry.spectra_of(exported))


def save_reports(folder: Path, facts: Mapping[str, Any], *, page: bool = True) -> None:
    """Write report.json, report.md and, if wanted, report.html."""
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    files.write_text(folder / "report.json", text + "\n")
    files.write_text(folder / "report.md", report.render_markdown(facts))
    if page:
        save_page(folder, facts)


def save_page(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write report.html for the content of report.json, or say what it takes to get it."""
    if available():
        files.write_text(folder / "report.html", render_page(parse_report(facts)))
    else:
        _LOG.warning("no report.html: %s, then himerge report FOLDER", HOW_TO_GET_IT)


def versions() -> dict[str, str]:
    """Return the versions that a report names."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
