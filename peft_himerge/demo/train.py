"""Train the demo's two adapters, one per task, with PEFT and a plain PyTorch loop.

The loss is the cross-entropy of the answer's token at the end of the prompt, nothing else.
Adapters are stored in bfloat16, and the scores written beside them are those of the stored values.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peft_himerge.demo.base import BASE_NAME, load_base
from peft_himerge.demo.questions import load_tasks
from peft_himerge.errors import HiMergeError
from peft_himerge.evals import MultipleChoiceRow, multiple_choice

__all__ = ["TrainSettings", "train"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How one adapter is trained.

    Args:
        steps: Optimiser steps.
        batch_size: Rows per step.
        learning_rate: Peak of the cosine schedule (ten warm-up steps, AdamW, no weight decay).
        rank: LoRA rank r, on all linear layers of the blocks.
        alpha: LoRA alpha; the delta is alpha / r times B A.
        seed: Seed of the factors' start values and of the row order.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    rank: int = 2
    alpha: int = 8
    seed: int = 0


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
        loss = _train_one(
            _copy(model, torch.bfloat16 if bfloat16 else torch.float32),
            _Answers.from_rows(tasks[task].train, tokenizer),
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


def _copy(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model in `dtype`, without one in its own dtype on the way."""
    made: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, made)


def _versions() -> dict[str, str]:
    tools = ("torch", "transformers", "peft", "babel")
    return {"python": platform.python_version(), **{tool: version(tool) for tool in tools}}


@dataclass(frozen=True, slots=True)
class _Answers:
    """Training rows as token ids: prompts with the first tokens of their answers, and the answer.

    `inputs[i]` is prompt and answer without its last token; `labels[i]` the answer's tokens.
    """

    inputs: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    pad: int

    @classmethod
    def from_rows(cls, rows: Sequence[MultipleChoiceRow], tokenizer: Any) -> _Answers:
        inputs, labels = [], []
        for row in rows:
            prompt = tokenizer(row.prompt)["input_ids"]
            answer = tokenizer(row.choices[row.answer], add_special_tokens=False)["input_ids"]
            inputs.append((*prompt, *answer[:-1]))
            labels.append(tuple(answer))
        return cls(tuple(inputs), tuple(labels), tokenizer.pad_token_id or 0)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Left-padded inputs; labels are -100 where nothing is asked."""
        width = max(len(self.inputs[i]) for i in indices)
        input_ids = torch.full((len(indices), width), self.pad)
        labels = torch.full((len(indices), width), -100)
        mask = torch.zeros_like(input_ids)
        for line, i in enumerate(indices):
            input_ids[line, width - len(self.inputs[i]) :] = torch.tensor(self.inputs[i])
            labels[line, width - len(self.labels[i]) :] = torch.tensor(self.labels[i])
            mask[line, width - len(self.inputs[i]) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
        }


def _train_one(
    model: Any,
    answers: _Answers,
    setting: TrainSettings,
    folder: Path,
    *,
    base_name: str,
    title: str | None,
) -> float:
    """Train one adapter on `model`, save it in `folder`, return the mean of the last losses."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(setting.seed)
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    peft_model.peft_config["default"].revision = None
    losses = _fit(peft_model, answers, setting, title)
    for parameter in _trainable(peft_model):
        parameter.data = parameter.data.to(torch.bfloat16)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    last = losses[-20:]
    return sum(last) / len(last)


def _fit(
    peft_model: Any, answers: _Answers, setting: TrainSettings, title: str | None
) -> list[float]:
    from rich.progress import track

    parameters = _trainable(peft_model)
    optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=0.0)
    shuffle = random.Random(setting.seed)
    waiting: list[int] = []
    losses = []
    for step in track(range(setting.steps), title or "", disable=title is None):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * _schedule(step, setting.steps)
        if len(waiting) < setting.batch_size:
            epoch = list(range(len(answers.inputs)))
            shuffle.shuffle(epoch)
            waiting += epoch
        batch = answers.batch([waiting.pop(0) for _ in range(setting.batch_size)])
        loss = _loss(peft_model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _loss(peft_model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the answer tokens; only their positions go through the head."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    asked = (batch["labels"] != -100).any(dim=0).nonzero().squeeze(1)
    logits = peft_model(**inputs, use_cache=False, logits_to_keep=asked).logits
    labels = batch["labels"][:, asked]
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _schedule(step: int, steps: int) -> float:
    """Ten steps of warm-up, then half a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 10) * (0.505 + 0.495 * math.cos(math.pi * step / steps))


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


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
