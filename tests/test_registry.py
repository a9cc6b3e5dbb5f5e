"""The registry of merging methods."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from peft_himerge import HiMergeConfig
from peft_himerge.errors import ConfigError
from peft_himerge.methods import get_method, list_methods, method
from peft_himerge.methods.registry import REQUIRED, describe

ABOUT = {"title": "t", "url": "https://example.org", "variant": "ours"}


def test_every_method_says_what_it_is() -> None:
    methods = list_methods()
    names = [m.name for m in methods]
    assert names == sorted(names)
    assert len(names) >= 25
    for info in methods:
        assert info.url.startswith("https://"), info.name
        assert info.title, info.name
        assert info.variant, info.name
        assert info.summary.endswith((".", "``")), (info.name, info.summary)
        assert get_method(info.name) == info
        documented = HiMergeConfig if info.name == "hi" else info.function
        text = inspect.getdoc(documented) or ""
        for option in info.options:
            assert f"{option}:" in text, (info.name, option)
        assert info.low_rank != info.elementwise or not info.low_rank, info.name


def test_records_are_frozen() -> None:
    info = get_method("ties")
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        info.options["density"] = 1  # type: ignore[index]


def test_unknown_name_gets_the_nearest_and_all_names() -> None:
    with pytest.raises(ConfigError, match=r"no merging method 'tie'. Did you mean 'ties'\?.*slerp"):
        get_method("tie")


def test_taken_name_is_refused_and_the_function_stays_what_it_is() -> None:
    def mine(stacks: Any, *, lam: float = 1.0) -> Iterator[Any]:
        """Do nothing."""
        yield from ()

    with pytest.raises(ConfigError, match=r"'ties' is taken by peft_himerge.methods.sparse.ties"):
        method("ties", **ABOUT)(mine)
    info = describe(mine, "mine")
    assert info.function is mine
    assert dict(info.options) == {"lam": 1.0}
    assert info.summary == "Do nothing."


def test_options_are_the_keyword_only_parameters() -> None:
    info = get_method("ties_peft")
    assert info.options["density"] is REQUIRED
    assert repr(REQUIRED) == "required"
    assert info.options["majority_sign_method"] == "total"
    with pytest.raises(ConfigError, match=r"'ties_peft' has no option 'densty'. Did you mean"):
        info.check({"densty": 0.5})
    with pytest.raises(ConfigError, match="needs the option 'density'"):
        info.check({})
    with pytest.raises(ConfigError, match="It has none"):
        get_method("cat").check({"lam": 1.0})
    info.check({"density": 0.5})


def test_options_that_merge_adapters_takes_itself_are_refused() -> None:
    from peft_himerge.merging import merge_adapters
    from peft_himerge.methods.registry import _RESERVED

    named = [p.name for p in inspect.signature(merge_adapters).parameters.values()]
    assert set(_RESERVED) == {name for name in named if name != "options"}

    def odd(stacks: Any, *, seed: int = 0) -> Iterator[Any]:
        yield from ()

    with pytest.raises(ConfigError, match="'seed', which is an argument of merge_adapters"):
        describe(odd, "odd")


def test_who_needs_what_is_told() -> None:
    needs = {name: get_method(name).needs for name in ("hi", "greedy_soup", "map", "ties")}
    assert needs == {"hi": "scores", "greedy_soup": "scores", "map": "scores", "ties": "nothing"}
    assert get_method("coefficient_search").needs == "scores"
    assert [m.name for m in list_methods() if m.reads_base] == ["widen"]


def test_the_options_of_hi_are_those_of_its_config() -> None:
    shared = {"rank", "metric"}  # arguments of merge_adapters itself
    assert set(get_method("hi").options) == set(HiMergeConfig.model_fields) - shared
    assert get_method("hi").options["variant"] == "focused"


def test_positional_options_and_unknown_needs_are_refused() -> None:
    with pytest.raises(ConfigError, match="'lam' does not fit"):
        describe(lambda stacks, lam: None, "odd")
    with pytest.raises(ConfigError, match="needs got 'luck'"):
        describe(lambda stacks: None, "odd", needs="luck")  # type: ignore[arg-type]


def test_what_a_method_needs_must_be_given_and_nothing_else() -> None:
    from peft_himerge.request import check_evidence

    def learned(stacks: Any, evidence: Any, *, steps: int = 3) -> Any: ...

    plain = get_method("cat")
    info = describe(learned, "learned", needs="scores")
    assert dict(info.options) == {"steps": 3}
    check_evidence(plain, eval_fns=None, inputs=None)
    check_evidence(info, eval_fns={"a": len}, inputs=None)
    with pytest.raises(ConfigError, match="needs scores: pass eval_fns"):
        check_evidence(info, eval_fns=None, inputs=None)
    with pytest.raises(ConfigError, match="needs nothing, so inputs would not be read"):
        check_evidence(plain, eval_fns=None, inputs={"a": []})
    with pytest.raises(ConfigError, match="must take stacks and evidence"):
        describe(lambda stacks: None, "odd", needs="gradients")
