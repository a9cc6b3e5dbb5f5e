"""The comparison as a picture, from the cells: `python examples/bench/figure.py`.

Needs matplotlib (extra `wandb`). It writes comparison.svg, which says which cells it shows, so that
a test can tell whether it is up to date.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from peft_himerge.bench.table import Line, read_settings

CELLS = Path(__file__).with_name("cells")
PICTURE = Path(__file__).with_name("comparison.svg")
OURS, PAPER, OTHERS, STATES = "#c1440e", "#1f4e79", "#8a8f98", "#3b7d4f"


def digest(cells: Path = CELLS) -> str:
    """Return a digest of everything in the cells' files."""
    found = hashlib.sha256()
    for path in sorted(cells.rglob("*.json")):
        found.update(path.relative_to(cells).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def draw(cells: Path = CELLS, picture: Path = PICTURE) -> Path:
    """Draw one panel per setting: each contender's mean over the tasks with its standard error."""
    mpl.rcParams.update({"svg.hashsalt": "peft_himerge", "svg.fonttype": "none", "font.size": 8})
    settings = read_settings(cells)
    counts = [sum(_shown(line) for line in lines) for lines in settings.values()]
    figure = Figure(figsize=(7.5, sum(counts) * 0.19 + 0.8 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)
    for panel, (name, lines) in zip(panels[:, 0], settings.items(), strict=True):
        _panel(panel, name, lines)
    told = {"Date": None, "Creator": None, "Description": f"cells {digest(cells)}"}
    figure.savefig(picture, metadata=told)
    return picture


def _shown(line: Line) -> bool:
    return line.rank is not None or line.name == "base" or "+" in line.name


def _panel(panel: mpl.axes.Axes, name: str, lines: Sequence[Line]) -> None:
    shown = sorted((line for line in lines if _shown(line)), key=lambda line: line.mean)
    places = range(len(shown))
    errors = [_error(line) for line in shown]
    colours = [_colour(line) for line in shown]
    panel.barh(places, [line.mean for line in shown], color=colours, height=0.72)
    panel.errorbar([x.mean for x in shown], places, xerr=errors, fmt="none", ecolor="#222", lw=0.8)
    panel.set_yticks(places, [line.title for line in shown])
    for place, line, error in zip(places, shown, errors, strict=True):
        panel.text(line.mean + error + 0.008, place, f"{line.mean:.3f}", va="center", fontsize=7)
    panel.set_ylim(-0.6, len(shown) - 0.4)
    panel.set_xlim(0, 1)
    panel.set_title(f"{name}: mean over the tasks, test rows", loc="left", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def _error(line: Line) -> float:
    errors = [0.0 if se is None else se for _, se in line.values.values()]
    return math.hypot(*errors) / len(errors)


def _colour(line: Line) -> str:
    if line.rank is None:
        return STATES
    if "(our" in line.title:
        return OURS
    return PAPER if line.title.startswith("Hi-Merging") else OTHERS


if __name__ == "__main__":
    print(draw())
