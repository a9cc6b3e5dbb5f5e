"""Methods that need scores on the live model: what is scored, how often, and what is left of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from snapshot import moved, snapshot
from test_identity import offload
from torch import Tensor

from peft_himerge import (
    HiMergeConfig,
    MergePlan,
    add_weighted_adapter,
    merge_adapters,
    merge_adapters_hi,
)
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import AdapterError, ConfigError, EvalError
from peft_himerge.methods.registry import get_method
from peft_himerge.methods.stack import Dense, Factored, Stack
from peft_himerge.probe import Probe
from peft_himerge.request import stacks_of
from peft_himerge.scoring import Task
from peft_himerge.trials import Trials, tasks_of

PAIR = ["zh", "en"]
SMALL: dict[str, dict[str, Any]] = {
    "greedy_soup": {},
    "map": {"points": 2, "samples": 10},
    "coefficient_search": {"values": (0.5, 1.0), "budget": 12},
}


def counted(kind: str, names: list[str]) -> tuple[dict[str, Any], Counter[str]]:
    plain, calls = tiny.eval_fns(kind, names), Counter[str]()

    def wrap(name: str) -> Any:
        def fn(model: Any) -> Any:
            calls[name] += 1
            return plain[name](model)

        return fn

    return {name: wrap(name) for name in names}, calls


def trials_of(model: PeftModel, fns: Mapping[str, Any], strategy: Any = "auto") -> Trials:
    names = list(tiny.NAMES[: len(model.peft_config)])
    probe = Probe(model, Combiner(read_adapters(model, names)), strategy)
    return Trials(probe, tasks_of(names, fns))


def stacks_in(model: PeftModel) -> list[Stack]:
    read = read_adapters(model, sorted(model.peft_config))
    return list(stacks_of(model, read, dict.fromkeys(model.peft_config, 1.0), 0))


def with_deltas(model: PeftModel, deltas: Mapping[str, Tensor]) -> Any:
    """Return a plain copy of the base with the deltas added to its weights, naively."""
    kind = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2", "Qwen2ForCausalLM": "qwen2"}
    inner = model.base_model.model
    plain = tiny.tiny_model(kind[type(inner).__name__], dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        for module, delta in deltas.items():
            weight = plain.get_submodule(module).weight
            turned = weight.shape != delta.shape or type(inner).__name__ == "GPT2LMHeadModel"
            weight += (delta.t() if turned else delta).to(weight.dtype)
    return plain


# ------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("strategy", ["fold", "lazy"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["cat", "ties"])
def test_a_candidate_is_scored_as_a_model_with_its_deltas(
    kind: str, method: str, strategy: str
) -> None:
    model = tiny.peft_model(kind, 2)
    fns = tiny.eval_fns(kind, PAIR)
    before = snapshot(model)
    trials = trials_of(model, fns, strategy)
    stacks = stacks_in(model)
    found = trials.scores(get_method(method).function(stacks))
    assert moved(before, snapshot(model)) == []
    deltas = {m: d.dense() for m, d in get_method(method).function(stacks)}
    plain = with_deltas(model, deltas)
    for task in PAIR:
        want = fns[task](plain).numpy()
        np.testing.assert_allclose(found[task].examples, want, rtol=1e-9, atol=1e-9)
        assert found[task].value == pytest.approx(want.mean())
        assert found[task].se == pytest.approx(want.std(ddof=1) / np.sqrt(len(want)))


def test_no_delta_is_the_base_model() -> None:
    model = tiny.peft_model("llama", 2)
    fns = tiny.eval_fns("llama", PAIR)
    found = trials_of(model, fns).scores(iter(()))
    base = tiny.tiny_model("llama", dtype=torch.float64)
    assert {n: s.value for n, s in found.items()} == pytest.approx(
        {n: float(fn(base).mean()) for n, fn in fns.items()}
    )


def test_equal_deltas_are_scored_once_and_guards_only_when_asked_for() -> None:
    model = tiny.peft_model("llama", 2)
    fns, calls = counted("llama", [*PAIR, "general"])
    trials = trials_of(model, fns)
    assert (trials.own, trials.guards) == (("en", "zh"), ("general",))
    stacks = stacks_in(model)
    cat, ties = get_method("cat").function, get_method("ties").function
    first = trials.scores(cat(stacks))
    again = trials.scores(cat(stacks))
    assert first == again
    assert calls == {"en": 1, "zh": 1}
    trials.scores(ties(stacks), ["en"])
    trials.scores(ties(stacks), ["en", "general"])
    assert calls == {"en": 2, "zh": 1, "general": 1}
    # The same numbers, as a dense delta: found out by nobody, scored again, and just as good.
    whole = trials.scores((m, Dense(d.dense())) for m, d in cat(stacks))
    assert whole["en"].value == pytest.approx(first["en"].value)
    assert trials.count == calls.total() == 6
    empty = Factored(torch.zeros(stacks[0].shape[0], 0), torch.zeros(0, stacks[0].shape[1]))
    trials.scores([(stacks[0].module, empty)], ["en"])
    assert trials.count == 7


def test_one_bit_makes_another_candidate() -> None:
    model = tiny.peft_model("llama", 2)
    fns, calls = counted("llama", PAIR)
    trials = trials_of(model, fns)
    module, delta = next(iter(get_method("cat").function(stacks_in(model))))
    near = Factored(delta.b.clone(), delta.a)
    near.b.view(-1)[0] = torch.nextafter(near.b.view(-1)[0], torch.tensor(9.0, dtype=near.b.dtype))
    trials.scores([(module, delta)], ["en"])
    trials.scores([(module, near)], ["en"])
    assert calls["en"] == 2


def test_every_score_starts_from_the_same_random_state() -> None:
    model = tiny.peft_model("llama", 2)
    trials = Trials(
        Probe(model, Combiner(read_adapters(model, PAIR))),
        {n: Task(n, lambda m: float(torch.rand(()))) for n in ("en", "zh")},
    )
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = trials.scores(iter(()))
    two = trials.scores(get_method("cat").function(stacks_in(model)))
    assert len({s.value for s in (*one.values(), *two.values())}) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("strategy", ["fold", "lazy"])
@pytest.mark.parametrize("fault", ["raises", "writes", "interrupt", "delta", "twice", "stranger"])
def test_the_model_is_put_back_whatever_happens(strategy: str, fault: str) -> None:
    model = tiny.peft_model("llama", 2)
    model.train()

    def fn(live: Any) -> float:
        live.config.use_cache = False
        live.eval()
        if fault == "raises":
            raise ValueError("no such row")
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "writes":
            with torch.no_grad():
                next(live.parameters()).add_(0.0)
        return 1.0

    trials = trials_of(model, dict.fromkeys(PAIR, fn), strategy)
    stacks = stacks_in(model)

    def candidate() -> Iterator[Any]:
        for i, (module, delta) in enumerate(get_method("cat").function(stacks)):
            if fault == "delta" and i == 2:
                raise ConfigError("out of deltas")
            yield ("model.norm" if fault == "stranger" else module), delta
            if fault == "twice":
                yield module, delta

    before = snapshot(model)
    expected = {"raises": ValueError, "interrupt": KeyboardInterrupt, "writes": EvalError}
    with pytest.raises(expected.get(fault, ConfigError)):
        trials.scores(candidate())
    assert moved(before, snapshot(model)) == []


# ---------------------------------------------------------------------------------- merge_adapters


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_method_adds_what_it_scored_and_nothing_else(method: str, dtype: torch.dtype) -> None:
    model = tiny.peft_model("llama", 2, dtype)
    fns, calls = counted("llama", [*PAIR, "general"])
    before = snapshot(model)
    result = merge_adapters(model, PAIR, method, eval_fns=fns, **SMALL[method])
    assert moved(before, snapshot(model, but="merged")) == []
    assert result.export_error < 1e-3
    told = result.fitted["scores"]
    assert list(told) == ["en", "zh", "general"]
    assert calls["general"] == 1
    assert result.fitted["scores_computed"] == calls.total()
    # The adapter that was added scores as the report says, through PEFT's own forward.
    model.set_adapter("merged")
    close = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for name, fn in tiny.eval_fns("llama", [*PAIR, "general"]).items():
        assert float(fn(model).mean()) == pytest.approx(told[name]["value"], abs=close)
        assert told[name]["se"] > 0.0


def test_the_search_is_no_worse_than_what_it_looked_at() -> None:
    model = tiny.peft_model("llama", 2)
    fns = tiny.eval_fns("llama", PAIR)
    soup = merge_adapters(model, PAIR, "greedy_soup", eval_fns=fns, adapter_name="soup")
    front = merge_adapters(model, PAIR, "map", eval_fns=fns, adapter_name="map")
    best = merge_adapters(
        model,
        PAIR,
        "coefficient_search",
        eval_fns=fns,
        adapter_name="search",
        base="ties",
        choices={"density": (0.3, 1.0), "lam": (0.5, 1.0)},
        budget=40,
    )
    tops = [max(t["objective"] for t in r.fitted["tried"]) for r in (soup, best)]
    assert best.fitted["objective"] == tops[1]
    assert front.fitted["objective"] == max(p["objective"] for p in front.fitted["front"])
    alone = soup.fitted["tried"][:2]
    assert soup.fitted["objective"] >= max(t["objective"] for t in alone)
    assert front.fitted["objective"] >= max(t["objective"] for t in alone)


@pytest.mark.parametrize("method", SMALL)
def test_the_same_for_any_order_of_adapters_and_functions(method: str) -> None:
    trio = ["zh", "en", "math"]
    found = []
    for names in (trio, trio[::-1]):
        model = tiny.peft_model("llama", 3, torch.float32)
        fns = tiny.eval_fns("llama", trio)
        ordered = {name: fns[name] for name in names}
        result = merge_adapters(model, names, method, eval_fns=ordered, seed=4, **SMALL[method])
        exact = {m.module: result.delta(m.module) for m in result.modules}
        found.append((result.fitted, exact))
    assert found[0][0] == found[1][0]
    for module, delta in found[0][1].items():
        assert torch.equal(delta, found[1][1][module])


def test_eight_adapters_of_mixed_ranks() -> None:
    specs = tiny.default_specs("llama", 5)
    for i, name in enumerate(("x", "y", "w")):
        specs[name] = {"r": 1 + i, "alpha": 3, "target_modules": ["q_proj"], "seed": 50 + i}
    model = tiny.add_adapters(tiny.tiny_model("llama"), specs)
    fns = tiny.eval_fns("llama", list(specs), n_examples=2)
    before = snapshot(model)
    soup = merge_adapters(model, list(specs), "greedy_soup", eval_fns=fns, adapter_name="soup")
    assert moved(before, snapshot(model, but="soup")) == []
    assert set(soup.fitted["kept"]) <= set(specs)
    before = snapshot(model)
    hi = merge_adapters(
        model, list(specs), "hi", eval_fns=fns, adapter_name="hi", scale=0.3, density=1.0
    )
    assert moved(before, snapshot(model, but="hi")) == []
    assert hi.hi is not None
    assert set(hi.hi.plan.adapters) == set(specs)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_scored_like_the_whole_one(where: str, tmp_path: Path) -> None:
    fns = tiny.eval_fns("llama", PAIR)
    options = SMALL["coefficient_search"]
    whole = tiny.peft_model("llama")
    want = merge_adapters(whole, PAIR, "coefficient_search", eval_fns=fns, **options)
    model = tiny.peft_model("llama")
    offload(model, where, tmp_path)
    got = merge_adapters(model, PAIR, "coefficient_search", eval_fns=fns, **options)
    assert got.fitted["weights"] == want.fitted["weights"]
    values = [[t["objective"] for t in r.fitted["tried"]] for r in (got, want)]
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_the_report_is_json_and_holds_what_was_learned(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    fns = {n: lambda m, f=f: {"ll": f(m), "n": 3} for n, f in tiny.eval_fns("llama", PAIR).items()}
    result = merge_adapters(model, PAIR, "greedy_soup", eval_fns=fns, metric="ll")
    report = json.loads((result.save(tmp_path / "out") / "report.json").read_text())
    assert report["method"]["name"] == "greedy_soup"
    assert report["fitted"] == result.fitted
    assert report["fitted"]["scores"]["en"]["metrics"]["n"] == 3


def good(_: Any) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"eval_fns": None}, "needs scores: pass eval_fns"),
        ({"eval_fns": {}}, "needs scores: pass eval_fns"),
        ({"eval_fns": [good, good]}, "must map adapter names"),
        ({"eval_fns": {"zh": good}}, "no function for adapter 'en'"),
        ({"eval_fns": {"zh": good, "eng": good}}, "Did you mean 'eng'"),
        ({"eval_fns": {"zh": good, "en": 3}}, r"eval_fns\['en'\] must be callable"),
        ({"metric": {"zz": "acc"}}, "metric names the task 'zz'"),
        ({"inputs": {"zh": []}}, "inputs would not be read"),
        ({"space": "core"}, "does not work entry by entry"),
        ({"objectve": "mean"}, "Did you mean 'objective'"),
        ({"method": "cat"}, "needs nothing, so eval_fns would not be read"),
        ({"method": "cat", "eval_fns": None, "metric": "acc"}, "metric would not be read"),
    ],
)
def test_wrong_arguments_are_refused_before_any_score(arguments: dict[str, Any], text: str) -> None:
    model = tiny.peft_model("llama", 2)
    before = snapshot(model)
    call: dict[str, Any] = {"method": "greedy_soup", "eval_fns": dict.fromkeys(PAIR, good)}
    with pytest.raises(ConfigError, match=text):
        merge_adapters(model, PAIR, **{**call, **arguments})
    assert moved(before, snapshot(model)) == []


def test_an_eval_function_without_its_metric_says_what_to_pass() -> None:
    model = tiny.peft_model("llama", 2)
    before = snapshot(model)
    fns = dict.fromkeys(PAIR, lambda _: {"acc": 0.5})
    with pytest.raises(EvalError, match=r"pass metric="):
        merge_adapters(model, PAIR, "map", eval_fns=fns)
    assert moved(before, snapshot(model)) == []


def test_a_base_that_cannot_be_read_is_refused_by_who_reads_it() -> None:
    model = tiny.peft_model("llama", 2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'widen' reads the base.*q_proj.*reads_base"):
        merge_adapters(model, PAIR, "widen")
    layer.weight = weight
    assert merge_adapters(model, PAIR, "widen").rank > 0


# ---------------------------------------------------------------------------------------------- hi

HI: dict[str, Any] = {"density": 0.4, "scale": 0.9, "max_export_drop": None}


def test_hi_by_name_is_the_merge_of_its_own_door(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2)
    fns = tiny.eval_fns("llama", [*PAIR, "general"])
    before = snapshot(model)
    result = merge_adapters(model, PAIR, "hi", eval_fns=fns, rank=6, **HI)
    assert moved(before, snapshot(model, but="merged")) == []
    config = HiMergeConfig(rank=6, **HI)
    want = merge_adapters_hi(model, PAIR, fns, config=config, adapter_name="own")
    assert result.hi is not None
    assert result.hi.plan.fingerprint == want.plan.fingerprint
    assert result.hi.contributions == want.contributions
    assert result.fitted["scores"] == want.scores
    assert MergePlan.from_dict(result.fitted["plan"]) == want.plan
    assert result.method == get_method("hi")
    assert result.options["density"] == 0.4
    assert (result.modules, result.rank) == (want.modules, want.rank)
    assert result.export_error == want.export_error
    module = result.modules[0].module
    assert torch.equal(result.delta(module), want.delta(module))
    with pytest.raises(AdapterError, match=r"no module 'model\.x'"):
        result.delta("model.x")
    for name, weight in model.named_parameters():
        if ".merged." in name:
            assert torch.equal(weight, model.get_parameter(name.replace(".merged.", ".own.")))
    report = json.loads((result.save(tmp_path / "out") / "report.json").read_text())
    assert report["plan"] == want.plan.to_dict()  # Hi-Merging's whole report, and its plan
    assert set(report["plan"]["sources"]) == set(PAIR)
    assert MergePlan.from_json(tmp_path / "out" / "plan.json") == want.plan


def test_hi_takes_over_a_name_and_what_was_there_stays_if_it_fails() -> None:
    model = tiny.peft_model("llama", 3)
    fns = tiny.eval_fns("llama", PAIR)
    want = merge_adapters(model, PAIR, "hi", eval_fns=fns, adapter_name="new", **HI)
    before = snapshot(model)
    bad = {**fns, "en": lambda m: float("nan")}
    with pytest.raises(EvalError):
        merge_adapters(model, PAIR, "hi", eval_fns=bad, adapter_name="en", overwrite=True, **HI)
    assert moved(before, snapshot(model)) == []
    got = merge_adapters(model, PAIR, "hi", eval_fns=fns, adapter_name="en", overwrite=True, **HI)
    assert sorted(model.peft_config) == ["en", "math", "new", "zh"]
    assert got.hi is not None
    assert got.hi.adapter_name == got.adapter_name == "en"
    for record in want.modules:
        assert torch.equal(got.delta(record.module), want.delta(record.module))
    assert got.to_dict()["plan"]["sources"] == want.to_dict()["plan"]["sources"]
    assert set(got.to_dict()["plan"]["sources"]) == set(PAIR)


def test_deltas_alone_are_scored_so_saved_modules_are_refused() -> None:
    specs = {n: {"target_modules": ["q_proj"], "seed": i} for i, n in enumerate(PAIR)}
    specs["zh"]["modules_to_save"] = ["lm_head"]
    model = tiny.add_adapters(tiny.tiny_model("llama"), specs)
    fns = dict.fromkeys(PAIR, good)
    with pytest.raises(ConfigError, match=r"scores the model with deltas alone.*modules_to_save"):
        merge_adapters(model, PAIR, "greedy_soup", eval_fns=fns, modules_to_save="sole")


def test_hi_is_a_combination_type() -> None:
    model = tiny.peft_model("llama", 2)
    fns = tiny.eval_fns("llama", PAIR)
    result = add_weighted_adapter(
        model, PAIR, [1.0, 1.0], "both", "hi", svd_rank=20, eval_fns=fns, density=0.9
    )
    assert result is not None
    assert result.hi is not None
    assert (result.rank, result.hi.plan.adapters["en"].density) == (20, 0.9)
    assert result.adapter_name == "both"
    soup = add_weighted_adapter(
        model, PAIR, [1.0, 1.0], "soup", "greedy_soup", eval_fns=fns, svd_rank=8
    )
    assert soup is not None
    assert soup.fitted["kept"]
    alone = add_weighted_adapter(model, ["zh"], [1.0], "alone", "hi", svd_rank=9, eval_fns=fns)
    assert alone is not None
    assert alone.hi is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weights": [1.0, 0.5]}, r"weights must be 1\.0, got 0\.5 for adapter 'en'"),
        ({"space": "core"}, "does not read space, got 'core'"),
        ({"pad_rank": 8}, "does not read pad_rank"),
        ({"post": "lines"}, "does not read post"),
        ({"modules_to_save": "sole"}, "does not read modules_to_save"),
        ({"strict_base": False}, "does not read strict_base"),
        ({"seed": 1}, "does not read seed"),
        ({"densty": 0.5}, "Did you mean 'density'"),
        ({"density": 2.0}, "density"),
        ({"rank": 0}, "rank"),
        ({"eval_fns": None}, "method 'hi' needs scores: pass eval_fns"),
        ({"eval_fns": {"zh": good}}, "no function for adapter 'en'"),
        ({"metric": {"zz": "acc"}}, "metric names the task 'zz'"),
        ({"adapter_name": "zh"}, "'zh' already"),
    ],
)
def test_hi_refuses_what_it_would_not_read(arguments: dict[str, Any], text: str) -> None:
    model = tiny.peft_model("llama", 2)
    before = snapshot(model)
    call: dict[str, Any] = {"eval_fns": dict.fromkeys(PAIR, good), **arguments}
    with pytest.raises(ConfigError, match=text):
        merge_adapters(model, PAIR, "hi", **call)
    assert moved(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"eval_fns": None}, "method 'hi' needs scores: pass eval_fns"),
        ({"weights": [0.5, 0.5]}, r"weights must be 1\.0"),
        ({"svd_clamp": 0.5}, "does not read svd_clamp"),
        ({"modules_to_save": "first"}, "does not read modules_to_save"),
        ({"compat": "peft"}, "leave compat out"),
        ({"combination_type": "map", "eval_fns": None}, "method 'map' needs scores"),
        ({"combination_type": "cat"}, "needs nothing, so eval_fns would not be read"),
    ],
)
def test_the_combination_types_that_score_say_what_they_need(
    arguments: dict[str, Any], text: str
) -> None:
    model = tiny.peft_model("llama", 2)
    before = snapshot(model)
    call: dict[str, Any] = {"weights": [1.0, 1.0], "combination_type": "hi"}
    call |= {"eval_fns": dict.fromkeys(PAIR, good), **arguments}
    with pytest.raises(ConfigError, match=text):
        add_weighted_adapter(model, PAIR, adapter_name="both", **call)
    assert moved(before, snapshot(model)) == []
    with pytest.raises(ConfigError, match="pass the PeftModel"):
        add_weighted_adapter(
            model.base_model,
            PAIR,
            [1.0, 1.0],
            "both",
            "hi",
            eval_fns=dict.fromkeys(PAIR, good),
            svd_rank=4,
        )


def test_a_task_is_frozen_with_its_metric() -> None:
    tasks = tasks_of(["b", "a"], {"z": good, "b": good, "a": good}, {"a": "acc"})
    assert list(tasks) == ["a", "b", "z"]
    assert [t.metric for t in tasks.values()] == ["acc", None, None]
    assert [t.guard for t in tasks.values()] == [False, False, True]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks["a"].metric = "f1"  # type: ignore[misc]


def test_deltas_in_blocks_are_fresh_and_add_up() -> None:
    draw = torch.Generator().manual_seed(0)
    b, a = torch.randn(700, 3, generator=draw), torch.randn(3, 500, generator=draw)
    for delta in (Factored(b, a), Dense(b @ a)):
        whole = torch.zeros(700, 500)
        for rows, block in delta.blocks():
            whole[rows] += block
            block.zero_()
        torch.testing.assert_close(whole, b @ a)
        torch.testing.assert_close(delta.dense(), b @ a)
