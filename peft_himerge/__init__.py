"""Merge several LoRA adapters into one by Hi-Merging, inside the training script."""

from importlib import import_module as _import_module
from types import MappingProxyType as _MappingProxyType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from .callback import HiMergeCallback as HiMergeCallback
    from .config import HiMergeConfig as HiMergeConfig
    from .densify import densify as densify
    from .errors import HiMergeError as HiMergeError
    from .focus import focus_adapters as focus_adapters
    from .hi import apply_plan as apply_plan
    from .hi import merge_adapters_hi as merge_adapters_hi
    from .hi import score_plans as score_plans
    from .merging import list_methods as list_methods
    from .merging import merge_adapters as merge_adapters
    from .offline import merge_folders as merge_folders
    from .plan import Edit as Edit
    from .plan import MergePlan as MergePlan
    from .result import MergeResult as MergeResult
    from .weighted import add_weighted_adapter as add_weighted_adapter

__version__ = "0.1.0"

__all__ = [
    "Edit",
    "HiMergeCallback",
    "HiMergeConfig",
    "HiMergeError",
    "MergePlan",
    "MergeResult",
    "add_weighted_adapter",
    "apply_plan",
    "densify",
    "focus_adapters",
    "list_methods",
    "merge_adapters",
    "merge_adapters_hi",
    "merge_folders",
    "score_plans",
]


# Name -> the module it lives in. Each is imported when it is first asked for: the callback needs
# transformers' Trainer, merging needs torch and PEFT, and a page of a report or `--help` neither.
_HOMES = _MappingProxyType(
    {
        "Edit": "plan",
        "HiMergeCallback": "callback",
        "HiMergeConfig": "config",
        "HiMergeError": "errors",
        "MergePlan": "plan",
        "MergeResult": "result",
        "add_weighted_adapter": "weighted",
        "apply_plan": "hi",
        "densify": "densify",
        "focus_adapters": "focus",
        "list_methods": "merging",
        "merge_adapters": "merging",
        "merge_adapters_hi": "hi",
        "merge_folders": "offline",
        "score_plans": "hi",
    }
)


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
