"""`merge_adapters_hi` against the naive float64 oracle, and the arguments it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from paper import paper
from peft import PeftModel
from snapshot import bits, moved, snapshot

from peft_himerge import HiMergeConfig, MergePlan, MergeResult, apply_plan, merge_adapters_hi
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.conflict import resolve
from peft_himerge.errors import AdapterError, ConfigError, EvalError, MissingExtraError
from peft_himerge.hi import score_plans
from peft_himerge.plan import IDENTITY, Edit

FIXED = {"density": 0.4, "scale": 0.9}
NUMBERS = (
    "alpha_alone",
    "beta_alone",
    "alpha_merged",
    "beta_merged",
    "c_alone",
    "c_merged",
)


def case(kind: str, n: int) -> tuple[PeftModel, list[str], dict[str, Any]]:
    names = list(tiny.NAMES[:n])
    return tiny.peft_model(kind, n), names, tiny.eval_fns(kind, names)


def merge(model: PeftModel, names: list[str], fns: Mapping[str, Any], **options: Any) -> Any:
    config = paper(**{**FIXED, "max_export_drop": None, **options})
    return merge_adapters_hi(model, names, fns, config=config)


@pytest.fixture
def scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the oracle remember the scores of states it has seen: it is a pure function of them."""
    known: dict[Any, np.ndarray] = {}
    compute = oracle.score

    def score(model: Any, fn: Any, dense: Mapping[str, torch.Tensor]) -> np.ndarray:
        key = (id(model), id(fn), tuple((name, bits(d)) for name, d in sorted(dense.items())))
        if key not in known:
            known[key] = compute(model, fn, dense)
        return known[key]

    monkeypatch.setattr(oracle, "score", score)


def assert_same_deltas(result: MergeResult, want: Mapping[str, torch.Tensor]) -> None:
    assert want
    for module, expected in want.items():
        got = result.delta(module)
        assert got.shape == expected.shape
        lost = torch.linalg.vector_norm(got - expected)
        assert lost <= 1e-12 * torch.linalg.vector_norm(expected), module


def assert_agrees(
    result: MergeResult,
    want: oracle.OracleResult,
    gains: Mapping[str, float] | None = None,
    *,
    order: bool = True,
) -> None:
    """Compare every number of the method; the oracle has its gammas over the gain already."""
    rows = {(row.layer, row.task): row for row in result.contributions}
    assert rows.keys() == want.contributions.keys()
    for key, expected in want.contributions.items():
        unit = gains[expected.task] if gains else 1.0
        for name in NUMBERS:
            assert getattr(rows[key], name) == pytest.approx(getattr(expected, name), abs=1e-11)
        assert rows[key].gamma == pytest.approx(expected.gamma * unit, abs=1e-11)
        assert rows[key].gamma_se == pytest.approx(expected.gamma_se * unit, abs=1e-11)
    got = {r.conflict.layer: r for r in result.conflicts}
    assert got.keys() == want.conflicts.keys()
    if order:
        assert list(got) == list(want.conflicts)
    for layer, expected in want.conflicts.items():
        found = got[layer].conflict
        assert (layer, found.kind.value) == (layer, expected.kind)
        assert found.winner == expected.kept
        # Only who has a delta there can be pruned; the oracle names the others too.
        held = [name for name in expected.repruned if oracle.only(want.pruned[name], layer)]
        assert list(found.offenders) == held
        assert dict(found.gammas) == pytest.approx(expected.gammas, abs=1e-10)
        if got[layer].edits:
            assert got[layer].accepted == expected.accepted
        if expected.score_before is not None and got[layer].before:
            assert np.mean([*got[layer].before.values()]) == pytest.approx(expected.score_before)
            assert np.mean([*got[layer].after.values()]) == pytest.approx(expected.score_after)
    assert_same_deltas(result, want.deltas)


# ---------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_merge_of_any_architecture_equals_the_oracle(kind: str, n: int) -> None:
    model, names, fns = case(kind, n)
    want = oracle.hi_merge(model, fns, names, **FIXED)
    assert_agrees(merge(model, names, fns), want)


@pytest.mark.parametrize(("kind", "n"), [("qwen2", 3), ("gemma3", 2)])
def test_merge_with_embedding_and_tied_head_equals_the_oracle(kind: str, n: int) -> None:
    model, names, fns = case(kind, n)
    want = oracle.hi_merge(model, fns, names, **FIXED)
    assert_agrees(merge(model, names, fns), want)


OPTIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 2, {"reanalyze": "each", "accept": "no_regression"}),
    ("gpt2", 3, {"reanalyze": "each", "accept": "no_regression"}),
    ("bert", 2, {"reanalyze": "each"}),
    ("t5", 3, {"accept": "no_regression"}),
    ("llama", 2, {"prune_scope": "layer"}),
    ("gpt2", 2, {"prune_scope": "module"}),
    ("llama", 3, {"partial_target": "degraded"}),
    ("bert", 3, {"partial_target": "degraded", "reanalyze": "each"}),
    ("llama", 2, {"normalize": "gain"}),
    ("t5", 2, {"normalize": "gain"}),
    ("llama", 2, {"layer_density": 0.7, "layer_scale": 1.3}),
    ("gpt2", 2, {"layer_density": 0.05, "layer_scale": 0.0}),
    ("bert", 2, {"layer_density": 0.0, "prune_scope": "layer"}),
    ("gpt2", 2, {"density": {"zh": 0.2, "en": 1.0}, "scale": {"zh": 1.4, "en": 0.5}}),
    ("llama", 2, {"density": 1.0, "scale": 1.0}),
    ("llama", 2, {"strategy": "lazy"}),
]


@pytest.mark.usefixtures("scored_once")
@pytest.mark.parametrize(("kind", "n", "options"), OPTIONS)
def test_merge_with_options_equals_the_oracle(kind: str, n: int, options: dict[str, Any]) -> None:
    model, names, fns = case(kind, n)
    asked = {k: v for k, v in {**FIXED, **options}.items() if k != "strategy"}
    want = oracle.hi_merge(model, fns, names, **asked)
    result = merge(model, names, fns, **options)
    gains = None
    if options.get("normalize") == "gain":
        base, scores = result.scores["base"], result.scores
        gains = {name: abs(scores[name][name] - base[name]) for name in names}
    assert_agrees(result, want, gains)


