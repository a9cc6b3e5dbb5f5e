"""`merge_adapters`: every method of the registry from a live model to a new adapter in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from snapshot import moved, run_python, snapshot
from tiny import NAMES, add_adapters, default_specs, peft_model, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

from peft_himerge.errors import AdapterError, ConfigError, HiMergeError
from peft_himerge.merging import AdapterMerge, merge_adapters
from peft_himerge.methods.depth import Lines
from peft_himerge.methods.registry import list_methods
from peft_himerge.methods.stack import Delta, Dense, Stack

PAIR = ["zh", "en"]
TRIO = ["zh", "en", "math"]
# Options for methods that cannot do without.
GIVEN: dict[str, dict[str, Any]] = {
    "ties_peft": {"density": 0.5},
    "dare_ties_peft": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "metric_weighted": {"metrics": {"zh": 0.5, "en": 0.9}},
    "layer_assignment": {"assignment": {}, "default": {"zh": 1.0}},
}
PLAIN = [m for m in list_methods() if m.needs == "nothing"]


def delta_of(model: PeftModel, name: str, module: str) -> Tensor:
    """Return scaling * B @ A of the (portable) adapter, in the stored layout (out, in)."""
    layer = model.base_model.model.get_submodule(module)
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return (layer.scaling[name] * (b @ a)).detach().double()


def adapted(model: PeftModel, name: str) -> list[str]:
    inner = model.base_model.model
    return sorted(
        p for p, m in inner.named_modules() if isinstance(m, LoraLayer) and name in m.scaling
    )


def plain_sum(model: PeftModel, weights: dict[str, float], module: str) -> Tensor:
    parts = [
        w * delta_of(model, n, module) for n, w in weights.items() if module in adapted(model, n)
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("info", PLAIN, ids=lambda m: m.name)
def test_every_method_adds_the_adapter_and_nothing_else(info: Any) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)
    result = merge_adapters(model, PAIR, info.name, **GIVEN.get(info.name, {}))
    assert moved(before, snapshot(model, but="merged")) == []
    assert adapted(model, "merged") == sorted({*adapted(model, "zh"), *adapted(model, "en")})
    assert result.method == info
    for record in result.modules:
        exact = result.delta(record.module).double()
        lost = float((delta_of(model, "merged", record.module) - exact).norm())
        assert lost == pytest.approx(record.error * float(exact.norm()), rel=1e-3, abs=1e-5)
        if info.low_rank:
            assert record.error < 1e-5
    if info.low_rank:
        assert result.export_error < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "gemma3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_plain_sum_is_exact_in_every_kind_of_module(kind: str, dtype: torch.dtype) -> None:
    model = peft_model(kind, 3, dtype)
    weights = {"zh": 1.0, "en": -0.5, "math": 2.0}
    result = merge_adapters(model, TRIO, "task_arithmetic", weights=weights)
    assert result.export_error < 1e-6
    for module in adapted(model, "merged"):
        got, want = delta_of(model, "merged", module), plain_sum(model, weights, module)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_weights_pair_by_name_and_the_order_of_adapters_does_not_matter() -> None:
    model = peft_model("llama", 3)
    for method in ("ties", "dare_linear", "average"):
        one = merge_adapters(model, TRIO, method, weights=[1.0, 0.5, 2.0], adapter_name="one")
        weights = {"math": 2.0, "en": 0.5, "zh": 1.0}
        merge_adapters(model, TRIO[::-1], method, weights=weights, adapter_name="two")
        for record in one.modules:
            left, right = (delta_of(model, n, record.module) for n in ("one", "two"))
            assert torch.equal(left, right)
        for name in ("one", "two"):
            model.delete_adapter(name)


def test_eight_adapters_of_mixed_ranks() -> None:
    base = tiny_model("llama", dtype=torch.float32)
    specs = default_specs("llama", 5)
    for i, name in enumerate(("x", "y", "w")):
        specs[name] = {"r": 1 + i, "alpha": 3, "target_modules": ["q_proj"], "seed": 50 + i}
    model = add_adapters(base, specs)
    names = [*NAMES, "x", "y", "w"]
    weights = dict.fromkeys(names, 0.5)
    merge_adapters(model, names, "cat", weights=weights, adapter_name="sum")
    for module in adapted(model, "sum"):
        want = plain_sum(model, weights, module)
        torch.testing.assert_close(delta_of(model, "sum", module), want, rtol=1e-4, atol=1e-5)
    for method in ("ties", "karcher", "sce", "pcb", "consensus", "tsv_m"):
        assert merge_adapters(model, names, method, adapter_name=method).rank >= 1


@pytest.mark.parametrize("space", ["knots", "core"])
def test_small_spaces_give_adapters_without_error(space: str) -> None:
    model = peft_model("llama", 3)
    full = merge_adapters(model, TRIO, "ties", density=0.3, adapter_name="full")
    small = merge_adapters(model, TRIO, "ties", density=0.3, adapter_name=space, space=space)
    assert full.export_error > 0.01
    assert small.export_error < 1e-6
    assert small.space == space


def test_rank_by_number_energy_exact_and_padding() -> None:
    model = peft_model("llama", 2)
    assert merge_adapters(model, PAIR, "ties", rank=2, adapter_name="two").rank == 2
    assert merge_adapters(model, PAIR, "cat", rank=2, pad_rank=16, adapter_name="padded").rank == 16
    energy = merge_adapters(model, PAIR, "ties", rank=0.9, adapter_name="energy")
    assert all(m.error**2 <= 0.1 + 1e-6 for m in energy.modules)
    exact = merge_adapters(model, PAIR, "ties", rank="exact", adapter_name="exact")
    assert exact.export_error == 0.0
    auto = merge_adapters(model, PAIR, "ties", adapter_name="auto")
    assert auto.rank == max(sum(f.rank for f in s.factors if f) for s in _stacks_seen(model))


def _stacks_seen(model: PeftModel) -> list[Stack]:
    seen: list[Stack] = []

    def look(stacks: Sequence[Stack]) -> Iterator[tuple[str, Delta]]:
        seen.extend(stacks)
        for stack in stacks:
            yield stack.module, Dense(torch.zeros(stack.shape))

    merge_adapters(model, PAIR, look, adapter_name="look")
    return seen


def test_a_function_is_a_method_too() -> None:
    """It sees every module once, sorted, with the base's weight, and may take options."""
    model = peft_model("gpt2", 2)
    seen: list[str] = []

    def louder(stacks: Sequence[Stack], *, by: float) -> Iterator[tuple[str, Delta]]:
        for stack in stacks:
            seen.append(stack.module)
            assert stack.base is not None
            assert stack.base().shape == stack.shape
            total = torch.zeros(stack.shape, dtype=stack.dtype)
            for rows, blocks in stack.blocks():
                total[rows] = by * sum(blocks)
            yield stack.module, Dense(total)

    result = merge_adapters(model, PAIR, louder, rank=0.9999999, by=3.0)
    assert seen == sorted(seen) == adapted(model, "merged")
    assert result.method.name == "louder"
    for module in seen:
        want = plain_sum(model, {"zh": 3.0, "en": 3.0}, module)
        torch.testing.assert_close(delta_of(model, "merged", module), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="needs the option 'by'"):
        merge_adapters(model, PAIR, louder, adapter_name="other")


