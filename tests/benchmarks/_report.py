"""One JSON file with all benchmark rows, each with the machine and the versions it ran on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from peft_himerge.result import versions

__all__ = ["RESULTS", "machine", "write_row"]

RESULTS = Path(__file__).with_name("results.json")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores, memory, accelerator, load before."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text(encoding="utf-8").splitlines() if "model name" in x]
        name = models[0].partition(":")[2].strip() if models else name
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "accelerator": accelerator,
        "system": platform.system(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def write_row(
    name: str, values: Mapping[str, Any], *, target: str, reached: bool, path: Path = RESULTS
) -> None:
    """Put one row into the file, in place of an older row of that name.

    Args:
        name: what was measured; the key.
        values: the measured numbers, units in their names (``seconds``, ``peak_gb``).
        target: what was to be reached, in words.
        reached: whether it was.
        path: the file.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows[name] = {
        "target": target,
        "reached": reached,
        "values": dict(values),
        "machine": machine(),
        "versions": versions(),
    }
    beside = path.with_suffix(".tmp")
    text = json.dumps(dict(sorted(rows.items())), indent=2, ensure_ascii=False)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)
