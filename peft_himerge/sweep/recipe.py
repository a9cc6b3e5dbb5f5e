"""The sweep file: W&B's format, read, checked, and turned into options of a merge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import HiMergeConfig
from ..errors import ConfigError, suggest
from ..yaml_file import read_yaml

__all__ = ["METRIC", "PREFIX", "Parameter", "Sweep", "read_sweep"]

METRIC = "himerge/best_score"
PREFIX = "himerge."
_PLACES = ("base", "adapters", "recipe")
_PER_ADAPTER = ("density", "scale")
_METHODS = ("bayes", "random", "grid")
_KEYS = (
    *("name", "description", "project", "entity", "program", "command", "method", "metric"),
    *("parameters", "early_terminate", "run_cap"),
)
_DISTRIBUTIONS = {
    "uniform": (float, False),
    "q_uniform": (float, False),
    "int_uniform": (int, False),
    "log_uniform_values": (float, True),
    "q_log_uniform_values": (float, True),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option that is varied: a list of values, or a range.

    Attributes:
        values: what it may be; () for a range.
        low: smallest value of a range.
        high: largest value of a range.
        step: distance of the values of a range; None is any.
        log: True if the range is searched by order of magnitude.
        whole: True if the values are whole numbers.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
        method: "bayes" (TPE locally), "random" or "grid".
        space: option -> what it may be.
        fixed: option -> its one value.
        base: folder of the base model, or None if the file names none.
        adapters: name -> folder.
        recipe: a recipe that says base, adapters, tasks and further options, or None.
        trials: `run_cap`, or None.
    """

    method: str
    space: Mapping[str, Parameter]
    fixed: Mapping[str, Any]
    base: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    recipe: Path | None = None
    trials: int | None = None

    def within(self, options: Mapping[str, Any]) -> Sweep:
        """Return the sweep with further fixed options; what it says itself goes first."""
        own = {name.partition(".")[0] for name in (*self.fixed, *self.space)}
        further = {name: value for name, value in options.items() if name not in own}
        return replace(self, fixed={**further, **self.fixed})

    def config(self, values: Mapping[str, Any]) -> HiMergeConfig:
        """Return the options of one trial; `values` has the names of `space`."""
        options: dict[str, Any] = {}
        for name, value in {**self.fixed, **values}.items():
            option, _, adapter = name.partition(".")
            if adapter:
                options.setdefault(option, {})[adapter] = value
            else:
                options[option] = value
        return HiMergeConfig(**options)

    @property
    def digest(self) -> str:
        """Digest of what a study rests on: the space and the fixed options."""
        facts = [sorted((k, repr(v)) for k, v in t.items()) for t in (self.space, self.fixed)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: the file is not there or no sweep of ours; the text names every fault.
    """
    file = Path(path)
    try:
        data = read_yaml(file)
    except ConfigError as exc:
        raise ConfigError(f"{str(path)!r}: {exc}") from exc
    faults = _faults(data)
    space: dict[str, Parameter] = {}
    fixed: dict[str, Any] = {}
    entries = data.get("parameters")
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            _take(str(key), entry, space, fixed)
        except ConfigError as exc:
            faults.append(str(exc))
    if faults:
        raise ConfigError(f"{str(path)!r}: " + " ".join(faults))
    places = {name: fixed.pop(name, None) for name in _PLACES}
    sweep = Sweep(
        method=data["method"],
        space=space,
        fixed=fixed,
        base=_beside(file, places["base"]),
        adapters={n: _beside(file, f) for n, f in (places["adapters"] or {}).items()},
        recipe=_beside(file, places["recipe"]),
        trials=data.get("run_cap"),
    )
    sweep.config({name: _example(entry) for name, entry in space.items()})
    return sweep


def _beside(file: Path, place: str | None) -> Any:
    """Return a path of the file, read from the file's own folder; None stays None."""
    return None if place is None else file.parent / place


def _faults(data: Mapping[str, Any]) -> list[str]:
    faults = [f"unknown key {key!r}.{suggest(str(key), _KEYS)}" for key in data if key not in _KEYS]
    if data.get("method") not in _METHODS:
        faults.append(f"method got {data.get('method')!r}. Allowed: {', '.join(_METHODS)}.")
    if data.get("metric") != {"name": METRIC, "goal": "maximize"}:
        faults.append(f"metric must be {{name: {METRIC}, goal: maximize}}.")
    if not isinstance(data.get("parameters"), dict) or not data["parameters"]:
        faults.append("parameters is empty: name the options to vary, e.g. himerge.density.")
    cap = data.get("run_cap", 1)
    if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
        faults.append(f"run_cap must be a whole number >= 1, got {cap!r}.")
    return faults


def _take(key: str, entry: Any, space: dict[str, Parameter], fixed: dict[str, Any]) -> None:
    """Sort one entry of `parameters` into what is varied and what is fixed."""
    name = key.removeprefix(PREFIX)
    option, _, adapter = name.partition(".")
    known = (*HiMergeConfig.model_fields, *_PLACES)
    if option == "eval":
        raise ConfigError(
            f"{key!r}: a file cannot name code to run. Name it on the command line, "
            f"--eval my_evals.py, or name a recipe, {PREFIX}recipe."
        )
    if name == key:
        raise ConfigError(f"parameter {key!r} must be named {PREFIX + key!r}.")
    if option not in known or (adapter and option not in _PER_ADAPTER):
        raise ConfigError(f"unknown option in {key!r}.{suggest(option, known)}")
    if not isinstance(entry, dict):
        raise ConfigError(f"{key} must hold value, values, or min and max, got {entry!r}.")
    if "value" in entry:
        fixed[name] = entry["value"]
    elif option in _PLACES:
        raise ConfigError(f"{key} cannot be varied: give it as value.")
    else:
        space[name] = _parameter(key, entry)


def _parameter(key: str, entry: Mapping[str, Any]) -> Parameter:
    if "values" in entry:
        values = entry["values"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{key}: values must be a list that is not empty, got {values!r}.")
        return Parameter(values=tuple(values))
    low, high = entry.get("min"), entry.get("max")
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high))
    if not numbers or low is None or high is None or not low <= high:
        raise ConfigError(f"{key} needs value, values, or min <= max, got {dict(entry)!r}.")
    ints = isinstance(low, int) and isinstance(high, int)
    kind = entry.get("distribution", "int_uniform" if ints else "uniform")
    if kind not in _DISTRIBUTIONS:
        raise ConfigError(f"{key}: distribution got {kind!r}.{suggest(str(kind), _DISTRIBUTIONS)}")
    number, log = _DISTRIBUTIONS[kind]
    step = float(entry.get("q", 1.0)) if kind.startswith("q_") else None
    return Parameter((), low, high, None if log else step, log, number is int)


def _example(parameter: Parameter) -> Any:
    if parameter.values:
        return parameter.values[0]
    return int(parameter.low) if parameter.whole else float(parameter.low)
