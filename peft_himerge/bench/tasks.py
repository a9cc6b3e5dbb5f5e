"""Tasks of a benchmark: a folder of JSONL files each, read by what their rows look like."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..evals import MultipleChoiceRow, generation, likelihood, load_rows, multiple_choice

__all__ = ["BenchTask", "choice_task", "load_tasks"]

# What the table shows for each kind of task, and what methods are chosen by: smooth where possible.
_MEASURES = {"multiple_choice": "accuracy", "generation": "text_match"}
_GUIDES = {
    "smooth": {"multiple_choice": "probability", "generation": "probability"},
    "measure": _MEASURES,
}
_TEXT = ("bleu", "rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class BenchTask:
    """One task.

    Attributes:
        name: folder name; also the name of its adapter.
        kind: "multiple_choice" or "generation".
        validation: scores rows that methods may choose by.
        test: scores rows for the table.
        measure: metric of the table.
        guide: metric that methods choose by.
        inputs: the validation prompts as batches, for what looks at inputs; no answer is in them.
    """

    name: str
    kind: str
    validation: Callable[[Any], Mapping[str, Any]]
    test: Callable[[Any], Mapping[str, Any]]
    measure: str
    guide: str
    inputs: tuple[Mapping[str, Tensor], ...]


def load_tasks(
    data: Path,
    names: list[str],
    tokenizer: Any,
    *,
    rows: int,
    test_rows: int,
    guide: str = "smooth",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, BenchTask]:
    """Read tasks from `data/<name>/validation.jsonl` and `data/<name>/test.jsonl`.

    Args:
        data: folder of task folders.
        names: the tasks.
        tokenizer: the base model's.
        rows: validation rows per task that methods choose by, drawn at random; all if there are
            not as many.
        test_rows: test rows per task, the first ones.
        guide: "smooth" chooses by the probability of the right answer, where text is generated
            of the first reference (per token, its end included); "measure" by what the table shows.
        batch_size: sequences per forward pass.
        max_new_tokens: most tokens to generate per prompt.
        seed: of the draw.

    Raises:
        ConfigError: a folder or file is missing, or its rows are of no known kind.
    """
    guides = _guide(guide)
    tasks = {}
    for name in names:
        kind = _kind(data / name)
        every = load_rows(data / name, kind, split="validation")
        drawn = random.Random(seed).sample(every, min(rows, len(every)))
        judged = load_rows(data / name, kind, split="test", limit=test_rows)
        test = _function(kind, judged, tokenizer, batch_size, max_new_tokens)
        if kind == "generation" and guide == "smooth":
            validation: Callable[[Any], Mapping[str, Any]] = likelihood(
                drawn,
                tokenizer,
                batch_size=max(1, batch_size // 4),  # a large vocabulary fills memory
                max_references=1,
                with_end=True,
            )
        else:
            validation = _function(kind, drawn, tokenizer, batch_size, max_new_tokens)
        prompts = _prompts([row.prompt for row in drawn], tokenizer, batch_size)
        measure, guided = _MEASURES[kind], guides[kind]
        tasks[name] = BenchTask(name, kind, validation, test, measure, guided, prompts)
    return tasks


def choice_task(
    name: str,
    validation: Sequence[MultipleChoiceRow],
    test: Sequence[MultipleChoiceRow],
    tokenizer: Any,
    *,
    guide: str = "smooth",
    batch_size: int = 32,
) -> BenchTask:
    """Return a multiple-choice task of rows that are at hand."""
    kind = "multiple_choice"
    guides = _guide(guide)
    chosen_by = multiple_choice(list(validation), tokenizer, batch_size=batch_size)
    judged = multiple_choice(list(test), tokenizer, batch_size=batch_size)
    prompts = _prompts([row.prompt for row in validation], tokenizer, batch_size)
    return BenchTask(name, kind, chosen_by, judged, _MEASURES[kind], guides[kind], prompts)


def _prompts(
    texts: Sequence[str], tokenizer: Any, batch_size: int
) -> tuple[Mapping[str, Tensor], ...]:
    batches = []
    for start in range(0, len(texts), batch_size):
        ids = [tokenizer(text)["input_ids"] for text in texts[start : start + batch_size]]
        width = max(map(len, ids))
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        filled = torch.zeros_like(mask)
        for line, own in enumerate(ids):
            filled[line, : len(own)] = torch.tensor(own)
            mask[line, : len(own)] = 1
        batches.append({"input_ids": filled, "attention_mask": mask})
    return tuple(batches)


def _guide(name: str) -> Mapping[str, str]:
    if name not in _GUIDES:
        raise ConfigError(f"guide must be one of {sorted(_GUIDES)}, got {name!r}.")
    return _GUIDES[name]


def _kind(folder: Path) -> str:
    path = folder / "validation.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"there is no task {folder.name!r}: {str(path)!r} is not a file. A task is a folder "
            f"with validation.jsonl and test.jsonl."
        )
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "")
    if '"choices"' in first:
        return "multiple_choice"
    if '"references"' in first:
        return "generation"
    raise ConfigError(
        f"{str(path)!r}: rows with 'choices' (multiple choice) or 'references' (generation) can be "
        f"scored; the first row has neither."
    )


def _function(
    kind: str, rows: list[Any], tokenizer: Any, batch_size: int, max_new_tokens: int
) -> Callable[[Any], Mapping[str, Any]]:
    if kind == "multiple_choice":
        return multiple_choice(rows, tokenizer, batch_size=batch_size)
    written = generation(rows, tokenizer, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return _TextMatch(written)


@dataclass(frozen=True, slots=True)
class _TextMatch:
    """Adds the mean of BLEU-4 and ROUGE-1/2/L, the paper's measures of generation, per row."""

    inner: Any

    @property
    def fingerprint(self) -> str:
        """Changes with the rows and options."""
        return f"text_match:{self.inner.fingerprint}"

    def __call__(self, model: Any) -> Mapping[str, Any]:
        found = dict(self.inner(model))
        rows = zip(*(found[name] for name in _TEXT), strict=True)
        found["text_match"] = [sum(map(float, row)) / len(_TEXT) for row in rows]
        return found
