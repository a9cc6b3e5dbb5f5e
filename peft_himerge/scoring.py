"""What "good" means: a task's eval function, and the scores it gives. Higher is always better.

An eval function is any callable that takes the model and returns a number, or better a 1-D array
of per-example scores whose mean is the score: then every difference of two states carries a paired
standard error. It may also return a dict of such metrics; then the task needs `metric=`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, EvalError, suggest

__all__ = [
    "Difference",
    "Estimate",
    "EvalFn",
    "Score",
    "Task",
    "check_eval_fns",
    "difference",
    "read_score",
]

EvalFn = Callable[[Any], Any]
Examples = npt.NDArray[np.float64]


class Estimate(float):
    """A score that is no mean over examples, and its standard error.

    For what an eval function returns: a number like any other, which brings along how sure it is,
    e.g. corpus BLEU with its bootstrap error.

    Attributes:
        se: the standard error, or None if it is not known.
    """

    __slots__ = ("se",)

    def __new__(cls, value: float, se: float | None = None) -> Estimate:
        """Make one; `se` must be a finite number from 0 on, or None."""
        if se is not None and not 0 <= se < math.inf:
            raise ConfigError(f"a standard error must be a number from 0 on or None, got {se!r}")
        made = super().__new__(cls, value)
        made.se = se
        return made

    se: float | None

    def __getnewargs__(self) -> tuple[float, float | None]:  # type: ignore[override]
        return float(self), self.se


@dataclass(frozen=True, slots=True)
class Task:
    """One thing the merged adapter should be good at.

    Attributes:
        name: the adapter's name for an adapter's own task; any other name for a guard task.
        fn: the eval function, called with the model.
        metric: which entry of a returned dict is the score; None if `fn` returns no dict.
        guard: True for a task of no adapter: scored and reported, but not part of any conflict.
    """

    name: str
    fn: EvalFn
    metric: str | None = None
    guard: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """The score of one task in one model state.

    Attributes:
        value: the score; the mean of `examples` if there are any.
        examples: per-example scores, or None if the eval function returned a bare number.
        metrics: every metric the eval function returned, by name; {} if it returned no dict.
        error: the standard error of an `Estimate`; None if `value` is a mean or a bare number.
    """

    value: float
    examples: Examples | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None

    @property
    def se(self) -> float | None:
        """Standard error of `value`: over two or more examples, or the eval function's own."""
        return self.error if self.examples is None else _standard_error(self.examples)


@dataclass(frozen=True, slots=True)
class Difference:
    """A signed sum of scores of one task, with its paired standard error if examples are known."""

    value: float
    se: float | None


def check_eval_fns(adapters: Sequence[str], eval_fns: Any, otherwise: str = "") -> None:
    """Check that every adapter has its eval function; further names are guard tasks.

    Args:
        adapters: names of the adapters.
        eval_fns: what the user gave.
        otherwise: what to do without eval functions, to end the error's text with.

    Raises:
        ConfigError: it is no mapping, an adapter has none, or one cannot be called.
    """
    if not isinstance(eval_fns, Mapping):
        raise ConfigError(f"eval_fns must map adapter names to functions, got {eval_fns!r}.")
    for name in adapters:
        if name not in eval_fns:
            hint = suggest(name, list(eval_fns))
            raise ConfigError(
                f"eval_fns has no function for adapter {name!r}: every adapter needs its task."
                f"{hint}{otherwise}"
            )
    for name, fn in eval_fns.items():
        if not callable(fn):
            raise ConfigError(f"eval_fns[{name!r}] must be callable, got {fn!r}.")


def difference(plus: list[Score], minus: list[Score]) -> Difference:
    """Return sum(plus) - sum(minus) with the standard error over paired examples.

    All scores must be of the same task. Pairing example by example is what makes the error small:
    the two states answer the same questions.
    """
    value = math.fsum([s.value for s in plus] + [-s.value for s in minus])
    parts = [(s.examples, 1.0) for s in plus] + [(s.examples, -1.0) for s in minus]
    total: Examples | None = None
    for examples, sign in parts:
        if examples is None or (total is not None and examples.shape != total.shape):
            return Difference(value, None)
        total = examples * sign if total is None else total + examples * sign
    return Difference(value, None if total is None else _standard_error(total))


def _standard_error(examples: Examples) -> float | None:
    if examples.size < 2:
        return None
    return float(np.std(examples, ddof=1) / math.sqrt(examples.size))


def read_score(raw: Any, task: Task) -> Score:
    """Turn what an eval function returned into a `Score`.

    Args:
        raw: a number, with or without an error (`Estimate`); a 0-d or 1-D tensor, array or
            sequence of numbers; or a dict of those.
        task: the task, named in every error.

    Raises:
        EvalError: `raw` is anything else, is empty, or holds NaN or infinity; or it is a dict and
            the task names no metric of it.
    """
    if not isinstance(raw, Mapping):
        if task.metric is not None:
            raise EvalError(
                f"the eval function of task {task.name!r} returned {_describe(raw)}, but "
                f"metric={task.metric!r} asks for a dict of metrics."
            )
        value, examples = _read_values(raw, task, "score")
        return Score(value, examples, error=_own_error(raw))
    if task.metric is None or task.metric not in raw:
        got = "no metric was named" if task.metric is None else f"there is no {task.metric!r}"
        hint = suggest(task.metric or "", [str(key) for key in raw])
        raise EvalError(
            f"the eval function of task {task.name!r} returned a dict and {got}: pass metric= "
            f"(for Hi-Merging, in its config).{hint}"
        )
    read = {str(key): _read_values(value, task, str(key)) for key, value in raw.items()}
    value, examples = read[task.metric]
    metrics = MappingProxyType({key: mean for key, (mean, _) in read.items()})
    return Score(value, examples, metrics, _own_error(raw[task.metric]))


def _own_error(raw: Any) -> float | None:
    return raw.se if isinstance(raw, Estimate) else None


def _read_values(raw: Any, task: Task, metric: str) -> tuple[float, Examples | None]:
    plain = raw.tolist() if hasattr(raw, "tolist") else raw
    if isinstance(plain, (tuple, list)):
        if not plain or not all(_is_number(v) for v in plain):
            raise EvalError(
                f"the eval function of task {task.name!r} returned {_describe(raw)} for "
                f"{metric!r}; allowed: a number, or a non-empty 1-D array of per-example numbers."
            )
        examples = np.asarray(plain, dtype=np.float64)
        value = math.fsum(plain) / len(plain) if np.isfinite(examples).all() else math.nan
    elif _is_number(plain):
        examples, value = None, float(plain)
    else:
        raise EvalError(
            f"the eval function of task {task.name!r} returned {_describe(raw)} for {metric!r}; "
            f"allowed: a number, a 1-D array of per-example numbers, or a dict of those."
        )
    if not math.isfinite(value):
        raise EvalError(
            f"the eval function of task {task.name!r} returned NaN or infinity for {metric!r}. "
            f"A state the method scores broke the model, or the metric is not defined on this "
            f"data; return a finite worst score instead."
        )
    return value, examples


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(raw: object) -> str:
    text = repr(raw)
    return f"{type(raw).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