@pytest.mark.parametrize("fault", ["twice", "missing", "nan"])
def test_a_faulty_function_is_named_and_nothing_is_touched(fault: str) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)

    def odd(stacks: Sequence[Stack]) -> Iterator[tuple[str, Delta]]:
        for i, stack in enumerate(stacks):
            if fault == "missing" and i == 1:
                continue
            delta = torch.ones(stack.shape, dtype=stack.dtype)
            if fault == "nan":
                delta[0, 0] = float("nan")
            yield stacks[0].module if fault == "twice" else stack.module, Dense(delta)

    with pytest.raises(HiMergeError, match="odd"):
        merge_adapters(model, PAIR, odd)
    assert moved(before, snapshot(model)) == []


def test_lines_scales_the_result_of_any_method() -> None:
    model = peft_model("llama", 2)
    exact: dict[str, Any] = {"rank": "exact"}
    plain = merge_adapters(model, PAIR, "ties", adapter_name="plain", **exact)
    total = merge_adapters(model, PAIR, "cat", adapter_name="sum")
    post = merge_adapters(model, PAIR, "ties", adapter_name="post", post="lines", **exact)
    l1 = {r: sum(float(r.delta(m.module).abs().sum()) for m in r.modules) for r in (plain, total)}
    first = l1[total] / l1[plain] / 2
    for record in plain.modules:
        layer = record.module.split(".")[2] if "layers" in record.module else "0"
        scale = first + (1.0 - first) * int(layer) / 3
        want = scale * plain.delta(record.module)
        torch.testing.assert_close(post.delta(record.module), want)
        torch.testing.assert_close(delta_of(model, "post", record.module), want)
    fixed = merge_adapters(model, PAIR, "cat", adapter_name="fixed", post=Lines(0.5, 2.0))
    torch.testing.assert_close(fixed.delta("lm_head"), 0.5 * total.delta("lm_head"))
    last = "model.layers.3.self_attn.q_proj"
    torch.testing.assert_close(fixed.delta(last), 2.0 * total.delta(last))


