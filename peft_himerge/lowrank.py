"""The best low-rank factors of one module's merged delta.

Where nothing was pruned the delta is a sum of low-rank terms, and the answer is exact without ever
forming it: QR of the stacked factors on both sides, SVD of the small core. A pruned delta has full
rank; its leading part is found by a randomised SVD whose subspace starts from the sources' own
factors and is iterated until the captured energy stops growing. Sources: stacked QR, METHODS 2.1;
Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import Combiner, Term

__all__ = ["LowRank", "Rank", "low_rank"]

Rank = int | float | str
_OVERSAMPLE = 10
_MAX_ITERATIONS = 8
_RESIDUAL_BLOCK = 1 << 18  # entries of the residual held at once
_CONVERGED = 1e-5  # relative growth of the captured energy below which iterating stops


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Factors of one module's exported delta, ``b @ a``.

    Attributes:
        b: (out, rank).
        a: (rank, in).
        error: ||delta - b a|| / ||delta|| in the Frobenius norm; 0 for a zero delta.
        norm: ||delta||.
    """

    b: Tensor
    a: Tensor
    error: float
    norm: float

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.a.shape[0]


def low_rank(combiner: Combiner, module: str, terms: Sequence[Term], rank: Rank) -> LowRank:
    """Return factors of the merged delta of `module`.

    Args:
        combiner: makes the delta.
        module: module path.
        terms: what the plan adds to the module.
        rank: the largest rank allowed; a share of the energy in (0, 1) to keep; or "exact".

    Returns:
        Factors with singular values split evenly over both sides. Unpruned deltas are exact up to
        rounding if `rank` allows their rank.
    """
    if not terms:
        out, width = combiner.shape(module)
        return LowRank(torch.zeros(out, 0), torch.zeros(0, width), 0.0, 0.0)
    if all(term.cut <= 0.0 for term in terms):
        return _stacked(combiner, module, terms, rank)
    delta = combiner.delta(module, terms)
    norm = float(torch.linalg.vector_norm(delta))
    if norm == 0.0:
        return LowRank(delta[:, :0], delta[:0], 0.0, 0.0)
    if rank == "exact":
        return _whole(delta, norm)
    start = torch.cat([f.scaled()[1] for f, _ in combiner.factors(module, terms)]).t()
    return _randomised(delta, norm, start.to(delta.dtype), rank, _generator(module, delta.device))


def _generator(module: str, device: torch.device) -> torch.Generator:
    # Seeded by the module's name: the result does not depend on the order of modules.
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
    return torch.Generator(device=device).manual_seed(seed)


def _whole(delta: Tensor, norm: float) -> LowRank:
    out, width = delta.shape
    if out <= width:
        return LowRank(torch.eye(out, dtype=delta.dtype, device=delta.device), delta, 0.0, norm)
    return LowRank(delta, torch.eye(width, dtype=delta.dtype, device=delta.device), 0.0, norm)


def _stacked(combiner: Combiner, module: str, terms: Sequence[Term], rank: Rank) -> LowRank:
    scaled = [(*f.scaled(), term.scale) for f, term in combiner.factors(module, terms)]
    b = torch.cat([b * scale for b, _, scale in scaled], dim=1)
    a = torch.cat([a for _, a, _ in scaled], dim=0)
    # The core is tiny; float64 keeps "exact" exact for ill-conditioned factors too.
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    floor = s[0] * max(b.shape[0], a.shape[1]) * torch.finfo(b.dtype).eps
    s = torch.where(s > floor, s, torch.zeros_like(s))
    kept = _kept(s, float(s.square().sum()), rank)
    norm = float(s.norm())
    error = float(s[kept:].norm()) / norm if norm else 0.0
    return _split(q_b @ u[:, :kept], s[:kept], (q_a @ v.t()[:, :kept]).t(), error, norm, b.dtype)


def _kept(s: Tensor, energy: float, rank: Rank) -> int:
    """Return how many leading singular values `rank` asks for, at most the non-zero ones."""
    nonzero = int(torch.count_nonzero(s))
    if isinstance(rank, str):
        return nonzero
    if isinstance(rank, int):
        return min(rank, nonzero)
    captured = s.double().square().cumsum(0)
    return min(int(torch.searchsorted(captured, rank * energy)) + 1, nonzero)


def _split(
    u: Tensor, s: Tensor, v: Tensor, error: float, norm: float, dtype: torch.dtype
) -> LowRank:
    root = s.sqrt()
    return LowRank((u * root).to(dtype), (root[:, None] * v).to(dtype), error, norm)


def _randomised(
    delta: Tensor, norm: float, start: Tensor, rank: Rank, generator: torch.Generator
) -> LowRank:
    limit = min(delta.shape)
    width = min(limit, (rank if isinstance(rank, int) else start.shape[1]) + _OVERSAMPLE)
    energy = norm * norm
    while True:
        q = _range(delta, start, width, generator)
        small = q.t() @ delta
        u, s, v = torch.linalg.svd(small, full_matrices=False)
        found = float(s.double().square().sum())
        if width == limit or not isinstance(rank, float) or found >= rank * energy:
            break
        width = min(limit, 2 * width)
    kept = _kept(s, energy, rank)
    left, right = q @ u[:, :kept], s[:kept, None] * v[:kept]
    step = max(1, _RESIDUAL_BLOCK // delta.shape[1])
    squares = 0.0
    for start_row in range(0, delta.shape[0], step):
        rows = slice(start_row, start_row + step)
        squares += float((delta[rows] - left[rows] @ right).double().square().sum())
    return _split(left, s[:kept], v[:kept], math.sqrt(squares) / norm, norm, delta.dtype)


def _range(delta: Tensor, start: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return an orthonormal basis (out, width) of nearly all that `delta` does in that many."""
    extra = max(0, width - start.shape[1])
    noise = torch.randn(
        delta.shape[1], extra, generator=generator, dtype=delta.dtype, device=delta.device
    )
    basis: Tensor = torch.linalg.qr(delta @ torch.cat([start[:, :width], noise], dim=1)).Q
    captured = 0.0
    for _ in range(_MAX_ITERATIONS):
        back = torch.linalg.qr((basis.t() @ delta).t())
        found = float(back.R.double().square().sum())
        if found <= captured * (1.0 + _CONVERGED) or not math.isfinite(found):
            break
        captured = found
        basis = torch.linalg.qr(delta @ back.Q).Q
    return basis
