"""Eval functions that misbehave: what they break is put back or named, never believed."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from paper import paper
from peft import LoraConfig, PeftModel
from snapshot import moved, snapshot
from torch import nn

from peft_himerge import (
    MergePlan,
    MergeResult,
    merge_adapters,
    merge_adapters_hi,
    score_plans,
)
from peft_himerge.adapters import lora_layers, read_adapters
from peft_himerge.budget import Budget
from peft_himerge.combine import Combiner
from peft_himerge.errors import BudgetError, ConfigError, EvalError
from peft_himerge.events import Event, StateScored
from peft_himerge.keeping import Structure, preserved, watch
from peft_himerge.plan import Edit
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

NAMES = ["zh", "en"]
Mess = Callable[[PeftModel], object]
FIXED = {"density": 0.6, "scale": 0.9}


def small() -> PeftModel:
    return tiny.peft_model("llama", 2, dtype=torch.float32)


def inner(model: PeftModel) -> Any:
    return model.base_model.model


def after(mess: Mess, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an eval function that scores, and then makes a mess."""

    def meddling(model: PeftModel) -> Any:
        value = fn(model)
        mess(model)
        return value

    return meddling


def merge(model: PeftModel, fns: dict[str, Any], **options: Any) -> MergeResult:
    more = {k: options.pop(k) for k in ("journal", "callbacks") if k in options}
    config = paper(**{**FIXED, **options})
    return merge_adapters_hi(model, NAMES, fns, config=config, **more)


def score(model: PeftModel, fns: dict[str, Any], **options: Any) -> dict[str, dict[str, float]]:
    """Return the scores of three states: the base, the first adapter, and the sum."""
    combiner = Combiner(read_adapters(model, NAMES))
    both = combiner.plan(dict.fromkeys(NAMES, Edit(0.6, 0.9)))
    plans = {"base": MergePlan.base(), "one": both.solo("zh"), "both": both}
    found = score_plans(model, NAMES, plans, fns, config=paper(**options))
    return {state: {t: s.value for t, s in row.items()} for state, row in found.items()}


# ------------------------------------------------------------- settings of the process: put back


def other_dtype(model: PeftModel) -> None:
    torch.set_default_dtype(torch.float64)


def other_threads(model: PeftModel) -> None:
    torch.set_num_threads(3)


def other_precision(model: PeftModel) -> None:
    torch.set_float32_matmul_precision("medium")


def newer_precision(model: PeftModel) -> None:
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "tf32"  # torch then refuses to tell the older setting


def deterministic(model: PeftModel) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def leaves_grad_on(model: PeftModel) -> None:
    torch.set_grad_enabled(True)


def goes_backward(model: PeftModel) -> None:
    model.requires_grad_(True)
    with torch.enable_grad():
        inner(model)(input_ids=torch.arange(4, 12).view(1, 8)).logits.sum().backward()


def saves(model: PeftModel) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)


def statistics(model: PeftModel) -> None:
    # What batch norm does in training mode.
    inner(model).model.statistics.add_(1.0)


def new_buffer(model: PeftModel) -> None:
    # What some rotary embeddings do in every call.
    inner(model).model.register_buffer("statistics", torch.zeros(3))


def settings() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    ]


QUIET = [
    *(other_dtype, other_threads, other_precision, newer_precision, deterministic, leaves_grad_on),
    *(goes_backward, saves, statistics, new_buffer),
]


@pytest.mark.parametrize("mess", QUIET)
def test_what_ends_with_the_call_changes_no_score_and_nothing_afterwards(mess: Mess) -> None:
    fns = tiny.eval_fns("llama", NAMES)
    want = score(small(), fns)
    model = small()
    inner(model).model.register_buffer("statistics", torch.ones(3))
    for number, weight in enumerate(model.parameters()):  # a training run has collected these
        weight.grad = torch.full_like(weight, float(number)) if number % 2 else None
    before, process = snapshot(model), settings()
    assert score(model, {**fns, "en": after(mess, fns["en"])}) == want
    assert moved(before, snapshot(model)) == []
    assert settings() == process


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch >= 2.9")
def test_a_users_own_newer_precision_is_kept() -> None:
    owners = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.backends.fp32_precision = "tf32"  # as TrainingArguments(tf32=True) does
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        fns = tiny.eval_fns("llama", NAMES)
        score(small(), {**fns, "en": after(other_precision, fns["en"])})
        assert [owner.fp32_precision for owner in owners] == ["tf32"] * 3
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for owner in owners[1:]:
            owner.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_a_raising_function_did_ends_too() -> None:
    fns = tiny.eval_fns("llama", NAMES)

    def breaks(model: PeftModel) -> float:
        for mess in (*QUIET[:7], left_hook, deletes, unloads):
            mess(model)
        raise ValueError("boom")

    model = small()
    before, process = snapshot(model), settings()
    with pytest.raises(ValueError, match="boom"):
        score(model, {**fns, "en": breaks})
    assert moved(before, snapshot(model)) == []
    assert settings() == process


