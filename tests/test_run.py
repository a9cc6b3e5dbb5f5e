"""The steps of a merge, with a table of scores in place of a model, against the rules by hand."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import paper
from stacks import drawn

from peft_himerge import Edit, HiMergeConfig, MergePlan
from peft_himerge.combine import Combiner
from peft_himerge.conflict import (
    Conflict,
    ConflictKind,
    Resolution,
    find,
    rank,
    resolve,
    tries,
)
from peft_himerge.contribution import Contribution
from peft_himerge.cost import estimate
from peft_himerge.errors import ConfigError, ExportError
from peft_himerge.events import ContributionsMeasured, Event, LayerResolved, MergeStarted
from peft_himerge.factors import Adapter, LoraFactors
from peft_himerge.plan import DROP, IDENTITY
from peft_himerge.run import Run
from peft_himerge.scoring import Score, Task, read_score
from peft_himerge.search import GRID, Trial, best, search_edit

FIXED: dict[str, Any] = {"density": 0.5, "scale": 0.75}
LAYERS = ["h.0", "h.1", "h.2"]
Rule = Callable[[str, "MergePlan | str"], Any]


class Table:
    """An engine that looks scores up by a rule, and notes what was new, in which step."""

    def __init__(self, rule: Rule, total: int = 99) -> None:
        self.rule, self.total = rule, total
        self.steps: list[str] = []
        self.batches: list[tuple[str, list[tuple[str, MergePlan | str]]]] = []
        self.known: dict[tuple[str, str], Score] = {}

    def begin(self, step: str) -> None:
        self.steps.append(step)

    def score(self, task: str, state: MergePlan | str) -> Score:
        return self.score_many([(task, state)])[0]

    def score_many(self, requests: Sequence[tuple[str, MergePlan | str]]) -> list[Score]:
        new = {key(*request): request for request in requests}
        new = {where: request for where, request in new.items() if where not in self.known}
        if new:
            self.batches.append((self.steps[-1], list(new.values())))
        for where, (task, state) in new.items():
            self.known[where] = read_score(self.rule(task, state), Task(task, lambda _: None))
        return [self.known[key(*request)] for request in requests]

    def scored_in(self, step: str) -> list[tuple[str, MergePlan | str]]:
        """What was new in one step, if it was asked for in one go."""
        (batch,) = [new for name, new in self.batches if name == step]
        return batch


def key(task: str, state: MergePlan | str) -> tuple[str, str]:
    return (task, state if isinstance(state, str) else state.fingerprint)


def states_of(requests: Iterable[tuple[str, MergePlan | str]]) -> set[tuple[str, str]]:
    return {key(*request) for request in requests}


def chance(seed: int, values: int = 9) -> Rule:
    """A score per task and state out of few, so that ties are common; sums of them are exact."""

    def rule(task: str, state: MergePlan | str) -> float:
        return random.Random(f"{seed}|{key(task, state)}").randrange(values) / 8

    return rule


def worth(**tasks: dict[str, dict[str, float]]) -> Rule:
    """Score by what is live: task -> "layer/adapter" -> {scale there: score it adds}."""

    def rule(task: str, state: MergePlan | str) -> float:
        assert isinstance(state, MergePlan)
        live = {f"{la}/{n}": state.adapters[n].scale * e.scale for la, n, e in state.live()}
        return sum(table.get(live.get(at, 0.0), 0.0) for at, table in tasks[task].items())

    return rule


class Watched(Combiner):
    """A combiner that notes which cuts were asked for ahead."""

    prepared: list[tuple[str, tuple[float, ...], str]]

    def prepare(self, adapter: str, densities: Iterable[float], scope: str = "model") -> None:
        self.prepared = getattr(self, "prepared", [])
        self.prepared.append((adapter, tuple(densities), scope))
        super().prepare(adapter, densities, scope)


def adapter(name: str, *modules: str, zero: bool = False, seed: int = 0) -> Adapter:
    factors = {}
    for i, module in enumerate(modules):
        one = drawn(10 * seed + i, 4, 3, 2)
        b = torch.zeros_like(one.b) if zero else one.b
        factors[module] = LoraFactors(one.a, b, 0.5, "embedding" if "embed" in module else "linear")
    return Adapter(name, factors)


def three(n: int = 2) -> Watched:
    """Adapters a, b, c (the first n) in three layers; b has nothing in the second."""
    everywhere = [f"{layer}.q" for layer in LAYERS]
    made = [
        adapter("a", *everywhere, seed=1),
        adapter("b", "h.0.q", "h.2.q", seed=2),
        adapter("c", *everywhere, seed=3),
    ]
    return Watched(made[:n])


def started(
    made: Combiner, config: HiMergeConfig, guards: Sequence[str] = ()
) -> tuple[Run, list[Event]]:
    heard: list[Event] = []
    own = [name for name in made.adapters if name not in guards]
    tasks = {n: Task(n, lambda _: None, guard=n in guards) for n in (*own, *guards)}
    return Run(made, tasks, config, (heard.append,)), heard


def merged(
    rule: Rule, config: HiMergeConfig, made: Combiner | None = None, guards: Sequence[str] = ()
) -> tuple[Run, Table, list[Event]]:
    run, heard = started(three() if made is None else made, config, guards)
    table = Table(rule)
    run.merge(table)  # type: ignore[arg-type]
    return run, table, heard


# ------------------------------------------------------------------------------ the rules by hand


class ByHand:
    """DESIGN 1.1 to 1.4, one score at a time, every one looked up by itself."""

    def __init__(
        self, rule: Rule, config: HiMergeConfig, made: Combiner, guards: Sequence[str]
    ) -> None:
        self.rule, self.config = rule, config
        self.own = [name for name in made.adapters if name not in guards]
        self.tasks = [*self.own, *guards]
        edits = {n: config.model_wise_edit(n) if n in self.own else DROP for n in made.adapters}
        self.plan = made.plan(edits, prune_scope=config.prune_scope)
        self.trials: list[Trial] = []
        self.resolutions: list[Resolution] = []
        if config.searches():
            self.search()
        self.model_wise = self.plan
        if len(self.own) > 1:
            self.repair()

    def values(self, plan: MergePlan) -> dict[str, float]:
        return {task: self.rule(task, plan) for task in self.tasks}

    def mean(self, plan: MergePlan) -> float:
        return sum(self.values(plan).values()) / len(self.tasks)

    def search(self) -> None:
        merged_too = self.config.search_target == "merged" and self.config.scale == "search"
        if merged_too and len(self.own) > 1:
            self.scale_together()
        for name in self.own:

            def value(edits: Sequence[Edit], name: str = name) -> list[float]:
                plans = [self.plan.with_adapter(name, edit) for edit in edits]
                if self.config.search_target == "own":
                    return [self.rule(name, plan.solo(name)) for plan in plans]
                return [self.mean(plan) for plan in plans]

            tried = search_edit(name, self.config, value, self.plan.adapters[name])
            self.trials += tried
            self.plan = self.plan.with_adapter(name, best(tried).edit)

    def scale_together(self) -> None:
        start, high = self.plan, -math.inf
        for scale in (0.3, 0.5, 0.7, 1.0, 1.25, 1.5):
            plan = start
            for name in self.own:
                plan = plan.with_adapter(name, Edit(start.adapters[name].density, scale))
            for name in self.own:
                self.trials.append(Trial(name, plan.adapters[name], self.mean(plan)))
            if self.mean(plan) > high:
                self.plan, high = plan, self.mean(plan)

    def row(self, layer: str, task: str, edited: MergePlan) -> Contribution:
        base = self.rule(task, MergePlan.base())

        def halves(whole: MergePlan) -> tuple[float, float]:
            alpha = self.rule(task, whole) - self.rule(task, whole.without(layer))
            return alpha, self.rule(task, whole.only(layer)) - base

        alone, together = halves(self.model_wise.solo(task)), halves(edited)
        sums = (sum(alone), sum(together), sum(alone) - sum(together))
        return Contribution(layer, task, *alone, *together, *sums)

    def conflict(self, layer: str) -> Conflict:
        gains = {
            n: abs(self.rule(n, self.model_wise.solo(n)) - self.rule(n, MergePlan.base()))
            for n in self.own
        }
        rows = [self.row(layer, task, self.plan) for task in self.own]
        return find(rows, self.config, gains, self.plan.edits[layer])

    def repair(self) -> None:
        for conflict in rank([self.conflict(layer) for layer in self.plan.edits]):
            layer, start = conflict.layer, self.plan
            if self.config.reanalyze == "each":
                conflict = self.conflict(layer)
            proposed = resolve(conflict, start, self.config)
            published = start.with_edits(layer, proposed)
            same = published.fingerprint == start.fingerprint
            if self.config.accept == "always":
                self.plan = published
            elif self.config.accept == "never" or same:
                pass
            elif self.config.accept == "no_regression":
                self.plan = published if self.mean(published) >= self.mean(start) else start
            elif self.wins(published, may_tie=True):
                self.plan = published
            if self.config.accept == "best":
                for name in start.edits[layer]:
                    self.climb(layer, name)
            self.resolutions.append(self.told(conflict, proposed, start, published))

    def climb(self, layer: str, name: str) -> None:
        edit = self.plan.edits[layer][name]
        top, high = self.plan, self.mean(self.plan)
        for factor in (0.0, 0.5, 1.5):
            tried = self.plan.with_edit(layer, name, Edit(edit.density, edit.scale * factor))
            if not edit.drops and self.mean(tried) > high:
                top, high = tried, self.mean(tried)
        if self.wins(top):
            self.plan = top

    def wins(self, plan: MergePlan, *, may_tie: bool = False) -> bool:
        won = self.mean(plan) - self.mean(self.plan)
        assert isinstance(self.config.tolerance, float)
        if self.config.tolerance > 0.0:
            return won > self.config.tolerance
        return won >= 0.0 if may_tie else won > 0.0

    def told(
        self, conflict: Conflict, proposed: dict[str, Edit], start: MergePlan, published: MergePlan
    ) -> Resolution:
        """What is said of the layer: the paper's edit unless another one was made."""
        if self.config.accept == "never":
            return Resolution(conflict, proposed, accepted=False)
        checked = self.config.accept != "always"
        unchanged = self.plan.fingerprint == start.fingerprint
        if not checked or (unchanged and published.fingerprint == start.fingerprint):
            return Resolution(conflict, proposed, bool(proposed))
        before = self.values(start)
        if self.plan == start:
            return Resolution(conflict, proposed, False, before, self.values(published))
        now, was = self.plan.edits[conflict.layer], start.edits[conflict.layer]
        changed = {n: edit for n, edit in now.items() if edit != was[n]}
        edits = proposed if self.plan == published else changed
        return Resolution(conflict, edits, True, before, self.values(self.plan))


