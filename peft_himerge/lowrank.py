"""The best low-rank factors of one module's merged delta.

Where nothing was pruned the delta is a sum of low-rank terms, and the answer is exact without ever
forming it: QR of the stacked factors on both sides, SVD of the small core. A pruned delta has full
rank; its leading part is found by a randomised SVD whose subspace starts from the sources' own
factors and is iterated until the captured energy stops growing. Sources: stacked QR, METHODS 2.1;
Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import Combiner, Term

__all__ = ["LowRank", "Rank", "low_rank", "low_rank_of_dense", "low_rank_of_product"]

Rank = int | float | str
_OVERSAMPLE = 10
_MAX_ITERATIONS = 8
_RESIDUAL_BLOCK = 1 << 18  # entries of the residual held at once
_CONVERGED = 1e-5  # relative growth of the captured energy below which iterating stops
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Factors of one module's exported delta, ``b @ a``.

    Attributes:
        b: (out, rank).
        a: (rank, in).
        error: ||delta - b a|| / ||delta|| in the Frobenius norm; 0 for a zero delta.
        norm: ||delta||.
        note: what had to be done differently because an SVD did not converge; "" if nothing.
    """

    b: Tensor
    a: Tensor
    error: float
    norm: float
    note: str = ""

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
        scaled = [(*f.scaled(), term.scale) for f, term in combiner.factors(module, terms)]
        b = torch.cat([b * scale for b, _, scale in scaled], dim=1)
        return low_rank_of_product(b, torch.cat([a for _, a, _ in scaled], dim=0), rank)
    start = torch.cat([f.scaled()[1] for f, _ in combiner.factors(module, terms)])
    return low_rank_of_dense(combiner.delta(module, terms), rank, start=start, name=module)


def low_rank_of_dense(
    delta: Tensor, rank: Rank, *, start: Tensor | None = None, name: str = ""
) -> LowRank:
    """Return the leading factors of a delta of any rank.

    Args:
        delta: (out, in); not changed.
        rank: see `low_rank`; "exact" keeps the delta itself as one of the factors.
        start: (k, in) rows that span a good first guess of the delta's row space, such as the
            sources' A.
        name: seeds the random part; the module's path.
    """
    norm = float(torch.linalg.vector_norm(delta))
    if norm == 0.0:
        return LowRank(delta[:, :0], delta[:0], 0.0, 0.0)
    if rank == "exact":
        return _whole(delta, norm)
    rows = delta[:0] if start is None else start.to(delta.device, delta.dtype)
    return _randomised(delta, norm, rows.t(), rank, _generator(name, delta.device))


def _generator(module: str, device: torch.device) -> torch.Generator:
    # Seeded by the module's name: the result does not depend on the order of modules.
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
    return torch.Generator(device=device).manual_seed(seed)


def _whole(delta: Tensor, norm: float) -> LowRank:
    out, width = delta.shape
    if out <= width:
        return LowRank(torch.eye(out, dtype=delta.dtype, device=delta.device), delta, 0.0, norm)
    return LowRank(delta, torch.eye(width, dtype=delta.dtype, device=delta.device), 0.0, norm)


def low_rank_of_product(b: Tensor, a: Tensor, rank: Rank) -> LowRank:
    """Return the leading factors of ``b @ a``, exact if `rank` allows, without forming it.

    Args:
        b: (out, k).
        a: (k, in).
        rank: see `low_rank`.
    """
    if a.shape[0] == 0:
        return LowRank(b, a, 0.0, 0.0)
    # The core is tiny; float64 keeps "exact" exact for ill-conditioned factors too.
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v, note = _svd(r_b @ r_a.t())
    floor = s[0] * max(b.shape[0], a.shape[1]) * torch.finfo(b.dtype).eps
    s = torch.where(s > floor, s, torch.zeros_like(s))
    kept = _kept(s, float(s.square().sum()), rank)
    norm = float(s.norm())
    error = float(s[kept:].norm()) / norm if norm else 0.0
    left, right = q_b @ u[:, :kept], (q_a @ v.t()[:, :kept]).t()
    return _split(left, s[:kept], right, error, norm, b.dtype, note)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    """Return u, s, v of the thin SVD and a note, also where the usual way does not converge."""
    attempts: list[tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]] = [
        ("", lambda: torch.linalg.svd(x, full_matrices=False)),
        ("in float64", lambda: torch.linalg.svd(x.double(), full_matrices=False)),
        ("by eigenvalues", lambda: _svd_by_eigenvalues(x.double())),
    ]
    if x.is_cuda:
        slow = (
            "by gesvd",
            lambda: torch.linalg.svd(x.double(), full_matrices=False, driver="gesvd"),
        )
        attempts.insert(2, slow)
    for how, attempt in attempts[:-1]:
        try:
            u, s, v = attempt()
        except torch.linalg.LinAlgError as exc:  # type: ignore[attr-defined]
            _log.warning("SVD of a %s matrix failed %s: %s", tuple(x.shape), how, exc)
            continue
        return u.to(x.dtype), s.to(x.dtype), v.to(x.dtype), how and f"SVD repeated {how}"
    how, attempt = attempts[-1]
    u, s, v = attempt()
    return u.to(x.dtype), s.to(x.dtype), v.to(x.dtype), f"SVD repeated {how}"


def _svd_by_eigenvalues(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] > x.shape[1]:
        u, s, v = _svd_by_eigenvalues(x.t())
        return v.t(), s, u.t()
    values, vectors = torch.linalg.eigh(x @ x.t())
    s = values.flip(0).clamp(min=0.0).sqrt()
    u = vectors.flip(1)
    return u, s, (u.t() @ x) / s.clamp(min=torch.finfo(x.dtype).tiny)[:, None]


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
    u: Tensor, s: Tensor, v: Tensor, error: float, norm: float, dtype: torch.dtype, note: str
) -> LowRank:
    root = s.sqrt()
    return LowRank((u * root).to(dtype), (root[:, None] * v).to(dtype), error, norm, note)


def _randomised(
    delta: Tensor, norm: float, start: Tensor, rank: Rank, generator: torch.Generator
) -> LowRank:
    limit = min(delta.shape)
    width = min(limit, (rank if isinstance(rank, int) else start.shape[1]) + _OVERSAMPLE)
    energy = norm * norm
    while True:
        q = _range(delta, start, width, generator)
        small = q.t() @ delta
        u, s, v, note = _svd(small)
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
    error = math.sqrt(squares) / norm
    return _split(left, s[:kept], v[:kept], error, norm, delta.dtype, note)


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
