"""Scores of candidate merges on the live model: what methods that need scores are fitted to.

A candidate is what a method gives, an iterator of (module, delta). It is put into the model, scored
on the tasks asked for and taken out again before anything else happens, so that between two scores
the model is the user's own, bit for bit, and so it is after an eval function that raises. Equal
deltas are equal candidates: a task is scored on them once.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import ConfigError, suggest
from .identity import tensor_digest
from .methods.stack import Delta, Factored, Result
from .probe import Probe
from .scoring import EvalFn, Score, Task, check_eval_fns

__all__ = ["Trials", "tasks_of"]

_LOG = logging.getLogger("peft_himerge.trials")


def tasks_of(
    adapters: Sequence[str],
    eval_fns: Mapping[str, EvalFn],
    metric: str | Mapping[str, str] | None = None,
) -> dict[str, Task]:
    """Return the adapters' own tasks by name, then the guard tasks in the user's order.

    Args:
        adapters: names of the adapters; each has its own task, also one whose delta is zero.
        eval_fns: adapter -> function of the model; further names are guard tasks.
        metric: which entry of a dict of metrics is the score: one name, or one per task.

    Raises:
        ConfigError: an adapter has no function, one is no function, or `metric` names no task.
    """
    check_eval_fns(adapters, eval_fns)
    if isinstance(metric, Mapping):
        for name in metric:
            if name not in eval_fns:
                raise ConfigError(f"metric names the task {name!r}.{suggest(name, eval_fns)}")
    order = sorted(adapters) + [name for name in eval_fns if name not in adapters]
    of = metric.get if isinstance(metric, Mapping) else lambda _: metric
    return {n: Task(n, eval_fns[n], of(n), guard=n not in adapters) for n in order}


class Trials:
    """Scores candidates through a probe and remembers them.

    Args:
        probe: shows deltas in the live model; not entered.
        tasks: name -> task, the adapters' own and the guards.

    Attributes:
        count: scores computed so far: calls of eval functions.
    """

    def __init__(self, probe: Probe, tasks: Mapping[str, Task]) -> None:
        self._probe = probe
        self._tasks = tasks
        self._known: dict[tuple[str, str], Score] = {}
        self.count = 0

    @property
    def own(self) -> tuple[str, ...]:
        """The adapters' tasks, which have the adapters' names, sorted."""
        return tuple(name for name, task in self._tasks.items() if not task.guard)

    @property
    def guards(self) -> tuple[str, ...]:
        """The tasks of no adapter: to be reported, not to be merged for."""
        return tuple(name for name, task in self._tasks.items() if task.guard)

    def scores(self, candidate: Result, tasks: Sequence[str] | None = None) -> dict[str, Score]:
        """Return task -> score of a candidate merge; the model is as before when this returns.

        Args:
            candidate: (module, delta) of every module it changes; nothing is the base model.
            tasks: the tasks to score; the adapters' own by default.

        Raises:
            EvalError: an eval function returned no score, or wrote to a weight.
        """
        wanted = self.own if tasks is None else tuple(tasks)
        state = hashlib.sha256()
        with self._probe as probe:
            probe.show_deltas(_digested(candidate, state))
            digest = state.hexdigest()
            for task in wanted:
                if (digest, task) not in self._known:
                    self._known[digest, task] = self._score(task)
        return {task: self._known[digest, task] for task in wanted}

    def _score(self, task: str) -> Score:
        start = time.perf_counter()
        score = self._probe.call(self._tasks[task])
        self.count += 1
        took = time.perf_counter() - start
        _LOG.info("score %d: %s %.6g in %.1f s", self.count, task, score.value, took)
        return score


def _digested(candidate: Result, state: Any) -> Result:
    """Pass the candidate's deltas on, and add each to the digest."""
    for module, delta in candidate:
        for part in _parts(delta):
            told = f"{module}|{type(delta).__name__}|{tensor_digest(part)}\n"
            state.update(told.encode())
        yield module, delta


def _parts(delta: Delta) -> Iterator[Tensor]:
    yield from (delta.b, delta.a) if isinstance(delta, Factored) else (delta.delta,)
