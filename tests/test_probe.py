"""The live model is as it was before, to the bit and to the object, whatever happens inside."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from paper import paper
from peft import LoraConfig, PeftModel
from snapshot import moved, snapshot
from torch import nn

from peft_himerge import HiMergeConfig, MergeResult, apply_plan, merge_adapters_hi
from peft_himerge.adapters import lora_layers
from peft_himerge.combine import add_to_weight
from peft_himerge.errors import AdapterError, EvalError
from peft_himerge.events import ContributionsMeasured, Event, LayerResolved, StateScored

NAMES = ["zh", "en"]
STRATEGIES = ["fold", "lazy"]
Mess = Callable[[PeftModel], None]


def run(model: PeftModel, fns: Any, callbacks: Any = (), **options: Any) -> MergeResult:
    config = {"density": 0.4, "scale": 0.9, "max_export_drop": None, **options}
    return merge_adapters_hi(model, NAMES, fns, config=paper(**config), callbacks=callbacks)


def dropped(kind: str = "llama", dropout: float = 0.1) -> PeftModel:
    """A float32 model whose adapters have dropout."""
    specs = tiny.default_specs(kind, 2)
    for spec in specs.values():
        spec["lora_dropout"] = dropout
    return tiny.add_adapters(tiny.tiny_model(kind), specs)


# ------------------------------------------------------------------------- states to come back to


def fresh(model: PeftModel) -> None:
    """As PEFT made it."""


def in_training(model: PeftModel) -> None:
    model.train()
    model.base_model.model.lm_head.eval()  # a flag of its own, somewhere in the middle


def other_active(model: PeftModel) -> None:
    model.set_adapter("en")


def both_active(model: PeftModel) -> None:
    model.base_model.set_adapter(["en", "zh"])


def switched_off(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def enable_checkpointing(model: PeftModel) -> None:
    inner = model.base_model.model  # the name of the method changed in transformers 5
    new = getattr(inner, "activation_checkpointing_enable", None)
    (new or inner.gradient_checkpointing_enable)()


def checkpointing(model: PeftModel) -> None:
    model.train()
    enable_checkpointing(model)
    model.base_model.model.config.use_cache = False


def half_trainable(model: PeftModel) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)


def with_gradients(model: PeftModel) -> None:
    model.train()
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()


STARTS = [
    fresh,
    in_training,
    other_active,
    both_active,
    switched_off,
    checkpointing,
    half_trainable,
    with_gradients,
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("start", STARTS)
def test_model_in_any_state_comes_back_with_one_more_adapter(start: Mess, strategy: str) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    start(model)
    before = snapshot(model)
    run(model, fns, strategy=strategy)
    assert moved(before, snapshot(model, but="merged")) == []
    assert list(model.peft_config) == ["zh", "en", "merged"]
    mine = [p for n, p in model.named_parameters() if "merged" in n.split(".")]
    assert mine
    assert not any(p.requires_grad for p in mine)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "qwen2", "gemma3"])
def test_model_of_any_architecture_comes_back_with_one_more_adapter(kind: str) -> None:
    model, fns = tiny.peft_model(kind, 2, torch.float32), tiny.eval_fns(kind, NAMES)
    before = snapshot(model)
    run(model, fns)
    assert moved(before, snapshot(model, but="merged")) == []


def test_scores_do_not_depend_on_the_state_the_model_was_in() -> None:
    fns = tiny.eval_fns("llama", NAMES)
    results = []
    for start in STARTS:
        model = dropped()
        start(model)
        results.append(run(model, fns))
    assert all(result.scores == results[0].scores for result in results)
    assert len({result.plan.fingerprint for result in results}) == 1


def test_grad_mode_of_the_caller_comes_back() -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    with torch.no_grad():
        run(model, fns)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_outputs_of_the_sources_are_the_same_bits_afterwards(strategy: str) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    ids = torch.arange(12).view(2, 6)

    def outputs() -> list[torch.Tensor]:
        found = []
        with torch.no_grad():
            for name in NAMES:
                model.set_adapter(name)
                found.append(model(input_ids=ids).logits)
            with model.disable_adapter():
                found.append(model(input_ids=ids).logits)
        return found

    before = outputs()
    run(model, fns, strategy=strategy)
    assert all(torch.equal(x, y) for x, y in zip(before, outputs(), strict=True))


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    def losses(merge: bool) -> list[float]:
        model, fns = dropped(), tiny.eval_fns("llama", NAMES)
        model.train()
        optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
        torch.manual_seed(5)
        found = []
        for step in range(4):
            if merge and step == 2:
                run(model, fns)
            ids = torch.randint(0, tiny.VOCAB, (2, 8))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(float(loss.detach()))
        return found

    assert losses(True) == losses(False)


# --------------------------------------------------------------------------------- when it raises


class Stop(BaseException):
    """Like KeyboardInterrupt, no Exception."""


def raising(fn: Callable[[Any], Any], error: BaseException, at: int) -> Callable[[Any], Any]:
    calls = 0

    def wrapped(model: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            fn(model)  # leaves something half done: caches, RNG
            raise error
        return fn(model)

    return wrapped


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), Stop(), SystemExit(3)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("at", [1, 9, 20])
def test_model_comes_back_whole_when_an_eval_function_raises(
    error: BaseException, strategy: str, at: int
) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    in_training(model)
    before = snapshot(model)
    with pytest.raises(type(error)) as caught:
        run(model, {**fns, "en": raising(fns["en"], error, at)}, strategy=strategy)
    assert caught.value is error
    assert moved(before, snapshot(model)) == []


def test_error_of_an_eval_function_says_whose_it_was() -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    with pytest.raises(ValueError, match="boom") as caught:
        run(model, {**fns, "en": raising(fns["en"], ValueError("boom"), 3)})
    assert any("'en'" in note for note in getattr(caught.value, "__notes__", ["'en'"]))


class Inside(nn.Module):
    """Wraps a module's forward and raises in the middle of the model at the n-th call."""

    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__()
        self.error, self.left = error, at

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["model.layers.2.mlp", "model.layers.2.mlp.down_proj"])
def test_model_comes_back_whole_when_its_own_forward_is_interrupted(
    strategy: str, where: str
) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    module = model.base_model.model.get_submodule(where)
    inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    handle = inner.register_forward_pre_hook(Inside(KeyboardInterrupt(), 11))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, fns, strategy=strategy)
    assert moved(before, snapshot(model)) == []
    handle.remove()


