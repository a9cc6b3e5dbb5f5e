"""What methods that need scores read beside the stacks, and the one number they raise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ConfigError, suggest
from ..scoring import Score
from .check import number
from .linear import products, weighted_sum
from .stack import Result, Stack

__all__ = ["Aim", "Goal", "Scorer", "aim_of", "row", "summed"]

# "mean", "kept", or adapter -> how much its task counts.
Goal = str | Mapping[str, float]


class Scorer(Protocol):
    """Scores candidate merges (`trials.Trials`)."""

    @property
    def count(self) -> int:
        """Scores computed so far: calls of eval functions."""

    @property
    def own(self) -> tuple[str, ...]:
        """The adapters' tasks, which have the adapters' names, sorted."""

    @property
    def guards(self) -> tuple[str, ...]:
        """The tasks of no adapter."""

    def scores(self, candidate: Result, tasks: Sequence[str] | None = None) -> Mapping[str, Score]:
        """Return task -> score of a candidate; of the adapters' own tasks by default."""


@dataclass(frozen=True, slots=True)
class Aim:
    """Turns the scores of the adapters' tasks into the number to be raised.

    ``sum_t share_t (score_t - start_t) / gain_t``

    Attributes:
        shares: task -> how much it counts; they sum to 1.
        starts: task -> what counts as 0; the base model's score, or 0.
        gains: task -> what counts as 1; what the adapter wins alone, or 1.
    """

    shares: Mapping[str, float]
    starts: Mapping[str, float]
    gains: Mapping[str, float]

    def __call__(self, values: Mapping[str, float]) -> float:
        """Return the number; higher is better."""
        return math.fsum(
            share * (values[task] - self.starts[task]) / self.gains[task]
            for task, share in self.shares.items()
        )


def aim_of(name: str, goal: Goal, stacks: Sequence[Stack], scorer: Scorer) -> Aim:
    """Return the aim that an option names; "kept" scores the base and each adapter alone.

    Args:
        name: the option's name.
        goal: "mean": the mean score; "kept": the mean share that is left of what each adapter wins
            alone on its task, for tasks with unlike metrics; or adapter -> weight of its task.
        stacks: the modules.
        scorer: the scores.

    Raises:
        ConfigError: it is something else, or an adapter wins nothing alone.
    """
    tasks = scorer.own
    zeros, ones = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 1.0)
    even = {task: 1.0 / len(tasks) for task in tasks}
    if isinstance(goal, Mapping):
        return Aim(_shares(name, goal, tasks), zeros, ones)
    if goal == "mean":
        return Aim(even, zeros, ones)
    if goal != "kept":
        hint = suggest(str(goal), ["mean", "kept"])
        raise ConfigError(f"{name} must be a name or adapter -> weight, got {goal!r}.{hint}")
    base = scorer.scores(iter(()))
    gains = {}
    for i, task in enumerate(tasks):
        alone = summed(stacks, [float(i == j) for j in range(len(tasks))], weighted=False)
        gains[task] = scorer.scores(alone, [task])[task].value - base[task].value
        if gains[task] <= 0.0:
            raise ConfigError(
                f"{name}='kept' divides by what adapter {task!r} wins alone on its own task, which "
                f"is {gains[task]:g}. Use {name}='mean', or check the adapter and its eval "
                f"function."
            )
    return Aim(even, {task: base[task].value for task in tasks}, gains)


def _shares(name: str, goal: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    for task in goal:
        if task not in tasks:
            raise ConfigError(f"{name} names the adapter {task!r}.{suggest(str(task), tasks)}")
    weights = {t: number(f"{name}[{t!r}]", goal.get(t, 0.0), least=0.0) for t in tasks}
    total = math.fsum(weights.values())
    if total == 0.0:
        raise ConfigError(f"{name} gives no task any weight: {dict(goal)}.")
    return {task: weight / total for task, weight in weights.items()}


def summed(
    stacks: Sequence[Stack], coefficients: Sequence[float], *, weighted: bool = True
) -> Result:
    """Yield ``sum_i c_i D_i`` of every module.

    Args:
        stacks: the modules.
        coefficients: c, one per adapter.
        weighted: True if D_i holds the user's weight.
    """
    for stack in stacks:
        user = stack.weights if weighted else (1.0,) * len(coefficients)
        yield stack.module, weighted_sum(stack, products(coefficients, user))


def row(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Return task -> value, standard error, and metrics if there are any, as plain values."""
    return {task: dict(_facts(score)) for task, score in scores.items()}


def _facts(score: Score) -> Iterator[tuple[str, Any]]:
    yield "value", score.value
    yield "se", score.se
    if score.metrics:
        yield "metrics", dict(score.metrics)
