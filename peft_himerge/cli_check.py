"""`himerge check`: will other engines read this adapter folder? Exit code 0 is yes, 1 no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import ConfigError
from .portable import ENGINES, Report, check_adapter

__all__ = ["check"]

_COLORS = {"error": "red", "warning": "yellow"}


def check(
    folder: Annotated[Path, typer.Argument(help="Adapter folder in PEFT's layout.")],
    engines: Annotated[str, typer.Option("--for", help="Engines, with commas between.")] = ",".join(
        ENGINES
    ),
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, for rules about tied weights.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say whether vLLM, llama.cpp and PEFT will read an adapter folder as the same model.

    Only the config and the header of the weights are read. Exit code 0: nothing but warnings;
    1: an engine would refuse it or, without a word, serve another model; 2: nothing to check.
    """
    names = [name.strip() for name in engines.split(",") if name.strip()]
    try:
        report = check_adapter(folder, names, base=base)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    screen = Console()
    if report.findings:
        table = Table(show_lines=True)
        for title in ("", "rule", "engines", "found", "fix"):
            table.add_column(title, overflow="fold")
        for finding in report.findings:
            color = _COLORS[finding.severity]
            cells = (finding.rule, ", ".join(finding.engines), finding.found, finding.fix)
            table.add_row(f"[{color}]{finding.severity}[/{color}]", *map(escape, cells))
        screen.print(table)
    errors = sum(finding.severity == "error" for finding in report.findings)
    verdict = "portable" if report.ok else "NOT portable"
    screen.print(
        f"{verdict} to {', '.join(report.engines)}: {errors} errors, "
        f"{len(report.findings) - errors} warnings",
        soft_wrap=True,
    )
