"""The exact k-th largest magnitude of a whole adapter, without holding or sorting its entries.

Non-negative floating point numbers order like their bit patterns, so the k-th largest magnitude is
found digit by digit, 16 bits at a time: one pass over the blocks counts the leading digit, each
further pass counts the next digit of the entries that share the digits found so far. float32 takes
two passes, float64 four, whatever the number of entries; memory is one block and the counters.
All densities asked for together share the passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import LoraFactors

__all__ = ["kept_count", "prune_", "thresholds"]

_DIGIT = 16
_RADIX = 1 << _DIGIT


def kept_count(density: float, numel: int) -> int:
    """Return ceil(density * numel) of the exact decimal product, so 0.3 of 10 entries is 3."""
    return math.ceil(Fraction(repr(float(density))) * numel)


def prune_(delta: Tensor, cut: float) -> Tensor:
    """Zero the entries of `delta` with magnitude below `cut`; return it or a new tensor.

    Args:
        delta: any shape; may be changed.
        cut: entries with ``|delta| >= cut`` stay; 0 keeps all, infinity none.
    """
    if cut <= 0.0:
        return delta
    if math.isinf(cut):
        return delta.zero_()
    # hardshrink keeps |x| > bound in one fused pass; the bound is the float just below the cut.
    bound = torch.tensor(cut, dtype=delta.dtype)
    return F.hardshrink(delta, float(torch.nextafter(bound, bound.new_zeros(()))))


def thresholds(
    parts: Sequence[tuple[LoraFactors, float]], densities: Iterable[float]
) -> dict[float, float]:
    """Return, per density, the magnitude that the kept share of all entries has or exceeds.

    Source: DESIGN 1.1: tau = the ceil(p * N)-th largest |entry| over all modules; exact, ties
    included (all entries equal to tau are kept).

    Args:
        parts: the modules to count over, each with a cut below which its entries count as 0.
        densities: kept shares p in [0, 1].

    Returns:
        density -> tau; p = 0 gives infinity, p = 1 gives 0. Neither costs a pass.
    """
    numel = sum(f.numel for f, _ in parts)
    found: dict[float, float] = {}
    wanted: dict[float, int] = {}
    for density in densities:
        count = kept_count(density, numel)
        if count == 0:
            found[density] = math.inf
        elif density == 1.0:
            found[density] = 0.0
        else:
            wanted[density] = count
    if wanted:
        ranked = _kth_largest(parts, sorted(set(wanted.values())))
        found.update({density: ranked[count] for density, count in wanted.items()})
    return found


def _kth_largest(
    parts: Sequence[tuple[LoraFactors, float]], counts: Sequence[int]
) -> dict[int, float]:
    dtype = torch.promote_types(torch.float32, max((f.dtype for f, _ in parts), key=_width))
    digits = _width(dtype) // _DIGIT
    # prefix[count]: the digits found so far; left[count]: rank within the entries sharing them.
    prefix = dict.fromkeys(counts, 0)
    left = dict(zip(counts, counts, strict=True))
    for level in range(digits):
        shift = _DIGIT * (digits - 1 - level)
        prefixes = sorted(set(prefix.values()))
        table = _count_digits(parts, dtype, shift, prefixes if level else None)
        for count in counts:
            row = table[prefixes.index(prefix[count])]
            above = row.flip(0).cumsum(0)  # above[i]: entries whose digit is >= RADIX - 1 - i
            i = int(torch.searchsorted(above, left[count]))
            left[count] -= int(above[i - 1]) if i else 0
            prefix[count] = (prefix[count] << _DIGIT) | (_RADIX - 1 - i)
    bits = torch.tensor([prefix[count] for count in counts], dtype=_bits_of(dtype))
    return dict(zip(counts, bits.view(dtype).tolist(), strict=True))


def _count_digits(
    parts: Sequence[tuple[LoraFactors, float]],
    dtype: torch.dtype,
    shift: int,
    prefixes: Sequence[int] | None,
) -> Tensor:
    """Count, per prefix, the digit at `shift` of every entry: (len(prefixes), RADIX) int64."""
    rows = 1 if prefixes is None else len(prefixes)
    table = torch.zeros(rows * _RADIX, dtype=torch.int64)
    for bits in _magnitude_bits(parts, dtype):
        if prefixes is None:
            digit = bits >> shift
        else:
            high = bits >> (shift + _DIGIT)
            found = [bits[high == known] for known in prefixes]
            low = [((b >> shift) & (_RADIX - 1)) + i * _RADIX for i, b in enumerate(found)]
            digit = torch.cat(low)
        table += torch.bincount(digit, minlength=rows * _RADIX).cpu()
    return table.view(rows, _RADIX)


def _magnitude_bits(
    parts: Sequence[tuple[LoraFactors, float]], dtype: torch.dtype
) -> Iterator[Tensor]:
    for factors, cut in parts:
        for _, block in factors.blocks():
            kept = prune_(block, cut).to(dtype).abs_()
            yield kept.view(_bits_of(dtype)).flatten()


def _width(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _bits_of(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32