def test_the_folder_holds_the_adapter_and_the_story(tmp_path: Path) -> None:
    model = peft_model("llama", 2, torch.float32)
    result = merge_adapters(model, PAIR, "ties", density=0.4, weights=[1.0, 0.5])
    folder = result.save(tmp_path / "out")
    report = json.loads((folder / "report.json").read_text())
    assert report["method"]["name"] == "ties"
    assert report["options"] == {"density": 0.4, "lam": 1.0, "scope": "model", "merge": "count"}
    assert report["weights"] == {"zh": 1.0, "en": 0.5}
    assert set(report["sources"]) == {"zh", "en"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["peft", "lora", "merge", "ties"]
    assert card.data.base_model is None
    assert "| density | 0.4 |" in card.text
    assert "| en | 0.5 |" in card.text
    assert "(https://arxiv.org/abs/2306.01708)" in card.text
    for name, digest in report["sources"].items():
        assert f"`{name}`, digest `{digest[:16]}`" in card.text
    reloaded = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.float32), folder).eval()
    model.set_adapter("merged")
    ids = torch.arange(16).reshape(2, 8)
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits)


def test_licences_of_the_sources_go_into_the_card(tmp_path: Path) -> None:
    model = peft_model("llama", 2, torch.float32)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "org/base"
    result = merge_adapters(model, PAIR, "cat")
    folders = {name: tmp_path / name for name in PAIR}

    def card(**heads: str) -> ModelCard:
        for name, head in heads.items():
            folders[name].mkdir(exist_ok=True)
            (folders[name] / "README.md").write_text(f"---\n{head}\n---\ntext", encoding="utf-8")
        return ModelCard.load(result.save(tmp_path / "out", sources=folders) / "README.md")

    assert card().data.license is None  # no folder yet, so no card
    alike = card(zh="license: mit", en="license: mit")
    assert (alike.data.license, alike.data.base_model) == ("mit", "org/base")
    assert alike.data.base_model_relation == "adapter"
    apart = card(en="license: other\nlicense_name: house")
    assert apart.data.license is None
    assert "`zh`, digest" in apart.text
    assert ", licence mit" in apart.text
    assert ", licence house" in apart.text
    assert "cannot be read" in card(en="license: [").text
    assert card(en="tags: [x]").data.license is None
    with pytest.raises(ConfigError, match="Did you mean 'zh'"):
        result.save(tmp_path / "out", sources={"z": tmp_path})


def test_a_local_base_is_not_put_into_the_metadata(tmp_path: Path) -> None:
    model = peft_model("llama", 2, torch.float32)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "/home/me/base"
    folder = merge_adapters(model, PAIR, "cat").save(tmp_path)
    assert ModelCard.load(folder / "README.md").data.base_model is None


@pytest.mark.parametrize("method", ["ties", "cat"])
def test_the_full_checkpoint_holds_the_exact_merge(method: str, tmp_path: Path) -> None:
    """TIES deltas wait on disk, those of `cat` are products; neither is cut to a rank."""
    model = peft_model("llama", 2, torch.float32)
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = snapshot(model)
    result = merge_adapters(model, PAIR, method, rank=1)
    result.save_merged(tmp_path / "base", tmp_path / "full")
    assert moved(before, snapshot(model, but="merged")) == []
    full = LlamaForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    for key, weight in tiny_model("llama").state_dict().items():
        module = key.removesuffix(".weight")
        adds = module in {m.module for m in result.modules}
        want = weight + result.delta(module) if adds else weight
        torch.testing.assert_close(full[key], want, rtol=1e-6, atol=1e-6)
        assert adds or torch.equal(full[key], weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "full"]


