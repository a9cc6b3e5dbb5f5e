"""What a rule found, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ENGINES", "EVERY", "Engine", "Finding", "Severity", "some"]

Engine = Literal["vllm", "llama.cpp", "peft"]
Severity = Literal["error", "warning"]
ENGINES: tuple[Engine, ...] = ("vllm", "llama.cpp", "peft")
EVERY = ENGINES
_SHOWN = 3  # names in a text before "and N more"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an engine refuses, reads otherwise than PEFT, or pays for.

    Attributes:
        rule: id of the rule, for scripts.
        engines: which engines it concerns.
        severity: "error": refused, or another model without a word; "warning": works, with a cost
            or under a condition.
        found: what is there and what the engine does with it.
        fix: what to do about it.
    """

    rule: str
    engines: tuple[Engine, ...]
    severity: Severity
    found: str
    fix: str


def some(names: list[str]) -> str:
    """Return the first names in quotes, and how many more there are."""
    text = ", ".join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{text} and {more} more" if more > 0 else text
