"""The streamed threshold is the one a full sort gives, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_himerge import factors as factors_room
from peft_himerge.factors import LoraFactors
from peft_himerge.select import kept_count, prune_, thresholds

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def drawn(
    seed: int,
    out: int,
    width: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    grid: bool = False,
    scaling: float = 0.75,
) -> LoraFactors:
    """Random factors; on a ``grid`` of small integers products tie and vanish often."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        if grid:
            return torch.randint(-2, 3, shape, generator=draw).to(dtype)
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return LoraFactors(matrix(rank, width), matrix(out, rank), scaling)


def magnitudes(*parts: LoraFactors) -> torch.Tensor:
    """All entries' magnitudes as the library's own blocks hold them, largest first."""
    entries = [block.double().abs().flatten() for f in parts for _, block in f.blocks()]
    return torch.cat(entries).sort(descending=True).values


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=3
    ),
    densities=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    grid=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_thresholds_of_any_factors_equal_a_full_sort(
    shapes: list[tuple[int, int, int]],
    densities: list[float],
    seed: int,
    grid: bool,
    dtype: torch.dtype,
) -> None:
    parts = [drawn(seed + i, *shape, dtype, grid=grid) for i, shape in enumerate(shapes)]
    ranked = magnitudes(*parts)
    found = thresholds([(f, 0.0) for f in parts], densities)
    assert set(found) == set(densities)
    for density, tau in found.items():
        count = kept_count(density, len(ranked))
        if density == 1.0:
            assert tau == 0.0
        elif count == 0:
            assert tau == math.inf
        else:
            assert tau == float(ranked[count - 1])


@given(
    seed=st.integers(0, 99),
    density=st.sampled_from([0.05, 0.3, 0.5, 0.9]),
    exponent=st.integers(-44, 30),
)
def test_thresholds_of_tiny_and_huge_entries_equal_a_full_sort(
    seed: int, density: float, exponent: int
) -> None:
    given_factors = drawn(seed, 6, 7, 2)
    scaled = LoraFactors(given_factors.a, given_factors.b, 10.0**exponent)
    ranked = magnitudes(scaled)
    found = thresholds([(scaled, 0.0)], [density])[density]
    assert found == float(ranked[kept_count(density, len(ranked)) - 1])


