"""Charts and tables -> one HTML file, by Jinja2; plotly's script is put in, so it opens offline."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError
from .charts import charts_of
from .comparing import comparison_charts, comparison_tables, run_names
from .facts import Report, read_report, short_names
from .tables import mean, tables_of

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["HOW_TO_GET_IT", "available", "render_comparison", "render_page"]

HOW_TO_GET_IT = "the page needs Jinja2 and plotly: pip install 'peft-himerge[report]'"


def available() -> bool:
    """Return True if the page can be made: Jinja2 and plotly are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("jinja2", "plotly"))


@functools.cache  # compiling templates takes longer than filling them
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("peft_himerge.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, charts: Mapping[str, Any], **values: Any) -> str:
    if not available():
        raise MissingExtraError(f"{HOW_TO_GET_IT}.")
    from plotly.offline import get_plotlyjs

    return (
        _environment()
        .get_template(template)
        .render(
            charts=charts,
            specs=[chart.to_dict() for chart in charts.values()],
            plotly=get_plotlyjs(),
            **values,
        )
    )


def render_page(report: Report) -> str:
    """Return report.html: one file of about 5 MB that opens from disk without a network.

    Raises:
        MissingExtraError: Jinja2 or plotly is not installed.
    """
    labels = report.layers
    short = short_names(labels)
    shortened = [label for label in labels if short[label] != label]
    means = {state: mean(list(row.values())) for state, row in report.scores.items()}
    shares = [report.share_kept("exported", task) for task in report.tasks] if means else []
    tested = {}
    if report.test is not None and report.test.scores:
        held = report.test
        tested = {state: mean(list(row.values())) for state, row in held.scores.items()}
        shares = [held.share_kept(held.merged, task) for task in held.tasks]
    kept = mean([share for share in shares if share is not None])
    kinds = {kind: 0 for kind in ("severe", "partial", "mutual")}
    for conflict in report.conflicts:
        kinds[conflict.kind] += 1
    return _render(
        "report.html",
        charts_of(report),
        report=report,
        tables=tables_of(report),
        means=means,
        tested=tested,
        kept=kept,
        kinds=kinds,
        head=shortened[0].removesuffix(short[shortened[0]]) if shortened else "",
    )


def render_comparison(folders: Sequence[str | Path]) -> str:
    """Return one page that shows the reports of several folders side by side.

    Raises:
        ConfigError: fewer than two folders, or one without a readable report.
        MissingExtraError: Jinja2 or plotly is not installed.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ConfigError(f"a comparison needs at least two folders, got {len(paths)}.")
    runs = dict(zip(run_names(paths), map(read_report, paths), strict=True))
    return _render(
        "compare.html", comparison_charts(runs), runs=runs, tables=comparison_tables(runs)
    )