# ------------------------------------------------------------------ the model's parts: named


def left_hook(model: PeftModel) -> None:
    inner(model).model.layers[2].register_forward_hook(lambda m, a, out: out)


def left_pre_hook(model: PeftModel) -> None:
    inner(model).model.layers[2].register_forward_pre_hook(lambda m, a: None)


def deletes(model: PeftModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("zh")


def adds(model: PeftModel) -> None:
    model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))


def unloads(model: PeftModel) -> None:
    model.unload()


def scales(model: PeftModel) -> None:
    inner(model).model.layers[1].self_attn.q_proj.scaling["zh"] *= 2.0


def widens(model: PeftModel) -> None:
    model.double()


def leaves_for_meta(model: PeftModel) -> None:
    model.to("meta")


def rebinds(model: PeftModel) -> None:
    gate = inner(model).model.layers[1].mlp.gate_proj
    gate.weight.data = gate.weight.data.clone()


def swaps(model: PeftModel) -> None:
    gate = inner(model).model.layers[1].mlp.gate_proj
    gate.weight = nn.Parameter(gate.weight.detach().clone())


def drops(model: PeftModel) -> None:
    inner(model).model.layers[1].mlp.gate_proj.weight = None


def patches(model: PeftModel) -> None:
    mlp = inner(model).model.layers[1].mlp
    mlp.forward = lambda x: x


def cuts(model: PeftModel) -> None:
    del inner(model).model.layers[3]


LOUD: list[tuple[Mess, str]] = [
    (left_hook, r"left a hook on '.*model\.layers\.2'"),
    (left_pre_hook, r"left a hook on '.*model\.layers\.2'"),
    (deletes, r"changed the (modules|adapters) of .*'zh'"),
    (adds, r"changed the (modules|adapters) of .*'more'"),
    (unloads, r"changed the modules of .*'(lm_head|\w_proj)'"),
    (scales, r"changed the adapters of '.*layers\.1\.self_attn\.q_proj' \('zh'\)"),
    (widens, r"changed the weight"),
    (leaves_for_meta, r"changed the weight"),
    (rebinds, r"changed the weight '.*layers\.1\.mlp\.gate_proj\.weight'"),
    (swaps, r"changed the weight '.*layers\.1\.mlp\.gate_proj\.weight'"),
    (drops, r"changed the weight '.*layers\.1\.mlp\.gate_proj\.weight'"),
    (patches, r"replaced the forward of '.*layers\.1\.mlp'"),
    (cuts, r"changed the modules of '.*model\.layers' \('3'\)"),
]


@pytest.mark.parametrize("strategy", ["fold", "lazy"])
@pytest.mark.parametrize(("mess", "text"), LOUD, ids=[m.__name__ for m, _ in LOUD])
def test_a_changed_model_is_put_back_and_the_function_named(
    mess: Mess, text: str, strategy: str
) -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    before = snapshot(model)
    with pytest.raises(EvalError, match=rf"task 'en' {text}") as caught:
        score(model, {**fns, "en": after(mess, fns["en"])}, strategy=strategy)
    assert "load the model again" not in str(caught.value)
    assert moved(before, snapshot(model)) == []


def test_the_hooks_of_transformers_stay_and_are_no_fault() -> None:
    # transformers 5 leaves the hooks that collect hidden states, and marks the model as hooked.
    fns = tiny.eval_fns("llama", NAMES)

    def hidden(model: PeftModel) -> float:
        found = inner(model)(input_ids=torch.arange(4, 12).view(1, 8), output_hidden_states=True)
        assert found.hidden_states is not None
        assert len(found.hidden_states) == 5
        return float(fns["en"](model).mean())

    model = small()
    score(model, {**fns, "en": hidden})
    found = model(input_ids=torch.arange(4, 12).view(1, 8), output_hidden_states=True)
    assert len(found.hidden_states) == 5


# -------------------------------------------------------------------- what the weights hold: named

