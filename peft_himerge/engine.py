"""Scores of (task, state), asked for in bulk; a state is never scored twice.

Each score is looked up in memory, then in the journal, and computed only then. What has to be
computed is put into the order of the prefix tree, depth first, so neighbours share as many layers
as they can: what they share is neither put in place nor run again. Several processes take one
contiguous piece of that order each and tell each other what they found, so all end with the same
table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cost import Cost, Path, common_prefix, path_of
from .events import Event, StateScored
from .identity import adapter_digest
from .journal import pack_score, unpack_score
from .ledger import Ledger
from .plan import MergePlan
from .probe import Probe
from .processes import Team
from .scoring import Score, Task

__all__ = ["Engine", "Request"]

# A plan, or the name of an adapter that is in the model and is scored through PEFT's own forward.
State = MergePlan | str
Request = tuple[str, State]
_Key = tuple[str, str]

# Processes tell each other what they found this often; a kill loses no more of the others' work.
_EXCHANGE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Job:
    """One score to be computed."""

    task: str
    state: str
    plan: MergePlan | None
    adapter: str | None
    path: Path

    @property
    def key(self) -> _Key:
        return (self.task, self.state)


class Engine:
    """Computes scores through a probe and remembers them.

    Args:
        probe: shows plans in the live model; must be entered.
        tasks: name -> task.
        emit: gets a `StateScored` for every score that was computed; called by the main process
            only.
        cost: the steps of this run, for `begin` and `total`; None if they do not matter.
        ledger: the journal; None keeps scores in memory only. Read and written by the main process
            only.
        team: the processes that share the work.

    Attributes:
        done: scores computed so far, by all processes.
        seconds: the sum of their wall times.
    """

    def __init__(
        self,
        probe: Probe,
        tasks: Mapping[str, Task],
        emit: Callable[[Event], None],
        cost: Cost | None = None,
        *,
        ledger: Ledger | None = None,
        team: Team | None = None,
    ) -> None:
        self._probe = probe
        self._tasks = tasks
        self._emit = emit
        self._ledger = ledger
        self._team = team or Team()
        self._known: dict[_Key, Score] = {}
        self._order = tuple(layer.label for layer in probe.combiner.in_order())
        self._paces: dict[str, tuple[float, int]] = {}
        self._steps = (cost or Cost.flat(0)).steps
        self._step = 0
        self._left = self._steps[0].scores
        self.done = 0
        self.seconds = 0.0

    def begin(self, step: str) -> None:
        """Enter the step of this name; what the steps before it left over is not needed."""
        names = [s.name for s in self._steps]
        self._step = names.index(step, self._step)
        self._left = self._steps[self._step].scores

    @property
    def stage(self) -> str:
        """What scores are reported as."""
        return self._steps[self._step].stage

    @property
    def total(self) -> int:
        """Upper bound on the scores this run computes; it only ever falls."""
        later = sum(step.scores for step in self._steps[self._step + 1 :])
        return self.done + max(self._left, 0) + later

    def score(self, task: str, state: State) -> Score:
        """Return the score of one task in one state."""
        return self.score_many([(task, state)])[0]

    def score_many(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of all requests, in their order.

        Args:
            requests: (task, plan), or (task, name of an adapter in the model).

        Raises:
            EvalError: an eval function returned no score.
            JournalError: a score could not be written to the journal.
            ProcessError: another process failed.
        """
        jobs = [self._job(task, state) for task, state in requests]
        missing = {job.key: job for job in jobs if job.key not in self._known}
        if missing:
            self._fetch(sorted(missing.values(), key=lambda job: (job.task, job.path, job.state)))
        return [self._known[job.key] for job in jobs]

    def _job(self, task: str, state: State) -> _Job:
        if isinstance(state, str):
            digest = f"adapter {adapter_digest(self._probe.model, state)}"
            return _Job(task, digest, None, state, ())
        return _Job(task, state.fingerprint, state, None, path_of(state, self._order))

    def _fetch(self, jobs: Sequence[_Job]) -> None:
        """Get the scores of all jobs, from the journal or by computing them."""
        found = self._recall(jobs)
        self._known.update(found)
        self._left -= len(found)
        missing = [job for job in jobs if job.key not in found]
        weights = self._weights(missing)
        pieces = _pieces(weights, self._team.size)
        seconds: dict[int, float] = {}
        start = time.perf_counter()
        fresh: list[tuple[int, Any, float]] = []
        for place, index in enumerate(mine := pieces[self._team.rank]):
            score, took = self._compute(missing[index])
            self._take(missing[index], score, took)
            seconds[index] = took
            fresh.append((index, pack_score(score), took))
            last = place == len(mine) - 1
            if not last and time.perf_counter() - start > _EXCHANGE_SECONDS:
                self._share(missing, fresh, seconds, more=True)
                start, fresh = time.perf_counter(), []
        while self._share(missing, fresh, seconds, more=False):
            fresh = []
        for index, weight in enumerate(weights):
            spent, blocks = self._paces.get(missing[index].task, (0.0, 0))
            self._paces[missing[index].task] = (spent + seconds[index], blocks + weight[1])

    def _recall(self, jobs: Sequence[_Job]) -> dict[_Key, Score]:
        """Return what the main process finds in the journal; the same on all processes."""
        packed = {}
        if self._ledger is not None:
            for index, job in enumerate(jobs):
                kept = self._ledger.find(job.task, job.state, job.plan)
                if kept is not None:
                    packed[index] = pack_score(kept.score)
        packed = self._team.first("scores to compute", [job.key for job in jobs], packed)
        return {jobs[index].key: unpack_score(score) for index, score in packed.items()}

    def _share(
        self,
        jobs: Sequence[_Job],
        fresh: list[tuple[int, Any, float]],
        seconds: dict[int, float],
        *,
        more: bool,
    ) -> bool:
        """Tell the others what this process found; return whether any of them goes on."""
        if self._team.size == 1:
            return False
        heard = self._team.exchange("scores", (fresh, more))
        for rank, (found, _) in enumerate(heard):
            for index, packed, took in found if rank != self._team.rank else ():
                self._take(jobs[index], unpack_score(packed), took)
                seconds[index] = took
        return any(goes_on for _, goes_on in heard)

    def _compute(self, job: _Job) -> tuple[Score, float]:
        start = time.perf_counter()
        if job.plan is not None:
            self._probe.show(job.plan)
        else:
            assert job.adapter is not None
            self._probe.show_adapter(job.adapter)
        score = self._probe.call(self._tasks[job.task])
        return score, time.perf_counter() - start

    def _take(self, job: _Job, score: Score, seconds: float) -> None:
        """Keep a score that was computed here or elsewhere."""
        if self._ledger is not None:
            self._ledger.add(job.task, job.state, job.plan, score, seconds)
        self._known[job.key] = score
        self.done += 1
        self._left -= 1
        self.seconds += seconds
        if self._team.main:
            self._emit(
                StateScored(self.stage, job.task, job.plan, score, seconds, self.done, self.total)
            )

    def _weights(self, jobs: Sequence[_Job]) -> list[tuple[float, int]]:
        """Return what each job will cost: seconds as far as the task's pace is known, and blocks.

        All processes compute the same numbers, since they hold the same table.
        """
        paces = {task: spent / blocks for task, (spent, blocks) in self._paces.items()}
        usual = sum(paces.values()) / len(paces) if paces else 1.0
        weights = []
        last: _Job | None = None
        for job in jobs:
            shares = last is not None and last.task == job.task and len(last.path) == len(job.path)
            skipped = common_prefix(last.path, job.path) if shares and last is not None else 0
            blocks = len(job.path) - skipped + 1
            weights.append((paces.get(job.task, usual) * blocks, blocks))
            last = job
        return weights


def _pieces(weights: Sequence[tuple[float, int]], size: int) -> list[list[int]]:
    """Cut a row of jobs into contiguous pieces of about equal weight, one per process."""
    total = sum(weight for weight, _ in weights)
    pieces: list[list[int]] = [[] for _ in range(size)]
    before = 0.0
    for index, (weight, _) in enumerate(weights):
        middle = (before + weight / 2) / total if total > 0 else 0.0
        pieces[min(int(middle * size), size - 1)].append(index)
        before += weight
    return pieces
