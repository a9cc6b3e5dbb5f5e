"""Pictures of a merge, drawn from its record: layer x task heatmap, and Gamma of every layer.

matplotlib is optional: without it there are no pictures, and everything else goes on.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from .book import Round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["available", "conflict_chart", "heatmap", "overview", "pixels"]

# Okabe-Ito: told apart with every kind of colour vision.
_COLOURS = {"severe": "#D55E00", "partial": "#E69F00", "mutual": "#0072B2"}


def available() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Figure:
    # The object-oriented interface: no pyplot, so no backend and no global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pixels(figure: Figure) -> Any:
    """Return the drawn figure as an array (height, width, 3) of bytes."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def heatmap(done: Round) -> Figure:
    """Return gamma of every layer and task: red where merging weakened the layer."""
    layers = list(dict.fromkeys(row.layer for row in done.contributions))
    figure = _figure(2.5 + 0.9 * len(done.adapters), 1.4 + 0.22 * len(layers))
    _draw_heatmap(figure.add_subplot(), done, layers)
    return figure


def conflict_chart(done: Round) -> Figure:
    """Return Gamma of every layer, coloured by the kind of conflict."""
    figure = _figure(5.0, 1.4 + 0.22 * len(done.conflicts))
    _draw_conflicts(figure.add_subplot(), done)
    return figure


def overview(done: Round) -> Figure:
    """Return scores, heatmap and conflicts side by side, as a dashboard shows them."""
    layers = list(dict.fromkeys(row.layer for row in done.contributions))
    figure = _figure(13.0, 1.8 + 0.26 * max(8, len(layers)))
    left, middle, right = figure.subplots(1, 3)
    _draw_scores(left, done)
    _draw_heatmap(middle, done, layers)
    _draw_conflicts(right, done)
    where = "" if done.global_step is None else f", step {done.global_step}"
    figure.suptitle(f"Hi-Merging, merge {done.round}{where}")
    return figure


def _draw_heatmap(axes: Any, done: Round, layers: list[str]) -> None:
    tasks = list(dict.fromkeys(row.task for row in done.contributions))
    gamma = {(row.layer, row.task): row.gamma for row in done.contributions}
    values = [[gamma[layer, task] for task in tasks] for layer in layers]
    limit = max((abs(v) for row in values for v in row), default=0.0) or 1.0
    image = axes.imshow(values or [[0.0]], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_title("gamma: red = merging hurts")
    axes.figure.colorbar(image, ax=axes)


def _draw_conflicts(axes: Any, done: Round) -> None:
    order = list(dict.fromkeys(row.layer for row in done.contributions))
    found = sorted((r.conflict for r in done.conflicts), key=lambda c: order.index(c.layer))
    axes.barh(
        [c.layer for c in found],
        [c.Gamma for c in found],
        color=[_COLOURS[c.kind.value] for c in found],
    )
    for kind, colour in _COLOURS.items():
        axes.bar(0, 0, color=colour, label=f"{kind}: {done.kinds[kind]}")
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.legend()
    axes.set_title("Gamma of every layer")


def _draw_scores(axes: Any, done: Round) -> None:
    tasks = list(done.final)
    states = [s for s in ("base", "model_wise", "merged", "exported") if s in done.scores]
    rows = {s: [done.scores[s][t] for t in tasks] for s in states}
    alone = [done.scores.get(t, {}).get(t, float("nan")) for t in tasks]
    rows = {"base": rows.pop("base"), "alone": alone, **rows} if "base" in rows else rows
    width = 0.8 / max(1, len(rows))
    for index, (state, values) in enumerate(rows.items()):
        places = [place + index * width for place in range(len(tasks))]
        axes.bar(places, values, width=width, label=state)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(tasks))], tasks)
    if rows:  # below the bars, which may reach anywhere
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize="small")
    axes.set_title("scores, higher is better")
