"""How many examples does the analysis need? Conflicts on a draw of rows against the other rows.

Every state of the contribution analysis is scored once, row by row, by several metrics. Then the
analysis is repeated on draws of n rows, and its verdicts are compared with those of all rows that
were not drawn, which know nothing of the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from ..adapters import read_adapters
from ..combine import Combiner
from ..config import HiMergeConfig
from ..conflict import Conflict, find
from ..contribution import measure, states
from ..errors import ConfigError
from ..plan import IDENTITY, MergePlan
from ..probe import Probe
from ..scoring import Score

__all__ = ["RowScores", "Stability", "compare", "score_rows"]

_Table = dict[tuple[str, MergePlan], npt.NDArray[np.float64]]
_CACHE = 2_000_000_000


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of every state of the analysis, row by row.

    Attributes:
        tables: metric -> (task, state) -> (rows,).
        plan: the merge that was analysed: all adapters as they are.
        layers: labels, in the order of the model.
        holders: layer -> adapters with a delta there.
        rows: their number, the same for every task.
    """

    tables: Mapping[str, _Table]
    plan: MergePlan
    layers: tuple[str, ...]
    holders: Mapping[str, tuple[str, ...]]
    rows: int


@dataclass(frozen=True, slots=True)
class Stability:
    """Mean agreement of draws of `rows` rows with the rows that were not drawn.

    Attributes:
        metric: what was analysed by.
        rows: rows per task in a draw.
        kinds: share of the layers of the same kind (severe, partial, mutual), 0..1.
        chance: the same for kinds that are shuffled among the layers of each side: what agreement
            there would be if the draw said nothing about single layers.
        order: Spearman's correlation of the layers' Gamma, -1..1.
    """

    metric: str
    rows: int
    kinds: float
    chance: float
    order: float


def score_rows(
    model: PeftModel,
    eval_fns: Mapping[str, Callable[[Any], Mapping[str, Any]]],
    metrics: Sequence[str],
) -> RowScores:
    """Score every state of the contribution analysis of a plain sum, 4L + 3 per task.

    Args:
        model: holds the adapters.
        eval_fns: adapter -> function of the model that gives each of `metrics` per row.
        metrics: names.

    Raises:
        ConfigError: the tasks differ in their number of rows.
    """
    combiner = Combiner(read_adapters(model, list(eval_fns)))
    plan = combiner.plan(dict.fromkeys(eval_fns, IDENTITY))
    holders = {layer: names for layer, names in combiner.table().items() if names}
    tables: dict[str, _Table] = {metric: {} for metric in metrics}
    with torch.no_grad(), Probe(model, combiner, cache_bytes=_CACHE) as probe:
        for name, eval_fn in eval_fns.items():
            for task, state in states(name, plan, list(holders)):
                probe.show(state)
                found = eval_fn(model)
                for metric in metrics:
                    row = np.asarray(found[metric], dtype=np.float64)
                    tables[metric][task, state] = row
    sizes = {len(row) for table in tables.values() for row in table.values()}
    if len(sizes) != 1:
        raise ConfigError(f"every task must have as many rows, got {sorted(sizes)}.")
    return RowScores(tables, plan, tuple(holders), holders, sizes.pop())


def compare(
    scored: RowScores,
    sizes: Sequence[int],
    *,
    draws: int = 20,
    tolerance: float | str = 0.0,
    seed: int = 0,
) -> list[Stability]:
    """Return the agreement of draws with the other rows, metric by metric and size by size.

    Args:
        scored: from `score_rows`.
        sizes: rows per draw, each at least 2 and at most half of all rows.
        draws: draws per size, the same for every metric.
        tolerance: see `HiMergeConfig`.
        seed: of the draws.

    Raises:
        ConfigError: a size is not allowed.
    """
    if not sizes or not all(2 <= size <= scored.rows // 2 for size in sizes):
        raise ConfigError(
            f"a draw takes from 2 to {scored.rows // 2} of {scored.rows} rows, got {list(sizes)}."
        )
    config = HiMergeConfig(tolerance=tolerance)
    found = []
    for metric in scored.tables:
        for size in sizes:
            random = np.random.default_rng([seed, size])
            agreed = []
            for _ in range(draws):
                order = random.permutation(scored.rows)
                one = _conflicts(scored, metric, order[:size], config)
                other = _conflicts(scored, metric, order[size:], config)
                agreed.append(_agreement(one, other))
            kinds, chance, ranks = np.mean(agreed, axis=0).tolist()
            found.append(Stability(metric, size, kinds, chance, ranks))
    return found


def _conflicts(
    scored: RowScores, metric: str, rows: npt.NDArray[np.int64], config: HiMergeConfig
) -> list[Conflict]:
    table = scored.tables[metric]

    def score(task: str, state: MergePlan) -> Score:
        examples = table[task, state][rows]
        return Score(float(examples.mean()), examples)

    tasks = list(scored.plan.adapters)
    gains = dict.fromkeys(tasks, 1.0)  # normalize="none" reads none
    return [
        find(
            [measure(score, task, layer, scored.plan) for task in tasks],
            config,
            gains,
            scored.holders[layer],
        )
        for layer in scored.layers
    ]


def _agreement(one: Sequence[Conflict], other: Sequence[Conflict]) -> tuple[float, float, float]:
    pairs = zip(one, other, strict=True)
    same = float(np.mean([a.kind is b.kind for a, b in pairs]))
    kinds = {conflict.kind for conflict in one}
    chance = sum(
        np.mean([c.kind is kind for c in one]) * np.mean([c.kind is kind for c in other])
        for kind in kinds
    )
    return same, float(chance), _rank_correlation([c.Gamma for c in one], [c.Gamma for c in other])


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's correlation; 0 where one side does not tell any two apart."""
    a, b = _ranks(one), _ranks(other)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return ranks from 0 on; equal values share the mean of their ranks."""
    found = np.asarray(values)
    below = (found[None, :] < found[:, None]).sum(axis=1)
    equal = (found[None, :] == found[:, None]).sum(axis=1)
    ranks: npt.NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
