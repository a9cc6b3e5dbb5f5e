"""Weighted sums of deltas: every result is an exact product of the sources' own factors.

A method here finds one number per adapter and module, mostly from the table of inner products
``<D_i, D_j> = sum((B_i^T B_j) * (A_i A_j^T))``, which costs O((out + in) R^2) and forms no delta.
The user's weights scale the deltas first unless a method says otherwise: D_i below is w_i times the
adapter's delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from .check import choice, number
from .registry import method
from .stack import Factored, Result, Stack

__all__ = [
    "average",
    "cat",
    "counted",
    "gram",
    "metric_weighted",
    "products",
    "task_arithmetic",
    "weighted_sum",
]

_MISSING = ("zero", "skip")


def weighted_sum(stack: Stack, coefficients: Sequence[float]) -> Factored:
    """Return ``sum_i c_i D_i`` as stacked factors; terms with c = 0 take no rank.

    Args:
        stack: the module.
        coefficients: one number per adapter.
    """
    pairs = [(c, *stack.scaled(i)) for i, c in enumerate(coefficients) if c != 0.0]
    if not pairs:
        rows, columns = stack.shape
        empty = torch.zeros(0, dtype=stack.dtype, device=stack.device)
        return Factored(empty.reshape(rows, 0), empty.reshape(0, columns))
    return Factored(
        torch.cat([b * c for c, b, _ in pairs], dim=1), torch.cat([a for _, _, a in pairs], dim=0)
    )


def gram(stack: Stack) -> Tensor:
    """Return the table of inner products of the weighted deltas, (T, T) in float64 on the CPU."""
    pairs = [stack.scaled(i) for i in range(len(stack.names))]
    count = len(pairs)
    table = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            (b, a), (d, c) = pairs[i], pairs[j]
            product = (b.double().t() @ d.double()) * (a.double() @ c.double().t())
            table[i, j] = table[j, i] = product.sum().cpu()
    weights = torch.tensor(stack.weights, dtype=torch.float64)
    return table * weights[:, None] * weights


def counted(stack: Stack, missing: str) -> list[bool]:
    """Return which adapters count in this module: all, or those that have it."""
    choice("missing", missing, _MISSING)
    return [missing == "zero" or f is not None for f in stack.factors]


def products(left: Iterable[float], right: Iterable[float]) -> list[float]:
    """Return the element-wise products of two equally long series."""
    return [x * y for x, y in zip(left, right, strict=True)]


@method(
    "average",
    title="Model soup (weighted average)",
    url="https://arxiv.org/abs/2203.05482",
    variant="authors",
    low_rank=True,
)
def average(stacks: Sequence[Stack], *, lam: float = 1.0, missing: str = "zero") -> Result:
    """Average the deltas: ``M = lam * sum_i w_i D_i / sum_i w_i`` (here D_i is unweighted).

    Source: arXiv 2203.05482, "uniform soup"; for adapters of one base, averaging the deltas is
    averaging the models.

    Args:
        stacks: the modules.
        lam: factor on the result.
        missing: "zero": an adapter without the module counts as a delta of 0; "skip": it does not
            count there.

    Raises:
        ConfigError: the weights that count sum to 0.
    """
    lam = number("lam", lam)
    for stack in stacks:
        here = counted(stack, missing)
        weights = [w if counts else 0.0 for w, counts in zip(stack.weights, here, strict=True)]
        total = math.fsum(weights)
        if total == 0.0:
            raise ConfigError(
                f"the weights {dict(zip(stack.names, stack.weights, strict=True))} sum to 0 in "
                f"module {stack.module!r}, so there is no average. Use method='task_arithmetic'."
            )
        yield stack.module, weighted_sum(stack, [lam * w / total for w in weights])


@method(
    "task_arithmetic",
    title="Task Arithmetic",
    url="https://arxiv.org/abs/2212.04089",
    variant="authors",
    low_rank=True,
)
def task_arithmetic(stacks: Sequence[Stack], *, lam: float = 1.0) -> Result:
    """Add the deltas up: ``M = lam * sum_i w_i D_i``; a negative weight subtracts a task.

    Source: arXiv 2212.04089, section 2 (addition and negation).

    Args:
        stacks: the modules.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    for stack in stacks:
        yield stack.module, weighted_sum(stack, [lam * w for w in stack.weights])