@pytest.mark.parametrize("tolerance", [0.05, "2se", "1.5se"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_merge_with_tolerance_equals_the_oracle(kind: str, tolerance: float | str) -> None:
    model, names, fns = case(kind, 3)
    want = oracle.hi_merge(model, fns, names, **FIXED, tolerance=tolerance)
    result = merge(model, names, fns, tolerance=tolerance)
    # Within the tolerance a gamma is 0 for Gamma too; the oracle orders by the raw sums.
    assert_agrees(result, want, order=False)
    zeroed = sum(g == 0.0 for r in result.conflicts for g in r.conflict.gammas.values())
    assert zeroed > 0


def test_merge_with_gain_picks_the_winner_by_c_in_the_tasks_own_units() -> None:
    # One task speaks in units 1000 times larger; with normalize="gain" that must change nothing.
    model, names, fns = case("bert", 2)
    plain = merge(model, names, fns, normalize="gain")
    model, names, fns = case("bert", 2)
    loud = {"zh": fns["zh"], "en": lambda m: 1000.0 * fns["en"](m)}
    scaled = merge(model, names, loud, normalize="gain")
    assert any(r.conflict.winner for r in plain.conflicts)
    for one, other in zip(plain.conflicts, scaled.conflicts, strict=True):
        assert one.conflict.layer == other.conflict.layer
        assert one.conflict.winner == other.conflict.winner
        assert one.conflict.offenders == other.conflict.offenders


def test_accept_no_regression_counts_guard_tasks_as_the_oracle_does() -> None:
    model, names, fns = case("llama", 2)
    fns["general"] = tiny.eval_fns("llama", ["general"])["general"]
    want = oracle.hi_merge(model, fns, names, **FIXED, accept="no_regression")
    result = merge(model, names, fns, accept="no_regression")
    assert_agrees(result, want)
    assert {row.task for row in result.contributions} == set(names)
    assert all(set(row) == {*names, "general"} for row in result.scores.values())


@pytest.mark.parametrize("scope", ["model", "layer", "module"])
def test_thresholds_of_each_scope_equal_the_full_sort(scope: str) -> None:
    model, names, _ = case("llama", 3)
    combiner = Combiner(read_adapters(model, names))
    for name in names:
        state = oracle.deltas(model, name)
        for density in (0.1, 0.37, 0.9):
            want = oracle.thresholds(state, density, scope)
            for module in state:
                group = {"model": "model", "layer": oracle.layer_of(module), "module": module}
                got = combiner.cut(name, module, scope, density, 1.0)
                assert got == pytest.approx(want[group[scope]], rel=1e-14)


def test_scores_of_every_named_state_equal_the_oracles_table() -> None:
    model, names, fns = case("gpt2", 2)
    want = oracle.hi_merge(model, fns, names, **FIXED)
    result = merge(model, names, fns)
    states = {
        "base": {},
        "zh": want.pruned["zh"],
        "en": want.pruned["en"],
        "model_wise": oracle.plain_sum(want.pruned),
        "merged": want.deltas,
    }
    table = oracle.score_table(model, fns, states)
    for state, row in table.items():
        assert result.scores[state] == pytest.approx(row, abs=1e-12), state
    assert list(result.scores) == ["base", "en", "zh", "model_wise", "merged", "exported"]
    for state, row in result.standard_errors.items():
        for task, se in row.items():
            examples = result.states[state][task].examples
            assert se == pytest.approx(float(np.std(examples, ddof=1)) / math.sqrt(12))


def test_exported_scores_equal_those_of_the_adapter_switched_on_by_peft() -> None:
    model, names, fns = case("llama", 2)
    result = merge(model, names, fns, rank=4)
    model.set_adapter("merged")
    for task, fn in fns.items():
        assert result.scores["exported"][task] == float(fn(model).mean())
    assert result.scores["exported"] != result.scores["merged"]


# ------------------------------------------------------------------------------ kinds of scores


def test_eval_fns_that_return_floats_decide_the_same_without_errors() -> None:
    model, names, fns = case("llama", 2)
    rich = merge(model, names, fns)
    model, names, _ = case("llama", 2)
    floats = {name: lambda m, fn=fn: float(fn(m).mean()) for name, fn in fns.items()}
    bare = merge(model, names, floats)
    assert all(row.gamma_se is None for row in bare.contributions)
    assert all(row.gamma_se is not None for row in rich.contributions)
    assert bare.plan.fingerprint == rich.plan.fingerprint
    for one, other in zip(bare.contributions, rich.contributions, strict=True):
        assert one.gamma == pytest.approx(other.gamma, abs=1e-11)


def test_eval_fns_that_return_dicts_score_by_the_named_metric_and_keep_all() -> None:
    model, names, fns = case("llama", 2)
    dicts = {name: lambda m, fn=fn: {"other": 7, "likelihood": fn(m)} for name, fn in fns.items()}
    want = merge(model, names, fns)
    model, _, _ = case("llama", 2)
    got = merge(model, names, dicts, metric="likelihood")
    assert got.scores == want.scores
    assert got.plan.fingerprint == want.plan.fingerprint
    for row in got.states.values():
        for score in row.values():
            assert dict(score.metrics) == {"other": 7.0, "likelihood": score.value}


def test_tolerance_in_standard_errors_refuses_scores_without_examples() -> None:
    model, names, fns = case("llama", 2)
    floats = {name: lambda m, fn=fn: float(fn(m).mean()) for name, fn in fns.items()}
    before = snapshot(model)
    with pytest.raises(ConfigError, match="per-example"):
        merge(model, names, floats, tolerance="2se")
    assert moved(before, snapshot(model)) == []


def test_normalize_gain_refuses_an_adapter_that_wins_nothing() -> None:
    model, names, _ = case("llama", 2)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"'en'.*0"):
        merge(
            model, names, {"zh": lambda m: 1.0 * m.training, "en": lambda m: 0.5}, normalize="gain"
        )
    assert moved(before, snapshot(model)) == []


# ------------------------------------------------------------------------------------ one adapter


def test_one_adapter_is_merged_without_analysis() -> None:
    model, names, fns = case("llama", 1)
    result = merge(model, names, fns, density=1.0, scale=1.0)
    assert len(result.contributions) == 0
    assert result.conflicts == ()
    assert_same_deltas(result, oracle.deltas(model, "zh"))


# ------------------------------------------------------------------------------------- apply_plan


def test_apply_plan_from_json_gives_the_same_factors_bit_for_bit(tmp_path: Any) -> None:
    model, names, fns = case("gpt2", 3)
    result = merge(model, names, fns, rank=6)
    result.plan.to_json(tmp_path / "plan.json")
    again = apply_plan(
        model, MergePlan.from_json(tmp_path / "plan.json"), adapter_name="again", rank=6
    )
    assert again.plan.fingerprint == result.plan.fingerprint
    assert again.modules == result.modules
    parameters = dict(model.named_parameters())
    merged = [name for name in parameters if "merged" in name.split(".")]
    assert merged
    for name in merged:
        twin = parameters[".".join("again" if c == "merged" else c for c in name.split("."))]
        assert torch.equal(parameters[name], twin)


def test_apply_plan_needs_no_eval_functions_and_touches_nothing_else() -> None:
    model, names, _ = case("llama", 2)
    edits = {name: (0.3, 0.8) for name in names}
    from peft_himerge import Edit

    combiner = Combiner(read_adapters(model, names))
    plan = MergePlan.model_wise(combiner.table(), {n: Edit(*e) for n, e in edits.items()})
    before = snapshot(model)
    result = apply_plan(model, plan, adapter_name="new", rank="exact")
    assert moved(before, snapshot(model, but="new")) == []
    pruned = [oracle.prune_and_scale(oracle.deltas(model, n), 0.3, 0.8) for n in names]
    assert_same_deltas(result, oracle.plain_sum(dict(zip(names, pruned, strict=True))))
    assert result.scores == {}
    assert len(result.contributions) == 0
    assert result.scores_computed == 0


def test_apply_plan_with_changed_weights_is_refused() -> None:
    from peft_himerge.errors import PlanError

    model, names, fns = case("llama", 2)
    result = merge(model, names, fns)
    with torch.no_grad():
        module = next(m for m in model.modules() if "en" in getattr(m, "lora_B", {}))
        module.lora_B["en"].weight.add_(0.01)
    before = snapshot(model)
    with pytest.raises(PlanError, match="'en'"):
        apply_plan(model, result.plan, adapter_name="again")
    with pytest.raises(AdapterError, match="'en' changed"):
        result.delta("lm_head")
    assert moved(before, snapshot(model)) == []


def test_apply_plan_for_other_adapters_is_refused_by_name() -> None:
    model, _, _ = case("llama", 2)
    before = snapshot(model)
    table = Combiner(read_adapters(model, ["zh"])).table()
    from peft_himerge import Edit
    from peft_himerge.errors import PlanError

    unknown = MergePlan.model_wise({k: ["fr"] for k in table}, {"fr": Edit()})
    with pytest.raises(AdapterError, match="'fr'"):
        apply_plan(model, unknown)
    with pytest.raises(PlanError, match=r"model\.layers\.99"):
        apply_plan(model, MergePlan({"zh": Edit()}, {"model.layers.99": {"zh": Edit()}}))
    with pytest.raises(PlanError, match="says nothing"):
        apply_plan(model, MergePlan({"zh": Edit()}, {"model.layers.0": {"zh": Edit()}}))
    with pytest.raises(ConfigError, match="no adapter"):
        apply_plan(model, MergePlan.base())
    assert moved(before, snapshot(model)) == []


def test_delta_of_an_unknown_module_is_refused_with_a_suggestion() -> None:
    model, names, fns = case("llama", 2)
    result = merge(model, names, fns)
    with pytest.raises(AdapterError, match="Did you mean 'lm_head'"):
        result.delta("lmhead")


# --------------------------------------------------------------------- arguments refused, in words


def never(model: Any) -> float:
    raise AssertionError("the eval function was called before everything was validated")


GOOD = {"zh": never, "en": never}
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"adapters": []}, ConfigError, "empty"),
    ({"adapters": "zh"}, ConfigError, "list of adapter names"),
    ({"adapters": ["zh", 3]}, ConfigError, "list of adapter names"),
    ({"adapters": None}, ConfigError, "list of adapter names"),
    ({"adapters": ["zh", "zh"]}, ConfigError, "'zh' more than once"),
    (
        {"adapters": ["zh", "mth"], "eval_fns": {"zh": never, "mth": never}},
        AdapterError,
        "'mth'.*Did you mean 'math'",
    ),
    ({"adapters": ["zh", "en"], "eval_fns": {"zh": never}}, ConfigError, "'en'"),
    (
        {"adapters": ["zh", "math"], "eval_fns": {"zh": never, "maths": never}},
        ConfigError,
        "'math'.*Did you mean 'maths'",
    ),
    ({"eval_fns": [never, never]}, ConfigError, "eval_fns must map"),
    ({"eval_fns": {"zh": never, "en": 0.3}}, ConfigError, r"eval_fns\['en'\] must be callable"),
    ({"adapter_name": "zh"}, ConfigError, "adapter 'zh' already"),
    ({"adapter_name": "a.b"}, ConfigError, "without dots"),
    ({"adapter_name": ""}, ConfigError, "non-empty"),
    ({"adapter_name": None}, ConfigError, "non-empty"),
    ({"config": HiMergeConfig(density={"zh": 0.5}, scale={"zh": 1})}, ConfigError, "density"),
    (
        {"config": HiMergeConfig(density={"zh": 0.5, "de": 0.5}, scale={"zh": 1, "de": 1})},
        ConfigError,
        "'de'",
    ),
    (
        {
            "eval_fns": {**GOOD, "general": never},
            "config": HiMergeConfig(metric={"genral": "accuracy"}),
        },
        ConfigError,
        "'genral'.*Did you mean 'general'",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSED)
