"""The best low-rank factors of one module's merged delta.

Where nothing was pruned the delta is a sum of low-rank terms, and the answer is exact without ever
forming it: QR of the stacked factors on both sides, SVD of the small core. A pruned delta has full
rank; its leading part is found by a randomised SVD whose subspace starts from what the delta would
be unpruned, and takes turns between the two sides until the captured energy has settled.
Sources: stacked QR, METHODS 2.1; Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and
5.1. Where we differ: the energy is looked at after every product with the delta instead of every
second one, since each product costs more than making the delta did.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .combine import Combiner, Term

__all__ = ["LowRank", "Rank", "low_rank", "low_rank_of_dense", "low_rank_of_product"]

Rank = int | float | str
_OVERSAMPLE = 16  # directions beyond the rank; multiples of 16 fill the matrix kernels
_MAX_PRODUCTS = 24
_RESIDUAL_BLOCK = 1 << 18  # entries looked at together
# Taking turns stops when what is still to be won is less than this share of the residual's energy:
# the error is then within 0.5 % of the optimum (the tests ask for 2 %). What is still to be won is
# estimated from the last gain and its ratio to the one before; gains shrink ever more slowly.
_CONVERGED = 0.01
_LEAST_RATIO = 0.7
# A residual of less energy than this many roundings of the whole cannot be seen to settle; a fixed
# number of further products follows.
_BLIND = 1e3
_BLIND_PRODUCTS = 6
# Above this share of the energy the residual is known from norms to five digits; below it the
# difference of two nearly equal energies is not, and the residual is formed.
_PLAIN_RESIDUAL = 0.02
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
        return low_rank_of_product(b, torch.cat([a for _, a, _ in scaled]), rank)
    delta = combiner.delta(module, terms)
    if rank == "exact":
        return low_rank_of_dense(delta, rank)
    unpruned = [replace(term, cut=0.0) for term in terms]
    wide = rank + _OVERSAMPLE if isinstance(rank, int) else "exact"
    guess = low_rank(combiner, module, unpruned, wide)
    return low_rank_of_dense(delta, rank, start=guess.a, name=module)


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
    norm = _norm(delta)
    if norm == 0.0:
        return LowRank(delta[:, :0], delta[:0], 0.0, 0.0)
    if rank == "exact":
        return _whole(delta, norm)
    rows = delta[:0] if start is None else start.to(delta.device, delta.dtype)
    return _randomised(delta, norm, rows.t(), rank, _generator(name, delta.device))


def _norm(delta: Tensor) -> float:
    """Return the Frobenius norm; float32 sums stay within blocks, the rest is float64."""
    norms = [torch.linalg.vector_norm(rows) for rows in _in_blocks(delta, delta)]
    return float(torch.stack(norms).double().norm())


def _in_blocks(tensor: Tensor, delta: Tensor) -> Iterator[Tensor]:
    """Yield rows of `tensor`, as many at once as make a block of `delta`."""
    step = max(1, _RESIDUAL_BLOCK // delta.shape[1])
    for start in range(0, delta.shape[0], step):
        yield tensor[start : start + step]


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
        wanted = rank if isinstance(rank, int) else width
        u, s, v, note = _leading(delta, start, width, wanted, energy, generator)
        found = float(s.double().square().sum())
        if width == limit or not isinstance(rank, float) or found >= rank * energy:
            break
        start, width = v, min(limit, 2 * width)
    kept = _kept(s, energy, rank)
    u, s, v = u[:, :kept], s[:kept], v[:, :kept].t()
    lost = 1.0 - float(s.double().square().sum()) / energy
    if lost > _PLAIN_RESIDUAL:
        error = math.sqrt(lost)
    else:
        pieces = zip(_in_blocks(delta, delta), _in_blocks(u * s, delta), strict=True)
        squares = [(rows - some @ v).double().square().sum() for rows, some in pieces]
        error = math.sqrt(float(torch.stack(squares).sum())) / norm
    return _split(u, s, v, error, norm, delta.dtype, note)


def _leading(
    delta: Tensor,
    start: Tensor,
    width: int,
    wanted: int,
    energy: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Return nearly all that `delta` does in `width` directions.

    Args:
        delta: (out, in).
        start: (in, any), a guess at the leading right singular vectors; may be empty.
        width: number of directions.
        wanted: number of leading directions whose energy has to settle.
        energy: ||delta||^2.
        generator: draws what `start` leaves open.

    Returns:
        u (out, width), s (width,) descending, v (in, width), and a note of `_svd`.
    """

    def noise(rows: int, columns: int) -> Tensor:
        shape = (rows, columns)
        return torch.randn(shape, generator=generator, dtype=delta.dtype, device=delta.device)

    if start.shape[1] > width:
        start = start @ noise(start.shape[1], width)
    extra = noise(delta.shape[1], width - start.shape[1])
    near: Tensor = torch.linalg.qr(torch.cat([start, extra], dim=1)).Q
    eps = torch.finfo(delta.dtype).eps
    captured, gain, blind = -math.inf, math.inf, 0
    for turn in range(_MAX_PRODUCTS):
        seen = delta.t() if turn % 2 else delta
        far, core = torch.linalg.qr(seen @ near)
        # What `seen` does with `near` is far @ core @ near.t().
        u, s, v, note = _svd(core)
        found = float(s[:wanted].double().square().sum())
        before, gain = gain, found - captured
        captured = found
        if not math.isfinite(found) or blind == _BLIND_PRODUCTS:
            break
        if energy - captured <= _BLIND * eps * energy:
            blind += 1
        elif _to_come(gain, before) <= _CONVERGED * (energy - captured):
            break
        if turn + 1 < _MAX_PRODUCTS:
            near = far
    outer, inner = far @ u, near @ v.t()
    return (inner, s, outer, note) if turn % 2 else (outer, s, inner, note)


def _to_come(gain: float, before: float) -> float:
    """Return the sum of all gains to come if each is the same share of the one before it."""
    # Where there was no gain before, there is rounding alone, and no ratio to be had.
    ratio = max(_LEAST_RATIO, gain / before if 0.0 < before < math.inf else 0.0)
    return gain * ratio / (1.0 - ratio) if ratio < 1.0 else math.inf
