"""One module's deltas of all adapters side by side: what every merging method reads.

A method is a plain function, a generator over modules:

    def ties(stacks: Sequence[StackLike], *, density: float = 0.2) -> Iterator[tuple[str, Delta]]

It may make passes of its own over all stacks first (a model-wide threshold), then gives one
`Delta` per module: `Factored` where the result is a product of thin factors, else `Dense`, of
which only one exists at a time. Methods that work entry by entry read nothing but `StackLike`, so
they also run on the small representations of `spaces`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import AdapterError
from ..factors import LoraFactors, working_dtype

__all__ = ["Delta", "Dense", "Factored", "Result", "Stack", "StackLike", "named_generator"]

_ROWS = 256  # rows of a dense delta that are copied at a time


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """One module's merged delta as an exact product ``b @ a``.

    Attributes:
        b: (out, rank).
        a: (rank, in).
    """

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """Return the (out, in) product."""
        return self.b @ self.a

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, fresh tensor of those rows of the product), block by block."""
        yield from LoraFactors(a=self.a, b=self.b, scaling=1.0).blocks()


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """One module's merged delta, whole.

    Attributes:
        delta: (out, in).
    """

    delta: Tensor

    def dense(self) -> Tensor:
        """Return the delta."""
        return self.delta

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, a copy of those rows), block by block."""
        for start in range(0, self.delta.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, self.delta.shape[0]))
            yield rows, self.delta[rows].clone()


Delta = Factored | Dense
# What a method gives: (module, its merged delta), in the order of the stacks.
Result = Iterator[tuple[str, Delta]]


def named_generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a digest of `key`.

    The same key gives the same numbers in every process, on every device and in any order of
    modules.
    """
    text = "|".join(str(part) for part in key)
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(state & (2**63 - 1))


class StackLike(Protocol):
    """What a method that works entry by entry may read; `Stack` and the small spaces offer it."""

    @property
    def module(self) -> str:
        """Module path in the base model."""

    @property
    def layer(self) -> str:
        """Label of the layer that the module belongs to (`layers.layer_of`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Adapter names, sorted; the same tuple in every stack of a merge."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The user's weight per adapter."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (rows, columns) of every delta."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the deltas are computed in."""

    def blocks(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Yield (rows, every adapter's delta of those rows); each tensor is fresh."""

    def generator(self, adapter: str) -> torch.Generator:
        """Return a fresh generator for this module and `adapter`."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """One module of all adapters.

    Attributes:
        module: module path in the base model.
        layer: label of its layer (`layers.layer_of`).
        names: adapter names, sorted; the same tuple in every stack of a merge.
        factors: each adapter's factors; None where it has no such module, i.e. its delta is 0. At
            least one is there.
        weights: the user's weight per adapter, 1.0 by default.
        base: gives the (out, in) base weight when called; None if it cannot be read (quantised).
        seed: the user's seed.
    """

    module: str
    layer: str
    names: tuple[str, ...]
    factors: tuple[LoraFactors | None, ...]
    weights: tuple[float, ...]
    base: Callable[[], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shapes = {n: f.shape for n, f in zip(self.names, self.factors, strict=True) if f}
        if len(set(shapes.values())) > 1:
            raise AdapterError(
                f"module {self.module!r}: the adapters' deltas differ in shape, (out, in): "
                f"{shapes}. They were trained on different base models."
            )

    @property
    def present(self) -> tuple[int, ...]:
        """Indices of the adapters that have this module."""
        return tuple(i for i, f in enumerate(self.factors) if f is not None)

    @property
    def _first(self) -> LoraFactors:
        return next(f for f in self.factors if f is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the delta."""
        return self._first.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the module is computed in: the widest any of its adapters needs."""
        return working_dtype(*(f.dtype for f in self.factors if f is not None))

    @property
    def device(self) -> torch.device:
        """Where the first adapter's factors are; everything is computed there."""
        return self._first.b.device

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each adapter here; 0 where it has no such module."""
        return tuple(0 if f is None else f.rank for f in self.factors)

    def scaled(self, i: int) -> tuple[Tensor, Tensor]:
        """Return (b, a) of adapter `i` with the scaling folded into b; rank 0 if it is missing."""
        found = self.factors[i]
        if found is None:
            rows, columns = self.shape
            empty = torch.empty(0, dtype=self.dtype, device=self.device)
            return empty.reshape(rows, 0), empty.reshape(0, columns)
        b, a = found.scaled()
        return b.to(self.device, self.dtype), a.to(self.device, self.dtype)

    def blocks(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Yield (rows, every adapter's delta of those rows); zeros where a module is missing."""
        pairs = [self.scaled(i) for i in range(len(self.names))]
        rows, step = self.shape[0], self._first.rows_per_block
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, tuple(b[part] @ a for b, a in pairs)

    def generator(self, adapter: str) -> torch.Generator:
        """Return a fresh CPU generator for this module and `adapter`."""
        return named_generator(self.seed, self.module, adapter)
