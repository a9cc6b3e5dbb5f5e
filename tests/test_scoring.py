"""Scores: what an eval function may return, and paired differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_himerge.errors import EvalError, HiMergeError
from peft_himerge.scoring import Score, Task, difference, read_score

TASK = Task("en", lambda model: 0.0)


@pytest.mark.parametrize(
    "raw",
    [
        0.25,
        np.float32(0.25),
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.bfloat16),
        np.array(0.25),
    ],
)
def test_number_is_a_score_without_examples(raw: Any) -> None:
    score = read_score(raw, TASK)
    assert (score.value, score.examples, score.se) == (0.25, None, None)
    assert score.metrics == {}


def test_whole_number_is_a_score() -> None:
    assert read_score(3, TASK).value == 3.0
    assert isinstance(read_score(3, TASK).value, float)


@pytest.mark.parametrize(
    "raw",
    [
        [1, 2.0, 6],
        (1.0, 2.0, 6.0),
        np.array([1, 2, 6]),
        np.array([1, 2, 6], dtype=np.float32),
        torch.tensor([1.0, 2, 6]),
        torch.tensor([1, 2, 6], dtype=torch.float16),
        torch.ones(3, requires_grad=True) * torch.tensor([1.0, 2, 6]),
    ],
)
def test_per_example_scores_give_mean_and_standard_error(raw: Any) -> None:
    score = read_score(raw, TASK)
    assert score.value == 3.0
    assert score.examples is not None
    assert score.examples.dtype == np.float64
    # variance with n - 1: (4 + 1 + 9) / 2 = 7
    assert score.se == pytest.approx(math.sqrt(7 / 3))


def test_single_example_has_no_standard_error() -> None:
    score = read_score([0.5], TASK)
    assert (score.value, score.se) == (0.5, None)


def test_dict_of_metrics_scores_by_the_named_one() -> None:
    task = Task("en", TASK.fn, metric="likelihood")
    score = read_score({"accuracy": 1, "likelihood": [-1.0, -3.0]}, task)
    assert score.value == -2.0
    assert list(score.examples) == [-1.0, -3.0]  # type: ignore[arg-type]
    assert dict(score.metrics) == {"accuracy": 1.0, "likelihood": -2.0}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (None, "NoneType None"),
        ("0.5", "str '0.5'"),
        (True, "bool True"),
        (np.bool_(True), "True"),
        (1j, "complex"),
        (math.nan, "NaN"),
        (-math.inf, "infinity"),
        ([], "non-empty"),
        (np.zeros(0), "non-empty"),
        ([[0.1], [0.2]], "1-D"),
        (np.zeros((2, 2)), "1-D"),
        (torch.zeros(1, 3), "1-D"),
        ([0.1, None], "1-D"),
        ([0.1, "b"], "1-D"),
        (torch.tensor([True, False]), "1-D"),
        ([0.1, math.nan], "NaN"),
        (object(), "object"),
        ({"a": 1.0}, "no metric was named.*Allowed: a"),
    ],
)
def test_value_that_is_no_score_is_refused_with_the_task(raw: Any, text: str) -> None:
    with pytest.raises(EvalError, match=rf"(?s)'en'.*{text}"):
        read_score(raw, TASK)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (0.5, "metric='f1'.*dict"),
        ({"accuracy": 0.5}, "there is no 'f1'.*Allowed: accuracy"),
        ({}, "there is no 'f1'"),
        ({"f1": None}, "NoneType"),
        ({"f1": 0.5, "loss": math.nan}, "NaN.*'loss'"),
    ],
)
def test_dict_without_the_named_metric_is_refused(raw: Any, text: str) -> None:
    with pytest.raises(EvalError, match=text):
        read_score(raw, Task("en", TASK.fn, metric="f1"))


def test_eval_error_is_a_runtime_error_of_the_library() -> None:
    assert issubclass(EvalError, RuntimeError)
    assert issubclass(EvalError, HiMergeError)


EXAMPLES = st.lists(st.floats(-100, 100), min_size=4, max_size=4)


@given(st.lists(EXAMPLES, min_size=4, max_size=4))
def test_difference_pairs_the_examples(rows: list[list[float]]) -> None:
    scores = [read_score(row, TASK) for row in rows]
    found = difference(scores[:2], scores[2:])
    paired = np.array(rows[0]) + rows[1] - np.array(rows[2]) - rows[3]
    assert found.value == pytest.approx(paired.mean(), abs=1e-10)
    assert found.se == pytest.approx(paired.std(ddof=1) / 2, abs=1e-10)


def test_difference_of_equal_answers_is_zero_with_no_error() -> None:
    score = read_score([0.0, 1.0, 1.0], TASK)
    found = difference([score], [score])
    assert (found.value, found.se) == (0.0, 0.0)
    assert score.se is not None
    assert score.se > 0


@pytest.mark.parametrize(
    "other", [Score(0.5), read_score([0.5], TASK), read_score([0.1, 0.2, 0.3], TASK)]
)
def test_difference_without_paired_examples_has_no_error(other: Score) -> None:
    found = difference([read_score([1.0, 0.0], TASK)], [other])
    assert found.value == pytest.approx(0.5 - other.value)
    assert found.se is None
