"""The cells of the matrix as data: what is put on which base, and what comes of it.

A cell's result is per way of merging: `MERGED` (proved by logits, in `test_matrix`) or a `Refused`,
whose two texts must both stand in the error. The README's table is made from this (`table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

MERGED = "merged"
# The two ways: an exact weighted sum by the drop-in, and Hi-Merging.
WAYS = ("add_weighted_adapter", "merge_adapters_hi")


@dataclass(frozen=True)
class Refused:
    """An error of the library that names the kind and says what to do."""

    names: str
    fix: str


Outcome = str | Refused


@dataclass(frozen=True)
class Cell:
    """One base with two adapters of one kind.

    Attributes:
        group: what the cell varies.
        label: what a reader calls it.
        base: name of the base (`bases.build`).
        both: options of both adapters (`tiny.add_adapters`), on top of the base's usual ones.
        second: options of the second adapter alone.
        setup: how model and adapters come about (`setups.SETUPS`).
        dtype: of the base.
        policy: the drop-in's modules_to_save.
        add: what comes of `add_weighted_adapter`.
        hi: what comes of `merge_adapters_hi`.
        needs: package without which the cell is skipped.
    """

    group: str
    label: str
    base: str = "llama"
    both: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    second: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    setup: str = "plain"
    dtype: str = "float32"
    policy: str = "sole"
    add: Outcome = MERGED
    hi: Outcome = MERGED
    needs: str = ""

    @property
    def id(self) -> str:
        """The cell's name in the test run."""
        return f"{self.group}: {self.label}"

    def outcome(self, way: str) -> Outcome:
        """Return what comes of one way of merging."""
        return self.add if way == WAYS[0] else self.hi


# Targets of the two adapters of each base; they overlap but differ.
TARGETS: Mapping[str, tuple[list[str], list[str]]] = MappingProxyType(
    {
        "llama": (["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj", "up_proj"]),
        "qwen2": (["q_proj", "v_proj"], ["v_proj", "down_proj"]),
        "qwen3": (["q_proj", "v_proj"], ["v_proj", "gate_proj"]),
        "gemma3": (["q_proj", "v_proj"], ["v_proj", "up_proj"]),
        "mistral": (["q_proj", "v_proj"], ["v_proj", "o_proj"]),
        "mixtral": (["q_proj", "v_proj"], ["v_proj", "o_proj"]),
        "gpt2": (["c_attn", "c_fc"], ["c_attn", "c_proj"]),
        "opt": (["q_proj", "v_proj"], ["q_proj", "fc1"]),
        "t5": (["q", "v"], ["q", "wo"]),
        "bart": (["q_proj", "v_proj"], ["q_proj", "fc1"]),
        "bert": (["query", "value"], ["query", "dense"]),
        "roberta": (["query", "value"], ["query", "dense"]),
        "vit": (["q_proj", "v_proj"], ["q_proj", "fc1"]),
        "whisper": (["q_proj", "v_proj"], ["q_proj", "fc1"]),
        "mamba": (["in_proj", "x_proj"], ["in_proj"]),
        "mixtral, plain experts": (["q_proj", "gate_up.0", "gate_up.2"], ["gate_up.0", "down.1"]),
        "stages": (["stages.1", "stages.7"], ["stages.1"]),
    }
)
_BASES = {
    "Llama": "llama",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Gemma 3": "gemma3",
    "Mistral": "mistral",
    "GPT-2": "gpt2",
    "OPT": "opt",
    "T5": "t5",
    "BART": "bart",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "ViT": "vit",
    "Whisper": "whisper",
    "Mamba": "mamba",
    "Mixtral": "mixtral",
    "Mixtral with plain expert linears": "mixtral, plain experts",
}


def _stage(number: int) -> dict[str, Any]:
    return {"target_modules": [f"stages.{number}"]}


def _modules() -> list[Cell]:
    group = "module"
    return [
        Cell(group, "Linear", "stages"),
        Cell(group, "Conv1D (GPT-2)", "gpt2", both={"target_modules": ["c_attn"]}),
        Cell(group, "Conv1d", "stages", both=_stage(2)),
        Cell(group, "Conv2d", "stages", both=_stage(3)),
        Cell(group, "Conv3d", "stages", both=_stage(4)),
        Cell(group, "Embedding", "stages", both=_stage(0)),
        Cell(group, "lm_head", second={"target_modules": ["lm_head"]}),
        Cell(group, "tied embedding", "gemma3", second={"target_modules": ["embed_tokens"]}),
        Cell(group, "head tied to the embedding", "gpt2", second={"target_modules": ["lm_head"]}),
    ]


