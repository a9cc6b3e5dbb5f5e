"""SCE, Consensus and PCB: methods that judge each entry by what all adapters have there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..factors import working_dtype
from ..select import kept_count
from .check import fraction, number, whole
from .kernel import Blocks, Vote, add_up, elect, everything, streamed, weigh
from .order import Passes, largest
from .pruners import Density, entries_of, exactly, groups, magnitudes, numel, present
from .registry import method
from .stack import Result, StackLike

__all__ = ["consensus", "pcb", "sce"]


@method(
    "sce", title="SCE", url="https://arxiv.org/abs/2408.07990", variant="mergekit", elementwise=True
)
def sce(stacks: Sequence[StackLike], *, select_topk: float = 1.0, lam: float = 1.0) -> Result:
    """Select entries the adapters differ in, weigh adapters by energy, erase minority signs.

    Per module: keep the ``floor(select_topk * nonzero)`` entries of largest variance over the
    adapters; w_i = mean square of what adapter i has left, normalised; the sign of the sum wins, 0
    to +; ``M = lam * sum_i w_i E_i D_i / max(sum_i w_i E_i, 1e-6)`` with E_i = 1 where adapter i
    agrees. Source: arXiv 2408.07990, section 3.3, as mergekit describes it.

    Args:
        stacks: the modules.
        select_topk: share of the entries with non-zero variance that is kept; 1 keeps every entry.
        lam: factor on the result.
    """
    lam, select_topk = number("lam", lam), fraction("select_topk", select_topk)
    for stack in stacks:
        cut = 0.0 if select_topk == 1.0 else _variance_cut(stack, select_topk)
        energy = torch.zeros(len(stack.names), dtype=torch.float64)
        for _, blocks in stack.blocks():
            kept = _selected(weigh(blocks, stack.weights), cut)
            energy += torch.stack([x.square().sum(dtype=torch.float64).cpu() for x in kept])
        mean = energy / numel(stack)
        total = float(mean.sum())
        even = torch.full_like(mean, 1.0 / len(mean))
        shares = (mean / total if total >= 1e-6 else even).tolist()
        yield stack.module, streamed(stack, _erasing(stack, cut, shares, lam))


def _erasing(
    stack: StackLike, cut: float, shares: Sequence[float], lam: float
) -> Callable[[Blocks], Tensor]:
    def merge(blocks: Blocks) -> Tensor:
        kept = _selected(weigh(blocks, stack.weights), cut)
        sign = elect(kept, Vote(), 1.0)
        merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
        for x, w in zip(kept, shares, strict=True):
            agrees = x.sign() == sign
            merged.add_(x * agrees, alpha=w)
            share.add_(agrees, alpha=w)
        return merged / share.clamp(min=1e-6) * lam

    return merge


def _variance(blocks: Blocks) -> Tensor:
    mean = add_up(blocks) / len(blocks)
    return add_up([(x - mean).square() for x in blocks]) / len(blocks)


def _selected(blocks: Blocks, cut: float) -> Blocks:
    if cut <= 0.0:
        return blocks
    keep = _variance(blocks) >= cut
    return tuple(x * keep for x in blocks)


def _variance_cut(stack: StackLike, select_topk: float) -> float:
    def variances() -> Iterator[list[Tensor | None]]:
        for _, blocks in stack.blocks():
            yield [_variance(weigh(blocks, stack.weights))]

    nonzero = sum(int(torch.count_nonzero(v)) for v, *_ in variances() if v is not None)
    count = math.floor(exactly(select_topk, nonzero))
    if count == 0:
        return math.inf
    return largest(variances, [[count]], stack.dtype)[0][count]


@method(
    "consensus",
    title="Consensus merging (TALL masks)",
    url="https://arxiv.org/abs/2405.07813",
    variant="authors",
    elementwise=True,
)
def consensus(
    stacks: Sequence[StackLike],
    *,
    threshold: Density = 0.2,
    agree: int = 2,
    lam: float = 1.0,
) -> Result:
    """Keep the entries of the sum that at least `agree` adapters want.

    Adapter i wants an entry if ``|D_i| > threshold_i * |S - D_i|`` with S the sum of all. Source:
    arXiv 2405.07813, equations 5 (mask) and 7 (consensus). The authors choose the threshold per
    task on validation data from 0.2 to 0.6; 0.2 is what MergeBench takes for language models.

    Args:
        stacks: the modules.
        threshold: how large an adapter's entry must be beside the others'; a number, or one per
            adapter.
        agree: how many adapters must want an entry; 0 keeps all (task arithmetic).
        lam: factor on the result.
    """
    lam, agree = number("lam", lam), whole("agree", agree)
    names = stacks[0].names
    if isinstance(threshold, Mapping):
        each = [number(f"threshold[{n!r}]", threshold.get(n), least=0.0) for n in names]
    else:
        each = [number("threshold", threshold, least=0.0)] * len(names)

    def merge(blocks: Blocks, weights: Sequence[float]) -> Tensor:
        weighted = weigh(blocks, weights)
        total = add_up(weighted)
        votes = torch.zeros_like(total, dtype=torch.int32)
        for x, limit in zip(weighted, each, strict=True):
            votes += x.abs() > limit * (total - x).abs()
        return total * (votes >= agree) * lam

    for stack in stacks:
        yield stack.module, streamed(stack, partial(merge, weights=stack.weights))


@method(
    "pcb",
    title="PCB-Merging",
    url="https://arxiv.org/abs/2410.02396",
    variant="authors",
    elementwise=True,
)
def pcb(
    stacks: Sequence[StackLike],
    *,
    density: float = 0.1,
    lam: float = 1.2,
    scope: str = "model",
    clamp: float = 1e-4,
) -> Result:
    """Weigh every entry by how large it is in its own adapter and how well it fits the others.

    With magnitudes clamped to the range between their `clamp` and 1 - `clamp` quantiles (C_i):
    ``score_i = exp(T * minmax(|C_i|)^2) * tanh(D_i * sum_j D_j)``; scores below the top `density`
    are raised to that level and scaled to [0, 1] (g_i); ``M = lam * sum_i w_i g_i C_i / sum_i
    g_i``. Source: arXiv 2410.02396, equations 1 to 5, and the authors' code; T is the number of
    adapters. Weights stand for their per-task factors. Where scores are all the same, g is 1 if
    they are positive, else 0.

    Args:
        stacks: the modules.
        density: share of entries with a score above the floor.
        lam: factor on the result.
        scope: over which entries ranges and quantiles go: "model", "layer" or "module".
        clamp: share of entries clamped at either end.
    """
    lam, density = number("lam", lam), fraction("density", density)
    number("clamp", clamp, least=0.0, most=0.5)
    for group in groups(stacks, scope):
        dtype = working_dtype(*(s.dtype for s in group))
        entries = entries_of(group)
        ends = [_clamp_places(n, clamp) for n in entries]
        at = largest(magnitudes(group, everything), [sorted(set(e)) for e in ends], dtype)
        ranges = [
            (row[e[1]], row[e[0]]) if e else (0.0, 0.0) for e, row in zip(ends, at, strict=True)
        ]
        floors = [_floor_place(n, density) for n in entries]
        wanted = [sorted({1, k}) if n else [] for n, k in zip(entries, floors, strict=True)]
        tops = largest(_score_passes(group, ranges), wanted, dtype)
        levels = [
            (row[k], row[1]) if row else (0.0, 0.0) for k, row in zip(floors, tops, strict=True)
        ]
        for stack in group:
            yield stack.module, streamed(stack, _competing(stack, ranges, levels, lam))


def _score_passes(group: Sequence[StackLike], ranges: Sequence[tuple[float, float]]) -> Passes:
    def blocks() -> Iterator[list[Tensor | None]]:
        for stack in group:
            here = present(stack)
            for _, pieces in stack.blocks():
                found = _pcb_scores(pieces, ranges)
                yield [p if i in here else None for i, p in enumerate(found)]

    return blocks


def _clamp_places(entries: int, clamp: float) -> list[int]:
    """Return the ranks (1 = largest) of the upper and the lower end of the clamped range."""
    if not entries:
        return []
    outside = math.floor(exactly(clamp, entries))
    high, low = outside + 1, entries - outside
    return [min(high, low), max(high, low)]


def _floor_place(entries: int, density: float) -> int:
    """Return the rank of the score below which scores count as equal."""
    return min(entries, kept_count(density, entries) + 1)


def _unit(x: Tensor, low: float, high: float) -> Tensor:
    """Return x scaled from [low, high] to [0, 1]; a range of one value gives its sign."""
    if high > low:
        return (x.clamp(low, high) - low) / (high - low)
    return torch.full_like(x, 1.0 if high > 0.0 else 0.0)


def _pcb_scores(blocks: Blocks, ranges: Sequence[tuple[float, float]]) -> list[Tensor]:
    total, count = add_up(blocks), len(blocks)
    return [
        torch.exp(count * _unit(x.abs(), low, high).square()) * torch.tanh(x * total)
        for x, (low, high) in zip(blocks, ranges, strict=True)
    ]


def _competing(
    stack: StackLike,
    ranges: Sequence[tuple[float, float]],
    levels: Sequence[tuple[float, float]],
    lam: float,
) -> Callable[[Blocks], Tensor]:
    here = present(stack)

    def merge(blocks: Blocks) -> Tensor:
        scores = _pcb_scores(blocks, ranges)
        merged, share = torch.zeros_like(blocks[0]), torch.zeros_like(blocks[0])
        for i, (x, score) in enumerate(zip(blocks, scores, strict=True)):
            if i not in here:
                continue
            gain = _unit(score, *levels[i])
            clamped = x.sign() * x.abs().clamp(*ranges[i])
            merged += stack.weights[i] * gain * clamped
            share += gain
        return merged / share.clamp(min=1e-12) * lam

    return merge
