"""The README's table of the comparison, from the cells: `python examples/bench/table.py`."""

from __future__ import annotations

import json
from pathlib import Path

from peft_himerge.bench.table import render

CELLS = Path(__file__).with_name("cells")


def text(cells: Path = CELLS) -> str:
    """Return what the cells were computed with, and their tables, as markdown.

    Raises:
        ValueError: the cells were computed with different sizes, so that one table would mislead.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in cells.rglob("*.json")]
    options = {json.dumps(cell["options"], sort_keys=True) for cell in found}
    if len(options) != 1:
        raise ValueError(f"the cells were computed with different options: {sorted(options)}")
    sizes = json.loads(options.pop())
    hours = sum(cell["seconds"] for cell in found) / 3600
    told = (
        f"{sizes['rows']} validation rows per task to choose by ({sizes['guide']} guide), at most "
        f"{sizes['budget']} scores for a method of the registry, {sizes['test_rows']} test rows, "
        f"base in {sizes['dtype']}, seed {sizes['seed']}; {hours:.1f} hours on shared CPU cores."
    )
    return f"{told}\n\n{render(cells).strip()}"


if __name__ == "__main__":
    print(text())
