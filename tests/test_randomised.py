"""The randomised SVD of pruned deltas stays within 2 % of the optimum."""

from __future__ import annotations

import pytest
import torch
from test_lowrank import MODULE, combiner, found, optimum, relative
from test_select import drawn

from peft_himerge import lowrank as room
from peft_himerge.factors import LoraFactors
from peft_himerge.lowrank import low_rank_of_dense


def decaying(seed: int, out: int, width: int, rank: int) -> LoraFactors:
    factors = drawn(seed, out, width, rank)
    return LoraFactors(factors.a, factors.b * torch.logspace(0, -2, rank), factors.scaling)


@pytest.mark.parametrize("shape", [(400, 300), (100, 700), (700, 100)])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.6])
@pytest.mark.parametrize("rank", [4, 32, 90])
@pytest.mark.parametrize("make", [drawn, decaying])
def test_error_is_within_two_percent_of_the_optimum(
    shape: tuple[int, int], density: float, rank: int, make: object
) -> None:
    assert callable(make)
    made = combiner(make(0, *shape, 16), make(1, *shape, 16))
    part, delta = found(made, rank, density, 0.9)
    assert part.error == pytest.approx(relative(part, delta), rel=1e-4, abs=2e-6)
    assert part.error <= 1.02 * optimum(delta, rank) + 2e-6


@pytest.mark.parametrize("rank", [5, 60])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_a_dense_delta_without_a_guess_is_as_good(rank: int, decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(300, 200, generator=draw)).Q
    v = torch.linalg.qr(torch.randn(200, 200, generator=draw)).Q
    delta = u * torch.arange(1, 201).float().pow(-decay) @ v
    part = low_rank_of_dense(delta, rank)
    assert part.error <= 1.02 * optimum(delta, rank) + 2e-6
    assert part.error == pytest.approx(relative(part, delta), rel=1e-4, abs=2e-6)


def test_a_guess_wider_than_needed_is_mixed_and_not_cut() -> None:
    factors = [drawn(i, 120, 90, 8) for i in range(6)]
    made = combiner(*factors)
    _, delta = found(made, 4, 0.3)
    start = torch.cat([f.a for f in factors])
    part = low_rank_of_dense(delta, 4, start=start, name=MODULE)
    assert part.error <= 1.02 * optimum(delta, 4)


def test_the_usual_delta_takes_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = room._svd

    def counted(x: torch.Tensor) -> object:
        nonlocal calls
        calls += x.shape == (48, 48)
        return real(x)

    monkeypatch.setattr(room, "_svd", counted)
    made = combiner(drawn(0, 500, 400, 16), drawn(1, 500, 400, 16))
    part, _ = found(made, 32, 0.1, 0.9)
    assert part.rank == 32
    assert calls - 1 <= 3  # one more SVD is that of the unpruned guess
