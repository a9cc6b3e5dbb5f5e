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
# An exact weighted sum by the drop-in, Hi-Merging, and its first step from folder to folder.
WAYS = ("add_weighted_adapter", "merge_adapters_hi", "merge_folders")


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
        rank: of the drop-in's adapter.
        policy: the drop-in's modules_to_save.
        add: what comes of `add_weighted_adapter`.
        hi: what comes of `merge_adapters_hi`.
        folders: what comes of `merge_folders`; None is the same as `hi`.
        precision: dtype that bounds the error; "" is `dtype`.
        needs: package without which the cell is skipped.
    """

    group: str
    label: str
    base: str = "llama"
    both: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    second: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    setup: str = "plain"
    dtype: str = "float32"
    rank: int = 8
    policy: str = "sole"
    add: Outcome = MERGED
    hi: Outcome = MERGED
    folders: Outcome | None = None
    precision: str = ""
    needs: str = ""

    @property
    def id(self) -> str:
        """The cell's name in the test run."""
        return f"{self.group}: {self.label}"

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that the cell is about; folders know no state of a model."""
        return WAYS[:2] if self.group == "model" else WAYS

    def outcome(self, way: str) -> Outcome:
        """Return what comes of one way of merging."""
        results = (self.add, self.hi, self.hi if self.folders is None else self.folders)
        return dict(zip(WAYS, results, strict=True))[way]


# Quantised base -> the package that it takes.
QUANTISED = MappingProxyType(
    {
        "wide llama, bitsandbytes 8-bit": "bitsandbytes",
        "wide llama, bitsandbytes 4-bit": "bitsandbytes",
        "wide llama, torchao 8-bit": "torchao",
        "wide llama, QLoRA": "bitsandbytes",
    }
)
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
        "llama, replicated": (["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj"]),
        **dict.fromkeys(QUANTISED, (["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"])),
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


def refused(names: str, fix: str) -> dict[str, Outcome]:
    """Return the outcome of a kind that neither way takes."""
    return {"add": Refused(names, fix), "hi": Refused(names, fix)}


def _adapters() -> list[Cell]:
    group = "adapter"
    halves = {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"}
    ranks = {"rank_pattern": {"v_proj": 5, "layers.1.mlp.up_proj": 1}}
    one_less = {"exclude_modules": ["model.layers.1.self_attn.q_proj"]}
    pissa, olora = {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}
    return [
        Cell(group, "rsLoRA", both={"rslora": True}),
        Cell(group, "rank_pattern", second=ranks),
        Cell(group, "alpha_pattern", second={"alpha_pattern": {"v_proj": 7}}),
        Cell(group, "layers_to_transform", second={"layers_to_transform": [1, 3]}),
        Cell(group, "exclude_modules", second=one_less),
        Cell(group, "target_modules as a regex", second=halves),
        Cell(group, "target_modules='all-linear'", second={"target_modules": "all-linear"}),
        Cell(group, "no module in common", second={"target_modules": ["o_proj"]}),
        Cell(group, "PiSSA, converted", both=pissa, setup="converted"),
        Cell(group, "OLoRA, converted", both=olora, setup="converted"),
        Cell(group, "MiCA", both={"init_lora_weights": "mica"}),
        Cell(group, "DoRA, after densify()", both={"use_dora": True}, setup="densified", rank=24),
        Cell(group, "layer_replication, of the base", "llama, replicated"),
    ]


def _more_than_factors() -> list[Cell]:
    group = "adapter"
    head, rows = {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 8, 9]}
    way_out = "merge_adapters(method='cat', modules_to_save='sole')"
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    calls = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}

    def hi(names: str) -> dict[str, Any]:
        return {"hi": Refused(names, way_out)}

    return [
        Cell(group, "lora_bias", both={"lora_bias": True}, **hi("lora_bias=True")),
        Cell(group, "modules_to_save", second=head, **hi("modules_to_save=['lm_head']")),
        Cell(
            group,
            "modules_to_save in both",
            both=head,
            policy="average",
            **hi("modules_to_save=['lm_head']"),
        ),
        Cell(group, "trained token rows", both=rows, **hi("trainable_token_indices")),
        Cell(
            group,
            "target_parameters (fused experts)",
            "mixtral",
            both={"target_modules": ["q_proj"], "target_parameters": experts},
            setup="odd",
            **hi("target_parameters"),
        ),
        Cell(
            group,
            "target_parameters alone",
            "mixtral",
            both={"target_modules": [], "target_parameters": experts[:1]},
            setup="odd",
            **hi("target_parameters"),
        ),
        Cell(group, "activated LoRA", both=calls, **hi("alora_invocation_tokens")),
        Cell(
            group,
            "experts one by one, of transformers 4",
            "mixtral",
            both={"target_modules": ["w1", "w2", "w3"]},
            setup="experts of transformers 4",
            rank=10,
            folders=MERGED,
            **hi("target_parameters"),
        ),
    ]


def _refused() -> list[Cell]:
    group = "adapter"
    pissa = {"init_lora_weights": "pissa"}
    return [
        Cell(
            group,
            "PiSSA, OLoRA and the like, not converted",
            both=pissa,
            **refused("init_lora_weights='pissa'", "path_initial_model_for_weight_conversion"),
        ),
        Cell(
            group,
            "DoRA",
            both={"use_dora": True},
            **refused("use_dora=True", "peft_himerge.densify"),
        ),
        Cell(group, "trained biases", setup="biases", **refused("bias='all'", "bias='none'")),
        Cell(
            group,
            "layer_replication, of the adapter",
            setup="replicated",
            **refused("layer_replication=", "peft.tuners.tuners_utils.replicate_layers"),
        ),
        Cell(
            group,
            "grouped convolution",
            "stages",
            both={"r": 3, **_stage(5)},
            setup="odd",
            **refused("grouped convolutions", "leave the module out of target_modules"),
        ),
        Cell(
            group,
            "nn.MultiheadAttention",
            "stages",
            both=_stage(6),
            setup="odd",
            **refused("MultiheadAttention", "target nn.Linear modules"),
        ),
    ]


def _types() -> list[Cell]:
    deltas = ("ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "SHIRA")
    tokens = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
    advice = dict.fromkeys(deltas, "convert_to_lora") | dict.fromkeys(
        tokens, "train a LoRA adapter"
    )
    loha = Cell(
        "PEFT type",
        "LOHA, after convert_to_lora()",
        setup="converted type",
        both={"type": "LOHA"},
        rank=24,
    )
    return [
        loha,
        *(
            Cell("PEFT type", kind, setup="other type", both={"type": kind}, **refused(kind, fix))
            for kind, fix in advice.items()
        ),
    ]


def _dtypes() -> list[Cell]:
    return [
        Cell("dtype", "float32"),
        Cell("dtype", "bfloat16", dtype="bfloat16"),
        Cell("dtype", "float16", dtype="float16"),
        Cell("dtype", "bfloat16 adapters", setup="narrow adapters", precision="bfloat16"),
    ]


def _states() -> list[Cell]:
    group, qlora = "model", "wide llama, QLoRA"
    return [
        *(
            Cell(
                group,
                base.removeprefix("wide llama, "),
                base,
                setup="quantised",
                precision="quantised",
                needs=package,
            )
            for base, package in QUANTISED.items()
            if base != qlora
        ),
        Cell(
            group,
            "QLoRA (NF4 twice quantised, prepare_model_for_kbit_training, after training)",
            qlora,
            setup="qlora",
            precision="quantised",
            needs=QUANTISED[qlora],
        ),
        Cell(group, "offloaded to CPU and disk", setup="offloaded"),
        Cell(group, "prepare_model_for_kbit_training", setup="kbit"),
        Cell(group, "compiled in place", setup="compiled in place"),
        Cell(group, "compiled base, its _orig_mod put back", setup="plain again"),
        Cell(
            group,
            "compiled",
            setup="compiled",
            **refused("OptimizedModule", "pass model._orig_mod"),
        ),
        Cell(
            group,
            "base compiled before get_peft_model",
            setup="compiled base",
            **refused("is compiled", "Put its _orig_mod in its place"),
        ),
        Cell(
            group,
            "wrapped twice",
            setup="wrapped twice",
            **refused("wrapped twice by get_peft_model", "model.add_adapter(name, config)"),
        ),
        Cell(
            group,
            "adapters merged into the weights",
            setup="merged",
            **refused("merged into its weight", "model.unmerge_adapter()"),
        ),
        Cell(
            group,
            "adapters without weights (meta device)",
            setup="meta",
            **refused("on the meta device", "low_cpu_mem_usage=False"),
        ),
    ]


def cells() -> tuple[Cell, ...]:
    """Return every cell, in the order of the README."""
    bases = [Cell("base", label, base) for label, base in _BASES.items()]
    adapters = [*_adapters(), *_more_than_factors(), *_refused()]
    return (*bases, *_modules(), *adapters, *_types(), *_dtypes(), *_states())
