"""Merge several LoRA adapters into one by Hi-Merging, inside the training script."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .config import HiMergeConfig as HiMergeConfig
from .densify import densify as densify
from .errors import HiMergeError as HiMergeError
from .hi import apply_plan as apply_plan
from .hi import merge_adapters_hi as merge_adapters_hi
from .hi import score_plans as score_plans
from .merging import merge_adapters as merge_adapters
from .methods.registry import list_methods as list_methods
from .offline import merge_folders as merge_folders
from .plan import Edit as Edit
from .plan import MergePlan as MergePlan
from .result import MergeResult as MergeResult
from .weighted import add_weighted_adapter as add_weighted_adapter

if _TYPE_CHECKING:
    from .callback import HiMergeCallback as HiMergeCallback

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
    "list_methods",
    "merge_adapters",
    "merge_adapters_hi",
    "merge_folders",
    "score_plans",
]


def __getattr__(name: str) -> _Any:
    # The callback imports transformers' Trainer, which takes seconds; most users never need it.
    if name == "HiMergeCallback":
        from .callback import HiMergeCallback

        return HiMergeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