TODO = Refused("?", "?")


def _adapters() -> list[Cell]:
    group = "adapter"
    halves = {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"}
    head, rows = {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5, 8]}
    return [
        Cell(group, "rsLoRA", both={"rslora": True}),
        Cell(group, "rank_pattern", second={"rank_pattern": {"v_proj": 5, "layers.1.mlp.up_proj": 1}}),
        Cell(group, "alpha_pattern", second={"alpha_pattern": {"v_proj": 7}}),
        Cell(group, "layers_to_transform", second={"layers_to_transform": [1, 3]}),
        Cell(group, "exclude_modules", second={"exclude_modules": ["model.layers.1.self_attn.q_proj"]}),
        Cell(group, "regex as target_modules", second=halves),
        Cell(group, "all-linear", second={"target_modules": "all-linear"}),
        Cell(group, "no module in common", both={}, second={"target_modules": ["o_proj"]}),
        Cell(group, "lora_bias", both={"lora_bias": True}, hi=TODO),
        Cell(group, "modules_to_save in one adapter", second=head, hi=TODO),
        Cell(group, "modules_to_save in both", both=head, policy="average", hi=TODO),
        Cell(group, "trained token rows", both=rows, hi=TODO),
        Cell(group, "PiSSA, converted", both={"init_lora_weights": "pissa"}, setup="converted"),
        Cell(group, "OLoRA, converted", both={"init_lora_weights": "olora"}, setup="converted"),
        Cell(group, "PiSSA", both={"init_lora_weights": "pissa"}, add=TODO, hi=TODO),
        Cell(group, "DoRA", both={"use_dora": True}, add=TODO, hi=TODO),
        Cell(group, "MiCA", both={"init_lora_weights": "mica"}, add=TODO, hi=TODO),
        Cell(group, "trained biases", "qwen2", setup="biases", add=TODO, hi=TODO),
        Cell(group, "target_parameters", "mixtral", both={"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, setup="odd", add=TODO, hi=TODO),
        Cell(group, "layer_replication", setup="replicated", add=TODO, hi=TODO),
        Cell(group, "grouped convolution", "stages", both={"r": 3, **_stage(5)}, setup="odd", add=TODO, hi=TODO),
        Cell(group, "nn.MultiheadAttention", "stages", both=_stage(6), setup="odd", add=TODO, hi=TODO),
    ]


def _types() -> list[Cell]:
    kinds = ("ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "SHIRA")
    return [Cell("PEFT type", kind, setup="other type", both={"type": kind}, add=TODO, hi=TODO) for kind in kinds]


def _dtypes() -> list[Cell]:
    return [
        Cell("dtype", "float32"),
        Cell("dtype", "bfloat16", dtype="bfloat16"),
        Cell("dtype", "float16", dtype="float16"),
        Cell("dtype", "bfloat16 adapters", setup="narrow adapters"),
    ]


def _states() -> list[Cell]:
    group = "state of the model"
    return [
        Cell(group, "offloaded to CPU and disk", setup="offloaded"),
        Cell(group, "prepare_model_for_kbit_training", setup="kbit"),
        Cell(group, "compiled in place", setup="compiled in place"),
        Cell(group, "compiled", setup="compiled", add=TODO, hi=TODO),
        Cell(group, "compiled base", setup="compiled base", add=TODO, hi=TODO),
        Cell(group, "wrapped twice", setup="wrapped twice", add=TODO, hi=TODO),
        Cell(group, "merged into the weights", setup="merged", add=TODO, hi=TODO),
        Cell(group, "adapters on the meta device", setup="meta", add=TODO, hi=TODO),
    ]


def cells() -> tuple[Cell, ...]:
    """Return every cell, in the order of the README."""
    bases = [Cell("base", label, base) for label, base in _BASES.items()]
    return (*bases, *_modules(), *_adapters(), *_types(), *_dtypes(), *_states())
