"""Greedy soup, MAP and coefficient search, against naive dense versions on known scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fake_scorer import FakeScorer, closeness, scorer_of
from hypothesis import given
from hypothesis import strategies as st
from stacks import deltas, random_stack
from torch import Tensor

from peft_himerge.errors import ConfigError, MissingExtraError
from peft_himerge.methods.registry import Fitted, get_method
from peft_himerge.methods.stack import Stack
from peft_himerge.methods.surrogate import fit, nondominated, spread, unknowns

MODULES = ("model.layers.0.proj", "model.layers.1.proj", "lm_head")
Row = Sequence[int | None]


def model(*rows: Row, weights: Sequence[float] | None = None, seed: int = 0) -> list[Stack]:
    return [
        random_stack(row, 6 + i, 5 + 2 * i, seed=10 * seed + i, module=m, weights=weights)
        for i, (row, m) in enumerate(zip(rows, MODULES, strict=False))
    ]


TWO = model([2, 3], [1, None], [None, 2])
THREE = model([2, 3, 1], [1, None, 2], [None, 2, 2])
EIGHT = model([1, 2, 1, 2, 1, 3, 1, 2], [2, None, 1, 1, None, 2, 1, 1])
CASES = {"two": TWO, "three": THREE, "eight": EIGHT}


def fitted(name: str, stacks: Sequence[Stack], scorer: FakeScorer, **options: Any) -> Fitted:
    found = get_method(name).function(stacks, scorer, **options)
    assert isinstance(found, Fitted)
    assert json.loads(json.dumps(found.report, allow_nan=False)) == found.report
    return found


def dense(found: Fitted, stacks: Sequence[Stack]) -> dict[str, Tensor]:
    return {module: delta.dense().double() for module, delta in found.run(stacks)}


def mixed(stacks: Sequence[Stack], coefficients: Sequence[float]) -> dict[str, Tensor]:
    return {
        s.module: torch.stack([c * d for c, d in zip(coefficients, deltas(s), strict=True)]).sum(0)
        for s in stacks
    }


def unweighted(stacks: Sequence[Stack]) -> list[Stack]:
    return [dataclasses.replace(s, weights=(1.0,) * len(s.names)) for s in stacks]


def value(stacks: Sequence[Stack], state: dict[str, Tensor], mix: float = 0.3) -> dict[str, float]:
    return {n: float(np.mean(rule(state))) for n, rule in closeness(stacks, mix).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for module in one:
        torch.testing.assert_close(one[module], two[module], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- greedy soup


def naive_soup(stacks: Sequence[Stack], mix: float) -> tuple[list[str], dict[str, Tensor]]:
    names, weights = stacks[0].names, stacks[0].weights
    bare = unweighted(stacks)

    def average(kept: Sequence[int]) -> dict[str, Tensor]:
        total = sum(weights[i] for i in kept)
        return mixed(bare, [weights[i] / total if i in kept else 0.0 for i in range(len(names))])

    def mean(kept: Sequence[int]) -> float:
        return float(np.mean([*value(stacks, average(kept), mix).values()]))

    order = sorted(range(len(names)), key=lambda i: -mean([i]))
    kept = order[:1]
    for i in order[1:]:
        if mean([*kept, i]) >= mean(kept):
            kept = [*kept, i]
    return sorted(names[i] for i in kept), average(kept)


@pytest.mark.parametrize("mix", [-0.2, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_greedy_soup_is_the_naive_loop(case: str, mix: float, weighted: bool) -> None:
    stacks = CASES[case]
    if weighted:
        weights = tuple(0.5 + 0.3 * i for i in range(len(stacks[0].names)))
        stacks = [dataclasses.replace(s, weights=weights) for s in stacks]
    scorer = scorer_of(stacks, mix=mix)
    found = fitted("greedy_soup", stacks, scorer)
    kept, want = naive_soup(stacks, mix)
    assert found.report["kept"] == kept
    same(dense(found, stacks), want)
    count = len(stacks[0].names)
    assert scorer.count <= count * (2 * count - 1)
    assert found.report["scores_computed"] == scorer.count
    assert found.report["objective"] == pytest.approx(
        np.mean([row["value"] for row in found.report["scores"].values()])
    )


def test_greedy_soup_tries_in_the_order_of_the_adapters_own_scores() -> None:
    # On the wanted sum of all three, each in turn: b is best, then c, then a, which is dropped.
    scores = {("b",): 3.0, ("c",): 2.0, ("a",): 1.0, ("b", "c"): 3.0, ("a", "b", "c"): 2.9}
    stacks = THREE
    parts = {s.module: deltas(s) for s in stacks}

    def rule(state: Any) -> float:
        module = MODULES[0]
        table = torch.stack([p.flatten() for p in parts[module]], 1)
        found = torch.linalg.lstsq(table, state[module].flatten()[:, None]).solution.flatten()
        kept = tuple(n for n, c in zip("abc", found.tolist(), strict=True) if c > 1e-6)
        return scores[kept]

    rules = dict.fromkeys("abc", rule)
    scorer = FakeScorer(rules, {s.module: s.shape for s in stacks})
    found = fitted("greedy_soup", stacks, scorer)
    assert found.report["order"] == ["b", "c", "a"]
    assert found.report["kept"] == ["b", "c"]  # an equal score stays
    assert found.report["coefficients"] == {"a": 0.0, "b": 0.5, "c": 0.5}
    assert [t["adapters"] for t in found.report["tried"]][3:] == [["b", "c"], ["b", "c", "a"]]
    only = {"a": 0.0, "b": 0.0, "c": 1.0}
    assert fitted("greedy_soup", stacks, scorer, objective=only).report["kept"] == ["b", "c"]


def test_greedy_soup_refuses_weights_that_make_no_average() -> None:
    stacks = model([2, 3], [1, 2], weights=[1.0, -1.0])
    with pytest.raises(ConfigError, match=r"adapter 'b' has the weight -1\.0"):
        fitted("greedy_soup", stacks, scorer_of(TWO))


# --------------------------------------------------------------------------------------------- MAP


def best_in_box(stacks: Sequence[Stack], shares: dict[str, float], steps: int) -> float:
    """Return the highest weighted score over a grid of the box [0, 1]^M, by brute force."""
    axis = [i / steps for i in range(steps + 1)]
    best = -math.inf
    for c in itertools.product(axis, repeat=len(stacks[0].names)):
        scores = value(stacks, mixed(stacks, c))
        best = max(best, sum(shares[n] * scores[n] for n in shares))
    return best


@pytest.mark.parametrize(
    ("case", "prefer", "steps"),
    [
        ("two", "mean", 40),
        ("two", {"a": 1.0, "b": 3.0}, 40),
        ("three", "mean", 10),
        ("three", {"c": 2.0}, 10),
    ],
)
def test_map_finds_what_brute_force_finds(case: str, prefer: Any, steps: int) -> None:
    stacks = CASES[case]
    names = stacks[0].names
    weights = dict.fromkeys(names, 1.0) if prefer == "mean" else prefer
    shares = {n: w / sum(weights.values()) for n, w in weights.items()}
    scorer = scorer_of(stacks, ["guard"])
    found = fitted("map", stacks, scorer, prefer=prefer)
    report = found.report
    # The scores are quadratic, so the surrogate is exact, and only the top is to be found.
    assert max(report["surrogate_error"]["fitted"].values()) < 1e-8
    assert max(report["surrogate_error"]["scored"].values()) < 1e-8
    want = best_in_box(stacks, shares, steps)
    spread_of = abs(want - best_in_box(stacks, shares, 1))
    assert report["objective"] >= want - 0.01 * spread_of
    state = mixed(stacks, [*report["coefficients"].values()])
    same(dense(found, stacks), state)
    told = {n: report["scores"][n]["value"] for n in names}
    assert told == pytest.approx(value(stacks, state))
    assert "guard" in report["scores"]
    assert "guard" not in report["front"][0]["scores"]
    count = len(names)
    assert scorer.count <= count * ((count + 1) * (count + 2) + 10) + 1


def test_map_of_eight_comes_close_to_the_best_there_is() -> None:
    weights = tuple(0.4 + 0.3 * i for i in range(8))
    stacks = [dataclasses.replace(s, weights=weights) for s in EIGHT]
    scorer = scorer_of(EIGHT, mix=0.1)
    report = fitted("map", stacks, scorer).report
    assert scorer.count <= 8 * (90 + 10)
    # Least squares: the mean squared distance to all targets is least at the mean of the targets.
    flat = torch.cat([torch.stack(deltas(s)).flatten(1) for s in unweighted(stacks)], 1)
    mean_target = (1.0 / 8 + 0.1) * flat.sum(0)
    table = flat * torch.tensor(weights, dtype=torch.float64)[:, None]
    best = torch.linalg.lstsq(table.t(), mean_target[:, None]).solution.flatten()
    assert 0.0 <= float(best.min()) <= float(best.max()) <= 1.0
    top, base = (
        np.mean([*value(EIGHT, mixed(stacks, c), 0.1).values()]) for c in (best.tolist(), [0.0] * 8)
    )
    assert base + 0.99 * (top - base) <= report["objective"] <= top + 1e-9


def test_the_front_of_map_is_a_front() -> None:
    stacks = THREE
    report = fitted("map", stacks, scorer_of(stacks), points=20).report
    rows = [[p["scores"][n]["value"] for n in "abc"] for p in report["front"]]
    assert len(rows) >= 10
    for one, two in itertools.permutations(rows, 2):
        assert not (all(x >= y for x, y in zip(one, two, strict=True)) and one != two)
    for point in report["front"]:
        c = [*point["coefficients"].values()]
        assert all(0.0 <= x <= 1.0 for x in c)
        want = value(stacks, mixed(stacks, c))
        assert {n: point["scores"][n]["value"] for n in "abc"} == pytest.approx(want)
        assert point["scores"]["a"]["se"] is not None
    # Each task's own best is on it, and no sampled point beats it.
    alone = [value(stacks, mixed(stacks, [float(i == j) for j in range(3)])) for i in range(3)]
    for i, name in enumerate("abc"):
        assert max(row[i] for row in rows) >= max(a[name] for a in alone) - 1e-9


def test_map_covers_the_true_front_of_two_tasks() -> None:
    """Of a fine grid's front, no point is far from one that was found."""
    stacks = TWO
    axis = [i / 40 for i in range(41)]
    grid = [value(stacks, mixed(stacks, c)) for c in itertools.product(axis, repeat=2)]
    table = torch.tensor([[g["a"], g["b"]] for g in grid], dtype=torch.float64)
    true = table[nondominated(table)]
    report = fitted("map", stacks, scorer_of(stacks), points=20).report
    found = torch.tensor(
        [[p["scores"][n]["value"] for n in "ab"] for p in report["front"]], dtype=torch.float64
    )
    reach = true.max(0).values - true.min(0).values
    nearest = torch.cdist(true / reach, found / reach).min(dim=1).values
    assert float(nearest.max()) < 0.15


