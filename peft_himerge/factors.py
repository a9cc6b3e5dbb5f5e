"""One module's low-rank update, and the only line that multiplies by LoRA's scaling.

    delta = scaling * B @ A          delta (out, in) = scaling * (out, rank) @ (rank, in)

A delta is never stored. It is produced in blocks of whole rows, always cut at the same places, so
that selecting a threshold, folding and exporting all see the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Adapter", "Kind", "LoraFactors", "as_matrix", "full_precision", "working_dtype"]

Kind = Literal["linear", "conv1d", "embedding", "conv"]

# Entries of one block: 1 MB of float32, small enough to stay in a core's cache while it is
# thresholded, large enough for the matrix product to run at full speed.
_BLOCK = 1 << 18
# An accelerator is busy for longer with a block than the host is with the calls for it.
_DEVICE_BLOCK = 1 << 22


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that deltas are computed in: float32, or float64 if any input is wider."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as float32 inside, though the user lets the model use TF32.

    TF32, which GPUs alone have, keeps three digits of each factor: a delta of true size, but none
    whose entries can be told from each other near a threshold.
    """
    backends: Any = torch.backends
    owner, newer = backends.cuda.matmul, hasattr(backends, "fp32_precision")  # torch >= 2.9
    setting, full = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(owner, setting) if device.type == "cuda" else full
    if before in (full, "none"):
        yield
        return
    inherited = newer and backends.fp32_precision == before
    setattr(owner, setting, full)
    try:
        yield
    finally:
        setattr(owner, setting, "none" if inherited else before)


def as_matrix(weight: Tensor, kind: Kind) -> Tensor:
    """Return a stored weight as the (out, in) matrix that deltas are added to.

    A view where `weight` is contiguous, so that writing to the result writes to the weight.
    """
    if kind in ("conv1d", "embedding"):
        return weight.t()
    return weight.flatten(1) if kind == "conv" else weight


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One module's update as factors: views of live parameters or of a memory-mapped file.

    Attributes:
        a: (rank, in). Convolutions and embeddings are flattened to this form by their reader.
        b: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA; not yet applied to `a` or `b`.
        kind: how the module stores its weight: "linear" (out, in), "conv1d" (GPT-2) and
            "embedding" (in, out), "conv" (out, in / prod(kernel), *kernel).
        kernel: kernel sizes of a convolution; () otherwise.
    """

    a: Tensor
    b: Tensor
    scaling: float
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the delta."""
        return (self.b.shape[0], self.a.shape[1])

    @property
    def numel(self) -> int:
        """Number of entries of the delta."""
        return self.b.shape[0] * self.a.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype deltas of this module are computed in."""
        return working_dtype(self.a.dtype, self.b.dtype)

    @property
    def bound(self) -> float:
        """No entry of the delta is larger in magnitude, nor is any sum on the way to it."""
        most = abs(self.scaling) * self.rank
        for factor in (self.a, self.b):
            most *= float(torch.linalg.vector_norm(factor.detach(), math.inf))
        return most

    @property
    def rows_per_block(self) -> int:
        """Number of rows of one block; depends on the shape and the kind of device alone."""
        entries = _DEVICE_BLOCK if self.b.is_cuda else _BLOCK
        return max(1, entries // max(1, self.shape[1]))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return (scaling * b, a) in the working dtype; their product is the delta."""
        return self.b.detach().to(self.dtype) * self.scaling, self.a.detach().to(self.dtype)

    @property
    def block_count(self) -> int:
        """Number of blocks that `blocks` yields."""
        return -(-self.shape[0] // self.rows_per_block)

    def blocks(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, delta[rows]) until every row was given; each block is a fresh tensor.

        Args:
            first: number of the first block.
            stop: number of the first block not to yield; None is all of them. The bits of a block
                do not depend on which others are asked for.
        """
        step = self.rows_per_block
        b, a = self.scaled()
        for start in range(first * step, b.shape[0] if stop is None else stop * step, step):
            rows = slice(start, min(start + step, b.shape[0]))
            with full_precision(b.device):
                block = b[rows] @ a
            yield rows, block


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, read-only.

    Attributes:
        name: the adapter's name in the model or on the command line.
        factors: module path in the base model -> its factors, sorted by path.
        base: `base_model_name_or_path` of its config, if known.
        settings: what the merged adapter's config inherits (task type, ...).
        focused: it is merged in place of the model's adapter of that name (`focus`).
    """

    name: str
    factors: Mapping[str, LoraFactors]
    base: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    focused: bool = False

    @property
    def numel(self) -> int:
        """Number of entries of the whole delta vector."""
        return sum(f.numel for f in self.factors.values())

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(f.rank for f in self.factors.values())

    @property
    def is_zero(self) -> bool:
        """True if no module's delta can differ from zero."""
        return not any(
            bool(torch.count_nonzero(f.a)) and bool(torch.count_nonzero(f.b))
            for f in self.factors.values()
        )

    def version(self) -> int:
        """Return a number that changes when a live factor is written to in place."""
        return sum(f.a._version + f.b._version for f in self.factors.values())

    def digest(self) -> str:
        """Return a digest of names, shapes, dtypes, scalings and the bytes of all factors."""
        state = hashlib.sha256()
        for module, f in self.factors.items():
            for label, tensor in (("a", f.a), ("b", f.b)):
                head = f"{module}|{label}|{tuple(tensor.shape)}|{tensor.dtype}|{f.scaling!r}|"
                state.update(head.encode())
                raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                state.update(raw.tobytes())
        return state.hexdigest()
