"""What the studies around the comparison found, as markdown: from their JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .table import details, markdown, render, repeats

__all__ = ["studies"]


def studies(folder: str | Path) -> str:
    """Return the sections of all studies that were run, "" for none.

    Args:
        folder: holds `cells`, `several` (cells of settings of more than two adapters),
            `ablations` (cells of Hi-Merging with one option changed, on rows of their own),
            `other_seed` (cells of an adapter trained from another seed),
            `repeats/<any>` (cells of the same settings, run again),
            `guides/<name>` (cells of contenders that chose by another score), and what the scripts
            in examples/bench wrote: `stability*.json`, `surface*.json`, `ranks*.json`,
            `overlap*.json`.
    """
    found = Path(folder)
    of = (
        *(_several, _ablations, _repeated, _guides),
        *(_stability, _surface, _ranks, _overlap, _other_seed),
    )
    return "\n\n".join(part for part in (make(found) for make in of) if part)


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"{name}*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _several(folder: Path) -> str:
    cells = folder / "several"
    if not cells.is_dir():
        return ""
    return f"## More than two adapters at once\n\n{details(cells).strip()}"


def _ablations(folder: Path) -> str:
    cells = folder / "ablations"
    if not cells.is_dir():
        return ""
    options = [
        json.loads(path.read_text(encoding="utf-8"))["options"]
        for path in sorted((cells / "merges").rglob("*.json"))
    ]
    chosen, judged = (sorted({str(o[key]) for o in options}) for key in ("rows", "test_rows"))
    return (
        "## One option of Hi-Merging changed\n\n"
        f"With {' or '.join(chosen)} validation and {' or '.join(judged)} test rows per task. The "
        "rows are the same for everybody, so that differences are surer than the ± of each.\n\n"
        + details(cells).strip()
    )


def _repeated(folder: Path) -> str:
    runs = sorted(run for run in (folder / "repeats").glob("*") if run.is_dir())
    if not runs:
        return ""
    return (
        "## Other draws of validation rows\n\n"
        "The same adapters and test rows; each run has drawn other validation rows to choose by "
        "(and to focus on). ± is the standard deviation of a run.\n\n"
        + repeats([folder / "cells", *runs])
    )


def _guides(folder: Path) -> str:
    parts = [
        f"## Chosen by another score: {cells.name}\n\n"
        f"The same adapters and rows with `--guide {cells.name}`.\n\n{render(cells).strip()}"
        for cells in sorted((folder / "guides").glob("*"))
        if cells.is_dir()
    ]
    return "\n\n".join(parts)


def _stability(folder: Path) -> str:
    parts = []
    for told in _read(folder, "stability"):
        for tolerance, rows in told["stability"].items():
            header = ["score", "rows per draw", "same kind", "by chance", "order of the layers"]
            lines = [
                [
                    row["metric"],
                    str(row["rows"]),
                    f"{row['kinds']:.0%}",
                    f"{row['chance']:.0%}",
                    f"{row['order']:.2f}",
                ]
                for row in rows
            ]
            said = "none" if tolerance == "0.0" else tolerance
            title = f"{told['setting']}, {told['rows']} rows per task, tolerance {said}"
            parts.append(f"{title}:\n\n{markdown(header, lines)}")
    if not parts:
        return ""
    return (
        "## How many examples the analysis needs\n\n"
        "The conflicts that a draw of rows shows against those that all other rows show (mean of "
        "the draws): the share of layers with the same kind of conflict, what it would be if kinds "
        "were shuffled among the layers, and Spearman's correlation of the layers' Gamma.\n\n"
        + "\n\n".join(parts)
    )


def _surface(folder: Path) -> str:
    parts = []
    for told in _read(folder, "surface"):
        for task, points in told["surfaces"].items():
            scales = sorted({point["scale"] for point in points})
            table: dict[float, list[str]] = {}
            for point in sorted(points, key=lambda p: (p["density"], p["scale"])):
                table.setdefault(point["density"], []).append(f"{point['score']:.3f}")
            header = ["density \\ scale", *(f"{scale:g}" for scale in scales)]
            lines = [[f"{density:g}", *row] for density, row in table.items()]
            parts.append(f"{task}, {told['rows']} rows:\n\n{markdown(header, lines)}")
    if not parts:
        return ""
    return (
        "## Density and scale of a single adapter\n\n"
        "Validation score of one adapter alone on its own task.\n\n" + "\n\n".join(parts)
    )


def _ranks(folder: Path) -> str:
    parts = []
    for told in _read(folder, "ranks"):
        for setting, rows in told["settings"].items():
            header = ["rank asked for", "rank", "error of the delta", *rows[0]["test"]]
            lines = [
                [
                    str(row["asked"]),
                    str(row["rank"]),
                    f"{row['export_error']:.3f}",
                    *(f"{task['value']:.3f}" for task in row["test"].values()),
                ]
                for row in rows
            ]
            parts.append(f"{setting}, {told['test_rows']} rows:\n\n{markdown(header, lines)}")
    if not parts:
        return ""
    return (
        "## Rank of the exported adapter\n\n"
        "The same plan (Hi-Merging, joint) exported as LoRA adapters of several ranks; the error "
        "is that of the delta, relative to its norm.\n\n" + "\n\n".join(parts)
    )


def _overlap(folder: Path) -> str:
    parts = []
    for told in _read(folder, "overlap"):
        header = ["adapters", "modules", "mean cosine", "least cosine"]
        lines = [
            [pair, str(row["modules"]), f"{row['mean']:.3f}", f"{row['least']:.3f}"]
            for pair, row in told["pairs"].items()
        ]
        lines.append(["one of them and random directions", "", f"{told['random']:.3f}", ""])
        parts.append(markdown(header, lines))
    if not parts:
        return ""
    return (
        "## Do the adapters read the same directions?\n\n"
        "Cosine of the principal angles between the row spaces of two adapters' A, mean of a "
        "module; 1 is the same directions. A starts at random and moves little: near 1 means that "
        "two adapters were trained from the same seed.\n\n" + "\n\n".join(parts)
    )


def _other_seed(folder: Path) -> str:
    cells = folder / "other_seed"
    if not cells.is_dir():
        return ""
    return (
        "## With an adapter of another seed\n\n"
        "The same rows; the first adapter was trained anew from another seed, so that it reads "
        f"other directions than the second.\n\n{details(cells).strip()}"
    )
