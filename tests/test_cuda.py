"""Everything that computes, on a GPU against the CPU; run with ``-m gpu``.

HIMERGE_TEST_DEVICE=cpu runs the same lines without a GPU, to debug the tests themselves.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bytewise
import numpy as np
import pytest
import test_evals_models as rows_of
import test_journal as journals
import tiny
import torch
import trainers
from accelerate import dispatch_model
from fake_scorer import scorer_of
from paper import paper
from peft import LoraConfig, PeftModel, get_peft_model
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
    densify,
    evals,
    focus_adapters,
    list_methods,
    merge_adapters,
    merge_adapters_hi,
)
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.factors import LoraFactors
from peft_himerge.geometry import layer_geometry
from peft_himerge.identity import base_digest
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
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU's memory is counted")


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
            assert other.scores[state] == pytest.approx(row, abs=1e-6), (options, state)
    assert folded.blocks_skipped > 0
    there = apply_plan(llama(dtype, device="cpu"), folded.plan)
    for module in folded._combiner.modules:
        near(folded.delta(module), there.delta(module), 1e-5, module)
    assert folded.export_error == pytest.approx(there.export_error, rel=1e-3, abs=1e-6)
    assert folded.rank == there.rank


def test_hi_chooses_on_the_gpu_what_it_chooses_on_the_cpu() -> None:
    here, there = merge(llama(torch.float64)), merge(llama(torch.float64, device="cpu"))
    assert here.plan.to_dict() == there.plan.to_dict()
    for state, row in there.scores.items():
        assert here.scores[state] == pytest.approx(row, abs=1e-4), state


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


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        several = merge(llama())
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert several.to_dict()["scores"] == merge(llama()).to_dict()["scores"]


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
        torch.manual_seed(3)
        torch.rand(5, device=DEVICE)
        before = cuda_states()
        found.append(merge(llama(), fns=fns, verify=True))  # draws alike, or verify would tell
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


@pytest.mark.parametrize("space", ["knots", "core"])
def test_small_spaces_and_lines(space: str) -> None:
    found = []
    for device in (DEVICE, "cpu"):
        model = llama(torch.float64, 3, device)
        done = merge_adapters(model, TRIO, "ties", space=space, post="lines", density=0.5)
        found.append({m.module: done.delta(m.module) for m in done.modules})
    for module, delta in found[0].items():
        near(delta, found[1][module], 1e-6, module)


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


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "linear"])
def test_peft_s_own_numbers(kind: str) -> None:
    found = []
    for device in (DEVICE, "cpu"):
        base = tiny.tiny_model("llama").to(device)
        same = {"target_modules": ["q_proj", "v_proj"], "r": 3}
        model = tiny.add_adapters(base.cpu(), {"p": same, "q": {**same, "seed": 1}}).to(device)
        density = 0.5 if "ties" in kind else None
        add_weighted_adapter(
            model, ["p", "q"], [0.5, 0.5], "m", kind, density=density, compat="peft"
        )
        found.append(deltas(model, "m"))
    for module, delta in found[0].items():
        near(delta, found[1][module], 1e-3, module)


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


def test_a_dora_adapter_is_densified() -> None:
    found = []
    for device in (DEVICE, "cpu"):
        base = tiny.tiny_model("llama")
        dora = {"d": {"target_modules": ["q_proj", "up_proj"], "use_dora": True}}
        model = tiny.add_adapters(base, dora).to(device)
        assert densify(model, "d", adapter_name="plain") < 1e-6
        found.append(deltas(model, "plain"))
    for module, delta in found[0].items():
        near(delta, found[1][module], 1e-4, module)


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


def test_the_leading_factors_are_near_the_optimum() -> None:
    for seed, shape in enumerate([(400, 300), (90, 700)]):
        delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        best = torch.linalg.svdvals(delta.double())[24:].norm() / delta.double().norm()
        part = low_rank_of_dense(delta, 24, name="m")
        error = (delta - part.b @ part.a).norm() / delta.norm()
        assert part.b.device.type == DEVICE.type
        assert part.error == pytest.approx(float(error), rel=1e-3)
        assert part.error <= 1.02 * float(best)


def test_digests_and_geometry_are_those_of_the_cpu() -> None:
    here, there = llama(), llama(device="cpu")
    assert base_digest(here) == base_digest(there)
    pairs = zip(read_adapters(here, NAMES), read_adapters(there, NAMES), strict=True)
    assert all(one.digest() == other.digest() for one, other in pairs)
    got, want = (layer_geometry(Combiner(read_adapters(m, NAMES))) for m in (here, there))
    for one, other in zip(got, want, strict=True):
        assert one.norms == pytest.approx(other.norms, rel=1e-6)
        assert one.pairs[0].cosine == pytest.approx(other.pairs[0].cosine, abs=1e-6)


# ------------------------------------------------------------------------------- scores, training


def evaluations() -> dict[str, tuple[Any, Any]]:
    """Return name -> (model on the CPU, eval function)."""
    words, wide = bytewise.tokenizer(), bytewise.llama(torch.float64)
    choice = [("none", rows_of.CHOICES), ("bytes", rows_of.LETTERS)]
    found = {
        f"multiple choice by {n}": (wide, evals.multiple_choice(r, words, normalize=n))
        for n, r in choice
    }
    prompts, classes = rows_of.PROMPTS, rows_of.CLASSES
    return found | {
        "likelihood": (wide, evals.likelihood(prompts, words)),
        "generation": (wide, evals.generation(prompts, words, max_new_tokens=9, batch_size=2)),
        "generation by T5": (
            bytewise.t5(torch.float64),
            evals.generation(prompts, words, max_new_tokens=7),
        ),
        "perplexity": (wide, evals.perplexity(rows_of.PARAGRAPHS, words, max_length=16)),
        "classes": (
            bytewise.bert(),
            evals.sequence_classification(classes, words, rows_of.LABELS),
        ),
        "tags": (
            bytewise.bert_tokens(),
            evals.token_classification(rows_of.WORDS, words, rows_of.TAGS),
        ),
        "similarity": (wide, evals.embedding_similarity(rows_of.PAIRS, words)),
    }


@pytest.mark.parametrize("name", evaluations())
def test_eval_functions_score_as_on_the_cpu(name: str) -> None:
    model, fn = evaluations()[name]
    want = fn(model)
    got = fn(copy.deepcopy(model).to(DEVICE))
    if not isinstance(want, Mapping):
        got, want = {"": got}, {"": want}
    assert got.keys() == want.keys()
    for metric, value in want.items():
        found = np.asarray(got[metric], dtype=np.float64)
        np.testing.assert_allclose(found, np.asarray(value, np.float64), atol=1e-4, err_msg=metric)


def trained(out: Path, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    model = trainers.in_training()
    model.base_model.model.set_attn_implementation("eager")  # the others sum in any order
    done = trainers.trainer(out, callbacks, model=model, use_cpu=not ON_GPU, **options)
    done.train()
    found = trainers.facts(done)
    assert {p.device.type for p in done.model.parameters()} == {DEVICE.type}
    return found | {f"cuda rng {i}": s.tolist() for i, s in enumerate(cuda_states())}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"tf32": True}], ids=str)
def test_training_is_bit_identical_with_and_without(
    options: dict[str, Any], tmp_path: Path
) -> None:
    if "tf32" in options and not ON_GPU:
        options = {}
    try:
        without = trained(tmp_path / "a", [], **options)
        assert moved(without, trained(tmp_path / "b", [], **options)) == []
        config = paper(**FIXED)
        back = HiMergeCallback(
            adapters=[trainers.SIBLING], eval_fns=trainers.eval_fns(), config=config
        )
        assert moved(without, trained(tmp_path / "c", [back], **options)) == []
        assert back.memory["round"] >= 2
    finally:
        if "tf32" in options:
            torch.backends.fp32_precision = "none"


# -------------------------------------------------------------------------- memory, several places


@pytest.fixture
def large() -> Iterator[PeftModel]:
    """A model whose adapted weights take 300 MB on a GPU."""
    hidden, blocks = (1024, 6) if ON_GPU else (64, 2)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=NAMES[0])
        model.add_adapter(NAMES[1], lora)
    yield model.to(DEVICE).eval()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@needs_gpu
def test_a_merge_gives_its_memory_back_and_lazy_needs_no_second_copy(large: PeftModel) -> None:
    layers = [m for m in large.modules() if hasattr(m, "lora_A")]
    adapted = sum(m.get_base_layer().weight.nbytes for m in layers)
    peaks = {}
    for strategy in ("fold", "lazy", "fold", "lazy"):  # first calls load libraries and workspaces
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        result = merge(large, variant="paper", strategy=strategy, prefix_cache_gb=0.05)
        peaks[strategy] = torch.cuda.max_memory_allocated() - before
        large.delete_adapter("merged")
        del result
        left = allocated() - before
    assert left <= 1 << 20
    assert adapted > 2.5e8
    assert peaks["fold"] > 0.9 * adapted  # else the next line would tell nothing
    assert peaks["lazy"] < 0.6 * adapted, peaks


@needs_gpu
def test_blocks_that_are_offloaded_to_the_cpu_are_merged_too(tmp_path: Path) -> None:
    whole = llama(device="cpu")
    whole.save_pretrained(str(tmp_path))
    plain = tiny.tiny_model("llama")
    keys = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    offloaded = dispatch_model(plain, dict.fromkeys(keys, 0) | blocks, main_device=0)
    model = get_peft_model(offloaded, whole.peft_config[NAMES[0]], adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], whole.peft_config[NAMES[1]])
    own = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.is_meta:
                parameter.copy_(own[name])
    model.eval()
    result = merge(model, variant="paper", strategy="auto")
    want = merge(llama(), variant="paper", strategy="lazy")
    for state, row in want.scores.items():
        assert result.scores[state] == pytest.approx(row, abs=1e-3), state
