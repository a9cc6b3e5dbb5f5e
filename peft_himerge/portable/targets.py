"""Which modules a config means, and the scale each engine gives them: PEFT's rules and the others'.

Sources: PEFT 0.21 `check_target_module_exists` and `get_pattern_key`; vLLM's `PEFTHelper` (global r
and lora_alpha, no patterns); llama.cpp's LoRA converter and `llama_adapter_lora_weight::get_scale`
(lora_alpha over the rank of the tensor; neither patterns nor rsLoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .finding import Engine
from .folder import AdapterFiles

__all__ = ["rank_in_config", "scale_of", "targeted"]


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Return True if PEFT would put an adapter on the module."""
    if _listed(config.get("exclude_modules"), module):
        return False
    targets: Any = config.get("target_modules")
    if targets == "all-linear":
        return not re.search(r"(^|\.)(lm_head|embed_tokens|wte|embed_out)$", module)
    if not _listed(targets, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    index = _layer(module, config.get("layers_pattern"))
    return index in ([layers] if isinstance(layers, int) else layers)


def _listed(names: Any, module: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(module: str, patterns: str | list[str] | None) -> int | None:
    names = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for name in names:
        found = re.match(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", module)
        if found:
            return int(found["index"])
    return None


def _by_pattern(files: AdapterFiles, field: str, module: str, usual: float) -> float:
    key = files.first_match(field, module)
    return usual if key is None else float(files.config[field][key])


def scale_of(files: AdapterFiles, module: str, engine: Engine) -> float:
    """Return the factor on B @ A that an engine uses for a module."""
    config = files.config
    alpha, rank = float(config["lora_alpha"]), float(config["r"])
    if engine == "llama.cpp":
        return alpha / files.rank(module)
    if engine == "peft":
        alpha = _by_pattern(files, "alpha_pattern", module, alpha)
        rank = _by_pattern(files, "rank_pattern", module, rank)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rank_in_config(files: AdapterFiles, module: str) -> float:
    """Return the rank that PEFT expects of a module's tensors."""
    usual = float(files.config["r"])
    return _by_pattern(files, "rank_pattern", module, usual)
