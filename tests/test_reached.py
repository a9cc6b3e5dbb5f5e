"""Modules that no run ever called are told of; the model is left without a trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
from matrix import bases
from paper import paper
from peft import PeftModel
from snapshot import moved, snapshot
from torch import Tensor

from peft_himerge import merge_adapters_hi
from peft_himerge.reached import Reached

CONFIG = paper(density=0.5, scale=0.9, rank="exact", max_export_drop=None)


def mamba(*targets: str) -> PeftModel:
    specs = {n: {"target_modules": list(targets), "seed": i} for i, n in enumerate(("zh", "en"))}
    return tiny.add_adapters(bases.build("mamba"), specs)


def score(model: Any) -> Tensor:
    return -bases.outputs(model, bases.inputs("mamba", "zh")).pow(2).flatten(1).mean(1)


def test_a_weight_that_is_read_without_a_call_is_told_of() -> None:
    model = mamba("in_proj", "dt_proj")
    with pytest.warns(UserWarning, match=r"no eval function ran 2 .*layers\.0\.mixer\.dt_proj"):
        merge_adapters_hi(model, ["zh", "en"], {"zh": score, "en": score}, config=CONFIG)


def test_no_word_where_every_module_was_called() -> None:
    model = mamba("in_proj", "x_proj")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapters_hi(model, ["zh", "en"], {"zh": score, "en": score}, config=CONFIG)
    assert moved(before, snapshot(model, but="merged")) == []


def test_no_word_about_eval_functions_that_run_no_module() -> None:
    model = mamba("in_proj", "dt_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = {"zh": lambda _: 0.5, "en": lambda _: 0.25}
        merge_adapters_hi(model, ["zh", "en"], constant, config=CONFIG)


def test_hooks_are_gone_when_a_run_fails() -> None:
    model = mamba("in_proj", "dt_proj")
    before = snapshot(model)
    modules = [f"backbone.layers.{i}.mixer.{m}" for i in (0, 1) for m in ("in_proj", "dt_proj")]
    reached = Reached(model, modules)

    def run() -> None:
        with reached:
            score(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert reached.missed == [m for m in modules if m.endswith("dt_proj")]
    assert moved(before, snapshot(model)) == []
