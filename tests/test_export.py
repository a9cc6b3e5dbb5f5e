"""Exported adapters and checkpoints: their error is told, and others read them as they are."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot import moved, run_python, snapshot

from peft_himerge import Edit, HiMergeConfig, MergePlan, MergeResult, apply_plan, merge_adapters_hi
from peft_himerge import checkpoint as checkpoint_room
from peft_himerge import combine as combine_room
from peft_himerge import export as export_room
from peft_himerge.adapters import lora_layers, read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import ConfigError, ExportError, HiMergeError, PlanError

NAMES = ["zh", "en"]
IDS = torch.arange(5, 29).view(3, 8)
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "plan.json",
    "report.html",
    "report.json",
    "report.md",
    "README.md",
}


def merge(model: PeftModel, kind: str = "llama", **options: Any) -> MergeResult:
    config = {"density": 0.4, "scale": 0.9, "max_export_drop": None, **options}
    fns = tiny.eval_fns(kind, NAMES)
    return merge_adapters_hi(model, NAMES, fns, config=HiMergeConfig(**config))


def model_wise(model: PeftModel, density: float = 0.4, **options: Any) -> MergeResult:
    combiner = Combiner(read_adapters(model, NAMES))
    edits = {name: Edit(density, 0.9) for name in NAMES}
    return apply_plan(model, MergePlan.model_wise(combiner.table(), edits), **options)


def product(model: PeftModel, module: str, name: str = "merged") -> torch.Tensor:
    """The exported delta as the adapter in the model holds it, (out, in)."""
    layer = lora_layers(model)[module]
    assert layer.scaling[name] == 1.0
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]
    return layer.lora_B[name].weight @ layer.lora_A[name].weight


@torch.no_grad()
def logits(model: Any, adapter: str | None = None, ids: torch.Tensor = IDS) -> torch.Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
        return model(input_ids=ids).logits
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return model(input_ids=ids).logits
    return model(input_ids=ids).logits


# ---------------------------------------------------------------------------------- LoRA, in place


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("rank", ["auto", "exact"])
def test_unpruned_merge_is_exported_exactly(kind: str, rank: str) -> None:
    model = tiny.peft_model(kind, 2)
    result = merge(model, kind, density=1.0, layer_density=1.0, rank=rank)
    assert not result.plan.pruned
    assert result.export_error < 1e-12
    assert result.scores["exported"] == pytest.approx(result.scores["merged"], abs=1e-10)
    result.merge_into_model()
    assert torch.allclose(logits(model), logits_of_exported(kind, rank), atol=1e-9)


def logits_of_exported(kind: str, rank: str) -> torch.Tensor:
    model = tiny.peft_model(kind, 2)
    merge(model, kind, density=1.0, layer_density=1.0, rank=rank)
    return logits(model, "merged")


def test_pruned_merge_at_rank_exact_loses_nothing() -> None:
    model = tiny.peft_model("llama", 2)
    result = merge(model, rank="exact")
    assert result.plan.pruned
    assert result.export_error == 0.0
    assert result.scores["exported"] == pytest.approx(result.scores["merged"], abs=1e-10)


@pytest.mark.parametrize("rank", [1, 4, 0.6, 0.95, "auto"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pruned_merge_tells_each_modules_true_error_near_the_optimum(
    kind: str, rank: int | float | str
) -> None:
    model = tiny.peft_model(kind, 2)
    result = merge(model, kind, rank=rank)
    lost = total = 0.0
    for m in result.modules:
        delta = result.delta(m.module)
        off = float((delta - product(model, m.module)).norm())
        norm = float(delta.norm())
        assert m.norm == pytest.approx(norm, rel=1e-9)
        assert m.error * norm == pytest.approx(off, rel=1e-6, abs=1e-10), m.module
        values = torch.linalg.svdvals(delta)
        assert off <= 1.02 * float(values[m.rank :].norm()) + 1e-10, m.module
        if isinstance(rank, int):
            assert m.rank <= rank
        if isinstance(rank, float):
            assert off**2 <= (1 - rank) * norm**2 + 1e-9
        lost, total = lost + off**2, total + norm**2
    assert result.export_error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert result.rank == max(m.rank for m in result.modules)
    ranks = {
        f.weight.shape[0]
        for layer in lora_layers(model).values()
        for name, f in layer.lora_A.items()
        if name == "merged"
    }
    assert ranks == {result.rank}


def test_auto_rank_of_a_pruned_merge_is_the_sum_of_the_sources_ranks() -> None:
    model = tiny.peft_model("gpt2", 2)
    result = merge(model, "gpt2")
    assert result.plan.pruned
    assert result.rank == 3 + 5


def test_export_is_deterministic_whatever_the_global_generator_says() -> None:
    factors = []
    for seed in (1, 2):
        model = tiny.peft_model("llama", 2, torch.float32)
        torch.manual_seed(seed)
        merge(model, rank=3)
        mine = {n: p for n, p in model.named_parameters() if "merged" in n.split(".")}
        factors.append(mine)
    assert all(torch.equal(p, factors[1][n]) for n, p in factors[0].items())


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "full", None])
def test_apply_plan_with_a_rank_that_is_none_is_refused(rank: Any) -> None:
    model = tiny.peft_model("llama", 2)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="rank"):
        model_wise(model, rank=rank)
    assert moved(before, snapshot(model)) == []


def test_dtype_of_the_export_is_that_of_the_sources() -> None:
    model = tiny.peft_model("llama", 2, torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.bfloat16)
    model_wise(model)
    mine = [p for n, p in model.named_parameters() if "merged" in n.split(".")]
    assert {p.dtype for p in mine} == {torch.bfloat16}
    model = tiny.peft_model("llama", 2, torch.bfloat16)  # here the factors are float32
    model_wise(model)
    mine = [p for n, p in model.named_parameters() if "merged" in n.split(".")]
    assert {p.dtype for p in mine} == {torch.float32}


def winning() -> tuple[PeftModel, dict[str, Any]]:
    """One adapter and a task that it is good at: to say what it says itself."""
    model = tiny.peft_model("llama", 1)
    targets = logits(model, "zh").argmax(-1, keepdim=True)

    def fn(model: Any) -> torch.Tensor:
        chosen = model(input_ids=IDS).logits.log_softmax(-1).gather(-1, targets)
        return chosen.detach().flatten(1).mean(1)

    return model, {"zh": fn}


def limited(model: PeftModel, fns: Any, limit: float | None, **options: Any) -> MergeResult:
    config = HiMergeConfig(density=0.5, scale=1.0, max_export_drop=limit, **options)
    return merge_adapters_hi(model, ["zh"], fns, config=config)


def test_export_that_loses_too_much_is_refused_and_hands_over_the_plan() -> None:
    model, fns = winning()
    before = snapshot(model)
    with pytest.raises(ExportError, match=r"max_export_drop.*rank") as caught:
        limited(model, fns, 0.1, rank=1)
    assert moved(before, snapshot(model)) == []
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, HiMergeError)
    plan = caught.value.plan
    assert isinstance(plan, MergePlan)
    saved = apply_plan(model, plan, rank="exact")
    assert saved.export_error == 0.0


def test_export_drop_is_the_lost_share_of_the_gain_over_the_base() -> None:
    model, fns = winning()
    scores = limited(model, fns, None, rank=1).scores
    base, merged, exported = (scores[s]["zh"] for s in ("base", "merged", "exported"))
    drop = (merged - exported) / (merged - base)
    assert 0.05 < drop < 2
    model, fns = winning()
    assert limited(model, fns, drop + 1e-6, rank=1).scores == scores
    model, fns = winning()
    with pytest.raises(ExportError, match=rf"{drop:.0%}"):
        limited(model, fns, drop - 1e-6, rank=1)


def test_export_without_loss_passes_any_limit() -> None:
    model, fns = winning()
    assert limited(model, fns, 1e-9, rank="exact").scores["exported"]


# --------------------------------------------------------------------------------------- the folder


def test_saved_folder_holds_the_adapter_the_plan_and_the_report(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    result = merge(model, rank=4)
    folder = result.save(tmp_path / "deep" / "out")
    assert {p.name for p in folder.iterdir()} == FILES
    assert MergePlan.from_json(folder / "plan.json") == result.plan
    facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert facts.pop("geometry")["layers"]
    assert facts == json.loads(json.dumps(result.to_dict()))
    assert facts["scores"] == result.scores
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "hi-merging" in card


def test_saved_config_follows_the_portable_profile(tmp_path: Path) -> None:
    model = tiny.peft_model("gpt2", 3, torch.float32)  # rank and alpha patterns, rsLoRA inside
    fns = tiny.eval_fns("gpt2", tiny.NAMES[:3])
    config = HiMergeConfig(density=0.4, scale=0.9, max_export_drop=None)
    result = merge_adapters_hi(model, list(tiny.NAMES[:3]), fns, config=config)
    folder = result.save(tmp_path)
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert fields["peft_type"] == "LORA"
    assert fields["r"] == fields["lora_alpha"] == result.rank
    assert fields["use_rslora"] is False
    assert fields["use_dora"] is False
    assert not fields.get("lora_bias")
    assert fields["bias"] == "none"
    assert not fields["rank_pattern"]
    assert not fields["alpha_pattern"]
    assert not fields["modules_to_save"]
    assert not fields["layers_to_transform"]
    assert fields["lora_dropout"] == 0.0
    assert fields["inference_mode"] is True
    assert fields["fan_in_fan_out"] is True
    assert fields["target_modules"] == sorted(fields["target_modules"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert value.shape[0 if ".lora_A." in key else 1] == result.rank
        assert value.dtype == torch.float32
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "t5", "gemma3"])
def test_saved_adapter_is_read_by_peft_onto_exactly_the_same_modules(
    kind: str, tmp_path: Path
) -> None:
    model = tiny.peft_model(kind, 2, torch.float32)
    result = merge(model, kind, rank=4)
    result.save(tmp_path)
    twin = PeftModel.from_pretrained(tiny.tiny_model(kind), tmp_path, adapter_name="merged")
    assert lora_layers(twin).keys() == {m.module for m in result.modules}
    for m in result.modules:
        assert torch.equal(product(twin, m.module), product(model, m.module))
    fns = tiny.eval_fns(kind, NAMES)
    model.set_adapter("merged")
    for fn in fns.values():
        assert torch.equal(fn(twin.eval()), fn(model))


def test_saved_adapter_of_some_layers_only_names_no_other_module(tmp_path: Path) -> None:
    model = tiny.add_adapters(
        tiny.tiny_llama(),
        {
            "zh": {"target_modules": ["q_proj"], "layers_to_transform": [1], "seed": 1},
            "en": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3], "seed": 2},
        },
    )
    result = model_wise(model)
    modules = {
        "model.layers.1.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.up_proj",
    }
    assert {m.module for m in result.modules} == modules
    result.save(tmp_path)
    twin = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path)
    assert lora_layers(twin).keys() == modules
    assert torch.equal(logits(twin.eval()), logits(tiny.tiny_llama()))
    assert torch.equal(logits(twin, "default"), logits(model, "merged"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_adapter_and_no_other_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    merge(model, rank=2).save(tmp_path)
    before = contents(tmp_path)
    other = merge_adapters_hi(
        model,
        NAMES,
        tiny.eval_fns("llama", NAMES),
        adapter_name="other",
        config=HiMergeConfig(density=0.2, scale=1.0, rank=3, max_export_drop=None),
    )

    def fail(tensors: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(export_room, "save_file", fail)
    with pytest.raises(type(error)):
        other.save(tmp_path)
    after = contents(tmp_path)
    assert set(after) == FILES
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert after[name] == before[name]


def test_failed_text_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "notes.txt"
    export_room.write_text(path, "old")

    def fail(self: Path, text: str, **_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        export_room.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in path.parent.iterdir()] == ["notes.txt"]


def test_save_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    result = merge(tiny.peft_model("llama", 2, torch.float32), rank=2)
    result.save(tmp_path / "a")
    result.save(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------------------ merged checkpoints


def test_merge_into_model_gives_the_merged_state_for_good() -> None:
    model = tiny.peft_model("llama", 2)
    result = merge(model)
    sources = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    result.merge_into_model()
    fns = tiny.eval_fns("llama", NAMES)
    with model.disable_adapter():
        for name in NAMES:
            assert float(fns[name](model).mean()) == result.scores["merged"][name]
    assert all(torch.equal(p, sources[n]) for n, p in model.named_parameters() if n in sources)
    plain = model.unload()
    for name in NAMES:
        assert float(fns[name](plain).mean()) == result.scores["merged"][name]


def test_merge_into_a_quantised_model_is_refused_and_changes_nothing() -> None:
    from test_probe import quantised

    model = quantised()
    result = merge(model)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="quantised"):
        result.merge_into_model()
    assert moved(before, snapshot(model)) == []


def test_merge_after_a_source_changed_is_refused(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    result = merge(model)
    base = tmp_path / "base"
    tiny.tiny_llama().save_pretrained(base)
    with torch.no_grad():
        lora_layers(model)["model.layers.0.self_attn.q_proj"].lora_A["zh"].weight.mul_(1.1)
    before = snapshot(model)
    for call in (result.merge_into_model, lambda: result.save_merged(base, tmp_path / "out")):
        with pytest.raises(HiMergeError, match="'zh' changed"):
            call()
    assert moved(before, snapshot(model)) == []
    assert not (tmp_path / "out").exists()


RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype="auto")
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(job["ids"])).logits
    torch.save(logits, job["out"])
assert "peft_himerge" not in sys.modules
print("done")
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Expected logits, and those a fresh process gets that knows transformers and peft alone."""
    root = tmp_path_factory.mktemp("reload")
    jobs, expected = [], {}

    def job(key: str, base: Path, adapter: Path | None, want: torch.Tensor) -> None:
        expected[key] = want
        out = str(root / f"{key}.pt")
        jobs.append(
            {
                "key": key,
                "base": str(base),
                "adapter": adapter and str(adapter),
                "ids": IDS.tolist(),
                "out": out,
            }
        )

    for kind in ("llama", "gpt2", "gemma3"):
        base = root / f"{kind} base"
        tiny.tiny_model(kind).save_pretrained(base)
        model = tiny.peft_model(kind, 2, torch.float32)
        pruned = merge(model, kind, rank=4)
        job(f"{kind} pruned", base, pruned.save(root / f"{kind} p"), logits(model, "merged"))
        exact = merge_adapters_hi(
            model,
            NAMES,
            tiny.eval_fns(kind, NAMES),
            adapter_name="exact",
            config=HiMergeConfig(density=1.0, scale=0.7, layer_density=1.0),
        )
        job(f"{kind} exact", base, exact.save(root / f"{kind} e"), logits(model, "exact"))
        full = pruned.save_merged(base, root / f"{kind} full")
        shards = root / f"{kind} shards"
        tiny.tiny_model(kind).save_pretrained(shards, max_shard_size="20KB")
        assert len(list(shards.glob("*.safetensors"))) > 2
        split = pruned.save_merged(shards, root / f"{kind} split")
        pruned.merge_into_model()
        want = logits(model)
        job(f"{kind} full", full, None, want)
        job(f"{kind} split", split, None, want)
    assert run_python(RELOAD, json.dumps(jobs)).strip().endswith("done")
    return {j["key"]: (expected[j["key"]], torch.load(j["out"])) for j in jobs}