@pytest.mark.parametrize("kind", ["started", "scored", "measured", "resolved", "exported"])
@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_model_comes_back_whole_when_a_callback_raises(kind: str, error: BaseException) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    reached = []

    def callback(event: Event) -> None:
        hit = {
            "started": type(event).__name__ == "MergeStarted",
            "scored": isinstance(event, StateScored) and event.done == 7,
            "measured": isinstance(event, ContributionsMeasured),
            "resolved": isinstance(event, LayerResolved),
            "exported": isinstance(event, StateScored) and event.stage == "export",
        }[kind]
        if hit:
            reached.append(event)
            raise error

    before = snapshot(model)
    with pytest.raises(type(error)):
        run(model, fns, callbacks=[callback])
    assert len(reached) == 1
    assert moved(before, snapshot(model)) == []


def test_model_comes_back_whole_when_the_last_callback_raises() -> None:
    # The merge is done then; what must not happen is a half-restored model.
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)

    def callback(event: Event) -> None:
        if type(event).__name__ == "MergeFinished":
            raise ValueError("boom")

    before = snapshot(model)
    with pytest.raises(ValueError, match="boom"):
        run(model, fns, callbacks=[callback])
    assert moved(before, snapshot(model, but="merged")) == []


@pytest.mark.parametrize("active", ["zh", "en", "both", "none"])
@pytest.mark.parametrize("stage", ["analysis", "export"])
def test_failed_merge_warns_of_nothing_and_leaves_no_adapter(active: str, stage: str) -> None:
    # Warnings are errors here: a warning while cleaning up would hide the real error.
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    if active == "none":
        switched_off(model)
    else:
        model.base_model.set_adapter(NAMES if active == "both" else [active])

    def callback(event: Event) -> None:
        if isinstance(event, StateScored) and event.stage == stage:
            raise ValueError("the real error")

    before = snapshot(model)
    with pytest.raises(ValueError, match="the real error"):
        run(model, fns, callbacks=[callback])
    assert list(model.peft_config) == NAMES
    assert moved(before, snapshot(model)) == []


