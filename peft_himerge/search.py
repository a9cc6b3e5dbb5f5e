"""Which density and scale: candidates in, scores asked for, the best edit out.

Source: Hi-Merging searches both over 0.1..1.0 in steps of 0.1 on the adapter's own task ("grid").
"coarse" is ours: one line over scale, one over density, one last look, at most 12 scores.
"optuna" asks Optuna's TPE for points of the grid, within a budget, from density 1 and scale 1 on.
On the merged model scales above 1 are tried too (ours): an adapter that the others drown needs more
of itself than it does alone. And all adapters are scaled together first: what only one gets more of
the others lose by, so that one by one none may rise although all of them should. "together" leaves
it at that: of few scores along one smooth line hardly any best one is luck, and of those that the
noise cannot tell apart the merge takes the one nearest to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import HiMergeConfig
from .plan import Edit
from .sampler import explore, import_optuna, propose

__all__ = ["GRID", "Trial", "best", "budget", "check_search", "search_edit", "together"]

GRID = tuple(round(0.1 * i, 1) for i in range(1, 11))
_ABOVE = (1.25, 1.5)
_COARSE_SCALE = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
_COARSE_MERGED = (0.3, 0.5, 0.7, 1.0, *_ABOVE)
_COARSE_DENSITY = (0.1, 0.2, 0.3, 0.5, 0.7)
_OPTUNA_BUDGET = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate that was scored."""

    adapter: str
    edit: Edit
    value: float


def best(trials: Sequence[Trial]) -> Trial:
    """Return the best trial; of equal ones the sparser, then the smaller: both interfere less."""
    return max(trials, key=lambda t: (t.value, -t.edit.density, -t.edit.scale))


def together(config: HiMergeConfig, adapters: int) -> tuple[float, ...]:
    """Return the scales that all adapters are given at once before any is searched; () for none."""
    if config.scale != "search" or config.search_target == "own":
        return ()
    if adapters < 2 and config.search != "together":
        return ()
    return _COARSE_MERGED


def budget(config: HiMergeConfig) -> int:
    """Return the most scores one adapter's search takes, without those of `together`."""
    free = ("search" == config.density) + ("search" == config.scale)
    if free == 0 or config.search == "together":
        return 0
    points = 1
    for option, values in (("density", GRID), ("scale", _scales(config))):
        points *= len(values) if getattr(config, option) == "search" else 1
    if config.search == "optuna":
        return min(config.search_budget or _OPTUNA_BUDGET, points)
    return points if config.search == "grid" or free == 1 else 12


def _scales(config: HiMergeConfig) -> tuple[float, ...]:
    return GRID if config.search_target == "own" else (*GRID, *_ABOVE)


def check_search(config: HiMergeConfig) -> None:
    """Refuse a search that cannot run here, before anything was paid for.

    Raises:
        MissingExtraError: it needs Optuna, which is not installed.
    """
    if config.searches() and config.search == "optuna":
        import_optuna("search='optuna'")


def search_edit(
    adapter: str,
    config: HiMergeConfig,
    value: Callable[[Sequence[Edit]], Sequence[float]],
    start: Edit | None = None,
) -> list[Trial]:
    """Score candidates for one adapter and return all of them; `best` picks.

    Args:
        adapter: name of the adapter.
        config: which of density and scale is free, and the kind of search.
        value: gives the scores of several edits at once, higher is better.
        start: the adapter's edit so far, where Optuna begins; by default what `config` gives, with
            1 for what is free.
    """
    given = start or config.model_wise_edit(adapter)
    free_density, free_scale = config.density == "search", config.scale == "search"
    trials: list[Trial] = []

    def look(densities: Sequence[float], scales: Sequence[float]) -> None:
        edits = [Edit(p, s) for p in densities for s in scales]
        score([e for e in edits if all(e != t.edit for t in trials)])

    def score(edits: Sequence[Edit]) -> list[float]:
        values = list(value(edits))
        trials.extend(Trial(adapter, e, v) for e, v in zip(edits, values, strict=True))
        return values

    densities = GRID if free_density else (given.density,)
    scales = _scales(config) if free_scale else (given.scale,)
    if config.search == "optuna":
        first = [(given.density, given.scale)]
        points = propose("optuna", (densities, scales), budget(config), first=first)
        explore(points, lambda batch: score([Edit(*point) for point in batch]))
        return trials
    if not (free_density and free_scale) or config.search == "grid":
        look(densities, scales)
        return trials
    # Scale first: on real adapters it decides more than density does, and the trials at density 1
    # cost no threshold.
    line = _COARSE_SCALE if config.search_target == "own" else _COARSE_MERGED
    look((1.0,), line)
    look(_COARSE_DENSITY, (best(trials).edit.scale,))
    top = best(trials).edit
    at = line.index(top.scale)
    look((top.density,), (line[at - 1 if at else at + 1],))
    return trials