@pytest.mark.parametrize("what", ["pruned", "exact", "full", "split"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_export_gives_the_same_logits_in_a_fresh_process(
    kind: str, what: str, reloaded: dict[str, tuple[Any, Any]]
) -> None:
    want, got = reloaded[f"{kind} {what}"]
    assert want.shape == got.shape
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    assert not torch.allclose(got, logits(tiny.tiny_model(kind)), atol=1e-2)


def test_save_merged_keeps_dtype_layout_and_untouched_tensors(tmp_path: Path) -> None:
    base = tiny.tiny_llama(dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}", encoding="utf-8")
    model = tiny.peft_model("llama", 2, torch.bfloat16)
    result = merge(model)
    out = result.save_merged(tmp_path / "base", tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "base").iterdir()}
    changed = set()
    for shard in sorted((tmp_path / "base").glob("*.safetensors")):
        old, new = load_file(shard), load_file(out / shard.name)
        assert old.keys() == new.keys()
        for key in old:
            assert old[key].dtype == new[key].dtype == torch.bfloat16
            assert old[key].shape == new[key].shape
            if not torch.equal(old[key], new[key]):
                changed.add(key.removesuffix(".weight"))
            # Added in float32 and rounded once, as the scored state was.
            module = key.removesuffix(".weight")
            if module in {m.module for m in result.modules}:
                want = (old[key].float() + result.delta(module)).to(torch.bfloat16)
                assert torch.equal(new[key], want), key
    assert changed == {m.module for m in result.modules if m.norm > 0}


def test_save_merged_does_not_touch_the_model(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    result = merge(model)
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    before = snapshot(model)
    result.save_merged(tmp_path / "base", tmp_path / "out")
    result.save(tmp_path / "lora")
    assert moved(before, snapshot(model)) == []


def tied(kind: str, target: str) -> PeftModel:
    return tiny.add_adapters(
        tiny.tiny_model(kind),
        {
            "zh": {"target_modules": [target], "seed": 1},
            "en": {"target_modules": [target, "c_attn" if kind == "gpt2" else "q_proj"]},
        },
    )


@pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings.*", "ignore:.*tied.*", "ignore:fan_in_fan_out is set"
)
@pytest.mark.parametrize(
    ("kind", "target"), [("gemma3", "embed_tokens"), ("gpt2", "wte"), ("gpt2", "lm_head")]
)
def test_save_merged_refuses_a_delta_on_a_tied_embedding(
    kind: str, target: str, tmp_path: Path
) -> None:
    model = tied(kind, target)
    result = model_wise(model)
    tiny.tiny_model(kind).save_pretrained(tmp_path / "base")
    with pytest.raises(HiMergeError, match=target):
        result.save_merged(tmp_path / "base", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
@pytest.mark.parametrize(("kind", "target"), [("gemma3", "embed_tokens"), ("gpt2", "wte")])
def test_tied_embedding_with_a_delta_leaves_the_head_alone(kind: str, target: str) -> None:
    # PEFT's adapter on a tied embedding changes the lookup only; every other form must agree.
    model = tied(kind, target)
    head = model.get_output_embeddings().weight.clone()
    result = model_wise(model, density=1.0)
    assert torch.equal(model.get_output_embeddings().weight, head)
    fns = tiny.eval_fns(kind, NAMES)
    merged = merge_adapters_hi(
        model,
        NAMES,
        fns,
        adapter_name="again",
        config=HiMergeConfig(density=1.0, scale=0.9, max_export_drop=None),
    )
    model.set_adapter("merged")
    for name in NAMES:
        want = float(fns[name](model).mean())
        assert merged.scores["model_wise"][name] == pytest.approx(want, abs=1e-5)
    want = logits(model, "merged")
    result.merge_into_model()
    assert torch.allclose(logits(model), want, atol=1e-4)


def test_save_merged_from_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    result = merge(tiny.peft_model("llama", 2, torch.float32))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        result.save_merged(tmp_path / "empty", tmp_path / "out")
    with pytest.raises((ConfigError, FileNotFoundError), match="absent"):
        result.save_merged(tmp_path / "absent", tmp_path / "out")
    tiny.tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PlanError, match="Is it the base model"):
        result.save_merged(tmp_path / "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_merged_from_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    result = merge(tiny.peft_model("llama", 2, torch.float32))
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(HiMergeError, match=r"model\.layers\.|lm_head"):
        result.save_merged(tmp_path / "base", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_save_merged_beside_another_checkpoint_or_from_a_quantised_one_is_refused(
    tmp_path: Path,
) -> None:
    result = merge(tiny.peft_model("llama", 2, torch.float32))
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    other = tmp_path / "out" / "model-00001-of-00002.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"of another model")
    with pytest.raises(ConfigError, match=r"holds 'model-00001-of-00002.safetensors' of another"):
        result.save_merged(tmp_path / "base", tmp_path / "out")
    assert [path.name for path in other.parent.iterdir()] == [other.name]
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    changed = f"{result.modules[0].module}.weight"
    weights[changed] = weights[changed].to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"'{changed}' is quantised \(torch.int8\); use a plain"):
        result.save_merged(tmp_path / "base", tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.safetensors"))


def test_save_merged_over_the_base_itself_is_refused(tmp_path: Path) -> None:
    result = merge(tiny.peft_model("llama", 2, torch.float32))
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    before = contents(tmp_path / "base")
    with pytest.raises(HiMergeError, match="base"):
        result.save_merged(tmp_path / "base", tmp_path / "base")
    assert contents(tmp_path / "base") == before


def test_save_merged_interrupted_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = merge(tiny.peft_model("llama", 2, torch.float32))
    tiny.tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    add, calls = checkpoint_room.add_to_weight, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return add(*args)

    monkeypatch.setattr(checkpoint_room, "add_to_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save_merged(tmp_path / "base", tmp_path / "out")
    assert len(calls) == 5
    assert not (tmp_path / "out").exists()


def test_save_merged_knows_a_base_saved_without_its_prefix(tmp_path: Path) -> None:
    # GPT-2's published checkpoint names its tensors "h.0..." without "transformer.".
    from safetensors.torch import save_file

    result = merge(tiny.peft_model("gpt2", 2, torch.float32), "gpt2")
    tiny.tiny_gpt2().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base").mkdir()
    save_file(tensors, str(path), metadata={"format": "pt"})
    out = result.save_merged(tmp_path / "base", tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    want = tensors["h.0.attn.c_attn.weight"] + result.delta("transformer.h.0.attn.c_attn").T
    assert torch.allclose(merged["h.0.attn.c_attn.weight"], want, atol=1e-6)


# ------------------------------------------------------------------------------------------ memory


class Alive:
    """Wraps the one place that allocates dense deltas and watches how many are alive at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[weakref.ref[torch.Tensor]] = []
        self.most = 0
        self.total = 0
        allocate = combine_room.new_dense

        def new_dense(*args: Any, **kwargs: Any) -> torch.Tensor:
            dense = allocate(*args, **kwargs)
            self._made.append(weakref.ref(dense))
            self.total += 1
            self._made = [ref for ref in self._made if ref() is not None]
            self.most = max(self.most, len(self._made))
            return dense

        monkeypatch.setattr(combine_room, "new_dense", new_dense)


@pytest.mark.parametrize("strategy", ["fold", "lazy"])
@pytest.mark.parametrize("rank", ["auto", 3, 0.8])
def test_pruned_merge_and_export_hold_one_dense_delta_at_a_time(
    strategy: str, rank: int | float | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    alive = Alive(monkeypatch)
    gc.disable()  # nothing may hang on until a collection comes by
    try:
        result = merge(model, strategy=strategy, rank=rank)
        result.save(tmp_path / "lora")
        result.save_merged(tmp_path / "base", tmp_path / "full")
        result.merge_into_model()
    finally:
        gc.enable()
    assert result.plan.pruned
    assert alive.total > 0
    assert alive.most == 1


def test_pruned_merge_of_quantised_weights_holds_one_dense_delta_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from test_probe import quantised

    model = quantised()
    alive = Alive(monkeypatch)
    gc.disable()
    try:
        merge(model)
    finally:
        gc.enable()
    assert alive.total > 100
    assert alive.most == 1


@pytest.mark.parametrize("strategy", ["fold", "lazy"])
def test_unpruned_merge_and_export_form_no_dense_delta(
    strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    alive = Alive(monkeypatch)
    result = merge(model, strategy=strategy, density=1.0, layer_density=1.0)
    result.save(tmp_path / "lora")
    result.save_merged(tmp_path / "base", tmp_path / "full")
    result.merge_into_model()
    assert alive.total == 0
    result.delta("lm_head")
    assert alive.total == 1


def test_new_adapter_is_plain_lora_that_peft_can_train_further(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    merge(model, rank=3)
    model.set_adapter("merged")
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("merged" in n.split(".") for n in trained)
    assert isinstance(model.peft_config["merged"], LoraConfig)


def test_saved_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    model_wise(tiny.peft_model("llama")).save(tmp_path / "out")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, usual)
    assert "adapter_model.safetensors" in modes
