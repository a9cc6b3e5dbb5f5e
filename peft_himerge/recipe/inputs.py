"""A task's validation rows as batches of token ids, for methods that run the model on examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..errors import ConfigError
from ..evals import EvalRowError
from ..evals.base import at_least_one, continuation_ids, open_ids, pad_id
from ..methods import get_method
from .schema import Recipe
from .tasks import rows_of

__all__ = ["Inputs", "build_inputs", "input_kinds", "needs_inputs", "reads_labels"]

_IGNORED = -100  # what PyTorch's and transformers' losses leave out
_Example = tuple[list[int], list[int]]  # token ids and labels
_LONGEST = 512  # tokens of a text, as `evals.perplexity` reads at once

# Methods that read labels, by their options; the others look at inputs alone.
_LABELLED: Mapping[str, Callable[[Mapping[str, Any]], bool]] = MappingProxyType(
    {
        "atlas": lambda _: True,
        "fw_merging": lambda options: options.get("loss", "labels") == "labels",
        "fisher": lambda options: options.get("labels", "model") == "given",
    }
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One task's examples.

    Attributes:
        rows: what they were made of.
        batches: for `merge_adapters(inputs=...)`.
    """

    rows: tuple[Any, ...]
    batches: tuple[Batch, ...]


def needs_inputs(recipe: Recipe) -> bool:
    """Return True if the recipe's method runs the model on examples."""
    return not recipe.is_hi and get_method(recipe.method).needs in ("inputs", "gradients")


def reads_labels(method: str, options: Mapping[str, Any]) -> bool:
    """Return True if a method with these options reads labels."""
    found = _LABELLED.get(method)
    return found is not None and found(options)


def input_kinds(method: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of tasks whose rows a method can be run on."""
    # Rows of "generation" do not say what stands between prompt and answer.
    unlabelled = () if reads_labels(method, options) else ("generation", "likelihood")
    return ("multiple_choice", "perplexity", *unlabelled)


def build_inputs(recipe: Recipe, name: str, tokenizer: Any) -> Inputs:
    """Return the batches of one task's validation rows, in their order, padded on the right.

    Without labels an example is a prompt, so that the next token is the answer, or a text. With
    labels it is prompt and right choice, with the loss on the choice, or a text.

    Args:
        recipe: its method needs inputs; the task is of one of `input_kinds`. The task's option
            batch_size (8 by default) is read, and max_length (512), to which texts are cut.
        name: of the task.
        tokenizer: that of the base model.

    Raises:
        ConfigError, EvalRowError: the data does not fit.
    """
    spec = recipe.tasks[name]
    rows = tuple(rows_of(recipe, spec, "validation"))
    labelled = reads_labels(recipe.method, recipe.options)
    most = spec.options.get("max_length", _LONGEST)
    size = spec.options.get("batch_size", 8)
    at_least_one(batch_size=size, max_length=most)
    examples = [_example(row, tokenizer, labelled, most) for row in rows]
    pad = pad_id(tokenizer)
    batches = [_padded(examples[i : i + size], pad, labelled) for i in range(0, len(rows), size)]
    if not batches:
        raise ConfigError(f"the task {name!r} has no rows.")
    return Inputs(rows, tuple(batches))


def _example(row: Any, tokenizer: Any, labelled: bool, most: int) -> _Example:
    if isinstance(row, str):
        ids = open_ids(row, tokenizer)[:most]
        if len(ids) < 2:
            raise EvalRowError(f"a text has fewer than two tokens: {row!r:.80}")
        return ids, ids
    prompt = open_ids(row.prompt, tokenizer)
    if not labelled:
        return prompt, []
    answer = list(continuation_ids(row.prompt, prompt, row.choices[row.answer], tokenizer))
    return [*prompt, *answer], [*([_IGNORED] * len(prompt)), *answer]


def _padded(examples: Sequence[_Example], pad: int, labelled: bool) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in examples)

    def table(rows: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows])

    ids = [ids for ids, _ in examples]
    batch = {
        "input_ids": table(ids, pad),
        "attention_mask": table([[1] * len(row) for row in ids], 0),
    }
    if labelled:
        batch["labels"] = table([labels for _, labels in examples], _IGNORED)
    return batch
