"""DoRA adapters as plain LoRA, against PEFT's own forward of the DoRA adapter."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from matrix import bases
from matrix.setups import dora_deltas, enrich
from peft import PeftModel
from snapshot import moved, snapshot

from peft_himerge import HiMergeError, densify
from peft_himerge.adapters import lora_layers, read_adapters

TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}


def dora(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    spec = {"r": 2, "alpha": 3, "target_modules": TARGETS[kind], "use_dora": True, **more}
    model = tiny.add_adapters(bases.build(kind, dtype), {"zh": spec})
    enrich(model)
    return model


def logits(model: PeftModel, kind: str, name: str) -> torch.Tensor:
    model.set_adapter(name)
    return bases.outputs(model, bases.inputs(kind, "zh"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_densify_when_exact_gives_the_logits_of_the_dora_adapter(kind: str) -> None:
    model = dora(kind)
    before = snapshot(model)
    assert densify(model, "zh", "plain") == 0.0
    assert moved(before, snapshot(model, but="plain")) == []
    want = logits(model, kind, "zh")
    torch.testing.assert_close(logits(model, kind, "plain"), want, rtol=0, atol=2e-5)
    with model.disable_adapter():
        base = bases.outputs(model, bases.inputs(kind, "zh"))
    assert float((base - want).abs().max()) > 0.1
    assert not read_adapters(model, ["plain"])[0].is_zero  # it can be merged


def test_densify_to_a_smaller_rank_returns_the_error_it_makes() -> None:
    model = dora("llama", torch.float64)
    told = densify(model, "zh", "plain", rank=4)
    want, got = dora_deltas(model, "zh"), oracle.deltas(model, "plain")
    lost = sum(float((got[m] - d).norm()) ** 2 for m, d in want.items()) ** 0.5
    whole = sum(float(d.norm()) ** 2 for d in want.values()) ** 0.5
    best = sum(float(torch.linalg.svdvals(d)[4:].norm()) ** 2 for d in want.values()) ** 0.5
    assert told == pytest.approx(lost / whole, rel=1e-3)
    assert 0.01 < told < 1.05 * best / whole


def test_densify_of_a_plain_adapter_is_that_adapter() -> None:
    model = tiny.peft_model("llama", 1, torch.float64)
    assert densify(model, "zh", "plain") == 0.0
    want, got = oracle.deltas(model, "zh"), oracle.deltas(model, "plain")
    assert got.keys() == want.keys()
    for module, delta in want.items():
        assert torch.allclose(got[module], delta, atol=1e-12)


def quantised(model: PeftModel) -> None:
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    layer.get_base_layer().weight = torch.nn.Parameter(
        torch.zeros(24, 24, dtype=torch.int8), requires_grad=False
    )


def infinite(model: PeftModel) -> None:
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    layer.lora_magnitude_vector["zh"].weight.data[0] = float("inf")


def merged(model: PeftModel) -> None:
    model.merge_adapter(["zh"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("more", "harm", "arguments", "text"),
    [
        ({}, None, ("fr", "plain"), "'fr'.*Allowed: zh"),
        ({}, None, ("zh", "zh"), "has an adapter 'zh' already"),
        ({}, None, ("zh", "plain", 0), "rank must be"),
        ({}, quantised, ("zh", "plain"), r"layers\.1\.self_attn\.q_proj.*quantised"),
        ({}, infinite, ("zh", "plain"), r"layers\.1\.self_attn\.q_proj.*NaN or infinity"),
        ({}, merged, ("zh", "plain"), "unmerge_adapter"),
        ({"modules_to_save": ["lm_head"]}, None, ("zh", "plain"), "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, None, ("zh", "plain"), "DoraEmbeddingVariant"),
    ],
)
def test_densify_refuses_what_it_cannot_do_and_touches_nothing(
    more: Any, harm: Any, arguments: Any, text: str
) -> None:
    model = dora("llama", **more)
    if harm is not None:
        harm(model)
    before = snapshot(model)
    name, new, *rank = arguments
    with pytest.raises(HiMergeError, match=text):
        densify(model, name, new, **({"rank": rank[0]} if rank else {}))
    assert moved(before, snapshot(model)) == []
