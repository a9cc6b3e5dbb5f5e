"""Reading adapters out of a PeftModel, and refusing by name what is not scaling * B @ A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from snapshot import moved, snapshot
from torch import nn

from peft_himerge import Edit, HiMergeConfig, HiMergeError, MergePlan, apply_plan, merge_adapters_hi
from peft_himerge.adapters import common_base, lora_layers, read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import AdapterError
from peft_himerge.factors import as_matrix


def never(model: Any) -> float:
    raise AssertionError("the eval function was called before everything was validated")


def refused(model: Any, text: str, names: tuple[str, ...] = ("zh", "odd")) -> None:
    """The merge must refuse by name, before it calls anything, and leave the model as it was."""
    before = snapshot(model)
    with pytest.raises(AdapterError, match=text):
        merge_adapters_hi(model, list(names), dict.fromkeys(names, never))
    assert moved(before, snapshot(model)) == []


def with_odd(**options: Any) -> PeftModel:
    """A tiny Llama with a plain adapter "zh" and a LoRA adapter "odd" with the given options."""
    model = tiny.peft_model("llama", 1, torch.float32)
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        model.add_adapter("odd", LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "odd" in name and "lora_B" in name:
            parameter.data.fill_(0.1)
    return model.eval()


# ------------------------------------------------------------------------------------------ reads


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_read_adapters_give_the_deltas_of_the_oracle(kind: str) -> None:
    model = tiny.peft_model(kind, 5)
    for adapter in read_adapters(model, list(tiny.NAMES)):
        want = oracle.deltas(model, adapter.name)
        assert adapter.factors.keys() == want.keys()
        assert list(adapter.factors) == sorted(adapter.factors)
        assert adapter.numel == sum(d.numel() for d in want.values())
        for module, f in adapter.factors.items():
            got = torch.cat([block for _, block in f.blocks()])
            assert got.dtype == torch.float64
            assert torch.allclose(got, want[module], rtol=1e-13, atol=1e-15)
            assert f.shape == tuple(want[module].shape)


class Convolutions(nn.Module):
    """One convolution of each dimension, a linear layer and an embedding, in a row of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Conv1d(3, 4, 3),
                nn.Conv2d(3, 4, (2, 3), stride=2),
                nn.Conv3d(2, 4, 2),
                nn.Linear(5, 6),
                nn.Embedding(7, 5),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[3](self.blocks[4](x))


