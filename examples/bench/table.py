"""Tables of the comparison, from the cells: `python examples/bench/table.py`.

Prints what stands in the README, and writes the tables of all settings to tables.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft_himerge.bench.studies import studies
from peft_himerge.bench.table import details, overview

CELLS = Path(__file__).with_name("cells")
TABLES = Path(__file__).with_name("tables.md")


def text(cells: Path = CELLS) -> str:
    """Return what the cells were computed with, and their overview, as markdown.

    Raises:
        ValueError: the cells were computed with different sizes, so that one table would mislead.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in cells.rglob("*.json")]
    options = {json.dumps(cell["options"], sort_keys=True) for cell in found}
    if len(options) != 1:
        raise ValueError(f"the cells were computed with different options: {sorted(options)}")
    sizes = json.loads(options.pop())
    hours = sum(cell["seconds"] for cell in found) / 3600
    on = ", ".join(sorted({cell["device"] for cell in found}))
    told = (
        f"{sizes['rows']} validation rows per task to choose by ({sizes['guide']} guide), at most "
        f"{sizes['budget']} scores for a method of the registry, {sizes['test_rows']} test rows, "
        f"base in {sizes['dtype']}, seed {sizes['seed']}; {hours:.1f} hours on {on}."
    )
    return f"{told}\n\n{(overview(cells) or details(cells)).strip()}"


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
