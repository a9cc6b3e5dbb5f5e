"""Everything that computes, on a GPU against the CPU; run with ``-m gpu``.

HIMERGE_TEST_DEVICE=cpu runs the same lines without a GPU, to debug the tests themselves.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bytewise
import numpy as np
import pytest
import test_journal as journals
import tiny
import torch
import trainers
from accelerate import dispatch_model
from fake_scorer import scorer_of
from paper import paper
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from snapshot import moved, snapshot
from test_conformance import METHODS, RANKS, options_of, takes
from test_conformance import model as stacks_of
from test_methods_inputs import TRIO, inputs_of
from test_select import drawn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_himerge import (
    HiMergeCallback,
    HiMergeConfig,
    add_weighted_adapter,
    apply_plan,
    evals,
    focus_adapters,
    list_methods,
    merge_adapters,
    merge_adapters_hi,
)
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.factors import LoraFactors
from peft_himerge.identity import base_digest
from peft_himerge.keeping import Settings
from peft_himerge.lowrank import low_rank_of_dense
from peft_himerge.methods.registry import MethodInfo
from peft_himerge.methods.stack import Dense, Stack
from peft_himerge.plan import IDENTITY
from peft_himerge.select import kept_count, prune_, thresholds
from peft_himerge.weighted import COMBINATION_TYPES

DEVICE = torch.device(os.environ.get("HIMERGE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
NAMES = list(tiny.NAMES[:2])
FIXED: dict[str, Any] = {"density": 0.4, "scale": 0.9, "max_export_drop": None}
LEARNED = [m for m in list_methods() if m.needs in ("inputs", "gradients")]
FEW_STEPS = {
    "adamerging": {"steps": 3, "lr": 0.05},
    "atlas": {"epochs": 2},
    "fw_merging": {"steps": 3},
    "expert_merging": {"hidden": 0.1},
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def llama(dtype: torch.dtype = torch.float32, count: int = 2, device: Any = DEVICE) -> PeftModel:
    return tiny.peft_model("llama", count, dtype).to(device)


def merge(model: PeftModel, **options: Any) -> Any:
    fns = options.pop("fns", None) or tiny.eval_fns("llama", NAMES)
    return merge_adapters_hi(model, NAMES, fns, config=HiMergeConfig(**{**FIXED, **options}))


def near(got: Tensor, want: Tensor, limit: float, what: object = "") -> None:
    got, want = got.cpu().double(), want.cpu().double()
    assert got.shape == want.shape
    lost = torch.linalg.vector_norm(got - want)
    assert lost <= limit * torch.linalg.vector_norm(want) + 1e-12, (what, float(lost))


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return an adapter's dense deltas; its factors must be where the model is."""
    combiner = Combiner(read_adapters(model, [name]))
    plan = combiner.plan({name: IDENTITY})
    found = {m: combiner.delta(m, combiner.terms(plan, m)) for m in combiner.modules}
    assert {d.device.type for d in found.values()} == {next(model.parameters()).device.type}
    return found


