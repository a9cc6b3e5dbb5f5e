"""Train the demo's two adapters, one per task, with PEFT and a plain PyTorch loop.

The loss is the cross-entropy of the answer's token at the end of the prompt, nothing else.
Adapters are stored in bfloat16, and the scores written beside them are those of the stored values.
"""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_himerge.demo.base import BASE_NAME, load_base
from peft_himerge.demo.loop import Answers, TrainSettings, copy_model, train_adapter
from peft_himerge.demo.questions import load_tasks
from peft_himerge.errors import HiMergeError
from peft_himerge.evals import MultipleChoiceRow, multiple_choice

__all__ = ["TrainSettings", "train"]


SETTINGS: Mapping[str, TrainSettings] = {
    "en": TrainSettings(steps=120),
    "zh": TrainSettings(steps=70),
}
"""What the shipped adapters were trained with."""


def train(
    out_dir: Path | str,
    *,
    base: Path | str | None = None,
    settings: Mapping[str, TrainSettings] | None = None,
    seed: int | None = None,
    score_rows: int | None = None,
    bfloat16: bool = True,
    progress: bool = True,
) -> dict[str, Path]:
    """Train one adapter per task and write each to `out_dir/<task>`.

    Args:
        out_dir: Folder for the adapters; made if missing, files of the same name are replaced.
        base: Folder of another base model; None is Gemma-3-270M (see `load_base`).
        settings: Settings per task; tasks that are left out are not trained. None is `SETTINGS`.
        seed: Replaces the seed of every task's settings.
        score_rows: Test rows for the scores before and after; None takes all.
        bfloat16: Train on a bfloat16 copy of the base (faster on CPUs with bfloat16
            instructions; the factors being trained and all scores stay float32).
        progress: Show a progress bar with the time left.

    Returns:
        The folder of each adapter: adapter_config.json, adapter_model.safetensors, training.json.

    Raises:
        HiMergeError: If `settings` names a task that does not exist.
    """
    chosen = dict(SETTINGS if settings is None else settings)
    tasks = load_tasks()
    unknown = sorted(set(chosen) - set(tasks))
    if unknown:
        raise HiMergeError(f"unknown demo tasks {unknown!r}; there are {sorted(tasks)!r}")
    model, tokenizer = load_base(base)
    name = BASE_NAME if base is None else Path(base).name
    folders = {}
    for task, setting in chosen.items():
        if seed is not None:
            setting = replace(setting, seed=seed)
        score = multiple_choice(tasks[task].test, tokenizer, batch_size=32, max_rows=score_rows)
        before = score(model)
        folder = Path(out_dir) / task
        loss = train_adapter(
            copy_model(model, torch.bfloat16 if bfloat16 else torch.float32),
            Answers.from_texts(_texts(tasks[task].train), tokenizer),
            setting,
            folder,
            base_name=name,
            title=f"training {task}" if progress else None,
        )
        after = _score_saved(model, folder, score)
        record = {
            "task": task,
            "base": name,
            "settings": asdict(setting),
            "bfloat16": bfloat16,
            "train_rows": len(tasks[task].train),
            "test_rows": len(before["accuracy"]),
            "before": _means(before),
            "after": _means(after),
            "last_loss": round(loss, 4),
            "versions": _versions(),
        }
        text = json.dumps(record, indent=2) + "\n"
        (folder / "training.json").write_text(text, encoding="utf-8")
        folders[task] = folder
        gc.collect()  # PEFT's models hold on to themselves: a whole base each
    return folders


def _texts(rows: Sequence[MultipleChoiceRow]) -> list[tuple[str, str]]:
    return [(row.prompt, row.choices[row.answer]) for row in rows]


def _versions() -> dict[str, str]:
    tools = ("torch", "transformers", "peft", "babel")
    return {"python": platform.python_version(), **{tool: version(tool) for tool in tools}}


def _score_saved(
    model: Any, folder: Path, score: Callable[[torch.nn.Module], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Score `model` with the adapter in `folder`; `model` is as before afterwards."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, str(folder))
    try:
        return score(peft_model)
    finally:
        peft_model.unload()


def _means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: round(values.mean().item(), 4) for name, values in scores.items()}
