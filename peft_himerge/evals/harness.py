"""Tasks of EleutherAI's lm-evaluation-harness, run in process on the live model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from tqdm import tqdm

from ..errors import ConfigError, EvalError, MissingExtraError
from ..randomness import capture, install
from .base import EvalFunction, at_least_one, fingerprint, vocabulary_digest
from .forward import eval_mode, inner_model, preserved_settings

__all__ = ["lm_eval_task"]


def lm_eval_task(
    task: str | Path | Mapping[str, Any],
    tokenizer: Any,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    max_length: int | None = None,
    seed: int = 1234,
    unsafe_code: bool = False,
) -> EvalFunction:
    """Build an eval function from a task of lm-evaluation-harness.

    The task is loaded here, once, with its data. The harness would switch the model to eval mode,
    tie its head to its embedding again and seed the global generators; mode, ties, settings and
    random states are as before after a call.

    Args:
        task: Name of a task, group or tag; a task's YAML file; or a task's config as a dict.
        tokenizer: A Hugging Face tokenizer that fits the model; a copy is used.
        limit: Use only the first so many documents of each task.
        num_fewshot: Examples in the prompt; None takes the task's own number.
        batch_size: Sequences per forward pass. "auto" is refused: it tries sizes until memory
            runs out, which may take a training run down.
        include_path: Folder with further tasks, to be named like the built-in ones.
        max_length: Most tokens the model reads at once; None asks its config.
        seed: Of the choice of few-shot examples.
        unsafe_code: Run tasks that execute code the model wrote.

    Returns:
        `eval_fn(model) -> {metric: ...}` with the harness' names of metrics ("acc", "acc_norm",
        ...; "metric,filter" if the task has several filters). A metric that is a mean over
        documents is a list, one entry per document (of a group: of all its tasks, in the order of
        their names); any other one is a number. If lower is better the values are negated and the
        name becomes "negative_" + metric.

    Raises:
        ConfigError: If an option has a value that is not allowed, or there is no such task.
        MissingExtraError: If lm-eval is not installed.
    """
    _check_options(batch_size, num_fewshot, unsafe_code)
    at_least_one(batch_size=batch_size, limit=limit, max_length=max_length)
    _check_installed()
    random = capture()
    try:
        with _quiet():
            tasks = _load(task, include_path, num_fewshot)
            requests = _requests(tasks, limit, seed)
    finally:
        install(random)
    own = copy.deepcopy(tokenizer)
    told = fingerprint(
        "lm_eval_task",
        requests=[[name, found] for name, found in sorted(requests.items())],
        options=[limit, num_fewshot, batch_size, max_length, seed],
        vocabulary=vocabulary_digest(tokenizer),
    )

    def run(model: nn.Module) -> dict[str, Any]:
        with torch.no_grad(), eval_mode(model), _kept(model), _quiet():
            for held in tasks["tasks"].values():
                held.set_fewshot_seed(seed)
            found = _evaluate(model, own, tasks, limit, batch_size, max_length, unsafe_code)
        return _scores(found, tasks)

    return EvalFunction("lm_eval_task", sum(map(len, requests.values())), told, run)


def _check_options(batch_size: object, num_fewshot: object, unsafe_code: object) -> None:
    if isinstance(batch_size, str):
        raise ConfigError(
            f"batch_size={batch_size!r} is refused: the search for a size runs into out-of-memory "
            f"errors on purpose. Give a number."
        )
    if num_fewshot is not None and (not isinstance(num_fewshot, int) or num_fewshot < 0):
        raise ConfigError(f"num_fewshot must be None or a number from 0 on, got {num_fewshot!r}")
    if not isinstance(unsafe_code, bool):
        raise ConfigError(f"unsafe_code must be True or False, got {unsafe_code!r}")


def _check_installed() -> None:
    try:
        import lm_eval.api.task
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as exc:
        raise MissingExtraError(
            "lm_eval_task needs lm-eval: pip install 'peft-himerge[lm-eval]'."
        ) from exc


def _load(
    task: str | Path | Mapping[str, Any],
    include_path: str | Path | None,
    num_fewshot: int | None,
) -> Any:
    """Return the harness' record of the loaded tasks."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path {str(include_path)!r} is not a folder.")
    is_file = not isinstance(task, Mapping) and Path(task).suffix in (".yaml", ".yml")
    if is_file and not Path(str(task)).is_file():
        raise ConfigError(f"the task file {str(task)!r} is not there.")
    place = None if include_path is None else str(include_path)
    # Reading the thousands of built-in tasks takes seconds: a file or a table names what it needs,
    # and a task of the user's own is looked for among these first.
    named = not is_file and not isinstance(task, Mapping)
    sources = [True] if named and place is None else [False, True] if named else [False]
    wanted = dict(task) if isinstance(task, Mapping) else str(task)
    for defaults in sources:
        try:
            tasks = TaskManager(include_path=place, include_defaults=defaults).load([wanted])
            break
        except KeyError as exc:
            failed = exc
    else:
        raise ConfigError(
            f"lm-eval has no task, group or tag {task!r}. `lm-eval ls tasks` lists them; for tasks "
            f"of your own give include_path=, or --include-path with a recipe."
        ) from failed
    for held in tasks["tasks"].values():
        given = held.get_config("num_fewshot")
        if num_fewshot is not None and given != 0:  # 0 is the task's own order, as in the harness
            held.set_config(key="num_fewshot", value=num_fewshot)
        elif given is None:
            held.set_config(key="num_fewshot", value=0)
    return tasks


