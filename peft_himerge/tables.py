"""Tables on a terminal: the scores of a merge, and what was done about its layers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .report import describe_edit, score_rows
from .result import MergeResult

__all__ = ["print_conflicts", "print_scores"]


def print_scores(console: Console, result: MergeResult, title: str = "Scores") -> None:
    """Print state x task with standard errors."""
    header, rows = score_rows(result.scores, result.standard_errors)
    table = Table(*header, title=title)
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
