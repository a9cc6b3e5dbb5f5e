"""An adapter folder as facts: its config, and names, dtypes and shapes from the file's header."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from ..json_file import check_header, read_object
from ..patterns import FirstMatch, pattern_fault
from .finding import EVERY, Finding

__all__ = ["CONFIG", "WEIGHTS", "AdapterFiles", "Factor", "read_folder"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_LINEAR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, slots=True)
class Factor:
    """Header of one tensor: key in the file, dtype in safetensors' code, shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """What a folder says about its adapter.

    Attributes:
        config: adapter_config.json.
        tensors: key -> its header.
        a: module path -> header of A (rank, in, ...).
        b: module path -> header of B (out, rank, ...).
        embeddings: modules whose factors have the form for embeddings.
        others: keys that are neither A nor B.
        base: config.json of the base model, if it was given.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Factor]
    a: Mapping[str, Factor]
    b: Mapping[str, Factor]
    embeddings: frozenset[str]
    others: tuple[str, ...]
    base: Mapping[str, Any] | None
    _first: dict[str, FirstMatch] = dataclasses.field(default_factory=dict)

    def first_match(self, table: str, module: str) -> str | None:
        """Return the first key of a pattern table of the config that matches a module, or None."""
        if table not in self._first:
            self._first[table] = FirstMatch(self.config.get(table) or {})
        return self._first[table].find(module)

    @property
    def modules(self) -> list[str]:
        """Modules with both factors, sorted."""
        return sorted(set(self.a) & set(self.b))

    def rank(self, module: str) -> int:
        """Return the rank of a module, from its tensor."""
        return self.a[module].shape[0]

    @property
    def ranks(self) -> list[int]:
        """The different ranks, sorted."""
        return sorted({self.rank(m) for m in self.modules})


def read_folder(
    folder: Path, base: Mapping[str, Any] | None
) -> tuple[AdapterFiles | None, tuple[Finding, ...]]:
    """Return what the folder holds; without a whole adapter, None and why.

    Args:
        folder: an existing folder.
        base: config of the base model.
    """
    found = tuple(_layout(folder))
    if found:
        return None, found
    try:
        config = read_object(folder / CONFIG)
    except ConfigError as exc:
        return None, (Finding("config", EVERY, "error", str(exc), "save the adapter again"),)
    try:
        tensors = _headers(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as exc:
        text = f"{WEIGHTS} is damaged or no safetensors file ({exc})"
        return None, (Finding("weights", EVERY, "error", text, "copy or save it again"),)
    fault = _fault(config, max(map(len, tensors), default=0))
    if fault:
        fix = "save the adapter again with PEFT"
        return None, (Finding("config", EVERY, "error", f"{CONFIG}: {fault}", fix),)
    return _sorted_out(config, tensors, base), ()


def _layout(folder: Path) -> Iterator[Finding]:
    if not (folder / CONFIG).is_file():
        inside = sorted(p.parent.relative_to(folder).as_posix() for p in folder.glob(f"*/{CONFIG}"))
        if inside:
            text = f"no {CONFIG} at the top; PEFT saved it in the sub-folder {', '.join(inside)}"
            fix = f"pass {(folder / inside[0]).as_posix()!r}, or move its files up"
        else:
            text, fix = f"no {CONFIG}", "save the adapter with save_pretrained()"
        yield Finding("layout", EVERY, "error", text, fix)
        return
    if not (folder / WEIGHTS).is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        text = f"no {WEIGHTS}" + (f", only the pickle file {pickles[0]}" if pickles else "")
        yield Finding("layout", EVERY, "error", text, "save with safe_serialization=True")


def _headers(path: Path) -> dict[str, Factor]:
    tensors = {}
    with safe_open(path, "np") as opened:
        check_header(path)
        for key in opened.keys():
            head = opened.get_slice(key)
            tensors[key] = Factor(key, head.get_dtype(), tuple(head.get_shape()))
    return tensors


def _fault(config: Mapping[str, Any], longest: int) -> str | None:
    """Return what makes a config unreadable, so that no rule has to ask again."""
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r}, other engines read LORA only"
    for field in ("r", "lora_alpha"):
        if not _number(config.get(field)):
            return f"{field} must be a number, got {config.get(field)!r}"
    if config["r"] < 1:
        return f"r must be at least 1, got {config['r']!r}"
    for field in ("rank_pattern", "alpha_pattern"):
        values = config.get(field) or {}
        if not isinstance(values, dict):
            return f"{field} must be a table, got {values!r}"
        for key, value in values.items():
            if not _number(value) or value <= 0:
                return f"{field} of {key!r} must be a number > 0, got {value!r}"
            if fault := pattern_fault(key, longest):
                return f"{field} has the key {key!r:.80}, which {fault}"
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(field) or []
        many = [names] if isinstance(names, str) else names
        if not isinstance(many, list) or not all(isinstance(name, str) for name in many):
            return f"{field} must be a list of names or a pattern, got {names!r}"
        if field != "layers_pattern" and isinstance(names, list):
            many = []  # plain names
        for pattern in many:
            if fault := pattern_fault(pattern, longest):
                return f"{field}={names!r:.80} {fault}"
    layers = config.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
            return f"layers_to_transform must hold whole numbers, got {layers!r}"
    return None


def _number(value: Any) -> bool:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    return right and abs(value) < 1e30  # false for NaN; an int may be too large for a float


def _sorted_out(
    config: Mapping[str, Any], tensors: Mapping[str, Factor], base: Mapping[str, Any] | None
) -> AdapterFiles:
    a: dict[str, Factor] = {}
    b: dict[str, Factor] = {}
    embeddings, others = set(), []
    for key in sorted(tensors):
        found = _LINEAR.fullmatch(key) or _EMBEDDING.fullmatch(key)
        if found is None or len(tensors[key].shape) < 2:
            others.append(key)
            continue
        (a if found["side"] == "A" else b)[found["module"]] = tensors[key]
        if found.re is _EMBEDDING:
            embeddings.add(found["module"])
    return AdapterFiles(config, tensors, a, b, frozenset(embeddings), tuple(others), base)