@pytest.mark.parametrize("link", ["sigmoid", "softplus"])
def test_links_fit_scores_of_their_range(link: str) -> None:
    draw = torch.Generator().manual_seed(3)
    points = torch.rand(40, 2, generator=draw, dtype=torch.float64)

    def truth(c: Tensor) -> Tensor:
        one = 1.0 + 2.0 * c[:, 0] - 3.0 * c[:, 1] ** 2
        two = -0.5 + c[:, 0] * c[:, 1] - c[:, 0] ** 2
        x = torch.stack([one, two], 1)
        return x.sigmoid() if link == "sigmoid" else -torch.log1p(x.exp())

    # softplus turns x into -log(1 + exp(-x)): the same family with the sign of x turned.
    surrogate = fit(points, truth(points), link)
    fresh = torch.rand(50, 2, generator=draw, dtype=torch.float64)
    assert float((surrogate(fresh) - truth(fresh)).abs().max()) < 1e-4
    plain = fit(points, truth(points), "identity")
    assert float((plain(fresh) - truth(fresh)).abs().max()) > 1e-3


def test_scores_that_do_not_fit_the_link_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"link='sigmoid' is for scores between 0 and 1; task"):
        fitted("map", TWO, scorer_of(TWO), link="sigmoid")
    shapes = {s.module: s.shape for s in TWO}
    positive = FakeScorer({"a": lambda s: 0.5, "b": lambda s: 0.5}, shapes)
    with pytest.raises(ConfigError, match=r"link='softplus' is for scores between -inf and 0"):
        fitted("map", TWO, positive, link="softplus")
    flat = fitted("map", TWO, positive, link="sigmoid")
    assert flat.report["coefficients"] == {"a": 1.0, "b": 0.0}  # of equal points the first


