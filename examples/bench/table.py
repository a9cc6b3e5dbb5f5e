"""Tables of the comparison, from the cells: `python examples/bench/table.py`.

Prints what stands in the README, and writes the tables of all settings to tables.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_himerge.bench.studies import studies
from peft_himerge.bench.table import details, overview

CELLS = Path(__file__).with_name("cells")
_ALIKE = ("test_rows", "budget", "guide", "max_new_tokens", "dtype", "seed")
TABLES = Path(__file__).with_name("tables.md")


def text(cells: Path = CELLS) -> str:
    """Return what the cells were computed with, and their overview, as markdown.

    Those in the folder `several` beside them, settings of more than two adapters with a lineup of
    their own, follow.
    """
    several = cells.with_name("several")
    parts = [_told(cells), (overview(cells) or details(cells)).strip()]
    if several.is_dir():
        parts += [
            f"More than two adapters at once: {_told(several)}",
            (overview(several) or details(several)).strip(),
        ]
    return "\n\n".join(parts)


def _told(cells: Path) -> str:
    """Return the sentence that says what cells were computed with.

    Raises:
        ValueError: the cells were computed with different options, beside the number of validation
            rows of a whole setting, so that one table would mislead.
    """
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in cells.rglob("*.json")}
    options = {
        json.dumps({key: cell["options"][key] for key in _ALIKE}, sort_keys=True)
        for cell in found.values()
    }
    if len(options) != 1:
        raise ValueError(f"the cells were computed with different options: {sorted(options)}")
    sizes = json.loads(options.pop())
    hours = sum(cell["seconds"] for cell in found.values()) / 3600
    on = " and ".join(sorted({cell["device"] for cell in found.values()}, reverse=True))
    return (
        f"{_rows(cells, found)} per task to choose by ({sizes['guide']} guide), at most "
        f"{sizes['budget']} scores for a method of the registry, {sizes['test_rows']} test rows"
        f"{_text(found)}, base in {sizes['dtype']}, seed {sizes['seed']}; "
        f"{hours:.1f} hours on {on}."
    )


def _rows(cells: Path, found: Mapping[Path, Mapping[str, Any]]) -> str:
    """Return "64 validation rows", and which settings had others."""
    of: dict[str, set[int]] = {}
    for path, cell in found.items():
        place = path.relative_to(cells).parts
        if place[0] == "merges":
            of.setdefault(place[1], set()).add(cell["options"]["rows"])
    if any(len(sizes) > 1 for sizes in of.values()):
        raise ValueError(f"a setting has cells with different numbers of rows: {of}")
    rows = {setting: sizes.pop() for setting, sizes in sorted(of.items())}
    usual = max(rows.values())
    others = [f"{n} in {setting}" for setting, n in rows.items() if n != usual]
    return f"{usual} validation rows" + (f" ({', '.join(others)})" if others else "")


def _text(found: Mapping[Path, Mapping[str, Any]]) -> str:
    sizes = {cell["options"].get("text_rows") for cell in found.values()} - {None}
    if len(sizes) > 1:
        raise ValueError(f"cells have different numbers of rows that are generated: {sizes}")
    return f" ({sizes.pop()} where text is generated)" if sizes else ""


def tables(cells: Path = CELLS) -> str:
    """Return the tables of all settings as markdown."""
    parts = (
        "# The comparison, setting by setting",
        text(cells),
        details(cells).strip(),
        studies(cells.parent),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    print(text())
    TABLES.write_text(tables(), encoding="utf-8")
