"""Option values of methods: what is allowed, said in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigError, suggest

__all__ = ["choice", "flag", "fraction", "number", "whole"]


def number(name: str, value: object, *, least: float = -math.inf, most: float = math.inf) -> float:
    """Return `value` as a finite float in [least, most].

    Raises:
        ConfigError: it is something else.
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(float(value)) or not least <= float(value) <= most:  # type: ignore[arg-type]
        bounds = "" if least == -math.inf and most == math.inf else f" in [{least:g}, {most:g}]"
        raise ConfigError(f"{name} must be a finite number{bounds}, got {value!r}.")
    return float(value)  # type: ignore[arg-type]


def fraction(name: str, value: object) -> float:
    """Return `value` as a share in [0, 1]; see `number`."""
    return number(name, value, least=0.0, most=1.0)


def whole(name: str, value: object, *, least: int = 0) -> int:
    """Return `value` as a whole number >= least.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}.")
    return value


def flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")
    return value


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not one of `allowed`.

    Raises:
        ConfigError: with the nearest allowed value.
    """
    if value not in allowed:
        texts = [repr(a) for a in allowed]
        raise ConfigError(f"{name} got {value!r}.{suggest(repr(value), texts)}")