def test_map_takes_as_many_samples_as_it_is_told() -> None:
    assert [unknowns(n) for n in (1, 2, 3, 8)] == [3, 6, 10, 45]
    scorer = scorer_of(TWO)
    fitted("map", TWO, scorer, samples=6, points=1)
    assert scorer.count == 2 * 7
    wide = fitted("map", TWO, scorer_of(TWO, mix=2.0), high=3.0).report
    assert 1.0 < max(wide["coefficients"].values()) <= 3.0


@given(
    st.lists(
        st.lists(st.integers(0, 4).map(float), min_size=3, max_size=3), min_size=1, max_size=12
    )
)
def test_nondominated_is_the_naive_double_loop(rows: list[list[float]]) -> None:
    def beaten(one: list[float]) -> bool:
        return any(
            two != one and all(y >= x for x, y in zip(one, two, strict=True)) for two in rows
        )

    got = nondominated(torch.tensor(rows, dtype=torch.float64)).tolist()
    assert got == [not beaten(row) for row in rows]


def test_spread_takes_the_ends_first_and_then_the_gaps() -> None:
    scores = torch.tensor([[0.0, 10.0], [1.0, 9.9], [5.0, 5.0], [5.1, 4.9], [10.0, 0.0]])
    assert spread(scores, 3, [0, 4, 0]) == [0, 4, 2]
    assert sorted(spread(scores, 9, [4])) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------- coefficient search

