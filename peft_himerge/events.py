"""What a merge tells while it runs: frozen records, handed to any callable.

A listener is any `Callable[[Event], None]`; pass several as `callbacks=` of `merge_adapters_hi`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conflict import Resolution
from .contribution import Contributions
from .plan import MergePlan
from .scoring import Score

__all__ = [
    "AdapterSaved",
    "ContributionsMeasured",
    "Event",
    "FocusStarted",
    "LayerResolved",
    "Listener",
    "MergeFinished",
    "MergeStarted",
    "MergeTested",
    "RoundStarted",
    "StateScored",
]


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """A merge during training begins; the merge's own events follow.

    Attributes:
        round: number of the round, from 1; it goes on counting after a resume.
        trigger: what asked for it: "evaluate", "save", "train_end" or "now".
        global_step: the optimizer step of the training run, or None outside of one.
        epoch: the epoch of the training run, or None.
        best_score: the best score of the rounds before, or None in the first one.
    """

    round: int
    trigger: str
    global_step: int | None = None
    epoch: float | None = None
    best_score: float | None = None


@dataclass(frozen=True, slots=True)
class FocusStarted:
    """Before the run begins, the adapters are focused on their tasks' inputs; no scores yet."""

    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergeStarted:
    """The run begins; everything was validated.

    Attributes:
        adapters: names of the adapters.
        tasks: names of all tasks, guard tasks last.
        layers: labels of the layers, in order.
        scores: upper bound on the number of scores the run needs.
        digests: adapter -> digest of its weights.
        options: the options of the merge, as plain values.
    """

    adapters: tuple[str, ...]
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    scores: int
    digests: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateScored:
    """One score was computed (never sent for a score that was known already).

    Attributes:
        stage: what the score is for: "states", "search", "analysis", "repair", "export" or, after a
            recipe's merge, "test".
        task: name of the task.
        plan: the scored state; None for the exported adapter and for what is tested.
        score: the score.
        seconds: wall time of this score, putting the state in place included.
        done: scores computed so far in this run.
        total: upper bound on the scores of this run, as known now.
    """

    stage: str
    task: str
    plan: MergePlan | None
    score: Score
    seconds: float
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ContributionsMeasured:
    """Contribution analysis is complete."""

    contributions: Contributions


@dataclass(frozen=True, slots=True)
class LayerResolved:
    """One layer's conflict was treated; `plan` holds all edits so far."""

    resolution: Resolution
    plan: MergePlan


@dataclass(frozen=True, slots=True)
class MergeFinished:
    """The run is over: the final plan and state -> task -> score."""

    plan: MergePlan
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergeTested:
    """The merged adapter was scored on data that decided nothing.

    Attributes:
        scores: "base", each adapter, and last the merged adapter -> task -> score.
        kept: share of what each adapter wins alone that is left, a mean over their tasks; None if
            none wins anything.
    """

    scores: Mapping[str, Mapping[str, Score]]
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterSaved:
    """The merged adapter was written.

    Attributes:
        folder: where.
        plan: what was decided; None after a method of the registry, which has no plan.
    """

    folder: Path
    plan: MergePlan | None


Event = (
    FocusStarted
    | MergeStarted
    | StateScored
    | ContributionsMeasured
    | LayerResolved
    | MergeFinished
    | MergeTested
    | RoundStarted
    | AdapterSaved
)
Listener = Callable[[Event], None]