def _requests(tasks: Any, limit: int | None, seed: int) -> dict[str, dict[int, Any]]:
    """Return task -> document -> what the model will be asked about it, as text."""
    found: dict[str, dict[int, Any]] = {}
    for name, held in tasks["tasks"].items():
        held.set_fewshot_seed(seed)
        held.build_all_requests(limit=limit, rank=0, world_size=1)
        asked: dict[int, Any] = {}
        for instance in held.instances:
            asked.setdefault(instance.doc_id, [str(instance.doc)]).append(str(instance.args))
        found[name] = asked
    return found


def _evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Any,
    limit: int | None,
    batch_size: int,
    max_length: int | None,
    unsafe_code: bool,
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    options = {} if max_length is None else {"max_length": max_length}
    lm = HFLM(pretrained=inner_model(model), tokenizer=tokenizer, batch_size=batch_size, **options)
    # Not simple_evaluate: it seeds the global generators, and returns nothing on other ranks.
    found: Mapping[str, Any] | None = evaluate(
        lm,
        task_dict=tasks,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=unsafe_code,
    )
    if found is None:
        raise EvalError("lm-eval gave no results in this process.")
    return found


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put back what the harness changes, and keep it from tying the head again."""
    inner = inner_model(model)
    changed: dict[str, Any] = {"tie_weights": lambda *_, **__: None}
    if getattr(inner, "generation_config", None) is not None:
        changed["generation_config"] = copy.deepcopy(inner.generation_config)
    with preserved_settings(model, **changed):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hear only errors from the harness: at every score it warns and draws a progress bar."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            mock.patch("lm_eval.api.model.tqdm", _no_bar),
            mock.patch("lm_eval.api.task.tqdm", _no_bar),
            mock.patch("lm_eval.models.huggingface.tqdm", _no_bar),
        ):
            yield
    finally:
        logger.setLevel(level)


def _no_bar(*args: Any, **options: Any) -> Any:
    return tqdm(*args, **{**options, "disable": True})


def _scores(found: Mapping[str, Any], tasks: Any) -> dict[str, Any]:
    """Return metric -> per-document values, or one number if it is no mean over documents."""
    samples = {name: found["samples"][name] for name in sorted(tasks["tasks"])}
    kinds = dict.fromkeys(
        (metric, sample["filter"])
        for lines in samples.values()
        for sample in lines
        for metric in sample["metrics"]
    )
    several = len({part for _, part in kinds}) > 1
    scores: dict[str, Any] = {}
    for metric, part in kinds:
        value = _metric(found, samples, metric, part)
        if value is None:
            continue
        name = f"{metric},{part}" if several else metric
        better = {found["higher_is_better"][task].get(metric) for task in samples}
        if False in better:
            name = f"negative_{name}"
            value = [-v for v in value] if isinstance(value, list) else -value
        scores[name] = value
    if not scores:
        raise EvalError(f"lm-eval gave no metric for {sorted(tasks['tasks'])} that is a number.")
    return scores


def _metric(
    found: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    part: str,
) -> list[float] | float | None:
    """Return one metric's values; None if the tasks do not share it."""
    values: list[float] = []
    numbers = True
    reported: list[Any] = []
    for task, lines in samples.items():
        of_task = sorted(
            (line for line in lines if line["filter"] == part and metric in line["metrics"]),
            key=lambda line: line["doc_id"],
        )
        whole = found["results"][task].get(f"{metric},{part}")
        if not of_task or not _is_number(whole):
            return None
        reported.append(whole)
        own = [line[metric] for line in of_task]
        numbers = numbers and all(map(_is_number, own))
        if numbers:
            # The mean must be what the harness reports: a metric may sum up in other ways.
            numbers = math.isclose(math.fsum(own) / len(own), whole, rel_tol=1e-6, abs_tol=1e-9)
            values += [float(value) for value in own]
    if numbers:
        return values
    return float(reported[0]) if len(reported) == 1 else None


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and math.isfinite(float(value))
