"""Deltas come in a method's order and are asked for in a checkpoint's: they wait on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO

import torch
from torch import Tensor

from .checkpoint import Blocks
from .methods.stack import Delta, Factored

__all__ = ["waiting"]


def waiting(run_again: Callable[[], Iterator[tuple[str, Delta]]], spool: IO[bytes]) -> Blocks:
    """Return what gives one module's delta at any time; the method runs when first asked.

    Args:
        run_again: yields (module, delta), in the method's own order.
        spool: a file to keep dense deltas in; products of thin factors stay in memory.
    """
    held: dict[str, Factored | tuple[int, torch.Size, torch.dtype]] = {}

    def fetch() -> None:
        for module, delta in run_again():
            if isinstance(delta, Factored):
                held[module] = delta
                continue
            value = delta.dense().contiguous().cpu()
            held[module] = (spool.tell(), value.shape, value.dtype)
            spool.write(value.flatten().view(torch.uint8).numpy().data)

    def blocks(module: str) -> Iterator[tuple[slice, Tensor]]:
        if not held:
            fetch()
        found = held[module]
        if isinstance(found, Factored):
            yield slice(None), found.dense()
            return
        at, shape, dtype = found
        spool.seek(at)
        raw = bytearray(spool.read(shape.numel() * dtype.itemsize))
        yield slice(None), torch.frombuffer(raw, dtype=dtype).view(shape)

    return blocks
