"""Pieces of charts as plain data for plotly: which bars and cells, where.

A chart holds `data` and `layout` in plotly's terms, a height, and views: what can be switched.
Colours of the theme come later: `meta.scale` of a trace names those that the page's script puts in
for light and dark: "hurts" (positive is red), "helps" (positive is blue), "amount".
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ROOM",
    "ROW",
    "Chart",
    "View",
    "category",
    "clipped",
    "heatmap",
    "lines",
    "series",
    "text",
]

ROW = 24  # pixels of one row of a heatmap or bar chart
ROOM = 90  # pixels for axes and legend
# Okabe-Ito: told apart with every kind of colour vision; symbols and dashes do without any.
_SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
_LONGEST = 22  # characters of a label in a chart
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")


@dataclass(frozen=True, slots=True)
class View:
    """One choice of a chart that can be switched: its label and the traces it shows."""

    label: str
    traces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        id: of its element in the page.
        title: what it shows, in words.
        data: plotly traces.
        layout: plotly layout.
        height: pixels.
        views: empty if there is nothing to switch.
    """

    id: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    views: tuple[View, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        views = [{"label": view.label, "traces": list(view.traces)} for view in self.views]
        return {
            "id": self.id,
            "data": self.data,
            "layout": self.layout,
            "height": self.height,
            "views": views,
        }


def text(name: str) -> str:
    """Return a name so that plotly, which reads some HTML, shows it as it is."""
    return html.escape(name, quote=False)


def clipped(name: str) -> str:
    """Return a name short enough for a label, its middle left out; tables hold the whole one."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 10]}…{name[-9:]}"


def category(names: Sequence[str], *, down: bool = False, title: str = "") -> dict[str, Any]:
    """Return an axis of names in this order; `down` puts the first one at the top."""
    order = [text(name) for name in names]
    axis = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": order,
        "range": [len(order) - 0.5, -0.5] if down else [-0.5, len(order) - 0.5],
        "title": {"text": title},
    }
    if any(len(name) > _LONGEST for name in names):
        shown = [text(clipped(name)) for name in names]
        return axis | {"tickmode": "array", "tickvals": order, "ticktext": shown}
    return axis | ({"dtick": 1} if down or len(order) <= 24 else {})


def series(index: int) -> dict[str, Any]:
    """Return the colour and symbol of the line or points with this number."""
    colour, symbol = _SERIES[index % len(_SERIES)], _SYMBOLS[index % len(_SYMBOLS)]
    return {"marker": {"color": colour, "symbol": symbol, "size": 9}}


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    scale: str,
    *,
    limit: float | None = None,
    shape: str = ".3f",
    name: str = "",
) -> dict[str, Any]:
    """Return a heatmap trace; `limit` makes its colours symmetric around 0."""
    texts = [["" if v is None else format(v, shape) for v in row] for row in values]
    trace = {
        "type": "heatmap",
        "x": [text(c) for c in columns],
        "y": [text(r) for r in rows],
        "z": [list(row) for row in values],
        "text": texts,
        "hovertemplate": f"%{{y}}, %{{x}}: %{{text}}<extra>{name}</extra>",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "meta": {"scale": scale},
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": name}},
    }
    if len(columns) <= 8:
        trace["texttemplate"] = "%{text}"
    if limit is not None:
        trace |= {"zmin": -limit, "zmax": limit}
    return trace


def lines(
    x: Sequence[str], rows: Mapping[str, Sequence[float | None]], shape: str, what: str = "layer"
) -> list[dict[str, Any]]:
    """Return one line per name; `shape` is how values are written, `what` what `x` counts."""
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": text(clipped(name)),
            "x": [text(label) for label in x],
            "y": list(values),
            "line": {"dash": _DASHES[index % len(_DASHES)], "width": 2},
            "hovertemplate": f"{what} %{{x}}: %{{y:{shape}}}<extra>%{{fullData.name}}</extra>",
            **series(index),
        }
        for index, (name, values) in enumerate(rows.items())
    ]