def test_arguments_that_are_wrong_are_refused_by_name_before_anything_is_touched(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model, _, _ = case("llama", 3)
    before = snapshot(model)
    call = {"adapters": ["zh", "en"], "eval_fns": GOOD, **arguments}
    adapters, fns = call.pop("adapters"), call.pop("eval_fns")
    with pytest.raises(error, match=text):
        merge_adapters_hi(model, adapters, fns, **call)
    assert moved(before, snapshot(model)) == []


def test_arguments_that_are_fine_reach_the_eval_functions() -> None:
    model, _, _ = case("llama", 2)
    with pytest.raises(AssertionError, match="before everything was validated"):
        merge_adapters_hi(model, ["zh", "en"], GOOD)


def test_model_that_is_no_peft_model_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"PeftModel.*LlamaForCausalLM"):
        merge_adapters_hi(tiny.tiny_llama(), ["zh", "en"], GOOD)  # type: ignore[arg-type]


BAD_SCORES: list[tuple[Any, str]] = [
    (None, "None"),
    (math.nan, "NaN"),
    (math.inf, "infinity"),
    (True, "bool"),
    ("0.5", "str"),
    ([], r"\[\]"),
    (torch.zeros(0), "Tensor"),
    (torch.zeros(2, 2), "1-D"),
    (np.array([0.1, math.nan]), "NaN"),
    ([0.1, True], "1-D"),
    ({"accuracy": 0.5}, "metric="),
    (1 + 2j, "complex"),
]


