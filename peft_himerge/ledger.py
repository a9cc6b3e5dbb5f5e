"""A run's scores in its journal: looked up and kept by everything that decides a score."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from .factors import Adapter
from .identity import NUMERICS, base_digest, environment, eval_digest
from .journal import Journal, Kept
from .plan import MergePlan
from .randomness import capture
from .scoring import Score, Task

__all__ = ["Ledger", "open_ledger"]

_LOG = logging.getLogger("peft_himerge.ledger")


@dataclass(frozen=True, slots=True)
class Ledger:
    """The journal of one run, with the digests that its keys are made of.

    A key holds the digests of just those adapters that are live in the state, so the scores of the
    base and of each adapter alone serve any later merge of other adapters too.

    Attributes:
        journal: the open journal.
        tasks: name -> task.
        evals: task -> fingerprint of its eval function.
        adapters: name -> digest of the adapter's weights.
    """

    journal: Journal
    tasks: Mapping[str, Task]
    evals: Mapping[str, str]
    adapters: Mapping[str, str]

    def find(self, task: str, state: str, plan: MergePlan | None) -> Kept | None:
        """Return the score of a state if the journal has it; see `add`."""
        return self.journal.find(self._key(task, state, plan))

    def add(
        self, task: str, state: str, plan: MergePlan | None, score: Score, seconds: float
    ) -> None:
        """Write a score to disk.

        Args:
            task: name of the task.
            state: fingerprint of the plan, or digest of an adapter that is in the model.
            plan: the plan; None for an adapter.
            score: the score.
            seconds: what it took.
        """
        self.journal.add(self._key(task, state, plan), score, seconds)

    def _key(self, task: str, state: str, plan: MergePlan | None) -> dict[str, Any]:
        live = {name for _, name, _ in plan.live()} if plan is not None else set()
        return {
            "task": task,
            "eval": self.evals[task],
            "metric": self.tasks[task].metric,
            "adapters": {name: self.adapters[name] for name in sorted(live)},
            "state": state,
        }


@contextmanager
def open_ledger(
    path: str | os.PathLike[str] | None,
    model: PeftModel,
    adapters: Mapping[str, Adapter],
    tasks: Mapping[str, Task],
) -> Iterator[Ledger | None]:
    """Open the journal at `path` for this run; None for no journal.

    Raises:
        JournalError: see `journal.Journal`.
    """
    if path is None:
        yield None
        return
    identity = {"base model": base_digest(model), "numerics": NUMERICS, **environment(model)}
    seen = {name: eval_digest(task.fn) for name, task in tasks.items()}
    with Journal(path, identity, capture()) as journal:
        for name, found in seen.items():
            if journal.found and found.unseen:
                _LOG.warning(
                    "scores of task %r are taken from %s, but the fingerprint of its eval function "
                    "cannot see into %s. If that changed, use another journal, or give the "
                    "function a text attribute `fingerprint`.",
                    name,
                    journal.file,
                    ", ".join(found.unseen),
                )
        yield Ledger(
            journal,
            tasks,
            {name: found.digest for name, found in seen.items()},
            {name: adapter.digest() for name, adapter in adapters.items()},
        )
