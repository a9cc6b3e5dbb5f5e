"""However the search for a threshold is led astray, what it returns is what a full sort gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_select import drawn, magnitudes

from peft_himerge import select as room
from peft_himerge.errors import AdapterError
from peft_himerge.factors import LoraFactors
from peft_himerge.select import kept_count, thresholds

DENSITIES = [1e-5, 0.01, 0.1, 0.5, 0.9, 0.999]


def ones(out: int, width: int) -> LoraFactors:
    return LoraFactors(torch.ones(1, width), torch.ones(out, 1), 0.3)


def sparse() -> LoraFactors:
    """Only one row in fifty is not zero."""
    factors = drawn(0, 700, 600, 4)
    b = factors.b * (torch.arange(700) % 50 == 0)[:, None]
    return LoraFactors(factors.a, b, 0.75)


def wide_range() -> LoraFactors:
    """Entries from denormal to nearly the largest float."""
    scale = torch.logspace(-44, 37, 700, dtype=torch.float64).float()
    return LoraFactors(torch.linspace(0.5, 1.5, 600)[None], scale[:, None], 1.0)


def denormal() -> LoraFactors:
    rows = torch.arange(700).float() * 1e-44
    return LoraFactors(torch.ones(1, 600), rows[:, None], 1.0)


CASES: dict[str, Callable[[], list[LoraFactors]]] = {
    "random": lambda: [drawn(1, 700, 600, 4), drawn(2, 90, 600, 3)],
    "float64": lambda: [drawn(1, 700, 600, 4, torch.float64)],
    "two dtypes": lambda: [drawn(1, 700, 600, 4, torch.float64), drawn(2, 200, 300, 2)],
    "bfloat16": lambda: [drawn(1, 700, 600, 4, torch.bfloat16)],
    "grid": lambda: [drawn(1, 700, 600, 2, grid=True)],
    "all equal": lambda: [ones(700, 600)],
    "all zero": lambda: [LoraFactors(torch.ones(1, 600), torch.zeros(700, 1), 1.0)],
    "mostly zero": lambda: [sparse()],
    "wide range": lambda: [wide_range()],
    "denormal": lambda: [denormal()],
    "one huge module": lambda: [
        drawn(1, 700, 600, 2), LoraFactors(torch.ones(1, 2) * 1e30, torch.ones(2, 1), 1.0)
    ],
}  # fmt: skip


def check(parts: list[LoraFactors], densities: list[float]) -> None:
    ranked = magnitudes(*parts)
    found = thresholds([(f, 0.0) for f in parts], densities)
    for density, tau in found.items():
        assert tau == float(ranked[kept_count(density, len(ranked)) - 1]), density


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many brackets each pass over the blocks counted."""
    seen: list[int] = []
    real = room._count

    def count(parts: Any, brackets: Any, dtype: Any) -> Any:
        seen.append(len(brackets))
        return real(parts, brackets, dtype)

    monkeypatch.setattr(room, "_count", count)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_thresholds_with_a_sample_equal_a_full_sort(case: str) -> None:
    parts = CASES[case]()
    assert sum(f.numel for f in parts) >= room._SAMPLE_FROM
    check(parts, DENSITIES)


def flat(value: float, numel: int, dtype: torch.dtype = torch.float32) -> LoraFactors:
    """A module whose entries are all of one magnitude."""
    rows = torch.full((1, numel), -value, dtype=dtype)
    return LoraFactors(rows, torch.ones(1, 1, dtype=dtype), 1.0)


def test_a_sample_is_drawn_from_every_part_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(flat(5.0, 3), 0.0), (flat(1.0, 597), 0.0), (flat(2.0, 300), 0.0), (flat(3.0, 100), 4)]
    before = torch.get_rng_state()
    for chunk in (room._SAMPLE_CHUNK, 16):
        monkeypatch.setattr(room, "_SAMPLE_CHUNK", chunk)
        for dtype, bits in ((torch.float32, np.float32), (torch.float64, np.float64)):
            drawn = room._sample(parts, 100, dtype).view(bits)
            values, counts = np.unique(drawn, return_counts=True)
            # 3 of 1000 entries are too few for a place among 100; the last part is cut away.
            assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {1: 60, 2: 30, 0: 10}
    assert torch.equal(torch.get_rng_state(), before)
    drawn = room._sample([(flat(1.0, 6), 0.0), (flat(2.0, 4), 0.0)], 10, torch.float32)
    assert np.sort(drawn.view(np.float32)).tolist() == [1.0] * 6 + [2.0] * 4


