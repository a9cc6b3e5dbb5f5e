"""Points of a grid: none twice, the same again, and TPE finds the top sooner than chance."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot import run_python

import peft_himerge
from peft_himerge import sampler as room
from peft_himerge.errors import MissingExtraError
from peft_himerge.sampler import explore, propose, size

TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
KINDS = ("grid", "random", "optuna")


def seen(kind: Any, axes: Any, most: int | None = None, **options: Any) -> list[Any]:
    found: list[Any] = []

    def score(batch: Sequence[Any]) -> list[float]:
        found.extend(batch)
        return [-sum(abs(x - 0.4) for x in point if isinstance(x, float)) for point in batch]

    explore(propose(kind, axes, most, **options), score)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_limit_every_point_comes_once(kind: str) -> None:
    axes = [(0.1, 0.5, 1.0), ("a", None), (True, False), (7,)]
    found = seen(kind, axes)
    assert len(found) == size(axes) == len(set(found)) == 12
    if kind == "grid":
        assert found[:3] == [(0.1, "a", True, 7), (0.1, "a", False, 7), (0.1, None, True, 7)]


@settings(max_examples=15)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_never_more_than_asked_none_twice_and_the_same_again(
    kind: str, lengths: list[int], most: int, seed: int
) -> None:
    axes = [TENTHS[:length] for length in lengths]
    first = [tuple(axis[-1] for axis in axes), tuple(axis[-1] for axis in axes)]
    found = seen(kind, axes, most, seed=seed, first=first)
    assert len(found) == len(set(found)) == min(most, size(axes))
    assert found[0] == first[0]
    assert found == seen(kind, axes, most, seed=seed, first=first)


def test_a_grid_too_large_to_list_is_drawn_from() -> None:
    axes = [TENTHS] * 40
    found = seen("random", axes, 30)
    assert len(set(found)) == 30
    assert found != seen("random", axes, 30, seed=1)
    assert len(set(seen("optuna", axes, 12))) == 12


def test_a_large_grid_comes_to_its_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SMALL", 3)
    found = seen("random", [TENTHS, (1, 2)])
    assert len(found) == len(set(found)) == 20
    places = [(i, j) for i in range(10) for j in range(2)]
    assert sorted(room._shuffled([TENTHS, (1, 2)], 0)) == places


@pytest.mark.parametrize("kind", KINDS)
def test_no_points_are_asked_for_if_none_are_wanted(kind: str) -> None:
    assert seen(kind, [TENTHS], 0) == []


def test_tpe_finds_the_top_sooner_than_chance() -> None:
    # One of 1000 points is best, and 60 are looked at.
    def gap(kind: str, seed: int) -> float:
        points = seen(kind, [TENTHS] * 3, 60, seed=seed)
        return min(sum(abs(x - 0.4) for x in point) for point in points)

    tpe = sum(gap("optuna", seed) for seed in range(5))
    chance = sum(gap("random", seed) for seed in range(5))
    assert tpe < chance


@pytest.mark.parametrize(
    ("most", "batches"),
    [(3, [3]), (6, [4, 1, 1]), (14, [4] + [1] * 10), (17, [5] + [1] * 12), (40, [10] + [1] * 30)],
)
def test_tpe_begins_with_a_third_at_random(most: int, batches: list[int]) -> None:
    asked: list[int] = []

    def score(batch: Sequence[Any]) -> list[float]:
        asked.append(len(batch))
        return [1.0] * len(batch)

    explore(propose("optuna", [TENTHS] * 2, most), score)
    assert asked == batches


def test_tpe_heeds_the_scores_from_the_second_batch_on() -> None:
    def first(sign: float, seed: int) -> list[Any]:
        found: list[Any] = []

        def score(batch: Sequence[Any]) -> list[float]:
            found.extend(batch)
            return [sign * point[0] for point in batch]

        explore(propose("optuna", [range(1000)], 5, seed=seed), score)
        return found

    up, down = ([first(sign, seed) for seed in range(5)] for sign in (1.0, -1.0))
    assert [row[:4] for row in up] == [row[:4] for row in down]
    assert [row[4] for row in up] != [row[4] for row in down]


def test_tpe_knows_which_numbers_are_neighbours_however_they_are_listed() -> None:
    turned = [TENTHS[::-1], (*TENTHS[5:], *TENTHS[:5])]
    assert seen("optuna", turned, 25) == seen("optuna", [TENTHS] * 2, 25)


def test_tpe_out_of_patience_draws_at_random_and_the_same_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_PATIENCE", 1)
    found = seen("optuna", [TENTHS] * 2, 90)
    assert len(set(found)) == len(found) == 90
    assert seen("optuna", [TENTHS] * 2, 90) == found


def test_what_does_not_fit_the_axes_or_the_batch_is_refused() -> None:
    for first in ((0.1,), (0.1, 0.2, 0.3), (0.1, 0.25)):
        with pytest.raises(ValueError, match=r"zip|not in"):
            seen("grid", [TENTHS] * 2, first=[first])
    for few in (0, 3, 5):
        points = propose("optuna", [TENTHS] * 2, 6)
        with pytest.raises(ValueError, match="zip"):
            explore(points, lambda batch, few=few: [0.5] * few)  # type: ignore[misc]


def test_none_ends_the_search() -> None:
    asked: list[Any] = []
    explore(propose("grid", [(1, 2, 3)]), lambda batch: asked.extend(batch))  # type: ignore[arg-type,func-returns-value]
    assert asked == [(1,)]


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert seen("random", [(1.0, 2.0)])
    with pytest.raises(MissingExtraError) as caught:
        seen("optuna", [(1.0, 2.0)])
    assert str(caught.value) == ("search='optuna' needs Optuna: pip install 'peft-himerge[sweep]'.")


SAME = """
import importlib, sys, types
# The room alone, without torch, which takes seconds to load.
sys.modules["peft_himerge"] = package = types.ModuleType("peft_himerge")
package.__path__ = [sys.argv[1]]
import optuna
from peft_himerge.sampler import explore, propose
level = optuna.logging.get_verbosity()
axes, found = [[0.1, 0.2, 0.5, 0.7], [1, 2, 3, 4], ["x", "y"]], []
explore(propose("optuna", axes, 25, seed=4), lambda b: found.extend(b) or [p[0] for p in b])
print(found)
assert optuna.logging.get_verbosity() == level
"""


def test_the_same_in_every_process() -> None:
    package = Path(peft_himerge.__file__).parent
    first = run_python(SAME, package, PYTHONHASHSEED="1")
    assert first.count("(") == 25
    assert first == run_python(SAME, package, PYTHONHASHSEED="2")
