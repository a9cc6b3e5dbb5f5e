"""Adapters from folders: loaded into a base model, or read from the mapped files without one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, set_peft_model_state_dict
from torch import Tensor

from .adapters import check_config, check_factors, warn_if_zero
from .errors import AdapterError, ConfigError
from .factors import Adapter, Kind, LoraFactors
from .keeping import Structure
from .patterns import FirstMatch
from .processes import own_device
from .vetting import check_fields, check_folder, check_placed, loading, map_file, read_config

__all__ = [
    "auto_class",
    "check_base",
    "hold_adapters",
    "load_peft_model",
    "load_tokenizer",
    "read_folder",
    "saved_modules",
]

_WEIGHTS = "adapter_model.safetensors"

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_peft_model(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    dtype: torch.dtype = torch.float32,
    bodies: bool = False,
) -> tuple[PeftModel, Any]:
    """Return (model with all adapters loaded, tokenizer or None), on this process's own device.

    Args:
        base: folder of the base model.
        adapters: adapter name -> its folder, at least one.
        dtype: dtype the base is loaded in.
        bodies: leave the adapters' saved modules (their heads) in their folders, and load what can
            be merged: the low-rank factors.

    Raises:
        ConfigError: `base` is no folder of a model.
        AdapterError: a folder holds no safetensors adapter, or the task types differ.
    """
    source = Path(base)
    check_base(source)
    kinds = {name: _task_type(name, Path(folder)) for name, folder in adapters.items()}
    auto = auto_class(kinds)
    with torch.random.fork_rng(devices=[]):  # a head that the base lacks is drawn at random
        torch.default_generator.manual_seed(0)  # the CPU's; torch.manual_seed sets all GPUs' too
        model = auto.from_pretrained(source, dtype=dtype)
    if getattr(model, "quantization_method", None) is None:  # quantised, it is placed and stays
        model = model.to(own_device())
    return hold_adapters(model, adapters, bodies=bodies), load_tokenizer(source)


def hold_adapters(
    model: Any, adapters: Mapping[str, str | Path], *, bodies: bool = False
) -> PeftModel:
    """Return a PeftModel around a base model, in eval mode, with all adapters loaded.

    Args:
        model: the base model, which is wrapped.
        adapters: adapter name -> its folder, at least one.
        bodies: as in `load_peft_model`.

    Raises:
        AdapterError: a folder is no sound adapter (`vetting.check_folder`), or does not fit; the
            base model is as it was.
    """
    for name, folder in adapters.items():
        check_folder(name, folder)
    before = Structure(model)
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        wrapped: PeftModel | None = None
        for name, folder in adapters.items():
            wrapped = _hold(wrapped, model, name, Path(folder), bodies=bodies)
    except BaseException:
        before.put_back()
        for weight, flag in flags:
            weight.requires_grad = flag
        raise
    assert wrapped is not None
    return wrapped.eval()


def _hold(
    wrapped: PeftModel | None, model: Any, name: str, folder: Path, *, bodies: bool
) -> PeftModel:
    """Add one adapter to the model, which the first one wraps."""
    with loading(name):
        if bodies:
            wrapped = _add_body(wrapped or model, name, folder)
        elif wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        else:
            wrapped.load_adapter(str(folder), adapter_name=name)
    check_placed(name, folder, wrapped)
    return wrapped


def auto_class(kinds: Mapping[str, str]) -> Any:
    """Return the class of transformers that a base is loaded with.

    Args:
        kinds: adapter -> its task type.

    Raises:
        AdapterError: they differ, or one is not known.
    """
    if len(set(kinds.values())) != 1:
        raise AdapterError(f"the adapters have different task types: {dict(kinds)}.")
    task_type = next(iter(kinds.values()))
    if task_type not in _CLASSES:
        raise AdapterError(f"task_type {task_type!r} is not known. Allowed: {', '.join(_CLASSES)}.")
    return getattr(transformers, _CLASSES[task_type])


def load_tokenizer(base: str | Path) -> Any:
    """Return the tokenizer in a model's folder, or None if there is none.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    if not any(Path(base).glob("tokenizer*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(base)
    except Exception as exc:  # the tokenizers library raises bare ones
        raise ConfigError(f"the tokenizer in {str(base)!r} cannot be read: {exc}") from exc


