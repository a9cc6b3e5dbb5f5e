"""How the model of a cell comes about: a base, and two adapters on it with values of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import oracle
import tiny
import torch
from accelerate import dispatch_model
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from matrix import bases
from matrix.cells import TARGETS, Cell
from peft_himerge import densify

__all__ = ["SETUPS", "Made", "make"]

NAMES = ("zh", "en")


@dataclass(frozen=True, eq=False)
class Made:
    """A cell's model, and the plain base that the oracle and the fresh process start from.

    Attributes:
        model: holds the adapters, in eval mode.
        plain: the base as it was before anything was done to it.
        dtype: in which a fresh process builds the base.
        dense: adapter -> its true dense deltas, where they are not those of the model's factors.
        filed: adapter -> the dense deltas of its folder, where PEFT makes others of it on loading.
    """

    model: PeftModel
    plain: nn.Module
    dtype: torch.dtype
    dense: oracle.Table | None = None
    filed: oracle.Table | None = None

    def table(self) -> oracle.Table:
        """Return adapter -> module -> dense delta."""
        return self.dense or {name: oracle.deltas(self.model, name) for name in NAMES}


def specs_of(cell: Cell) -> dict[str, dict[str, Any]]:
    """Return the options of the two adapters: alpha / r is never 1 and they differ."""
    first, second = TARGETS[cell.base]
    return {
        "zh": {"r": 3, "alpha": 5, "seed": 1, "target_modules": first, **cell.both},
        "en": {"r": 2, "alpha": 3, "seed": 2, "target_modules": second, **cell.both, **cell.second},
    }


def make(cell: Cell, folder: Path) -> Made:
    """Return the cell's model; `folder` is for what must lie on disk."""
    return SETUPS[cell.setup](cell, folder)


def _plain(cell: Cell, _: Path) -> Made:
    dtype = getattr(torch, cell.dtype)
    model = tiny.add_adapters(bases.build(cell.base, dtype), specs_of(cell))
    enrich(model)
    return Made(model, bases.build(cell.base, dtype), dtype)


@torch.no_grad()
def enrich(model: PeftModel) -> None:
    """Give what is neither A nor B (biases, saved modules, token rows, magnitudes) other values."""
    for path, p in model.named_parameters():
        parts = path.split(".")
        trained = {"modules_to_save", "trainable_tokens_delta", "lora_magnitude_vector"} & set(
            parts
        )
        if trained or (path.endswith(".bias") and "lora_B" in parts):
            noise = torch.randn(p.shape, generator=bases.drawn(path), dtype=torch.float64)
            p.copy_(p + 0.2 * noise * (p.double().std() if trained and p.numel() > 1 else 1.0))


def _converted(cell: Cell, folder: Path) -> Made:
    """Adapters whose start changed the base, saved as plain ones of the original base."""
    for name, spec in specs_of(cell).items():
        config = LoraConfig(
            r=spec["r"],
            lora_alpha=spec["alpha"],
            target_modules=spec["target_modules"],
            init_lora_weights=spec["init_lora_weights"],
        )
        model = get_peft_model(bases.build(cell.base), config)
        model.peft_config["default"].init_lora_weights = True  # PEFT asks for it
        model.save_pretrained(folder / name / "start")
        model.peft_config["default"].init_lora_weights = spec["init_lora_weights"]
        train(model, "default")
        start = folder / name / "start"
        model.save_pretrained(folder / name, path_initial_model_for_weight_conversion=str(start))
    loaded = PeftModel.from_pretrained(bases.build(cell.base), folder / "zh", "zh")
    loaded.load_adapter(folder / "en", "en")
    return Made(loaded.eval(), bases.build(cell.base), torch.float32)


@torch.no_grad()
def train(model: PeftModel, name: str) -> None:
    """Move an adapter's factors by a fifth."""
    for path, p in model.named_parameters():
        if f".{name}." in path:
            noise = torch.randn(p.shape, generator=bases.drawn(path))
            p.add_(noise * 0.2 * p.std())


def _densified(cell: Cell, folder: Path) -> Made:
    """Plain adapters made of DoRA ones; their true deltas are computed from the DoRA ones."""
    specs = {f"{name} as DoRA": spec for name, spec in specs_of(cell).items()}
    model = tiny.add_adapters(bases.build(cell.base), specs)
    enrich(model)
    dense: oracle.Table = {}
    for name in NAMES:
        dense[name] = dora_deltas(model, f"{name} as DoRA")
        assert densify(model, f"{name} as DoRA", name) == 0.0
    return Made(model, bases.build(cell.base), torch.float32, dense)


