"""Reading a recipe: YAML, changes from the command line, and all checks that need no other file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, suggest
from ..json_file import parse_json
from ..yaml_file import parse_yaml, read_yaml
from .faults import Fault, RecipeError
from .rules import check_rules, sound_parts
from .schema import Budget, Recipe, Tracking

__all__ = ["read_recipe", "read_sound"]

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
    recipe, faults = read_sound(path, overrides)
    if faults or recipe is None:
        raise RecipeError(path, faults)
    return recipe


def read_sound(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe | None, tuple[Fault, ...]]:
    """Read a recipe that may have faults: return its sound parts, and every fault.

    The recipe is the whole one if there is no fault, and otherwise without the keys at fault, to
    look at what the others name; it cannot be run. None if nothing of it can be read.

    Args:
        path: a YAML file.
        overrides: as for `read_recipe`.
    """
    file = Path(path)
    try:
        data = read_yaml(file)
    except ConfigError as exc:
        return None, (Fault("", str(exc)),)
    faults = [fault for text in overrides if (fault := _override(data, text)) is not None]
    shape = [_fault(error) for error in _errors(data)]
    told = tuple(dict.fromkeys([*faults, *shape, *check_rules(data, file)]))
    recipe = _sound(data) if told else Recipe.model_validate(data)
    if recipe is not None:
        recipe._file = file
    return recipe, told


# Stand in for keys that a recipe must have, so that the others can be looked at.
_ANY: dict[str, Any] = {"adapters": {"": "."}, "out": "."}


def _sound(data: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe that is left without what is at fault."""
    rest = sound_parts(copy.deepcopy(dict(data)))
    while errors := _errors(_ANY | rest):
        if not any([_drop(rest, error["loc"]) for error in errors]):
            return None
    found = Recipe.model_validate(_ANY | rest)
    return found.model_copy(update={"adapters": found.adapters if "adapters" in rest else {}})


def _drop(rest: dict[Any, Any], path: Sequence[Any]) -> bool:
    """Take the deepest entry on a path out; return False if there is none."""
    place: Any = rest
    last: tuple[dict[Any, Any], Any] | None = None
    for part in path:
        if not isinstance(place, dict) or part not in place:
            break
        last, place = (place, part), place[part]
    if last is not None:
        del last[0][last[1]]
    return last is not None


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


def _errors(data: Mapping[str, Any]) -> list[Any]:
    """Return what does not fit the record: unknown and missing keys, wrong types."""
    try:
        Recipe.model_validate(data)
    except ValidationError as exc:
        return list(exc.errors())
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
