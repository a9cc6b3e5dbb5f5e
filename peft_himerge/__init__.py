"""Merge several LoRA adapters into one by Hi-Merging, inside the training script."""

from .config import HiMergeConfig as HiMergeConfig
from .errors import HiMergeError as HiMergeError
from .hi import apply_plan as apply_plan
from .hi import merge_adapters_hi as merge_adapters_hi
from .plan import Edit as Edit
from .plan import MergePlan as MergePlan
from .result import MergeResult as MergeResult

__version__ = "0.1.0"

__all__ = [
    "Edit",
    "HiMergeConfig",
    "HiMergeError",
    "MergePlan",
    "MergeResult",
    "apply_plan",
    "merge_adapters_hi",
]
