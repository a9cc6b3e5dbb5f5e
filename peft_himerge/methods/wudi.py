"""WUDI and its relatives: a merged delta that interferes least with every adapter's row space.

All minimise, or move towards the minimum of,

    L(M) = sum_i ||(M - delta_i) delta_i^T||^2 / ||delta_i||^2

whose gradient is ``2 (M C - E)`` with ``C = sum_i D_i^T D_i / ||D_i||^2`` and ``E = sum_i D_i D_i^T
D_i / ||D_i||^2``. With C = V diag(mu) V^T each of them is a filter f on the eigenvalues:

    M = M_0 + (E V / mu - M_0 V) f(mu) V^T       f = 0 keeps the start M_0, f = 1 is the minimum

C has the rank of the stacked A, so all of it happens in the R x R cores of `frame`; eigenvalues
come from an SVD of the stacked, normalised deltas rather than from C, which would square their
condition. Source: METHODS 3.20 to 3.22. The user's weight of an adapter multiplies its delta first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from .check import choice, fraction, number, whole
from .frame import Frame, frame_of, spectrum
from .registry import method
from .stack import Delta, Stack

__all__ = ["Start", "aswudi", "optmerge", "swudi", "wudi"]

Start = Literal["sum", "mean", "zero"]


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The least-squares problem of one module, in the coordinates of its frame.

    Attributes:
        mu: (k,) non-zero eigenvalues of C, descending.
        v: (k, q) their eigenvectors as rows.
        ev: (p, k) E V.
    """

    mu: Tensor
    v: Tensor
    ev: Tensor

    def filtered(self, start: Tensor, f: Tensor) -> Tensor:
        """Return the (p, q) core ``M_0 + (E V / mu - M_0 V) f V^T``."""
        return start + ((self.ev / self.mu - start @ self.v.t()) * f) @ self.v


def _problem(
    frame: Frame, parts: Sequence[tuple[Tensor, Tensor]], norms: Sequence[float]
) -> _Problem:
    pairs = [(b, a, norm) for (b, a), norm in zip(parts, norms, strict=True) if norm > 0.0]
    # With b = Q R, the rows R a / norm have the same Gram matrix as the normalised delta.
    rows = [torch.linalg.qr(b).R @ a / norm for b, a, norm in pairs]
    if not rows:
        p, q = frame.left.shape[1], frame.right.shape[1]
        empty = frame.left.new_zeros
        return _Problem(empty(0), empty(0, q), empty(p, 0))
    joint = torch.cat(rows)
    eye = torch.eye(joint.shape[0], dtype=joint.dtype, device=joint.device)
    found = spectrum(eye, joint, floor=frame.tolerance)
    v = found.v
    ev = torch.zeros(frame.left.shape[1], v.shape[0], dtype=v.dtype, device=v.device)
    for (b, a, _), row in zip(pairs, rows, strict=True):
        ev += b @ (a @ (row.t() @ (row @ v.t())))
    return _Problem(found.s.square(), v, ev)


def _start(frame: Frame, start: Start) -> Tensor:
    choice("start", start, get_args(Start))
    return frame.total({"sum": 1.0, "mean": 1.0 / len(frame.parts), "zero": 0.0}[start])


@method(
    "wudi",
    title="WUDI-Merging",
    url="https://arxiv.org/abs/2503.08099",
    variant="closed form of the authors' objective",
    low_rank=True,
)
def wudi(stacks: Sequence[Stack], *, lam: float = 1.0) -> Iterator[tuple[str, Delta]]:
    """Minimise the interference with every adapter's row space, in closed form.

    ``M = lam * E C^+``: the minimum of L that lies in the row space of the deltas, which is where
    the authors' descent from ``sum_i delta_i`` stays.

    Source: arXiv 2503.08099, the objective as in the authors' code. Where we differ: they run 300
    steps of Adam at 1e-5, which moves no entry by more than about 3e-3 whatever the deltas' size
    and leaves a result of full rank; this is the point they descend to. Nothing bounds its norm
    in directions that are weak in all adapters.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.

    Raises:
        ConfigError: `lam` is not a finite number.
    """
    lam = number("lam", lam)
    for stack in stacks:
        frame = frame_of(stack)
        problem = _problem(frame, frame.parts, frame.norms)
        core = problem.filtered(_start(frame, "zero"), torch.ones_like(problem.mu))
        yield stack.module, frame.lift(lam * core)


