"""Tiny training runs, and everything about one that a callback must not move."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from snapshot import bits, rng_states
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

TRAINED, SIBLING = "default", "zh"
TASKS = (TRAINED, SIBLING)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random token rows, the same in every run."""

    def __init__(self, n: int = 24, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(3, tiny.VOCAB, (n, tiny.LENGTH), generator=draw)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def plain(kind: str = "llama", dropout: float = 0.1) -> nn.Module:
    model = tiny.tiny_model(kind)
    model.config.attention_dropout = dropout
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def in_training(kind: str = "llama", *, sibling: bool = True) -> PeftModel:
    """Return a model whose adapter "default" is to be trained, beside a frozen sibling."""
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = get_peft_model(plain(kind), config, adapter_name=TRAINED)
    # A fresh adapter is zero, which a merge rightly warns of: start it as if trained a little.
    tiny._fill(model, TRAINED, 3, 0.1)
    if sibling:
        add_sibling(model)
    model.set_adapter(TRAINED)
    return model


def add_sibling(model: PeftModel, name: str = SIBLING) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(name, config)
    tiny._fill(model, name, 5, 0.3)


def sibling_folder(root: Path) -> Path:
    """Save the sibling as PEFT does, and return its folder."""
    model = in_training()
    model.save_pretrained(str(root), selected_adapters=[SIBLING])
    return root / SIBLING


def eval_fns(kind: str = "llama", n: int = 4) -> dict[str, tiny.TargetTask]:
    return tiny.eval_fns(kind, TASKS, n_examples=n)


def arguments(out: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "seed": 11,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(out), **{**settings, **options})


def trainer(
    out: Path,
    callbacks: list[Any],
    *,
    model: PeftModel | None = None,
    cls: type[Trainer] = Trainer,
    eval_dataset: Any = None,
    **options: Any,
) -> Trainer:
    return cls(
        model=model or in_training(),
        args=arguments(out, **options),
        train_dataset=Rows(),
        eval_dataset=eval_dataset if eval_dataset is not None else Rows(8, seed=1),
        callbacks=callbacks,
    )


def facts(done: Trainer) -> dict[str, Any]:
    """Return what must be bit-identical with and without a callback, by name."""
    found: dict[str, Any] = dict(rng_states())
    model = done.model
    for name, value in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = bits(value)
        found[f"requires_grad {name}"] = value.requires_grad
        found[f"grad {name}"] = None if value.grad is None else bits(value.grad)
    for name, module in model.named_modules():
        found[f"module {name}"] = (type(module).__name__, module.training)
    optimizer = done.optimizer
    assert optimizer is not None
    for index, (key, state) in enumerate(optimizer.state_dict()["state"].items()):
        for name, value in state.items():
            found[f"optimizer {index} {key} {name}"] = bits(value)
    found["learning rate"] = [group["lr"] for group in optimizer.param_groups]
    found["adapters"] = list(model.peft_config)
    found["active"] = (repr(model.active_adapter), repr(model.base_model.active_adapter))
    drop = ("runtime", "per_second")
    found["log"] = json.dumps(
        [{k: v for k, v in row.items() if not any(d in k for d in drop)} for row in history(done)]
    )
    return found


def history(done: Trainer) -> list[Mapping[str, Any]]:
    return done.state.log_history
