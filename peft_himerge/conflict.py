"""Layers that merging hurts, and what is done about them (DESIGN 1.4).

Layers are taken in descending Gamma (the sum of gamma over tasks):

    all gamma > 0                 severe    keep only the delta of the adapter with the largest
                                            c_alone, drop the others in this layer
    some > 0, some <= 0           partial   prune and scale again the offending adapters' delta
    all gamma <= 0                mutual    leave the layer alone

Source: Hi-Merging (arXiv 2506.12379), conflict elimination. "Offending" are the adapters that do
not lose themselves while another loses ("degrader"); secondary sources also read it the other way
round ("degraded"). With ``accept="best"`` (ours) a layer of any kind may also be edited by degrees
(`grades`). Floats and strings only: this room knows no tensor and no model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from .config import HiMergeConfig
from .contribution import Contribution
from .plan import DROP, IDENTITY, Edit, MergePlan

__all__ = [
    "GRADES",
    "Conflict",
    "ConflictKind",
    "Resolution",
    "find",
    "grades",
    "rank",
    "resolve",
    "tries",
]


class ConflictKind(str, Enum):
    """How the tasks' gammas in a layer stand to each other."""

    SEVERE = "severe"
    PARTIAL = "partial"
    MUTUAL = "mutual"


@dataclass(frozen=True, slots=True)
class Conflict:
    """One layer judged.

    Attributes:
        layer: label of the layer.
        kind: see `ConflictKind`.
        Gamma: sum of `gammas`; layers are treated in descending order of it.
        gammas: task -> gamma, divided by the task's gain if config.normalize is "gain", and 0
            where its magnitude is below the tolerance.
        winner: severe: the adapter whose delta stays. None otherwise.
        offenders: partial: the adapters whose delta is pruned and scaled again. () otherwise.
    """

    layer: str
    kind: ConflictKind
    Gamma: float
    gammas: Mapping[str, float]
    winner: str | None = None
    offenders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolution:
    """What was done about one conflict.

    Attributes:
        conflict: the conflict.
        edits: adapter -> the layer-wise edit that was proposed; {} for a mutual layer.
        accepted: False if the edit was undone (the mean score would have fallen) or
            there was none.
        before: task -> score before the edit; {} if it was not measured.
        after: task -> score after the edit; {} if it was not measured.
    """

    conflict: Conflict
    edits: Mapping[str, Edit]
    accepted: bool
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)


def find(
    rows: Sequence[Contribution],
    config: HiMergeConfig,
    gains: Mapping[str, float],
    holders: Collection[str],
) -> Conflict:
    """Judge one layer by its contributions, one row per task.

    Args:
        rows: the rows of one layer, one per adapter's task.
        config: tolerance, normalize and partial_target are read.
        gains: task -> |E(alone) - E(base)|; read if config.normalize is "gain".
        holders: the adapters that have a delta in this layer. The others' tasks are heard, since
            merging can hurt them here too, but they have nothing to keep or to prune.
    """
    unit = {row.task: gains[row.task] if config.normalize == "gain" else 1.0 for row in rows}
    gammas = {}
    for row in sorted(rows, key=lambda row: row.task):
        gamma = row.gamma / unit[row.task]
        se = None if row.gamma_se is None else row.gamma_se / unit[row.task]
        gammas[row.task] = 0.0 if abs(gamma) < config.tolerance_of(se) else gamma
    losers = [task for task, gamma in gammas.items() if gamma > 0.0]
    others = [task for task in gammas if task not in losers]
    layer, Gamma = rows[0].layer, math.fsum(gammas.values())
    if not losers:
        return Conflict(layer, ConflictKind.MUTUAL, Gamma, gammas)
    if not others:
        # Ties go to the first name, so the choice does not depend on the order of adapters.
        held = [row for row in rows if row.task in holders]
        best = min(held, key=lambda row: (-row.c_alone / unit[row.task], row.task))
        return Conflict(layer, ConflictKind.SEVERE, Gamma, gammas, winner=best.task)
    offenders = others if config.partial_target == "degrader" else losers
    held_by = tuple(name for name in offenders if name in holders)
    return Conflict(layer, ConflictKind.PARTIAL, Gamma, gammas, offenders=held_by)


def rank(conflicts: Sequence[Conflict]) -> tuple[Conflict, ...]:
    """Return the conflicts in descending Gamma; equal ones stay in the order of their layers."""
    return tuple(sorted(conflicts, key=lambda conflict: -conflict.Gamma))


# Factors on one adapter's scale in one layer that accept="best" tries beside the paper's edit.
GRADES = (0.0, 0.5, 1.5)


def grades(plan: MergePlan, layer: str, adapter: str) -> list[Edit]:
    """Return milder and stronger edits of one adapter in one layer: its scale times `GRADES`.

    For ``accept="best"`` (ours). All-or-nothing edits of one layer often cost one task more than
    they win for the other, and a layer where no task loses may still have a better balance.
    """
    edit = plan.edits[layer][adapter]
    return [] if edit.drops else [Edit(edit.density, edit.scale * grade) for grade in GRADES]


def tries(plan: MergePlan) -> int:
    """Return the most edits that ``accept="best"`` tries in a plan's layers."""
    holders = [sum(not edit.drops for edit in row.values()) for row in plan.edits.values()]
    return sum(1 + len(GRADES) * held for held in holders)


def resolve(conflict: Conflict, plan: MergePlan, config: HiMergeConfig) -> dict[str, Edit]:
    """Return the layer-wise edits that treat `conflict`; {} if there is nothing to do."""
    row = plan.edits[conflict.layer]
    if conflict.kind is ConflictKind.SEVERE:
        return {name: IDENTITY if name == conflict.winner else DROP for name in row}
    edits = {}
    for name in conflict.offenders:
        if name in row:
            whole = plan.adapters[name]
            edits[name] = Edit(
                whole.density / 2 if config.layer_density is None else config.layer_density,
                whole.scale / 2 if config.layer_scale is None else config.layer_scale,
            )
    return edits