@method(
    "optmerge",
    title="OptMerge",
    url="https://arxiv.org/abs/2505.19892",
    variant="authors' SGD form, its iterate computed exactly",
    low_rank=True,
)
def optmerge(
    stacks: Sequence[Stack],
    *,
    lam: float = 1.0,
    steps: int = 300,
    lr: float = 1e-4,
    momentum: float = 0.9,
) -> Iterator[tuple[str, Delta]]:
    """Take a few hundred steps of gradient descent on WUDI's objective, from the mean.

    Each delta in L is cut to its min(out, in) // T leading singular values (no change for the usual
    LoRA ranks). In the eigenvectors of C the descent falls apart into one scalar recurrence per
    eigenvalue, ``velocity = momentum * velocity + 2 mu e``, ``e -= lr * velocity`` from e = 1, and
    ``f = 1 - e``: the exact iterate of SGD with momentum, not an approximation by a continuous
    flow, at the cost of `steps` operations on R numbers.

    Source: arXiv 2505.19892, the LoRA (SGD) form of the authors' code. It is an early stopped
    method: at the default steps and rate even the largest eigenvalue possible, T, covers only
    1 - exp(-0.6 T) of the way, and usual ones far less, so it stays near the mean. Where we
    differ: T in the rank cut counts the adapters whose delta is not zero.

    Args:
        stacks: all modules.
        lam: factor on the merged delta.
        steps: number of steps, at least 0; 0 is the mean.
        lr: step size, at least 0.
        momentum: in [0, 1].

    Raises:
        ConfigError: an option is out of range, or the descent diverges.
    """
    lam, steps, lr = number("lam", lam), whole("steps", steps), number("lr", lr, least=0.0)
    momentum = fraction("momentum", momentum)
    for stack in stacks:
        frame = frame_of(stack)
        limit = max(1, min(stack.shape) // max(1, len(frame.present)))
        problem = _problem(
            frame, [_cut(frame, i, limit) for i in range(len(stack.names))], frame.norms
        )
        covered = 1.0 - _momentum_residual(problem.mu, steps, lr, momentum)
        yield stack.module, frame.lift(lam * problem.filtered(_start(frame, "mean"), covered))


def _cut(frame: Frame, i: int, limit: int) -> tuple[Tensor, Tensor]:
    b, a = frame.parts[i]
    if a.shape[0] <= limit:
        return b, a
    found = frame.spectrum(i).top(limit)
    return found.u * found.s, found.v


def _momentum_residual(mu: Tensor, steps: int, lr: float, momentum: float) -> Tensor:
    """Return the share of the initial error left after SGD with momentum, per eigenvalue."""
    # Heavy ball on a quadratic of curvature 2 mu converges for lr * 2 mu < 2 (1 + momentum).
    if mu.numel() and lr * float(mu[0]) >= 1.0 + momentum:
        raise ConfigError(
            f"optmerge diverges with {lr=}: the largest eigenvalue is {float(mu[0]):.3g}, so lr "
            f"must be below {(1.0 + momentum) / float(mu[0]):.3g}."
        )
    error, velocity = torch.ones_like(mu), torch.zeros_like(mu)
    for _ in range(steps):
        velocity = momentum * velocity + 2.0 * mu * error
        error = error - lr * velocity
    return error


@method(
    "swudi",
    title="SWUDI",
    url="https://github.com/WalkerWorldPeace/MLLMerging",
    variant="authors, ratio counted over the rank of C",
    low_rank=True,
)
def swudi(
    stacks: Sequence[Stack],
    *,
    lam: float = 1.0,
    time: float | None = 300.0,
    ratio: float = 0.65,
    start: Start = "sum",
) -> Iterator[tuple[str, Delta]]:
    """Move the leading eigen-directions to WUDI's minimum and leave the others at the start.

    ``f(mu) = 1 - exp(-time * mu)`` on the ``ceil(ratio * rank(C))`` largest eigenvalues, 0 on the
    rest. At ``time = 2 * lr * steps / (1 - momentum)`` and ratio 1 this is the continuous limit of
    OptMerge's descent.

    Source: `swudi_aswudi.py` of the OptMerge repository, defaults as there. Where we differ: the
    ratio counts the non-zero eigenvalues of C, not all `in` of them; those at rounding level are
    dropped rather than raised to 1e-8.

    Args:
        stacks: all modules.
        lam: factor on the merged delta; about 1 / T suits the start "sum", 1 suits "mean".
        time: how far the kept directions move, from 0; None for all the way.
        ratio: share of the eigen-directions that move, in [0, 1].
        start: where they move from: the "sum" or "mean" of the deltas, or "zero".

    Raises:
        ConfigError: an option is out of range.
    """
    lam, ratio = number("lam", lam), fraction("ratio", ratio)
    time = math.inf if time is None else number("time", time, least=0.0)
    for stack in stacks:
        frame = frame_of(stack)
        problem = _problem(frame, frame.parts, frame.norms)
        f = -torch.expm1(-time * problem.mu)
        f[math.ceil(ratio * f.shape[0]) :] = 0.0
        yield stack.module, frame.lift(lam * problem.filtered(_start(frame, start), f))


@method(
    "aswudi",
    title="ASWUDI",
    url="https://github.com/WalkerWorldPeace/MLLMerging",
    variant="authors, participation ratio of sqrt(mu)",
    low_rank=True,
)
def aswudi(
    stacks: Sequence[Stack], *, lam: float = 1.0, start: Start = "sum"
) -> Iterator[tuple[str, Delta]]:
    """Like SWUDI, with the number of moved directions read off the spectrum of each module.

    f = 1 on the K largest eigenvalues, ``K = ceil((sum y)^2 / sum y^2)`` with y = sqrt(mu).

    Source: `swudi_aswudi.py` of the OptMerge repository, its default rule. Where we differ: only
    non-zero eigenvalues are counted (theirs are raised to 1e-8, and `in` - R of those add to y).

    Args:
        stacks: all modules.
        lam: factor on the merged delta; about 1 / T suits the start "sum", 1 suits "mean".
        start: where the directions move from: the "sum" or "mean" of the deltas, or "zero".

    Raises:
        ConfigError: an option is out of range.
    """
    lam = number("lam", lam)
    for stack in stacks:
        frame = frame_of(stack)
        problem = _problem(frame, frame.parts, frame.norms)
        f = torch.ones_like(problem.mu)
        if f.numel():
            y = problem.mu.sqrt()
            f[math.ceil(float(y.sum().square() / y.square().sum())) :] = 0.0
        yield stack.module, frame.lift(lam * problem.filtered(_start(frame, start), f))