def test_a_sample_is_the_same_every_time_and_of_all_entries() -> None:
    parts = [(drawn(1, 30, 20, 4), 0.0)]
    sample = room._sample(parts, 20_000, torch.float32)
    assert np.array_equal(sample, room._sample(parts, 20_000, torch.float32))
    entries = magnitudes(*(f for f, _ in parts)).numpy()
    found = np.sort(sample.view(np.float32))
    assert len(np.unique(found)) == len(entries) == 600  # the chance to miss one is 2e-12
    np.testing.assert_allclose(np.unique(found), entries[::-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["host", "device"])
@given(data=st.data())
def test_tallies_count_as_a_loop_does(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    inf = int(torch.tensor(math.inf, dtype=dtype).view(room._bits_of(dtype)))
    edges = st.integers(0, 9) | st.integers(inf - 9, inf + 1) | st.integers(0, inf + 1)
    brackets = []
    for _ in range(data.draw(st.integers(1, 2))):
        lo, hi = sorted(data.draw(st.lists(edges, min_size=2, max_size=2, unique=True)))
        brackets.append(room._Bracket(lo, hi, data.draw(st.sampled_from([1, 4, 5, 64]))))
    near = [p for b in brackets for p in (b.lo - 1, b.lo, b.lo + 1, b.hi - 1, b.hi, b.hi + 1)]
    pattern = st.sampled_from([min(max(p, 0), inf) for p in near]) | st.integers(0, inf)
    batches = data.draw(st.lists(st.lists(pattern, min_size=1, max_size=9), max_size=3))
    tally = (
        room._HostTally(brackets, dtype)
        if kind == "host"
        else room._DeviceTally(brackets, torch.device("cpu"))
    )
    for batch in batches:
        tally.add(torch.tensor(batch, dtype=room._bits_of(dtype)).view(dtype))
        for bracket, held in zip(brackets, getattr(tally, "pending", [[]] * 2), strict=False):
            assert sum(map(len, held)) < bracket.most  # what waits is counted in time
    every = [p for batch in batches for p in batch]
    for bracket, (above, table) in zip(brackets, tally.read(), strict=True):
        assert above == sum(p >= bracket.hi for p in every)
        assert (type(above), table.dtype) == (int, np.int64)  # floats would lose count
        places = {1: 1, 4: 4, 5: 4, 64: 64}[bracket.most]  # at most: the power of two below
        width = bracket.hi - bracket.lo
        place = next(1 << s for s in range(64) if -(-width // (1 << s)) <= places)
        assert len(table) == -(-width // place)
        ends = [(bracket.lo + i * place, bracket.lo + (i + 1) * place) for i in range(len(table))]
        assert ends[-1][0] < bracket.hi <= ends[-1][1]
        for (first, last), count in zip(ends, table.tolist(), strict=True):
            assert count == sum(first <= p < min(last, bracket.hi) for p in every)


@pytest.mark.parametrize(
    ("count", "lo", "hi"),
    [
        # Of 5,120,000 entries 10,000 were drawn, of patterns 0, 100, ... 999,900: one for 512.
        # Half of them: place 5,000 from the top, 6 * sqrt(10,000 / 4) + 2 = 302 either way.
        (2_560_000, 469_700 - 64, 530_100 + 1 + 64),
        # A tenth: place 1,000, 6 * sqrt(10,000 * 0.09) + 2 = 182 either way.
        (512_000, 881_700 - 64, 918_100 + 1 + 64),
        # Place 40.5, 40.1 either way: from the very first one to the 81st.
        (20_736, 991_800 - 64, 999_900 + 1 + 64),
        (20_000, 992_000 - 64, None),  # place 39.1, 39.4 either way: nothing is above for certain
        (1, 999_600 - 64, None),
        # The same from below.
        (5_120_000 - 20_736, 0, 8_000 + 1 + 64),
        (5_119_999, 0, 200 + 1 + 64),
    ],
)
def test_the_first_bracket_is_six_sigmas_wide(
    count: int, lo: int, hi: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sample(parts: Any, size: int, dtype: torch.dtype) -> Any:
        asked.append(size)
        return np.arange(0, 1_000_000, 100, dtype=np.int32)

    monkeypatch.setattr(room, "_sample", sample)
    large = LoraFactors(torch.ones(1, 2000, device="meta"), torch.ones(2560, 1), 1.0)
    for others in ([], [1, 2, 3]):
        counts = [count, *others]
        found = room._first_brackets([(large, 0.0)], counts, torch.float32, 1 << 31)
        most = (1 << 22) // len(counts)
        assert found[0] == room._Bracket(lo, 1 << 31 if hi is None else hi, most)
    assert asked == [10_000] * 2


def test_few_entries_are_not_worth_a_sample() -> None:
    small = [(flat(1.0, 262_143), 0.0)]
    assert (
        room._first_brackets(small, [5, 6], torch.float32, 1 << 31)
        == [room._Bracket(0, 1 << 31, 262_143)] * 2
    )
    tiny = [(flat(1.0, 20), 0.0)]
    assert room._first_brackets(tiny, [5], torch.float64, 1 << 63) == [
        room._Bracket(0, 1 << 63, 65_536)
    ]


def test_blocks_on_an_accelerator_are_counted_there_and_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = drawn(1, 20, 9, 2)
    twin = drawn(2, 30, 7, 2)
    there = LoraFactors(twin.a.to("meta"), twin.b.to("meta"), twin.scaling)
    real = room._walk

    class Tally(room._HostTally):
        def __init__(self, brackets: Any, device: torch.device) -> None:
            assert device.type == "meta"
            super().__init__(brackets, torch.float32)

    def walk(task: Any, tally: Any, dtype: torch.dtype) -> None:
        assert (isinstance(tally, Tally), dtype) == (task.factors is there, torch.float32)
        moved = replace(task, factors=twin) if task.factors is there else task
        real(moved, tally, dtype)

    monkeypatch.setattr(room, "_DeviceTally", Tally)
    monkeypatch.setattr(room, "_walk", walk)
    bracket = room._Bracket(0x3F000000, 0x40000000, 64)  # from 0.5 to 2
    both = magnitudes(here, twin)
    for parts in ([(there, 0.0), (here, 0.0)], [(here, 0.0), (there, 0.0)]):
        ((above, table),) = room._count(parts, [bracket], torch.float32)
        assert above == int((both >= 2.0).sum()) > 0
        assert table.sum() == int(((both >= 0.5) & (both < 2.0)).sum()) > 0
        assert table.dtype == np.int64


@given(data=st.data())
def test_the_next_bracket_holds_the_wanted_pattern(data: st.DataObject) -> None:
    top, edge = 64, st.integers(0, 64)
    lo, hi = sorted(data.draw(st.lists(edge, min_size=2, max_size=2, unique=True)))
    near = st.sampled_from([p for p in (lo - 1, lo, hi - 1, hi) if 0 <= p < top])
    entries = data.draw(st.lists(near | st.integers(0, top - 1), min_size=1, max_size=9))
    count = data.draw(st.integers(1, len(entries)))
    wanted = sorted(entries, reverse=True)[count - 1]
    bracket = room._Bracket(lo, hi, data.draw(st.sampled_from([1, 4, 64])))
    place = 1 << bracket.shift
    starts = range(lo, hi, place)
    table = [sum(a <= p < min(a + place, hi) for p in entries) for a in starts]
    above = sum(p >= hi for p in entries)
    found = room._narrow(bracket, count, above, np.array(table), top)
    if wanted >= hi:
        assert (found.lo, found.hi) == (hi, top)
    elif wanted < lo:
        assert (found.lo, found.hi) == (0, lo)
    else:
        (start,) = (a for a in starts if a <= wanted < a + place)
        assert (found.lo, found.hi) == (start, min(start + place, hi))


def test_random_entries_take_one_pass(passes: list[int]) -> None:
    thresholds([(drawn(1, 6000, 2000, 4), 0.0)], [0.1, 0.3])
    assert passes == [2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lie", ["zeros", "largest", "one value"])
def test_a_misleading_sample_costs_passes_and_not_exactness(
    case: str, lie: str, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = CASES[case]()
    wide = any(f.dtype == torch.float64 for f in parts)

    def sample(*_: Any) -> Any:
        kind = np.int64 if wide else np.int32
        inf = np.array(np.inf, np.float64 if wide else np.float32).view(kind)
        value = {"zeros": 0, "largest": int(inf), "one value": int(inf) // 3}[lie]
        return np.full(1000, value, kind)

    monkeypatch.setattr(room, "_sample", sample)
    check(parts, DENSITIES)
    assert len(passes) <= (5 if wide else 3)


def test_small_tables_still_find_every_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PLACES", 64)
    for case in ("random", "float64", "grid", "wide range"):
        check(CASES[case](), [0.1, 0.5])


@pytest.mark.parametrize("case", CASES)
def test_the_accelerators_counters_count_the_same(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_device(tasks: Any, brackets: Any, dtype: torch.dtype) -> list[Any]:
        tally = room._DeviceTally(brackets, torch.device("cpu"))
        for task in tasks:
            room._walk(task, tally, dtype)
        return [tally]

    monkeypatch.setattr(room, "_count_on_cores", on_device)
    check(CASES[case](), [0.1, 0.5])


def test_cores_share_the_blocks_and_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_BLOCKS_PER_TASK", 1)
    parts = [(drawn(1, 3000, 600, 4), 0.0), (drawn(2, 40, 600, 4), 1.0)]
    alone = thresholds(parts, DENSITIES)
    torch.set_num_threads(3)
    try:
        assert thresholds(parts, DENSITIES) == alone
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_blocks_have_the_same_bits_whatever_part_and_however_many_cores() -> None:
    for dtype in (torch.float32, torch.float64):
        factors = drawn(3, 1000, 700, 16, dtype)
        whole = list(factors.blocks())
        assert len(whole) == factors.block_count == 3
        torch.set_num_threads(2)
        try:
            again = [*factors.blocks(0, 1), *factors.blocks(1, 2), *factors.blocks(2)]
        finally:
            torch.set_num_threads(1)
        assert [rows for rows, _ in again] == [rows for rows, _ in whole]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(again, whole, strict=True))


def test_products_that_overflow_to_nan_are_refused() -> None:
    rows = torch.tensor([[3e38, -3e38]]).repeat(700, 1)
    factors = LoraFactors(torch.ones(2, 600), rows, 10.0)
    with pytest.raises(AdapterError) as caught:
        thresholds([(factors, 0.0)], [0.5])
    assert str(caught.value) == (
        "an adapter's delta holds NaN: the product of its factors overflows. Check its weights "
        "and its scaling."
    )