GRID = (0.0, 0.5, 1.0)


def test_grid_search_is_the_naive_loop() -> None:
    scorer = scorer_of(THREE, ["guard"])
    options: dict[str, Any] = {"values": GRID, "sampler": "grid", "budget": 300}
    found = fitted("coefficient_search", THREE, scorer, **options)
    best, top = None, -math.inf
    for c in itertools.product(GRID, repeat=3):
        mean = float(np.mean([*value(THREE, mixed(THREE, c)).values()]))
        if any(c) and mean > top:
            best, top = c, mean
    assert tuple(found.report["weights"].values()) == best
    assert found.report["objective"] == pytest.approx(top)
    same(dense(found, THREE), mixed(THREE, best))
    assert len(found.report["tried"]) == 26
    assert scorer.count == 26 * 3 + 1  # and the guard, once
    assert [t["weights"]["a"] for t in found.report["tried"]][:2] == [0.5, 1.0]  # equal ones first


@pytest.mark.parametrize("sampler", ["grid", "random", "optuna"])
def test_options_of_the_base_method_are_searched_too(sampler: str) -> None:
    stacks = model([2, 3], [1, 2], weights=[1.0, 0.5], seed=2)
    choices = {"density": (0.2, 0.5, 1.0), "merge": ("sum",)}
    found = fitted(
        "coefficient_search",
        stacks,
        scorer_of(unweighted(stacks)),
        **{"base": "ties", "values": (0.5, 1.0), "choices": choices},
        **{"sampler": sampler, "budget": 24},
    )
    ties, best, top = get_method("ties").function, None, -math.inf
    for a, b, density in itertools.product((0.5, 1.0), (0.5, 1.0), choices["density"]):
        weights = (a * 1.0, b * 0.5)
        here = [dataclasses.replace(s, weights=weights) for s in stacks]
        state = {m: d.dense().double() for m, d in ties(here, density=density, merge="sum")}
        mean = float(np.mean([*value(unweighted(stacks), state).values()]))
        if mean > top:
            best, top = state, mean
    # 12 points at 2 scores each: the budget is the whole space, so every sampler finds the best.
    assert len(found.report["tried"]) == 12
    assert found.report["objective"] == pytest.approx(top)
    assert found.report["options"]["merge"] == "sum"
    assert best is not None
    same(dense(found, stacks), best)


def test_points_that_give_the_same_deltas_are_scored_once() -> None:
    stacks = [random_stack([2, None], 5, 4, module="lm_head")]  # b changes nothing
    scorer = scorer_of(stacks)
    found = fitted("coefficient_search", stacks, scorer, values=GRID, sampler="grid")
    assert len(found.report["tried"]) == 8
    assert scorer.count == 2 * 3  # three weights of a, on two tasks


def test_the_budget_is_kept() -> None:
    for sampler in ("random", "optuna"):
        for budget in (8, 50, 99):
            scorer = scorer_of(EIGHT)
            options: dict[str, Any] = {"sampler": sampler, "budget": budget}
            found = fitted("coefficient_search", EIGHT, scorer, **options)
            assert budget - 8 < scorer.count <= budget
            assert len(found.report["tried"]) == budget // 8


def test_optuna_finds_more_than_chance() -> None:
    def top(sampler: str, seed: int) -> float:
        # The best coefficients are about 0.4 divided by these, far from equal.
        weights = (1.0, 0.5, 2.0)
        stacks = [dataclasses.replace(s, seed=seed, weights=weights) for s in THREE]
        options: dict[str, Any] = {"values": tuple(i / 10 for i in range(1, 16)), "budget": 120}
        scorer = scorer_of(THREE, mix=0.1)
        found = fitted("coefficient_search", stacks, scorer, sampler=sampler, **options)
        return float(found.report["objective"])

    assert sum(top("optuna", s) for s in range(3)) > sum(top("random", s) for s in range(3))


# ------------------------------------------------------------------------------------- objectives


