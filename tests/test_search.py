"""Candidates for density and scale: which are asked for, and which wins."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from paper import paper

from peft_himerge import Edit, HiMergeConfig
from peft_himerge.errors import MissingExtraError
from peft_himerge.sampler import Kind, Point, explore, propose
from peft_himerge.search import GRID, Trial, best, budget, check_search, search_edit


def run(config: HiMergeConfig, peak: tuple[float, float]) -> tuple[list[Trial], list[Edit]]:
    asked: list[Edit] = []

    def value(edits: Sequence[Edit]) -> list[float]:
        asked.extend(edits)
        return [-abs(e.density - peak[0]) - abs(e.scale - peak[1]) for e in edits]

    return search_edit("en", config, value), asked


def test_grid_is_the_papers() -> None:
    assert GRID == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def test_grid_search_asks_for_all_hundred_and_finds_the_best() -> None:
    trials, asked = run(paper(search="grid"), (0.4, 0.7))
    assert len(asked) == len(set(asked)) == len(trials) == 100
    assert best(trials).edit == Edit(0.4, 0.7)


@pytest.mark.parametrize("peak", [(d, s) for d in (0.0, 0.1, 0.3, 1.0) for s in (0.2, 0.8, 1.0)])
def test_coarse_search_asks_for_at_most_twelve_and_none_twice(peak: tuple[float, float]) -> None:
    trials, asked = run(paper(), peak)
    assert len(asked) == len(set(asked)) == len(trials) <= 12 == budget(paper())
    assert all(t.adapter == "en" for t in trials)
    assert best(trials).value == max(t.value for t in trials)


def test_coarse_search_finds_a_peak_on_its_lines() -> None:
    trials, _ = run(paper(), (0.3, 0.7))
    assert best(trials).edit == Edit(0.3, 0.7)


@pytest.mark.parametrize(
    ("target", "peak", "scales", "last"),
    [
        ("own", (0.5, 0.7), (0.3, 0.5, 0.7, 0.8, 0.9, 1.0), 0.5),
        ("own", (0.5, 0.0), (0.3, 0.5, 0.7, 0.8, 0.9, 1.0), 0.5),
        ("merged", (0.1, 1.5), (0.3, 0.5, 0.7, 1.0, 1.25, 1.5), 1.25),
    ],
)
def test_coarse_search_looks_along_scale_along_density_and_at_the_next_scale(
    target: str, peak: tuple[float, float], scales: tuple[float, ...], last: float
) -> None:
    top = min(scales, key=lambda s: abs(s - peak[1]))
    _, asked = run(paper(search_target=target), peak)
    assert asked[:6] == [Edit(1.0, s) for s in scales]
    assert asked[6:11] == [Edit(p, top) for p in (0.1, 0.2, 0.3, 0.5, 0.7)]
    assert asked[11:] == [Edit(peak[0], last)]  # the next smaller one, of the smallest the larger


def test_scores_that_are_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        search_edit("en", paper(), lambda edits: [0.5] * (len(edits) - 1))


@pytest.mark.parametrize("kind", ["grid", "coarse"])
def test_search_leaves_the_given_one_alone(kind: str) -> None:
    trials, asked = run(paper(search=kind, scale=0.9), (0.6, 0.1))
    assert {e.scale for e in asked} == {0.9}
    assert best(trials).edit == Edit(0.6, 0.9)
    assert len(asked) == 10 == budget(paper(search=kind, scale=0.9))
    trials, asked = run(paper(search=kind, density=0.5), (0.6, 0.2))
    assert best(trials).edit == Edit(0.5, 0.2)


@pytest.mark.parametrize("most", [1, 5, 20, 37])
def test_optuna_asks_for_so_many_points_of_the_grid_and_none_twice(most: int) -> None:
    config = paper(search="optuna", search_budget=most)
    trials, asked = run(config, (0.4, 0.7))
    assert len(asked) == len(set(asked)) == len(trials) == most == budget(config)
    assert asked[0] == Edit(1.0, 1.0)
    assert all(e.density in GRID and e.scale in GRID for e in asked)
    assert run(config, (0.4, 0.7)) == (trials, asked)


def test_optuna_goes_where_the_scores_are_high() -> None:
    trials, _ = run(paper(search="optuna", search_budget=30), (0.4, 0.7))
    assert best(trials).value > -0.15  # 7 of the 100 points of the grid are as good


def distances(kind: Kind, peak: tuple[float, float], seed: int) -> list[float]:
    """Return how far from the peak the 30 points are that are asked for, in order."""
    found: list[float] = []

    def score(batch: list[Point]) -> list[float]:
        found.extend(abs(d - peak[0]) + abs(s - peak[1]) for d, s in batch)
        return [-value for value in found[-len(batch) :]]

    explore(propose(kind, (GRID, GRID), 30, seed=seed, first=[(1.0, 1.0)]), score)
    return found


def test_optuna_asks_nearer_to_the_peak_than_random_draws_and_ever_nearer() -> None:
    cases = [(p, s) for p in ((0.4, 0.7), (0.2, 0.3), (0.8, 0.5)) for s in range(4)]
    found = [distances("optuna", *case) for case in cases]
    assert max(min(d) for d in found) < 0.15
    nearer = [sum(d) < sum(distances("random", *c)) for d, c in zip(found, cases, strict=True)]
    assert all(nearer)
    early, late = (sum(sum(d[part]) for d in found) for part in (slice(10), slice(-10, None)))
    assert late < 0.75 * early  # 0.64; by random draws 0.94, by Optuna 4 0.88


def test_optuna_leaves_the_given_one_alone_and_ends_with_the_grid() -> None:
    config = paper(search="optuna", scale=0.9, search_budget=50)
    trials, asked = run(config, (0.6, 0.1))
    assert {e.scale for e in asked} == {0.9}
    assert sorted(e.density for e in asked) == list(GRID)
    assert budget(config) == 10
    assert best(trials).edit == Edit(0.6, 0.9)


def test_a_search_by_optuna_without_optuna_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_search(paper(search="optuna"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="search='optuna' needs Optuna"):
        check_search(paper(search="optuna"))
    check_search(paper(search="optuna", density=0.5, scale=1.0))
    check_search(paper())


def test_budget_is_the_number_of_scores() -> None:
    assert budget(paper(density=0.5, scale=1.0)) == 0
    assert budget(paper(search="grid")) == 100
    assert budget(paper(search="optuna")) == 20
    assert budget(paper(density={"a": 0.5}, scale={"a": 1.0})) == 0


def test_best_of_equal_ones_is_the_sparser_then_the_smaller() -> None:
    trials = [Trial("en", Edit(d, s), 1.0) for d in (1.0, 0.2, 0.5) for s in (0.9, 0.4)]
    assert best(trials).edit == Edit(0.2, 0.4)
    assert best([*trials, Trial("en", Edit(1.0, 1.0), 1.1)]).edit == Edit(1.0, 1.0)


@pytest.mark.parametrize("peak", [(1.0, 1.5), (1.0, 1.25), (0.3, 1.5), (0.5, 0.3)])
def test_on_the_merged_model_scales_above_one_are_tried_too(peak: tuple[float, float]) -> None:
    config = paper(search_target="merged")
    trials, asked = run(config, peak)
    assert len(asked) == len(set(asked)) <= 12 == budget(config)
    assert best(trials).edit == Edit(*peak)
    grid = paper(search_target="merged", search="grid")
    trials, asked = run(grid, peak)
    assert len(asked) == 120 == budget(grid)
    assert max(e.scale for e in asked) == 1.5
    alone = paper(search="grid")
    assert max(e.scale for e in run(alone, peak)[1]) == 1.0
    tpe = paper(search_target="merged", search="optuna", search_budget=4)
    assert run(tpe, peak)[1][0] == Edit(1.0, 1.0)
