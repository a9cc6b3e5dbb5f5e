"""Small seeded stacks of low-rank deltas for tests of merging methods, and their dense truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_himerge.factors import LoraFactors
from peft_himerge.layers import layer_of
from peft_himerge.methods.stack import Stack

MODULE = "model.layers.3.self_attn.q_proj"


def drawn(
    seed: int, out: int, width: int, rank: int, dtype: torch.dtype = torch.float64
) -> LoraFactors:
    """Return random factors whose scaling is not 1."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LoraFactors(a.to(dtype), b.to(dtype), scaling=0.5 + 0.25 * (seed % 4))


def stack_of(
    factors: Sequence[LoraFactors | None],
    *,
    module: str = MODULE,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
) -> Stack:
    """Return a stack of the given adapters, named a, b, c, ..."""
    return Stack(
        module=module,
        layer=layer_of(module),
        names=tuple("abcdefghijkl"[: len(factors)]),
        factors=tuple(factors),
        weights=tuple(weights or (1.0,) * len(factors)),
        base=None if base is None else lambda: base,
    )


def random_stack(
    ranks: Sequence[int | None],
    out: int = 24,
    width: int = 20,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    module: str = MODULE,
    weights: Sequence[float] | None = None,
) -> Stack:
    """Return a stack of random adapters of the given ranks (None: no such module), with a base."""
    generator = torch.Generator().manual_seed(1000 + seed)
    base = 3.0 * torch.randn(out, width, generator=generator, dtype=torch.float64)
    factors = [
        None if rank is None else drawn(10 * seed + i, out, width, rank, dtype)
        for i, rank in enumerate(ranks)
    ]
    return stack_of(factors, module=module, weights=weights, base=base)


def deltas(stack: Stack) -> list[Tensor]:
    """Return every adapter's dense float64 delta, times its weight; zeros where it is missing."""
    found = []
    for factors, weight in zip(stack.factors, stack.weights, strict=True):
        if factors is None:
            found.append(torch.zeros(stack.shape, dtype=torch.float64))
        else:
            found.append(weight * factors.scaling * (factors.b.double() @ factors.a.double()))
    return found
