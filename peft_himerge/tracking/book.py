"""From the events of a merge to one frozen record of it, the only thing that listeners draw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..conflict import Resolution
from ..contribution import Contributions
from ..events import (
    ContributionsMeasured,
    Event,
    LayerResolved,
    MergeFinished,
    MergeStarted,
    RoundStarted,
    StateScored,
)
from ..plan import MergePlan
from ..report import conflict_record

__all__ = ["Book", "Round", "kept_shares", "overall"]


@dataclass(frozen=True, slots=True)
class Round:
    """One finished merge, during training or outside of it.

    Attributes:
        round: number of the merge, from 1.
        trigger: see `RoundStarted`; None outside of training.
        global_step: optimizer step of the training run; None outside of training.
        epoch: epoch of the training run; None outside of training.
        adapters: the merged adapters.
        scores: state ("base", each adapter, "model_wise", "merged", "exported") -> task -> score.
        metrics: task -> metric -> value of the merged model, for eval functions that return dicts.
        score: mean score over all tasks of the exported adapter (of the merged state if the
            exported one was not scored); None if nothing was scored.
        best_score: the largest `score` so far; it never falls.
        kept: adapter -> share of its own gain over the base model that the merge kept, on its own
            task: 1 is all of it, above 1 the other adapters help; None if it gains nothing alone.
        contributions: one record per (layer, task); empty without analysis.
        conflicts: one record per layer, worst first; empty without analysis.
        plan: the decision.
        scores_computed: number of scores that were computed.
        seconds: wall time.
    """

    round: int
    trigger: str | None
    global_step: int | None
    epoch: float | None
    adapters: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, Mapping[str, float]]
    score: float | None
    best_score: float | None
    kept: Mapping[str, float | None]
    contributions: Contributions
    conflicts: tuple[Resolution, ...]
    plan: MergePlan
    scores_computed: int
    seconds: float

    @property
    def final(self) -> Mapping[str, float]:
        """Task -> score of what the user gets: the exported adapter, or the merged state."""
        return self.scores.get("exported") or self.scores.get("merged") or {}

    @property
    def kinds(self) -> dict[str, int]:
        """Kind of conflict -> number of layers."""
        counts = {"severe": 0, "partial": 0, "mutual": 0}
        for resolution in self.conflicts:
            counts[resolution.conflict.kind.value] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {
            "round": self.round,
            "trigger": self.trigger,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "adapters": list(self.adapters),
            "score": self.score,
            "best_score": self.best_score,
            "kept": dict(self.kept),
            "scores": {state: dict(row) for state, row in self.scores.items()},
            "metrics": {task: dict(row) for task, row in self.metrics.items()},
            "contributions": self.contributions.to_records(),
            "conflicts": [conflict_record(r) for r in self.conflicts],
            "plan": self.plan.to_dict(),
            "scores_computed": self.scores_computed,
            "seconds": self.seconds,
        }


def overall(scores: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the mean over tasks of the exported, else of the merged state; None without one."""
    row = scores.get("exported") or scores.get("merged")
    return sum(row.values()) / len(row) if row else None


def kept_shares(
    scores: Mapping[str, Mapping[str, float]], adapters: tuple[str, ...]
) -> dict[str, float | None]:
    """Return adapter -> (final - base) / (alone - base) on its own task."""
    final = scores.get("exported") or scores.get("merged") or {}
    kept: dict[str, float | None] = {}
    for name in adapters:
        if name in final and name in scores.get(name, {}):
            base = scores["base"][name]
            gain = scores[name][name] - base
            kept[name] = (final[name] - base) / gain if gain else None
    return kept


@dataclass
class Book:
    """Takes events one by one and returns a `Round` when a merge is finished."""

    _round: RoundStarted | None = None
    _count: int = 0
    _best: float | None = None
    _adapters: tuple[str, ...] = ()
    _computed: int = 0
    _start: float = 0.0
    _metrics: dict[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    _contributions: Contributions = field(default_factory=Contributions)
    _conflicts: list[Resolution] = field(default_factory=list)

    @property
    def round(self) -> int:
        """Number of the last finished merge; 0 before the first."""
        return self._count

    def take(self, event: Event) -> Round | None:
        """Write one event down; return the record if it was the last one of a merge."""
        if isinstance(event, RoundStarted):
            self._round = event
            if event.best_score is not None:
                self._best = max(event.best_score, self._best or event.best_score)
        elif isinstance(event, MergeStarted):
            self._begin(event)
        elif isinstance(event, StateScored):
            self._computed += 1
            state = "exported" if event.plan is None else event.plan.fingerprint
            if event.score.metrics:
                self._metrics[state, event.task] = event.score.metrics
        elif isinstance(event, ContributionsMeasured):
            self._contributions = event.contributions
        elif isinstance(event, LayerResolved):
            self._conflicts.append(event.resolution)
        elif isinstance(event, MergeFinished):
            return self._finish(event)
        return None

    def _begin(self, event: MergeStarted) -> None:
        self._adapters = event.adapters
        self._computed, self._start = 0, time.perf_counter()
        self._metrics, self._conflicts = {}, []
        self._contributions = Contributions()

    def _finish(self, event: MergeFinished) -> Round:
        started = self._round or RoundStarted(self._count + 1, "")
        self._count, self._round = started.round, None
        score = overall(event.scores)
        if score is not None:
            self._best = score if self._best is None else max(self._best, score)
        return Round(
            round=started.round,
            trigger=started.trigger or None,
            global_step=started.global_step,
            epoch=started.epoch,
            adapters=self._adapters,
            scores=event.scores,
            metrics=self._final_metrics(event.plan),
            score=score,
            best_score=self._best,
            kept=kept_shares(event.scores, self._adapters),
            contributions=self._contributions,
            conflicts=tuple(self._conflicts),
            plan=event.plan,
            scores_computed=self._computed,
            seconds=time.perf_counter() - self._start,
        )

    def _final_metrics(self, plan: MergePlan) -> dict[str, Mapping[str, float]]:
        """Return task -> metrics of the exported adapter, or of the merged state."""
        found: dict[str, Mapping[str, float]] = {}
        for state in (plan.fingerprint, "exported"):
            found |= {task: row for (at, task), row in self._metrics.items() if at == state}
        return found
