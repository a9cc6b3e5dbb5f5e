"""Charts of what was decided: scores, contributions, conflicts, search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .deltas import delta_charts
from .facts import Report, Test, short_names
from .shapes import ROOM, ROW, Chart, View, category, clipped, heatmap, series, text

__all__ = ["KINDS", "STATES", "charts_of", "state_label"]

# Okabe-Ito, as in `tracking.figures`; the hatching tells the kinds apart without colour.
KINDS = {"severe": ("#D55E00", "x"), "partial": ("#E69F00", "/"), "mutual": ("#0072B2", "")}
STATES = {
    "base": "base model",
    "model_wise": "model-wise merge",
    "merged": "merged, exact",
    "exported": "exported adapter",
}


def state_label(report: Report, state: str) -> str:
    """Return what a reader calls a state."""
    return f"{state} alone" if state in report.adapters else STATES.get(state, state)


def charts_of(report: Report) -> dict[str, Chart]:
    """Return the charts of one report by id; those it holds no numbers for are left out."""
    made = [
        _test(report),
        _scores(report),
        _contributions(report),
        _conflicts(report),
        *_search(report),
    ]
    made += delta_charts(report)
    return {chart.id: chart for chart in made if chart is not None}


def _scores(report: Report) -> Chart | None:
    labels = {state: state_label(report, state) for state in report.scores}
    title = "Scores with standard errors"
    return _score_chart("scores", title, labels, report)


def _test(report: Report) -> Chart | None:
    if report.test is None:
        return None
    # What is tested is the adapter as it was written, whatever its name.
    last = {report.test.merged: STATES["exported"]}
    labels = {state: state_label(report, state) for state in report.test.scores} | last
    return _score_chart("test", "Test scores with standard errors", labels, report.test)


def _score_chart(
    name: str, title: str, labels: Mapping[str, str], held: Report | Test
) -> Chart | None:
    """Return the chart of a table of scores, a state a row; None if nothing was scored.

    Args:
        name: the chart's id.
        title: what it shows.
        labels: state -> what a reader calls it, in the order of the rows.
        held: the scores.
    """
    if not held.tasks:
        return None
    data = []
    for index, task in enumerate(held.tasks):
        errors = [held.standard_errors.get(s, {}).get(task) or 0.0 for s in labels]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(clipped(task)),
                "orientation": "h",  # what lies in one row is set apart
                "x": [held.scores[s][task] for s in labels],
                "y": [text(label) for label in labels.values()],
                "error_x": {"type": "data", "array": errors, "thickness": 1.5},
                "hovertemplate": "%{y}: %{x:.4f}<extra>%{fullData.name}</extra>",
                **series(index),
            }
        )
    layout: dict[str, Any] = {
        "yaxis": category(list(labels.values()), down=True),
        "xaxis": {"title": {"text": "score"}},
    }
    layout |= {"showlegend": True, "scattermode": "group"}
    return Chart(name, title, data, layout, 34 * len(labels) + ROOM)


def _contributions(report: Report) -> Chart | None:
    if not report.contributions:
        return None
    of = {(row.layer, row.task): row for row in report.contributions}
    layers = [label for label in report.layers if any(label == key[0] for key in of)]
    tasks = list(dict.fromkeys(row.task for row in report.contributions))
    short = short_names(layers)
    fields = {
        "gamma": ("gamma: lost by merging", "hurts"),
        "c_alone": ("alone", "helps"),
        "c_merged": ("merged", "helps"),
    }
    limits = {name: max(abs(getattr(row, name)) for row in of.values()) for name in fields}
    limits["c_alone"] = limits["c_merged"] = max(limits["c_alone"], limits["c_merged"])
    data, views = [], []
    for index, (name, (label, scale)) in enumerate(fields.items()):
        values = [
            [getattr(of[la, t], name) if (la, t) in of else None for t in tasks] for la in layers
        ]
        rows = [short[label] for label in layers]
        shown = name if name == "gamma" else "c"
        trace = heatmap(rows, tasks, values, scale, limit=limits[name] or 1.0, name=shown)
        data.append(trace | {"visible": index == 0})
        views.append(View(label, (index,)))
    layout: dict[str, Any] = {
        "yaxis": category([short[label] for label in layers], down=True, title="layer"),
        "xaxis": category(tasks, title="task"),
    }
    height = ROW * len(layers) + ROOM
    title = "Contribution of every layer to every task"
    return Chart("contributions", title, data, layout, height, tuple(views))


def _conflicts(report: Report) -> Chart | None:
    if not report.conflicts:
        return None
    short = short_names(report.layers)
    found = sorted(report.conflicts, key=lambda c: -abs(c.Gamma))
    data = []
    for kind, (colour, pattern) in KINDS.items():
        mine = [c for c in found if c.kind == kind]
        if mine:
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": f"{kind} ({len(mine)})",
                    "x": [c.Gamma for c in mine],
                    "y": [text(short.get(c.layer, c.layer)) for c in mine],
                    "customdata": [text(c.done) for c in mine],
                    "hovertemplate": f"layer %{{y}}: %{{x:+.4f}}, {kind}<br>%{{customdata}}"
                    "<extra></extra>",
                    "marker": {
                        "color": colour,
                        "pattern": {"shape": pattern, "fillmode": "overlay", "solidity": 0.25},
                    },
                }
            )
    order = [short.get(c.layer, c.layer) for c in found]
    layout: dict[str, Any] = {
        "yaxis": category(order, down=True, title="layer, largest |Gamma| first"),
        "xaxis": {"title": {"text": "Gamma: right, merging hurts"}, "zeroline": True},
        "barmode": "overlay",
        "showlegend": True,
    }
    title = "Layers by |Gamma|, coloured by kind of conflict"
    return Chart("conflicts", title, data, layout, ROW * len(found) + ROOM)


def _search(report: Report) -> list[Chart]:
    made = []
    for number, name in enumerate(dict.fromkeys(t.adapter for t in report.search)):
        value = {(t.density, t.scale): t.value for t in report.search if t.adapter == name}
        densities, scales = sorted({d for d, _ in value}), sorted({s for _, s in value})
        chosen = report.edits.get(name)
        at = (chosen.density, chosen.scale) if chosen is not None else None
        if len(densities) * len(scales) <= 4 * len(value):
            made.append(_search_cells(f"search-{number}", name, value, densities, scales, at))
        else:
            made.append(_search_points(f"search-{number}", name, value, at))
    return made


def _search_cells(
    name_id: str,
    name: str,
    value: Mapping[tuple[float, float], float],
    densities: Sequence[float],
    scales: Sequence[float],
    at: tuple[float, float] | None,
) -> Chart:
    rows, columns = [f"{d:g}" for d in densities], [f"{s:g}" for s in scales]
    cells = [[value.get((d, s)) for s in scales] for d in densities]
    data = [heatmap(rows, columns, cells, "amount", shape=".2f", name="score")]
    if at is not None and at in value:
        data.append(_chosen([f"{at[1]:g}"], [f"{at[0]:g}"]))
    layout: dict[str, Any] = {
        "xaxis": category(columns, title="scale"),
        "yaxis": category(rows, title="density (kept share)") | {"dtick": 1},
    }
    height = max(240, 30 * len(rows) + ROOM + 20)
    return Chart(name_id, f"Search for {name}", data, layout, height)


def _search_points(
    name_id: str,
    name: str,
    value: Mapping[tuple[float, float], float],
    at: tuple[float, float] | None,
) -> Chart:
    points: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [s for _, s in value],
        "y": [d for d, _ in value],
        "text": [f"{v:.4f}" for v in value.values()],
        "hovertemplate": "density %{y:.3f}, scale %{x:.3f}: %{text}<extra></extra>",
        "meta": {"scale": "amount"},
        "marker": {
            "color": list(value.values()),
            "size": 12,
            "line": {"width": 1, "color": "#888888"},
            "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": "score"}},
        },
    }
    data = [points] + ([_chosen([at[1]], [at[0]])] if at is not None and at in value else [])
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "scale"}},
        "yaxis": {"title": {"text": "density (kept share)"}},
    }
    return Chart(name_id, f"Search for {name}", data, layout, 320)


def _chosen(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "chosen",
        "x": list(x),
        "y": list(y),
        "marker": {"symbol": "circle-open", "size": 34, "color": "#E69F00", "line": {"width": 3}},
        "hovertemplate": "chosen: density %{y}, scale %{x}<extra></extra>",
    }