def places(model: PeftModel) -> dict[str, torch.device]:
    return {name: p.device for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------- Hi-Merging


@pytest.mark.parametrize("variant", ["paper", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hi_leaves_the_model_as_it_was_and_its_plan_replays_on_the_cpu(
    variant: str, dtype: torch.dtype
) -> None:
    model = llama(dtype)
    before, where = snapshot(model), places(model)
    folded = merge(model, variant=variant, strategy="fold")
    assert moved(before, snapshot(model, but="merged")) == []
    now = places(model)
    assert {name: now[name] for name in where} == where
    assert len(now) > len(where)
    assert {p.type for p in now.values()} == {DEVICE.type}
    for options in (
        {"strategy": "lazy"},
        {"strategy": "fold", "prefix_cache_gb": 0.0},
        {"strategy": "lazy", "verify": True},
    ):
        other = merge(llama(dtype), variant=variant, **options)
        assert other.plan.to_dict() == folded.plan.to_dict(), options
        for state, row in folded.scores.items():
            assert other.scores[state] == pytest.approx(row, abs=1e-5), (options, state)
    assert folded.blocks_skipped > 0
    on_cpu = llama(dtype, device="cpu")
    assert base_digest(on_cpu) == base_digest(model)
    there = apply_plan(on_cpu, folded.plan)
    for module in folded._combiner.modules:
        near(folded.delta(module), there.delta(module), 1e-5, module)
    assert folded.export_error == pytest.approx(there.export_error, rel=5e-3, abs=1e-6)
    assert folded.rank == there.rank


def test_hi_saves_and_merges_in_place(tmp_path: Path) -> None:
    model = llama()
    result = merge(model)
    result.save(tmp_path / "out")
    plain = tiny.tiny_model("llama").to(DEVICE)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    for module, delta in deltas(loaded, "default").items():
        near(delta, deltas(model, "merged")[module], 1e-6, module)
    module = result._combiner.modules[0]
    weight = model.base_model.model.get_submodule(module).get_base_layer().weight.clone()
    result.merge_into_model()
    new = model.base_model.model.get_submodule(module).get_base_layer().weight
    assert new.device.type == DEVICE.type
    near(new - weight, result.delta(module), 1e-3, module)


def test_half_a_merge_goes_on_and_computes_no_score_twice(tmp_path: Path) -> None:
    fns, calls = journals.counted(NAMES)
    whole = journals.merge(llama(), NAMES, fns, None)
    total = calls.total()
    good = fns["en"]

    def bad(model: Any) -> Any:
        if calls["en"] == 5:
            raise ValueError("out of luck")
        return good(model)

    bad.fingerprint = good.fingerprint  # type: ignore[attr-defined]
    calls.clear()
    with pytest.raises(ValueError, match="out of luck"):
        journals.merge(llama(), NAMES, {**fns, "en": bad}, tmp_path)
    assert 0 < calls.total() < total
    resumed = journals.merge(llama(), NAMES, fns, tmp_path)
    assert calls.total() == total
    assert journals.facts(resumed) == journals.facts(whole)


def cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if ON_GPU else [torch.get_rng_state()]


def test_random_states_of_the_gpu_are_as_before() -> None:
    plain = tiny.eval_fns("llama", NAMES)

    def noisy(name: str) -> Any:
        return lambda m: plain[name](m) + 1e-3 * float(torch.rand((), device=DEVICE))

    fns = {name: noisy(name) for name in NAMES}
    found = []
    for _ in range(2):
        model = llama()
        torch.manual_seed(3)
        torch.rand(5, device=DEVICE)
        before = cuda_states()
        found.append(merge(model, fns=fns, verify=True))  # draws alike, or verify would tell
        assert all(map(torch.equal, before, cuda_states()))
    assert found[0].scores == found[1].scores
    assert found[0].scores != merge(llama()).scores


# ---------------------------------------------------------------------------------------- methods


def placed(stack: Stack) -> Stack:
    factors = [
        None if f is None else replace(f, a=f.a.to(DEVICE), b=f.b.to(DEVICE)) for f in stack.factors
    ]
    assert stack.base is not None
    base = stack.base().to(DEVICE)
    return replace(stack, factors=tuple(factors), base=lambda: base)


def run(info: MethodInfo, stacks: Sequence[Stack], on_cpu: Sequence[Stack]) -> dict[str, Any]:
    options = options_of(info, len(stacks[0].names))
    if info.needs == "nothing":
        return dict(info.function(stacks, **options))
    scorer = scorer_of(on_cpu)
    plain = scorer.scores

    def scores(candidate: Any, tasks: Any = None) -> Any:
        return plain([(m, Dense(d.dense().cpu())) for m, d in candidate], tasks)

    scorer.scores = scores  # type: ignore[method-assign]
    return dict(info.function(stacks, scorer, **options).run(stacks))


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_every_method_gives_what_it_gives_on_the_cpu(info: MethodInfo) -> None:
    for count in [c for c in RANKS if c < 8 and takes(info, c)]:
        for dtype in (torch.float32, torch.bfloat16):
            there = stacks_of(count, dtype)
            want = run(info, there, there)
            got = run(info, [placed(s) for s in there], there)
            assert list(got) == list(want)
            for module, delta in got.items():
                assert delta.dense().device.type == DEVICE.type, module
                near(delta.dense(), want[module].dense(), 1e-4, (module, count, dtype))


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_the_drop_in_gives_what_it_gives_on_the_cpu(kind: str) -> None:
    found = []
    for device in (DEVICE, "cpu"):
        model = llama(device=device)
        before = snapshot(model)
        density = 0.5 if "svd" != kind and kind not in ("linear", "cat") else None
        # At this rank nothing is cut, so that the randomised SVD leaves no trace.
        add_weighted_adapter(model, NAMES, [0.7, -0.4], "m", kind, svd_rank=24, density=density)
        assert moved(before, snapshot(model, but="m")) == []
        found.append(deltas(model, "m"))
    for module, delta in found[0].items():
        near(delta, found[1][module], 1e-4, module)


@pytest.mark.parametrize("info", LEARNED, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_methods_that_learn_take_batches_from_the_cpu(info: MethodInfo, dtype: torch.dtype) -> None:
    inputs = inputs_of("llama", TRIO, labels=True)
    assert {t.device.type for own in inputs.values() for b in own for t in b.values()} == {"cpu"}
    found = []
    for device in (DEVICE, "cpu"):
        model = llama(dtype, 3, device)
        before = snapshot(model)
        done = merge_adapters(model, TRIO, info.name, inputs=inputs, **FEW_STEPS.get(info.name, {}))
        assert moved(before, snapshot(model, but="merged")) == []
        found.append({m.module: done.delta(m.module) for m in done.modules})
    for module, delta in found[0].items():
        assert torch.isfinite(delta).all()
        if dtype == torch.float64:  # in bfloat16 two devices round the inputs differently
            near(delta, found[1][module], 1e-4, module)


def test_focused_adapters() -> None:
    inputs = inputs_of("llama", TRIO)
    models = [llama(count=3), llama(count=3, device="cpu")]
    made = [focus_adapters(model, TRIO, inputs) for model in models]
    assert made[0] == made[1]
    for name in made[0].values():
        want = deltas(models[1], name)
        for module, delta in deltas(models[0], name).items():
            near(delta, want[module], 1e-3, (name, module))


# ------------------------------------------------------------------------------ selection, numbers


def whole_numbers(seed: int, out: int, width: int, rank: int) -> LoraFactors:
    """Return factors whose products are exact on every device, with many ties."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randint(-3, 4, (rank, width), generator=draw).float()
    b = torch.randint(-3, 4, (out, rank), generator=draw).float()
    return LoraFactors(a, b, scaling=0.25)


def to_device(factors: LoraFactors) -> LoraFactors:
    return replace(factors, a=factors.a.to(DEVICE), b=factors.b.to(DEVICE))


def test_the_kept_entries_are_exactly_those_of_the_cpu() -> None:
    there = [whole_numbers(i, *shape, 5) for i, shape in enumerate([(700, 900), (64, 3000)])]
    here = [to_device(f) for f in there]
    densities = (0.0, 0.01, 0.2, 0.5, 0.9, 1.0)
    want = thresholds([(f, 0.0) for f in there], densities)
    got = thresholds([(f, 0.0) for f in here], densities)
    assert got == want
    again = thresholds([(f, want[0.5]) for f in here], [0.2])
    assert again == thresholds([(f, want[0.5]) for f in there], [0.2])
    for density in densities:
        for one, other in zip(here, there, strict=True):
            left = [prune_(block, got[density]) for _, block in one.blocks()]
            right = [prune_(block, want[density]) for _, block in other.blocks()]
            assert all(torch.equal(x.cpu(), y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_is_the_kth_largest_of_a_full_sort(dtype: torch.dtype) -> None:
    parts = [drawn(i, 800, 600 + 50 * i, 16) for i in range(3)]
    parts = [replace(to_device(f), a=f.a.to(DEVICE, dtype)) for f in parts]
    entries = torch.cat([b.abs().flatten() for f in parts for _, b in f.blocks()])
    ranked = entries.sort(descending=True).values
    densities = (0.003, 0.1, 0.55, 0.98)
    for density, tau in thresholds([(f, 0.0) for f in parts], densities).items():
        assert tau == float(ranked[kept_count(density, len(entries)) - 1])


def test_deltas_are_exact_though_the_model_may_round_to_tf32() -> None:
    there = drawn(0, 512, 768, 16)
    here, x, settings = to_device(there), torch.randn(512, 512, device=DEVICE), Settings.take()
    try:
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "tf32"
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
        got = torch.cat([block for _, block in here.blocks()])
        rounded = (x @ x).double() - x.double() @ x.double()
    finally:
        settings.restore()
    near(got, torch.cat([block for _, block in there.blocks()]), 1e-6)
    lost = float(rounded.norm() / (x @ x).norm())
    assert not ON_GPU or lost > 1e-5  # it was on


def test_the_leading_factors_are_near_the_optimum() -> None:
    for seed, shape in enumerate([(400, 300), (90, 700)]):
        delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        best = torch.linalg.svdvals(delta.double())[24:].norm() / delta.double().norm()
        part = low_rank_of_dense(delta, 24, name="m")
        error = (delta - part.b @ part.a).norm() / delta.norm()
        assert part.b.device.type == DEVICE.type
        assert part.error == pytest.approx(float(error), rel=1e-3)
        assert part.error <= 1.02 * float(best)


# ------------------------------------------------------------------------------- scores, training


def evaluations() -> dict[str, tuple[Any, Any]]:
    """Return name -> (model on the CPU, eval function)."""
    import test_evals_models as of

    words, model = bytewise.tokenizer(), bytewise.llama(torch.float64)
    wide = {
        "choice": evals.multiple_choice(of.CHOICES, words),
        "letters": evals.multiple_choice(of.LETTERS, words, normalize="bytes"),
        "likelihood": evals.likelihood(of.PROMPTS, words),
        "generation": evals.generation(of.PROMPTS, words, max_new_tokens=9, batch_size=2),
        "perplexity": evals.perplexity(of.PARAGRAPHS, words, max_length=16),
        "similarity": evals.embedding_similarity(of.PAIRS, words),
    }
    classes = evals.sequence_classification(of.CLASSES, words, of.LABELS)
    tags = evals.token_classification(of.WORDS, words, of.TAGS)
    found = {name: (model, fn) for name, fn in wide.items()}
    return found | {"classes": (bytewise.bert(), classes), "tags": (bytewise.bert_tokens(), tags)}


def test_eval_functions_score_as_on_the_cpu() -> None:
    pytest.importorskip("rouge_score")
    for name, (model, fn) in evaluations().items():
        want, got = fn(model), fn(copy.deepcopy(model).to(DEVICE))
        if not isinstance(want, Mapping):
            got, want = {"": got}, {"": want}
        assert got.keys() == want.keys()
        for metric, value in want.items():
            left, right = (np.asarray(x, dtype=np.float64) for x in (got[metric], value))
            np.testing.assert_allclose(left, right, atol=1e-4, err_msg=f"{name} {metric}")


def trained(out: Path, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    model = trainers.in_training()
    model.base_model.model.set_attn_implementation("eager")  # the others sum in any order
    done = trainers.trainer(out, callbacks, model=model, use_cpu=not ON_GPU, **options)
    done.train()
    found = trainers.facts(done)
    assert {p.device.type for p in done.model.parameters()} == {DEVICE.type}
    return found | {f"cuda rng {i}": s.tolist() for i, s in enumerate(cuda_states())}


@pytest.mark.parametrize("option", ["", "bf16", "tf32"])
def test_training_is_bit_identical_with_and_without(option: str, tmp_path: Path) -> None:
    options = {option: True} if option and (ON_GPU or option != "tf32") else {}
    settings = Settings.take()
    try:
        without = trained(tmp_path / "a", [], **options)
        assert moved(without, trained(tmp_path / "b", [], **options)) == []
        back = HiMergeCallback(
            adapters=[trainers.SIBLING], eval_fns=trainers.eval_fns(), config=paper(**FIXED)
        )
        assert moved(without, trained(tmp_path / "c", [back], **options)) == []
        assert back.memory["round"] >= 2
    finally:
        settings.restore()


# -------------------------------------------------------------------------- memory, several places


def large(hidden: int = 1024, blocks: int = 6) -> PeftModel:
    """Return a model whose adapted weights take 300 MB."""
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=hidden, intermediate_size=11 * hidden // 4,
        num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=32,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=NAMES[0])
        model.add_adapter(NAMES[1], lora)
    return model.to(DEVICE).eval()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@pytest.mark.skipif(not ON_GPU, reason="only a GPU's memory is counted")
def test_a_merge_gives_its_memory_back_and_lazy_needs_no_second_copy() -> None:
    model = large()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    adapted = sum(m.get_base_layer().weight.nbytes for m in layers)
    assert adapted > 2.5e8
    peak, left = {}, {}
    for strategy in ("fold", "lazy", "fold", "lazy"):  # first calls load libraries and workspaces
        before = allocated()
        result = merge(model, variant="paper", strategy=strategy, prefix_cache_gb=0.05)
        peak[strategy] = torch.cuda.max_memory_allocated() - before
        model.delete_adapter("merged")
        del result
        left[strategy] = allocated() - before
    assert max(left.values()) <= 1 << 20, left
    assert peak["fold"] > 0.9 * adapted  # else the next line would tell nothing
    assert peak["lazy"] < 0.6 * adapted, (peak, adapted)


def test_blocks_that_are_offloaded_are_merged_too(tmp_path: Path) -> None:
    here: Any = 0 if ON_GPU else "cpu"
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    at = dict.fromkeys(parts, here)
    at |= {f"model.layers.{i}": here if i < 2 else "cpu" if ON_GPU else "disk" for i in range(4)}
    model = llama(device="cpu")
    dispatch_model(
        model.base_model.model, at, main_device=here, offload_dir=tmp_path, force_hooks=True
    )
    got, want = merge(model, variant="paper"), merge(llama(), variant="paper")
    for state, row in want.scores.items():
        assert got.scores[state] == pytest.approx(row, abs=1e-4), state
    for module in want._combiner.modules:
        near(got.delta(module), want.delta(module), 1e-4, module)
