"""Low-rank factors of merged deltas: exact where they can be, near the optimum where not."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_select import drawn

from peft_himerge import Edit
from peft_himerge import lowrank as room
from peft_himerge.combine import Combiner
from peft_himerge.factors import Adapter, LoraFactors
from peft_himerge.lowrank import (
    LowRank,
    _svd_by_eigenvalues,
    low_rank,
    low_rank_of_dense,
    low_rank_of_product,
)

MODULE = "layers.0.w"


def combiner(*factors: LoraFactors) -> Combiner:
    return Combiner([Adapter(f"a{i}", {MODULE: f}) for i, f in enumerate(factors)])


def found(
    made: Combiner, rank: int | float | str, density: float = 1.0, scale: float = 1.0
) -> tuple[LowRank, torch.Tensor]:
    plan = made.plan({name: Edit(density, scale) for name in made.adapters})
    terms = made.terms(plan, MODULE)
    return low_rank(made, MODULE, terms, rank), made.delta(MODULE, terms)


def relative(part: LowRank, delta: torch.Tensor) -> float:
    return float((delta - part.b @ part.a).norm() / delta.norm())


def optimum(delta: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(delta.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize(("out", "width"), [(30, 50), (50, 30), (4, 60), (60, 4)])
def test_unpruned_sum_is_exact_at_the_sum_of_the_ranks(out: int, width: int) -> None:
    made = combiner(drawn(0, out, width, 3), drawn(1, out, width, 5))
    part, delta = found(made, "exact", scale=0.7)
    assert part.rank == min(8, out, width)
    assert part.b.shape == (out, part.rank)
    assert part.a.shape == (part.rank, width)
    assert part.error == 0.0
    assert relative(part, delta) < 1e-6
    assert part.norm == pytest.approx(float(delta.norm()), rel=1e-6)


def test_unpruned_sum_of_dependent_adapters_takes_only_the_rank_it_has() -> None:
    one = drawn(0, 20, 30, 3)
    part, delta = found(combiner(one, one), "exact")
    assert part.rank == 3
    assert relative(part, delta) < 1e-6


def test_unpruned_sum_that_cancels_is_zero() -> None:
    one = drawn(0, 20, 30, 3, torch.float64)
    minus = LoraFactors(one.a, -one.b, one.scaling)
    part, delta = found(combiner(one, minus), "exact")
    assert float((part.b @ part.a).norm()) < 1e-12
    assert float(delta.norm()) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_unpruned_sum_at_a_smaller_rank_is_optimal_and_tells_its_error(rank: int) -> None:
    made = combiner(drawn(0, 25, 40, 4, torch.float64), drawn(1, 25, 40, 4, torch.float64))
    part, delta = found(made, rank)
    assert part.rank == rank
    assert part.error == pytest.approx(relative(part, delta), abs=1e-9)
    assert part.error == pytest.approx(optimum(delta, rank), abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_rank_by_energy_is_the_smallest_that_keeps_the_share(share: float, density: float) -> None:
    made = combiner(drawn(0, 25, 40, 4, torch.float64), drawn(1, 25, 40, 4, torch.float64))
    part, delta = found(made, share, density)
    energies = torch.linalg.svdvals(delta).square()
    captured = energies.cumsum(0) / energies.sum()
    want = int((captured < share).sum()) + 1
    # An iterated random basis may lose a hair of the energy and so need one term more.
    assert part.rank in ((want,) if density == 1.0 else (want, want + 1))
    assert 1 - relative(part, delta) ** 2 >= share - 1e-9


def test_rank_by_energy_is_found_where_it_is_much_larger_than_that_of_the_factors() -> None:
    made = combiner(drawn(0, 90, 120, 2, torch.float64))
    part, delta = found(made, 0.999, 0.2)
    energies = torch.linalg.svdvals(delta).square()
    want = int((energies.cumsum(0) / energies.sum() < 0.999).sum()) + 1
    assert want > 2 + 16  # the basis it starts with is too small
    assert part.rank in (want, want + 1)
    assert part.error == pytest.approx(relative(part, delta), rel=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_svd_by_eigenvalues_is_an_svd(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = _svd_by_eigenvalues(x)
    torch.testing.assert_close(s, torch.linalg.svdvals(x))
    torch.testing.assert_close(u * s @ v, x)
    same = torch.eye(len(s), dtype=torch.float64)
    torch.testing.assert_close(u.t() @ u, same)
    torch.testing.assert_close(v @ v.t(), same)


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(1, 1), (1, 9), (9, 1), (12, 40), (40, 12), (33, 33), (64, 48)]),
    density=st.sampled_from([0.05, 0.3, 0.8]),
    rank=st.sampled_from([1, 2, 6, 20, 100]),
)
def test_pruned_sum_tells_its_true_error_and_is_near_the_optimum(
    seed: int, shape: tuple[int, int], density: float, rank: int
) -> None:
    made = combiner(drawn(seed, *shape, 2), drawn(seed + 1, *shape, 3))
    part, delta = found(made, rank, density)
    assert part.rank <= min(rank, *shape)
    assert part.error == pytest.approx(relative(part, delta), rel=1e-4, abs=2e-6)
    assert part.error <= 1.02 * optimum(delta, min(rank, *shape)) + 2e-6


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_pruned_sum_at_rank_exact_is_exact(shape: tuple[int, int]) -> None:
    made = combiner(drawn(0, *shape, 2), drawn(1, *shape, 3))
    part, delta = found(made, "exact", 0.2)
    assert part.rank <= 12
    assert torch.equal(part.b @ part.a, delta)
    assert part.error == 0.0


@pytest.mark.parametrize("rank", [1, 0.9, "exact"])
def test_dropped_delta_has_rank_zero_and_no_error(rank: int | float | str) -> None:
    made = combiner(drawn(0, 6, 9, 2))
    part, delta = found(made, rank, density=0.0)
    assert (part.rank, part.error, part.norm) == (0, 0.0, 0.0)
    assert not delta.any()
    assert (part.b @ part.a).shape == (6, 9)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_zero_delta_has_rank_zero_and_no_error(density: float) -> None:
    zero = LoraFactors(
        torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 2), 1.5
    )
    part, _ = found(combiner(zero), 3, density)
    assert (part.rank, part.error, part.norm) == (0, 0.0, 0.0)


def test_same_input_gives_the_same_bits_whatever_the_global_generator_says() -> None:
    made = combiner(drawn(0, 40, 60, 2), drawn(1, 40, 60, 3))
    torch.manual_seed(1)
    first, _ = found(made, 4, 0.3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, _ = found(made, 4, 0.3)
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.a, second.a)
    assert torch.equal(state, torch.get_rng_state())


def test_factors_share_the_singular_values_evenly() -> None:
    part, _ = found(combiner(drawn(0, 25, 40, 4, torch.float64)), "exact")
    assert torch.allclose(part.b.norm(dim=0), part.a.norm(dim=1), rtol=1e-9)


def test_half_precision_sources_are_exported_from_float32_products() -> None:
    made = combiner(drawn(0, 25, 40, 4, torch.bfloat16))
    part, delta = found(made, "exact")
    assert part.b.dtype == torch.float32
    assert relative(part, delta) < 1e-6


# -------------------------------------------------------------------------- what comes of what


def nothing(part: LowRank, out: int, width: int) -> bool:
    shapes = (part.b.shape, part.a.shape) == ((out, 0), (0, width))
    return shapes and (part.error, part.norm, part.note) == (0.0, 0.0, "")


@pytest.mark.parametrize("rank", [3, 0.5, "exact"])
def test_zeros_have_no_factors(rank: int | float | str) -> None:
    assert nothing(low_rank_of_dense(torch.zeros(6, 9), rank), 6, 9)
    assert nothing(low_rank_of_product(torch.zeros(6, 0), torch.zeros(0, 9), rank), 6, 9)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_a_dense_delta_at_rank_exact_is_one_of_the_factors(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(shape, generator=draw, dtype=torch.float64)
    part = low_rank_of_dense(delta, "exact")
    whole, unit = (part.a, part.b) if shape[0] <= shape[1] else (part.b, part.a)
    assert whole is delta
    assert torch.equal(unit, torch.eye(min(shape), dtype=torch.float64))
    assert unit.dtype == torch.float64
    assert (part.error, part.note) == (0.0, "")
    assert part.norm == pytest.approx(float(delta.norm()), rel=1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_a_delta_of_one_direction_is_told_with_its_norm(norm: float) -> None:
    delta = torch.zeros(5, 4, dtype=torch.float64)
    delta[1, 2] = norm
    for rank in (2, 0.5, "exact"):
        part = low_rank_of_dense(delta, rank)
        assert part.norm == norm
        assert part.note == ""
        assert torch.allclose(part.b @ part.a, delta, atol=1e-12)
        assert part.b.dtype == part.a.dtype == torch.float64
    part = low_rank_of_product(delta[:, 2:3], torch.eye(4, dtype=torch.float64)[2:3], 3)
    assert torch.allclose(part.b @ part.a, delta, atol=1e-12)
    assert float(part.b.norm()) == pytest.approx(math.sqrt(norm))
    assert part.note == ""


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_what_is_rounding_next_to_the_largest_counts_as_zero(shape: tuple[int, int]) -> None:
    floor = 40 * torch.finfo(torch.float32).eps
    values = torch.tensor([1.0, 1.25 * floor, floor, 0.8 * floor])
    b, a = torch.eye(shape[0], 4) * values, torch.eye(4, shape[1])
    assert low_rank_of_product(b, a, "exact").rank == 2
    assert low_rank_of_product(b.double(), a.double(), "exact").rank == 4


def test_norms_and_pieces_are_taken_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = drawn(0, 11, 4, 3, torch.float64)
    dense = delta.b @ delta.a
    for block, sizes in ((12, [3, 3, 3, 2]), (4, [1] * 11), (3, [1] * 11), (99, [11])):
        monkeypatch.setattr(room, "_RESIDUAL_BLOCK", block)
        assert [len(rows) for rows in room._in_blocks(dense, dense)] == sizes
        assert torch.equal(torch.cat([*room._in_blocks(dense, dense)]), dense)
        assert room._norm(dense) == pytest.approx(float(dense.norm()), rel=1e-14)
        part = low_rank_of_dense(dense, 3)  # its residual is formed, in the same blocks
        assert part.error < 1e-12
        assert relative(part, dense) < 1e-12


def test_a_pruned_delta_is_looked_at_from_where_the_unpruned_one_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[Any, ...]] = []

    def spy(delta: torch.Tensor, *given: Any, **named: Any) -> LowRank:
        told.append((*given, named))
        return low_rank_of_dense(delta, *given, **named)

    monkeypatch.setattr(room, "low_rank_of_dense", spy)
    factors = [drawn(0, 60, 50, 12, torch.float64), drawn(1, 60, 50, 12, torch.float64)]
    made = combiner(*factors)
    unpruned = sum(f.scaling * f.b @ f.a for f in factors)
    for rank, width in ((2, 18), (20, 24), (0.5, 24)):
        found(made, rank, 0.2)
        share, named = told.pop()
        assert share == rank
        assert (set(named), named["name"]) == ({"start", "name"}, MODULE)
        rows = torch.linalg.qr(named["start"].t()).Q
        assert rows.shape == (50, width)
        # Those are the leading directions of the delta as it would be unpruned.
        caught = float((unpruned @ rows).square().sum())
        assert caught == pytest.approx(float(torch.linalg.svdvals(unpruned)[:width].square().sum()))
    found(made, "exact", 0.2)
    assert told == [("exact", {})]  # no guess was made


def test_the_random_part_is_seeded_by_the_name_alone() -> None:
    # The first four bytes of SHA-256 of the name, little end first, by another tool.
    seeds = {"": 0x42C4B0E3, MODULE: 0x3A9637A7}
    for name, seed in seeds.items():
        generator = room._generator(name, torch.device("cpu"))
        assert (generator.initial_seed(), generator.device.type) == (seed, "cpu")
    factors = drawn(0, 30, 40, 20)
    delta = factors.b @ factors.a
    plain, named, other = (
        low_rank_of_dense(delta, 2, **at) for at in ({}, {"name": ""}, {"name": MODULE})
    )
    assert torch.equal(plain.b, named.b)
    assert not torch.equal(plain.b, other.b)


def test_a_guess_of_another_precision_is_read_in_that_of_the_delta() -> None:
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(30, 24, generator=draw, dtype=torch.float64)
    for rows in (4, 20, 24):  # of fewer, as many, and more directions than are looked at
        guess = torch.randn(rows, 24, generator=draw)
        part = low_rank_of_dense(delta, 4, start=guess)
        assert part.b.dtype == part.a.dtype == torch.float64
        assert part.norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert part.error <= 1.02 * optimum(delta, 4)
        assert low_rank_of_dense(delta.float(), 4, start=guess.double()).b.dtype == torch.float32


# ----------------------------------------------------------------------- how long it is looked at


class Cores(list[torch.Tensor]):
    """The singular values of every core that was looked at: one per product with the delta."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        real = room._svd

        def noted(x: torch.Tensor) -> Any:
            found = real(x)
            assert x.shape == (len(found[1]), len(found[1]))
            self.append(found[1])
            return found

        monkeypatch.setattr(room, "_svd", noted)


