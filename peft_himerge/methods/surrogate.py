"""A quadratic stand-in for scores that are expensive, and the best compromises it knows of.

All tensors are float64 on the CPU. Points are rows of coefficients, (n, T); scores are (n, tasks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LINKS", "Quadratic", "fit", "nondominated", "search_front", "spread", "unknowns"]

LINKS = ("identity", "sigmoid", "softplus")
_EDGE = 1e-3  # what a score at the end of a link's range starts from
_ROUNDS = 25
_CHILDREN = 256
_KEPT = 128


def unknowns(count: int) -> int:
    """Return the number of coefficients of a quadratic function of `count` variables."""
    return (count + 1) * (count + 2) // 2


def _features(points: Tensor) -> Tensor:
    """Return 1, c_i and c_i c_j (i <= j) of every point, (n, unknowns)."""
    count = points.shape[1]
    i, j = torch.triu_indices(count, count)
    ones = torch.ones(len(points), 1, dtype=points.dtype)
    return torch.cat([ones, points, points[:, i] * points[:, j]], dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """One function per task: ``link(e + b . c + sum_ij a_ij c_i c_j)``.

    Attributes:
        theta: (unknowns, tasks).
        link: "identity"; "sigmoid", for scores in [0, 1]; or "softplus", ``-log(1 + exp(-x))``, for
            scores of at most 0 (log-likelihoods).
    """

    theta: Tensor
    link: str

    def __call__(self, points: Tensor) -> Tensor:
        """Return the scores of all points, (n, tasks)."""
        return _linked(_features(points) @ self.theta, self.link)


def _linked(x: Tensor, link: str) -> Tensor:
    if link == "identity":
        return x
    return x.sigmoid() if link == "sigmoid" else torch.nn.functional.logsigmoid(x)


def _unlinked(y: Tensor, link: str) -> Tensor:
    if link == "identity":
        return y
    inside = y if link == "sigmoid" else y.exp()
    return inside.clamp(_EDGE, 1.0 - _EDGE).logit()


def fit(points: Tensor, scores: Tensor, link: str) -> Quadratic:
    """Return the quadratic functions of least squared error, one per task.

    Linear least squares; through a link, L-BFGS from the least squares of the linked scores.

    Args:
        points: (n, T), n >= `unknowns` (T).
        scores: (n, tasks), in the range of the link.
        link: see `Quadratic`.
    """
    features = _features(points)
    theta = torch.linalg.lstsq(features, _unlinked(scores, link), driver="gelsd").solution
    if link == "identity":
        return Quadratic(theta, link)
    with torch.enable_grad():
        best = theta.clone(memory_format=torch.contiguous_format).requires_grad_()
        search = torch.optim.LBFGS(
            [best], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            search.zero_grad()
            error = (_linked(features @ best, link) - scores).square().sum()
            error.backward()  # type: ignore[no-untyped-call]
            return error

        search.step(loss)  # type: ignore[no-untyped-call]
    return Quadratic(best.detach(), link)


def nondominated(scores: Tensor) -> Tensor:
    """Return which rows no other row beats: as good everywhere and better somewhere. (n,) bool."""
    free = torch.ones(len(scores), dtype=torch.bool)
    for start in range(0, len(scores), 256):
        part = scores[start : start + 256]
        no_worse = (scores[None] >= part[:, None]).all(dim=2)
        better = (scores[None] > part[:, None]).any(dim=2)
        free[start : start + 256] = ~(no_worse & better).any(dim=1)
    return free


def spread(scores: Tensor, count: int, first: list[int]) -> list[int]:
    """Return the rows `first` and then those farthest from all that were taken.

    Distances are between scores, each task scaled to its range over the rows; `count` rows at
    most, each once.
    """
    low, high = scores.min(dim=0).values, scores.max(dim=0).values
    scaled = (scores - low) / torch.where(high > low, high - low, 1.0)
    taken: list[int] = []
    gap = torch.full((len(scores),), torch.inf, dtype=scores.dtype)  # to the nearest one taken
    wanted = iter(dict.fromkeys(first))
    while len(taken) < min(count, len(scores)):
        place = next(wanted, None)
        taken.append(int(gap.argmax()) if place is None else place)
        gap = torch.minimum(gap, (scaled - scaled[taken[-1]]).square().sum(dim=1))
        gap[taken[-1]] = -1.0
    return taken


def search_front(
    model: Quadratic, seeds: Tensor, high: float, aim: Tensor, draw: torch.Generator
) -> Tensor:
    """Return points in [0, high] that are good compromises on the surrogate, (n, T).

    An evolution: children lie between or beyond two parents of the front, or near the point of the
    highest aim, and move a little, less in every round; the front keeps what is not dominated,
    spread over it.

    Args:
        model: the surrogate.
        seeds: points to start from.
        high: the largest coefficient.
        aim: (tasks,) how much each task counts; the best point by it always stays.
        draw: draws what is random.
    """
    width = seeds.shape[1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    def kept(points: Tensor) -> Tensor:
        scores = model(points)
        points, scores = points[free := nondominated(scores)], scores[free]
        ends = [int((scores @ aim).argmax()), *scores.argmax(dim=0).tolist()]
        return points[spread(scores, _KEPT, ends)]

    front = kept(seeds)
    for turn in range(_ROUNDS):
        parents = (uniform(_CHILDREN, 2) * len(front)).long()
        parents[: _CHILDREN // 2, 0] = 0  # the point of the highest aim comes first
        one, two = front[parents[:, 0]], front[parents[:, 1]]
        mixed = one + (1.5 * uniform(_CHILDREN, 1) - 0.25) * (two - one)
        noise = torch.randn(_CHILDREN, width, generator=draw, dtype=torch.float64)
        size = 0.1 * high * (1.0 - turn / _ROUNDS)
        moves = noise * (uniform(_CHILDREN, width) < 0.5)  # some coefficients stay
        front = kept(torch.cat([front, (mixed + size * moves).clamp(0.0, high)]))
    return front