def test_no_full_checkpoint_of_what_is_no_delta(tmp_path: Path) -> None:
    base = tiny_model("llama", dtype=torch.float32)
    specs = {"zh": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
    model = add_adapters(base, specs)
    result = merge_adapters(model, ["zh"], "cat", modules_to_save="sole")
    with pytest.raises(ConfigError, match="modules_to_save"):
        result.save_merged(tmp_path / "base", tmp_path / "full")
    plain = merge_adapters(peft_model("llama", 2, torch.float32), PAIR, "cat")
    with pytest.raises(ConfigError, match="holds no"):
        plain.save_merged(tmp_path, tmp_path / "full")
    with torch.no_grad():
        part = plain.model.base_model.model.model.layers[0].self_attn.q_proj
        part.lora_A["zh"].weight.mul_(2)
    with pytest.raises(AdapterError, match="changed since the merge"):
        plain.save_merged(tmp_path, tmp_path / "full")
    assert list(tmp_path.iterdir()) == []


def test_the_exact_delta_is_refused_once_a_source_has_changed() -> None:
    model = peft_model("llama", 2)
    result = merge_adapters(model, PAIR, "cat")
    module = result.modules[0].module
    assert result.delta(module).shape == delta_of(model, "merged", module).shape
    with pytest.raises(AdapterError, match=r"no module 'model.layers.0.nothing'"):
        result.delta("model.layers.0.nothing")
    with torch.no_grad():
        model.base_model.model.get_submodule(adapted(model, "zh")[0]).lora_A["zh"].weight.mul_(2)
    with pytest.raises(AdapterError, match="'zh' changed since the merge"):
        result.delta(module)


def test_overwrite_replaces_also_a_source_and_the_active_one() -> None:
    model = peft_model("llama", 2)
    module = adapted(model, "zh")[0]
    want = plain_sum(model, {"zh": 1.0, "en": 1.0}, module)
    model.set_adapter("zh")
    merge_adapters(model, PAIR, "cat", adapter_name="zh", overwrite=True)
    torch.testing.assert_close(delta_of(model, "zh", module), want)
    assert model.active_adapter == "zh"
    assert list(model.peft_config) == ["en", "zh"]
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


SAME = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from snapshot import bits
from tiny import peft_model
from peft_himerge.merging import merge_adapters
model = peft_model("llama", 3)
merge_adapters(model, ["zh", "en", "math"], "dare_ties", seed=3)
print([bits(p) for n, p in model.named_parameters() if ".merged." in n])
"""


def test_the_same_in_every_process() -> None:
    here = Path(__file__).parent
    first = run_python(SAME, here, PYTHONHASHSEED="1")
    assert first == run_python(SAME, here, PYTHONHASHSEED="2")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"method": 3}, "a name or a function"),
        ({"densty": 0.5}, "no option 'densty'. Did you mean 'density'"),
        ({"method": "ties_peft"}, "needs the option 'density'"),
        ({"density": 2.0}, "density"),
        ({"space": "knot"}, "Did you mean 'knots'"),
        ({"method": "slerp", "space": "core"}, "does not work entry by entry"),
        ({"rank": 0}, "rank must be"),
        ({"rank": 1.5}, "rank must be"),
        ({"rank": "best"}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"pad_rank": 0}, "pad_rank"),
        ({"post": "liner"}, "post must be"),
        ({"seed": "x"}, "seed"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": {"zh": 1.0, "eng": 1.0}}, "Did you mean 'en'"),
        ({"weights": {"zh": 1.0}}, "no value for adapter 'en'"),
        ({"adapters": []}, "adapters is empty"),
        ({"adapters": ["zh", "zh"]}, "more than once"),
        ({"adapters": ["zh", "fr"]}, "Adapter fr does not exist"),
        ({"adapter_name": "zh"}, "'zh' already"),
        ({"modules_to_save": "all"}, "modules_to_save"),
        ({"method": "average", "weights": [1.0, -1.0]}, "sum to 0"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_touched(
    arguments: dict[str, Any], text: str
) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)
    call: dict[str, Any] = {"adapters": PAIR, **arguments}
    with pytest.raises(ConfigError if "fr" not in str(call) else AdapterError, match=text):
        merge_adapters(model, **call)
    assert moved(before, snapshot(model)) == []


def test_saved_modules_need_a_choice_here() -> None:
    base = tiny_model("llama", dtype=torch.float32)
    specs = {
        "zh": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "en": {"target_modules": ["q_proj"], "seed": 1},
    }
    model = add_adapters(base, specs)
    with pytest.raises(AdapterError, match=r"'zh' uses modules_to_save.*'sole', 'first'"):
        merge_adapters(model, PAIR, "cat")
    result = merge_adapters(model, PAIR, "cat", modules_to_save="sole")
    assert isinstance(result, AdapterMerge)
    held = model.base_model.model.lm_head.modules_to_save
    assert torch.equal(held["merged"].weight, held["zh"].weight)