# ------------------------------------------------------------------- eval functions that meddle


def trains(model: PeftModel) -> None:
    model.train()


def sets_adapter(model: PeftModel) -> None:
    model.set_adapter("en")


def switches_on(model: PeftModel) -> None:
    model.base_model.enable_adapter_layers()


def seeds(model: PeftModel) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def draws(model: PeftModel) -> None:
    torch.rand(3)
    random.random()
    np.random.rand(3)


def no_cache(model: PeftModel) -> None:
    model.base_model.model.config.use_cache = False
    if model.base_model.model.generation_config is not None:
        model.base_model.model.generation_config.use_cache = False


def grads(model: PeftModel) -> None:
    torch.set_grad_enabled(True)
    model.requires_grad_(True)


def stops_checkpointing(model: PeftModel) -> None:
    for module in model.modules():
        if "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = False


def generates(model: PeftModel) -> None:
    model.generate(input_ids=torch.arange(4, 8).view(1, 4), max_new_tokens=3, do_sample=True)


MESSES = [
    trains,
    sets_adapter,
    switches_on,
    seeds,
    draws,
    no_cache,
    grads,
    stops_checkpointing,
    generates,
]


@pytest.mark.parametrize("mess", MESSES)
def test_model_comes_back_whole_from_an_eval_function_that_meddles(mess: Mess) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    if mess is stops_checkpointing:
        checkpointing(model)
    want = run(dropped(), fns)

    def meddling(model: PeftModel) -> torch.Tensor:
        value = fns["en"](model)
        mess(model)
        return value

    before = snapshot(model)
    result = run(model, {**fns, "en": meddling})
    assert moved(before, snapshot(model, but="merged")) == []
    # What it did in one call must not reach the next.
    assert result.scores == want.scores


@pytest.mark.parametrize("start", [fresh, other_active, switched_off])
def test_eval_function_that_switches_adapters_off_for_a_while_sees_the_state(start: Mess) -> None:
    # As a KL metric does that asks for the base model's logits through PEFT's own context manager.
    fns = tiny.eval_fns("llama", NAMES)

    def inside(model: PeftModel) -> torch.Tensor:
        with model.disable_adapter():
            return fns["en"](model)

    want = run(dropped(), fns)
    model = dropped()
    start(model)
    before = snapshot(model)
    result = run(model, {**fns, "en": inside})
    assert moved(before, snapshot(model, but="merged")) == []
    got, expected = dict(result.scores), dict(want.scores)
    del got["exported"], expected["exported"]  # that one is shown as an adapter, switched off here
    assert got == expected


def test_eval_function_that_samples_gives_equal_scores_in_equal_states() -> None:
    fns = tiny.eval_fns("llama", NAMES)

    def noisy(model: PeftModel) -> float:
        draw = float(torch.rand(1)) + random.random() + float(np.random.rand())
        return float(fns["en"](model).mean()) + draw

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    first = run(dropped(), {**fns, "en": noisy})
    second = run(dropped(), {**fns, "en": noisy})
    assert first.scores == second.scores
    quiet = run(dropped(), fns)
    # The same noise in every state: differences are those without it.
    for one, other in zip(first.contributions, quiet.contributions, strict=True):
        assert one.gamma == pytest.approx(other.gamma, abs=1e-5)


def poke(path: str, how: Callable[[nn.Parameter], None]) -> Mess:
    def change(model: PeftModel) -> None:
        with torch.no_grad():
            how(model.base_model.model.get_parameter(path))

    return change


CHANGED = "model.layers.1.mlp.gate_proj.weight"
SOURCE = "model.layers.1.self_attn.q_proj.lora_A.zh.weight"
FOLDED = "model.layers.1.self_attn.q_proj.base_layer.weight"