@given(
    seed=st.integers(0, 10_000),
    values=st.sampled_from([2, 3, 9]),
    n=st.sampled_from([1, 2, 2, 3, 3]),
    guards=st.sampled_from([(), ("general",), ("c", "general")]),
    density=st.sampled_from([0.0, 0.5, 1.0, "search"]),
    scale=st.sampled_from([0.75, "search"]),
    target=st.sampled_from(["own", "merged"]),
    scope=st.sampled_from(["model", "layer"]),
    layer_density=st.sampled_from([None, 1.0]),
    reanalyze=st.sampled_from(["once", "each"]),
    accept=st.sampled_from(["always", "never", "no_regression", "best"]),
    partial=st.sampled_from(["degrader", "degraded"]),
    tolerance=st.sampled_from([0.0, 0.0, 0.125, 0.25]),
)
def test_every_decision_on_any_scores_is_the_one_made_by_hand(
    seed: int,
    values: int,
    n: int,
    guards: tuple[str, ...],
    density: Any,
    scale: Any,
    target: Any,
    scope: Any,
    layer_density: Any,
    reanalyze: Any,
    accept: Any,
    partial: Any,
    tolerance: float,
) -> None:
    config = paper(
        density=density,
        scale=scale,
        search_target=target,
        prune_scope=scope,
        layer_density=layer_density,
        reanalyze=reanalyze,
        accept=accept,
        partial_target=partial,
        tolerance=tolerance,
    )
    guards = tuple(name for name in guards if name != "c" or n == 3)
    made, rule = three(n), chance(seed, values)
    run, table, heard = merged(rule, config, made, guards)
    want = ByHand(rule, config, made, guards)
    assert run.trials == want.trials
    assert run.model_wise == want.model_wise
    assert run.plan == want.plan
    assert run.resolutions == want.resolutions
    resolved = [event for event in heard if isinstance(event, LayerResolved)]
    assert [event.resolution for event in resolved] == want.resolutions
    assert not resolved or resolved[-1].plan == want.plan
    assert {name: scores_of(row) for name, row in run.states.items()} == {
        "base": want.values(MergePlan.base()),
        **{name: want.values(want.model_wise.solo(name)) for name in made.adapters},
        "model_wise": want.values(want.model_wise),
        "merged": want.values(want.plan),
    }
    spent = Counter({step: 0 for step in table.steps})
    for step, new in table.batches:
        spent[step] += len(new)
    limits = {step.name: step.scores for step in run.cost().steps}
    assert all(spent[step] <= limits[step] for step in spent)