@pytest.mark.parametrize(("value", "text"), BAD_SCORES)
def test_eval_fn_that_returns_no_score_is_named_and_the_model_put_back(
    value: Any, text: str
) -> None:
    model, names, fns = case("llama", 2)
    before = snapshot(model)
    with pytest.raises(EvalError, match=rf"(?s)'en'.*{text}"):
        merge(model, names, {**fns, "en": lambda m: value})
    assert moved(before, snapshot(model)) == []


def test_metric_asked_of_an_eval_fn_without_a_dict_is_refused() -> None:
    model, names, fns = case("llama", 2)
    with pytest.raises(EvalError, match="metric='accuracy'"):
        merge(model, names, fns, metric="accuracy")


# ------------------------------------------------------------------------------- search and reuse


def test_merge_with_search_uses_the_best_trial_of_each_adapter() -> None:
    model, names, fns = case("gpt2", 2)
    result = merge_adapters_hi(
        model, names, fns, config=paper(max_export_drop=None, accept="no_regression")
    )
    for name in names:
        mine = [t for t in result.search if t.adapter == name]
        assert 2 <= len(mine) <= 12
        assert result.plan.adapters[name] == max(mine, key=lambda t: t.value).edit
        # The searched state's score is the oracle's.
        best = result.plan.adapters[name]
        state = oracle.prune_and_scale(oracle.deltas(model, name), best.density, best.scale)
        want = float(oracle.score(model, fns[name], state).mean())
        assert max(t.value for t in mine) == pytest.approx(want, abs=1e-12)
    mean = {state: np.mean([*row.values()]) for state, row in result.scores.items()}
    assert mean["merged"] >= mean["model_wise"]


