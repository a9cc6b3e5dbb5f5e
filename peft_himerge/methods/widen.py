"""WIDEN: weigh each adapter column by column, by how much it changed the base weight there.

It looks at the base weight, once and in blocks of rows; the deltas stay factored: a factor per
column of the delta is a factor per column of A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .check import number
from .registry import method
from .stack import Delta, Factored, Stack

__all__ = ["widen"]

_PARALLEL = 64.0 * torch.finfo(torch.float64).eps
_ROWS = 256  # rows of the base weight in float64 at a time


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Squared norms per column of the base weight, and its products with every adapter's b."""

    squares: Tensor  # (in,)
    products: tuple[Tensor, ...]  # (in, rank) each


@method(
    "widen",
    title="WIDEN",
    url="https://arxiv.org/abs/2408.03092",
    variant="authors",
    low_rank=True,
    reads_base=True,
)
def widen(
    stacks: Sequence[Stack], *, lam: float = 1.0, ratio: float = 1.0, calibration: float = 1.0
) -> Iterator[tuple[str, Delta]]:
    """Weigh every column of every delta by the change of its norm and direction.

    With w a column of the base weight and d of a delta: the change of magnitude ``| ||w + d|| -
    ||w|| |`` and of direction ``1 - cos(w + d, w)``, each turned into ranks within the adapter
    (0 smallest, in steps of 1/in). The scores are the softmax of the ranks over the adapters, or
    `calibration` where a rank exceeds `ratio` times the adapter's mean rank; a column's weight is
    the mean of its two scores. ``M = lam * sum_i delta_i diag(weight_i)``.

    Source: arXiv 2408.03092 and the authors' code. Weights of one column may add up to more than 1,
    as intended there. Where we differ: the changes are computed without cancellation, from the
    factors; a column that is zero in the base has changed direction fully (1) if the delta is
    not zero there; adapters whose delta is zero in a module do not take part in it; ties keep the
    order of the columns.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.
        ratio: columns whose rank is above this multiple of the mean rank are important.
        calibration: the score of important columns.

    Raises:
        ConfigError: a base weight cannot be read, or an option is out of range.
    """
    lam, ratio = number("lam", lam), number("ratio", ratio, least=0.0)
    calibration = number("calibration", calibration)
    for stack in stacks:
        pairs = [_weighted(stack, i) for i in range(len(stack.names))]
        pairs = [(b, a) for b, a in pairs if _is_nonzero(b, a)]
        if not pairs:
            b, a = stack.scaled(stack.present[0])
            yield stack.module, Factored(b * 0.0, a * 0.0)
            continue
        columns = _columns(stack, [b for b, _ in pairs])
        changes = [
            _changes(columns.squares, product, b, a)
            for (b, a), product in zip(pairs, columns.products, strict=True)
        ]
        magnitude = _scores([m for m, _ in changes], ratio, calibration)
        direction = _scores([d for _, d in changes], ratio, calibration)
        weights = (magnitude + direction) * (0.5 * lam)
        b = torch.cat([b for b, _ in pairs], dim=1)
        a = torch.cat([a * weights[i] for i, (_, a) in enumerate(pairs)])
        yield stack.module, Factored(b.to(stack.dtype), a.to(stack.dtype))


def _weighted(stack: Stack, i: int) -> tuple[Tensor, Tensor]:
    b, a = stack.scaled(i)
    return b.double() * stack.weights[i], a.double()


def _is_nonzero(b: Tensor, a: Tensor) -> bool:
    if a.shape[0] == 0:
        return False
    return bool(torch.count_nonzero(torch.linalg.qr(b).R @ a))


def _columns(stack: Stack, bs: Sequence[Tensor]) -> _Columns:
    if stack.base is None:
        raise ConfigError(
            f"widen needs the base weight of module {stack.module!r}, which cannot be read (no "
            f"model, or it is quantised). Load the model unquantised, or choose another method."
        )
    weight = stack.base()
    joint = torch.cat(list(bs), dim=1)
    squares = joint.new_zeros(weight.shape[1])
    products = joint.new_zeros(weight.shape[1], joint.shape[1])
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS].detach().to(joint.device, torch.float64)
        squares += rows.square().sum(dim=0)
        products += rows.t() @ joint[start : start + _ROWS]
    ranks = [b.shape[1] for b in bs]
    return _Columns(squares, torch.split(products, ranks, dim=1))


def _changes(squares: Tensor, product: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return per column the change of magnitude and of direction.

    Args:
        squares: (in,) ``||w||^2``.
        product: (in, rank) W^T b.
        b: (out, rank).
        a: (rank, in).
    """
    dot = (product * a.t()).sum(dim=1)  # w . d
    delta = (torch.linalg.qr(b).R @ a).square().sum(dim=0)  # ||d||^2
    before = squares.sqrt()
    after = (squares + 2.0 * dot + delta).clamp_min(0.0).sqrt()
    total = before + after
    magnitude = (2.0 * dot + delta).abs() / torch.where(total > 0.0, total, 1.0)
    # 1 - cos by way of sin^2, which does not cancel where the delta is small; at rounding level the
    # vectors are parallel.
    scale = before * after
    cosine = (squares + dot) / torch.where(scale > 0.0, scale, 1.0)
    area = squares * delta - dot.square()
    area = torch.where(area > _PARALLEL * squares * delta, area, 0.0)
    small = area / torch.where(scale > 0.0, scale.square(), 1.0) / (1.0 + cosine.abs())
    direction = torch.where(cosine >= 0.0, small, 2.0 - small)
    return magnitude, torch.where(scale > 0.0, direction, (delta > 0.0).to(delta.dtype))


def _scores(changes: Sequence[Tensor], ratio: float, calibration: float) -> Tensor:
    """Return (adapters, in) scores: softmax over the adapters, or `calibration` where important."""
    joint = torch.stack(list(changes))
    width = joint.shape[1]
    places = torch.argsort(torch.argsort(joint, dim=1, stable=True), dim=1)
    ranks = places.to(joint.dtype) / width
    # More than `ratio` times the mean rank, (width - 1) / 2 places: in whole numbers, since the
    # column in the middle lies on it, and rounding would decide.
    important = 2 * places > ratio * (width - 1)
    return torch.where(important, calibration, torch.softmax(ranks, dim=0))
