"""`himerge`: parse, call, print, exit code.

0 is done. 1: the merge failed, or `check` found something. 2: bad input, that is a wrong call,
recipe, option, adapter or data; nothing was paid for or written. 130: Ctrl-C.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_bench import bench
from .cli_check import check
from .cli_group import Commands
from .cli_recipe import (
    Evals,
    IncludePath,
    Overrides,
    merge_recipe,
    plan_recipe,
    print_cost,
    recipe_alone,
    sweep_recipe,
    validate,
)
from .cli_report import report
from .config import HiMergeConfig
from .errors import ConfigError, HiMergeError
from .json_file import parse_json
from .outputs import owning
from .plan import MergePlan

# What needs torch is imported where it is used: --help, report and check do not wait for it.
if TYPE_CHECKING:
    from .offline import FolderMerge
    from .result import MergeResult
    from .sweep import Outcome, Sweep

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    help="Merge LoRA adapters by Hi-Merging.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(bench)
app.command()(check)
app.command()(validate)

app.command()(report)

_ADAPTER = typer.Option(help="NAME=FOLDER of one adapter; give it once per adapter.")
_OUT = typer.Option(help="Folder to write the merged adapter to.")
Adapters = Annotated[list[str], _ADAPTER]
Out = Annotated[Path, _OUT]
RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe (YAML), in place of the flags.")]


@app.command()
def merge(
    recipe: RecipeFile = None,
    adapter: Annotated[list[str] | None, _ADAPTER] = None,
    out: Annotated[Path | None, _OUT] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    evals: Evals = None,
    option: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the merged adapter.")] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Also write base + merged delta as a full model here.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Keep scores here; a killed merge, run again, goes on.")
    ] = None,
    include_path: IncludePath = None,
) -> None:
    """Merge adapters from folders and write one adapter: by a recipe, or by flags.

    With --base and --eval: Hi-Merging. Without them, and with --set density=P --set scale=S: the
    adapters are pruned, scaled and summed from their files, and nothing is scored.
    """
    if recipe is not None:
        recipe_alone(adapter=adapter, base=base, name=name, merged=merged, journal=journal)
        merge_recipe(recipe, option or [], evals, include_path, out)
        return
    _needs_recipe(include_path)
    if not adapter or out is None:
        raise typer.BadParameter("give a recipe, or --adapter (once per adapter) and --out")
    config = HiMergeConfig(**_options(option or []))
    folders = _adapters(adapter)
    name = name or "merged"
    if base is None or evals is None:
        _merge_unscored(folders, out, config, name, {"--base": base, "--eval": evals}, merged)
        return
    from .processes import is_main
    from .tables import print_conflicts, print_scores

    # Of several processes that make this merge together only the main one writes.
    with owning(out) if is_main() else nullcontext():
        result = _merge_scored(folders, base, evals, config, name, journal)
        if not is_main():
            return
        result.save(out, sources=folders)
        if merged is not None:
            result.save_merged(base, merged)
    screen = Console()
    print_conflicts(screen, result)
    print_scores(screen, result)
    screen.print(f"merged adapter, plan and report: {out}", soft_wrap=True)


def _needs_recipe(include_path: Path | None) -> None:
    if include_path is not None:
        raise ConfigError(
            "--include-path goes with a recipe, whose tasks it finds. Leave it out, and call "
            "lm_eval_task(..., include_path=...) in the file of --eval."
        )


def _merge_scored(
    folders: Mapping[str, Path],
    base: Path,
    evals: Path,
    config: HiMergeConfig,
    name: str,
    journal: Path | None,
) -> MergeResult:
    from .evals import load_evals
    from .folders import load_peft_model
    from .hi import merge_adapters_hi
    from .processes import is_main
    from .progress import ProgressBar

    build = load_evals(evals)
    model, tokenizer = load_peft_model(base, folders)
    with ProgressBar(Console(stderr=True, quiet=not is_main())) as bar:
        return merge_adapters_hi(
            model,
            list(folders),
            build(tokenizer),
            adapter_name=name,
            config=config,
            callbacks=[bar],
            journal=journal,
        )


def _merge_unscored(
    folders: Mapping[str, Path],
    out: Path,
    config: HiMergeConfig,
    name: str,
    scoring: Mapping[str, Path | None],
    merged: Path | None,
) -> None:
    missing = [flag for flag, given in scoring.items() if given is None]
    if len(missing) == 1:
        raise ConfigError(
            f"{missing[0]} is missing: scoring needs --base and --eval. Give both, or neither for "
            f"a merge without scores."
        )
    if config.searches():
        raise ConfigError(
            "--base and --eval are missing, so density and scale cannot be searched. Give both, "
            "or numbers: --set density=0.3 --set scale=0.9."
        )
    if merged is not None:
        raise ConfigError("--merged needs the base model: give --base and --eval.")
    from .offline import merge_folders

    _print_folder_merge(merge_folders(folders, out, config=config, adapter_name=name))


def _print_folder_merge(done: FolderMerge) -> None:
    text = f"rank {done.rank}, relative error {done.export_error:.2e}, {done.seconds:.1f} s"
    if done.peak_bytes is not None:
        text += f", peak memory {done.peak_bytes / 1e9:.2f} GB"
    screen = Console()
    screen.print(text)
    screen.print(f"merged adapter, plan and report: {done.folder}", soft_wrap=True)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json of an earlier merge.")],
    adapter: Adapters,
    out: Out,
    rank: Annotated[
        str, typer.Option(help="A number, a share of the energy, 'exact' or 'auto'.")
    ] = "auto",
    name: Annotated[str, typer.Option(help="Name of the merged adapter.")] = "merged",
) -> None:
    """Rebuild the adapter a plan describes, from adapter folders alone."""
    from .offline import merge_folders

    if not plan.is_file():
        raise ConfigError(f"the plan {str(plan)!r} is not a file.")
    config = HiMergeConfig(density=1.0, scale=1.0, **_options([f"rank={rank}"]))
    found = MergePlan.from_json(plan)
    done = merge_folders(_adapters(adapter), out, plan=found, config=config, adapter_name=name)
    _print_folder_merge(done)


@app.command("plan")
def plan_cost(
    recipe: RecipeFile = None,
    adapter: Annotated[list[str] | None, _ADAPTER] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    option: Overrides = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="Name of a further task that guards the merge.")
    ] = None,
    evals: Evals = None,
    include_path: IncludePath = None,
) -> None:
    """Print what a merge would cost at most, before it is paid; nothing is scored or written."""
    from .preview import preview

    if recipe is not None:
        recipe_alone(adapter=adapter, base=base, guard=guard)
        plan_recipe(recipe, option or [], evals, include_path)
    elif adapter:
        _needs_recipe(include_path)
        config = HiMergeConfig(**_options(option or []))
        found = preview(base, _adapters(adapter), config, guard or [])
        print_cost(Console(), found, focus=config.focus)
    else:
        raise typer.BadParameter("give a recipe, or --adapter (once per adapter)")


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="Sweep file in W&B's format.")],
    study: Annotated[
        Path, typer.Option(help="SQLite file of the study; if it is there, it is resumed.")
    ] = Path("himerge-sweep.db"),
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of the study; default: run_cap, or 20.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the study.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the best merged adapter to.")
    ] = None,
    agent: Annotated[bool, typer.Option(help="Run one trial for W&B's agent.")] = False,
    evals: Evals = None,
    include_path: IncludePath = None,
    worker: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Search options by many merges: here with Optuna, or as the program of a W&B sweep."""
    from .hi import merge_adapters_hi
    from .sweep import merger, read_sweep, run_agent, run_local

    wanted, model, folders, eval_fns = _sweep_parts(recipe, read_sweep(recipe), evals, include_path)
    names = list(folders)
    if agent:
        run_agent(wanted, merger(model, names, eval_fns))
        return
    screen = Console()
    # A journal has one owner at a time, so every worker keeps its own.
    journal = study.with_suffix(f".scores-{worker}.jsonl")
    merge = merger(model, names, eval_fns, journal=journal)

    def tell(number: int, score: float | None) -> None:
        screen.print(f"trial {number}: " + ("no score" if score is None else f"{score:.4f}"))

    further = _worker_flags(trials, evals, include_path)
    helpers = _start_workers(workers, recipe, study, further) if worker == 0 else []
    found = run_local(wanted, merge, study=study, trials=trials, seed=worker, on_trial=tell)
    if worker > 0:
        return
    if any(helper.wait() for helper in helpers):
        raise HiMergeError("a worker of the sweep failed; its reason is above. Run it again.")
    if helpers:
        found = run_local(wanted, merge, study=study, trials=1)  # nothing more to run, only look
    _print_outcome(screen, found)
    if out is not None:
        config = wanted.config(found.values)
        result = merge_adapters_hi(model, names, eval_fns, config=config, journal=journal)
        result.save(out, sources=folders)
        screen.print(f"merged adapter, plan and report: {out}", soft_wrap=True)


