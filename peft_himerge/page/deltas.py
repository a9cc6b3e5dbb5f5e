"""Charts of the deltas themselves: size, direction and signs per layer, spectrum, export error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..layers import OUTSIDE, layer_of
from .facts import Pair, Report, short_names
from .shapes import ROOM, ROW, Chart, View, category, heatmap, lines

__all__ = ["delta_charts", "merged_norms", "pair_name"]

_MOST_LINES = 6  # more pairs than that are cells, not lines


def delta_charts(report: Report) -> list[Chart | None]:
    """Return the charts of the deltas; None for what the report holds no numbers of."""
    return [_norms(report), *_pairs(report), _export_errors(report), _spectra(report)]


def merged_norms(report: Report) -> dict[str, float]:
    """Return layer -> Frobenius norm of the exact merged delta; {} if the report holds none."""
    squares: dict[str, float] = {}
    for module in report.export.modules:
        if module.norm is not None:
            layer = layer_of(module.module)
            squares[layer] = squares.get(layer, 0.0) + module.norm**2
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def _norms(report: Report) -> Chart | None:
    if report.geometry is None or not report.geometry.layers:
        return None
    layers = report.geometry.layers
    short = short_names([layer.layer for layer in layers])
    merged = merged_norms(report)
    rows: dict[str, list[float | None]] = {
        name: [layer.norms.get(name) for layer in layers] for name in report.adapters
    }
    if merged:
        rows["merged (exact)"] = [merged.get(layer.layer) for layer in layers]
    names = [short[layer.layer] for layer in layers]
    layout: dict[str, Any] = {
        "xaxis": category(names, title="layer"),
        "yaxis": {"title": {"text": "Frobenius norm"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    return Chart("norms", "Size of the deltas", lines(names, rows, ".4f"), layout, 320)


def pair_name(pair: Pair) -> str:
    """Return what a reader calls a pair of adapters."""
    return " · ".join(pair.adapters)


def _pairs(report: Report) -> list[Chart]:
    if report.geometry is None or not any(layer.pairs for layer in report.geometry.layers):
        return []
    return [
        _pair_chart(
            report, "cosine", "Cosine of the deltas", "cosine", lambda p: p.cosine, (-1.0, 1.0)
        ),
        _pair_chart(
            report,
            "signs",
            "Entries of equal sign",
            "share",
            lambda p: p.sign_agreement,
            (0.0, 1.0),
        ),
    ]


def _pair_chart(
    report: Report,
    name: str,
    title: str,
    unit: str,
    value: Callable[[Pair], float | None],
    ends: tuple[float, float],
) -> Chart:
    assert report.geometry is not None
    layers = report.geometry.layers
    short = short_names([layer.layer for layer in layers])
    names = [short[layer.layer] for layer in layers]
    labels = dict.fromkeys(pair_name(pair) for layer in layers for pair in layer.pairs)
    rows: dict[str, list[float | None]] = {}
    for label in labels:
        of = [{pair_name(pair): value(pair) for pair in layer.pairs} for layer in layers]
        rows[label] = [found.get(label) for found in of]
    if len(rows) > _MOST_LINES:
        cells = heatmap(list(rows), names, list(rows.values()), "helps", name=unit)
        cells |= {"zmin": ends[0], "zmax": ends[1]}
        layout: dict[str, Any] = {
            "xaxis": category(names, title="layer"),
            "yaxis": category(list(rows), down=True),
        }
        return Chart(name, title, [cells], layout, ROW * len(rows) + ROOM)
    middle = (ends[0] + ends[1]) / 2
    layout = {
        "xaxis": category(names, title="layer"),
        "yaxis": {"title": {"text": unit}},
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                **{"x0": 0, "x1": 1, "y0": middle, "y1": middle},
                "line": {"dash": "dot", "width": 1, "color": "#888888"},
            }
        ],
        "showlegend": True,
    }
    return Chart(name, title, lines(names, rows, ".4f"), layout, 320)


def _inside(module: str) -> str:
    """Return the module's path inside its layer."""
    layer = layer_of(module)
    return module if layer == OUTSIDE else module.removeprefix(f"{layer}.") or module


def _export_errors(report: Report) -> Chart | None:
    modules = report.export.modules
    if not modules or max(m.relative_error for m in modules) == 0.0:
        return None  # nothing was cut: the text says so
    error = {(layer_of(m.module), _inside(m.module)): m.relative_error for m in modules}
    layers = [label for label in report.layers if any(label == key[0] for key in error)]
    short = short_names(layers)
    kinds = sorted({kind for _, kind in error})
    names = [short[label] for label in layers]
    cells = [[error.get((label, kind)) for kind in kinds] for label in layers]
    most = max(error.values())
    data = [heatmap(names, kinds, cells, "amount", name="error") | {"zmin": 0.0, "zmax": most}]
    layout: dict[str, Any] = {
        "yaxis": category(names, down=True, title="layer"),
        "xaxis": category(kinds),
    }
    title = "Relative error of the exported deltas"
    return Chart("errors", title, data, layout, ROW * len(layers) + ROOM + 60)


def _spectra(report: Report) -> Chart | None:
    found = report.geometry.singular_values if report.geometry is not None else {}
    known = {module: values for module, values in found.items() if values}
    if not known:
        return None
    of_layer: dict[str, dict[str, list[float]]] = {}
    for module, values in known.items():
        of_layer.setdefault(layer_of(module), {})[_inside(module)] = values
    layers = [label for label in report.layers if label in of_layer]
    short = short_names(layers)
    data: list[dict[str, Any]] = []
    views = []
    most = max(len(values) for values in known.values())
    for index, label in enumerate(layers):
        rows = of_layer[label]
        first = len(data)
        longest = max(len(values) for values in rows.values())
        numbers = [str(i + 1) for i in range(longest)]
        some = lines(numbers, rows, ".3e", what="value")
        data += [trace | {"visible": index == 0} for trace in some]
        views.append(View(f"layer {short[label]}", tuple(range(first, len(data)))))
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "number, largest first"}} | ({"dtick": 1} if most < 17 else {}),
        "yaxis": {"title": {"text": "singular value"}, "type": "log"}
        | {"dtick": "D2", "tickformat": ".1g"},
        "showlegend": True,
    }
    title = "Singular values of the exported deltas"
    return Chart("spectra", title, data, layout, 360, tuple(views))
