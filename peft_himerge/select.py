"""The exact k-th largest magnitude of a whole adapter, without holding or sorting its entries.

Non-negative floating point numbers order like their bit patterns, so a threshold is a pattern, and
looking for it is narrowing a bracket of patterns. One pass over the blocks counts the entries above
the bracket and, in a table of fixed size, those inside it; if the table has a place per pattern the
threshold is read from it. A random sample of entries says where to put the first bracket, and that
is all it does: if the bracket missed, or was too wide for a place per pattern, the counts say where
the next one goes. So the answer is exact for any input; float32 takes one pass as a rule and three
at most, float64 five at most, whatever the number of entries. All densities share the passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AdapterError
from .factors import LoraFactors
from .threads import spread

__all__ = ["kept_count", "prune_", "thresholds"]

Counts: TypeAlias = npt.NDArray[np.int64]

_PLACES = 1 << 22  # of all brackets' tables together: 32 MB of int64 per worker
_FEWEST_PLACES = 1 << 16  # of one bracket; more are of no use while there are fewer entries
_BLOCKS_PER_TASK = 16  # 4 million entries: a few milliseconds of one core
_SAMPLE = 1 << 22  # the most entries looked at before the first pass
_SAMPLE_CHUNK = 1 << 16
_SAMPLE_SHARE = 512  # one entry in so many: looking costs a tenth of the pass
_SAMPLE_FROM = 1 << 18  # fewer entries than this are not worth a look
_SIGMAS = 6.0  # the first bracket misses once in 5e8 searches
_SLACK = 64  # patterns; a sampled entry is summed in another order than a block's
_SEED = 0x5E1EC7


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
    # hardshrink keeps |x| > bound in one fused pass; the bound is the largest float below the cut,
    # which need not be a float of this dtype itself.
    bound = torch.tensor(cut, dtype=delta.dtype)
    if float(bound) >= cut:
        bound = torch.nextafter(bound, bound.new_zeros(()))
    return F.hardshrink(delta, float(bound))


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


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Bit patterns lo <= pattern < hi, counted 2**shift patterns to a place.

    `most` is the largest number of places.
    """

    lo: int
    hi: int
    most: int

    @property
    def shift(self) -> int:
        return max(0, (self.hi - self.lo - 1).bit_length() - (self.most.bit_length() - 1))

    @property
    def places(self) -> int:
        return ((self.hi - self.lo - 1) >> self.shift) + 1


def _kth_largest(
    parts: Sequence[tuple[LoraFactors, float]], counts: Sequence[int]
) -> dict[int, float]:
    dtype = torch.float64 if any(f.dtype == torch.float64 for f, _ in parts) else torch.float32
    top = 1 << (torch.finfo(dtype).bits - 1)  # no magnitude has the sign bit set
    brackets = dict(zip(counts, _first_brackets(parts, counts, dtype, top), strict=True))
    found: dict[int, int] = {}
    while brackets:
        distinct = sorted(set(brackets.values()), key=lambda b: (b.lo, b.hi))
        tallies = dict(zip(distinct, _count(parts, distinct, dtype), strict=True))
        for count, bracket in list(brackets.items()):
            above, table = tallies[bracket]
            narrower = _narrow(bracket, count, above, table, top)
            if narrower.hi - narrower.lo == 1:
                found[count] = narrower.lo
                del brackets[count]
            else:
                brackets[count] = narrower
    bits = torch.tensor([found[count] for count in counts], dtype=_bits_of(dtype))
    return dict(zip(counts, bits.view(dtype).tolist(), strict=True))


def _narrow(bracket: _Bracket, count: int, above: int, table: Counts, top: int) -> _Bracket:
    """Return a bracket that is certain to hold the `count`-th largest pattern."""
    if above >= count:
        return replace(bracket, lo=bracket.hi, hi=top)
    from_top = np.cumsum(table[::-1])  # entries in the i + 1 highest places
    place = len(table) - 1 - int(np.searchsorted(from_top, count - above))
    if place < 0:
        if bracket.lo == 0:
            raise AdapterError(
                "an adapter's delta holds NaN: the product of its factors overflows. Check its "
                "weights and its scaling."
            )
        return replace(bracket, lo=0, hi=bracket.lo)
    lo = bracket.lo + (place << bracket.shift)
    return replace(bracket, lo=lo, hi=min(lo + (1 << bracket.shift), bracket.hi))