def check_base(base: Path) -> None:
    """Refuse what is no folder of a model.

    Raises:
        ConfigError: with what to look for.
    """
    if not (base / "config.json").is_file():
        raise ConfigError(f"the base {str(base)!r} has no config.json: not a model folder.")


def saved_modules(name: str, folder: str | Path) -> list[str]:
    """Return the modules that an adapter saved whole (modules_to_save), such as its head.

    Raises:
        AdapterError: the folder is no safetensors adapter.
    """
    return list(read_config(name, Path(folder)).get("modules_to_save") or [])


def _add_body(model: Any, name: str, folder: Path) -> PeftModel:
    """Add an adapter without its saved modules to a model."""
    config = LoraConfig.from_pretrained(str(folder))
    saved = set(config.modules_to_save or ())
    # PEFT's classes for classification would make heads of their own.
    config.modules_to_save, config.task_type = None, None
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = PeftModel(model, config, adapter_name=name)
    held = map_file(name, folder / _WEIGHTS)
    state = {key: tensor for key, tensor in held.items() if not saved & set(key.split("."))}
    lost = set_peft_model_state_dict(model, state, adapter_name=name)
    if lost.unexpected_keys:
        raise AdapterError(
            f"adapter {name!r}: the base model has no place for {lost.unexpected_keys[0]!r}; it "
            f"was trained on another base model."
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model


def _task_type(name: str, folder: Path) -> str:
    return read_config(name, folder).get("task_type") or "CAUSAL_LM"


# ------------------------------------------------------------------------- without a base model

# Config fields that say where the factors sit, how they are scaled or how they were trained. Any
# other field that is set may change what the adapter does, so it is refused by name.
_HARMLESS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r lora_alpha lora_dropout target_modules exclude_modules fan_in_fan_out use_rslora bias "
    "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size "
    "runtime_config ensure_weight_tying".split()
)
_RANKS, _ALPHAS = ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")
_LINEAR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_WHAT: Mapping[str, str] = MappingProxyType(
    {
        "lora_magnitude_vector": "a DoRA magnitude: DoRA is not scaling * B @ A; make plain LoRA "
        "of it with the base at hand (peft_himerge.densify)",
        "lora_B.bias": "a bias of B (lora_bias=True), which is no low-rank delta; load the "
        "adapters into a model and use merge_adapters",
        "trainable_tokens": "trained token rows, which are not a low-rank delta",
        "token_adapter": "trained token rows, which are not a low-rank delta",
        "modules_to_save": "a full copy of a module, which is not a low-rank delta",
        "base_layer": "a full weight of the base model; save the adapter again with "
        "save_embedding_layers=False if that weight was not trained",
    }
)


def read_folder(name: str, folder: str | Path, *, body: bool = False) -> Adapter:
    """Return the adapter in `folder` as views of its memory-mapped file.

    Source of names and scalings: PEFT's own layout and rules (`get_peft_model_state_dict`;
    `LoraModel._create_and_replace` for rank_pattern and alpha_pattern).

    Args:
        name: what to call it; also in messages.
        folder: holds adapter_config.json and adapter_model.safetensors.
        body: pass over its saved modules, which otherwise are refused.

    Raises:
        AdapterError: the folder is no whole safetensors adapter, is not plain LoRA, contradicts
            its own config, or holds NaN or infinity.
    """
    source = Path(folder)
    config = read_config(name, source)
    tensors = map_file(name, source / _WEIGHTS)
    if body:
        saved = set(config.pop("modules_to_save", None) or ())
        tensors = {key: t for key, t in tensors.items() if not saved & set(key.split("."))}
    check_fields(name, config, max(map(len, tensors), default=0))
    _check_plain(name, config)
    pairs = _pair_up(name, tensors)
    ranks, alphas = (_Values(config, *keys) for keys in (_RANKS, _ALPHAS))
    factors = {
        module: _factors(name, module, *pairs[module], config, ranks.of(module), alphas.of(module))
        for module in sorted(pairs)
    }
    settings = {
        key: config.get(key) for key in ("task_type", "revision", "auto_mapping", "target_modules")
    }
    narrowed = any(config.get(k) for k in ("exclude_modules", "layers_to_transform"))
    settings["whole_names"] = not narrowed
    base = config.get("base_model_name_or_path")
    adapter = Adapter(name, MappingProxyType(factors), base, settings)
    warn_if_zero(adapter)
    return adapter