def scores_of(row: dict[str, Score]) -> dict[str, float]:
    return {task: score.value for task, score in row.items()}


# ---------------------------------------------------------------------------------- step by step


def test_steps_come_in_order_and_each_asks_for_its_scores_in_one_go() -> None:
    config = paper(**FIXED, accept="no_regression")
    run, table, _ = merged(chance(1), config, guards=("general",))
    assert table.steps == ["base", "alone", "analysis", "repair", "merged"]
    every, plan = ["a", "b", "general"], run.model_wise
    assert plan.adapters == {"a": Edit(0.5, 0.75), "b": Edit(0.5, 0.75)}
    assert table.scored_in("base") == [(task, MergePlan.base()) for task in every]
    alone = [(task, plan.solo(name)) for name in ("a", "b") for task in every]
    assert table.scored_in("alone") == [*alone, *((task, plan) for task in every)]
    analysis = {
        key(task, state)
        for task in ("a", "b")
        for whole in (plan.solo(task), plan)
        for layer in LAYERS
        for state in (whole.without(layer), whole.only(layer))
    }
    known = states_of([*table.scored_in("base"), *table.scored_in("alone")])
    assert states_of(table.scored_in("analysis")) == analysis - known
    repair = [new for step, new in table.batches if step == "repair"]
    tried = [r for r in run.resolutions if r.before]
    assert len(repair) == len(tried) > 0  # a layer's edit is scored on all tasks at once
    assert all([task for task, _ in new] == every for new in repair)
    assert "merged" not in [step for step, _ in table.batches]  # known since it was accepted


