"""Several runs side by side: scores, their differences, kinds per layer, what was set otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import state_label
from .facts import Report, short_names
from .shapes import ROOM, ROW, Chart, View, category, clipped, series, text
from .tables import Cell, Table, plain, signed, table, with_error

__all__ = ["comparison_charts", "comparison_tables", "run_names"]

_STATES = ("base", "model_wise", "merged", "exported")


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name per folder: its last part, with as many parents as tell all apart."""
    full = [folder.absolute() for folder in folders]
    for count in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-count:]) for path in full]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(map(str, folders), 1)]


def comparison_charts(runs: Mapping[str, Report]) -> dict[str, Chart]:
    """Return the charts of the comparison by id."""
    made = [_scores(runs), _gammas(runs)]
    return {chart.id: chart for chart in made if chart is not None}


def _tasks(runs: Mapping[str, Report]) -> list[str]:
    return list(dict.fromkeys(task for report in runs.values() for task in report.tasks))


def _states(runs: Mapping[str, Report]) -> list[str]:
    """Return all states: base, adapters alone, then the merged ones, and any others."""
    found = dict.fromkeys(state for report in runs.values() for state in report.scores)
    alone = [state for state in found if state not in _STATES]
    return [s for s in ("base", *alone, *_STATES[1:]) if s in found]


def _label(runs: Mapping[str, Report], state: str) -> str:
    return state_label(next(r for r in runs.values() if state in r.scores), state)


def _scores(runs: Mapping[str, Report]) -> Chart | None:
    states = _states(runs)
    if not states:
        return None
    data: list[dict[str, Any]] = []
    views = []
    labels = [_label(runs, state) for state in states]
    for number, task in enumerate(_tasks(runs)):
        first = len(data)
        for index, (name, report) in enumerate(runs.items()):
            held = [s for s in states if task in report.scores.get(s, {})]
            errors = [report.standard_errors.get(s, {}).get(task) or 0.0 for s in held]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": text(clipped(name)),
                    "orientation": "h",
                    "x": [report.scores[s][task] for s in held],
                    "y": [text(_label(runs, s)) for s in held],
                    "error_x": {"type": "data", "array": errors, "thickness": 1.5},
                    "hovertemplate": "%{y}: %{x:.4f}<extra>%{fullData.name}</extra>",
                    "visible": number == 0,
                    **series(index),
                }
            )
        views.append(View(task, tuple(range(first, len(data)))))
    layout: dict[str, Any] = {
        "yaxis": category(labels, down=True),
        "xaxis": {"title": {"text": "score"}},
    }
    layout |= {"showlegend": True, "scattermode": "group"}
    height = 40 * len(states) + ROOM
    return Chart("scores", "Scores with standard errors", data, layout, height, tuple(views))


def _layers(runs: Mapping[str, Report]) -> list[str]:
    return list(dict.fromkeys(label for report in runs.values() for label in report.layers))


def _gammas(runs: Mapping[str, Report]) -> Chart | None:
    if not any(report.conflicts for report in runs.values()):
        return None
    layers = _layers(runs)
    short = short_names(layers)
    data = []
    for index, (name, report) in enumerate(runs.items()):
        Gamma = {c.layer: c.Gamma for c in report.conflicts}
        held = [label for label in layers if label in Gamma]
        shown = series(index)["marker"]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": text(clipped(name)),
                "x": [Gamma[label] for label in held],
                "y": [text(short[label]) for label in held],
                "hovertemplate": "layer %{y}: %{x:+.4f}<extra>%{fullData.name}</extra>",
                "marker": {"color": shown["color"]},
            }
        )
    layout: dict[str, Any] = {
        "yaxis": category([short[label] for label in layers], down=True, title="layer"),
        "xaxis": {"title": {"text": "Gamma: right, merging hurts"}, "zeroline": True},
        "barmode": "group",
        "showlegend": True,
    }
    height = max(ROW, 10 * len(runs) + 6) * len(layers) + ROOM
    return Chart("gammas", "Gamma of every layer", data, layout, height)


def comparison_tables(runs: Mapping[str, Report]) -> dict[str, Table]:
    """Return the tables of the comparison by name; those without rows are left out."""
    made = {
        "scores": _score_table(runs),
        "conflicts": _conflict_table(runs),
        "differences": _difference_table(runs),
    }
    return {name: found for name, found in made.items() if found.rows}


def _score_table(runs: Mapping[str, Report]) -> Table:
    first, *others = runs
    rows = []
    for state in _states(runs):
        for task in _tasks(runs):
            values = {n: r.scores.get(state, {}).get(task) for n, r in runs.items()}
            cells = [Cell(_label(runs, state)), Cell(task)]
            for name, report in runs.items():
                se = report.standard_errors.get(state, {}).get(task)
                value, start = values[name], values[first]
                change = None if value is None or start is None else value - start
                cells.append(Cell(with_error(value, se), "" if name == first else signed(change)))
            rows.append(cells)
    title = f"Scores, and difference from {first}" if others else "Scores"
    return table(title, ["state", "task", *runs], rows, heads=2)


def _conflict_table(runs: Mapping[str, Report]) -> Table:
    short = short_names(_layers(runs))
    rows = []
    for label in _layers(runs):
        found = [{c.layer: c for c in report.conflicts}.get(label) for report in runs.values()]
        if any(found):
            cells = [
                Cell("–") if c is None else Cell(c.kind, f"{c.Gamma:+.3f}, {c.done}", c.kind)
                for c in found
            ]
            rows.append([Cell(short[label]), *cells])
    return table("Kind of conflict, Gamma and what was done", ["layer", *runs], rows, heads=9)


def _settings(report: Report) -> dict[str, str]:
    """Return everything that a run was told, or decided for the whole model, in words."""
    found = {f"option {name}": plain(value) for name, value in report.options.items()}
    found["prune_scope"] = report.plan.prune_scope
    for name, edit in report.plan.adapters.items():
        found[f"density of {name}"] = f"{edit.density:g}"
        found[f"scale of {name}"] = f"{edit.scale:g}"
    found["exported rank"] = str(report.export.rank)
    found["export error"] = f"{report.export.relative_error:.2e}"
    found["scores computed"] = str(report.cost.scores)
    found["seconds"] = f"{report.cost.seconds:.1f}"
    found["plan"] = report.plan.fingerprint[:16]
    return found | {f"version of {name}": value for name, value in report.versions.items()}


def _difference_table(runs: Mapping[str, Report]) -> Table:
    all_settings = [_settings(report) for report in runs.values()]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    rows = [
        [name, *(settings.get(name, "–") for settings in all_settings)]
        for name in names
        if len({settings.get(name) for settings in all_settings}) > 1
    ]
    return table("What differs", ["", *runs], rows, heads=9)
