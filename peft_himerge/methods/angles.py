"""Means on the sphere: how far deltas point the same way decides how they are added.

Everything is read off the table of inner products (`linear.gram`); results are exact sums of the
sources' factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from .check import choice, fraction, number, whole
from .linear import counted, gram, products, weighted_sum
from .registry import method
from .stack import Result, Stack

__all__ = ["karcher", "model_stock", "slerp"]


@method(
    "slerp",
    title="Spherical linear interpolation",
    url="https://doi.org/10.1145/325165.325242",
    variant="ours: on deltas",
    low_rank=True,
)
def slerp(
    stacks: Sequence[Stack],
    *,
    t: float = 0.5,
    toward: str | None = None,
    threshold: float = 0.9995,
    scope: str = "module",
) -> Result:
    """Go a share of the way along the arc from one adapter's delta to the other's.

    ``M = sin((1-t) theta)/sin(theta) D_1 + sin(t theta)/sin(theta) D_2`` with theta the angle
    between the two; a straight line where the angle is next to 0 or to 180 degrees, or a delta is
    0. Source: Shoemake 1985, as mergekit and MergeLLM use it for models; they interpolate whole
    weights, whose angle the shared base makes nearly 0, so that theirs is a straight line in all
    but name. On deltas it is not.

    Args:
        stacks: the modules, of exactly two adapters.
        t: 0 gives the other adapter, 1 gives `toward`.
        toward: the adapter reached at t = 1; needed unless t is 0.5, which is symmetric.
        threshold: |cosine| above which the straight line is taken.
        scope: one angle per "module", or one for the whole "model".

    Raises:
        ConfigError: not two adapters, or `toward` is needed or unknown.
    """
    t, threshold = fraction("t", t), fraction("threshold", threshold)
    choice("scope", scope, ("module", "model"))
    names = stacks[0].names
    if len(names) != 2:
        raise ConfigError(
            f"slerp takes exactly 2 adapters, got {len(names)}: {', '.join(names)}. "
            f"method='karcher' is its form for any number."
        )
    if toward is None and t != 0.5:
        raise ConfigError(f"t={t} needs toward=...: which adapter is reached at t = 1?")
    if toward is not None and toward not in names:
        raise ConfigError(f"toward got {toward!r}.{suggest(toward, names)}")
    share = [t, 1.0 - t] if toward == names[0] else [1.0 - t, t]
    if scope == "model":
        whole_table = torch.stack([gram(stack) for stack in stacks]).sum(0)
    for stack in stacks:
        table = whole_table if scope == "model" else gram(stack)
        arc = _arc(table, share, threshold)
        yield stack.module, weighted_sum(stack, products(arc, stack.weights))


def _norms(table: Tensor) -> Tensor:
    return table.diagonal().clamp(min=0.0).sqrt()


def _arc(table: Tensor, share: Sequence[float], threshold: float) -> list[float]:
    one, two = (float(n) for n in _norms(table))
    if one == 0.0 or two == 0.0:
        return list(share)
    cosine = float(table[0, 1]) / (one * two)
    if abs(cosine) > threshold:
        return list(share)
    theta = math.acos(cosine)
    return [math.sin(s * theta) / math.sin(theta) for s in share]


@method(
    "karcher",
    title="Karcher mean",
    url="https://doi.org/10.1002/cpa.3160300502",
    variant="ours: on deltas",
    low_rank=True,
)
def karcher(
    stacks: Sequence[Stack],
    *,
    lam: float = 1.0,
    missing: str = "zero",
    iterations: int = 100,
    tolerance: float = 1e-10,
) -> Result:
    """Average directions on the sphere and lengths on the line.

    The direction is the point of the unit sphere whose weighted squared angles to the deltas'
    directions sum to the least (the Karcher or Frechet mean, found by its usual fixed-point
    iteration in the logarithm map); the length is the weighted mean of the deltas' lengths. For two
    adapters of equal weights and lengths this is `slerp` at t = 0.5. Everything happens on
    coefficients, with the table of inner products as the metric. Here D_i is unweighted and the
    weights w_i >= 0 are shares.

    Args:
        stacks: the modules.
        lam: factor on the result.
        missing: "zero": an adapter without the module has length 0 there; "skip": it does not
            count. It has no direction either way.
        iterations: at most this many steps.
        tolerance: stop when a step is a smaller angle than this.

    Raises:
        ConfigError: a weight is negative, or all are 0.
    """
    lam = number("lam", lam)
    whole("iterations", iterations, least=1)
    number("tolerance", tolerance, least=0.0)
    for stack in stacks:
        if min(stack.weights) < 0.0 or max(stack.weights) == 0.0:
            raise ConfigError(
                f"karcher needs weights >= 0 that are not all 0, got "
                f"{dict(zip(stack.names, stack.weights, strict=True))}."
            )
        unweighted = gram(_unweighted(stack))
        norms = _norms(unweighted)
        here = torch.tensor(counted(stack, missing))
        shares = torch.tensor(stack.weights, dtype=torch.float64) * here
        length = float((shares * norms).sum() / shares.sum()) if float(shares.sum()) else 0.0
        shares = torch.where(norms > 0.0, shares, torch.zeros_like(shares))
        coefficients = torch.zeros_like(shares)
        if float(shares.sum()) > 0.0:
            unit = torch.where(norms > 0.0, norms, torch.ones_like(norms))
            metric = unweighted / unit[:, None] / unit
            direction = _mean_direction(metric, shares / shares.sum(), iterations, tolerance)
            coefficients = lam * length * direction / unit
        yield stack.module, weighted_sum(stack, coefficients.tolist())


def _unweighted(stack: Stack) -> Stack:
    ones = (1.0,) * len(stack.names)
    return Stack(
        stack.module, stack.layer, stack.names, stack.factors, ones, stack.base, stack.seed
    )


def _mean_direction(metric: Tensor, shares: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Return the Karcher mean of unit vectors as coefficients of them.

    Args:
        metric: their cosines, (T, T).
        shares: weights that sum to 1; 0 leaves a vector out.
        iterations: at most this many steps.
        tolerance: angle of the last step.
    """
    start = shares
    size = float(start @ metric @ start) ** 0.5
    if size < 1e-12:  # the vectors cancel: no direction is better than another
        return torch.zeros_like(shares)
    x: Tensor = start / size
    for _ in range(iterations):
        cosines = (metric @ x).clamp(-1.0, 1.0)
        angles = torch.arccos(cosines)
        sines = torch.sin(angles)
        # theta / sin(theta) -> 1 at 0; at 180 degrees the logarithm has no value: no pull.
        small = sines < 1e-9
        pull = shares * torch.where(small, (angles < 1.0).double(), angles / sines.clamp(min=1e-12))
        step = pull - float((pull * cosines).sum()) * x
        angle = max(0.0, float(step @ metric @ step)) ** 0.5
        if angle <= tolerance:
            break
        x = math.cos(angle) * x + math.sin(angle) / angle * step
        x = x / float(x @ metric @ x) ** 0.5
    return x