PLAIN = "model.layers.1.mlp.gate_proj.weight"
SOURCE = "model.layers.1.self_attn.q_proj.lora_A.zh.weight"
FOLDED = "model.layers.1.self_attn.q_proj.base_layer.weight"


def by_data(weight: torch.Tensor) -> None:
    weight.data.add_(0.01)


def by_item(weight: torch.Tensor) -> None:
    weight.data[0, 0] = 7.0


def by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[0, 0] += 1.0


def by_bits(weight: torch.Tensor) -> None:
    weight.detach().numpy().view(np.int32)[0, 0] ^= 1  # the last bit of one entry


HIDDEN = [by_data, by_item, by_numpy, by_bits]


def writes(path: str, how: Callable[[torch.Tensor], None]) -> Mess:
    return lambda model: how(inner(model).get_parameter(path))


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("path", [PLAIN, SOURCE, FOLDED])
def test_a_write_that_leaves_no_trace_is_found_and_the_function_named_with_verify(
    path: str, how: Callable[[torch.Tensor], None]
) -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    with pytest.raises(EvalError, match=rf"task 'en' changed the weight '.*{path}'"):
        score(model, {**fns, "en": after(writes(path, how), fns["en"])}, verify=True)
    assert list(model.peft_config) == NAMES


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("path", [PLAIN, SOURCE])
def test_without_verify_it_is_found_at_the_end(
    path: str, how: Callable[[torch.Tensor], None]
) -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    bad = after(writes(path, how), fns["en"])
    with pytest.raises(EvalError, match=rf"'en', 'zh'.*verify=True.*{path}.*load the model again"):
        score(model, {**fns, "en": bad})
    with pytest.raises(EvalError, match=rf"function of task 'en' changed the weight '.*{path}"):
        score(small(), {"en": bad})  # who else


def test_a_merge_that_was_written_to_adds_no_adapter() -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    with pytest.raises(EvalError, match="No score of this run can be trusted"):
        merge(model, {**fns, "en": after(writes(PLAIN, by_data), fns["en"])})
    assert list(model.peft_config) == NAMES


def test_a_write_into_the_copy_that_a_state_is_folded_into_leaves_the_model_whole() -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    combiner = Combiner(read_adapters(model, NAMES))
    plan = combiner.plan(dict.fromkeys(NAMES, Edit(1.0, 1.0)))
    before = snapshot(model)
    for how, verify in ((lambda w: w.add_(0.1), False), (by_data, True)):
        task = Task("en", after(writes(FOLDED, how), fns["en"]))
        with Probe(model, combiner, "fold", verify=verify) as probe:
            probe.show(plan)
            with pytest.raises(EvalError, match=r"changed the weight") as caught:
                probe.call(task)
        assert "load the model again" not in str(caught.value)
        assert moved(before, snapshot(model)) == []


def test_methods_that_score_find_writes_after_every_candidate() -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    calls = []

    def count(model: PeftModel) -> None:
        calls.append(1)
        by_data(inner(model).get_parameter(PLAIN))

    with pytest.raises(EvalError, match=rf"{PLAIN}"):
        merge_adapters(model, NAMES, "greedy_soup", eval_fns={**fns, "en": after(count, fns["en"])})
    assert len(calls) == 1
    assert list(model.peft_config) == NAMES


def test_scores_of_a_model_that_was_written_to_are_not_found_again(tmp_path: Path) -> None:
    fns = tiny.eval_fns("llama", NAMES)
    journal = tmp_path / "scores.jsonl"
    bad = after(writes(PLAIN, by_data), fns["en"])
    with pytest.raises(EvalError, match="No score of this run can be trusted"):
        merge(small(), {**fns, "en": bad}, journal=journal)
    assert not journal.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl.tainted-1"]
    # The error of verify comes before the score is kept, so the journal stays good.
    with pytest.raises(EvalError, match="'en' changed the weight"):
        merge(small(), {**fns, "en": bad}, journal=journal, verify=True)
    want = merge(small(), fns, journal=journal)
    assert want.scores == merge(small(), fns).scores


