"""What a merge costs, known before it is paid: scores and block-forwards of every step.

The unit of cost is one score: one call of an eval function. The unit inside a score is one
block-forward: one transformer block run on all of the eval function's inputs. The states of one
task form a prefix tree over blocks, and a walk of it depth first runs every edge once (see
`blocks`), so the states that contribution analysis needs cost about half of their blocks.

This room plays the steps of `hi` through with plans alone, without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .config import HiMergeConfig
from .conflict import GRADES
from .contribution import states
from .layers import OUTSIDE
from .plan import DROP, Edit, MergePlan
from .search import budget, together

__all__ = ["Cost", "Path", "Step", "common_prefix", "estimate", "path_of"]

Path = tuple[tuple[tuple[str, float, float, float], ...], ...]

# Stands for an edit that the search has yet to find: as far as costs go, any that drops nothing.
_SEARCHED = Edit(0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a merge; all numbers are upper bounds.

    Attributes:
        name: "base", "search", "sources", "alone", "analysis", "repair", "merged" or "exported".
        stage: what the scores are reported as (`events.StateScored.stage`).
        scores: calls of eval functions.
        naive_blocks: block-forwards if every score runs in full.
        shared_blocks: block-forwards if scores share what their states have in common.
    """

    name: str
    stage: str
    scores: int
    naive_blocks: int = 0
    shared_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a merge costs at most, step by step, in the order the steps are taken."""

    steps: tuple[Step, ...]

    @property
    def scores(self) -> int:
        """Upper bound on the number of calls of eval functions."""
        return sum(step.scores for step in self.steps)

    @property
    def naive_blocks(self) -> int:
        """Upper bound on the block-forwards if every score runs in full."""
        return sum(step.naive_blocks for step in self.steps)

    @property
    def shared_blocks(self) -> int:
        """Upper bound on the block-forwards if scores share blocks."""
        return sum(step.shared_blocks for step in self.steps)

    @classmethod
    def flat(cls, scores: int, stage: str = "states") -> Cost:
        """Return the cost of a single step of so many scores."""
        return cls((Step(stage, stage, scores),))


def path_of(plan: MergePlan, order: Sequence[str]) -> Path:
    """Return the plan's path in the prefix tree: what is live in every layer, first to last.

    Args:
        plan: the state.
        order: layer labels in the order they are run; layers the plan does not know are empty.

    Returns:
        Per layer, (adapter, model-wise density, layer-wise density, scale) of all that is live
        there. Paths compare: sorting by them walks the tree depth first.
    """
    live: dict[str, list[tuple[str, float, float, float]]] = {}
    for layer, name, edit in plan.live():
        whole = plan.adapters[name]
        row = (name, whole.density, edit.density, whole.scale * edit.scale)
        live.setdefault(layer, []).append(row)
    return tuple(tuple(live.get(label, ())) for label in order)


def common_prefix(one: Path, other: Path) -> int:
    """Return how many layers two paths share from the start."""
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        if left != right:
            return index
    return len(one)


class _Walk:
    """Counts what the requests of one step after the other cost."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = tuple(order)
        self._known: set[tuple[str, str]] = set()
        self._last: dict[str, Path | None] = {}
        self.blocks = sum(label != OUTSIDE for label in order)

    def take(self, name: str, stage: str, requests: Iterable[tuple[str, MergePlan]]) -> Step:
        """Return the cost of scoring all requests that were not scored before."""
        fresh: dict[tuple[str, str], tuple[str, Path]] = {}
        for task, plan in requests:
            key = (task, plan.fingerprint)
            if key not in self._known:
                fresh[key] = (task, path_of(plan, self._order))
        self._known.update(fresh)
        shared = sum(self._run(task, path) for task, path in sorted(fresh.values()))
        return Step(name, stage, len(fresh), self.blocks * len(fresh), shared)

    def know(self, requests: Iterable[tuple[str, MergePlan]]) -> None:
        """Count these requests as scored already."""
        self._known.update((task, plan.fingerprint) for task, plan in requests)

    def _run(self, task: str, path: Path) -> int:
        last = self._last.get(task)
        self._last[task] = path
        skipped = 0 if last is None else common_prefix(path, last)
        return self.blocks - sum(label != OUTSIDE for label in self._order[:skipped])

    def at_most(self, name: str, stage: str, scores: int, tasks: Iterable[str] = ()) -> Step:
        """Return the cost of scores of states not known yet; `tasks` then share nothing."""
        for task in tasks:
            self._last[task] = None
        return Step(name, stage, scores, self.blocks * scores, self.blocks * scores)