def rebind(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 2


# A write through `.data.add_()` or numpy leaves no trace that can be seen without hashing.
@pytest.mark.parametrize("path", [CHANGED, SOURCE, FOLDED])
@pytest.mark.parametrize(
    "how", [lambda p: p.add_(0.01), lambda p: p.copy_(2 * p), rebind], ids=["add", "copy", "data ="]
)
def test_eval_function_that_changes_a_weight_is_named_with_the_weight(
    path: str, how: Callable[[nn.Parameter], None]
) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    change = poke(path, how)

    def meddling(model: PeftModel) -> torch.Tensor:
        value = fns["en"](model)
        change(model)
        return value

    name = path.rpartition(".")[0].rpartition(".base_layer")[0] or path
    with pytest.raises(EvalError, match=rf"'en'.*{name}"):
        run(model, {**fns, "en": meddling})
    assert list(model.peft_config) == NAMES


def test_eval_function_that_replaces_a_weight_is_named_with_the_weight() -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)

    def meddling(model: PeftModel) -> float:
        gate = model.base_model.model.model.layers[1].mlp.gate_proj
        gate.weight = nn.Parameter(gate.weight.detach().clone())
        return 0.5

    with pytest.raises(EvalError, match=r"'en'.*layers\.1\.mlp\.gate_proj"):
        run(model, {**fns, "en": meddling})


# ------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fold_and_lazy_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    fns = tiny.eval_fns(kind, NAMES)
    fold = run(tiny.peft_model(kind, 2, dtype), fns, strategy="fold")
    lazy = run(tiny.peft_model(kind, 2, dtype), fns, strategy="lazy")
    assert fold.scores == lazy.scores
    assert fold.contributions == lazy.contributions
    assert fold.plan.fingerprint == lazy.plan.fingerprint


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "gemma3"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_blocks_give_the_same_bits_as_full_runs(kind: str, strategy: str) -> None:
    fns = tiny.eval_fns(kind, NAMES)
    full = run(tiny.peft_model(kind, 2), fns, strategy=strategy, prefix_cache_gb=0)
    shared = run(tiny.peft_model(kind, 2), fns, strategy=strategy)
    little = run(tiny.peft_model(kind, 2), fns, strategy=strategy, prefix_cache_gb=2e-5)
    assert full.states.keys() == shared.states.keys()
    assert full.scores == shared.scores == little.scores
    assert full.contributions == shared.contributions == little.contributions


@pytest.mark.parametrize("cache", [0, 2.0])
def test_eval_function_that_scores_with_dropout_sees_the_same_with_and_without_sharing(
    cache: float,
) -> None:
    # Monte-Carlo dropout: a block that is skipped must not move the random numbers of the others.
    from transformers import BertConfig, BertForSequenceClassification

    def model_with_dropout() -> PeftModel:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=32,
            num_labels=4,
            hidden_dropout_prob=0.3,
        )
        specs = tiny.default_specs("bert", 2)
        return tiny.add_adapters(BertForSequenceClassification(config), specs)

    fns = tiny.eval_fns("bert", NAMES)

    def sampled(model: PeftModel) -> torch.Tensor:
        model.train()
        return fns["en"](model)

    torch.manual_seed(11)
    want = run(model_with_dropout(), {**fns, "en": sampled}, prefix_cache_gb=0)
    torch.manual_seed(11)
    got = run(model_with_dropout(), {**fns, "en": sampled}, prefix_cache_gb=cache)
    for one, other in zip(want.contributions, got.contributions, strict=True):
        assert one == other