def products(captured: Sequence[float], energy: float, eps: float) -> int:
    """Return after how many products the rule stops, by what each of them captured."""
    blind = 0
    for n, now in enumerate(captured, 1):
        if blind == 6:
            return n
        if energy - now <= 1e3 * eps * energy:
            blind += 1
        elif n > 1:
            gain, ratio = now - captured[n - 2], 0.7
            if n > 2 and (before := captured[n - 2] - captured[n - 3]) > 0:
                ratio = max(ratio, gain / before)
            # A geometric series of gains, from the next one on.
            if ratio < 1 and gain * ratio / (1 - ratio) <= 0.01 * (energy - now):
                return n
    return 24


SPECTRA = {
    "flat": torch.ones(60),
    "falling": torch.arange(1.0, 61).pow(-1.0),
    "steep": torch.arange(1.0, 61).pow(-3.0),
    "step": torch.cat([torch.ones(4), torch.full((56,), 0.5)]),
    "exact": torch.cat([torch.arange(1.0, 5), torch.zeros(56)]),
    "nearly exact": torch.cat([torch.ones(4), torch.full((56,), 1e-4)]),
}


def of_spectrum(values: torch.Tensor, dtype: torch.dtype, out: int = 80) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    n = len(values)
    u = torch.linalg.qr(torch.randn(out, n, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q
    return (u * values.double() @ v).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_looked_at_until_the_captured_energy_has_settled(
    spectrum: str, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = Cores(monkeypatch)
    delta = of_spectrum(SPECTRA[spectrum], dtype)
    part = low_rank_of_dense(delta, rank)
    assert {len(core) for core in cores} == {rank + 16}
    energy = room._norm(delta) ** 2
    captured = [float(core[:rank].double().square().sum()) for core in cores]
    assert len(cores) == products(captured, energy, torch.finfo(dtype).eps) > 1
    if spectrum == "exact" and rank >= 4:
        assert len(cores) == 8  # six after the second one, which sees all of it
    assert part.error <= 1.02 * optimum(delta, rank) + 2e-6
    assert part.error == pytest.approx(relative(part, delta), rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("most", [24, 5])
def test_it_is_looked_at_no_longer_than_allowed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CONVERGED", 0.0)
    if most < 24:
        monkeypatch.setattr(room, "_MAX_PRODUCTS", most)
    cores = Cores(monkeypatch)
    delta = of_spectrum(torch.linspace(1.0, 0.9, 60), torch.float64)
    part = low_rank_of_dense(delta, 2)
    assert len(cores) == most
    assert part.error == pytest.approx(relative(part, delta), rel=1e-9)
    assert part.error <= 1.02 * optimum(delta, 2)


def test_an_energy_beyond_all_numbers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(monkeypatch)
    low_rank_of_dense(of_spectrum(SPECTRA["falling"], torch.float64) * 1e160, 2)
    assert len(cores) == 1


def test_a_share_of_the_energy_is_looked_for_in_twice_as_many_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = Cores(monkeypatch)
    delta = of_spectrum(SPECTRA["flat"], torch.float64)
    part = low_rank_of_dense(delta, 0.999)
    sizes = [len(core) for core in cores]
    assert sorted(set(sizes)) == [16, 32, 60]
    assert sizes == sorted(sizes)
    assert part.rank == 60
    # Each time until all that it holds has settled, for its rank is not known.
    captured = [float(core.double().square().sum()) for core in cores if len(core) == 32]
    assert len(captured) == products(captured, room._norm(delta) ** 2, 2.0**-52)
    cores.clear()
    assert low_rank_of_dense(delta, 0.2).rank in (12, 13)
    assert {len(core) for core in cores} == {16}


@pytest.mark.parametrize(
    ("gain", "before", "want"),
    [
        (1.0, math.inf, 7 / 3),  # nothing to compare with: the least ratio, 0.7
        (1.0, 2.0, 7 / 3),
        (9.0, 10.0, 81.0),
        (0.25, 0.3125, 1.0),
        (10.0, 10.0, math.inf),
        (15.0, 10.0, math.inf),
        (30.0, 10.0, math.inf),
        (0.0, 1.0, 0.0),
        (-3.0, 1.0, -7.0),
        (3.0, 0.0, 7.0),
        (3.0, -1.0, 7.0),
    ],
)
def test_gains_to_come_are_those_of_a_geometric_series(
    gain: float, before: float, want: float
) -> None:
    assert room._to_come(gain, before) == pytest.approx(want)


# -------------------------------------------------------------------------- where an SVD gives up


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize(
    ("device", "failing", "how"),
    [
        (False, 0, ""),
        (False, 1, "in float64"),
        (False, 2, "by eigenvalues"),
        (True, 0, ""),
        (True, 1, "in float64"),
        (True, 2, "by gesvd"),
        (True, 3, "by eigenvalues"),
    ],
)
def test_an_svd_that_fails_is_done_again_more_slowly(
    device: bool,
    failing: int,
    how: str,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[tuple[torch.dtype, dict[str, Any]]] = []
    real = torch.linalg.svd

    def svd(x: torch.Tensor, *, full_matrices: bool = True, **named: Any) -> Any:
        asked.append((x.dtype, named))
        assert x.shape == shape
        if len(asked) <= failing:
            raise torch.linalg.LinAlgError(f"no {len(asked)}")
        return real(x.as_subclass(torch.Tensor), full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        u, s, v, note = room._svd(x.as_subclass(OnDevice) if device else x)
    assert note == (f"SVD repeated {how}" if how else "")
    ways = [(torch.float32, {}), (torch.float64, {}), (torch.float64, {"driver": "gesvd"})]
    assert asked == ways[: min(failing + 1, 3 if device else 2)]
    assert u.dtype == s.dtype == v.dtype == torch.float32
    assert (u.shape, s.shape, v.shape) == ((shape[0], 5), (5,), (5, shape[1]))
    assert torch.allclose((u * s @ v).as_subclass(torch.Tensor), x, atol=1e-5)
    tried = ["", "in float64", "by gesvd"][:failing]
    assert [record.getMessage() for record in caplog.records] == [
        f"SVD of a {shape} matrix failed {way}: no {n}" for n, way in enumerate(tried, 1)
    ]


@pytest.mark.parametrize("product", [False, True])
def test_how_an_svd_was_done_is_told(product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.svd

    def svd(x: torch.Tensor, **named: Any) -> Any:
        if x.dtype == torch.float32 or product:
            raise torch.linalg.LinAlgError("no")
        return real(x, **named)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    factors = drawn(0, 30, 24, 3)
    if product:  # its core is float64 from the first
        assert low_rank_of_product(factors.b, factors.a, 2).note == "SVD repeated by eigenvalues"
    else:
        assert low_rank_of_dense(factors.b @ factors.a, 2).note == "SVD repeated in float64"