def test_merge_with_search_on_the_merged_model_never_ends_below_its_start() -> None:
    model, names, fns = case("gpt2", 2)
    result = merge_adapters_hi(
        model,
        names,
        fns,
        config=paper(max_export_drop=None, search_target="merged"),
    )
    first = next(t for t in result.search if (t.edit.density, t.edit.scale) == (1.0, 1.0))
    assert np.mean([*result.scores["model_wise"].values()]) >= first.value
    assert max(t.value for t in result.search) == pytest.approx(
        np.mean([*result.scores["model_wise"].values()]), abs=1e-12
    )


def test_a_search_that_cannot_run_is_refused_before_anything_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, names, fns = case("llama", 2)
    before = snapshot(model)
    calls: list[str] = []
    heard = {name: lambda m, name=name: calls.append(name) for name in fns}
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="needs Optuna"):
        merge_adapters_hi(model, names, heard, config=paper(search="optuna"))
    assert calls == []
    assert moved(before, snapshot(model)) == []


def test_merge_twice_in_one_model_gives_the_same_numbers() -> None:
    model, names, fns = case("bert", 2)
    first = merge(model, names, fns)
    config = paper(**FIXED, max_export_drop=None)
    second = merge_adapters_hi(model, names, fns, adapter_name="twin", config=config)
    assert first.scores == second.scores
    assert first.contributions == second.contributions
    assert first.modules == second.modules


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accept_best_is_never_worse_than_its_start_nor_than_the_paper_s_edits(kind: str) -> None:
    model = tiny.peft_model(kind, 2, seed=1)
    names = list(tiny.NAMES[:2])
    fns = tiny.eval_fns(kind, names, seed=1)
    means = {}
    for accept in ("no_regression", "best"):
        config = paper(**FIXED, accept=accept, max_export_drop=None)
        result = merge_adapters_hi(model, names, fns, adapter_name=accept, config=config)
        means[accept] = sum(result.scores["merged"].values())
        assert means[accept] >= sum(result.scores["model_wise"].values())
        last = None
        for resolution in result.conflicts:
            if resolution.after:
                before, after = sum(resolution.before.values()), sum(resolution.after.values())
                assert resolution.accepted == (after >= before)
                assert last is None or before == last
                last = after if resolution.accepted else before
    assert means["best"] > means["no_regression"]


@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("gpt2", 3)])
def test_accept_best_climbs_as_one_would_by_hand(kind: str, count: int) -> None:
    """Layer by layer: the paper's edit if nothing falls, then each adapter's scale if it rises."""
    model = tiny.peft_model(kind, count, seed=1)
    names = list(tiny.NAMES[:count])
    fns = tiny.eval_fns(kind, names, seed=1)
    config = paper(**FIXED, accept="best", max_export_drop=None)
    result = merge_adapters_hi(model, names, fns, config=config)

    def mean(plan: MergePlan) -> float:
        (found,) = score_plans(model, names, {"it": plan}, fns).values()
        return sum(score.value for score in found.values()) / len(found)

    rows = {layer: dict.fromkeys(row, IDENTITY) for layer, row in result.plan.edits.items()}
    plan = replace(result.plan, edits=rows)
    moved_by_degrees = 0
    for resolution in result.conflicts:
        layer = resolution.conflict.layer
        published = plan.with_edits(layer, resolve(resolution.conflict, plan, config))
        plan = published if mean(published) >= mean(plan) else plan
        for name in sorted(plan.edits[layer]):
            edit = plan.edits[layer][name]
            tried = [
                plan.with_edit(layer, name, Edit(edit.density, edit.scale * f))
                for f in (0, 0.5, 1.5)
            ]
            best = max(tried, key=mean)
            if not edit.drops and mean(best) > mean(plan):
                plan, moved_by_degrees = best, moved_by_degrees + 1
        if resolution.accepted and resolution.after:
            assert sum(resolution.after.values()) / len(fns) == pytest.approx(mean(plan), abs=1e-9)
            assert {n: plan.edits[layer][n] for n in resolution.edits} == dict(resolution.edits)
    assert plan == result.plan
    assert moved_by_degrees > 0