def convolutions() -> PeftModel:
    torch.manual_seed(0)
    model: PeftModel | None = None
    for name, r in (("zh", 2), ("en", 3)):
        config = LoraConfig(r=r, lora_alpha=5, target_modules=["0", "1", "2", "3", "4"])
        if model is None:
            model = get_peft_model(Convolutions(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def test_read_adapters_of_every_kind_of_layer_give_pefts_own_delta() -> None:
    model = convolutions()
    for adapter in read_adapters(model, ["zh", "en"]):
        for module, f in adapter.factors.items():
            layer = model.base_model.model.get_submodule(module)
            got = torch.cat([block for _, block in f.blocks()])
            want = as_matrix(layer.get_delta_weight(adapter.name), f.kind)
            assert torch.allclose(got, want, atol=1e-6), module
    kinds = {f.kind for f in read_adapters(model, ["zh"])[0].factors.values()}
    assert kinds == {"conv", "linear", "embedding"}


def test_merged_adapter_of_every_kind_of_layer_is_the_sum_of_pefts_deltas() -> None:
    model = convolutions()
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    plan = MergePlan.model_wise(combiner.table(), {"zh": Edit(), "en": Edit(1.0, 0.5)})
    result = apply_plan(model, plan)
    for module, layer in lora_layers(model).items():
        want = layer.get_delta_weight("zh") + 0.5 * layer.get_delta_weight("en")
        assert torch.allclose(layer.get_delta_weight("merged"), want, atol=1e-5), module
        assert torch.allclose(
            result.delta(module).view(-1),
            as_matrix(want, combiner.kind(module)).reshape(-1),
            atol=1e-5,
        )


def test_scores_of_convolutions_work_in_both_strategies() -> None:
    scores = {}
    for strategy in ("fold", "lazy"):
        model = convolutions()

        def images(model: nn.Module) -> float:
            inner = model.base_model.model.blocks
            x = torch.linspace(-1, 1, 3 * 6 * 6).view(1, 3, 6, 6)
            y = torch.linspace(-1, 1, 2 * 4 * 4 * 4).view(1, 2, 4, 4, 4)
            words = inner[3](inner[4](torch.arange(3)))
            convolved = inner[1](x).sum() + inner[2](y).sum() + inner[0](x[0, :, 0, :]).sum()
            return float(convolved + words.sum())

        config = HiMergeConfig(
            density=0.5, scale=0.9, strategy=strategy, max_export_drop=None, rank="exact"
        )
        result = merge_adapters_hi(model, ["zh", "en"], {"zh": images, "en": images}, config=config)
        scores[strategy] = result.scores
        assert result.scores["exported"]["zh"] == pytest.approx(
            result.scores["merged"]["zh"], rel=1e-4
        )
    assert scores["fold"] == scores["lazy"]


def test_read_adapters_are_views_of_the_live_parameters() -> None:
    model = tiny.peft_model("llama", 1)
    (adapter,) = read_adapters(model, ["zh"])
    pointers = {p.data_ptr() for p in model.parameters()}
    for f in adapter.factors.values():
        assert f.a.data_ptr() in pointers
        assert f.b.data_ptr() in pointers
        assert not f.a.requires_grad
    before = adapter.version()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(2)
    assert adapter.version() != before


def test_digest_follows_values_names_and_scaling_and_nothing_else() -> None:
    model = tiny.peft_model("llama", 2)
    zh, en = read_adapters(model, ["zh", "en"])
    first = zh.digest()
    assert first == read_adapters(model, ["zh"])[0].digest() != en.digest()
    layer = next(layer for layer in lora_layers(model).values() if "zh" in layer.scaling)
    layer.scaling["zh"] *= 2
    assert read_adapters(model, ["zh"])[0].digest() != first
    layer.scaling["zh"] /= 2
    assert read_adapters(model, ["zh"])[0].digest() == first
    with torch.no_grad():
        layer.lora_A["zh"].weight[0, 0] += 1e-9
    assert read_adapters(model, ["zh"])[0].digest() != first


def test_adapters_on_different_layers_are_merged_where_each_is() -> None:
    model = with_odd(layers_to_transform=[1, 3])
    combiner = Combiner(read_adapters(model, ["zh", "odd"]))
    table = combiner.table()
    assert table["model.layers.0"] == ("zh",)
    assert table["model.layers.1"] == ("odd", "zh")
    plan = MergePlan.model_wise(table, {"zh": Edit(), "odd": Edit()})
    result = apply_plan(model, plan)
    total = oracle.plain_sum({n: oracle.deltas(model, n) for n in ("zh", "odd")})
    for module, want in total.items():
        assert torch.allclose(result.delta(module).double(), want, atol=1e-6), module


# --------------------------------------------------------------------------------------- refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "'odd'.*[Dd]ora"),
    ({"lora_bias": True}, "'odd'.*lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "'odd'.*modules_to_save"),
    ({"trainable_token_indices": [1, 2]}, "'odd'.*trainable_token_indices"),
    ({"bias": "all"}, "'odd'.*bias='all'"),
    ({"bias": "lora_only"}, "'odd'.*bias='lora_only'"),
    ({"alora_invocation_tokens": [1, 2]}, "'odd'.*alora_invocation_tokens"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_adapter_that_is_more_than_b_times_a_is_refused_by_name(
    options: dict[str, Any], text: str
) -> None:
    # PEFT allows trained biases on one adapter only, and then on the first.
    if "bias" in options:
        base = tiny.tiny_llama()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options), "odd")
        model.add_adapter("zh", LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
    else:
        model = with_odd(**options)
    refused(model, text)


@pytest.mark.filterwarnings("ignore")
def test_lora_on_bare_parameters_is_refused_by_name() -> None:
    model = tiny.peft_model("llama", 1, torch.float32)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(
            "odd",
            LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]),
        )
    refused(model, "'odd'.*target_parameters")


def test_adapter_of_another_type_is_refused_by_name() -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = get_peft_model(tiny.tiny_llama(), config, adapter_name="zh")
    refused(model, "'zh'.*IA3", names=("zh",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factor_with_nan_or_infinity_is_refused_by_name(value: float, factor: str) -> None:
    model = with_odd()
    layer = lora_layers(model)["model.layers.2.self_attn.q_proj"]
    with torch.no_grad():
        getattr(layer, factor)["odd"].weight[0, 0] = value
    refused_text = r"'odd'.*model\.layers\.2\.self_attn\.q_proj.*NaN or infinity"
    before = snapshot(model)
    with pytest.raises(AdapterError, match=refused_text):
        merge_adapters_hi(model, ["zh", "odd"], {"zh": never, "odd": never})
    assert moved(before, snapshot(model)) == []


def test_adapter_merged_into_the_weights_is_refused_by_name() -> None:
    model = with_odd()
    model.merge_adapter(["zh"])
    refused(model, "'zh'.*unmerge_adapter")


def test_scaling_set_to_nan_or_infinity_is_refused_by_name() -> None:
    model = with_odd()
    layer = lora_layers(model)["model.layers.2.self_attn.q_proj"]
    layer.scaling["odd"] = float("inf")
    refused(model, r"'odd'.*model\.layers\.2\.self_attn\.q_proj.*scaling")


def test_unknown_adapter_is_refused_with_the_one_that_was_meant() -> None:
    refused(with_odd(), "'old'.*Did you mean 'odd'", names=("zh", "old"))


def test_weight_of_another_shape_is_refused_by_name() -> None:
    model = with_odd()
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    base = layer.get_base_layer()
    base.weight = nn.Parameter(torch.zeros(24, 30))
    refused(model, r"model\.layers\.1\.self_attn\.q_proj.*\(24, 24\).*\(24, 30\)")


@pytest.mark.parametrize("name", ["zh", "odd"])
def test_adapters_of_unlike_shapes_in_one_module_are_refused_by_name(name: str) -> None:
    model = with_odd()
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    rank = layer.lora_B[name].weight.shape[1]
    layer.lora_B[name].weight = nn.Parameter(torch.ones(25, rank))
    refused(model, r"model\.layers\.1\.self_attn\.q_proj")


def test_factors_of_unlike_ranks_are_refused_by_name() -> None:
    model = with_odd()
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    layer.lora_A["odd"].weight = nn.Parameter(torch.ones(3, 24))
    refused(model, r"'odd'.*model\.layers\.1\.self_attn\.q_proj")


def test_adapters_of_two_base_models_are_refused_by_name() -> None:
    model = with_odd()
    model.peft_config["zh"].base_model_name_or_path = "org/one"
    model.peft_config["odd"].base_model_name_or_path = "org/two"
    refused(model, "different base models.*org/one.*org/two")


def test_common_base_is_the_one_they_name() -> None:
    model = with_odd()
    model.peft_config["odd"].base_model_name_or_path = "org/one"
    model.peft_config["zh"].base_model_name_or_path = None
    assert common_base(read_adapters(model, ["zh", "odd"])) == "org/one"


def zero_b(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        if "odd" in layer.lora_B:
            layer.lora_B["odd"].weight.data.zero_()


def zero_a(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        if "odd" in layer.lora_A:
            layer.lora_A["odd"].weight.data.zero_()


@pytest.mark.parametrize("zeroed", [zero_a, zero_b])
def test_adapter_that_was_never_trained_is_warned_about(
    zeroed: Callable[[PeftModel], None],
) -> None:
    model = with_odd()
    zeroed(model)
    with pytest.warns(UserWarning, match="'odd'.*never trained"):
        read_adapters(model, ["zh", "odd"])


def test_adapter_error_is_a_value_error_of_the_library() -> None:
    assert issubclass(AdapterError, ValueError)
    assert issubclass(AdapterError, HiMergeError)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_start_that_changed_the_base_is_refused_by_name(start: str) -> None:
    model = tiny.peft_model("llama", 2)
    model.peft_config["en"].init_lora_weights = start
    with pytest.raises(AdapterError, match=f"'en'.*init_lora_weights='{start}'"):
        read_adapters(model, ["zh", "en"])
