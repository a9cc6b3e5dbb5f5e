"""`himerge`: parse, call, print, exit code. 0 is success, 1 a refused merge, 2 a wrong call."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import HiMergeConfig
from .errors import ConfigError, HiMergeError
from .hi import merge_adapters_hi
from .progress import ProgressBar
from .report import describe_edit, score_rows
from .result import MergeResult

__all__ = ["app", "main", "print_conflicts", "print_scores"]

app = typer.Typer(
    help="Merge LoRA adapters by Hi-Merging.", no_args_is_help=True, add_completion=False
)


@app.command()
def merge(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapter: Annotated[
        list[str], typer.Option(help="NAME=FOLDER of one adapter; give it once per adapter.")
    ],
    evals: Annotated[
        Path,
        typer.Option(
            "--eval",
            help="Python file that defines eval_fns(tokenizer) -> {adapter name: function(model)}.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the merged adapter to.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of one HiMergeConfig option, e.g. density=0.5."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the merged adapter.")] = "merged",
    merged: Annotated[
        Path | None, typer.Option(help="Also write base + merged delta as a full model here.")
    ] = None,
) -> None:
    """Merge adapters from folders and write one adapter."""
    from .folders import load_peft_model

    console = Console(stderr=True)
    config = HiMergeConfig(**_options(option or []))
    folders = _adapters(adapter)
    build = _load_eval_fns(evals)
    model, tokenizer = load_peft_model(base, folders)
    eval_fns = build(tokenizer)
    with ProgressBar(console) as bar:
        result = merge_adapters_hi(
            model, list(folders), eval_fns, adapter_name=name, config=config, callbacks=[bar]
        )
    result.save(out)
    if merged is not None:
        result.save_merged(base, merged)
    screen = Console()
    print_conflicts(screen, result)
    print_scores(screen, result)
    screen.print(f"merged adapter, plan and report: {out}", soft_wrap=True)


@app.command()
def demo(
    base: Annotated[
        Path | None, typer.Option(help="Folder of any causal LM; default: the registry's Gemma.")
    ] = None,
    train: Annotated[bool, typer.Option(help="Train the two adapters again first.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the merged adapter and report to.")
    ] = None,
    rows: Annotated[int, typer.Option(min=8, help="Validation rows per task and score.")] = 32,
    test_rows: Annotated[int, typer.Option(min=8, help="Test rows per task.")] = 200,
) -> None:
    """Merge an English and a Chinese adapter of Gemma-3-270M and show what was won."""
    from .demo.run import run

    run(base=base, train_again=train, out=out, rows=rows, test_rows=test_rows)


def print_scores(console: Console, result: MergeResult) -> None:
    """Print state x task with standard errors."""
    header, rows = score_rows(result.scores, result.standard_errors)
    table = Table(*header, title="Scores")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_conflicts(console: Console, result: MergeResult) -> None:
    """Print every layer, worst first, and what was done about it."""
    table = Table("layer", "kind", "Gamma", "done", title="Layers, worst first")
    for resolution in result.conflicts:
        found = resolution.conflict
        table.add_row(
            found.layer, found.kind.value, f"{found.Gamma:+.4f}", describe_edit(resolution)
        )
    console.print(table)


def _options(pairs: list[str]) -> dict[str, Any]:
    """Return KEY=VALUE pairs as options; values are JSON, or plain text if they are not."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, e.g. --set density=0.5.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
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


def _load_eval_fns(path: Path) -> Any:
    """Import the user's file and return its `eval_fns`; the only code that is run from a path."""
    if not path.is_file():
        raise ConfigError(f"--eval {str(path)!r} is not a file.")
    spec = importlib.util.spec_from_file_location("himerge_user_evals", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--eval {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "eval_fns", None)
    if isinstance(build, Mapping):
        return lambda _tokenizer: build
    if not callable(build):
        raise ConfigError(
            f"--eval {str(path)!r} defines no eval_fns(tokenizer) that returns "
            f"{{adapter name: function of the model}}."
        )
    return build


def main() -> None:
    """Run the command line; errors are one sentence on stderr, not a traceback."""
    try:
        app()
    except HiMergeError as exc:
        text = f"[red]error:[/red] {escape(str(exc))}"
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)
        sys.exit(1)
