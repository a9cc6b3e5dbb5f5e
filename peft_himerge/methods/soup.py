"""Greedy soup: average the adapters that help, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError
from .registry import Fitted, method
from .scored import Goal, Scorer, aim_of, row, summed
from .stack import Stack

__all__ = ["greedy_soup"]


@method(
    "greedy_soup",
    title="Model soup (greedy)",
    url="https://arxiv.org/abs/2203.05482",
    variant="authors",
    needs="scores",
    low_rank=True,
)
def greedy_soup(stacks: Sequence[Stack], evidence: Scorer, *, objective: Goal = "mean") -> Fitted:
    """Average the adapters that do not lower the score, taken in the order of their own scores.

    Each adapter alone is scored on all tasks; best first, an adapter stays if the average of those
    kept and itself scores no less than the average of those kept. The user's weights are those of
    the average.

    Source: arXiv 2203.05482, "greedy soup", on deltas of one base. The score there is an accuracy
    on one held-out set; here it is `objective` over the adapters' tasks. Cost for M adapters:
    M (2 M - 1) scores at most. An adapter lacking a module counts as 0 there.

    Args:
        stacks: the modules.
        evidence: the scores.
        objective: what must not fall: "mean" of the scores, mean share "kept" of what each adapter
            wins alone, or adapter -> weight of its task.

    Raises:
        ConfigError: a weight is not positive, or `objective` is not allowed.
    """
    names, weights = stacks[0].names, stacks[0].weights
    for name, weight in zip(names, weights, strict=True):
        if weight <= 0.0:
            raise ConfigError(f"greedy_soup averages: adapter {name!r} has the weight {weight!r}.")
    aim = aim_of("objective", objective, stacks, evidence)
    tried: list[dict[str, Any]] = []

    def soup(kept: Sequence[int]) -> list[float]:
        total = sum(weights[i] for i in kept)
        return [weights[i] / total if i in kept else 0.0 for i in range(len(names))]

    def look(kept: Sequence[int]) -> float:
        scores = evidence.scores(summed(stacks, soup(kept), weighted=False))
        value = aim({task: score.value for task, score in scores.items()})
        adapters = [names[i] for i in kept]
        tried.append({"adapters": adapters, "objective": value, "scores": row(scores)})
        return value

    alone = {i: look([i]) for i in range(len(names))}
    order = sorted(alone, key=lambda i: (-alone[i], names[i]))
    kept, top = order[:1], alone[order[0]]
    for i in order[1:]:
        value = look([*kept, i])
        if value >= top:
            kept, top = [*kept, i], value
    coefficients = soup(kept)
    run = partial(summed, coefficients=coefficients, weighted=False)
    final = evidence.scores(run(stacks), (*evidence.own, *evidence.guards))
    report = {
        "kept": sorted(names[i] for i in kept),
        "order": [names[i] for i in order],
        "coefficients": dict(zip(names, coefficients, strict=True)),
        "objective": top,
        "scores": row(final),
        "tried": tried,
        "scores_computed": evidence.count,
    }
    return Fitted(run, report)