def test_the_merged_plan_is_scored_at_the_end_if_no_edit_was() -> None:
    run, table, _ = merged(chance(1), paper(**FIXED, accept="always"))
    assert [step for step, _ in table.batches] == ["base", "alone", "analysis", "merged"]
    assert any(resolution.accepted for resolution in run.resolutions)
    assert table.scored_in("merged") == [("a", run.plan), ("b", run.plan)]


def test_a_layer_judged_again_is_scored_again_in_one_go() -> None:
    config = paper(**FIXED, accept="always", reanalyze="each")
    run, table, _ = merged(chance(1), config)
    rows = [[r.conflict.gammas[task] for task in ("a", "b")] for r in run.resolutions]
    first = {layer: [c.gamma for c in run.contributions.of(layer)] for layer in LAYERS}
    told = [r.conflict.layer for r in run.resolutions]
    assert rows[0] == first[told[0]]
    assert rows[2] != first[told[2]]
    plan = run.model_wise.with_edits(told[0], run.resolutions[0].edits)
    repair = [new for step, new in table.batches if step == "repair"]
    again = [(task, state) for state in (plan, plan.without(told[1])) for task in ("a", "b")]
    assert states_of(again) == states_of(repair[0])
    assert len(repair) == 2  # nothing before the first edit


def test_climbing_scores_all_degrees_of_an_adapter_in_one_go() -> None:
    run, table, _ = merged(chance(5), paper(**FIXED, accept="best"))
    repair = [new for step, new in table.batches if step == "repair"]
    assert max(len(new) for new in repair) == 3 * 2  # degrees, tasks
    assert len(repair) <= len(LAYERS) + sum(map(len, run.plan.edits.values()))


def test_one_adapter_is_neither_analysed_nor_repaired() -> None:
    run, table, heard = merged(chance(1), paper(**FIXED, accept="best"), three(1))
    assert table.steps == ["base", "alone", "merged"]
    assert run.plan == run.model_wise != MergePlan.base()
    assert (len(run.contributions), run.resolutions, run.trials) == (0, [], [])
    assert list(run.states) == ["base", "a", "model_wise", "merged"]
    assert [type(event) for event in heard] == [MergeStarted]


def test_density_and_scale_may_differ_per_adapter() -> None:
    config = paper(density={"a": 0.5, "b": 1.0}, scale={"a": 0.75, "b": 0.25})
    run, _, _ = merged(chance(1), config)
    assert run.model_wise.adapters == {"a": Edit(0.5, 0.75), "b": Edit(1.0, 0.25)}


def test_an_adapter_of_zeros_takes_part_as_a_guard() -> None:
    zero = adapter("b", "h.0.q", "h.2.q", zero=True)
    made = Combiner([*three(1).adapters.values(), zero])
    run, _, heard = merged(chance(1), paper(**FIXED), made, ("b",))
    assert run.own == ["a"]
    assert run.plan.adapters == {"a": Edit(0.5, 0.75), "b": DROP}
    assert list(run.states) == ["base", "a", "b", "model_wise", "merged"]
    assert scores_of(run.states["b"]) == scores_of(run.states["base"])
    assert isinstance(heard[0], MergeStarted)
    assert (heard[0].adapters, heard[0].tasks) == (("a", "b"), ("a", "b"))


def test_every_listener_hears_every_event_in_order() -> None:
    made, config = three(), paper(**FIXED, accept="best", prune_scope="layer")
    order: list[tuple[int, Event]] = []
    run, _ = started(made, config, ("general",))
    run.listeners = (lambda e: order.append((1, e)), lambda e: order.append((2, e)))
    table = Table(chance(1), total=41)
    run.merge(table)  # type: ignore[arg-type]
    assert [who for who, _ in order] == [1, 2] * (2 + len(LAYERS))
    assert [event for who, event in order if who == 2] == [event for _, event in order[::2]]
    first, second, *resolved = [event for _, event in order[::2]]
    assert first == MergeStarted(
        ("a", "b"),
        ("a", "b", "general"),
        tuple(LAYERS),
        41,
        {name: made.adapters[name].digest() for name in ("a", "b")},
        config.model_dump(),
    )
    assert second == ContributionsMeasured(run.contributions)
    assert [(row.layer, row.task) for row in run.contributions] == [
        (layer, task) for layer in LAYERS for task in ("a", "b")
    ]
    plan = run.model_wise
    for event, resolution in zip(resolved, run.resolutions, strict=True):
        changed = resolution.edits if resolution.accepted else {}
        plan = plan.with_edits(resolution.conflict.layer, changed)
        assert isinstance(event, LayerResolved)
        assert (event.resolution, event.plan) == (resolution, plan)
    assert plan == run.plan != run.model_wise
    assert plan.prune_scope == "layer"