@method(
    "cat",
    title="Concatenation",
    url="https://github.com/huggingface/peft/issues/817",
    variant="peft",
    low_rank=True,
)
def cat(stacks: Sequence[Stack]) -> Result:
    """Stack the factors: the exact weighted sum of the deltas, of rank up to the sum of ranks.

    Source: PEFT's combination type of that name; the same sum as `task_arithmetic` with lam = 1.

    Args:
        stacks: the modules.
    """
    for stack in stacks:
        yield stack.module, weighted_sum(stack, stack.weights)


@method(
    "metric_weighted",
    title="Metric-weighted average",
    url="https://arxiv.org/abs/2504.18580",
    variant="ours: after MWA",
    needs="nothing",
    low_rank=True,
)
def metric_weighted(
    stacks: Sequence[Stack],
    *,
    metrics: Mapping[str, float],
    loss: bool = False,
    power: float = 1.0,
    average_of: str = "delta",
    lam: float = 1.0,
) -> Result:
    """Average with weights that follow a number you have for each adapter.

    ``c_i = w_i g_i^power / sum_j w_j g_j^power`` with g the metric, or 1/metric for a loss. Ours,
    after the abstract of MWA (arXiv 2504.18580); the paper's own formula was not available.

    Args:
        stacks: the modules.
        metrics: adapter -> accuracy, step, ... (> 0), or loss (> 0) with ``loss=True``.
        loss: True if lower is better.
        power: 0 is the plain average; higher values follow the metric more.
        average_of: "delta" averages the products; "factor" averages A and B apart, which is only
            meaningful for checkpoints of one training run and needs equal ranks.
        lam: factor on the result.

    Raises:
        ConfigError: a metric is missing, unknown or not positive; ranks differ with
            "factor".
    """
    names = stacks[0].names
    lam, power = number("lam", lam), number("power", power)
    choice("average_of", average_of, ("delta", "factor"))
    for name in names:
        if name not in metrics:
            raise ConfigError(f"metrics has no value for adapter {name!r}.")
    for name in metrics:
        if name not in names:
            raise ConfigError(f"metrics names the adapter {name!r}.{suggest(name, names)}")
        if number(f"metrics[{name!r}]", metrics[name]) <= 0.0:
            raise ConfigError(f"metrics[{name!r}] must be positive, got {metrics[name]!r}.")
    sign = -power if loss else power
    gains = [w * metrics[n] ** sign for n, w in zip(names, stacks[0].weights, strict=True)]
    total = math.fsum(gains)
    if total == 0.0:
        raise ConfigError(f"the weights of {', '.join(names)} sum to 0, so there is no average.")
    shares = [g / total for g in gains]
    for stack in stacks:
        if average_of == "delta":
            yield stack.module, weighted_sum(stack, [lam * c for c in shares])
        else:
            yield stack.module, _factor_average(stack, shares, lam)


def _factor_average(stack: Stack, shares: Sequence[float], lam: float) -> Factored:
    if len(set(stack.ranks)) > 1:
        raise ConfigError(
            f"average_of='factor' needs the same rank everywhere; module {stack.module!r} has "
            f"{dict(zip(stack.names, stack.ranks, strict=True))}. Use average_of='delta'."
        )
    pairs = [stack.scaled(i) for i in range(len(stack.names))]
    b = torch.stack([c * b for c, (b, _) in zip(shares, pairs, strict=True)]).sum(0)
    a = torch.stack([c * a for c, (_, a) in zip(shares, pairs, strict=True)]).sum(0)
    return Factored(lam * b, a)
