"""Small coordinates in which methods that work entry by entry merge low-rank deltas exactly.

A pruned or sign-elected delta has full rank and must be approximated to become an adapter. Pruned
in these coordinates, it stays a product of thin factors:

    "full"    the deltas themselves, (out, in)
    "knots"   delta_i = U P_i          P_i (k, in)    k <= R, the sum of the ranks
    "core"    delta_i = U X_i V        X_i (k, l)     k, l <= R

Sources: KnOTS (arXiv 2410.19735), per module, deltas side by side along the inputs, singular values
kept with V (P_i = S V_i); Core Space (arXiv 2509.17786), reference bases from the stacked B and the
stacked A. Where we differ: directions are dropped by a relative tolerance (KnOTS: 1e-5, absolute);
the signs of the basis vectors are fixed (largest entry positive), though no sign-symmetric method
depends on them; entries of the small factors at rounding level are set to 0, so that what is
orthogonal does not vote on signs. Core Space rotates to the singular vectors of the factors, not of
the deltas: unlike KnOTS it sees how a delta is split into B and A. Where singular values repeat,
the basis, and with it an entry by entry result, is not unique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from ..factors import LoraFactors
from .frame import Frame, frame_of
from .stack import Delta, Dense, Factored, Stack

__all__ = ["Lift", "Space", "in_space", "to_space"]

Space = Literal["full", "knots", "core"]
_ROUNDING = 64.0 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, eq=False)
class Lift:
    """Turns a merged representation back into the merged delta of its module.

    Attributes:
        left: (out, k) orthonormal, in the module's dtype.
        right: (l, in) orthonormal; None if the representation kept the inputs as they are.
    """

    left: Tensor
    right: Tensor | None

    def __call__(self, merged: Delta | Tensor) -> Factored:
        """Return left @ merged @ right as thin factors."""
        if isinstance(merged, Factored):
            b, a = merged.b, merged.a
            return Factored((self.left.to(b.dtype) @ b).to(self.left.dtype), self._wide(a))
        small = merged.delta if isinstance(merged, Dense) else merged
        return Factored(self.left, self._wide(small))

    def _wide(self, rows: Tensor) -> Tensor:
        wide = rows if self.right is None else rows @ self.right.to(rows.dtype)
        return wide.to(self.left.dtype)


def to_space(stack: Stack, space: Space) -> tuple[Stack, Lift]:
    """Return the deltas of `stack` in the coordinates of `space`, and the way back.

    The representation is a `Stack` again: same module, names, weights and seed, smaller deltas, in
    float64 (its factors are the module's own, rotated). A missing module stays missing. Cost
    O((out + in) R^2); `Lift` holds one basis, as large as the stacked factors.

    Args:
        stack: one module of all adapters.
        space: "knots" or "core".

    Raises:
        ConfigError: no such space.
        AdapterError: a factor holds NaN or infinity.
    """
    if space not in ("knots", "core"):
        raise ConfigError(f"no small space {space!r}.{suggest(str(space), ('knots', 'core'))}")
    frame = frame_of(stack, weighted=False)
    left = _knots_basis(frame) if space == "knots" else _column_basis([b for b, _ in frame.parts])
    right = _column_basis([a.t() for _, a in frame.parts]) if space == "core" else None
    left = left * _signs(frame.left @ left)
    if right is not None:
        right = right * _signs(frame.right @ right)
    factors = tuple(
        None if original is None else _rotated(frame.parts[i], left, right, stack.scaled(i)[1])
        for i, original in enumerate(stack.factors)
    )
    small = Stack(
        module=stack.module,
        layer=stack.layer,
        names=stack.names,
        factors=factors,
        weights=stack.weights,
        seed=stack.seed,
    )
    wide = None if right is None else (frame.right @ right).t().to(stack.dtype)
    return small, Lift((frame.left @ left).to(stack.dtype), wide)


def in_space(
    method: Callable[..., Iterator[tuple[str, Delta]]],
    stacks: Sequence[Stack],
    space: Space,
    **options: object,
) -> Iterator[tuple[str, Delta]]:
    """Return what `method` gives when it runs in the coordinates of `space`.

    Args:
        method: a merging method; in the small spaces, one that works entry by entry.
        stacks: all modules.
        space: "full", "knots" or "core".
        **options: the method's own.

    Returns:
        (module, merged delta), in the method's order; in the small spaces every delta is `Factored`
        with at most the sum of the adapters' ranks.

    Raises:
        ConfigError: no such space.
    """
    if space not in get_args(Space):
        raise ConfigError(f"no space {space!r}.{suggest(str(space), get_args(Space))}")
    if space == "full":
        return method(stacks, **options)
    return _in_small_space(partial(method, **options), stacks, space)


def _in_small_space(
    method: Callable[..., Iterator[tuple[str, Delta]]], stacks: Sequence[Stack], space: Space
) -> Iterator[tuple[str, Delta]]:
    pairs = [to_space(stack, space) for stack in stacks]
    lifts = {small.module: lift for small, lift in pairs}
    for module, merged in method([small for small, _ in pairs]):
        yield module, lifts[module](merged)


def _knots_basis(frame: Frame) -> Tensor:
    """Return the left singular vectors of ``[delta_1 ... delta_T]``, (p, k)."""
    # delta_i = left b_i a_i right.T and a_i.T = Q R, so b_i R.T has the same left singular vectors
    # and the same values with rank columns instead of `in`.
    blocks = [b @ torch.linalg.qr(a.t()).R.t() for b, a in frame.parts]
    return _column_basis(blocks)


def _column_basis(blocks: Sequence[Tensor]) -> Tensor:
    """Return the left singular vectors, at least one, of blocks put side by side."""
    joint = torch.cat(list(blocks), dim=1)
    u, s, _ = torch.linalg.svd(joint, full_matrices=False)
    floor = s[:1] * max(joint.shape) * torch.finfo(torch.float64).eps
    basis: Tensor = u[:, : max(1, int((s > floor).sum()))]
    return basis


def _signs(basis: Tensor) -> Tensor:
    """Return +1 or -1 per column, the sign of its entry of largest magnitude."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0.0, -1.0, 1.0).to(basis)


def _rotated(
    part: tuple[Tensor, Tensor], left: Tensor, right: Tensor | None, original_a: Tensor
) -> LoraFactors:
    b = _flushed(left.t() @ part[0])
    a = original_a if right is None else _flushed(part[1] @ right)
    return LoraFactors(a=a, b=b, scaling=1.0)


def _flushed(small: Tensor) -> Tensor:
    """Set entries that are rounding errors of a rotation to zero."""
    limit = _ROUNDING * torch.linalg.vector_norm(small)
    return torch.where(small.abs() <= limit, torch.zeros_like(small), small)
