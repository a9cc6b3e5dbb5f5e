"""The one kernel of the methods that work entry by entry: prune, vote, merge, block by block.

Three choices make a method: which entries of each adapter stay (a `Sparsify` from `pruners`), how a
sign is elected per entry, if at all (`Vote`), and how the entries that have it are merged. One
module's result is the only dense delta that is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..combine import new_dense
from .stack import Dense, Result, StackLike

__all__ = [
    "Blocks",
    "Sparsify",
    "Step",
    "Vote",
    "add_up",
    "elect",
    "everything",
    "merged",
    "streamed",
    "weigh",
]

Blocks = tuple[Tensor, ...]
# Takes the blocks of one module one after the other, and gives what stays of each adapter.
Step = Callable[[Blocks], Blocks]
# Starts a pass over one module; a second pass gives the same again.
Sparsify = Callable[[StackLike], Step]


def everything(_stack: StackLike) -> Step:
    """Keep every entry of every adapter: the neutral `Sparsify`."""
    return lambda blocks: blocks


@dataclass(frozen=True, slots=True)
class Vote:
    """How a sign is elected per entry and how the entries that have it are merged.

    Attributes:
        weighted: vote with the weighted entries; else with the bare ones.
        by: "total" adds the entries up, "frequency" their signs.
        tie: the sign where that sum is 0: "positive", or the "majority" of all entries.
        merge: "count" divides the sum by the number that agree, "weight" by the sum of their
            weights, "sum" by nothing; "max" takes the entry of largest magnitude.
    """

    weighted: bool = True
    by: Literal["total", "frequency"] = "total"
    tie: Literal["positive", "majority"] = "positive"
    merge: Literal["count", "weight", "sum", "max"] = "count"


def merged(
    stacks: Sequence[StackLike], sparsify: Sparsify, vote: Vote | None, lam: float
) -> Result:
    """Give the merged delta of every module, one at a time.

    Args:
        stacks: the modules.
        sparsify: which entries stay.
        vote: how signs are elected and entries merged; None adds them up.
        lam: factor on the result.
    """
    tie = _majority(stacks, sparsify, vote) if vote and vote.tie == "majority" else 1.0
    for stack in stacks:
        yield stack.module, streamed(stack, _merging(stack, sparsify(stack), vote, tie, lam))


def _merging(
    stack: StackLike, step: Step, vote: Vote | None, tie: float, lam: float
) -> Callable[[Blocks], Tensor]:
    return lambda blocks: _combine(step(blocks), stack.weights, vote, tie).mul_(lam)


def streamed(stack: StackLike, merge: Callable[[Blocks], Tensor]) -> Dense:
    """Return the delta whose rows `merge` makes from the blocks of one module."""
    whole_delta: Tensor | None = None
    for rows, blocks in stack.blocks():
        merged = merge(blocks)
        if whole_delta is None:
            whole_delta = new_dense(stack.shape, stack.dtype, merged.device)
        whole_delta[rows] = merged
    return Dense(new_dense(stack.shape, stack.dtype, None) if whole_delta is None else whole_delta)


def weigh(blocks: Blocks, weights: Sequence[float]) -> Blocks:
    """Return every adapter's block times its weight."""
    pairs = zip(blocks, weights, strict=True)
    return tuple(x if w == 1.0 else x * w for x, w in pairs)


def add_up(blocks: Sequence[Tensor]) -> Tensor:
    """Return the sum as a fresh tensor."""
    total = blocks[0].clone()
    for x in blocks[1:]:
        total += x
    return total


def _combine(blocks: Blocks, weights: Sequence[float], vote: Vote | None, tie: float) -> Tensor:
    weighted = weigh(blocks, weights)
    if vote is None:
        return add_up(weighted)
    voters = weighted if vote.weighted else blocks
    sign = elect(voters, vote, tie)
    merged = torch.zeros_like(sign)
    share = torch.zeros_like(sign)
    for x, voter, w in zip(weighted, voters, weights, strict=True):
        agrees = (voter.sign() == sign) & (voter != 0)
        if vote.merge == "max":
            merged = torch.where(agrees & (x.abs() > merged.abs()), x, merged)
            continue
        merged += x * agrees
        share.add_(agrees, alpha=w if vote.merge == "weight" else 1.0)
    if vote.merge == "count":
        return merged / share.clamp(min=1.0)
    if vote.merge == "weight":
        return merged / torch.where(share.abs() < 1e-8, torch.ones_like(share), share)
    return merged


def elect(voters: Blocks, vote: Vote, tie: float) -> Tensor:
    """Return the elected sign of every entry: 1, -1, or `tie` where the vote is even."""
    total = add_up(voters if vote.by == "total" else [x.sign() for x in voters])
    return torch.where(total == 0, torch.full_like(total, tie), total.sign())


def _majority(stacks: Sequence[StackLike], sparsify: Sparsify, vote: Vote) -> float:
    """Return the sign that most entries of the whole model elect: -1, 0 or 1."""
    ahead = 0.0
    for stack in stacks:
        step = sparsify(stack)
        for _, blocks in stack.blocks():
            kept = step(blocks)
            voters = weigh(kept, stack.weights) if vote.weighted else kept
            ahead += float(elect(voters, vote, 0.0).sum(dtype=torch.float64))
    return math.copysign(1.0, ahead) if ahead else 0.0