def test_kept_divides_by_what_each_adapter_wins_alone() -> None:
    stacks, scale = TWO, 1000.0
    plain = closeness(stacks)
    rules = {"a": plain["a"], "b": lambda s: [scale * x for x in plain["b"](s)]}
    shapes = {s.module: s.shape for s in stacks}
    options: dict[str, Any] = {"values": GRID, "sampler": "grid"}
    kept = fitted(
        "coefficient_search", stacks, FakeScorer(rules, shapes), objective="kept", **options
    )
    unit = fitted("coefficient_search", stacks, scorer_of(stacks), objective="kept", **options)
    assert kept.report["weights"] == unit.report["weights"]
    assert kept.report["objective"] == pytest.approx(unit.report["objective"])
    base = value(stacks, mixed(stacks, [0.0, 0.0]))
    alone = {
        n: value(stacks, mixed(stacks, [float(n == "a"), float(n == "b")]))[n] for n in ("a", "b")
    }
    merged = value(stacks, mixed(stacks, [*unit.report["weights"].values()]))
    want = np.mean([(merged[n] - base[n]) / (alone[n] - base[n]) for n in ("a", "b")])
    assert unit.report["objective"] == pytest.approx(want)
    mean = fitted("coefficient_search", stacks, FakeScorer(rules, shapes), **options)
    assert mean.report["weights"] != kept.report["weights"]


def test_kept_needs_adapters_that_win_something() -> None:
    rules = {"a": closeness(TWO)["a"], "b": lambda s: 0.0}
    scorer = FakeScorer(rules, {s.module: s.shape for s in TWO})
    with pytest.raises(ConfigError, match="objective='kept' divides by what adapter 'b' wins"):
        fitted("greedy_soup", TWO, scorer, objective="kept")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("greedy_soup", {"objective": "men"}, "Did you mean 'mean'"),
        ("greedy_soup", {"objective": {"x": 1.0}}, "objective names the adapter 'x'"),
        ("greedy_soup", {"objective": {"a": -1.0}}, r"objective\['a'\] must be"),
        ("greedy_soup", {"objective": {"a": 0.0}}, "gives no task any weight"),
        ("map", {"samples": 5}, "samples must be at least 6"),
        ("map", {"samples": 6.0}, "samples must be a whole number"),
        ("map", {"points": 0}, "points must be"),
        ("map", {"high": 0.0}, "high must be positive"),
        ("map", {"high": "x"}, "high must be a finite number"),
        ("map", {"link": "sigmoit"}, "Did you mean \"'sigmoid'\""),
        ("map", {"prefer": 3}, "prefer must be a name or adapter -> weight"),
        ("coefficient_search", {"base": "tie"}, "no merging method 'tie'"),
        ("coefficient_search", {"base_space": "knot"}, "base_space got 'knot'"),
        ("coefficient_search", {"base": "tsv_m", "base_space": "core"}, "not work entry by entry"),
        ("coefficient_search", {"base": "map"}, "base='map' is fitted to scores itself"),
        ("coefficient_search", {"base": "hi"}, "base='hi' is fitted to scores itself"),
        ("coefficient_search", {"base": "ties_peft"}, "needs the option 'density'"),
        ("coefficient_search", {"choices": {"lam": (1.0,)}}, "'cat' has no option 'lam'"),
        ("coefficient_search", {"values": ()}, "values must be a list"),
        ("coefficient_search", {"values": 0.5}, "values must be a list"),
        ("coefficient_search", {"values": (0.5, "x")}, "values must be a finite number"),
        ("coefficient_search", {"values": (0.5, 0.5)}, "more than once"),
        ("coefficient_search", {"values": (0.0,)}, "nothing but 0"),
        ("coefficient_search", {"base": "ties", "choices": {"density": 0.5}}, "choices"),
        ("coefficient_search", {"sampler": "tpe"}, "sampler got 'tpe'"),
        ("coefficient_search", {"budget": 1}, "at least 2 scores"),
        ("coefficient_search", {"budget": 5, "objective": "kept"}, "at least 6 scores"),
        ("coefficient_search", {"sampler": "grid", "budget": 49}, "25 points, which take 50"),
    ],
)
def test_options_that_are_not_allowed_are_refused_before_any_score(
    name: str, options: dict[str, Any], text: str
) -> None:
    scorer = scorer_of(TWO)
    with pytest.raises(ConfigError, match=text):
        fitted(name, TWO, scorer, **options)
    assert scorer.count == 0


def test_optuna_missing_is_said_before_any_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    scorer = scorer_of(TWO)
    with pytest.raises(MissingExtraError, match="sampler='optuna' needs Optuna"):
        fitted("coefficient_search", TWO, scorer, sampler="optuna")
    assert scorer.count == 0
