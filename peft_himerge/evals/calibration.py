"""How likely the right choice is once confidence is taken out of the comparison.

The mean probability of the right answers rises with everything that makes a model surer of all its
answers, and their log-likelihood falls where a model that is mostly right is too sure. Neither says
how well it tells answers apart. So all choices' log-probabilities are first multiplied by the one
number that fits the right answers best: temperature scaling (Guo et al., arXiv 1706.04599, section
4.2), fitted on the very rows that are scored. What is left does not change when every
log-probability is multiplied by the same number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["calibrated"]

_HALVINGS = 60


def calibrated(table: Tensor, answers: Tensor) -> Tensor:
    """Return the log-probability of each right choice at the temperature that fits best.

    One row in which every choice is equally right is added to the fit (ours), spread over the rows:
    without it a task with no wrong answer would make the model infinitely sure.

    Args:
        table: (rows, choices), float64: what choices are compared by; -inf where a row has no more.
        answers: (rows,), which choice is right.

    Returns:
        (rows,), float64, at most 0. All choices are equally likely if wrong ones are preferred, and
        all is NaN if a number in the table is not finite.
    """
    there = table > -torch.inf
    # Only differences within a row matter; at a largest size of 1 the search starts near.
    values = torch.where(there, table - table.max(dim=1, keepdim=True).values, 0.0)
    size = float(values.abs().max())
    if not math.isfinite(size):
        return torch.full((len(table),), torch.nan, dtype=table.dtype)
    values = values / (size or 1.0)
    right = values.gather(1, answers[:, None]).squeeze(1)
    mean = values.sum(dim=1) / there.sum(dim=1)

    def log_probs(beta: float) -> Tensor:
        return torch.where(there, beta * values, -torch.inf).log_softmax(dim=1)

    def slope(beta: float) -> float:
        """Derivative of the negative log-likelihood, which grows with beta: it is convex."""
        expected = (log_probs(beta).exp() * values).sum(dim=1)
        return float((expected - right).sum() + (expected - mean).mean())

    low, high = 0.0, 1.0
    if slope(low) < 0.0:
        while slope(high) < 0.0:
            low, high = high, 2.0 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return log_probs(low).gather(1, answers[:, None]).squeeze(1)
