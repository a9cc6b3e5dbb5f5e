"""The exception tree.

Everything the library raises on purpose derives from `HiMergeError`; leaves also derive from the
builtin a caller would expect, so `except ValueError` keeps working.

    HiMergeError
    ├── ConfigError        (ValueError)   an option or argument has a value that is not allowed
    ├── PlanError          (ValueError)   a plan is malformed or does not fit the adapters
    ├── AdapterError       (ValueError)   an adapter cannot be merged; the text says which and why
    ├── EvalError          (RuntimeError) an eval function returned something that is not a score
    ├── ExportError        (RuntimeError) the exported adapter is not as good as the merged state
    ├── BudgetError        (RuntimeError) a merge took longer than it was allowed to
    ├── JournalError       (OSError)      the journal of scores is in use, or cannot be written
    ├── OutputError        (OSError)      a folder is being written by another, or cannot be written
    ├── ProcessError       (RuntimeError) another process of the same merge failed or is missing
    └── MissingExtraError  (ImportError)  an optional package is needed and not installed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import MergePlan

__all__ = [
    "AdapterError",
    "BudgetError",
    "ConfigError",
    "EvalError",
    "ExportError",
    "HiMergeError",
    "JournalError",
    "MissingExtraError",
    "OutputError",
    "PlanError",
    "ProcessError",
    "suggest",
]


class HiMergeError(Exception):
    """Root of every error that peft_himerge raises on purpose."""


class ConfigError(HiMergeError, ValueError):
    """An option or argument has a value that is not allowed."""


class PlanError(HiMergeError, ValueError):
    """A merge plan is malformed, or does not fit the adapters it is applied to."""


class AdapterError(HiMergeError, ValueError):
    """An adapter cannot be merged exactly; the text names the adapter, the module and the fix."""


class EvalError(HiMergeError, RuntimeError):
    """An eval function returned something that is not a score."""


class ExportError(HiMergeError, RuntimeError):
    """The exported adapter lost more than the allowed share of what the merge had won.

    Attributes:
        plan: the `MergePlan` that was to be exported, so that nothing of the search is lost; None
            if there is none.
    """

    def __init__(self, message: str, plan: MergePlan | None = None) -> None:
        super().__init__(message)
        self.plan = plan


class BudgetError(HiMergeError, RuntimeError):
    """A merge took longer than it was allowed to; its journal keeps what is known."""


class JournalError(HiMergeError, OSError):
    """The journal of scores is in use by another merge, or cannot be read or written."""


class OutputError(HiMergeError, OSError):
    """A folder to write to is in use by another process, or cannot be written."""


class ProcessError(HiMergeError, RuntimeError):
    """Another process of the same merge failed, holds other weights, or never took part."""


class MissingExtraError(HiMergeError, ImportError):
    """An optional package is needed for this call and is not installed."""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Return the tail of an error text: what is allowed and, if one is close, what was meant.

    Args:
        got: the name that was not recognised.
        allowed: the names that are.

    Returns:
        For example ``" Did you mean 'scale'? Allowed: density, scale."``.
    """
    names = list(allowed)
    near = get_close_matches(got, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Allowed: {', '.join(names)}."
