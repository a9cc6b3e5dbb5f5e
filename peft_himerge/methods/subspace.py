"""The subspace family: methods that work on singular vectors of the deltas.

All are exact in factor space (`frame`): they cost O((out + in) R^2) per module, for R the sum of
the ranks, and give thin factors. Their authors run them on dense matrices of full rank; on LoRA
deltas two things must be settled that full rank does not ask, and are settled alike in all of them:

* Only numerically non-zero singular values take part. A dense SVD of a delta of rank r hands out
  min(out, in) - r arbitrary directions more, and methods that even out singular values would fill
  them with noise.
* A missing module is a zero delta. An adapter whose delta is zero in a module has no directions
  there and takes no share of a budget of directions that is split among adapters.

The user's weight of an adapter multiplies its delta before the method sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from .check import fraction, number, whole
from .frame import Frame, Spectrum, frame_of, polar, spectrum
from .registry import method
from .stack import Delta, Stack

__all__ = ["iso_c", "iso_cts", "opcm", "tsv_m"]


@method(
    "tsv_m",
    title="TSV-Merge",
    url="https://arxiv.org/abs/2412.00081",
    variant="authors, truncated to the rank of each delta",
    low_rank=True,
)
def tsv_m(
    stacks: Sequence[Stack], *, lam: float = 1.0, directions: int | None = None
) -> Iterator[tuple[str, Delta]]:
    """Put the singular vectors of all adapters side by side and make them orthogonal.

    With delta_i = U_i S_i V_i, cut to the k largest singular values:
    ``M = lam * polar([U_1 ... U_T]) @ diag(S_1, ..., S_T) @ polar([V_1; ...; V_T])``.

    Source: arXiv 2412.00081 (TSV-M) and the authors' code. Where we differ: k is at most the
    numeric rank of each delta; polar factors of dependent directions use the pseudo-inverse; T
    counts the adapters whose delta here is not zero, and k is at least 1.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.
        directions: singular triples kept per adapter; default min(out, in) // T as in the paper.

    Raises:
        ConfigError: an option is out of range.
    """
    lam, directions = number("lam", lam), _budget(directions)
    for stack in stacks:
        frame = frame_of(stack)
        share = directions or max(1, min(stack.shape) // max(1, len(frame.present)))
        found = [frame.spectrum(i).top(share) for i in frame.present]
        yield stack.module, frame.lift(_orthogonalised(frame, found, lam, isotropic=False))


def _orthogonalised(
    frame: Frame, found: Sequence[Spectrum], lam: float, *, isotropic: bool
) -> Tensor:
    """Return the core of polar(U) diag(S) polar(V); S evened out to its mean if `isotropic`."""
    if not any(part.rank for part in found):
        return torch.zeros_like(frame.total())
    s = torch.cat([part.s for part in found])
    if isotropic:
        s = s.mean().expand_as(s)
    u = polar([part.u for part in found], frame.tolerance)
    v = polar([part.v.t() for part in found], frame.tolerance)
    return (u * (lam * s)) @ v.t()


@method(
    "iso_c",
    title="Iso-C",
    url="https://arxiv.org/abs/2502.04959",
    variant="authors, mean over the non-zero singular values",
    low_rank=True,
)
def iso_c(stacks: Sequence[Stack], *, lam: float = 1.0) -> Iterator[tuple[str, Delta]]:
    """Give all singular values of the summed deltas the same size, their mean.

    ``sum_i delta_i = U S V``, ``M = lam * mean(S) * U @ V``.

    Source: arXiv 2502.04959 (Iso-C) and the authors' code. Where we differ: the mean is over the
    numerically non-zero values instead of min(out, in) of them, which would shrink a LoRA merge by
    R / min(out, in); values that are only rounding errors are not raised to the mean.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.

    Raises:
        ConfigError: `lam` is not a finite number.
    """
    lam = number("lam", lam)
    for stack in stacks:
        frame = frame_of(stack)
        found = _of_sum(frame)
        core = torch.zeros_like(frame.total())
        if found.rank:
            core = (lam * found.s.mean()) * (found.u @ found.v)
        yield stack.module, frame.lift(core)


def _of_sum(frame: Frame) -> Spectrum:
    b = torch.cat([b for b, _ in frame.parts], dim=1)
    return spectrum(b, torch.cat([a for _, a in frame.parts]), floor=frame.floor())


@method(
    "iso_cts",
    title="Iso-CTS",
    url="https://arxiv.org/abs/2502.04959",
    variant="authors, budget of directions = sum of the ranks",
    low_rank=True,
)
def iso_cts(
    stacks: Sequence[Stack],
    *,
    lam: float = 1.0,
    common: float = 0.8,
    directions: int | None = None,
) -> Iterator[tuple[str, Delta]]:
    """Keep the leading common directions, add each adapter's own, all at the same strength.

    Of a budget of directions, c leading ones of ``sum_i delta_i`` are common; each adapter adds the
    leading (budget - c) / T of ``delta_i - U_c U_c^T delta_i``. Both sides are made orthogonal
    (polar factor), every singular value is set to the mean of those collected, times `lam`.

    Source: arXiv 2502.04959 (Iso-CTS) and the authors' code, with their rounding of c. Where we
    differ: the budget is the sum of the numeric ranks (theirs min(out, in)); directions that are
    zero within rounding are neither used nor counted in the mean; T counts non-zero deltas; c is
    kept from falling below zero.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.
        common: share of the budget for common directions, in [0, 1].
        directions: the budget; default the sum of the deltas' ranks, at most min(out, in).

    Raises:
        ConfigError: an option is out of range.
    """
    lam, common = number("lam", lam), fraction("common", common)
    directions = _budget(directions)
    for stack in stacks:
        frame = frame_of(stack)
        found = _common_and_own(frame, common, directions, min(stack.shape))
        yield stack.module, frame.lift(_orthogonalised(frame, found, lam, isotropic=True))


def _common_and_own(
    frame: Frame, common: float, directions: int | None, limit: int
) -> list[Spectrum]:
    tasks = len(frame.present)
    if not tasks:
        return []
    budget = min(limit, directions or sum(frame.spectrum(i).rank for i in frame.present))
    own = min(budget // tasks, round((budget - int(common * budget)) / tasks))
    shared = _of_sum(frame).top(budget - own * tasks)
    found = []
    for i in frame.present:
        b, a = frame.parts[i]
        rest = b - shared.u @ (shared.u.t() @ b)
        found.append(spectrum(rest, a, floor=frame.tolerance * frame.norms[i]).top(own))
    return [*found, shared]


@method(
    "opcm",
    title="OPCM",
    url="https://arxiv.org/abs/2501.09522",
    variant="fusion_bench, non-null directions only",
    low_rank=True,
)
def opcm(
    stacks: Sequence[Stack], *, alpha: float = 0.5, order: Sequence[str] | None = None
) -> Iterator[tuple[str, Delta]]:
    """Add one adapter after the other, without what is already there in strong directions.

    Start with the first delta. For each next one, D, with M = U S V merged so far and q the number
    of leading singular values that together hold at most `alpha` of their sum, remove from D its
    q x q block on the leading directions and its diagonal on the others:

        D' = D - U_q U_q^T D V_q V_q^T - sum_{q <= j < rank} (u_j^T D v_j) u_j v_j^T
        N = lam_prev * M + D',   lam = ||N|| / a,   M = N / lam

    with ||N|| the norm over the whole model and a the mean norm of the deltas so far. The result
    depends on the order.

    Source: arXiv 2501.09522, as implemented in fusion_bench. Where we differ: the diagonal is
    removed along non-null directions of M alone (the reference's null directions are arbitrary);
    alpha = 1 removes the whole block, where the reference wraps around to q = 0; no shuffling.

    Args:
        stacks: all modules.
        alpha: share of the singular values' sum that is protected, in [0, 1].
        order: adapter names in the order to add them; default the order of the names.

    Raises:
        ConfigError: `alpha` is outside [0, 1], or `order` is not all of the names.
    """
    alpha = fraction("alpha", alpha)
    if not stacks:
        return
    names = stacks[0].names
    sequence = _sequence(names, order)
    frames = [_compact(frame_of(stack)) for stack in stacks]
    merged = [_core(frame, sequence[0]) for frame in frames]
    norms = [math.hypot(*(frame.norms[sequence[0]] for frame in frames))]
    lam = 1.0
    for i in sequence[1:]:
        norms.append(math.hypot(*(frame.norms[i] for frame in frames)))
        for k, frame in enumerate(frames):
            merged[k] = lam * merged[k] + _novel(merged[k], _core(frame, i), frame, alpha)
        size = math.hypot(*(float(torch.linalg.vector_norm(core)) for core in merged))
        mean = sum(norms) / len(norms)
        lam = size / mean if size and mean else 1.0
        merged = [core / lam for core in merged]
    for stack, frame, core in zip(stacks, frames, merged, strict=True):
        yield stack.module, frame.lift(core)


def _sequence(names: tuple[str, ...], order: Sequence[str] | None) -> list[int]:
    if order is None:
        return list(range(len(names)))
    for name in order:
        if name not in names:
            raise ConfigError(f"order names the adapter {name!r}.{suggest(name, names)}")
    if len(order) != len(names) or len(set(order)) != len(names):
        raise ConfigError(f"order must name each adapter once, got {list(order)!r} for {names!r}.")
    return [names.index(name) for name in order]


def _compact(frame: Frame) -> Frame:
    # All modules are held at once: keep the bases in the dtype they are lifted to.
    return Frame(
        frame.left.to(frame.dtype),
        frame.right.to(frame.dtype),
        frame.parts,
        frame.norms,
        frame.tolerance,
        frame.dtype,
    )


def _core(frame: Frame, i: int) -> Tensor:
    b, a = frame.parts[i]
    return b @ a


def _novel(merged: Tensor, core: Tensor, frame: Frame, alpha: float) -> Tensor:
    """Return `core` without its part in the strong directions of `merged`."""
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    rank = int((s > frame.floor()).sum())
    if rank == 0:
        return core
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    sums = s.cumsum(0)
    q = int((sums <= alpha * sums[-1]).sum())
    inside = u.t() @ core @ v.t()
    removed = torch.diag(inside.diagonal())
    removed[:q, :q] = inside[:q, :q]
    novel: Tensor = core - u @ removed @ v
    return novel


def _budget(directions: int | None) -> int | None:
    return None if directions is None else whole("directions", directions, least=1)
