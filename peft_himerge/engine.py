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

        Task by task, the states are taken depth first through the prefix tree over layers, so
        neighbours share as many layers as they can: what they share is neither put in place nor
        run again.
        """
        keys = [(task, plan.fingerprint) for task, plan in requests]
        missing: dict[str, dict[str, MergePlan]] = {}
        for (task, plan), key in zip(requests, keys, strict=True):
            if key not in self._known:
                missing.setdefault(task, {})[key[1]] = plan
        for task, plans in missing.items():
            for fingerprint in sorted(plans, key=lambda f: self._path(plans[f])):
                self._known[task, fingerprint] = self._compute(task, plans[fingerprint])
        return [self._known[key] for key in keys]

    def _path(self, plan: MergePlan) -> tuple[str, ...]:
        """Return the plan's path in the prefix tree: the state of every layer, first to last."""
        combiner = self._probe.combiner
        return tuple(
            repr([combiner.terms(plan, module) for module in layer.modules])
            for layer in combiner.in_order()
        )

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
