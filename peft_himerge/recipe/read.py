"""Reading a recipe: YAML, changes from the command line, and all checks that need no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import suggest
from .faults import Fault, RecipeError
from .rules import check_rules
from .schema import Budget, Recipe, Tracking

__all__ = ["read_recipe"]

_KEYS: Mapping[str, list[str]] = {
    "": list(Recipe.model_fields),
    "tracking": list(Tracking.model_fields),
    "budget": list(Budget.model_fields),
}


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that is there twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key, (place, _) in zip(keys, node.value, strict=True):
        if keys.count(key) > 1:
            mark = place.start_mark
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is there twice", mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; the files it names are not looked at (`examine` does that).

    Args:
        path: a YAML file.
        overrides: "key=value" with dotted keys, e.g. "options.density=0.5", applied in order;
            values are YAML. "tasks.en.max_rows=null" takes a value back.

    Raises:
        RecipeError: every fault, each with its key, what was got, and what is allowed.
    """
    file = Path(path)
    data = _load(file)
    faults = [fault for text in overrides if (fault := _override(data, text)) is not None]
    faults += _shape(data)
    faults += check_rules(data, file)
    if faults:
        raise RecipeError(file, list(dict.fromkeys(faults)))
    recipe = Recipe.model_validate(data)
    recipe._file = file
    return recipe


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RecipeError(file, [Fault("", "there is no such file.")])
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise RecipeError(file, [Fault("", f"this is no valid YAML: {exc}.")]) from exc
    if not isinstance(data, dict):
        keys = "adapters: {en: adapters/en, zh: adapters/zh}"
        text = f"a recipe is a table of keys such as '{keys}', got {data!r:.80}."
        raise RecipeError(file, [Fault("", text)])
    return data


def _override(data: dict[str, Any], text: str) -> Fault | None:
    key, found, raw = text.partition("=")
    parts = key.split(".")
    if not found or not all(parts):
        return Fault("", f"--set {text!r}: expected KEY=VALUE, e.g. --set options.density=0.5.")
    try:
        value = _value(raw)
    except yaml.YAMLError:
        return Fault("", f"--set {text!r}: the value is no valid YAML.")
    place = data
    for part in parts[:-1]:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            return Fault("", f"--set {text!r}: {part!r} is {below!r:.80}, which has no keys.")
        place = below
    place[parts[-1]] = value
    return None


def _value(raw: str) -> Any:
    try:
        return json.loads(raw)  # reads 1e-3 as a number, which YAML 1.1 does not
    except json.JSONDecodeError:
        return yaml.load(raw, Loader=_Loader)


def _shape(data: Mapping[str, Any]) -> list[Fault]:
    """Return what does not fit the record: unknown and missing keys, wrong types."""
    try:
        Recipe.model_validate(data)
    except ValidationError as exc:
        return [_fault(error) for error in exc.errors()]
    return []


def _fault(error: Any) -> Fault:
    loc = [str(part) for part in error["loc"]]
    if loc[-1] == "[key]":
        text = f"the name {error['input']!r} is no text for YAML; put it in quotes."
        return Fault(".".join(loc[:-2]), text)
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        above = ".".join(loc[:-1])
        return Fault(key, f"there is no such key.{suggest(loc[-1], _KEYS.get(above, ()))}")
    if error["type"] == "missing":
        return Fault(key, "this key is missing.")
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return Fault(key, f"got {error['input']!r}.{suggest(str(error['input']), allowed)}")
    what = error["msg"][0].lower() + error["msg"][1:]
    return Fault(key, f"{what}, got {error['input']!r:.80}.")
