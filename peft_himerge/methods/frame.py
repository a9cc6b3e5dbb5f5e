"""One module's deltas in joint orthonormal coordinates, where the subspace methods do their work.

    delta_i = left @ (b_i @ a_i) @ right.T

`left` and `right` span the columns and the rows of all deltas, so nothing is lost: any map that
commutes with rotations (SVD, projection, polar factor, least squares) may run on the small cores
``b_i @ a_i`` and be lifted back. Two thin QRs, O((out + in) R^2) for R the sum of the ranks; no
(out, in) matrix exists. Source: METHODS 2.1. All of it in float64, cast once when lifted.

Singular values at rounding level are dropped everywhere: beyond the rank of a delta its singular
vectors are noise, and methods that even out singular values would make that noise loud.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError
from .stack import Factored, Stack

__all__ = ["Frame", "Spectrum", "frame_of", "polar", "spectrum"]

# Folding the scaling into b rounds each entry by half an eps of the working dtype, which moves
# singular values by about eps of the largest; eight of them leave room for both factors.
_NOISE = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The singular triples of a matrix above a floor: ``u @ diag(s) @ v``, s descending."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """Number of triples kept."""
        return self.s.shape[0]

    def top(self, k: int) -> Spectrum:
        """Return the `k` leading triples, or all if there are fewer."""
        return Spectrum(self.u[:, :k], self.s[:k], self.v[:k])


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One module's deltas in joint orthonormal coordinates.

    Attributes:
        left: (out, p) orthonormal; p = min(out, R).
        right: (in, q) orthonormal; q = min(in, R).
        parts: per adapter (b, a) of shapes (p, rank) and (rank, q); rank 0 where it has no such
            module.
        norms: per adapter ||delta|| in the Frobenius norm; 0.0 for a zero or missing delta.
        tolerance: singular values below this share of what they are compared with are noise.
        dtype: what `lift` returns.
    """

    left: Tensor
    right: Tensor
    parts: tuple[tuple[Tensor, Tensor], ...]
    norms: tuple[float, ...]
    tolerance: float
    dtype: torch.dtype

    @property
    def present(self) -> tuple[int, ...]:
        """Indices of the adapters whose delta is not zero."""
        return tuple(i for i, norm in enumerate(self.norms) if norm > 0.0)

    def spectrum(self, i: int) -> Spectrum:
        """Return the singular triples of adapter `i`'s core."""
        return spectrum(*self.parts[i], floor=self.tolerance * self.norms[i])

    def floor(self) -> float:
        """Return what counts as zero among singular values of sums of the deltas."""
        return self.tolerance * max(self.norms)

    def total(self, scale: float = 1.0) -> Tensor:
        """Return the (p, q) core of the sum of all deltas, times `scale`."""
        b = torch.cat([b for b, _ in self.parts], dim=1)
        return b @ torch.cat([a for _, a in self.parts]) * scale

    def lift(self, core: Tensor) -> Factored:
        """Return left @ core @ right.T as thin factors of rank min(p, q)."""
        if core.shape[0] <= core.shape[1]:
            b, a = self.left, core @ self.right.t().to(core.dtype)
        else:
            b, a = self.left.to(core.dtype) @ core, self.right.t()
        return Factored(b.to(self.dtype), a.to(self.dtype))


def frame_of(stack: Stack, *, weighted: bool = True) -> Frame:
    """Return the deltas of `stack` in joint orthonormal coordinates.

    Args:
        stack: one module of all adapters.
        weighted: multiply every delta by the user's weight of its adapter first.

    Raises:
        AdapterError: a factor holds NaN or infinity.
    """
    pairs = []
    for i, name in enumerate(stack.names):
        b, a = (part.double() for part in stack.scaled(i))
        if not (bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())):
            raise AdapterError(
                f"adapter {name!r}: module {stack.module!r} holds NaN or infinity. Its training "
                f"diverged, or the file is damaged; leave the adapter or the module out."
            )
        pairs.append((b * stack.weights[i] if weighted else b, a))
    ranks = [a.shape[0] for _, a in pairs]
    left, r_b = torch.linalg.qr(torch.cat([b for b, _ in pairs], dim=1))
    right, r_a = torch.linalg.qr(torch.cat([a for _, a in pairs]).t())
    parts = tuple(
        zip(torch.split(r_b, ranks, dim=1), torch.split(r_a.t(), ranks, dim=0), strict=True)
    )
    norms = tuple(_norm(b, a) for b, a in parts)
    tolerance = _NOISE * torch.finfo(stack.dtype).eps
    return Frame(left, right, parts, norms, tolerance, stack.dtype)


def _norm(b: Tensor, a: Tensor) -> float:
    if a.shape[0] == 0:
        return 0.0
    return float(torch.linalg.vector_norm(torch.linalg.qr(b).R @ a))


def spectrum(b: Tensor, a: Tensor, *, floor: float = 0.0) -> Spectrum:
    """Return the singular triples of ``b @ a`` whose value is above `floor` (and above 0).

    Args:
        b: (rows, rank), float64.
        a: (rank, columns), float64.
        floor: absolute; smaller values are dropped.
    """
    if a.shape[0] >= min(b.shape[0], a.shape[1]):
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    else:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.t())
        u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
        u, v = q_b @ u, v @ q_a.t()
    kept = int((s > floor).sum())
    return Spectrum(u[:, :kept], s[:kept], v[:kept])


def polar(columns: Sequence[Tensor], tolerance: float) -> Tensor:
    """Return the nearest partial isometry to the matrix of the given columns.

    ``polar(X) = X (X^T X)^(-1/2)``, with the pseudo-inverse where columns depend on each other: two
    equal columns u become u / sqrt(2) each, so that what was counted twice counts once.

    Args:
        columns: blocks (p, k_i) that are put side by side.
        tolerance: singular values below this share of the largest count as zero.
    """
    joint = torch.cat(list(columns), dim=1)
    u, s, v = torch.linalg.svd(joint, full_matrices=False)
    kept = int((s > tolerance * s[:1]).sum())
    isometry: Tensor = u[:, :kept] @ v[:kept]
    return isometry
