"""Recipes on the command line: `merge RECIPE`, `plan RECIPE`, `validate RECIPE...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import ConfigError
from .json_file import read_object

# What needs torch is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    from .cost import Cost
    from .preview import Preview
    from .recipe import Examined, Merged

__all__ = [
    "Evals",
    "IncludePath",
    "Overrides",
    "merge_recipe",
    "plan_recipe",
    "print_cost",
    "recipe_alone",
    "sweep_recipe",
    "validate",
]

Evals = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        "--evals",
        help="Python file that defines eval_fns(tokenizer) -> {name: function(model)}; the only "
        "code that is run from a path.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE. With a recipe: any of its keys, dotted, e.g. options.density=0.5 (value "
        "in YAML; paths are read from the recipe's folder). Without: an option of HiMergeConfig.",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        "--include-path",
        "--include_path",
        help="With a recipe: folder with tasks of lm-evaluation-harness, which may hold code that "
        "is run.",
    ),
]
_COLORS = {"ok": "green", "warning": "yellow", "fault": "red"}


def recipe_alone(**flags: object) -> None:
    """Refuse flags that say what a recipe says."""
    for flag, value in flags.items():
        if value:
            raise ConfigError(
                f"--{flag.replace('_', '-')} does not go with a recipe, which says it itself. "
                f"Change a recipe with --set KEY=VALUE."
            )


def merge_recipe(
    path: Path,
    overrides: Sequence[str],
    evals: Path | None,
    include_path: Path | None,
    out: Path | None,
) -> None:
    """Merge by a recipe, and print what came of it."""
    from .processes import is_main
    from .progress import ProgressBar
    from .recipe import run_recipe

    given = [] if out is None else [f"out={json.dumps(str(out.absolute()))}"]
    examined = _examined(path, [*overrides, *given], evals, include_path)
    loud = is_main()
    errors = Console(stderr=True, quiet=not loud)
    _warn(errors, examined)
    if examined.validation or examined.test:
        with ProgressBar(errors) as bar:
            done = run_recipe(examined, [bar])
    else:
        done = run_recipe(examined)
    if loud:
        _show(Console(), examined, done)


def _examined(
    path: Path, overrides: Sequence[str], evals: Path | None, include_path: Path | None
) -> Examined:
    from .recipe import RecipeError, examine_file

    examined = examine_file(path, overrides, evals, include_path)
    if examined.faults:
        raise RecipeError(path, examined.faults)
    return examined


def _warn(screen: Console, examined: Examined) -> None:
    for look in examined.warnings:
        text = f"[yellow]warning:[/yellow] {escape(f'{look.key}: {look.found}')}"
        screen.print(text, soft_wrap=True, highlight=False)


def _show(screen: Console, examined: Examined, done: Merged) -> None:
    from .offline import FolderMerge
    from .result import MergeResult
    from .tables import print_conflicts, print_scores

    result = done.result
    if isinstance(result, MergeResult):
        print_conflicts(screen, result)
        print_scores(screen, result, "Validation scores, which decided the merge")
    if done.test is not None:
        header, rows = done.test.rows()
        table = Table(*header, title="Test scores")
        for row in rows:
            table.add_row(*map(escape, row))
        screen.print(table)
    elif isinstance(result, MergeResult):
        screen.print("no test data: these scores are of the rows that decided the merge")
    if isinstance(result, FolderMerge) and done.test is None:
        screen.print("nothing was scored")
    text = f"rank {result.rank}, relative error of the export {result.export_error:.2e}"
    screen.print(text, soft_wrap=True)
    screen.print(f"merged adapter, report and recipe: {done.folder}", soft_wrap=True, markup=False)


def plan_recipe(
    path: Path, overrides: Sequence[str], evals: Path | None, include_path: Path | None
) -> None:
    """Print what a recipe costs.

    Raises:
        RecipeError: it cannot be run.
    """
    from .recipe.tasks import hi_config

    examined = _examined(path, overrides, evals, include_path)
    recipe, screen = examined.recipe, Console()
    _warn(Console(stderr=True), examined)
    if examined.cost is not None:
        print_cost(screen, examined.cost, focus=hi_config(recipe).focus)
    elif examined.inputs:
        rows = sum(len(made.rows) for made in examined.inputs.values())
        screen.print(
            f"{recipe.method}: no score decides this merge; it runs the model on {rows} rows"
        )
    elif recipe.is_scored:
        screen.print(f"{recipe.method}: scores decide this merge; its own options say how many")
    else:
        screen.print(f"{recipe.method}: no score decides this merge; its cost is its arithmetic")
    if examined.test:
        states = len(recipe.adapters) + 2
        screen.print(
            f"test table: {states} states x {len(examined.test)} tasks = "
            f"{states * len(examined.test)} scores of test data"
        )
    seconds = _seconds_per_score(recipe.place(recipe.out) / "report.json")
    if seconds is not None and examined.cost is not None:
        most = seconds * examined.cost.cost.scores
        screen.print(
            f"the last merge to {recipe.out} took {seconds:.2f} s per score: at most {most:.0f} s",
            soft_wrap=True,
        )


def print_cost(screen: Console, found: Preview, *, focus: bool) -> None:
    """Print what a merge costs at most, step by step."""
    for name in found.zero:
        screen.print(f"adapter {name!r} has no effect: its task is a guard", markup=False)
    screen.print(_cost_table(found.cost))
    times = found.cost.shared_blocks / max(1, found.blocks)
    screen.print(
        f"{found.layers} layers are judged; a full score runs {found.blocks} blocks. "
        f"All this takes about as long as {times:.0f} full scores.",
        soft_wrap=True,
    )
    if focus:
        screen.print("focus: it runs the model on each adapter's rows 3 times before")


def _cost_table(cost: Cost) -> Table:
    table = Table("step", title="At most", show_footer=True)
    table.columns[0].footer = "total"
    for title, total in (
        ("scores", cost.scores),
        ("blocks, each score in full", cost.naive_blocks),
        ("blocks, shared", cost.shared_blocks),
    ):
        table.add_column(title, str(total), justify="right")
    for step in cost.steps:
        table.add_row(step.name, str(step.scores), str(step.naive_blocks), str(step.shared_blocks))
    return table


def _seconds_per_score(report: Path) -> float | None:
    """Return what a score cost in the merge that was written there before; None if unknown."""
    if not report.is_file():
        return None
    try:
        cost = read_object(report, 1 << 28).get("cost")
    except ConfigError:  # what stands there is about to be written anew
        return None
    if not isinstance(cost, dict):
        return None
    scores, seconds = cost.get("scores"), cost.get("seconds")
    if type(scores) is not int or type(seconds) is not float or scores < 1:
        return None
    return seconds / scores


def sweep_recipe(
    path: Path, evals: Path | None, include_path: Path | None
) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return (options, model, adapter -> folder, eval functions) of a recipe that a sweep varies.

    Raises:
        RecipeError: it cannot be run.
        ConfigError: nothing decides its merge, so nothing can be searched.
    """
    from .recipe import start

    examined = _examined(path, (), evals, include_path)
    recipe = examined.recipe
    if not (recipe.is_hi and recipe.is_scored):
        raise ConfigError(
            f"a sweep needs scores, but no validation data decides the merge of {str(path)!r}."
        )
    begun = start(examined)
    return dict(begun.options), begun.model, recipe.folders, begun.eval_fns


def validate(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (YAML).")],
    option: Overrides = None,
    evals: Evals = None,
    include_path: IncludePath = None,
) -> None:
    """Check recipes and everything they name, without loading a weight of the base model.

    Reads adapters, data and the tokenizer, and builds every eval function. Exit code 0: all can be
    run; 2: one cannot.
    """
    from .recipe import RecipeError, examine_file

    screen, faults = Console(), 0
    for path in recipes:
        table = Table("key", "", "found", title=str(path), title_justify="left")
        try:
            examined = examine_file(path, option or [], evals, include_path)
        except RecipeError as exc:
            rows = [(fault.key, "fault", fault.what) for fault in exc.faults]
        else:
            rows = [(look.key, look.state, look.found) for look in examined.looks]
        for key, state, found in rows:
            table.add_row(escape(key), f"[{_COLORS[state]}]{state}[/]", escape(found))
        screen.print(table)
        faults += sum(state == "fault" for _, state, _ in rows)
    if faults:
        screen.print(f"{faults} {'fault' if faults == 1 else 'faults'}")
        raise typer.Exit(2)
    screen.print("all can be run" if len(recipes) > 1 else "can be run")
