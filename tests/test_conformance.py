"""What every method of the registry owes: any number of adapters, any dtype, the same each time.

A method that is new in the registry is held to this without a line here, unless it has options
without defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fake_scorer import scorer_of
from stacks import random_stack

from peft_himerge.errors import ConfigError
from peft_himerge.methods.registry import MethodInfo, list_methods
from peft_himerge.methods.stack import Delta, Stack

MODULES = (
    "model.layers.0.proj",
    "model.layers.1.proj",
    "model.layers.1.up",
    "model.layers.10.proj",
    "lm_head",
)
# Mixed ranks, modules that adapters lack, one that a single adapter has, ranks above the size.
RANKS: dict[int, tuple[tuple[int | None, ...], ...]] = {
    2: ((2, 3), (None, 2), (1, 1), (9, 12), (4, None)),
    3: ((2, 3, 1), (None, 2, 2), (1, 1, 1), (3, 9, 12), (None, None, 4)),
    8: (
        (1, 2, 3, 1, 2, 3, 1, 2),
        (None, 2, None, 1, 1, None, 2, 3),
        (2, 2, 2, 2, 2, 2, 2, 2),
        (1, 9, 1, 12, 1, 2, 1, 2),
        (None, None, None, None, None, 3, None, None),
    ),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def options_of(info: MethodInfo, count: int) -> dict[str, Any]:
    """Return options for methods that cannot do without, and small budgets for searches."""
    names = "abcdefgh"[:count]
    return {
        "ties_peft": {"density": 0.5},
        "dare_ties_peft": {"density": 0.5},
        "della": {"density": 0.5},
        "della_linear": {"density": 0.5},
        "magnitude_prune": {"density": 0.5},
        "metric_weighted": {"metrics": {n: 0.1 + 0.1 * i for i, n in enumerate(names)}},
        "layer_assignment": {"assignment": {}, "default": {"a": 1.0}},
        "map": {"points": 2},
        "coefficient_search": {"budget": 40, "base": "ties", "choices": {"density": (0.3, 1.0)}},
    }.get(info.name, {})


def model(count: int, dtype: torch.dtype) -> list[Stack]:
    return [
        random_stack(ranks, 7 + i, 8 - i, seed=i, module=module, dtype=dtype)
        for i, (ranks, module) in enumerate(zip(RANKS[count], MODULES, strict=True))
    ]


def run(info: MethodInfo, stacks: Sequence[Stack]) -> dict[str, Delta]:
    options = options_of(info, len(stacks[0].names))
    if info.needs == "scores":
        found = dict(info.function(stacks, scorer_of(stacks), **options).run(stacks))
    else:
        found = dict(info.function(stacks, **options))
    assert list(found) == [stack.module for stack in stacks]
    return found


def takes(info: MethodInfo, count: int) -> bool:
    return count == 2 or info.name not in ("slerp",)


# Hi-Merging has a door and tests of its own; what learns from inputs is tested with a model.
METHODS = [m for m in list_methods() if m.needs in ("nothing", "scores") and m.name != "hi"]
CASES = [
    pytest.param(info, count, id=f"{info.name}-{count}")
    for info in METHODS
    for count in RANKS
    if takes(info, count)
]


@pytest.mark.parametrize(("info", "count"), CASES)
def test_any_dtype_gives_every_module_finite_and_the_same_twice(
    info: MethodInfo, count: int
) -> None:
    for dtype in DTYPES:
        stacks = model(count, dtype)
        found = run(info, stacks)
        again = run(info, stacks) if dtype == torch.bfloat16 else found
        for stack in stacks:
            dense = found[stack.module].dense()
            assert dense.shape == stack.shape
            assert dense.dtype == stack.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.isfinite(dense).all()
            assert torch.equal(dense, again[stack.module].dense())
        assert any(torch.count_nonzero(d.dense()) for d in found.values())


@pytest.mark.parametrize(("info", "count"), CASES)
def test_the_order_of_modules_does_not_matter(info: MethodInfo, count: int) -> None:
    stacks = model(count, torch.float64)
    found, turned = run(info, stacks), run(info, stacks[::-1])
    for module, delta in found.items():
        torch.testing.assert_close(
            turned[module].dense(), delta.dense(), rtol=1e-6, atol=1e-7, msg=f"{info.name} {module}"
        )


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_a_seed_is_all_that_chance_depends_on(info: MethodInfo) -> None:
    stacks = [dataclasses.replace(s, seed=7) for s in model(2, torch.float64)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = run(info, stacks)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for module, delta in run(info, stacks).items():
        assert torch.equal(delta.dense(), found[module].dense())


@pytest.mark.parametrize("info", METHODS, ids=lambda m: m.name)
def test_the_base_is_read_by_those_that_say_so_and_by_no_other(info: MethodInfo) -> None:
    stacks = [dataclasses.replace(s, base=None) for s in model(2, torch.float64)]
    if info.reads_base:
        with pytest.raises(ConfigError, match="base weight"):
            run(info, stacks)
    else:
        assert len(run(info, stacks)) == len(MODULES)


def test_slerp_says_how_many_it_takes() -> None:
    slerp = next(m for m in METHODS if m.name == "slerp")
    with pytest.raises(ConfigError, match="exactly 2 adapters"):
        run(slerp, model(3, torch.float64))
