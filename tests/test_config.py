"""Options: what is allowed, and what the refusal says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peft_himerge import Edit, HiMergeConfig, HiMergeError
from peft_himerge.errors import ConfigError


def test_by_default_adapters_are_focused_scaled_together_and_repaired_by_the_merged_model() -> None:
    config = HiMergeConfig()
    assert config == HiMergeConfig(variant="focused")
    assert (config.focus, config.density, config.scale) == (True, 1.0, "search")
    assert (config.search, config.search_target) == ("together", "merged")
    assert (config.layer_density, config.layer_scale) == (None, None)
    assert (config.prune_scope, config.reanalyze, config.accept) == ("model", "once", "best")
    assert (config.partial_target, config.normalize) == ("degrader", "none")
    assert (config.tolerance, config.searches()) == ("auto", True)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"scale": 0.9},
        {"search": "coarse"},
        {"search": "optuna", "search_budget": 3},
        {"search_target": "own"},
        {"prune_scope": "layer"},
        {"focus": False},
    ],
)
def test_who_says_how_to_prune_and_scale_means_the_adapters_as_they_are(
    options: dict[str, Any],
) -> None:
    config = HiMergeConfig(**options)
    assert config == HiMergeConfig(variant="joint", **options)
    assert HiMergeConfig(**config.model_dump()) == config


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"search": "together"}, {"focus": True}])
def test_who_says_something_else_keeps_the_default(options: dict[str, Any]) -> None:
    config = HiMergeConfig(**options)
    assert config == HiMergeConfig(variant="focused", **options)
    assert HiMergeConfig(**config.model_dump()) == config


def test_config_is_frozen() -> None:
    config = HiMergeConfig()
    with pytest.raises(Exception, match="frozen"):
        config.density = 0.5


def test_config_error_is_a_value_error_of_the_library() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, HiMergeError)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0, "scale": 0.0},
        {"density": 1, "scale": 3},
        {"scale": 10_000},
        {"density": {"a": 0.1, "b": 1.0}, "scale": {"a": 2.0, "b": 0.0}},
        {"density": 0.5, "scale": "search"},
        {"search": "optuna"},
        {"search": "optuna", "search_budget": 1},
        {"layer_density": 0.0, "layer_scale": 10},
        {"tolerance": 0.5},
        {"tolerance": 3},
        {"tolerance": "2se"},
        {"tolerance": "0.5se"},
        {"rank": 1},
        {"rank": 2**31 - 1},
        {"rank": 0.5},
        {"rank": "exact"},
        {"max_export_drop": None},
        {"max_export_drop": 0},
        {"metric": "accuracy"},
        {"metric": {"en": "accuracy"}},
    ],
)
def test_value_that_is_allowed_is_kept(options: dict[str, Any]) -> None:
    config = HiMergeConfig(**options)
    for name, value in options.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"desity": 0.5}, "'desity'.*Did you mean 'density'"),
        ({"p": 0.5}, "'p'.*Allowed: .*density"),
        ({"density": 1.2}, "density.*1.2"),
        ({"density": -0.1}, "density.*-0.1"),
        ({"density": math.nan}, "density.*nan"),
        ({"density": True}, "density.*bool"),
        ({"density": {"a": True}, "scale": {"a": 1.0}}, "density.*bool"),
        ({"density": {"a": 2.0}, "scale": {"a": 1.0}}, "density.*2.0"),
        ({"density": "serach"}, "density.*'serach'"),
        ({"density": None}, "density.*None"),
        ({"density": [0.1, 0.2]}, "density"),
        ({"scale": -1.0}, "scale.*-1"),
        ({"scale": 10_000.5}, "scale.*10000.5"),
        ({"scale": math.inf}, "scale.*inf"),
        ({"scale": False}, "scale.*bool"),
        ({"layer_density": True}, "layer_density.*bool"),
        ({"layer_density": 1.01}, "layer_density"),
        ({"layer_scale": math.nan}, "layer_scale"),
        ({"density": {"a": 0.5}, "scale": "search"}, "density and scale"),
        ({"prune_scope": "block"}, "prune_scope.*'block'"),
        ({"search": "optuna2"}, "search.*'optuna2'"),
        ({"search_budget": 30}, "search_budget is read by search='optuna' alone"),
        ({"search": "optuna", "search_budget": 0}, "search_budget"),
        ({"search": "optuna", "search_budget": True}, "search_budget"),
        ({"search_target": "all"}, "search_target"),
        ({"reanalyze": True}, "reanalyze"),
        ({"accept": "maybe"}, "accept.*'always'"),
        (
            {"variant": "joint", "search": "together"},
            "search='together' looks for a scale: give density",
        ),
        ({"variant": "focused", "density": "search"}, "search='together' looks for a scale"),
        ({"variant": "paper", "search": "together", "density": 1.0}, "search_target='merged'"),
        ({"partial_target": "both"}, "partial_target"),
        ({"normalize": "max"}, "normalize"),
        ({"strategy": "swap"}, "strategy"),
        ({"tolerance": -0.1}, "tolerance.*-0.1"),
        ({"tolerance": math.nan}, "tolerance.*nan"),
        ({"tolerance": math.inf}, "tolerance.*inf"),
        ({"tolerance": True}, "tolerance.*True"),
        ({"tolerance": "2 se"}, "tolerance.*'2 se'"),
        ({"tolerance": "-2se"}, "tolerance.*'-2se'"),
        ({"tolerance": "0.1"}, "tolerance.*'0.1'"),
        ({"rank": 0}, "rank.*0"),
        ({"rank": -3}, "rank.*-3"),
        ({"rank": 2**31}, "rank.*2147483648"),
        ({"rank": True}, "rank.*True"),
        ({"rank": 1.0}, "rank.*1.0"),
        ({"rank": 8.0}, "rank.*8.0"),
        ({"rank": math.nan}, "rank.*nan"),
        ({"rank": "full"}, "rank.*'full'"),
        ({"rank": None}, "rank.*None"),
        ({"max_export_drop": -0.1}, "max_export_drop"),
        ({"max_export_drop": math.nan}, "max_export_drop"),
        ({"max_export_drop": True}, "max_export_drop"),
        ({"metric": 3}, "metric"),
    ],
)
def test_value_that_is_not_allowed_is_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        HiMergeConfig(**options)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"density.*scale.*rank"):
        HiMergeConfig(density=2.0, scale=-1.0, rank=0)
    with pytest.raises(ConfigError) as caught:
        HiMergeConfig(tolerance="x", rank=0)
    assert str(caught.value) == (
        "tolerance: must be a number >= 0, standard errors such as '2se', or 'auto' (got 'x'); "
        "rank: must be a whole number >= 1, a share of the energy between 0 and 1, 'exact' or "
        "'auto' (got 0)."
    )
    with pytest.raises(ConfigError, match=r"^density: [^;]+ \(got 2\.0\) or [^;]+ \(got 2\.0\)\.$"):
        HiMergeConfig(density=2.0)
    with pytest.raises(ConfigError, match=r"^config: density and scale: give both per adapter"):
        HiMergeConfig(density={"a": 0.5}, scale="search")


@pytest.mark.parametrize(
    ("options", "edit"),
    [
        ({"density": 0.3, "scale": 0.9}, Edit(0.3, 0.9)),
        ({"density": {"en": 0.3}, "scale": {"en": 0.9}}, Edit(0.3, 0.9)),
        ({"density": 0.3}, Edit(0.3, 1.0)),
        ({}, Edit(1.0, 1.0)),
    ],
)
def test_model_wise_edit_is_what_was_given_and_one_where_searched(
    options: dict[str, Any], edit: Edit
) -> None:
    config = HiMergeConfig(**options)
    assert config.model_wise_edit("en") == edit
    assert config.searches() == (len(options) < 2)


def test_tolerance_in_standard_errors_multiplies_them() -> None:
    assert HiMergeConfig(tolerance="2.5se").tolerance_of(0.2) == 0.5
    assert HiMergeConfig(tolerance=0.1).tolerance_of(None) == 0.1
    with pytest.raises(ConfigError, match="per-example"):
        HiMergeConfig(tolerance="2se").tolerance_of(None)
    auto = HiMergeConfig(tolerance="auto")
    assert (auto.tolerance_of(0.2), auto.tolerance_of(None)) == (0.2, 0.0)


def test_metric_of_a_task_is_the_shared_one_its_own_or_none() -> None:
    assert HiMergeConfig().metric_of("en") is None
    assert HiMergeConfig(metric="f1").metric_of("en") == "f1"
    mixed = HiMergeConfig(metric={"en": "f1"})
    assert (mixed.metric_of("en"), mixed.metric_of("zh")) == ("f1", None)


def test_names_given_per_adapter_must_be_the_adapters() -> None:
    config = HiMergeConfig(density={"en": 0.1, "zh": 0.2}, scale=1.0)
    config.check_names(["zh", "en"], ["en", "zh"])
    for names in (["en"], ["en", "zh", "fr"], ["en", "fr"]):
        with pytest.raises(ConfigError, match="density is given for"):
            config.check_names(names, names)


def test_metrics_given_per_task_must_be_the_tasks() -> None:
    config = HiMergeConfig(metric={"en": "f1"})
    config.check_names(["en", "zh"], ["en", "zh"])
    with pytest.raises(ConfigError) as caught:
        config.check_names(["enn"], ["enn"])
    assert str(caught.value) == "metric names the task 'en'. Did you mean 'enn'? Allowed: enn."


FOCUSED = {"focus": True, "density": 1.0, "search": "together"}


def test_variant_fills_in_what_is_not_given() -> None:
    paper, joint = HiMergeConfig(variant="paper"), HiMergeConfig(variant="joint")
    assert (paper.search_target, paper.accept, paper.tolerance) == ("own", "always", 0.0)
    assert (joint.search_target, joint.accept, joint.tolerance) == ("merged", "best", "auto")
    for config in (paper, joint):
        assert (config.focus, config.density, config.search) == (False, "search", "coarse")
    focused = HiMergeConfig(variant="focused")
    assert focused == HiMergeConfig(**(joint.model_dump() | {"variant": "focused"} | FOCUSED))
    mixed = HiMergeConfig(variant="joint", accept="no_regression")
    assert (mixed.search_target, mixed.accept) == ("merged", "no_regression")
    for config in (paper, joint, mixed):
        assert HiMergeConfig(**config.model_dump()) == config
        assert HiMergeConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(
        ConfigError, match=r"variant: Input should be 'paper', 'joint' or 'focused'"
    ):
        HiMergeConfig(variant="ours")
    with pytest.raises(ConfigError, match="variant"):
        HiMergeConfig(variant=["joint"])
