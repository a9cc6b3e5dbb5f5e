"""Several runs side by side: scores, their differences, kinds per layer, what was set otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charts import STATES, state_label
from .deltas import merged_norms
from .facts import Report, Test, short_names
from .shapes import ROOM, ROW, Chart, View, category, clipped, lines, series, text
from .tables import Cell, Table, plain, settings, signed, table, with_error

__all__ = ["comparison_charts", "comparison_tables", "run_names"]


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
    title = "cores with standard errors"
    made = [
        _scores("test", f"Test s{title}", _tested(runs)),
        _scores("scores", f"S{title}", _scored(runs)),
        _gammas(runs),
        _norms(runs),
    ]
    return {chart.id: chart for chart in made if chart is not None}


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores of one run, by what a reader calls a state: label -> task -> score, its error."""

    values: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float | None]]


def _scored(runs: Mapping[str, Report]) -> dict[str, _Scores]:
    found = {}
    for name, report in runs.items():
        labels = {state: state_label(report, state) for state in report.scores}
        found[name] = _labelled(labels, report.scores, report.standard_errors)
    return found


def _tested(runs: Mapping[str, Report]) -> dict[str, _Scores]:
    found = {}
    for name, report in runs.items():
        held = report.test or Test(scores={})
        labels = {state: state_label(report, state) for state in held.scores}
        if held.scores:
            # The merged adapters may have names of their own, and are what is compared.
            labels[held.merged] = STATES["exported"]
        found[name] = _labelled(labels, held.scores, held.standard_errors)
    return found


def _labelled(
    labels: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float | None]],
) -> _Scores:
    return _Scores(
        {label: scores[state] for state, label in labels.items()},
        {label: errors.get(state, {}) for state, label in labels.items()},
    )


def _tasks(held: Mapping[str, _Scores]) -> list[str]:
    found: dict[str, None] = {}
    for one in held.values():
        for row in one.values.values():
            found.update(dict.fromkeys(row))
    return list(found)


def _states(held: Mapping[str, _Scores]) -> list[str]:
    """Return the labels of all states: base, adapters alone, then the merged ones."""
    found = dict.fromkeys(label for one in held.values() for label in one.values)
    first, *merged = STATES.values()
    alone = [label for label in found if label not in STATES.values()]
    return [label for label in (first, *alone, *merged) if label in found]


def _scores(name: str, title: str, held: Mapping[str, _Scores]) -> Chart | None:
    states = _states(held)
    if not states:
        return None
    data: list[dict[str, Any]] = []
    views = []
    for number, task in enumerate(_tasks(held)):
        first = len(data)
        for index, (run, one) in enumerate(held.items()):
            rows = [label for label in states if task in one.values.get(label, {})]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": text(clipped(run)),
                    "orientation": "h",
                    "x": [one.values[label][task] for label in rows],
                    "y": [text(label) for label in rows],
                    "error_x": {
                        "type": "data",
                        "array": [one.errors[label].get(task) or 0.0 for label in rows],
                        "thickness": 1.5,
                    },
                    "hovertemplate": "%{y}: %{x:.4f}<extra>%{fullData.name}</extra>",
                    "visible": number == 0,
                    **series(index),
                }
            )
        views.append(View(task, tuple(range(first, len(data)))))
    layout: dict[str, Any] = {
        "yaxis": category(states, down=True),
        "xaxis": {"title": {"text": "score"}},
    }
    layout |= {"showlegend": True, "scattermode": "group"}
    height = 40 * len(states) + ROOM
    return Chart(name, title, data, layout, height, tuple(views))


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


def _norms(runs: Mapping[str, Report]) -> Chart | None:
    found = {name: merged_norms(report) for name, report in runs.items()}
    layers = [label for label in _layers(runs) if any(label in norms for norms in found.values())]
    if not layers:
        return None
    short = short_names(layers)
    rows = {name: [norms.get(la) for la in layers] for name, norms in found.items() if norms}
    names = [short[label] for label in layers]
    layout: dict[str, Any] = {
        "xaxis": category(names, title="layer"),
        "yaxis": {"title": {"text": "Frobenius norm"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    return Chart("norms", "Size of the merged deltas", lines(names, rows, ".4f"), layout, 320)


def comparison_tables(runs: Mapping[str, Report]) -> dict[str, Table]:
    """Return the tables of the comparison by name; those without rows are left out."""
    made = {
        "test": _score_table("Test scores", _tested(runs)),
        "scores": _score_table("Scores", _scored(runs)),
        "conflicts": _conflict_table(runs),
        "norms": _norm_table(runs),
        "differences": _difference_table(runs),
    }
    return {name: found for name, found in made.items() if found.rows}


def _score_table(title: str, held: Mapping[str, _Scores]) -> Table:
    first, *others = held
    rows = []
    for label in _states(held):
        for task in _tasks(held):
            values = {run: one.values.get(label, {}).get(task) for run, one in held.items()}
            if not any(value is not None for value in values.values()):
                continue
            cells = [Cell(label), Cell(task)]
            for run, one in held.items():
                se = one.errors.get(label, {}).get(task)
                value, start = values[run], values[first]
                change = None if value is None or start is None else value - start
                note = "" if run == first or value is None else signed(change)
                cells.append(Cell(with_error(value, se), note))
            rows.append(cells)
    title = f"{title}, and difference from {first}" if others else title
    return table(title, ["state", "task", *held], rows, heads=2)


def _norm_table(runs: Mapping[str, Report]) -> Table:
    short = short_names(_layers(runs))
    found = [merged_norms(report) for report in runs.values()]
    rows = [
        [short[label], *(with_error(norms.get(label), shape=".4g") for norms in found)]
        for label in _layers(runs)
        if any(label in norms for norms in found)
    ]
    title = "Frobenius norm of the merged deltas"
    return table(title, ["layer", *runs], rows, folded=True)


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
    found = {"method": report.method.title}
    found |= {f"option {name}": plain(value) for name, value in settings(report).items()}
    found |= {f"weight of {name}": f"{value:g}" for name, value in report.weights.items()}
    if report.plan is not None:
        found["prune_scope"] = report.plan.prune_scope
        found["plan"] = report.plan.fingerprint[:16]
    for name, edit in report.edits.items():
        found[f"density of {name}"] = f"{edit.density:g}"
        found[f"scale of {name}"] = f"{edit.scale:g}"
    found["exported rank"] = str(report.export.rank)
    found["export error"] = f"{report.export.relative_error:.2e}"
    found["scores computed"] = str(report.cost.scores)
    found["seconds"] = f"{report.cost.seconds:.1f}"
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
