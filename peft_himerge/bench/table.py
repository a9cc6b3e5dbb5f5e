"""Tables of a benchmark, made from its cells and from nothing else."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .lineup import ABLATIONS, LINEUP, Contender

__all__ = [
    *("Line", "Summary", "details", "markdown", "overview", "read_settings", "render", "repeats"),
    "summarise",
]


@dataclass(frozen=True, slots=True)
class Line:
    """One state of one setting on the test rows.

    Attributes:
        name: "base", an adapter, "a+b" (trained on the mixed data), or a contender.
        title: what the table calls it.
        values: task -> (score, standard error or None).
        mean: mean score over the tasks.
        kept: mean share of what each adapter wins alone on its own task that is left; NaN if one
            wins nothing.
        rank: place among the contenders by `mean`, 1 is best, equal means share the mean of their
            places; None for a state, and for an ablation.
        scores: scores on validation rows it took to choose; None for a state.
        ablation: it is one of `ABLATIONS`.
    """

    name: str
    title: str
    values: Mapping[str, tuple[float, float | None]]
    mean: float
    kept: float
    rank: float | None = None
    scores: int | None = None
    ablation: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender over all settings it took part in."""

    title: str
    settings: int
    mean: float
    kept: float
    rank: float


def read_settings(cells: str | Path) -> dict[str, list[Line]]:
    """Return setting -> lines: base, adapters alone, mixed, contenders as in the lineup, ablations.

    Raises:
        ConfigError: there are no cells.
    """
    merges = Path(cells) / "merges"
    folders = sorted(f for f in merges.iterdir() if f.is_dir()) if merges.is_dir() else []
    if not folders:
        raise ConfigError(f"there are no cells of a benchmark in {str(cells)!r}.")
    return {folder.name: _setting(Path(cells) / "states", folder) for folder in folders}


def _setting(states: Path, folder: Path) -> list[Line]:
    tasks = folder.name.split("+")
    known = {state: _state(states / state, tasks) for state in ("base", *tasks, folder.name)}
    base = known["base"]
    if base is None or any(known[task] is None for task in tasks):
        raise ConfigError(f"setting {folder.name!r} has no cells of its states yet.")
    gains = {t: (known[t] or {})[t][0] - base[t][0] for t in tasks}
    titles = {"base": "base model", folder.name: _MIXED}
    lines = []
    for name, values in known.items():
        if values is not None:
            lines.append(_line(name, titles.get(name, f"{name} alone"), values, base, gains))
    contenders = []
    for contender, cell in _merges(folder, LINEUP):
        row = _line(contender.name, contender.title, _pairs(cell["test"], tasks), base, gains, cell)
        contenders.append(row)
        if "test_exported" in cell:
            pairs = _pairs(cell["test_exported"], tasks)
            title = f"{contender.title}, LoRA of rank {cell['rank']}"
            lines.append(_line(f"{contender.name}_exported", title, pairs, base, gains))
    ablations = [
        replace(_line(c.name, c.title, _pairs(m["test"], tasks), base, gains, m), ablation=True)
        for c, m in _merges(folder, ABLATIONS)
    ]
    return [*lines, *_ranked(contenders), *ablations]


def _merges(
    folder: Path, contenders: Sequence[Contender]
) -> Iterator[tuple[Contender, dict[str, Any]]]:
    for contender in contenders:
        path = folder / f"{contender.name}.json"
        if path.is_file():
            yield contender, json.loads(path.read_text(encoding="utf-8"))


def _state(folder: Path, tasks: Sequence[str]) -> dict[str, tuple[float, float | None]] | None:
    paths = {task: folder / f"{task}.json" for task in tasks}
    if not all(path.is_file() for path in paths.values()):
        return None
    cells = {t: json.loads(path.read_text(encoding="utf-8")) for t, path in paths.items()}
    return {task: _pairs(cell["test"], [task])[task] for task, cell in cells.items()}


def _pairs(test: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, tuple[float, float | None]]:
    return {task: (test[task]["value"], test[task]["se"]) for task in tasks}


def _line(
    name: str,
    title: str,
    values: Mapping[str, tuple[float, float | None]],
    base: Mapping[str, tuple[float, float | None]],
    gains: Mapping[str, float],
    cell: Mapping[str, Any] | None = None,
) -> Line:
    shares = [(values[t][0] - base[t][0]) / g if g > 0 else math.nan for t, g in gains.items()]
    mean = math.fsum(v for v, _ in values.values()) / len(values)
    scores = None if cell is None else cell["scores_computed"]
    return Line(name, title, values, mean, math.fsum(shares) / len(shares), scores=scores)


def _ranked(lines: Sequence[Line]) -> list[Line]:
    ranked = []
    for line in lines:
        above = sum(other.mean > line.mean for other in lines)
        equal = sum(other.mean == line.mean for other in lines)
        place = above + (equal + 1) / 2
        ranked.append(replace(line, rank=place))
    return ranked


