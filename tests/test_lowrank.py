"""Low-rank factors of merged deltas: exact where they can be, near the optimum where not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_select import drawn

from peft_himerge import Edit
from peft_himerge.combine import Combiner
from peft_himerge.factors import Adapter, LoraFactors
from peft_himerge.lowrank import LowRank, _svd_by_eigenvalues, low_rank

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
