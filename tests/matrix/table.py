"""The matrix for people: README's table, made from the cells, and the one a test run prints.

`python tests/matrix/table.py --write` puts the table into README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix.cells import MERGED, WAYS, Cell, Outcome, Refused, cells

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- matrix -->\n", "\n<!-- end of the matrix -->"
_INTRO = """\
## What is merged, and what is refused

Every cell is a test: two adapters of that kind on a tiny base are merged, saved, and read by a
fresh process that knows PEFT alone; its logits equal those of a float64 model with dense deltas.
What is refused is refused before anything is touched, by an error that names the kind and the text
quoted here. `merge_folders` does the first step of Hi-Merging without a base model. Cells of a
quantised base run where the quantiser is installed. `python -m pytest tests/test_matrix.py` prints
the matrix cell by cell.
"""


def _said(outcome: Outcome) -> str:
    return f"refused: `{outcome.fix}`" if isinstance(outcome, Refused) else outcome


def _row(cell: Cell) -> list[str]:
    said = [_said(cell.outcome(way)) if way in cell.ways else "" for way in WAYS]
    repeated = [one == before != MERGED and bool(one) for before, one in pairwise(said)]
    return ["the same" if same else one for same, one in zip([False, *repeated], said, strict=True)]


def render() -> str:
    """Return README's section: one row per group and outcome."""
    lines = [_INTRO, f"| | kind | {' | '.join(f'`{way}`' for way in WAYS)} |"]
    lines.append("| --- | --- " + "| --- " * len(WAYS) + "|")

    for (group, *said), same in groupby(cells(), lambda cell: (cell.group, *_row(cell))):
        labels = "; ".join(cell.label for cell in same)
        lines.append(f"| {group} | {labels} | {' | '.join(said)} |")
    return "\n".join(lines)


def of_readme(text: str) -> str:
    """Return what stands between the markers."""
    _, found, rest = text.partition(START)
    section, ends, _ = rest.partition(END)
    if not found or not ends:
        raise ValueError(f"README.md has no {START!r} with {END!r} after it")
    return section


def summary(reports: Iterable[Any]) -> list[str]:
    """Return the lines a test run prints: one per cell, with what came of it in this run.

    Args:
        reports: pytest's reports, of any tests, whatever process they ran in.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "matrix":
                group, label, way, outcome = value
                said = outcome if report.passed else report.outcome.upper()
                found.setdefault((group, label), {})[way] = said
    order = [(cell.group, cell.label) for cell in cells()]
    rows = [
        (f"{group}: {label}", [found[group, label].get(way, "") for way in WAYS])
        for group, label in order
        if (group, label) in found
    ]
    return list(_aligned([("", list(WAYS)), *rows])) if rows else []


def _aligned(rows: Sequence[tuple[str, list[str]]]) -> Iterator[str]:
    table = [(name, *said) for name, said in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if "--write" in sys.argv[1:]:
        old = f"{START}{of_readme(text)}{END}"
        README.write_text(text.replace(old, f"{START}{render()}{END}"), encoding="utf-8")
    else:
        print(render())
