"""Candidates for density and scale: which are asked for, and which wins."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peft_himerge import Edit, HiMergeConfig
from peft_himerge.search import GRID, Trial, best, budget, search_edit


def run(config: HiMergeConfig, peak: tuple[float, float]) -> tuple[list[Trial], list[Edit]]:
    asked: list[Edit] = []

    def value(edits: Sequence[Edit]) -> list[float]:
        asked.extend(edits)
        return [-abs(e.density - peak[0]) - abs(e.scale - peak[1]) for e in edits]

    return search_edit("en", config, value), asked


def test_grid_is_the_papers() -> None:
    assert GRID == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def test_grid_search_asks_for_all_hundred_and_finds_the_best() -> None:
    trials, asked = run(HiMergeConfig(search="grid"), (0.4, 0.7))
    assert len(asked) == len(set(asked)) == len(trials) == 100
    assert best(trials).edit == Edit(0.4, 0.7)


@pytest.mark.parametrize("peak", [(d, s) for d in (0.0, 0.1, 0.3, 1.0) for s in (0.2, 0.8, 1.0)])
def test_coarse_search_asks_for_at_most_twelve_and_none_twice(peak: tuple[float, float]) -> None:
    trials, asked = run(HiMergeConfig(), peak)
    assert len(asked) == len(set(asked)) == len(trials) <= 12 == budget(HiMergeConfig())
    assert all(t.adapter == "en" for t in trials)
    assert best(trials).value == max(t.value for t in trials)


def test_coarse_search_finds_a_peak_on_its_lines() -> None:
    trials, _ = run(HiMergeConfig(), (0.3, 0.7))
    assert best(trials).edit == Edit(0.3, 0.7)


@pytest.mark.parametrize("kind", ["grid", "coarse"])
def test_search_leaves_the_given_one_alone(kind: str) -> None:
    trials, asked = run(HiMergeConfig(search=kind, scale=0.9), (0.6, 0.1))
    assert {e.scale for e in asked} == {0.9}
    assert best(trials).edit == Edit(0.6, 0.9)
    assert len(asked) == 10 == budget(HiMergeConfig(search=kind, scale=0.9))
    trials, asked = run(HiMergeConfig(search=kind, density=0.5), (0.6, 0.2))
    assert best(trials).edit == Edit(0.5, 0.2)


def test_budget_is_the_number_of_scores() -> None:
    assert budget(HiMergeConfig(density=0.5, scale=1.0)) == 0
    assert budget(HiMergeConfig(search="grid")) == 100
    assert budget(HiMergeConfig(density={"a": 0.5}, scale={"a": 1.0})) == 0


def test_best_of_equal_ones_is_the_sparser_then_the_smaller() -> None:
    trials = [Trial("en", Edit(d, s), 1.0) for d in (1.0, 0.2, 0.5) for s in (0.9, 0.4)]
    assert best(trials).edit == Edit(0.2, 0.4)
    assert best([*trials, Trial("en", Edit(1.0, 1.0), 1.1)]).edit == Edit(1.0, 1.0)