def test_cost_is_that_of_the_adapters_and_their_tasks_in_the_order_of_the_run() -> None:
    made = Combiner(
        [
            adapter("a", "embed_tokens", "h.0.q", "h.1.q"),
            adapter("b", "h.1.q", seed=1),
            adapter("c", "h.0.q", zero=True),
        ]
    )
    config = paper(**FIXED, accept="best")
    run, _ = started(made, config, ("c", "general"))
    holders = {"h.0": ("a", "c"), "h.1": ("a", "b"), "outside": ("a",)}
    order = ["outside", "h.0", "h.1"]
    assert run.layers == ["h.0", "h.1", "outside"]
    want = estimate(holders, ["a", "b"], ["c", "general"], config, order=order)
    assert run.cost() == want != estimate(holders, ["a", "b"], ["c", "general"], config)


# ------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("target", ["own", "merged"])
def test_search_scores_candidates_on_what_it_aims_at(target: Any) -> None:
    config = paper(density="search", scale=0.75, search_target=target, accept="always")
    run, table, _ = merged(chance(3), config, guards=("general",))
    assert table.steps[:3] == ["base", "search", "alone"]
    batches = [new for step, new in table.batches if step == "search"]
    assert [trial.adapter for trial in run.trials] == ["a"] * 10 + ["b"] * 10
    first, second = Edit(1.0, 0.75), best(run.trials[:10]).edit
    start = run.model_wise
    for name, other in (("a", first), ("b", second)):
        start = start.with_adapter("ab".replace(name, ""), other)
        plans = [start.with_adapter(name, Edit(p, 0.75)) for p in GRID]
        if target == "own":
            # All candidates at once, each scored on the adapter's own task, alone.
            assert states_of(batches.pop(0)) == {key(name, plan.solo(name)) for plan in plans}
        else:
            asked = {key(task, plan) for plan in plans for task in ("a", "b", "general")}
            assert asked <= set(table.known)
    assert run.model_wise.adapters == {"a": second, "b": best(run.trials[10:]).edit}


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_search_cuts_all_densities_of_a_look_in_one_pass(scope: Any) -> None:
    made = three(1)
    merged(chance(3), paper(density="search", scale=0.75, prune_scope=scope), made)
    assert made.prepared == [("a", GRID, scope)]


def test_search_by_optuna_cuts_for_the_whole_grid_ahead() -> None:
    made, config = three(), paper(search="optuna", search_budget=3, prune_scope="layer")
    merged(chance(3), config, made)
    for name in ("a", "b"):
        mine = [(densities, scope) for who, densities, scope in made.prepared if who == name]
        assert mine[0] == (GRID, "layer")
        assert len(mine) > 1
        assert all(len(densities) < 10 and scope == "layer" for densities, scope in mine[1:])


@pytest.mark.parametrize(
    "options", [{"search": "optuna", "density": 0.5}, {"search": "coarse", "density": "search"}]
)
def test_search_of_few_densities_cuts_for_those_alone(options: dict[str, Any]) -> None:
    made = three()
    merged(chance(3), paper(**options), made)
    assert made.prepared
    assert all(set(densities) < set(GRID) for _, densities, _ in made.prepared)


# ---------------------------------------------------------------------------- one layer's treatment


def treated(rule: Rule, accept: str, **options: Any) -> tuple[Run, Resolution]:
    """Two adapters in one layer, density 1; and what is done about the layer."""
    made = Combiner([adapter("a", "h.0.q", seed=1), adapter("b", "h.0.q", seed=2)])
    config = paper(**{"density": 1.0, "scale": 1.0, "accept": accept, **options})
    run, _, _ = merged(rule, config, made)
    (resolution,) = run.resolutions
    return run, resolution


# Alone each adapter does well on its task, together they do not: severe, and a has the more to win.
SEVERE = worth(
    a={"h.0/a": {1.0: 4.0}, "h.0/b": {1.0: -3.0, 1.5: -1.0, 0.5: -1.0}},
    b={"h.0/b": {1.0: 2.0}, "h.0/a": {1.0: -1.0}},
)


@pytest.mark.parametrize(
    ("accept", "row", "edits", "after"),
    [
        ("always", {"a": IDENTITY, "b": DROP}, {"a": IDENTITY, "b": DROP}, {}),
        (
            "no_regression",
            {"a": IDENTITY, "b": DROP},
            {"a": IDENTITY, "b": DROP},
            {"a": 4.0, "b": -1.0},
        ),
        ("best", {"a": IDENTITY, "b": DROP}, {"a": IDENTITY, "b": DROP}, {"a": 4.0, "b": -1.0}),
    ],
)
def test_an_edit_that_wins_is_taken(
    accept: str, row: dict[str, Edit], edits: dict[str, Edit], after: dict[str, float]
) -> None:
    run, resolution = treated(SEVERE, accept)
    assert resolution.conflict.kind is ConflictKind.SEVERE
    assert dict(run.plan.edits["h.0"]) == row
    assert resolution.edits == edits
    assert resolution.accepted
    assert resolution.before == ({"a": 1.0, "b": 1.0} if after else {})
    assert resolution.after == after