def test_thresholds_among_denormals_are_not_flushed_to_zero() -> None:
    tiny = torch.tensor([[1e-44], [3e-44], [2e-42], [5e-40]])
    parts = [(LoraFactors(torch.ones(1, 1), tiny, 1.0), 0.0)]
    assert thresholds(parts, [0.5])[0.5] == float(tiny[2])
    assert thresholds(parts, [0.75])[0.75] == float(tiny[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_ties_keep_all_equal_entries(dtype: torch.dtype) -> None:
    factors = LoraFactors(torch.ones(1, 5, dtype=dtype), torch.ones(4, 1, dtype=dtype), 0.5)
    tau = thresholds([(factors, 0.0)], [0.05, 0.5])
    assert tau == {0.05: 0.5, 0.5: 0.5}
    (_, block), *_ = factors.blocks()
    assert int(prune_(block, tau[0.05]).count_nonzero()) == 20


def test_thresholds_of_zeros_are_zero_and_keep_everything() -> None:
    factors = LoraFactors(torch.ones(2, 5), torch.zeros(4, 2), 2.0)
    assert thresholds([(factors, 0.0)], [0.5, 0.1]) == {0.5: 0.0, 0.1: 0.0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_one_entry_is_that_entry(dtype: torch.dtype) -> None:
    one = LoraFactors(torch.full((1, 1), -3.0, dtype=dtype), torch.ones(1, 1, dtype=dtype), 0.5)
    assert thresholds([(one, 0.0)], [0.001, 0.999, 0.0, 1.0]) == {
        0.001: 1.5,
        0.999: 1.5,
        0.0: math.inf,
        1.0: 0.0,
    }


def test_thresholds_count_entries_below_a_parts_cut_as_zeros() -> None:
    # Entries 8 7 6 5 | 4 3 2 1, the first part cut at 7: what is left is 8 7 0 0 | 4 3 2 1.
    first = LoraFactors(torch.ones(1, 1), torch.tensor([[8.0], [-7], [6], [5]]), 1.0)
    second = LoraFactors(torch.ones(1, 1), torch.tensor([[4.0], [3], [-2], [1]]), 1.0)
    found = thresholds([(first, 7.0), (second, 0.0)], [0.25, 0.375, 0.75, 0.875])
    assert found == {0.25: 7.0, 0.375: 4.0, 0.75: 1.0, 0.875: 0.0}


def test_thresholds_over_parts_of_two_dtypes_are_exact() -> None:
    narrow = drawn(1, 5, 6, 2)
    wide = drawn(2, 6, 5, 2, torch.float64)
    ranked = magnitudes(narrow, wide)
    for density in (0.1, 0.5, 0.8):
        found = thresholds([(narrow, 0.0), (wide, 0.0)], [density])[density]
        assert found == float(ranked[kept_count(density, 60) - 1])


def test_thresholds_do_not_depend_on_how_parts_are_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = drawn(3, 40, 7, 3, grid=True)  # small integers: every product is exact
    whole = thresholds([(factors, 0.0)], [0.1, 0.4])
    monkeypatch.setattr(factors_room, "_BLOCK", 16)
    assert sum(1 for _ in factors.blocks()) == 20
    assert thresholds([(factors, 0.0)], [0.1, 0.4]) == whole


def test_thresholds_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors_room, "_BLOCK", 16)
    parts = [(drawn(i, 40, 7, 3), 0.0) for i in range(3)]
    alone = thresholds(parts, [0.02, 0.3, 0.9])
    torch.set_num_threads(3)
    try:
        assert thresholds(parts, [0.02, 0.3, 0.9]) == alone
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("density", "numel", "count"),
    [
        (0.3, 10, 3),  # 0.3 * 10 is 3.0000000000000004 where 0.3 is read as a binary number
        (0.1, 10, 1),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.31, 10, 4),
        (1e-9, 10, 1),
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.5, 1, 1),
        (0.1, 3_000_000_000, 300_000_000),
    ],
)
def test_kept_count_is_the_ceiling_of_the_decimal_product(
    density: float, numel: int, count: int
) -> None:
    assert kept_count(density, numel) == count


@given(
    values=st.lists(st.floats(-2, 2) | st.floats(-1e3, 1e3), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_prune_keeps_exactly_the_entries_at_or_above_the_cut(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    delta = torch.tensor(values, dtype=dtype)
    cut = abs(data.draw(st.sampled_from(delta.tolist())))
    want = torch.where(delta.abs() >= cut, delta, torch.zeros_like(delta))
    assert torch.equal(prune_(delta.clone(), cut), want)


def test_prune_at_a_cut_below_one_and_at_one_that_only_float64_holds() -> None:
    assert prune_(torch.tensor([0.25, -0.5, 0.75]), 0.5).tolist() == [0.0, -0.5, 0.75]
    third = 1 / 3  # between two float32 numbers, 0.33333331 and 0.33333334
    delta = torch.tensor([third, 0.33333332], dtype=torch.float64)
    assert prune_(delta, third).tolist() == [third, 0.0]


def test_prune_at_zero_keeps_all_and_at_infinity_none() -> None:
    delta = torch.tensor([0.0, -1e-45, 3.0])
    assert prune_(delta, 0.0) is delta
    assert torch.equal(prune_(delta.clone(), math.inf), torch.zeros(3))


def test_prune_of_float32_at_a_cut_between_two_floats_drops_the_lower_one() -> None:
    # The cut of an adapter with float64 modules need not be a float32 number.
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    just_above = 1.0 + 0.1 * (float(high) - 1.0)
    pruned = prune_(torch.stack([low, high]), just_above)
    assert pruned.tolist() == [0.0, float(high)]
