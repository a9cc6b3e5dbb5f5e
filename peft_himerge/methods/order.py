"""Exact order statistics of several streams of numbers at once, without holding or sorting them.

The way of `select`, for any sign and for all adapters in the same passes: floats are mapped to
whole numbers that sort alike, and the wanted ones are found 16 bits at a time from the counts of
each leading digit. float32 takes two passes over the stream, float64 four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Passes", "largest"]

_DIGIT = 16
_RADIX = 1 << _DIGIT

# Called once per pass; gives, block by block, one tensor per stream (None: nothing of it here).
Passes = Callable[[], Iterable[Sequence[Tensor | None]]]


def largest(
    passes: Passes, wanted: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[dict[int, float]]:
    """Return, per stream, the k-th largest value for every wanted k (1 = the largest).

    Args:
        passes: gives the same values in every pass.
        wanted: per stream, ranks between 1 and the number of its values.
        dtype: float32 or float64, what the values are compared in.
    """
    bits = torch.finfo(dtype).bits
    found = [dict.fromkeys(ks, 0) for ks in wanted]  # digits so far
    left = [dict(zip(ks, ks, strict=True)) for ks in wanted]  # rank among those that share them
    for level in range(bits // _DIGIT if any(wanted) else 0):
        shift = bits - _DIGIT * (level + 1)
        prefixes = [sorted(set(row.values())) for row in found]
        tables = _count(passes, prefixes, dtype, shift, first=level == 0)
        for stream, table in enumerate(tables):
            for k in wanted[stream]:
                row = table[prefixes[stream].index(found[stream][k])]
                above = row.flip(0).cumsum(0)  # above[i]: values whose digit is >= RADIX - 1 - i
                i = int(torch.searchsorted(above, left[stream][k]))
                left[stream][k] -= int(above[i - 1]) if i else 0
                found[stream][k] = (found[stream][k] << _DIGIT) | (_RADIX - 1 - i)
    return [{k: _value(digits, dtype) for k, digits in row.items()} for row in found]


def _count(
    passes: Passes,
    prefixes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    shift: int,
    *,
    first: bool,
) -> list[Tensor]:
    tables: list[dict[torch.device, Tensor]] = [{} for _ in prefixes]
    for block in passes():
        for table, known, values in zip(tables, prefixes, block, strict=True):
            if values is None or not known:
                continue
            keys = _keys(values.to(dtype).flatten())
            host = keys.device.type == "cpu"
            if first:
                found = _tally([(keys >> shift) + (_RADIX >> 1)], [None], host=host)
            else:
                high = (keys >> (shift + _DIGIT)) + _offset(dtype, shift + _DIGIT)
                low = (keys >> shift) & (_RADIX - 1)
                found = _tally([low] * len(known), [high == p for p in known], host=host)
            # Summed where the values are: a table that goes to the host waits for the device.
            old = table.get(keys.device)
            table[keys.device] = found if old is None else old + found
    empty = torch.zeros(_RADIX, dtype=torch.int64)
    parts = [[part.cpu() for part in table.values()] or [empty] for table in tables]
    return [torch.stack(found).sum(0).view(-1, _RADIX) for found in parts]


def _tally(digits: Sequence[Tensor], masks: Sequence[Tensor | None], *, host: bool) -> Tensor:
    """Return how often each digit is where its mask is set (None: anywhere), (masks * RADIX,).

    Args:
        digits: 0 to RADIX - 1, flat.
        masks: one per tensor of digits.
        host: count in the way that is fastest on the CPU.
    """
    size = len(digits) * _RADIX
    if host:
        some = [
            (d if mask is None else d[mask]) + i * _RADIX
            for i, (d, mask) in enumerate(zip(digits, masks, strict=True))
        ]
        return torch.bincount(torch.cat(some), minlength=size)
    # bincount and indexing by a mask make the host wait, block after block.
    table = torch.zeros(size, dtype=torch.int64, device=digits[0].device)
    for i, (d, mask) in enumerate(zip(digits, masks, strict=True)):
        hits = torch.ones_like(d, dtype=torch.int64) if mask is None else mask.long()
        table.scatter_add_(0, d.long() + i * _RADIX, hits)
    return table


def _offset(dtype: torch.dtype, shift: int) -> int:
    """Return what makes the leading digits of a signed key count from 0."""
    return 1 << (torch.finfo(dtype).bits - 1 - shift)


def _keys(values: Tensor) -> Tensor:
    """Return whole numbers in the order of the values; -0 and 0 are the same."""
    wide = torch.int64 if values.dtype == torch.float64 else torch.int32
    raw = (values + 0.0).view(wide)
    top = torch.iinfo(wide).max
    return torch.where(raw < 0, raw ^ top, raw)


def _value(digits: int, dtype: torch.dtype) -> float:
    bits = torch.finfo(dtype).bits
    wide = torch.int64 if dtype == torch.float64 else torch.int32
    key = digits - (1 << (bits - 1))
    raw = key ^ torch.iinfo(wide).max if key < 0 else key
    return float(torch.tensor(raw, dtype=wide).view(dtype))