# Alone nobody gains in the layer; together a loses, so b offends.
PARTIAL = worth(
    a={"h.0/a": {1.0: 2.0, 0.5: 1.0, 1.5: 2.5}, "h.0/b": {1.0: -1.0, 0.5: -3.0, 1.5: -3.0}},
    b={"h.0/b": {1.0: 2.0, 1.5: 2.0}, "h.0/a": {1.0: 1.0, 0.5: 3.0}},
)


def test_an_edit_that_loses_is_undone_and_told_with_its_scores() -> None:
    run, resolution = treated(PARTIAL, "no_regression")
    assert resolution.conflict.kind is ConflictKind.PARTIAL
    assert resolution == Resolution(
        resolution.conflict,
        {"b": Edit(0.5, 0.5)},
        accepted=False,
        before={"a": 1.0, "b": 3.0},
        after={"a": -1.0, "b": 1.0},
    )
    assert run.plan == run.model_wise


def test_an_edit_by_degrees_is_told_in_place_of_the_one_that_lost() -> None:
    run, resolution = treated(PARTIAL, "best")
    assert resolution == Resolution(
        resolution.conflict,
        {"a": Edit(1.0, 0.5)},
        accepted=True,
        before={"a": 1.0, "b": 3.0},
        after={"a": 0.0, "b": 5.0},
    )
    assert dict(run.plan.edits["h.0"]) == {"a": Edit(1.0, 0.5), "b": IDENTITY}


def test_an_edit_by_degrees_must_rise_and_the_published_one_must_not_fall() -> None:
    flat = worth(a={"h.0/a": {1.0: 1.0}, "h.0/b": {1.0: -1.0}}, b={"h.0/b": {1.0: 1.0, 0.5: 0.0}})
    run, resolution = treated(flat, "best", layer_density=1.0)
    # a wins as much by the paper's edit of b as b loses: taken. No degree of either rises.
    assert dict(run.plan.edits["h.0"]) == {"a": IDENTITY, "b": Edit(1.0, 0.5)}
    assert resolution.edits == {"b": Edit(1.0, 0.5)}
    assert (resolution.before, resolution.after) == ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0})


@pytest.mark.parametrize(
    ("errors", "tries", "won", "kept"),
    [
        ("0.9se", 1, 1.0, True),
        ("1.1se", 1, 1.0, False),
        ("0.9se", 1000, 1.0, True),
        ("1.1se", None, 1.0, True),  # no more than an equal score is asked for
        ("auto", 1, 1.1, True),  # one standard error at least
        ("auto", 1, 0.9, False),
        ("auto", 100, 3.1, True),  # sqrt(2 ln 100) = 3.03
        ("auto", 100, 2.9, False),
    ],
)
def test_climbing_keeps_what_wins_more_than_its_paired_standard_errors(
    errors: str, tries: int | None, won: float, kept: bool
) -> None:
    # Four examples per task: the change wins 0.5 in the mean of the tasks, with differences of
    # 0.5 ± c. The standard error of a task's difference is c / sqrt(3), of the mean of both
    # c / sqrt(6); 0.5 is `won` of those.
    c = 0.5 * 6**0.5 / won
    swing = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64) * c
    run, _ = started(three(), HiMergeConfig(density=1.0, scale=1.0, tolerance=errors))
    run.plan = run.combiner.plan({"a": IDENTITY, "b": IDENTITY})
    changed = run.plan.with_edit("h.0", "a", Edit(1.0, 0.5))
    # Between examples they differ much more, which cancels: the states answer the same ones.
    apart = torch.tensor([0.0, 10.0, 20.0, 40.0], dtype=torch.float64)
    table = Table(lambda task, state: apart + (0.5 + swing if state == changed else 0.0))
    table.begin("repair")
    run._try(table, [changed], tries, rise=True)  # type: ignore[arg-type]
    assert (run.plan == changed) is kept


def test_climbing_by_standard_errors_needs_examples() -> None:
    run, _ = started(three(), HiMergeConfig(density=1.0, scale=1.0, tolerance="1se"))
    run.plan = run.combiner.plan({"a": IDENTITY, "b": IDENTITY})
    changed = run.plan.with_edit("h.0", "a", Edit(1.0, 0.5))
    table = Table(lambda task, state: 1.0 if state == changed else 0.0)
    table.begin("repair")
    with pytest.raises(ConfigError, match="tolerance='1se' needs per-example scores"):
        run._try(table, [changed], 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2])
