"""Coefficient search: one weight per adapter, and options of any method, by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

from ..errors import ConfigError
from ..sampler import Kind, Point, explore, import_optuna, propose, size
from .check import choice, number, whole
from .linear import products
from .registry import Fitted, MethodInfo, get_method, method
from .scored import Aim, Goal, Scorer, aim_of, row
from .spaces import Space, in_space
from .stack import Result, Stack

__all__ = ["coefficient_search"]

_KINDS = ("grid", "random", "optuna")


@method(
    "coefficient_search",
    title="Coefficient search",
    url="https://arxiv.org/abs/2212.04089",
    variant="ours: the sweep that papers make by hand",
    needs="scores",
)
def coefficient_search(
    stacks: Sequence[Stack],
    evidence: Scorer,
    *,
    base: str = "cat",
    base_space: Space = "full",
    values: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
    choices: Mapping[str, Sequence[Any]] | None = None,
    sampler: Kind = "random",
    budget: int = 100,
    objective: Goal = "mean",
) -> Fitted:
    """Try weights for the adapters, and options of a method, and keep what scores best.

    A point is one of `values` per adapter, as a factor on the user's weight, and one of the values
    of every option in `choices`. Equal weights come first. All weights 0 is no merge and left out.
    Of equally good points the first wins; points that give equal deltas are scored once.

    Source: ours; papers tune task arithmetic (arXiv 2212.04089), TIES and others in this way, on
    validation data. The score of the winner is the best of many on the same rows, so it is too
    high: score the merged adapter on others.

    Args:
        stacks: the modules.
        evidence: the scores.
        base: the method that merges; it must need nothing but the adapters.
        base_space: where it runs: "full", "knots" or "core" (`spaces`).
        values: weights to try for every adapter.
        choices: option of `base` -> values to try; one value sets it.
        sampler: "grid" tries all points; "random" draws them without repeating any; "optuna" lets
            Optuna's TPE choose (needs the extra `sweep`).
        budget: the most scores (calls of eval functions) to spend on the search; a point takes one
            per adapter.
        objective: what is raised: "mean" of the scores, mean share "kept" of what each adapter wins
            alone, or adapter -> weight of its task.

    Raises:
        ConfigError: an option is not allowed, or the budget is too small.
        MissingExtraError: Optuna is not installed.
    """
    choice("base_space", base_space, get_args(Space))
    info = _base_of(base, base_space)
    axes = _axes(info, values, choices or {}, len(stacks[0].names))
    choice("sampler", sampler, _KINDS)
    _check_budget(whole("budget", budget), len(evidence.own), objective)
    if sampler == "optuna":
        import_optuna("sampler='optuna'")
    need = size(axes) * len(evidence.own)
    if sampler == "grid" and need > budget:
        raise ConfigError(
            f"the grid has {size(axes)} points, which take {need} scores, and the budget is "
            f"{budget}. Raise the budget, give fewer values, or use sampler='random' or 'optuna'."
        )
    aim = aim_of("objective", objective, stacks, evidence)
    search = _Search(info, base_space, tuple(choices or {}), stacks, evidence, aim, budget)
    first = [point for point in _even(axes, len(stacks[0].names)) if search.weighs(point)]
    most = budget // len(evidence.own) if sampler == "optuna" else None
    points = propose(sampler, axes, most, seed=stacks[0].seed, first=first)
    explore(points, search.look)
    return search.fitted()


def _base_of(name: str, space: str) -> MethodInfo:
    info = get_method(name)
    if space != "full" and not info.elementwise:
        raise ConfigError(
            f"base={name!r} does not work entry by entry, so base_space={space!r} would change "
            f"nothing or break it. Use base_space='full'."
        )
    if info.needs != "nothing":
        raise ConfigError(
            f"base={name!r} is fitted to {info.needs} itself; choose a method whose `needs` is "
            f"'nothing' (list_methods())."
        )
    return info


def _check_budget(budget: int, tasks: int, objective: Goal) -> None:
    least = tasks if objective != "kept" else 3 * tasks  # the base, and each adapter alone
    if budget < least:
        raise ConfigError(f"budget must be at least {least} scores for one point, got {budget}.")


def _axes(
    info: MethodInfo, values: Sequence[float], choices: Mapping[str, Sequence[Any]], count: int
) -> list[tuple[Any, ...]]:
    """Return the values of every coordinate: the adapters' weights, then the options."""
    weights = _several("values", values)
    for value in weights:
        number("values", value)
    if not any(weights):
        raise ConfigError("values holds nothing but 0, which is no merge.")
    info.check(choices)
    options = [_several(f"choices[{name!r}]", tried) for name, tried in choices.items()]
    return [tuple(float(v) for v in weights)] * count + options


def _several(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"{name} must be a list of values to try, got {values!r}.")
    if any(values.index(value) != i for i, value in enumerate(values)):
        raise ConfigError(f"{name} has a value more than once: {values!r}.")
    return tuple(values)


def _even(axes: Sequence[Sequence[Any]], count: int) -> list[Point]:
    """Return the points of equal weights, at the first value of every option."""
    options = tuple(axis[0] for axis in axes[count:])
    return [(value,) * count + options for value in axes[0]]


@dataclass
class _Search:
    """What was tried, and what is left to spend."""

    info: MethodInfo
    space: Space
    options: tuple[str, ...]
    stacks: Sequence[Stack]
    evidence: Scorer
    aim: Aim
    budget: int
    tried: list[dict[str, Any]] = field(default_factory=list)

    def weighs(self, point: Point) -> bool:
        """Return True if some weight is not 0."""
        return any(point[: len(self.stacks[0].names)])

    def look(self, batch: Sequence[Point]) -> list[float] | None:
        """Return the objective at every point, or None when the budget is spent."""
        values = []
        for point in batch:
            weights, options = self._read(point)
            if not self.weighs(point):  # nothing to score: as bad as the worst so far
                values.append(min(told["objective"] for told in self.tried))
                continue
            if self.evidence.count + len(self.evidence.own) > self.budget:
                return None
            scores = self.evidence.scores(self._run(self.stacks, weights, options))
            value = self.aim({task: score.value for task, score in scores.items()})
            values.append(value)
            told = {"weights": weights, "options": options, "objective": value}
            self.tried.append({**told, "scores": row(scores)})
        return values

    def fitted(self) -> Fitted:
        """Return the best point's merge."""
        best = max(range(len(self.tried)), key=lambda i: (self.tried[i]["objective"], -i))
        won = self.tried[best]
        run = partial(self._run, factors=won["weights"], options=won["options"])
        tasks = (*self.evidence.own, *self.evidence.guards)
        final = self.evidence.scores(run(self.stacks), tasks)
        counted = {"tried": self.tried, "scores_computed": self.evidence.count}
        return Fitted(run, {**won, "scores": row(final), **counted})

    def _read(self, point: Point) -> tuple[dict[str, float], dict[str, Any]]:
        """Return adapter -> weight, and option -> value."""
        names = self.stacks[0].names
        weights = dict(zip(names, point[: len(names)], strict=True))
        return weights, dict(zip(self.options, point[len(names) :], strict=True))

    def _run(
        self, stacks: Sequence[Stack], factors: Mapping[str, float], options: Mapping[str, Any]
    ) -> Result:
        found = [
            replace(stack, weights=tuple(products(stack.weights, factors.values())))
            for stack in stacks
        ]
        return in_space(partial(self.info.function, **options), found, self.space)
