"""The story of a merge for readers: markdown, plain records. Pictures no state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .conflict import Resolution
from .plan import IDENTITY, Edit

__all__ = ["conflict_record", "describe_edit", "markdown_table", "render_markdown", "score_rows"]


def describe_edit(resolution: Resolution) -> str:
    """Return in a few words what was done about a conflict."""
    conflict = resolution.conflict
    if not resolution.edits:
        return "left alone"
    if conflict.winner and resolution.edits.get(conflict.winner) == IDENTITY:
        text = f"kept only {conflict.winner}"
    else:
        text = ", ".join(_words(name, edit) for name, edit in resolution.edits.items())
    if resolution.accepted:
        return text
    return f"{text} ({'undone: it did not win' if resolution.after else 'not tried'})"


def _words(name: str, edit: Edit) -> str:
    if edit.drops:
        return f"dropped {name}"
    density = f"density {edit.density:g}, " if edit.density < 1.0 else ""
    return f"{name}: {density}scale {edit.scale:g}"


def conflict_record(resolution: Resolution) -> dict[str, Any]:
    """Return one layer's conflict and what was done about it as plain JSON values."""
    conflict = resolution.conflict
    return {
        "layer": conflict.layer,
        "kind": conflict.kind.value,
        "Gamma": conflict.Gamma,
        "gammas": dict(conflict.gammas),
        "winner": conflict.winner,
        "offenders": list(conflict.offenders),
        "edits": {
            name: {"density": e.density, "scale": e.scale} for name, e in resolution.edits.items()
        },
        "done": describe_edit(resolution),
        "accepted": resolution.accepted,
        "before": dict(resolution.before),
        "after": dict(resolution.after),
    }


def score_rows(
    scores: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float | None]],
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the score table: one state a row, one task a column, the mean."""
    tasks = list(next(iter(scores.values()), {}))
    rows = []
    for state, row in scores.items():
        cells = []
        for task in tasks:
            se = errors.get(state, {}).get(task)
            cells.append(f"{row[task]:.3f}" + (f" ± {se:.3f}" if se is not None else ""))
        mean = sum(row[task] for task in tasks) / len(tasks) if tasks else 0.0
        rows.append([state, *cells, f"{mean:.3f}"])
    return ["state", *tasks, "mean"], rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *(line(r) for r in rows)])


def render_markdown(facts: Mapping[str, Any]) -> str:
    """Return report.md for the facts of `MergeResult.to_dict` or `AdapterMerge.to_dict`."""
    parts = [f"# Merge report: {facts['adapter_name']}"]
    if facts["scores"]:
        parts += [
            "## Scores",
            markdown_table(*score_rows(facts["scores"], facts["standard_errors"])),
        ]
    parts += _method_parts(facts) if "method" in facts else _plan_parts(facts)
    return "\n\n".join(parts) + "\n"


def _method_parts(facts: Mapping[str, Any]) -> list[str]:
    method, export, cost = facts["method"], facts["export"], facts["cost"]
    weights = [[name, f"{value:g}"] for name, value in facts["weights"].items()]
    given = {**facts["options"], "space": facts["space"], "seed": facts["seed"]}
    options = [[key, json.dumps(value, default=str)] for key, value in given.items()]
    return [
        "## Method",
        f"{method['title']}: `{method['name']}`, after {method['variant']}, on the true deltas "
        f"scaling * B @ A.",
        markdown_table(["adapter", "weight"], weights),
        markdown_table(["option", "value"], options),
        "## Export and cost",
        f"Rank {export['rank']}, relative error of the deltas {export['relative_error']:.2e}. "
        f"{cost['scores']} scores, {cost['seconds']:.1f} s.",
        *(f"- {note}" for note in facts["notes"]),
    ]


def _plan_parts(facts: Mapping[str, Any]) -> list[str]:
    plan = facts["plan"]
    edits = [[name, f"{e['density']:g}", f"{e['scale']:g}"] for name, e in plan["adapters"].items()]
    parts = ["## Model-wise step", markdown_table(["adapter", "density", "scale"], edits)]
    if facts["conflicts"]:
        rows = [
            [c["layer"], c["kind"], f"{c['Gamma']:+.4f}", c["done"]] for c in facts["conflicts"]
        ]
        parts += [
            "## Layers, worst first",
            markdown_table(["layer", "kind", "Gamma", "done"], rows),
        ]
    if facts["contributions"]:
        parts += ["## Contributions", _contribution_table(facts["contributions"])]
    export, cost = facts["export"], facts["cost"]
    drop = export["drop"]
    lost = "not scored" if drop is None else f"mean score lost by export {drop:+.4f}"
    return [
        *parts,
        "## Export and cost",
        f"Rank {export['rank']}, relative error of the deltas {export['relative_error']:.2e}, "
        f"{lost}. "
        f"{cost['scores']} scores, {cost['seconds']:.1f} s. Plan fingerprint "
        f"`{plan['fingerprint'][:16]}`.",
    ]


def _contribution_table(contributions: Sequence[Mapping[str, Any]]) -> str:
    keys = ("alpha_alone", "beta_alone", "alpha_merged", "beta_merged", "gamma")
    rows = []
    for row in contributions:
        se = row["gamma_se"]
        cells = [f"{row[key]:+.4f}" for key in keys]
        cells[-1] += f" ± {se:.4f}" if se is not None else ""
        rows.append([row["layer"], row["task"], *cells])
    return markdown_table(["layer", "task", *keys], rows)
