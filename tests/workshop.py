"""A user's working folder: tiny base models, adapters and data, where the shipped recipes look."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import bytewise
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model

RECIPES = Path(__file__).parents[1] / "recipes"
MERGES = sorted(p.name for p in RECIPES.glob("*.yaml") if "sweep" not in p.name)


def causal(root: Path, names: list[str]) -> None:
    """Write a causal LM with a tokenizer, and adapters of different rank and targets."""
    specs = {
        name: {
            "r": 2 + place,
            "alpha": 5,
            "target_modules": ["q_proj", "v_proj", "down_proj"][place % 2 :],
            "seed": place,
            "task_type": "CAUSAL_LM",
        }
        for place, name in enumerate(names)
    }
    model = tiny.add_adapters(bytewise.llama(), specs)
    model.save_pretrained(root / "adapters", selected_adapters=names)
    model.unload().save_pretrained(root / "models" / "base")
    bytewise.tokenizer().save_pretrained(root / "models" / "base")


def classifiers(root: Path, labels: dict[str, int]) -> None:
    """Write an encoder, and SEQ_CLS adapters with heads of different width, as PEFT makes them."""
    for seed, (name, count) in enumerate(labels.items()):
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS"
        )
        model = get_peft_model(bytewise.bert(count, torch.float32), config)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_" in path or "modules_to_save" in path:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(root / "adapters" / name)
    body = bytewise.bert(2, torch.float32).bert  # as downloaded: without a head
    body.save_pretrained(root / "models" / "encoder")
    bytewise.tokenizer().save_pretrained(root / "models" / "encoder")


def choices(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n} + {n} =", "choices": [f" {2 * n}", f" {n}"], "answer": n % 2}
        for n in range(start, start + count)
    ]


def answers(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"say {n}:", "references": [f"{n}", f"it is {n}"]}
        for n in range(start, start + count)
    ]


def texts(start: int, count: int) -> list[dict[str, Any]]:
    return [{"text": f"the number {n} is {n}"} for n in range(start, start + count)]


def labelled(start: int, count: int, labels: list[str]) -> list[dict[str, Any]]:
    return [
        {"text": f"text number {n}", "label": labels[n % len(labels)]}
        for n in range(start, start + count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL or CSV (lists as JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for row in rows:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            table.writerow(cells)


MAKERS = {"multiple_choice": choices, "generation": answers, "perplexity": texts}


def furnish(root: Path, recipe: str, rows: int = 4) -> None:
    """Write everything a shipped recipe names under `root`: its placeholders become real."""
    told = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    tasks = told.get("tasks", {})
    if any(task["kind"] == "sequence_classification" for task in tasks.values()):
        classifiers(root, {name: len(task["labels"]) for name, task in tasks.items()})
    else:
        causal(root, list(told["adapters"]))
    for task in tasks.values():
        for place, split in enumerate(("validation", "test")):
            if split not in task:
                continue
            path = root / task[split]
            path = path if path.suffix else path / f"{split}.jsonl"
            if task["kind"] == "sequence_classification":
                write(path, labelled(10 * place, rows, task["labels"]))
            else:
                write(path, MAKERS[task["kind"]](1 + 10 * place, rows))


def pointed(root: Path, recipe: str) -> list[str]:
    """Return the --set values that point a shipped recipe at the folder `root`."""
    told = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    found = {key: told[key] for key in ("base", "out", "journal") if key in told}
    found |= {f"adapters.{name}": folder for name, folder in told["adapters"].items()}
    for name, task in told.get("tasks", {}).items():
        found |= {f"tasks.{name}.{s}": task[s] for s in ("validation", "test") if s in task}
    return [f"{key}={root / path}" for key, path in found.items()]
