"""The README's benchmark table, made from results.json: `python tests/benchmarks/table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")

# Row -> the values that answer its target, dotted where they are nested.
_SHOWN = {
    "exact_merge_rank16": (
        *("ratio", "ratio_if_all_but_creation_were_free", "ratio_of_peft_to_our_arithmetic"),
        *("peft_seconds", "seconds", "creation_seconds"),
    ),
    "contribution_analysis": (
        *("block_forwards_per_edge", "block_forwards_share", "time_share", "cpu_share", "examples"),
    ),
    "one_score": ("examples_16.ratio", "examples_64.ratio"),
    "7b_folders_rank32_unpruned": ("ratio_to_plain_pass", "peak_gb"),
    "7b_folders_rank32_density0.1": ("ratio_to_plain_pass", "peak_gb", "relative_error"),
    "lazy_fold_unpruned": ("ratio",),
    "lazy_fold_density0.5": ("ratio",),
    "growth_unpruned": ("adapters.exponent_cpu_seconds", "layers.exponent_cpu_seconds"),
    "growth_density0.1": ("adapters.exponent_cpu_seconds", "layers.exponent_cpu_seconds"),
    "family_linear": ("width_4096.svd.ratio", "width_4096.cat.ratio", "least_ratio"),
    "family_sparse": ("width_4096.ties_svd.ratio", "least_ratio"),
    "family_subspace": ("width_4096.knots_ties.ratio", "width_4096.tsv_m.ratio", "least_ratio"),
}


def _pick(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def render(path: Path = RESULTS) -> str:
    """Return the table as markdown."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| what | to reach | reached | measured |", "| --- | --- | --- | --- |"]
    for name, shown in _SHOWN.items():
        if name in rows:
            row = rows[name]
            measured = ", ".join(f"{key} {_pick(row['values'], key):.3g}" for key in shown)
            reached = "yes" if row["reached"] else "no"
            lines.append(f"| {name} | {row['target']} | {reached} | {measured} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render())
