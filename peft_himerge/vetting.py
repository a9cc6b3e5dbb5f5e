"""Adapter folders of strangers: looked at to the last byte before anything else reads them.

PEFT believes what a folder says: it imports the module that `megatron_core` names, changes the
base's weights for some values of `init_lora_weights`, and asks the hub or unpickles a file where
the safetensors file is missing. So nothing is handed to it that was not vetted here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapters import check_config, check_values, plain_factors
from .errors import AdapterError, ConfigError, HiMergeError
from .json_file import check_header, read_object
from .names import check_name
from .patterns import pattern_fault

__all__ = ["check_fields", "check_folder", "check_placed", "loading", "map_file", "read_config"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?[AB](\.weight)?")
_KNOWN = frozenset(field.name for field in dataclasses.fields(LoraConfig))
# What adapters of a live model may be, by the policy of the merge; it is refused there or carried.
_LATER = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config"),
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_factor(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= 1e30 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_layers(value: Any) -> bool:
    many = value if isinstance(value, list) else [] if value is None else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) for v in many)


def _is_tokens(value: Any) -> bool:
    return all(map(_is_layers, value.values() if isinstance(value, dict) else [value]))


def _is_pairs(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(v, list) and len(v) == 2 and _is_layers(v) for v in value)
    )


def _is_texts(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    )


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


_FLAG = (_is_flag, "true or false")
_LIST = (lambda v: _is_names(v) and not isinstance(v, str), "a list of names")
_NAMES = (_is_names, "a list of names or a pattern")
_TEXT = (_is_text, "a text")
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "r": (_is_count, "a number > 0, whole"),
        "lora_alpha": (_is_factor, "a number > 0"),
        "lora_dropout": (lambda v: v in (None, 0) or (_is_factor(v) and v <= 1), "from 0 to 1"),
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
        **dict.fromkeys(("modules_to_save", "target_parameters"), _LIST),
        "layers_to_transform": (_is_layers, "whole numbers"),
        **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), _TEXT),
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), _FLAG),
        "inference_mode": _FLAG,
        "init_lora_weights": (lambda v: _is_flag(v) or isinstance(v, str), "true, false or a name"),
        "bias": (_is_text, "'none'"),
        "auto_mapping": (_is_texts, "a table of texts"),
        "alora_invocation_tokens": (_is_layers, "a list of whole numbers"),
        "trainable_token_indices": (_is_tokens, "whole numbers, or a table of such"),
        "layer_replication": (_is_pairs, "a list of pairs of whole numbers"),
    }
)


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the config of an adapter folder, as it is.

    Raises:
        AdapterError: the folder holds no config and safetensors file, or the config is no object
            of JSON.
        ConfigError: the name is none that an adapter can have.
    """
    check_name(name, "the name of an adapter")
    if not (folder / _CONFIG).is_file():
        raise AdapterError(f"adapter {name!r}: {str(folder)!r} has no {_CONFIG}.")
    if not (folder / _WEIGHTS).is_file():
        raise AdapterError(
            f"adapter {name!r}: {str(folder)!r} has no {_WEIGHTS}. Pickle files are refused "
            f"because loading one runs code: convert it with save_pretrained()."
        )
    try:
        return read_object(folder / _CONFIG)
    except ConfigError as exc:
        raise AdapterError(f"adapter {name!r}: {exc}") from exc


