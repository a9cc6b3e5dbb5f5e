"""From the tasks of a recipe to eval functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from .. import evals
from ..config import HiMergeConfig
from ..errors import ConfigError, suggest
from .schema import HUB, Recipe, TaskSpec

__all__ = [
    "FUNCTION",
    "HARNESS",
    "HEADED",
    "KINDS",
    "Kind",
    "Scored",
    "build_task",
    "hi_config",
    "hi_options",
    "metric_of",
    "options_of",
    "rows_of",
]

FUNCTION, HARNESS = "function", "lm_eval_task"
HEADED = ("sequence_classification", "token_classification")
"""Kinds that are scored with a head, which adapters may bring along."""

# The rows come from the recipe's own keys; the other two would run code that a recipe names.
_NOT_OPTIONS = ("max_rows", "include_path", "unsafe_code")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task.

    Attributes:
        build: the eval function's builder; None for a function of the user's.
        metrics: what it gives, if it is known: first what decides a merge, then what the table
            shows, then the others. Smooth scores decide better on few rows (DESIGN 1.5).
        rows: True if it is scored on rows from a file.
    """

    build: Callable[..., Any] | None
    metrics: tuple[str, ...] = ()
    rows: bool = True


_CLASSES = ("log_likelihood", "accuracy", "macro_f1")
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "multiple_choice": Kind(
            evals.multiple_choice,
            ("calibrated_probability", "accuracy", "probability", "log_likelihood"),
        ),
        "generation": Kind(
            evals.generation, ("rougeL", "rougeL", "bleu", "rouge1", "rouge2", "corpus_bleu")
        ),
        "likelihood": Kind(evals.likelihood, ("probability", "log_likelihood")),
        "perplexity": Kind(evals.perplexity, ("log_likelihood", "log_likelihood", "perplexity")),
        "sequence_classification": Kind(evals.sequence_classification, _CLASSES),
        "token_classification": Kind(evals.token_classification, _CLASSES),
        "embedding_similarity": Kind(evals.embedding_similarity),
        HARNESS: Kind(evals.lm_eval_task, rows=False),
        FUNCTION: Kind(None, rows=False),
    }
)


@cache
def options_of(kind: str) -> Mapping[str, Any]:
    """Return option -> type of a kind's builder, without its data and its tokenizer."""
    build = KINDS[kind].build
    if build is None:
        return MappingProxyType({})
    hints = get_type_hints(build)
    names = list(inspect.signature(build).parameters)[2:]
    found = {name: hints[name] for name in names if name not in _NOT_OPTIONS}
    if "head" in found:
        found["head"] = str  # of its forms, the one that can be written down: a folder
    return MappingProxyType(found)


def metric_of(spec: TaskSpec, *, test: bool = False) -> str | None:
    """Return the metric that decides the merge, or that the table of test scores shows."""
    known = KINDS[spec.kind].metrics
    if test:
        return spec.test_metric or (spec.metric if not known else known[1])
    return spec.metric or (known[0] if known else None)


def hi_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe for Hi-Merging, as far as it gives them."""
    scored = {name: metric_of(task) for name, task in recipe.tasks.items() if task.validation}
    metric = {name: found for name, found in scored.items() if found is not None}
    return {**recipe.options, "rank": recipe.rank, "metric": metric or None}


def hi_config(recipe: Recipe) -> HiMergeConfig:
    """Return the options of a recipe for Hi-Merging, with everything it leaves out."""
    return HiMergeConfig(**hi_options(recipe))


@dataclass(frozen=True, slots=True)
class Scored:
    """An eval function that was built, and what it is about.

    Attributes:
        fn: function of the model.
        rows: the rows it scores; () where they are not ours to see.
        size: their number, or None if it is not known.
        metric: which metric of `fn` is the score.
    """

    fn: Callable[[Any], Any]
    rows: tuple[Any, ...]
    size: int | None
    metric: str | None


def build_task(
    recipe: Recipe,
    name: str,
    split: str,
    tokenizer: Any,
    functions: Mapping[str, Callable[[Any], Any]] | None,
    head: Path | None = None,
    include_path: str | Path | None = None,
) -> Scored:
    """Return the eval function of one task on one split.

    Args:
        recipe: the recipe.
        name: of the task.
        split: "validation" or "test"; the task must have it.
        tokenizer: that of the base model.
        functions: the user's own, by name; None if no file was given.
        head: folder of the adapter that brings the task's head; the recipe's own word goes first.
        include_path: folder with tasks of lm-evaluation-harness, from the command line.

    Raises:
        ConfigError, EvalRowError, MissingExtraError: the data or an option does not fit.
    """
    spec = recipe.tasks[name]
    source = getattr(spec, split)
    kind, metric = KINDS[spec.kind], metric_of(spec, test=split == "test")
    if spec.kind == FUNCTION:
        return Scored(_function(source, functions), (), None, metric)
    assert kind.build is not None
    options = dict(spec.options)
    if not kind.rows:
        made = kind.build(source, tokenizer, include_path=include_path, **options)
        return Scored(made, (), made.size, metric)
    rows = rows_of(recipe, spec, split)
    if "head" in options:
        options["head"] = recipe.place(options["head"])
    elif head is not None:
        options["head"] = head
    made = kind.build(rows, tokenizer, **options)
    return Scored(made, tuple(rows), made.size, metric)


def rows_of(recipe: Recipe, spec: TaskSpec, split: str) -> list[Any]:
    """Return the rows of one split of a task.

    Raises:
        ConfigError, EvalRowError, MissingExtraError: the data does not fit.
    """
    return evals.load_rows(
        _source(recipe, getattr(spec, split)),
        spec.kind,
        split=split,
        columns=spec.columns,
        limit=spec.max_rows if split == "validation" else spec.max_test_rows,
        subset=spec.subset,
    )


def _function(
    name: str, functions: Mapping[str, Callable[[Any], Any]] | None
) -> Callable[[Any], Any]:
    if functions is None:
        raise ConfigError(
            f"{name!r} is a function of your own: name the Python file that has it on the command "
            f"line, --eval my_evals.py. A recipe cannot name code to run."
        )
    if name not in functions:
        raise ConfigError(f"eval_fns has no function {name!r}.{suggest(name, functions)}")
    return functions[name]


def _source(recipe: Recipe, source: str) -> str | Path:
    # Only a marked name goes to the hub, so that a mistyped path never asks the network.
    return source.removeprefix(HUB) if source.startswith(HUB) else recipe.place(source)