@method(
    "model_stock",
    title="Model Stock",
    url="https://arxiv.org/abs/2403.19522",
    variant="authors",
    low_rank=True,
)
def model_stock(stacks: Sequence[Stack], *, lam: float = 1.0, missing: str = "zero") -> Result:
    """Average the deltas and shrink the average by how much they agree.

    ``M = lam * t * mean_i D_i`` with ``t = T c / (1 + (T - 1) c)`` and c the mean cosine over all
    pairs. Source: arXiv 2403.19522, equation for N fine-tuned models, per module. Where we differ:
    a mean cosine below 0 counts as 0 (the paper has c > 0; below, t has a pole), so M is 0.

    Args:
        stacks: the modules.
        lam: factor on the result.
        missing: "zero": an adapter without the module counts as a delta of 0, at a right angle to
            all others; "skip": it does not count there.
    """
    lam = number("lam", lam)
    for stack in stacks:
        here = [i for i, counts in enumerate(counted(stack, missing)) if counts]
        table = gram(stack)[here][:, here]
        count = len(here)
        ratio = 1.0
        if count > 1:
            norms = _norms(table)
            norms = torch.where(norms > 0.0, norms, torch.ones_like(norms))
            cosines = (table / norms[:, None] / norms).clamp(-1.0, 1.0)
            pairs = count * (count - 1)
            mean = max(0.0, float(cosines.sum() - cosines.diagonal().sum()) / pairs)
            ratio = count * mean / (1.0 + (count - 1) * mean)
        share = lam * ratio / count
        terms = [share * w if i in here else 0.0 for i, w in enumerate(stack.weights)]
        yield stack.module, weighted_sum(stack, terms)
