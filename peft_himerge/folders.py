"""A base model and adapters from folders, ready to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from .errors import AdapterError, ConfigError

__all__ = ["load_peft_model"]

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_peft_model(
    base: str | Path, adapters: Mapping[str, str | Path], *, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, Any]:
    """Return (model with all adapters loaded, tokenizer or None).

    Args:
        base: folder of the base model.
        adapters: adapter name -> its folder, at least one.
        dtype: dtype the base is loaded in.

    Raises:
        ConfigError: `base` is no folder of a model.
        AdapterError: a folder holds no safetensors adapter, or the task types differ.
    """
    source = Path(base)
    if not (source / "config.json").is_file():
        raise ConfigError(f"--base {str(base)!r} has no config.json: not a model folder.")
    kinds = {name: _task_type(name, Path(folder)) for name, folder in adapters.items()}
    if len(set(kinds.values())) != 1:
        raise AdapterError(f"the adapters have different task types: {kinds}.")
    task_type = next(iter(kinds.values()))
    if task_type not in _CLASSES:
        raise AdapterError(f"task_type {task_type!r} is not known. Allowed: {', '.join(_CLASSES)}.")
    model = getattr(transformers, _CLASSES[task_type]).from_pretrained(source, dtype=dtype)
    wrapped: PeftModel | None = None
    for name, folder in adapters.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        else:
            wrapped.load_adapter(str(folder), adapter_name=name)
    assert wrapped is not None
    has_tokenizer = any(source.glob("tokenizer*"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source) if has_tokenizer else None
    return wrapped.eval(), tokenizer


def _task_type(name: str, folder: Path) -> str:
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise AdapterError(f"adapter {name!r}: {str(folder)!r} has no adapter_config.json.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"adapter {name!r}: {str(folder)!r} has no adapter_model.safetensors. Pickle files "
            f"are refused because loading one runs code: convert it with save_pretrained()."
        )
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise AdapterError(f"adapter {name!r}: {str(config)!r} is not valid JSON: {exc}.") from exc
    return fields.get("task_type") or "CAUSAL_LM"
