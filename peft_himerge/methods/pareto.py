"""MAP: quadratic surrogates of every task's score, and the Pareto front of the coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .check import choice, number, whole
from .registry import Fitted, method
from .scored import Aim, Goal, Scorer, aim_of, row, summed
from .stack import Stack, named_generator
from .surrogate import LINKS, Quadratic, fit, nondominated, search_front, spread, unknowns

__all__ = ["pareto_map"]

_POOL = 1024  # points that the search of the front starts from
_RANGES = {"sigmoid": (0.0, 1.0), "softplus": (float("-inf"), 0.0)}


@method(
    "map",
    title="MAP (model merging with amortized Pareto front)",
    url="https://arxiv.org/abs/2406.07529",
    variant="ours: after the authors",
    needs="scores",
    low_rank=True,
)
def pareto_map(
    stacks: Sequence[Stack],
    evidence: Scorer,
    *,
    samples: int | None = None,
    points: int = 10,
    high: float = 1.0,
    link: str = "identity",
    prefer: Goal = "mean",
) -> Fitted:
    """Find the compromises between the tasks, ``M = sum_i c_i D_i``, and merge the preferred one.

    The merge is scored at `samples` points c of the box [0, high]^M: each adapter alone, then
    points that fill the box evenly. A quadratic function of c is fitted to every task's score, and
    the points are searched that no other beats on all tasks, by these functions. Of those, `points`
    are scored for what they are. The report's `front` holds all points scored that no other one
    beats; the one that `prefer` likes best is merged.

    Source: arXiv 2406.07529 and the authors' code: sampling, surrogates and links, twice as many
    samples as unknowns. Where we differ: their NSGA-III on [-3, 3] is a plain evolution within the
    box, outside of which nothing was measured; the points found are scored, not believed. Their
    Bayesian sampling and nested merging of many models are not here.

    Cost for M adapters: M (samples + points) scores.

    Args:
        stacks: the modules.
        evidence: the scores.
        samples: points to fit to, at least (M + 1)(M + 2) / 2; None is (M + 1)(M + 2).
        points: points of the predicted front that are scored.
        high: largest coefficient.
        link: "identity"; "sigmoid" for scores in [0, 1]; "softplus" for scores of at most 0, such
            as log-likelihoods.
        prefer: which point is merged: the one of the highest "mean" score, of the highest mean
            share "kept" of what each adapter wins alone, or adapter -> weight of its task.

    Raises:
        ConfigError: an option is out of range, or scores do not fit the link.
    """
    names, seed = stacks[0].names, stacks[0].seed
    least = unknowns(len(names))
    if samples is not None and whole("samples", samples) < least:
        raise ConfigError(
            f"samples must be at least {least}, the unknowns of a quadratic function of "
            f"{len(names)} coefficients, got {samples}."
        )
    points, high = whole("points", points, least=1), number("high", high)
    if high <= 0.0:
        raise ConfigError(f"high must be positive, got {high!r}.")
    choice("link", link, LINKS)
    aim = aim_of("prefer", prefer, stacks, evidence)
    seen = _Looked.at(_sample(len(names), samples or 2 * least, high, seed), stacks, evidence)
    _check_range(seen.values, names, link)
    model = fit(seen.points, seen.values, link)
    front = _front(model, aim, seen.points, names, points, high, seed)
    found = _Looked.at(front, stacks, evidence)
    # Root mean square of predicted minus measured: where it was fitted, and on the new points.
    errors = {
        where: dict(zip(names, x.error(model), strict=True))
        for where, x in (("fitted", seen), ("scored", found))
        if len(x.points)
    }
    return _merged(stacks, evidence, seen.and_(found), aim, errors)


@dataclass(frozen=True, slots=True, eq=False)
class _Looked:
    """Points that were scored: (n, M) coefficients, (n, M) scores, and a report's rows."""

    points: Tensor
    values: Tensor
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def at(cls, points: Tensor, stacks: Sequence[Stack], evidence: Scorer) -> _Looked:
        scores = [evidence.scores(summed(stacks, c)) for c in points.tolist()]
        values = [[s[task].value for task in evidence.own] for s in scores]
        shape = (len(points), len(evidence.own))
        table = torch.tensor(values, dtype=torch.float64).reshape(shape)
        return cls(points, table, tuple(row(s) for s in scores))

    def error(self, model: Quadratic) -> list[float]:
        """Return the root mean square of the model's error, per task."""
        found: list[float] = (model(self.points) - self.values).square().mean(0).sqrt().tolist()
        return found

    def and_(self, more: _Looked) -> _Looked:
        """Return these points and more."""
        return _Looked(
            torch.cat([self.points, more.points]),
            torch.cat([self.values, more.values]),
            (*self.rows, *more.rows),
        )


