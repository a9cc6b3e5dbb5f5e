"""Scores of (task, plan), asked for in bulk; a state is never scored twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from .events import Event, StateScored
from .plan import MergePlan
from .probe import Probe
from .scoring import Score, Task

__all__ = ["Engine", "Request"]

Request = tuple[str, MergePlan]


class Engine:
    """Computes scores through a probe and remembers them by (task, plan fingerprint).

    Args:
        probe: shows plans in the live model; must be entered.
        tasks: name -> task.
        emit: gets a `StateScored` for every score that was computed.
        total: upper bound on the scores of this run, for progress.
    """

    def __init__(
        self,
        probe: Probe,
        tasks: Mapping[str, Task],
        emit: Callable[[Event], None],
        total: int,
    ) -> None:
        self._probe = probe
        self._tasks = tasks
        self._emit = emit
        self._known: dict[tuple[str, str], Score] = {}
        self.stage = "states"
        self.total = total
        self.done = 0
        self.seconds = 0.0

    def score(self, task: str, plan: MergePlan) -> Score:
        """Return the score of one task in one state."""
        return self.score_many([(task, plan)])[0]

    def score_many(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of all requests, in their order.

        States asked for by several tasks are put in place once, in the order given, so neighbours
        that differ in few layers cost few swaps.
        """
        by_state: dict[str, tuple[MergePlan, list[str]]] = {}
        keys = []
        for task, plan in requests:
            key = (task, plan.fingerprint)
            keys.append(key)
            names = by_state.setdefault(key[1], (plan, []))[1]
            if key not in self._known and task not in names:
                names.append(task)
        for fingerprint, (plan, names) in by_state.items():
            for task in names:
                self._known[task, fingerprint] = self._compute(task, plan)
        return [self._known[key] for key in keys]

    def score_adapter(self, task: str, name: str) -> Score:
        """Return the score of an adapter that is in the model, through PEFT's own forward."""
        return self._timed(task, None, lambda: self._probe.show_adapter(name))

    def _compute(self, task: str, plan: MergePlan) -> Score:
        return self._timed(task, plan, lambda: self._probe.show(plan))

    def _timed(self, task: str, plan: MergePlan | None, show: Callable[[], None]) -> Score:
        start = time.perf_counter()
        show()
        score = self._probe.call(self._tasks[task])
        seconds = time.perf_counter() - start
        self.done += 1
        self.seconds += seconds
        self.total = max(self.total, self.done)
        self._emit(StateScored(self.stage, task, plan, score, seconds, self.done, self.total))
        return score
