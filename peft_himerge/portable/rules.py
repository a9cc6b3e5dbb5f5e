"""The rules, each a function from an adapter's files to what it found.

Source: the engines' own code and threads. vLLM: `PEFTHelper`, `LoRAConfig`, the name parser of its
LoRA loader. llama.cpp: `convert_lora_to_gguf.py`. PEFT: `load_peft_weights`, `LoraConfig`. The
facts are of 2026; where an engine has become more generous since, a finding is too strict, never
too lax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from .finding import EVERY, Engine, Finding, Severity, some
from .folder import AdapterFiles
from .targets import rank_in_config, scale_of, targeted

__all__ = ["KNOWN_FIELDS", "MAX_LORA_RANKS", "RULES"]

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank allows
_VLLM_DEFAULT_RANK = 16
_VLLM_COSTLY_RANK = 64
_CLOSE = 1e-6  # relative; scales are quotients of small numbers
_SAFE = "merge it with peft_himerge.merge_folders, which folds every scale into the factors"

# Fields of LoraConfig and its parents in PEFT 0.21.
KNOWN_FIELDS = frozenset(
    "alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias "
    "corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core "
    "modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern "
    "revision runtime_config target_modules target_parameters task_type trainable_token_indices "
    "use_bdlora use_dora use_qalora use_rslora velora_config".split()
)

# Config field -> engines, severity, what they do with it, how to do without.
_FIELDS: Mapping[str, tuple[str, tuple[Engine, ...], Severity, str, str]] = MappingProxyType(
    {
        "use_dora": (
            *("dora", ("vllm", "llama.cpp"), "error"),
            "DoRA is refused: it has a magnitude beside A and B",
            "train with use_dora=False",
        ),
        "modules_to_save": (
            *("modules-to-save", ("vllm", "llama.cpp"), "error"),
            "full copies of modules are refused",
            "merge those modules into the base checkpoint, and save the adapter without them",
        ),
        "lora_bias": (
            *("bias", ("vllm", "llama.cpp"), "error"),
            "a bias behind B is refused",
            "train with lora_bias=False",
        ),
        "trainable_token_indices": (
            *("trained-tokens", ("vllm", "llama.cpp"), "error"),
            "trained token rows are refused or left out",
            "merge them into the base checkpoint",
        ),
        "layer_replication": (
            *("layer-replication", ("vllm", "llama.cpp"), "error"),
            "the base's layers are not replicated there, so the adapter meets other layers",
            "undo the replication",
        ),
        "target_parameters": (
            *("fused-experts", ("vllm", "llama.cpp"), "warning"),
            "LoRA on fused experts is read differently from version to version",
            "compare the outputs with PEFT's before use",
        ),
    }
)
# Starts that also change the base's weights (PEFT's docs of init_lora_weights).
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Linear modules of attention and MLP that vLLM's model classes adapt, by their last component.
_SERVED = frozenset(
    "q_proj k_proj v_proj o_proj qkv_proj out_proj gate_proj up_proj down_proj gate_up_proj "
    "c_attn c_proj c_fc fc1 fc2 fc_in fc_out dense query_key_value dense_h_to_4h dense_4h_to_h "
    "query key value Wqkv wqkv wo w1 w2 w3 gate q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj "
    "in_proj x_proj dt_proj".split()
)
_HEADS = ("lm_head", "embed_out")


def _factors(files: AdapterFiles) -> Iterator[Finding]:
    alone = sorted(set(files.a) ^ set(files.b))
    if alone:
        text = f"only one of A and B is there for {some(alone)}"
        yield Finding("factors", EVERY, "error", text, "save the adapter again")
    if not files.modules:
        text = "the file holds no pair of A and B"
        yield Finding("factors", EVERY, "error", text, "save the adapter again")
    odd = [m for m in files.modules if files.rank(m) < 1 or files.b[m].shape[1] != files.rank(m)]
    if odd:
        text = f"A and B have different ranks, or rank 0, in {some(odd)}"
        yield Finding("factors", EVERY, "error", text, "save the adapter again")


def _ranks(files: AdapterFiles) -> Iterator[Finding]:
    wrong = [m for m in files.modules if rank_in_config(files, m) != files.rank(m)]
    if wrong:
        m = wrong[0]
        text = (
            f"the config says rank {rank_in_config(files, m):g} for {some(wrong)}, the tensor has "
            f"{files.rank(m)}: it does not load"
        )
        fix = "config and weights are of different adapters; save both again"
        yield Finding("rank", ("peft",), "error", text, fix)
    if len(files.ranks) > 1:
        text = f"ranks from {files.ranks[0]} to {files.ranks[-1]}: other engines know one rank"
        yield Finding("mixed-rank", ("vllm", "llama.cpp"), "warning", text, _SAFE)


def _scale(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    blame = [f for f in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(f)]
    cause = f"it does not read {' and '.join(blame)}" if blame else "the config's r is not theirs"
    for engine in ("vllm", "llama.cpp"):
        wrong = []
        for m in files.modules:
            here, there = scale_of(files, m, "peft"), scale_of(files, m, engine)
            if not math.isclose(here, there, rel_tol=_CLOSE):
                wrong.append((m, here, there))
        if wrong:
            m, here, there = wrong[0]
            text = (
                f"{some([row[0] for row in wrong])}: PEFT scales B @ A by {here:.4g}, {engine} by "
                f"{there:.4g} without a word ({cause})"
            )
            yield Finding("scale", (engine,), "error", text, _SAFE)


def _alpha(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    if config.get("alpha_pattern"):
        text = f"alpha_pattern has {len(config['alpha_pattern'])} entries, which only PEFT reads"
        yield Finding("alpha-pattern", ("vllm", "llama.cpp"), "warning", text, _SAFE)
    if config.get("use_rslora"):
        text = "rsLoRA is ignored for MoE experts"
        yield Finding("rslora", ("vllm",), "warning", text, _SAFE)
    elif config["lora_alpha"] != config["r"]:
        scale = config["lora_alpha"] / config["r"]
        text = (
            f"lora_alpha {config['lora_alpha']:g} is not r {config['r']:g}: every reader "
            f"must scale by {scale:.4g}"
        )
        yield Finding("alpha", ("vllm", "llama.cpp"), "warning", text, _SAFE)


def _fields(files: AdapterFiles) -> Iterator[Finding]:
    for field, (rule, engines, severity, what, fix) in _FIELDS.items():
        value = files.config.get(field)
        if value:
            yield Finding(rule, engines, severity, f"{field}={value!r}: {what}", fix)
    bias = files.config.get("bias", "none")
    if bias != "none":
        text = f"bias={bias!r}: trained biases are refused"
        yield Finding("bias", ("vllm", "llama.cpp"), "error", text, "train with bias='none'")
    start = files.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REBASED):
        text = f"init_lora_weights={start!r} changed the base's weights: elsewhere the base is not"
        fix = "save with path_initial_model_for_weight_conversion"
        yield Finding("changed-base", ("vllm", "llama.cpp"), "error", text, fix)


def _others(files: AdapterFiles) -> Iterator[Finding]:
    fix = "save the adapter without them (save_embedding_layers=False for embeddings)"
    if files.others:
        text = f"tensors other than lora_A and lora_B are refused: {some(list(files.others))}"
        yield Finding("other-tensors", ("vllm",), "error", text, fix)
    passed = ("_layernorm", ".norm", ".base_layer.weight")
    refused = [key for key in files.others if not any(part in key for part in passed)]
    if refused:
        text = f"the converter stops at tensors other than A, B and norms: {some(refused)}"
        yield Finding("other-tensors", ("llama.cpp",), "error", text, fix)
    strange = [key for key in files.tensors if not key.startswith("base_model.model.")]
    if strange:
        text = f"keys without PEFT's prefix 'base_model.model.' are left out: {some(strange)}"
        yield Finding("key-names", ("peft",), "error", text, "save with save_pretrained()")


def _vllm_rank(files: AdapterFiles) -> Iterator[Finding]:
    most = max([*files.ranks, int(files.config["r"])])
    if most > MAX_LORA_RANKS[-1]:
        text = f"rank {most} is above {MAX_LORA_RANKS[-1]}, the most that can be served"
        fix = f"export with rank={MAX_LORA_RANKS[-1]} or less"
        yield Finding("max-lora-rank", ("vllm",), "error", text, fix)
    elif most > _VLLM_DEFAULT_RANK:
        need = next(n for n in MAX_LORA_RANKS if n >= most)
        text = f"rank {most} is above the default of {_VLLM_DEFAULT_RANK}"
        if most > _VLLM_COSTLY_RANK:
            text += f", and above {_VLLM_COSTLY_RANK} it costs much memory and speed"
        yield Finding(
            "max-lora-rank", ("vllm",), "warning", text, f"serve with --max-lora-rank {need}"
        )


def _heads(files: AdapterFiles) -> Iterator[Finding]:
    heads = [m for m in files.modules if m.rpartition(".")[2] in _HEADS]
    tied = _tied(files.base)
    if heads and tied is not False:
        severity: Severity = "error" if tied else "warning"
        text = f"{some(heads)}: the converter knows no head " + (
            "of its own in this base, which ties it to the embedding"
            if tied
            else "if the base ties it to the embedding (pass the base to be sure)"
        )
        fix = "train without the head, or untie the base"
        yield Finding("tied-head", ("llama.cpp",), severity, text, fix)
    both = heads + sorted(files.embeddings)
    if both and tied:
        text = f"{some(both)}: the base ties embedding and head, so the adapter changes only one"
        fix = "never merge it into the tied weight; export a checkpoint from an untied base"
        yield Finding("tied-head", ("peft",), "warning", text, fix)
    if both:
        text = f"{some(both)}: whether LoRA on head and embedding is served depends on the model"
        yield Finding("head", ("vllm",), "warning", text, "check the model's class in vLLM")
    last = {m: m.rpartition(".")[2] for m in files.modules if m not in both}
    unusual = [m for m, name in last.items() if name not in _SERVED]
    if unusual:
        text = f"{some(unusual)}: not among the usual linear modules of attention and MLP"
        yield Finding("modules", ("vllm",), "warning", text, "check the model's class in vLLM")
    conv = [m for m in files.modules if len(files.a[m].shape) > 2]
    if conv:
        text = f"{some(conv)}: convolutions; both adapt matrices"
        fix = "merge them into the base checkpoint"
        yield Finding("modules", ("vllm", "llama.cpp"), "error", text, fix)


def _tied(base: Mapping[str, Any] | None) -> bool | None:
    """Return whether the base ties its head to its embedding; None if it does not say."""
    if base is None:
        return None
    inner = base.get("text_config")
    for config in (base, inner if isinstance(inner, dict) else {}):
        if isinstance(config.get("tie_word_embeddings"), bool):
            return bool(config["tie_word_embeddings"])
    return None


def _targets(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    targets = config.get("target_modules")
    if not targets and not config.get("target_parameters"):
        text = "target_modules is missing"
        yield Finding("targets", ("vllm", "peft"), "error", text, "list the adapted modules")
        return
    if isinstance(targets, str):
        text = f"target_modules={targets!r} is a pattern, which not every reader resolves alike"
        yield Finding("target-form", EVERY, "warning", text, "list the names of the modules")
    left = [m for m in files.modules if targets and not targeted(config, m)]
    if left:
        text = f"target_modules does not cover {some(left)}: their weights are left out"
        yield Finding("targets", ("peft",), "error", text, "add them to target_modules")


def _base_name(files: AdapterFiles) -> Iterator[Finding]:
    name = files.config.get("base_model_name_or_path")
    if not name:
        text = "base_model_name_or_path is missing: the base must be given by hand"
        fix = "set it in adapter_config.json, or pass --base to the converter"
        yield Finding("base-name", ("llama.cpp", "peft"), "warning", text, fix)
    elif PurePosixPath(str(name)).is_absolute() or PureWindowsPath(str(name)).is_absolute():
        text = f"base_model_name_or_path={name!r} is a path of one machine"
        fix = "write the base's hub name into adapter_config.json"
        yield Finding("base-name", ("llama.cpp", "peft"), "warning", text, fix)


def _config_fields(files: AdapterFiles) -> Iterator[Finding]:
    unknown = sorted(set(files.config) - KNOWN_FIELDS)
    if unknown:
        text = f"unknown fields in the config, with which PEFT before 0.14 fails: {some(unknown)}"
        yield Finding("config-fields", ("peft",), "warning", text, "remove them")


def _size(files: AdapterFiles) -> Iterator[Finding]:
    wide = sum(f.bytes for f in files.tensors.values() if f.dtype in ("F32", "F64"))
    if wide:
        text = f"{wide / 1e6:.1f} MB of float32 or wider: twice what bfloat16 needs"
        fix = "cast the adapter to bfloat16 if it is served in that"
        yield Finding("float32", EVERY, "warning", text, fix)


RULES: tuple[Callable[[AdapterFiles], Iterator[Finding]], ...] = (
    *(_factors, _ranks, _scale, _alpha, _fields, _others, _vllm_rank, _heads, _targets),
    *(_base_name, _config_fields, _size),
)