def test_together_looks_for_one_scale_of_all_adapters(n: int) -> None:
    # b alone would like 1.5, and both together win most at 1.25.
    at = {0.3: 0.1, 0.5: 0.2, 0.7: 0.3, 1.0: 0.5, 1.25: 0.6, 1.5: 0.4}
    rule = worth(a={"h.0/a": at}, b={"h.0/b": {**at, 1.5: 0.7}})
    config = HiMergeConfig(density=0.8, search="together", accept="never")
    run, table, _ = merged(rule, config, three(n))
    assert run.model_wise.adapters == dict.fromkeys("ab"[:n], Edit(0.8, 1.25))
    assert [trial.edit.scale for trial in run.trials] == sorted([*at] * n)
    spent = sum(len(new) for step, new in table.batches if step == "search")
    assert spent == 6 * n  # every scale on every task
    assert {step.name: step.scores for step in run.cost().steps}["search"] == 6 * n


@pytest.mark.parametrize(
    ("tolerance", "error", "want"),
    [
        ("auto", 0.05, 1.25),  # 1.5 wins 0.04 over 1.25 and 0.1 over 1
        ("auto", 0.03, 1.5),
        ("2.5se", 0.05, 1.0),
        ("2.5se", 0.03, 1.25),
        (0.0, 0.05, 1.5),
        (0.05, 0.5, 1.25),
        ("auto", None, 1.5),
    ],
)
def test_of_scales_that_are_alike_the_one_nearest_to_one_is_taken(
    tolerance: Any, error: float | None, want: float
) -> None:
    means = {0.3: 0.1, 0.5: 0.2, 0.7: 0.45, 1.0: 0.5, 1.25: 0.56, 1.5: 0.6}
    # Differences from the best scale swing, so that the mean over both tasks has this error.
    swing = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64) * 6**0.5 * (error or 0.0)

    def rule(task: str, state: MergePlan) -> Any:
        mean = means[state.adapters["a"].scale]
        return mean if error is None else mean + (swing if mean == 0.6 else 0.0 * swing)

    config = HiMergeConfig(density=1.0, search="together", tolerance=tolerance)
    run, _ = started(three(2), config)
    run.plan = run.combiner.plan({"a": IDENTITY, "b": IDENTITY})
    table = Table(rule)
    table.begin("search")
    run._search(table)  # type: ignore[arg-type]
    assert run.plan.adapters == dict.fromkeys("ab", Edit(1.0, want))


def test_never_judges_the_layers_and_leaves_them_as_they_are() -> None:
    fight = worth(a={"h.0/a": {1.0: 2.0}, "h.0/b": {1.0: -1.0}}, b={"h.0/b": {1.0: 1.0}})
    run, resolution = treated(fight, "never")
    assert resolution.conflict.kind is ConflictKind.PARTIAL
    assert resolution.edits
    assert not resolution.accepted
    assert (resolution.before, resolution.after) == ({}, {})
    assert run.plan.edits["h.0"] == {"a": IDENTITY, "b": IDENTITY}


def test_the_number_of_edits_that_are_tried() -> None:
    plan = three(3).plan(dict.fromkeys("abc", IDENTITY))
    # One by the paper and three degrees of each adapter: of three, two and three adapters.
    assert tries(plan) == (1 + 9) + (1 + 6) + (1 + 9)
    # What was dropped in a layer is not scaled there any more.
    assert tries(plan.with_edit("h.0", "c", DROP)) == tries(plan) - 3


def test_a_layer_nobody_loses_in_is_left_alone() -> None:
    fine = worth(a={"h.0/a": {1.0: 2.0}}, b={"h.0/b": {1.0: 2.0}})
    for accept in ("always", "no_regression", "best"):
        run, resolution = treated(fine, accept)
        assert resolution.conflict.kind is ConflictKind.MUTUAL
        assert resolution == Resolution(resolution.conflict, {}, accepted=False)
        assert run.plan == run.model_wise


def test_of_degrees_that_win_as_much_the_first_is_taken() -> None:
    tied = worth(
        a={"h.0/a": {1.0: 1.0}, "h.0/b": {0.5: 2.0, 1.5: 2.0}}, b={"h.0/b": {1.0: 0.0, 0.0: 0.0}}
    )
    run, resolution = treated(tied, "best")
    assert resolution.conflict.kind is ConflictKind.MUTUAL
    assert resolution.edits == {"b": Edit(1.0, 0.5)}
    assert dict(run.plan.edits["h.0"]) == {"a": IDENTITY, "b": Edit(1.0, 0.5)}


def test_layers_are_treated_by_what_they_lose() -> None:
    run, _, heard = merged(chance(1), paper(**FIXED))
    told = [r.conflict for r in run.resolutions]
    assert [c.Gamma for c in told] == sorted((c.Gamma for c in told), reverse=True)
    assert [c.layer for c in told] != LAYERS
    layers = [e.resolution.conflict.layer for e in heard if isinstance(e, LayerResolved)]
    assert layers == [c.layer for c in told]