class Int8Linear(nn.Module):
    """A quantised stand-in: an int8 weight, rows scaled, and a forward of its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        weight = plain.weight.detach()
        self.steps = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter(
            (weight / self.steps).round().to(torch.int8), requires_grad=False
        )

    def plain(self) -> torch.Tensor:
        return self.weight * self.steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.plain().to(x.dtype))


def quantised() -> PeftModel:
    model = tiny.peft_model("llama", 2)
    for layer in lora_layers(model).values():
        layer.base_layer = Int8Linear(layer.get_base_layer())
    return model


def rounded() -> PeftModel:
    """The same numbers in ordinary weights."""
    model = tiny.peft_model("llama", 2)
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        base.weight.data = Int8Linear(base).plain()
    return model


def test_quantised_weights_score_as_the_same_numbers_in_ordinary_ones() -> None:
    fns = tiny.eval_fns("llama", NAMES)
    model = quantised()
    before = snapshot(model)
    got = run(model, fns, strategy="auto")
    assert moved(before, snapshot(model, but="merged")) == []
    want = run(rounded(), fns)
    for state, row in want.scores.items():
        assert got.scores[state] == pytest.approx(row, abs=1e-10), state
    assert got.plan.fingerprint == want.plan.fingerprint


def test_quantised_weights_come_back_whole_when_an_eval_function_raises() -> None:
    model, fns = quantised(), tiny.eval_fns("llama", NAMES)
    before = snapshot(model)
    with pytest.raises(ValueError, match="boom"):
        run(model, {**fns, "en": raising(fns["en"], ValueError("boom"), 9)})
    assert moved(before, snapshot(model)) == []


def test_offloaded_weights_are_scored_by_adding_the_deltas_output() -> None:
    fns = tiny.eval_fns("llama", NAMES)
    want = run(tiny.peft_model("llama", 2), fns)
    model = tiny.peft_model("llama", 2)
    for layer in lora_layers(model).values():
        layer.get_base_layer()._hf_hook = object()  # what accelerate leaves on an offloaded layer
    got = run(model, fns)
    for state, row in want.scores.items():
        assert got.scores[state] == pytest.approx(row, abs=1e-10), state


def test_fold_of_a_quantised_weight_is_refused_by_name() -> None:
    model = quantised()
    before = snapshot(model)

    def never(_: object) -> float:
        raise AssertionError("an eval function ran")

    fns: dict[str, Any] = dict.fromkeys(NAMES, never)
    for config in (HiMergeConfig(strategy="fold"), paper(strategy="fold")):
        with pytest.raises(AdapterError, match=r"strategy='fold'.*(lm_head|layers\.)"):
            merge_adapters_hi(model, NAMES, fns, config=config)
    assert moved(before, snapshot(model)) == []


def test_quantised_layer_that_is_no_linear_is_refused_by_name() -> None:
    model = tiny.peft_model("gpt2", 2)
    layer = lora_layers(model)["transformer.h.1.attn.c_attn"]
    layer.get_base_layer()._hf_hook = object()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"transformer\.h\.1\.attn\.c_attn"):
        run(model, tiny.eval_fns("gpt2", NAMES))
    assert moved(before, snapshot(model)) == []


def parameters_in_memory() -> list[nn.Parameter]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is nn.Parameter]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_folded_copies_are_let_go_when_the_merge_is_over(strategy: str) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    others = parameters_in_memory()  # held, so that no id is used again
    result = run(model, fns, strategy=strategy)
    known = {id(t) for t in (*others, *model.parameters())}
    assert [t.shape for t in parameters_in_memory() if id(t) not in known] == []
    assert result.rank


# -------------------------------------------------------------------------------------- apply_plan


@pytest.mark.parametrize("start", STARTS)
def test_apply_plan_leaves_the_model_in_its_state(start: Mess) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    start(model)
    plan = run(model, fns).plan
    before = snapshot(model)
    apply_plan(model, plan, adapter_name="again")
    assert moved(before, snapshot(model, but="again")) == []


def test_model_with_an_unrelated_adapter_keeps_it(tmp_path: Any) -> None:
    model, fns = dropped(), tiny.eval_fns("llama", NAMES)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter("bystander", LoraConfig(r=2, target_modules=["gate_proj"]))
    before = snapshot(model)
    run(model, fns)
    assert moved(before, snapshot(model, but="merged")) == []
    assert not any(
        "merged" in layer.scaling
        for path, layer in lora_layers(model).items()
        if path.endswith("gate_proj")
    )


def test_base_wider_than_the_adapters_keeps_all_its_digits() -> None:
    weight = torch.rand(3, 4, dtype=torch.float64)
    new = add_to_weight(weight, "linear", [(slice(0, 3), torch.zeros(3, 4))])
    assert torch.equal(new, weight)
    assert torch.equal(add_to_weight(weight, "linear", []), weight)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_model_scores_as_the_same_model_uncompiled(strategy: str) -> None:
    fns = tiny.eval_fns("qwen2", NAMES)
    want = run(tiny.peft_model("qwen2", 2), fns, strategy=strategy)
    model = tiny.peft_model("qwen2", 2)
    for block in model.base_model.model.model.layers:
        block.compile(backend="eager")
    fns["zh"](model)  # compiled for the weights and hooks of this moment
    got = run(model, fns, strategy=strategy)
    assert got.scores == want.scores
    assert all(block._compiled_call_impl for block in model.base_model.model.model.layers)