def _check_plain(name: str, config: Mapping[str, Any]) -> None:
    check_config(name, SimpleNamespace(**{**config, "peft_type": PeftType.LORA}))
    for field, value in config.items():
        if value and field not in _HARMLESS:
            raise AdapterError(
                f"adapter {name!r} sets {field:.80}={value!r:.80}, with which its delta is not "
                f"known to be plain scaling * B @ A. Train without it."
            )


def _pair_up(name: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """Return module -> (A, B, is an embedding), each key accounted for."""
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for key, tensor in tensors.items():
        found = _LINEAR.fullmatch(key) or _EMBEDDING.fullmatch(key)
        if found is None:
            what = next((text for part, text in _WHAT.items() if part in key), None)
            raise AdapterError(
                f"adapter {name!r}: the file holds {key!r:.200}, "
                + (f"{what}." if what else "which is no A or B of a LoRA adapter.")
            )
        if not key.isprintable() or not all(found["module"].split(".")):
            raise AdapterError(f"adapter {name!r}: {key!r:.200} names no module of a model.")
        if found.re is _EMBEDDING:
            embeddings.add(found["module"])
        sides.setdefault(found["module"], {})[found["side"] + ("e" * (found.re is _EMBEDDING))] = (
            tensor
        )
    if not sides:
        raise AdapterError(f"adapter {name!r}: the file holds no factors.")
    wrapped = next((module for module in sides if "base_layer" in module.split(".")), None)
    if wrapped is not None:  # the output projection, which PEFT adapts along
        raise AdapterError(
            f"adapter {name!r}, module {wrapped!r}: nn.MultiheadAttention is not supported; leave "
            f"it out of the adapter and target nn.Linear modules."
        )
    pairs = {}
    for module, pair in sides.items():
        wanted = ("Ae", "Be") if module in embeddings else ("A", "B")
        if sorted(pair) != sorted(wanted):
            raise AdapterError(
                f"adapter {name!r}, module {module!r}: the file holds {sorted(pair)}, expected "
                f"one A and one B."
            )
        pairs[module] = (pair[wanted[0]], pair[wanted[1]], module in embeddings)
    return pairs


class _Values:
    """The rank or alpha of every module, by PEFT's rules."""

    def __init__(self, config: Mapping[str, Any], pattern: str, usual: str) -> None:
        self._table = config.get(pattern) or {}
        self._first = FirstMatch(self._table)
        self._usual = config[usual]

    def of(self, module: str) -> Any:
        key = self._first.find(module)
        return self._usual if key is None else self._table[key]


def _factors(
    name: str,
    module: str,
    a: Tensor,
    b: Tensor,
    embedding: bool,
    config: Mapping[str, Any],
    rank: int,
    alpha: float,
) -> LoraFactors:
    where = f"adapter {name!r}, module {module!r}"
    kernel: tuple[int, ...] = ()
    kind: Kind = "conv1d" if config.get("fan_in_fan_out") else "linear"
    if embedding:
        kind = "embedding"
    if a.ndim != b.ndim or not 2 <= a.ndim <= 5:
        raise AdapterError(f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit.")
    if a.ndim > 2:
        if any(size != 1 for size in b.shape[2:]) or b.shape[1] != a.shape[0]:
            raise AdapterError(
                f"{where}: grouped convolutions are not supported, their delta is no product; "
                f"leave the module out of target_modules."
            )
        kind, kernel = "conv", tuple(a.shape[2:])
        a, b = a.flatten(1), b.flatten(1)
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterError(
            f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} have the ranks {a.shape[0]} and "
            f"{b.shape[1]}, its config says {rank}. The file and the config do not belong together."
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    factors = LoraFactors(a, b, float(scaling), kind, kernel)
    check_factors(where, factors)
    return factors