def _merged(
    stacks: Sequence[Stack],
    evidence: Scorer,
    looked: _Looked,
    aim: Aim,
    errors: dict[str, dict[str, float]],
) -> Fitted:
    """Return the merge at the best point by `aim`; its report has all that none other beats."""
    names = stacks[0].names
    free = nondominated(looked.values).nonzero().flatten().tolist()
    front = [
        {
            "coefficients": dict(zip(names, looked.points[i].tolist(), strict=True)),
            "objective": aim(dict(zip(names, looked.values[i].tolist(), strict=True))),
            "scores": looked.rows[i],
        }
        for i in free
    ]
    best = max(range(len(front)), key=lambda k: (front[k]["objective"], -k))
    run = partial(summed, coefficients=looked.points[free[best]].tolist())
    final = evidence.scores(run(stacks), (*evidence.own, *evidence.guards))
    report = {
        **front[best],
        "scores": row(final),
        "front": front,
        "surrogate_error": errors,
        "scores_computed": evidence.count,
    }
    return Fitted(run, report)


def _sample(count: int, samples: int, high: float, seed: int) -> Tensor:
    """Return each adapter alone, then a Sobol sequence, (samples, count)."""
    alone = torch.eye(count, dtype=torch.float64) * min(1.0, high)
    return torch.cat([alone, _sobol(count, samples - count, seed, "samples") * high])


def _sobol(count: int, points: int, seed: int, what: str) -> Tensor:
    key = int(torch.randint(2**31, (1,), generator=named_generator(seed, "map", what)))
    engine = torch.quasirandom.SobolEngine(count, scramble=True, seed=key)  # type: ignore[no-untyped-call]
    return engine.draw(points, dtype=torch.float64)


def _check_range(values: Tensor, names: Sequence[str], link: str) -> None:
    low, high = _RANGES.get(link, (float("-inf"), float("inf")))
    for name, column in zip(names, values.t(), strict=True):
        odd = column[(column < low) | (column > high)]
        if len(odd):
            raise ConfigError(
                f"link={link!r} is for scores between {low:g} and {high:g}; task {name!r} has the "
                f"score {float(odd[0]):g}. Use link='identity'."
            )


def _front(
    model: Quadratic,
    aim: Aim,
    first: Tensor,
    names: Sequence[str],
    points: int,
    high: float,
    seed: int,
) -> Tensor:
    """Return new points to score: the best by the aim, the best per task, and between."""
    shares = [aim.shares[n] / aim.gains[n] for n in names]
    direction = torch.tensor(shares, dtype=torch.float64)
    pool = torch.cat([first, _sobol(len(names), _POOL, seed, "pool") * high])
    draw = named_generator(seed, "map", "front")
    front = search_front(model, pool, high, direction, draw)
    scores = model(front)
    ends = [int((scores @ direction).argmax()), *scores.argmax(dim=0).tolist()]
    picked = front[spread(scores, points, ends)]
    known = {tuple(point) for point in first.tolist()}
    return picked[[tuple(point) not in known for point in picked.tolist()]]
