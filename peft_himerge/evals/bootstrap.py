"""Standard errors of scores that are no mean over examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..scoring import Estimate
from .base import at_least_one

__all__ = ["bootstrap_se", "estimate"]

_Examples = npt.NDArray[np.float64]
Statistic = Callable[[_Examples], float]


def bootstrap_se(
    examples: npt.ArrayLike, statistic: Statistic | None = None, *, n: int = 1000, seed: int = 0
) -> float | None:
    """Return the standard error of a statistic by drawing examples with replacement.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), algorithm 6.1. For a
    mean the exact formula is better and is what `Score.se` uses; this is for corpus BLEU, macro
    F1, perplexity and rank correlation.

    Args:
        examples: (examples, ...) one row per example: what the statistic is computed from.
        statistic: turns such an array into a number; default: the mean.
        n: number of draws, at least 2.
        seed: of the draws; NumPy's global generator is not touched.

    Returns:
        The standard deviation over the draws; None for fewer than two examples.

    Raises:
        ConfigError: `n` is below 2 or `examples` is a bare number.

    Example:
        >>> round(bootstrap_se([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]), 2)
        0.17
    """
    at_least_one(n=n)
    rows = np.asarray(examples, dtype=np.float64)
    if n < 2 or rows.ndim == 0:
        raise ConfigError(f"a bootstrap needs n >= 2 and examples, got {n=} and {rows.ndim} axes")
    if len(rows) < 2:
        return None
    measure: Statistic = _mean if statistic is None else statistic
    draw = np.random.default_rng(seed)
    values = [measure(rows[draw.integers(0, len(rows), len(rows))]) for _ in range(n)]
    return float(np.std(values, ddof=1))


def estimate(examples: _Examples, statistic: Statistic) -> Estimate:
    """Return a statistic with its standard error by bootstrap.

    200 draws know an error to 5 %, and a merge asks for hundreds of scores.
    """
    return Estimate(statistic(examples), bootstrap_se(examples, statistic, n=200))


def _mean(rows: _Examples) -> float:
    return float(rows.mean())