def estimate(
    layers: Mapping[str, Sequence[str]],
    own: Sequence[str],
    guards: Sequence[str],
    config: HiMergeConfig,
    *,
    order: Sequence[str] | None = None,
) -> Cost:
    """Return what `merge_adapters_hi` costs at most.

    Args:
        layers: label of every adapted layer -> names of the adapters that have modules there.
        own: the adapters' own tasks, which have the adapters' names.
        guards: the guard tasks; an adapter among them has a delta of zero.
        config: the options of the merge.
        order: labels of all blocks, adapted or not, in the order they are run, and "outside" where
            it is run; the layers as they come if None.
    """
    own, tasks = sorted(own), sorted({*own, *guards})
    walk = _Walk(list(layers) if order is None else order)
    names = sorted({name for holders in layers.values() for name in holders})
    searched = config.searches()
    edits = {name: _edit(name, config) if name in own else DROP for name in names}
    plan = MergePlan.model_wise(layers, edits, prune_scope=config.prune_scope)
    steps = [walk.take("base", "states", [(task, MergePlan.base()) for task in tasks])]
    if searched:
        merged = config.search_target == "merged"
        states_tried = len(own) * budget(config) + len(together(config, len(own)))
        scores = states_tried * (len(tasks) if merged else 1)
        steps.append(walk.at_most("search", "search", scores, tasks if merged else own))
        # The edit that wins was scored by the search already.
        won = [(t, plan) for t in tasks] if merged else [(t, plan.solo(t)) for t in own]
        walk.know(won)
    merging = [(task, plan) for task in tasks]
    if config.focus and len(own) > 1:  # the user's adapters, not the parts of them that are merged
        steps.append(walk.at_most("sources", "states", len(own) * len(tasks), tasks))
        steps.append(walk.take("alone", "states", merging))
    else:
        alone = [(task, state) for state in map(plan.solo, own) for task in tasks]
        steps.append(walk.take("alone", "states", [*alone, *merging]))
    if len(own) > 1:
        wanted = [request for task in own for request in states(task, plan, list(layers))]
        steps.append(walk.take("analysis", "analysis", wanted))
        steps.append(walk.at_most("repair", "repair", _repaired(layers, own, tasks, config), tasks))
    known = len(own) < 2 or config.accept != "always"
    steps.append(walk.at_most("merged", "states", 0 if known else len(tasks)))
    steps.append(walk.at_most("exported", "export", len(tasks)))
    return Cost(tuple(steps))


def _edit(name: str, config: HiMergeConfig) -> Edit:
    """Return the adapter's edit, or a stand-in where the search has yet to find it."""
    given = config.model_wise_edit(name)
    return Edit(
        _SEARCHED.density if config.density == "search" else given.density,
        _SEARCHED.scale if config.scale == "search" else given.scale,
    )


def _repaired(
    layers: Mapping[str, Sequence[str]],
    own: Sequence[str],
    tasks: Sequence[str],
    config: HiMergeConfig,
) -> int:
    """Return the most scores the repair takes.

    Each layer is edited once, or never. What is known already is not paid for: before the first
    edit the plan is the model-wise one, and unless accept="always" every plan was scored when it
    was accepted.
    """
    if config.accept == "never":  # every plan that is asked for is known from the analysis
        return 0
    edited = sum(any(name in own for name in holders) for holders in layers.values())
    checked = config.accept != "always"
    scores = edited * len(tasks) if checked else 0
    if config.accept == "best":
        scores += len(GRADES) * len(tasks) * sum(len(holders) for holders in layers.values())
    if config.reanalyze == "each":
        scores += (len(layers) - 1) * len(own) * (1 if checked else 2)
    return scores
