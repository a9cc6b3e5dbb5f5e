"""What is wrong with a recipe: every fault at once, each with its place and its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["Fault", "RecipeError"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        key: dotted path in the recipe, e.g. "tasks.en.kind"; "" for the file as a whole.
        what: what is wrong, what was got, what is allowed, how to mend it.
    """

    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" if self.key else self.what


class RecipeError(ConfigError):
    """A recipe cannot be run; `faults` has every reason.

    Attributes:
        file: the recipe.
        faults: all that is wrong with it, at least one.
    """

    def __init__(self, file: str | Path, faults: Sequence[Fault]) -> None:
        self.file, self.faults = Path(file), tuple(faults)
        lines = "".join(f"\n  {fault}" for fault in self.faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{str(file)!r}, {count}:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.faults)
