"""Scores of candidate merges without a model: known functions of the dense deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from stacks import deltas
from torch import Tensor

from peft_himerge.methods.stack import Stack
from peft_himerge.scoring import Score, Task, read_score

# Module -> dense delta to per-example scores.
Rule = Callable[[Mapping[str, Tensor]], Any]


class FakeScorer:
    """What methods that need scores read, over rules instead of a model; counts what is new."""

    def __init__(
        self, rules: Mapping[str, Rule], shapes: Mapping[str, Any], guards: Sequence[str] = ()
    ) -> None:
        self.rules, self.shapes = rules, shapes
        self.guards = tuple(guards)
        self.own = tuple(sorted(name for name in rules if name not in guards))
        self.states: list[dict[str, Tensor]] = []
        self.calls: list[str] = []
        self._known: dict[tuple[int, str], Score] = {}

    @property
    def count(self) -> int:
        return len(self.calls)

    def scores(self, candidate: Any, tasks: Sequence[str] | None = None) -> dict[str, Score]:
        state = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in self.shapes.items()}
        for module, delta in candidate:
            state[module] = delta.dense().double()
        number = self._number(state)
        for task in tasks or self.own:
            if (number, task) not in self._known:
                self.calls.append(task)
                raw = self.rules[task](state)
                self._known[number, task] = read_score(raw, Task(task, lambda _: None))
        return {task: self._known[number, task] for task in tasks or self.own}

    def _number(self, state: dict[str, Tensor]) -> int:
        for number, other in enumerate(self.states):
            if all(torch.equal(state[m], other[m]) for m in state):
                return number
        self.states.append(state)
        return len(self.states) - 1


def closeness(stacks: Sequence[Stack], mix: float = 0.3) -> dict[str, Rule]:
    """Return per adapter a task that wants its delta, and a share of everyone's.

    One score per module: minus the squared distance to what the task wants, an exact quadratic
    function of the coefficients of a weighted sum.
    """
    names = stacks[0].names
    wanted: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for stack in stacks:
        parts = [p.double() for p in deltas(stack)]
        for i, name in enumerate(names):
            wanted[name][stack.module] = parts[i] + mix * torch.stack(parts).sum(0)

    def rule(name: str) -> Rule:
        aims = wanted[name]
        return lambda state: [-float((state[m] - aims[m]).square().sum()) for m in sorted(aims)]

    return {name: rule(name) for name in names}


def scorer_of(stacks: Sequence[Stack], guards: Iterable[str] = (), mix: float = 0.3) -> FakeScorer:
    rules = closeness(stacks, mix)
    for guard in guards:
        rules[guard] = lambda state: -sum(float(d.abs().sum()) for d in state.values())
    return FakeScorer(rules, {s.module: s.shape for s in stacks}, tuple(guards))
