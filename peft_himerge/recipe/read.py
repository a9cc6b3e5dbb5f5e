"""Reading a recipe: YAML, changes from the command line, and all checks that need no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, suggest
from ..json_file import parse_json
from ..yaml_file import parse_yaml, read_yaml
from .faults import Fault, RecipeError
from .rules import check_rules
from .schema import Budget, Recipe, Tracking

__all__ = ["read_recipe"]

_KEYS: Mapping[str, list[str]] = {
    "": list(Recipe.model_fields),
    "tracking": list(Tracking.model_fields),
    "budget": list(Budget.model_fields),
}


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
    try:
        data = read_yaml(file)
    except ConfigError as exc:
        raise RecipeError(file, [Fault("", str(exc))]) from exc
    faults = [fault for text in overrides if (fault := _override(data, text)) is not None]
    faults += _shape(data)
    faults += check_rules(data, file)
    if faults:
        raise RecipeError(file, list(dict.fromkeys(faults)))
    recipe = Recipe.model_validate(data)
    recipe._file = file
    return recipe


def _override(data: dict[str, Any], text: str) -> Fault | None:
    key, found, raw = text.partition("=")
    parts = key.split(".")
    if not found or not all(parts):
        return Fault(
            "", f"--set {text!r:.200}: expected KEY=VALUE, e.g. --set options.density=0.5."
        )
    try:
        value = _value(raw)
    except ConfigError:
        return Fault("", f"--set {text!r:.200}: the value is no valid YAML.")
    place = data
    for part in parts[:-1]:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            return Fault("", f"--set {text!r:.200}: {part!r} is {below!r:.80}, which has no keys.")
        place = below
    place[parts[-1]] = value
    return None


def _value(raw: str) -> Any:
    try:
        return parse_json(raw)  # reads 1e-3 as a number, which YAML 1.1 does not
    except ConfigError:
        return parse_yaml(raw)


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