def test_checksums_see_every_bit_and_nothing_else() -> None:
    model = small()
    changed = watch(model)
    assert changed() is None
    model.train()
    model.set_adapter("en")
    assert changed() is None
    for name, weight in list(model.named_parameters())[::17]:
        raw = weight.detach().numpy().reshape(-1).view(np.int32)
        for place in (0, raw.size // 2, raw.size - 1):
            raw[place] ^= 1 << 30
            assert changed() == name
            raw[place] ^= 1 << 30
    assert changed() is None


def test_structure_puts_every_kind_of_table_back() -> None:
    model = small()
    layer = inner(model).model.layers[1].self_attn.q_proj
    mlp = inner(model).model.layers[0].mlp
    own = mlp.forward
    mlp.forward = own  # one of the user's, which the module does not have by itself
    layer.loras = {"zh", "en"}
    layer.merged_adapters.append("zh")
    taken = Structure(model)
    layer.loras |= {"more"}
    layer.merged_adapters[:] = ["en", "zh"]
    mlp.forward = lambda x: x
    what, whole = taken.put_back()
    assert str(what).startswith("changed the adapters of '")
    assert "layers.1.self_attn.q_proj'" in str(what)
    assert whole
    assert layer.loras == {"zh", "en"}
    assert layer.merged_adapters == ["zh"]
    assert vars(mlp)["forward"] is own
    assert taken.put_back() == (None, True)


def test_a_hook_of_transformers_with_arguments_bound_is_theirs_too() -> None:
    from transformers.utils import output_capturing

    def ours(*_: Any) -> None:
        pass

    model = small()
    layer = inner(model).model.layers[1]
    taken = Structure(model)
    theirs = functools.partial(output_capturing.maybe_install_capturing_hooks)
    stays = layer.register_forward_hook(theirs)
    assert taken.put_back() == (None, True)
    assert list(layer._forward_hooks.values()) == [theirs]
    stays.remove()
    layer.register_forward_hook(functools.partial(ours))
    what, whole = taken.put_back()
    assert str(what).startswith("left a hook on '")
    assert whole
    assert not layer._forward_hooks


@pytest.mark.parametrize(("entries", "whole"), [(1 << 16, True), ((1 << 16) + 1, False)])
def test_a_buffer_that_was_written_to_is_put_back_if_it_is_small(entries: int, whole: bool) -> None:
    model = small()
    buffer = torch.zeros(entries)
    inner(model).register_buffer("statistics", buffer)
    taken = Structure(model)
    buffer.add_(1.0)
    what, found = taken.put_back()
    assert found is whole
    assert (what is None) == whole
    assert whole or str(what).startswith("changed the buffer '")
    assert float(buffer.sum()) == (0.0 if whole else entries)


class PackedLinear(nn.Module):
    """Quantised as bitsandbytes does on a CPU: packed anew into other memory by its first call."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.step = float(plain.weight.detach().abs().max()) / 127
        whole = (plain.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.packed:
            self.weight.data, self.packed = self.weight.data.T.contiguous(), True
        return nn.functional.linear(x, self.weight.T * self.step)


def packed() -> PeftModel:
    model = small()
    for layer in lora_layers(model).values():
        layer.base_layer = PackedLinear(layer.get_base_layer())
    return model


def test_a_weight_that_its_own_forward_packs_anew_is_no_write() -> None:
    model, fns = packed(), tiny.eval_fns("llama", NAMES)
    want = score(model, fns)
    assert score(model, fns) == want  # packed from the start
    assert score(packed(), fns, verify=True) == want


@pytest.mark.parametrize("verify", [False, True])
def test_a_write_into_a_packed_weight_is_found(verify: bool) -> None:
    model, fns = packed(), tiny.eval_fns("llama", NAMES)
    bad = after(lambda m: inner(m).get_parameter(FOLDED).data.add_(1), fns["en"])
    score(model, {"zh": fns["zh"]})
    with pytest.raises(EvalError, match=rf"task 'en' changed the weight '.*{FOLDED}'"):
        score(model, {"en": bad}, verify=verify)


def test_structure_tells_a_write_from_a_move() -> None:
    model = small()
    weight = inner(model).get_parameter(PLAIN)
    assert Structure(model).put_back() == (None, True)
    taken = Structure(model)
    with torch.no_grad():
        weight.mul_(2.0)
    what, whole = taken.put_back()
    assert PLAIN in str(what)
    assert not whole
    taken = Structure(model)
    data = weight.data
    weight.data = data * 2.0
    what, whole = taken.put_back()
    assert PLAIN in str(what)
    assert whole
    assert weight.data_ptr() == data.data_ptr()


def test_preserved_keeps_gradients_and_settings() -> None:
    model = small()
    weight = next(model.parameters())
    grad = torch.ones_like(weight)
    weight.grad = grad
    process = settings()
    with preserved(model):
        for mess in QUIET[:5]:
            mess(model)
        weight.grad = None
    assert weight.grad is grad
    assert settings() == process


# ----------------------------------------------------------------------------------- random ones


def drawing(fn: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """Return an eval function that draws its examples with a generator of its own."""
    draw = np.random.default_rng(0)

    def score(model: PeftModel) -> torch.Tensor:
        rows = torch.from_numpy(draw.choice(12, 5, replace=False))
        return fn(model)[rows]

    return score


def test_a_random_function_is_found_with_verify_and_both_scores_are_told() -> None:
    model, fns = small(), tiny.eval_fns("llama", NAMES)
    expected = drawing(fns["en"])
    base = model.get_base_model
    before = snapshot(model)
    with pytest.raises(EvalError, match=r"task 'en' is random.*-\d\.\d+ and -\d\.\d+") as caught:
        score(model, {**fns, "en": drawing(fns["en"])}, verify=True)
    assert moved(before, snapshot(model)) == []
    with torch.no_grad(), model.disable_adapter():
        first, second = (float(expected(model).mean()) for _ in range(2))
    assert base() is inner(model)
    for value in (first, second):
        assert any(math.isclose(value, told, rel_tol=1e-5) for told in numbers(str(caught.value)))


def numbers(text: str) -> list[float]:
    import re

    return [float(found) for found in re.findall(r"-\d+\.\d+", text)]


def test_a_function_that_draws_from_global_generators_is_not_random() -> None:
    fns = tiny.eval_fns("llama", NAMES)

    def draws(model: PeftModel) -> torch.Tensor:
        return fns["en"](model) + torch.rand(1) + float(np.random.rand())

    score(small(), {**fns, "en": draws}, verify=True)


def test_verify_changes_no_score_and_counts_none() -> None:
    fns = tiny.eval_fns("llama", NAMES)
    calls: list[str] = []

    def counted(name: str) -> Callable[[Any], Any]:
        return after(lambda _: calls.append(name), fns[name])

    plain = merge(small(), {name: counted(name) for name in NAMES})
    usual = len(calls)
    calls.clear()
    strict = merge(small(), {name: counted(name) for name in NAMES}, verify=True)
    assert strict.scores == plain.scores
    assert strict.plan == plain.plan
    assert strict.scores_computed == plain.scores_computed == usual
    assert len(calls) == usual + len(NAMES)  # each task's first state twice


@pytest.mark.parametrize("value", [1, "yes", None])
def test_verify_is_a_bool(value: object) -> None:
    with pytest.raises(ConfigError, match="verify"):
        paper(verify=value)


# ------------------------------------------------------------------------------------ slow ones


class Heard:
    """Keeps the events it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def scores(self) -> int:
        return sum(isinstance(event, StateScored) for event in self.events)


def test_a_budget_in_seconds_stops_after_the_score_in_flight_and_the_journal_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("peft_himerge.budget.time.monotonic", lambda: now)
    fns, heard = tiny.eval_fns("llama", NAMES), Heard()

    def slow(model: PeftModel) -> torch.Tensor:
        nonlocal now
        now += 10.0
        return fns["en"](model)

    slow.fingerprint = "slow"  # type: ignore[attr-defined]  # the clock it holds is no matter
    model, journal = small(), tmp_path / "scores.jsonl"
    before = snapshot(model)
    budget = Budget(seconds=35.0)
    with pytest.raises(BudgetError, match=r"stopped after 40 s and (\d+) of at most \d+ scores"):
        merge(model, {**fns, "en": slow}, journal=journal, callbacks=[heard, budget])
    assert moved(before, snapshot(model)) == []
    assert now == 40.0
    resumed = Heard()
    done = merge(model, {**fns, "en": slow}, journal=journal, callbacks=[resumed])
    whole = merge(small(), fns)
    assert heard.scores + resumed.scores == whole.scores_computed
    assert done.scores == whole.scores


def test_a_budget_in_scores_refuses_before_the_first() -> None:
    model, fns, heard = small(), tiny.eval_fns("llama", NAMES), Heard()
    with pytest.raises(BudgetError, match=r"may need (\d+) scores, and budget\.scores is 3"):
        merge(model, fns, callbacks=[heard, Budget(scores=3)])
    assert heard.scores == 0
    merge(model, fns, callbacks=[heard, Budget(scores=heard.events[0].scores)])


@pytest.mark.parametrize("given", [{"scores": 0}, {"seconds": -1.0}, {"scores": True}])
def test_a_budget_of_nothing_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be a number > 0"):
        Budget(**given)
