"""Running a recipe: merge, write, score the test data, keep the recipe with the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from .. import files
from ..budget import Budget
from ..config import HiMergeConfig
from ..events import AdapterSaved, Listener
from ..hi import merge_adapters_hi
from ..merging import AdapterMerge, merge_adapters
from ..offline import FolderMerge, merge_folders
from ..outputs import owning
from ..processes import is_main
from ..report import markdown_table
from ..result import MergeResult, save_page
from ..tracking import WandbListener
from .examine import Examined
from .faults import RecipeError
from .schema import HUB, Recipe
from .start import load_model, start
from .table import TestTable, score_test
from .tasks import KINDS, hi_config

__all__ = ["Merged", "run_recipe"]

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Merged:
    """A recipe that was run.

    Attributes:
        folder: where the adapter, the reports and the recipe are.
        result: what the merge gave.
        test: scores of test data; None if the recipe has none.
    """

    folder: Path
    result: MergeResult | AdapterMerge | FolderMerge
    test: TestTable | None


def run_recipe(examined: Examined, listeners: Sequence[Listener] = ()) -> Merged:
    """Run a recipe that was looked at.

    Of several processes that merge together (`accelerate launch`) only the main one writes.

    Args:
        examined: from `examine`.
        listeners: called with every event; a score of test data is a `StateScored` too, their table
            a `MergeTested`.

    Raises:
        RecipeError: `examine` found faults; nothing was loaded or written.
        OutputError: `out` is in use by another process, or cannot be written.
        BudgetError: the merge took longer than budget.seconds.
        HiMergeError: the merge failed; see `merge_adapters_hi` and `merge_adapters`.
    """
    recipe = examined.recipe
    if examined.faults:
        raise RecipeError(recipe.file, examined.faults)
    if recipe.tracking.to == "none":
        return _owned(examined, listeners)
    with _wandb(recipe) as tracker:
        return _owned(examined, [*listeners, tracker])


def _owned(examined: Examined, listeners: Sequence[Listener]) -> Merged:
    out = examined.recipe.place(examined.recipe.out)
    with owning(out) if is_main() else nullcontext():
        merged = _run(examined, out, listeners)
    # Who takes the folder away as it is must not find the lock in it.
    if is_main():
        plan = None if isinstance(merged.result, AdapterMerge) else merged.result.plan
        for listener in listeners:
            listener(AdapterSaved(out, plan))
    return merged


def _run(examined: Examined, out: Path, listeners: Sequence[Listener]) -> Merged:
    recipe = examined.recipe
    if recipe.is_hi and not recipe.is_scored:
        config = hi_config(recipe)
        done: Any = merge_folders(recipe.folders, out, config=config, adapter_name=recipe.name)
        model = load_model(examined, {recipe.name: out}) if examined.test else None
    elif recipe.is_hi:
        done = _merge_hi(examined, out, listeners)
        model = done.model
    else:
        model = load_model(examined)
        done = _merge_by_method(examined, model, out)
    if not is_main():
        return Merged(out, done, None)
    test = None
    if examined.test:
        test = score_test(model, list(recipe.adapters), recipe.name, examined.test, listeners)
    _keep(recipe, out, test)
    return Merged(out, done, test)


def _merge_hi(examined: Examined, out: Path, listeners: Sequence[Listener]) -> MergeResult:
    recipe, begun = examined.recipe, start(examined)
    callbacks = list(listeners)
    if recipe.budget.seconds is not None:
        advice = "The journal has all of them: run it again to go on."
        if recipe.journal is None:
            advice = "Name a journal in the recipe to go on next time."
        callbacks.append(Budget(seconds=recipe.budget.seconds, advice=advice))
    result = merge_adapters_hi(
        begun.model,
        list(recipe.adapters),
        begun.eval_fns,
        adapter_name=recipe.name,
        config=HiMergeConfig(**begun.options),
        callbacks=callbacks,
        journal=None if recipe.journal is None else recipe.place(recipe.journal),
    )
    if is_main():
        result.save(out, sources=recipe.folders)
        _save_merged(recipe, result)
    return result


def _merge_by_method(examined: Examined, model: PeftModel, out: Path) -> AdapterMerge:
    recipe = examined.recipe
    scored = examined.validation
    metric = {name: task.metric for name, task in scored.items() if task.metric is not None}
    result = merge_adapters(
        model,
        list(recipe.adapters),
        recipe.method,
        adapter_name=recipe.name,
        rank=recipe.rank,
        eval_fns={name: task.fn for name, task in scored.items()} or None,
        metric=metric or None,
        inputs={name: made.batches for name, made in examined.inputs.items()} or None,
        **recipe.options,
    )
    if is_main():
        result.save(out, sources=recipe.folders)
        _save_merged(recipe, result)
    return result


def _save_merged(recipe: Recipe, result: MergeResult | AdapterMerge) -> None:
    if recipe.merged is not None:
        assert recipe.base is not None
        result.save_merged(recipe.place(recipe.base), recipe.place(recipe.merged))


def _wandb(recipe: Recipe) -> WandbListener:
    told = recipe.tracking
    start: dict[str, Any] = {"project": told.project, "entity": told.entity, "name": told.run}
    start |= {"mode": told.mode}
    start |= {"config": {"recipe": recipe.model_dump(exclude_defaults=True, exclude={"tracking"})}}
    return WandbListener(start={key: value for key, value in start.items() if value is not None})


def _keep(recipe: Recipe, out: Path, test: TestTable | None) -> None:
    """Write the recipe beside the result, and what is new into its reports."""
    text = yaml.safe_dump(_moved(recipe, out), sort_keys=False, allow_unicode=True)
    head = "# The recipe of this merge, with what was set on the command line.\n"
    files.write_text(out / RECIPE, head + text)
    digest = hashlib.sha256((head + text).encode()).hexdigest()
    story = json.loads((out / "report.json").read_text(encoding="utf-8"))
    story["recipe"] = {"file": RECIPE, "digest": digest}
    if test is not None:
        story["test"] = test.to_dict()
    told = json.dumps(story, indent=2, ensure_ascii=False, allow_nan=False)
    files.write_text(out / "report.json", told + "\n")
    if (out / "report.html").is_file():
        save_page(out, story)
    for name in ("report.md", "README.md") if test is not None else ():
        page = out / name
        if page.is_file():
            assert test is not None
            table = markdown_table(*test.rows())
            before = page.read_text(encoding="utf-8").rstrip()
            files.write_text(page, f"{before}\n\n## Test scores\n\n{table}\n")


def _moved(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return the recipe as plain values whose paths are read from the folder `out`."""

    def moved(path: str) -> str:
        place = recipe.place(path).resolve()
        try:
            return Path(os.path.relpath(place, out.resolve())).as_posix()
        except ValueError:  # on another drive of Windows
            return place.as_posix()

    told = recipe.model_dump(exclude_defaults=True)
    for key in ("base", "out", "merged", "journal"):
        if told.get(key) is not None:
            told[key] = moved(told[key])
    told["adapters"] = {name: moved(folder) for name, folder in told["adapters"].items()}
    for task in told.get("tasks", {}).values():
        rows = KINDS[task["kind"]].rows
        for key in ("validation", "test", "head"):
            if task.get(key) and (rows or key == "head") and not task[key].startswith(HUB):
                task[key] = moved(task[key])
    return told
