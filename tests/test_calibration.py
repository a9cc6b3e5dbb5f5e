"""Calibrated probabilities: against scipy's minimum, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from peft_himerge.evals.calibration import calibrated


def drawn(seed: int, rows: int, choices: int, skill: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities, the right choices' higher by `skill`; and the right choices."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randint(0, choices, (rows,), generator=draw)
    table = torch.randn(rows, choices, generator=draw, dtype=torch.float64)
    table[torch.arange(rows), right] += skill
    return table.log_softmax(dim=1), right


def loss(beta: float, table: Tensor, right: Tensor) -> float:
    """Negative log-likelihood with one row more, in which every choice is equally right."""
    logs = (beta * table).log_softmax(dim=1)
    return float(-logs.gather(1, right[:, None]).sum() - logs.mean(dim=1).mean())


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    choices=st.integers(2, 10),
    skill=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 8.0]),
)
def test_the_temperature_is_the_one_that_fits_best(
    seed: int, rows: int, choices: int, skill: float
) -> None:
    table, right = drawn(seed, rows, choices, skill)
    found = minimize_scalar(
        loss, bounds=(0.0, 100.0), args=(table, right), method="bounded", options={"xatol": 1e-9}
    )
    want = (found.x * table).log_softmax(dim=1).gather(1, right[:, None]).squeeze(1)
    torch.testing.assert_close(calibrated(table, right), want, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10_000), times=st.sampled_from([0.01, 0.5, 3.0, 250.0]))
def test_being_surer_of_everything_wins_nothing(seed: int, times: float) -> None:
    table, right = drawn(seed, 24, 5, 1.0)
    before = calibrated(table, right)
    torch.testing.assert_close(calibrated(times * table, right), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        calibrated((times * table).log_softmax(dim=1), right), before, rtol=1e-9, atol=1e-9
    )


def test_right_everywhere_stays_below_certainty_and_more_rows_make_surer() -> None:
    few, many = (
        calibrated(torch.eye(4, dtype=torch.float64).repeat(n, 1), torch.arange(4).repeat(n))
        for n in (1, 25)
    )
    assert 0.8 < float(few.exp().mean()) < float(many.exp().mean()) < 1.0


def test_preferring_wrong_choices_and_telling_nothing_apart_are_chance() -> None:
    right = torch.arange(4)
    for table in (-torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)):
        assert calibrated(table, right).tolist() == pytest.approx([-math.log(4)] * 4)


def test_choices_that_a_row_lacks_take_no_part() -> None:
    table, right = drawn(3, 12, 3, 1.0)
    wider = torch.cat([table, torch.full((12, 2), -torch.inf, dtype=torch.float64)], dim=1)
    assert torch.equal(calibrated(wider, right), calibrated(table, right))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_gives_nan(broken: float) -> None:
    table, right = drawn(3, 12, 3, 1.0)
    table[5, 1] = broken
    assert calibrated(table, right).isnan().all()
