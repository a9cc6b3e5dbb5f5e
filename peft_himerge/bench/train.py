"""Adapters for a benchmark: one per task, and one on the mixed data of several."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..demo.base import load_base
from ..demo.loop import Answers, TrainSettings, copy_model, train_adapter
from ..errors import ConfigError
from ..files import write_text
from ..result import versions

__all__ = ["SETTINGS", "train_tasks"]

SETTINGS = TrainSettings(steps=100, batch_size=16, learning_rate=3e-4, rank=8, alpha=16)
"""One pass over the first 1600 rows of a task; a mix of n tasks takes n times the steps."""


def train_tasks(
    base: str | Path,
    data: str | Path,
    tasks: list[str],
    out: str | Path,
    *,
    settings: TrainSettings = SETTINGS,
    progress: bool = True,
) -> Path:
    """Train one adapter on the rows of one or more tasks, and write it to `out/<a+b>`.

    Rows are those of `data/<task>/train.jsonl`: `prompt` with `choices` and `answer`, or with
    `target`, whose end is trained too. The base is held in bfloat16, the factors in float32.

    Args:
        base: folder of the base model, a causal LM with its tokenizer.
        data: folder with one folder per task.
        tasks: whose rows are mixed, in equal parts.
        out: folder of the adapters' folders.
        settings: of one task; steps are per task.
        progress: show a progress bar.

    Returns:
        The adapter's folder; `training.json` in it tells settings, rows and last loss.

    Raises:
        ConfigError: a file is missing or a row has no answer, or fewer rows than are asked for.
        BaseModelError: `base` holds no causal LM.
    """
    source = Path(base)
    model, tokenizer = load_base(source)
    count = settings.steps * settings.batch_size
    rows = [row for task in tasks for row in _rows(Path(data), task, count, tokenizer)]
    random.Random(settings.seed).shuffle(rows)
    total = replace(settings, steps=settings.steps * len(tasks))
    name = "+".join(tasks)
    folder = Path(out) / name
    loss = train_adapter(
        copy_model(model, torch.bfloat16),
        Answers.from_texts(rows, tokenizer),
        total,
        folder,
        base_name=source.name,
        title=f"training {name}" if progress else None,
    )
    told = {
        "tasks": tasks,
        "settings": asdict(total),
        "rows": len(rows),
        "last_loss": round(loss, 4),
        "versions": versions(),
    }
    write_text(folder / "training.json", json.dumps(told, indent=1) + "\n")
    return folder


def _rows(data: Path, task: str, count: int, tokenizer: Any) -> list[tuple[str, str]]:
    path = data / task / "train.jsonl"
    if not path.is_file():
        raise ConfigError(f"there is nothing to train task {task!r} on: {str(path)!r} is no file.")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ConfigError(
            f"{str(path)!r} has {len(lines)} rows, and training takes {count}: give fewer steps."
        )
    return [_pair(json.loads(line), path, tokenizer) for line in lines[:count]]


def _pair(row: dict[str, Any], path: Path, tokenizer: Any) -> tuple[str, str]:
    if "target" in row:
        return row["prompt"], row["target"] + (tokenizer.eos_token or "")
    if "choices" in row:
        return row["prompt"], row["choices"][row["answer"]]
    raise ConfigError(f"{str(path)!r}: a row needs 'target', or 'choices' and 'answer'.")