def _sweep_parts(
    file: Path, wanted: Sweep, evals: Path | None, include_path: Path | None
) -> tuple[Sweep, Any, Any, Any]:
    """Return (the sweep with all fixed options, model, adapter -> folder, eval functions)."""
    from .evals import load_evals
    from .folders import load_peft_model

    if wanted.recipe is not None:
        if wanted.base or wanted.adapters:
            raise ConfigError(
                f"{str(file)!r} names himerge.recipe, which says base and adapters: leave out "
                f"himerge.base and himerge.adapters."
            )
        options, model, folders, eval_fns = sweep_recipe(wanted.recipe, evals, include_path)
        return wanted.within(options), model, folders, eval_fns
    _needs_recipe(include_path)
    if wanted.base is None or not wanted.adapters:
        raise ConfigError(
            f"{str(file)!r} needs himerge.recipe, or himerge.base and himerge.adapters."
        )
    if evals is None:
        raise ConfigError("--eval is missing: the Python file that defines eval_fns.")
    build = load_evals(evals)
    model, tokenizer = load_peft_model(wanted.base, wanted.adapters)
    return wanted, model, wanted.adapters, build(tokenizer)


def _worker_flags(trials: int | None, evals: Path | None, include_path: Path | None) -> list[str]:
    given = {"--trials": trials, "--eval": evals, "--include-path": include_path}
    return [part for flag, v in given.items() if v is not None for part in (flag, str(v))]