@pytest.mark.parametrize("reanalyze", ["once", "each"])
def test_losses_count_in_units_of_what_the_adapter_wins_on_its_own_task(reanalyze: Any) -> None:
    def rule(task: str, state: MergePlan | str) -> float:
        assert isinstance(state, MergePlan)
        if not any(True for _ in state.live()):
            return {"a": 5.0, "b": 1.0}[task]
        if state.fingerprint == state.solo(task).fingerprint:
            return {"a": 3.0, "b": 5.0}[task]  # a loses 2, b wins 4
        return chance(2)(task, state)

    plain, _, _ = merged(rule, paper(**FIXED, reanalyze=reanalyze, accept="no_regression"))
    by_gain = paper(**FIXED, reanalyze=reanalyze, accept="no_regression", normalize="gain")
    found, _, _ = merged(rule, by_gain)
    assert found.contributions == plain.contributions
    for layer in LAYERS:
        rows = {row.task: row.gamma for row in found.contributions.of(layer)}
        gammas = next(r.conflict.gammas for r in found.resolutions if r.conflict.layer == layer)
        if reanalyze == "once":
            assert gammas == {"a": rows["a"] / 2.0, "b": rows["b"] / 4.0}
    assert found.resolutions == ByHand(rule, by_gain, three(), ()).resolutions


def test_an_adapter_that_wins_nothing_cannot_be_a_unit() -> None:
    def rule(task: str, state: MergePlan | str) -> float:
        return 0.5 if task == "b" else chance(1)(task, state)

    with pytest.raises(ConfigError) as caught:
        merged(rule, paper(**FIXED, normalize="gain"))
    assert str(caught.value) == (
        "normalize='gain' divides by what adapter 'b' wins on its own task, which is 0. Use "
        "normalize='none', or check the adapter and its eval function."
    )
    run, _, _ = merged(rule, paper(**FIXED, normalize="none"))
    assert len(run.resolutions) == 3


# ------------------------------------------------------------------------------------- the export


def exported(base: float, whole: float, score: float, limit: float | None) -> tuple[Run, Table]:
    """Score an exported adapter of a run whose tasks, a and a guard, have these mean scores."""
    run, _ = started(three(1), paper(**FIXED, max_export_drop=limit), ("general",))
    for state, mean in (("base", base), ("merged", whole)):
        run.states[state] = {
            task: read_score(mean + more, run.tasks[task])
            for task, more in (("a", 0.25), ("general", -0.25))
        }
    run.plan = run.combiner.plan({"a": Edit(0.5, 0.75)})
    return run, Table(lambda task, _: score + {"a": 1.0, "general": -1.0}[task])


@pytest.mark.parametrize(
    ("base", "whole", "score", "limit"),
    [
        (1.0, 3.0, 3.0, 0.0),
        (1.0, 3.0, 4.0, 0.0),
        (1.0, 3.0, 2.5, 0.25),  # exactly what is allowed
        (0.0, 3.0, 2.25, 0.25),
        (1.0, 3.0, -9.0, None),
        (1.0, 1.0, -9.0, 0.5),  # the merge won nothing that could be lost
        (3.0, 1.0, -9.0, 0.5),
    ],
)
def test_an_export_that_keeps_enough_is_scored_and_kept(
    base: float, whole: float, score: float, limit: float | None
) -> None:
    run, table = exported(base, whole, score, limit)
    run.score_export(table, "merged")  # type: ignore[arg-type]
    assert table.steps == ["exported"]
    assert table.batches == [("exported", [("a", "merged"), ("general", "merged")])]
    assert scores_of(run.states["exported"]) == {"a": score + 1.0, "general": score - 1.0}


def test_an_export_that_loses_too_much_is_refused_with_its_plan_and_its_scores() -> None:
    run, table = exported(1.0, 3.0, 2.25, 0.25)
    with pytest.raises(ExportError) as caught:
        run.score_export(table, "merged")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "the exported adapter loses 38% of what the merge had won (mean score 3.0000 merged, "
        "2.2500 exported, 1.0000 base); allowed: 25% (max_export_drop). Nothing was added to the "
        "model. Use a higher rank: apply_plan(model, error.plan, rank=...), rank='exact' loses "
        "nothing."
    )
    assert caught.value.plan is run.plan
    assert scores_of(run.states["exported"]) == {"a": 3.25, "general": 1.25}


def test_an_export_of_a_merge_that_hardly_won_is_judged_by_what_it_won() -> None:
    run, table = exported(1.0, 1.0 + 2.0**-20, 1.0, 0.5)
    with pytest.raises(ExportError, match="loses 100% of what the merge had won"):
        run.score_export(table, "merged")  # type: ignore[arg-type]


def test_a_run_begins_with_nothing_found() -> None:
    run, _ = started(three(), paper(**FIXED))
    assert run.plan == run.model_wise == MergePlan.base()
    found = dataclasses.replace(run)
    assert (found.trials, found.resolutions, found.states, len(found.contributions)) == (
        [], [], {}, 0,
    )  # fmt: skip