def summarise(settings: Mapping[str, Sequence[Line]]) -> list[Summary]:
    """Return every contender that took part in all settings, best average rank first.

    Ranks are among those alone: a place in a larger field of one setting would not compare.
    """
    ranked = {name: [x for x in lines if x.rank is not None] for name, lines in settings.items()}
    common = set.intersection(*({x.name for x in lines} for lines in ranked.values()))
    rows: dict[str, list[Line]] = {}
    for lines in ranked.values():
        for line in _ranked([x for x in lines if x.name in common]):
            rows.setdefault(line.title, []).append(line)
    found = [
        Summary(
            title,
            len(lines),
            mean=_average(line.mean for line in lines),
            kept=_average(line.kept for line in lines),
            rank=_average(line.rank or 0.0 for line in lines),
        )
        for title, lines in rows.items()
    ]
    return sorted(found, key=lambda s: (s.rank, -s.kept, s.title))


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def render(cells: str | Path) -> str:
    """Return all tables as markdown: the overview of several settings first, then each setting."""
    return "\n\n".join(part for part in (overview(cells), details(cells)) if part)


def overview(cells: str | Path) -> str:
    """Return one table of several settings as markdown; "" for a single setting.

    Every cell is the mean over the setting's tasks. "improvement" (over the base model), "gain
    kept" and "average rank" are over all settings, for contenders that took part in all of them,
    ranked among those.
    """
    settings = read_settings(cells)
    if len(settings) < 2:
        return ""
    start = _average(lines[0].mean for lines in settings.values())  # the base model's
    places = {
        s.title: [f"{s.mean - start:+.3f}", _share(s.kept), f"{s.rank:.1f}"]
        for s in summarise(settings)
    }
    means: dict[str, dict[str, float]] = {"base model": {}, _ALONE: {}, _MIXED: {}}
    for setting, lines in settings.items():
        tasks = list(lines[0].values)
        alone = {line.name: line.values[line.name][0] for line in lines if line.name in tasks}
        means[_ALONE][setting] = _average(alone.values())
        for line in lines:
            if line.rank is not None or line.title in means:
                means.setdefault(line.title, {})[setting] = line.mean
    rows = []
    for title in [*list(means)[:3], *places, *(t for t in list(means)[3:] if t not in places)]:
        found = [f"{means[title][s]:.3f}" if s in means[title] else "" for s in settings]
        if any(found):
            rows.append([title, *found, *places.get(title, [""] * 3)])
    header = ["mean over the tasks", *settings, "improvement", "gain kept", "average rank"]
    return f"**All {len(settings)} settings**\n\n{markdown(header, rows)}\n"


def details(cells: str | Path) -> str:
    """Return a table per setting as markdown, and one of its ablations if there are any."""
    parts = []
    for name, lines in read_settings(cells).items():
        tasks = list(lines[0].values)
        header = ["state", *tasks, "mean", "gain kept", "rank", "scores"]
        rows = [_cells(line) for line in lines if not line.ablation]
        parts.append(f"**{name}**\n\n" + markdown(header, rows))
        if any(line.ablation for line in lines):
            header = ["Hi-Merging", *tasks, "mean", "gain kept", "rank", "scores"]
            rows = [_cells(line) for line in lines if line.ablation or line.name in _WHOLE]
            parts.append(f"**{name}: one option changed**\n\n" + markdown(header, rows))
    return "\n\n".join(parts) + "\n"


_WHOLE = ("hi_paper", "hi_joint", "hi_focused")  # what the ablations change
_ALONE, _MIXED = "each adapter alone, on its own task", "trained on the mixed data"


def repeats(folders: Sequence[str | Path]) -> str:
    """Return one table of several runs of the same settings as markdown.

    Args:
        folders: the cells of each run, e.g. one per seed.

    Returns:
        Per contender and setting that all runs have, the mean over the runs of its mean over the
        tasks, with the standard deviation of a run; the best average first.

    Raises:
        ConfigError: there are fewer than two runs, or they have no setting in common.
    """
    runs = [read_settings(folder) for folder in folders]
    settings = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    if len(runs) < 2 or not settings:
        raise ConfigError("repeats compares two or more runs of the same settings.")
    found = [
        {s: {x.title: x.mean for x in run[s] if x.rank is not None} for s in settings}
        for run in runs
    ]
    common = set.intersection(*(set(means) for run in found for means in run.values()))
    values = {t: {s: [run[s][t] for run in found] for s in settings} for t in common}
    whole = {title: _average(map(_average, of.values())) for title, of in values.items()}
    rows = [
        [
            title,
            *(f"{_average(x):.3f} ± {statistics.stdev(x):.3f}" for x in values[title].values()),
            f"{whole[title]:.3f}",
        ]
        for title in sorted(common, key=lambda title: (-whole[title], title))
    ]
    return markdown([f"mean of {len(runs)} runs", *settings, "all"], rows)


def _cells(line: Line) -> list[str]:
    values = [f"{v:.3f}" + ("" if se is None else f" ± {se:.3f}") for v, se in line.values.values()]
    rank = "" if line.rank is None else f"{line.rank:g}"
    scores = "" if line.scores is None else str(line.scores)
    return [line.title, *values, f"{line.mean:.3f}", _share(line.kept), rank, scores]


def _share(kept: float) -> str:
    return "" if math.isnan(kept) else f"{kept:.0%}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
