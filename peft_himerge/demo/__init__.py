"""What `himerge demo` merges: a real base model, two tasks and two trained adapters."""

from __future__ import annotations

from pathlib import Path

from peft_himerge.demo.base import load_base
from peft_himerge.demo.questions import Splits, load_tasks
from peft_himerge.demo.train import train

__all__ = ["Splits", "adapter_dirs", "load_base", "load_tasks", "train"]


def adapter_dirs() -> dict[str, Path]:
    """Return the folders of the trained adapters that ship with the package, by task."""
    folder = Path(__file__).parent / "adapters"
    return {task: folder / task for task in ("en", "zh")}