def _first_brackets(
    parts: Sequence[tuple[LoraFactors, float]], counts: Sequence[int], dtype: torch.dtype, top: int
) -> list[_Bracket]:
    """Return per count a bracket that holds its pattern, if the sample is not a very odd one."""
    numel = sum(f.numel for f, _ in parts)
    most = min(_PLACES // len(counts), max(_FEWEST_PLACES, numel))
    if numel < _SAMPLE_FROM:
        return [_Bracket(0, top, most)] * len(counts)
    drawn = _sample(parts, min(_SAMPLE, numel // _SAMPLE_SHARE), dtype)
    patterns = np.sort(drawn)[::-1]
    brackets = []
    for count in counts:
        share = count / numel
        margin = _SIGMAS * math.sqrt(len(patterns) * share * (1.0 - share)) + 2.0
        high = math.floor(share * len(patterns) - margin)
        low = math.ceil(share * len(patterns) + margin)
        hi = int(patterns[high]) + 1 + _SLACK if high >= 0 else top
        lo = int(patterns[low]) - _SLACK if low < len(patterns) else 0
        brackets.append(_Bracket(max(lo, 0), min(hi, top), most))
    return brackets


def _sample(
    parts: Sequence[tuple[LoraFactors, float]], size: int, dtype: torch.dtype
) -> npt.NDArray[Any]:
    """Draw patterns of `size` entries, spread over the parts by their number of entries."""
    draw = torch.Generator().manual_seed(_SEED)
    numel = sum(f.numel for f, _ in parts)
    drawn, seen, taken = [], 0, 0
    for factors, cut in parts:
        seen += factors.numel
        quota = size * seen // numel - taken
        taken += quota
        if not quota:
            continue
        b, a = factors.scaled()
        columns = a.t().contiguous()
        for start in range(0, quota, _SAMPLE_CHUNK):
            n = min(_SAMPLE_CHUNK, quota - start)
            i = torch.randint(len(b), (n,), generator=draw).to(b.device)
            j = torch.randint(len(columns), (n,), generator=draw).to(b.device)
            entries = (b[i] * columns[j]).sum(1)
            drawn.append(_magnitudes(entries, cut, dtype).cpu())
    return torch.cat(drawn).view(_bits_of(dtype)).numpy()


def _magnitudes(entries: Tensor, cut: float, dtype: torch.dtype) -> Tensor:
    """Return the magnitudes that are left after `cut`, flat; `entries` may be changed."""
    return prune_(entries, cut).to(dtype).abs_().flatten()


def _bits_of(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


# ------------------------------------------------------------------------------------- counting


@dataclass(frozen=True, slots=True)
class _Task:
    """Some neighbouring blocks of one module."""

    factors: LoraFactors
    cut: float
    first: int
    stop: int


def _count(
    parts: Sequence[tuple[LoraFactors, float]], brackets: Sequence[_Bracket], dtype: torch.dtype
) -> list[tuple[int, Counts]]:
    """Return per bracket the number of entries at or above it, and the table of those inside."""
    tasks: dict[torch.device, list[_Task]] = {}
    for factors, cut in parts:
        for first in range(0, factors.block_count, _BLOCKS_PER_TASK):
            stop = min(first + _BLOCKS_PER_TASK, factors.block_count)
            tasks.setdefault(factors.b.device, []).append(_Task(factors, cut, first, stop))
    tallies: list[_HostTally | _DeviceTally] = []
    for device, some in tasks.items():
        if device.type == "cpu":
            tallies += _count_on_cores(some, brackets, dtype)
        else:
            tally = _DeviceTally(brackets, device)
            for task in some:
                _walk(task, tally, dtype)
            tallies.append(tally)
    total = [(0, np.zeros(bracket.places, np.int64)) for bracket in brackets]
    for done in tallies:
        pairs = zip(total, done.read(), strict=True)
        total = [(n + m, table + other) for (n, table), (m, other) in pairs]
    return total


def _count_on_cores(
    tasks: Sequence[_Task], brackets: Sequence[_Bracket], dtype: torch.dtype
) -> list[_HostTally]:
    tallies: list[_HostTally] = []
    free: SimpleQueue[_HostTally] = SimpleQueue()

    def work(task: _Task) -> None:
        try:
            tally = free.get_nowait()
        except Empty:
            tally = _HostTally(brackets, dtype)
            tallies.append(tally)
        _walk(task, tally, dtype)
        free.put(tally)

    for _ in spread(work, tasks, most=len(tasks)):
        pass
    return tallies


def _walk(task: _Task, tally: _HostTally | _DeviceTally, dtype: torch.dtype) -> None:
    for _, block in task.factors.blocks(task.first, task.stop):
        tally.add(_magnitudes(block, task.cut, dtype))


class _HostTally:
    """Counts of one worker. numpy compares and counts several times faster than torch on a CPU."""

    def __init__(self, brackets: Sequence[_Bracket], dtype: torch.dtype) -> None:
        self.brackets = brackets
        self.above = [0] * len(brackets)
        self.tables: list[Counts] = [np.zeros(b.places, np.int64) for b in brackets]
        self.pending: list[list[npt.NDArray[Any]]] = [[] for _ in brackets]
        self.size = [0] * len(brackets)
        self.masks = np.empty((2, 0), np.bool_)
        # Comparing floats is faster than comparing patterns. No float lies above infinity.
        inf = int(torch.tensor(math.inf, dtype=dtype).view(_bits_of(dtype)))
        patterns = torch.tensor([[b.lo, min(b.hi, inf)] for b in brackets], dtype=_bits_of(dtype))
        self.bounds = patterns.view(dtype).numpy()
        self.open = [b.hi > inf for b in brackets]

    def add(self, magnitudes: Tensor) -> None:
        found = magnitudes.numpy()
        if self.masks.shape[1] < found.size:
            self.masks = np.empty((2, found.size), np.bool_)
        inside, beyond = self.masks[:, : found.size]
        patterns = found.view(f"i{found.itemsize}")
        for i, bracket in enumerate(self.brackets):
            lo, hi = self.bounds[i]
            np.greater_equal(found, lo, out=inside)
            if not self.open[i]:
                np.greater_equal(found, hi, out=beyond)
                self.above[i] += int(np.count_nonzero(beyond))
                np.bitwise_xor(inside, beyond, out=inside)  # lo <= found < hi
            kept = patterns[np.flatnonzero(inside)]
            self.pending[i].append(kept)
            self.size[i] += kept.size
            if self.size[i] >= bracket.most:  # a flush walks the whole table
                self._flush(i)

    def _flush(self, i: int) -> None:
        if self.pending[i]:
            bracket = self.brackets[i]
            places = (np.concatenate(self.pending[i]) - bracket.lo) >> bracket.shift
            self.tables[i] += np.bincount(places, minlength=bracket.places)
            self.pending[i], self.size[i] = [], 0

    def read(self) -> list[tuple[int, Counts]]:
        for i in range(len(self.brackets)):
            self._flush(i)
        return list(zip(self.above, self.tables, strict=True))


class _DeviceTally:
    """Counts that stay on an accelerator until they are read: no block waits for the host."""

    _SPARE = 1 << 12  # places for entries outside, so that they do not all queue for one counter

    def __init__(self, brackets: Sequence[_Bracket], device: torch.device) -> None:
        self.brackets = brackets
        self.above = torch.zeros(len(brackets), dtype=torch.int64, device=device)
        self.tables = [
            torch.zeros(b.places + self._SPARE, dtype=torch.int64, device=device) for b in brackets
        ]
        self.ones = torch.ones(0, dtype=torch.int64, device=device)
        self.spare = torch.zeros(0, dtype=torch.int64, device=device)

    def add(self, magnitudes: Tensor) -> None:
        patterns = magnitudes.view(_bits_of(magnitudes.dtype))
        n = patterns.numel()
        if self.ones.numel() < n:
            self.ones = torch.ones(n, dtype=torch.int64, device=patterns.device)
            self.spare = torch.arange(n, device=patterns.device) % self._SPARE
        for i, bracket in enumerate(self.brackets):
            inside = patterns >= bracket.lo
            if bracket.hi <= torch.iinfo(patterns.dtype).max:
                beyond = patterns >= bracket.hi
                self.above[i] += beyond.sum()
                inside &= ~beyond
            places = (patterns - bracket.lo) >> bracket.shift
            places = torch.where(inside, places, self.spare[:n] + bracket.places)
            self.tables[i].scatter_add_(0, places, self.ones[:n])

    def read(self) -> list[tuple[int, Counts]]:
        above = self.above.tolist()
        tables = [
            t[: b.places].cpu().numpy() for t, b in zip(self.tables, self.brackets, strict=True)
        ]
        return list(zip(above, tables, strict=True))