def check_fields(name: str, config: Mapping[str, Any], longest: int = 128) -> None:
    """Refuse a config whose values are not of their types, or whose patterns might never end.

    Args:
        name: the adapter's name, for messages.
        config: from `read_config`.
        longest: length of the longest module path that patterns are matched with.

    Raises:
        AdapterError: names the field, what it holds and what is allowed.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in set(PeftType):
        raise AdapterError(
            f"adapter {name!r} has the peft_type {kind!r:.80}, only LORA can be merged."
        )
    check_config(name, SimpleNamespace(peft_type=PeftType(kind)))
    for field, (fits, allowed) in _TYPES.items():
        if (field in config or field in ("r", "lora_alpha")) and not fits(config.get(field)):
            raise AdapterError(
                f"adapter {name!r}: {field} must be {allowed}, got {config.get(field)!r:.80}. Save "
                f"the adapter again with PEFT."
            )
    patterns: list[tuple[str, str]] = []
    for field, fits in (("rank_pattern", _is_count), ("alpha_pattern", _is_factor)):
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise AdapterError(f"adapter {name!r}: {field} must be a table, got {table!r:.80}.")
        for key, value in table.items():
            if not fits(value):
                raise AdapterError(
                    f"adapter {name!r}: {field} of {key!r:.80} must be a number > 0, got "
                    f"{value!r:.80}."
                )
            patterns.append((field, key))
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            patterns.append((field, config[field]))
    layers = config.get("layers_pattern") or []
    patterns += [("layers_pattern", p) for p in ([layers] if isinstance(layers, str) else layers)]
    for field, pattern in patterns:
        if fault := pattern_fault(pattern, longest):
            raise AdapterError(f"adapter {name!r}: {field} {pattern!r:.80} {fault}.")


def map_file(name: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, as views of the mapped file.

    Raises:
        AdapterError: the file is damaged, or holds tensors of a type that torch does not have.
    """
    try:
        with safe_open(path, "pt") as opened:  # which bounds the header
            check_header(path)
            return {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as exc:
        raise AdapterError(
            f"adapter {name!r}: {str(path)!r} is damaged or no safetensors file ({exc}). Copy or "
            f"save it again."
        ) from exc


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Tell in one line why PEFT could not load an adapter that was vetted.

    Raises:
        AdapterError: in place of what PEFT raises.
    """
    try:
        yield
    except HiMergeError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, LookupError) as exc:
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        raise AdapterError(
            f"adapter {name!r} does not fit the base model: {' '.join(lines[:2])[:500]}"
        ) from exc


def check_placed(name: str, folder: str | Path, model: PeftModel) -> None:
    """Refuse an adapter in a model that lacks some of the modules its folder has factors for.

    PEFT passes over weights that it finds no place for.

    Raises:
        AdapterError: names the first such module.
    """
    if model.peft_config[name].target_parameters:  # their names are those of parameters
        return
    placed = plain_factors(model, name)
    with safe_open(Path(folder) / _WEIGHTS, "pt") as opened:
        found = [_FACTOR.fullmatch(key) for key in opened.keys()]
    for module in sorted(match["module"] for match in found if match is not None):
        if module not in placed:
            raise AdapterError(
                f"adapter {name!r}: the base model has no place for its module {module!r:.200}; it "
                f"was trained on another base model, or the file is damaged."
            )


def check_folder(name: str, folder: str | Path) -> None:
    """Refuse a folder that PEFT should not be given: no whole, sound LoRA adapter in safetensors.

    Raises:
        AdapterError: a file is missing, damaged or too large; the config names code to import,
            another type of adapter, a start that changes the base, or fields that the installed
            PEFT does not know; or a tensor holds NaN or infinity.
    """
    source = Path(folder)
    config = read_config(name, source)
    check_fields(name, config)
    check_config(name, SimpleNamespace(**{**config, "peft_type": PeftType.LORA}), _LATER)
    if config.get("megatron_config"):
        raise AdapterError(
            f"adapter {name!r} sets megatron_config, with which PEFT imports the Python module "
            f"{config.get('megatron_core')!r:.80}. Save it without; nothing is run for a folder."
        )
    for field, value in config.items():
        if value and field not in _KNOWN:
            raise AdapterError(
                f"adapter {name!r} sets {field:.80}={value!r:.80}, which the installed PEFT does "
                f"not know and would pass over: upgrade peft, or train without it."
            )
    for key, tensor in map_file(name, source / _WEIGHTS).items():
        module, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        if module:
            where = f"adapter {name!r}, module {module!r:.200}"
            check_values(where, **{f"lora_{factor:.80}": tensor})
        elif tensor.is_floating_point():
            check_values(f"adapter {name!r}", **{f"{key:.200}": tensor})