def _start_workers(
    workers: int, recipe: Path, study: Path, further: list[str]
) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "peft_himerge", "sweep", str(recipe), "--study", str(study)]
    command += further
    return [subprocess.Popen([*command, "--worker", str(number)]) for number in range(1, workers)]


def _print_outcome(screen: Console, found: Outcome) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in found.trials.items())
    table = Table("option", "best", "importance", title=f"Best score {found.score:.4f} ({counts})")
    for option, value in found.values.items():
        share = found.importances.get(option)
        table.add_row(option, str(value), "" if share is None else f"{share:.0%}")
    screen.print(table)
    plan = MergePlan.from_json(found.plan)
    edited = {(edit.density, edit.scale) for row in plan.edits.values() for edit in row.values()}
    screen.print(f"best plan {plan.fingerprint[:16]}: {len(edited)} kinds of layer edit")


@app.command()
def demo(
    base: Annotated[
        Path | None, typer.Option(help="Folder of any causal LM; default: the registry's Gemma.")
    ] = None,
    train: Annotated[bool, typer.Option(help="Train the two adapters again first.")] = False,
    paper: Annotated[bool, typer.Option(help="Merge by the paper's own rule.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the merged adapter and report to.")
    ] = None,
    rows: Annotated[int, typer.Option(min=8, help="Validation rows per task and score.")] = 48,
    test_rows: Annotated[int, typer.Option(min=8, help="Test rows per task.")] = 248,
) -> None:
    """Merge an English and a Chinese adapter of Gemma-3-270M and show what was won."""
    from .demo.run import run

    run(base=base, train_again=train, paper=paper, out=out, rows=rows, test_rows=test_rows)


def _options(pairs: list[str]) -> dict[str, Any]:
    """Return KEY=VALUE pairs as options; values are JSON, or plain text if they are not."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, e.g. --set density=0.5.")
        try:
            options[key] = parse_json(value)
        except ConfigError:
            options[key] = value
    return options


def _adapters(pairs: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, found, folder = pair.partition("=")
        if not found or not name or not folder:
            raise ConfigError(f"--adapter {pair!r}: expected NAME=FOLDER.")
        if name in folders:
            raise ConfigError(f"--adapter names {name!r} twice.")
        folders[name] = Path(folder)
    return folders


def main() -> None:
    """Run the command line; errors are told on stderr, not as a traceback."""
    # transformers 5.23 deprecates an attribute that PEFT still reads; nothing a user can do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    try:
        app()
    except HiMergeError as exc:
        text = f"[red]error:[/red] {escape(str(exc))}"
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)
        # What the user gave is at fault where a caller would expect ValueError or ImportError.
        sys.exit(2 if isinstance(exc, (ValueError, ImportError)) else 1)
