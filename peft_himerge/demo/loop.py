"""The training loop: a LoRA adapter from texts and the answers that continue them.

The loss is the cross-entropy of the answer's tokens at the end of the prompt, nothing else.
Adapters are stored in bfloat16, and whoever scores them scores the stored values.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Answers", "TrainSettings", "copy_model", "train_adapter"]


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


def copy_model(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model in `dtype`, without one in its own dtype on the way."""
    made: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, made)


@dataclass(frozen=True, slots=True)
class Answers:
    """Training rows as token ids: prompts with the first tokens of their answers, and the answer.

    `inputs[i]` is prompt and answer without its last token; `labels[i]` the answer's tokens.
    """

    inputs: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    pad: int

    @classmethod
    def from_texts(cls, rows: Sequence[tuple[str, str]], tokenizer: Any) -> Answers:
        """Return the ids of (prompt, answer) pairs."""
        inputs, labels = [], []
        for text, target in rows:
            prompt = tokenizer(text)["input_ids"]
            answer = tokenizer(target, add_special_tokens=False)["input_ids"]
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


def train_adapter(
    model: Any,
    answers: Answers,
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
    peft_model: Any, answers: Answers, setting: TrainSettings, title: str | None
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
    device = peft_model.get_input_embeddings().weight.device
    placed = {name: values.to(device) for name, values in batch.items()}
    labels = placed.pop("labels")
    asked = (labels != -100).any(dim=0).nonzero().squeeze(1)
    logits = peft_model(**placed, use_cache=False, logits_to_keep=asked).logits
    labels = labels[:, asked]
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _schedule(step: int, steps: int) -> float:
    """Ten steps of warm-up, then half a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 10) * (0.505 + 0.495 * math.cos(math.pi * step / steps))


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