def dora_deltas(model: PeftModel, name: str) -> oracle.Deltas:
    """Return m * V / |V| - W0 of every module, V = W0 + scaling * B @ A, row by row, in float64."""
    found = {}
    for path, product in oracle.deltas(model, name).items():
        layer = model.base_model.model.get_submodule(path)
        base = oracle.weight_delta(layer, layer.get_base_layer().weight.detach().double())
        magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
        rows = [
            m * v / v.pow(2).sum().sqrt() for m, v in zip(magnitude, base + product, strict=True)
        ]
        found[path] = torch.stack(rows) - base
    return found


def _odd(cell: Cell, folder: Path) -> Made:
    """Modules whose factors do not chain to one delta."""
    model: PeftModel | None = None
    for name, spec in specs_of(cell).items():
        options = {k: v for k, v in spec.items() if k not in ("alpha", "seed")}
        config = LoraConfig(lora_alpha=spec["alpha"], init_lora_weights=False, **options)
        if model is None:
            model = get_peft_model(bases.build(cell.base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return Made(model.eval(), bases.build(cell.base), torch.float32)


def _experts_of_4(cell: Cell, folder: Path) -> Made:
    """Adapters of single experts, as transformers 4 named them; PEFT fuses them on loading."""
    base = bases.build(cell.base)
    shapes = {"w1": (32, 24), "w3": (32, 24), "w2": (24, 32)}
    filed: oracle.Table = {}
    for name, spec in specs_of(cell).items():
        rank, scaling = spec["r"], spec["alpha"] / spec["r"]
        factors, filed[name] = {}, {}
        for layer, expert, w in itertools.product(range(2), range(3), shapes):
            path = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}"
            out, width = shapes[w]
            a = torch.randn(rank, width, generator=bases.drawn(name, path, "A"))
            b = torch.randn(out, rank, generator=bases.drawn(name, path, "B")) * 0.05
            stem = f"base_model.model.{path}.lora_"
            factors |= {f"{stem}A.weight": a, f"{stem}B.weight": b}
            filed[name][path] = scaling * b.double() @ a.double()
        config = LoraConfig(r=rank, lora_alpha=spec["alpha"], target_modules=spec["target_modules"])
        config.save_pretrained(folder / name)
        save_file(factors, folder / name / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(base, folder / "zh", "zh")
    model.load_adapter(folder / "en", "en")
    return Made(model.eval(), bases.build(cell.base), torch.float32, filed=filed)


def _biases(cell: Cell, folder: Path) -> Made:
    """Trained biases: PEFT allows them in the first adapter alone."""
    specs = specs_of(cell)
    specs["zh"]["bias"] = "all"
    model = tiny.add_adapters(bases.build(cell.base), specs)
    return Made(model, bases.build(cell.base), torch.float32)


def _replicated(cell: Cell, folder: Path) -> Made:
    specs = specs_of(cell)
    specs["zh"]["layer_replication"] = [[0, 3], [1, 4]]
    model = tiny.add_adapters(bases.build(cell.base), specs)
    return Made(model, bases.build(cell.base), torch.float32)


def _other_type(cell: Cell, folder: Path) -> Made:
    kind = cell.both["type"]
    shape: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    if kind.endswith("TUNING"):
        shape = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
        if kind == "P_TUNING":
            shape["encoder_hidden_size"] = 8
    elif kind == "ADALORA":
        shape["total_step"] = 10
    elif kind == "IA3":
        shape["feedforward_modules"] = []
    elif kind == "OFT":
        shape |= {"oft_block_size": 4, "r": 0}
    elif kind == "SHIRA":
        shape["r"] = 2
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    model = get_peft_model(bases.build(cell.base), cls(**shape), adapter_name="zh")
    model.add_adapter("en", cls(**shape, inference_mode=True))
    return Made(model.eval(), bases.build(cell.base), torch.float32)


def _converted_type(cell: Cell, folder: Path) -> Made:
    """Adapters of another type, made LoRA by PEFT; their true deltas are the type's own."""
    dense: oracle.Table = {}
    model: PeftModel | None = None
    for name in NAMES:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(cell.both["type"])]
        config = kind(r=2, alpha=3, target_modules=["q_proj", "up_proj"], init_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(NAMES.index(name))
            other = get_peft_model(bases.build(cell.base), config)
        dense[name] = {
            path: layer.get_delta_weight("default").detach().double()
            for path, layer in other.base_model.model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        lora, factors = convert_to_lora(other, rank=24)
        if model is None:
            model = get_peft_model(bases.build(cell.base), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
        set_peft_model_state_dict(model, factors, name)
    assert model is not None
    return Made(model.eval(), bases.build(cell.base), torch.float32, dense)


def _narrow(cell: Cell, folder: Path) -> Made:
    made = _plain(cell, folder)
    for path, p in made.model.named_parameters():
        if "lora_" in path:
            p.data = p.data.to(torch.bfloat16)
    return made


def _offloaded(cell: Cell, folder: Path) -> Made:
    """Two blocks live on disk, in and out of memory by accelerate's hooks; so do their factors."""
    made = _plain(cell, folder)
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu")
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    inner = made.model.base_model.model
    dispatch_model(inner, places, main_device="cpu", offload_dir=folder / "disk", force_hooks=True)
    return replace(made, dense=_plain(cell, folder).table())


def _quantised(cell: Cell, folder: Path) -> Made:
    model = on_quantised(bases.build(cell.base), cell, folder)
    return Made(model.eval(), bases.build(cell.base), torch.float32)


def on_quantised(base: nn.Module, cell: Cell, folder: Path) -> PeftModel:
    """Load adapters whose size is drawn to fit the plain base's weights."""
    plain = tiny.add_adapters(bases.build("wide llama"), specs_of(cell))
    plain.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder / "zh", "zh", is_trainable=True)
    model.load_adapter(folder / "en", "en")
    return model


def _qlora(cell: Cell, folder: Path) -> Made:
    """As training ends: on a prepared 4-bit base, in training mode, with gradients."""
    base = prepare_model_for_kbit_training(bases.build(cell.base))
    model = on_quantised(base, cell, folder).train()
    batch = bases.inputs(cell.base, "zh")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return Made(model, bases.build(cell.base), torch.float32)


def _kbit(cell: Cell, folder: Path) -> Made:
    base = prepare_model_for_kbit_training(bases.build(cell.base))
    model = tiny.add_adapters(base, specs_of(cell))
    return Made(model, bases.build(cell.base), torch.float32)


def _compiled_in_place(cell: Cell, folder: Path) -> Made:
    made = _plain(cell, folder)
    made.model.compile(backend="eager")
    made.model(**bases.inputs(cell.base, "zh"))
    return made


def _compiled(cell: Cell, folder: Path) -> Made:
    made = _plain(cell, folder)
    return replace(made, model=torch.compile(made.model, backend="eager"))


def _compiled_base(cell: Cell, folder: Path) -> Made:
    base = torch.compile(bases.build(cell.base), backend="eager")
    return Made(tiny.add_adapters(base, specs_of(cell)), bases.build(cell.base), torch.float32)


def _plain_again(cell: Cell, folder: Path) -> Made:
    """What the error about a compiled base asks for."""
    made = _compiled_base(cell, folder)
    made.model.base_model.model = made.model.base_model.model._orig_mod
    return made


def _wrapped_twice(cell: Cell, folder: Path) -> Made:
    specs = specs_of(cell)
    once = tiny.add_adapters(bases.build(cell.base), {"zh": specs["zh"]})
    twice = get_peft_model(once, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="en")
    return Made(twice.eval(), bases.build(cell.base), torch.float32)


def _merged(cell: Cell, folder: Path) -> Made:
    made = _plain(cell, folder)
    made.model.merge_adapter(["zh"])
    return made


def _meta(cell: Cell, folder: Path) -> Made:
    """As after load_adapter(low_cpu_mem_usage=True) of a file that lacks some weights."""
    made = _plain(cell, folder)
    for module in made.model.modules():
        if isinstance(module, LoraLayer) and "zh" in module.lora_A:
            module.lora_A["zh"].to("meta")
    return made


SETUPS: Mapping[str, Callable[[Cell, Path], Made]] = {
    "plain": _plain,
    "converted": _converted,
    "densified": _densified,
    "odd": _odd,
    "experts of transformers 4": _experts_of_4,
    "biases": _biases,
    "replicated": _replicated,
    "other type": _other_type,
    "narrow adapters": _narrow,
    "offloaded": _offloaded,
    "quantised": _quantised,
    "qlora": _qlora,
    "kbit": _kbit,
    "compiled in place": _compiled_in_place,
    "compiled": _compiled,
    "compiled base": _compiled_base,
    "plain again": _plain_again,
    "converted type": _converted_type,
    "wrapped twice": _wrapped_twice,
    "merged": _merged,
    "meta": _meta,
}
