"""`himerge report`: pages from reports that are there. 0 is success, 2 an unreadable report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import ConfigError
from .files import write_text
from .page import read_report, render_comparison, render_page

__all__ = ["report"]


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that a merge was saved to, with report.json.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="One page that shows the runs side by side.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where --compare writes its page.")] = Path(
        "comparison.html"
    ),
) -> None:
    """Write report.html again from report.json, or compare several runs on one page.

    Exit codes: 0 if all pages were written, 2 if a folder holds no readable report (then no page
    is written), 1 for anything else.
    """
    try:
        pages = (
            {out: render_comparison(folders)}
            if compare
            else {_place(folder): render_page(read_report(folder)) for folder in folders}
        )
    except ConfigError as exc:
        Console(stderr=True).print(f"error: {exc}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from None
    screen = Console()
    for path, text in pages.items():
        write_text(path, text)
        screen.print(f"report: {path}", soft_wrap=True, markup=False, highlight=False)


def _place(folder: Path) -> Path:
    return (folder if folder.is_dir() else folder.parent) / "report.html"
