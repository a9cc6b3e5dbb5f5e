"""Contributions by hand: a model whose score is a product one can write down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from peft_himerge import Edit, MergePlan
from peft_himerge.contribution import Contributions, measure, states
from peft_himerge.scoring import Score, Task, read_score

# The model is y = w0 * w1 with both weights 1; zh adds (1, 0.5), en adds (-0.5, 2).
DELTA = {"zh": {"h.0": 1.0, "h.1": 0.5}, "en": {"h.0": -0.5, "h.1": 2.0}}
PLAN = MergePlan.model_wise(
    {"h.0": ["zh", "en"], "h.1": ["zh", "en"]}, {"zh": Edit(), "en": Edit()}
)


def product(plan: MergePlan) -> float:
    weights = {"h.0": 1.0, "h.1": 1.0}
    for layer, name, edit in plan.live():
        weights[layer] += plan.adapters[name].scale * edit.scale * DELTA[name][layer]
    return math.prod(weights.values())


def score(task: str, plan: MergePlan) -> Score:
    """Task zh wants y large, en wants it small; two examples whose mean is the score."""
    y = product(plan) if task == "zh" else -product(plan)
    return read_score([y, 3 * y], Task(task, float))


def test_measure_gives_the_numbers_worked_by_hand() -> None:
    # zh alone: w = (2, 1.5), y = 3; merged: w = (1.5, 3.5), y = 5.25. Mean score is 2 y.
    row = measure(score, "zh", "h.0", PLAN)
    assert row.alpha_alone == 2 * (3 - 1.5)
    assert row.beta_alone == 2 * (2 - 1)
    assert row.alpha_merged == 2 * (5.25 - 3.5)
    assert row.beta_merged == 2 * (1.5 - 1)
    assert row.c_alone == 5.0
    assert row.c_merged == 4.5
    assert row.gamma == 0.5
    # The examples are y and 3 y; their gammas are 0.25 and 0.75, so se = 0.5 / 2.
    assert row.gamma_se == pytest.approx(0.25)
    assert row.alpha_alone_se == pytest.approx(1.5)
    assert (row.layer, row.task) == ("h.0", "zh")


def test_measure_of_a_task_that_wants_the_opposite_changes_sign() -> None:
    # en alone: w = (0.5, 3), y = 1.5; without h.1 0.5; only h.1: 3.
    row = measure(score, "en", "h.1", PLAN)
    assert row.alpha_alone == -2 * (1.5 - 0.5)
    assert row.beta_alone == -2 * (3 - 1)
    assert row.alpha_merged == -2 * (5.25 - 1.5)
    assert row.beta_merged == -2 * (3.5 - 1)
    assert row.gamma == (-2 - 4) - (-7.5 - 5)


def test_measure_in_an_edited_state_takes_its_merged_numbers_from_there() -> None:
    edited = PLAN.with_edit("h.1", "en", Edit(1.0, 0.0))  # w = (1.5, 1.5)
    row = measure(score, "zh", "h.0", PLAN, edited=edited)
    assert row.alpha_merged == 2 * (2.25 - 1.5)
    assert row.beta_merged == 2 * (1.5 - 1)
    assert row.alpha_alone == 2 * (3 - 1.5)


def test_measure_of_bare_numbers_has_no_errors() -> None:
    row = measure(lambda task, plan: Score(product(plan)), "zh", "h.0", PLAN)
    assert row.gamma == 0.25
    assert all(getattr(row, f"{name}_se") is None for name in ("alpha_alone", "c_merged", "gamma"))


def test_states_are_the_4l_plus_3_that_measure_looks_up() -> None:
    asked: set[str] = set()

    def look(task: str, plan: MergePlan) -> Score:
        asked.add(plan.fingerprint)
        return score(task, plan)

    layers = ["h.0", "h.1"]
    for layer in layers:
        measure(look, "zh", layer, PLAN)
    listed = states("zh", PLAN, layers)
    assert {task for task, _ in listed} == {"zh"}
    fingerprints = [plan.fingerprint for _, plan in listed]
    assert set(fingerprints) == asked
    assert len(fingerprints) == 4 * 2 + 3


def rows() -> Contributions:
    found = [measure(score, task, layer, PLAN) for layer in ("h.0", "h.1") for task in DELTA]
    return Contributions(tuple(found))


def test_contributions_are_a_sequence_that_knows_its_layers() -> None:
    table = rows()
    assert len(table) == 4
    assert table[0] == next(iter(table))
    assert [row.task for row in table.of("h.1")] == ["zh", "en"]
    assert table.of("h.7") == ()


def test_contributions_go_to_records_and_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = rows()
    records = table.to_records()
    assert json.loads(json.dumps(records)) == records
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["gamma"]) == [row.gamma for row in table]
    assert list(frame.columns)[:2] == ["layer", "task"]


def test_contributions_without_pandas_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import builtins
    import sys

    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError) as caught:
        rows().to_pandas()
    assert str(caught.value) == (
        "to_pandas() needs pandas: pip install 'peft-himerge[pandas]', or use to_records()."
    )
