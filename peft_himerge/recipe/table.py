"""The table of test scores: base model, every adapter, the merged one, and the share it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel

from ..events import Listener, MergeTested, StateScored
from ..probe import preserved
from ..report import score_rows
from ..scoring import Score, Task, read_score
from .schema import BASE
from .tasks import Scored

__all__ = ["TestTable", "score_test"]


@dataclass(frozen=True, slots=True)
class TestTable:
    """Scores of test data, on which nothing was decided.

    Attributes:
        states: "base", each adapter, the merged adapter -> task -> `Score`.
        adapters: names of the adapters that were merged.
        merged: name of the merged one.
    """

    __test__ = False  # pytest takes every class of that name for tests

    states: Mapping[str, Mapping[str, Score]]
    adapters: tuple[str, ...]
    merged: str

    def kept(self, state: str) -> float | None:
        """Return the share of what each adapter wins alone that is left, a mean over their tasks.

        Tasks on which the adapter alone is no better than the base model do not count; None if
        there is no other.
        """
        shares = []
        for name in self.adapters:
            if name in self.states[BASE]:
                base, alone = self.states[BASE][name].value, self.states[name][name].value
                if alone > base:
                    shares.append((self.states[state][name].value - base) / (alone - base))
        return sum(shares) / len(shares) if shares else None

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: a state a row, a task a column, standard errors where known."""
        scores = {s: {t: x.value for t, x in row.items()} for s, row in self.states.items()}
        errors = {s: {t: x.se for t, x in row.items()} for s, row in self.states.items()}
        header, rows = score_rows(scores, errors)
        for state, row in zip(self.states, rows, strict=True):
            kept = self.kept(state)
            row.append("" if kept is None else f"{kept:.0%}")
        return [*header, "gain kept"], rows

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {
            "scores": {s: {t: x.value for t, x in r.items()} for s, r in self.states.items()},
            "standard_errors": {s: {t: x.se for t, x in r.items()} for s, r in self.states.items()},
            "kept": self.kept(self.merged),
        }


def score_test(
    model: PeftModel,
    adapters: Sequence[str],
    merged: str,
    tasks: Mapping[str, Scored],
    listeners: Sequence[Listener] = (),
) -> TestTable:
    """Score the base model, each adapter and the merged one on every task.

    The model's active adapters, modes and random states are as before afterwards.

    Args:
        model: holds the adapters and the merged one.
        adapters: names of the adapters.
        merged: name of the merged one.
        tasks: task -> eval function.
        listeners: called with a `StateScored` per score, and a `MergeTested` at the end.

    Raises:
        EvalError: an eval function returned no score.
    """
    states: dict[str, dict[str, Score]] = {}
    names = [BASE, *adapters, merged]
    done, total = 0, len(names) * len(tasks)
    with preserved(model), torch.no_grad():
        for state in names:
            if state != BASE:
                model.set_adapter(state)
            row: dict[str, Score] = {}
            with model.disable_adapter() if state == BASE else nullcontext():
                for name, task in tasks.items():
                    start = perf_counter()
                    row[name] = read_score(task.fn(model), Task(name, task.fn, task.metric))
                    done += 1
                    event = StateScored(
                        "test", name, None, row[name], perf_counter() - start, done, total
                    )
                    for listener in listeners:
                        listener(event)
            states[state] = row
    table = TestTable(states, tuple(adapters), merged)
    for listener in listeners:
        listener(MergeTested(states, table.kept(merged)))
    return table
