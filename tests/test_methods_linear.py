"""The methods that add whole deltas, against naive dense versions of their formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from stacks import deltas, drawn, random_stack, stack_of
from torch import Tensor

from peft_himerge.errors import AdapterError, ConfigError
from peft_himerge.factors import LoraFactors
from peft_himerge.methods.depth import lines_factors, zones
from peft_himerge.methods.linear import gram
from peft_himerge.methods.registry import get_method
from peft_himerge.methods.stack import Factored, Stack

BLOCKS = [f"model.layers.{i}" for i in (0, 1, 2, 10)]


def model(
    *rows: Sequence[int | None],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Stack]:
    modules = [f"{block}.proj" for block in BLOCKS] + ["lm_head"]
    return [
        random_stack(ranks, 8 + i, 11 - i, seed=i, module=modules[i], weights=weights, dtype=dtype)
        for i, ranks in enumerate(rows)
    ]


CASES: dict[str, list[Stack]] = {
    "two": model([3, 3], [2, 2], [1, 4]),
    "mixed ranks": model([2, 4, 3], [1, 2, 5]),
    "eight": model([2, 2, 3, 2, 1, 3, 2, 4], [1, 2, 2, 2, 2, 1, 3, 2]),
    "missing": model([2, None, 4], [None, 3, 2], [1, None, None]),
    "weighted": model([3, 2, 2], [2, 2, 2], weights=[0.3, 2.0, 1.1]),
    "rank above the size": model([12, 13], [10, 14]),
    "one by one": [random_stack([1, 2], 1, 1, seed=7)],
    "alone": model([3], [2]),
}


def run(name: str, stacks: Sequence[Stack], **options: Any) -> list[Tensor]:
    found = dict(get_method(name).function(stacks, **options))
    assert list(found) == [s.module for s in stacks]
    for stack, delta in zip(stacks, found.values(), strict=True):
        assert isinstance(delta, Factored)
        assert delta.a.shape[0] <= sum(stack.ranks)
        assert delta.b.dtype == delta.a.dtype == stack.dtype
    return [d.dense() for d in found.values()]


def bare(stack: Stack) -> list[Tensor]:
    return deltas(dataclasses.replace(stack, weights=(1.0,) * len(stack.names)))


def total(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([c * d for c, d in zip(shares, parts, strict=True)]).sum(0)


def there(stack: Stack) -> list[int]:
    return [i for i, f in enumerate(stack.factors) if f is not None]


def naive_average(stack: Stack, missing: str) -> Tensor:
    counted = there(stack) if missing == "skip" else range(len(stack.names))
    parts = bare(stack)
    weight = sum(stack.weights[i] for i in counted)
    return total([parts[i] for i in counted], [stack.weights[i] / weight for i in counted])


def naive_stock(stack: Stack, missing: str) -> Tensor:
    counted = there(stack) if missing == "skip" else list(range(len(stack.names)))
    parts = [deltas(stack)[i].flatten() for i in counted]
    n = len(parts)
    mean = torch.stack(parts).mean(0).reshape(stack.shape)
    if n == 1:
        return mean
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            size = parts[i].norm() * parts[j].norm()
            cosines.append(float(parts[i] @ parts[j] / size) if size else 0.0)
    c = max(0.0, float(np.mean(cosines)))
    return mean * n * c / (1 + (n - 1) * c)


def naive_slerp(one: Tensor, two: Tensor, t: float) -> Tensor:
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * one + math.sin(t * theta) * two) / math.sin(theta)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_average_and_stock_equal_the_dense_formulas(case: str, missing: str) -> None:
    stacks = CASES[case]
    for naive, name in ((naive_average, "average"), (naive_stock, "model_stock")):
        for got, stack in zip(run(name, stacks, missing=missing, lam=0.7), stacks, strict=True):
            torch.testing.assert_close(got, 0.7 * naive(stack, missing))


@pytest.mark.parametrize("case", CASES)
def test_sums_equal_the_dense_formulas(case: str) -> None:
    stacks = CASES[case]
    for got, stack in zip(run("task_arithmetic", stacks, lam=0.4), stacks, strict=True):
        torch.testing.assert_close(got, 0.4 * torch.stack(deltas(stack)).sum(0))
    for got, stack in zip(run("cat", stacks), stacks, strict=True):
        torch.testing.assert_close(got, torch.stack(deltas(stack)).sum(0))


@pytest.mark.parametrize("case", CASES)
def test_gram_is_the_table_of_dense_inner_products(case: str) -> None:
    for stack in CASES[case]:
        flat = torch.stack([d.flatten() for d in deltas(stack)])
        torch.testing.assert_close(gram(stack), flat @ flat.t(), rtol=1e-9, atol=1e-9)


def test_task_arithmetic_subtracts_with_a_negative_weight() -> None:
    stacks = model([3, 2], weights=[1.0, -2.0])
    one, two = bare(stacks[0])
    torch.testing.assert_close(run("task_arithmetic", stacks)[0], one - 2.0 * two)
    same = drawn(0, 8, 6, 3)
    cancelled = run("task_arithmetic", [stack_of([same, same], weights=[1.0, -1.0])])[0]
    torch.testing.assert_close(cancelled, torch.zeros(8, 6).double())


def test_a_weight_of_zero_takes_no_rank() -> None:
    stacks = model([3, 2], weights=[0.0, 1.0])
    ((_, delta),) = get_method("cat").function(stacks)
    assert delta.a.shape[0] == 2
    stacks = model([3, 2], weights=[0.0, 0.0])
    ((_, delta),) = get_method("cat").function(stacks)
    assert delta.a.shape[0] == 0
    assert torch.equal(delta.dense(), torch.zeros(8, 11).double())


def test_average_refuses_weights_that_cancel() -> None:
    with pytest.raises(ConfigError, match="sum to 0"):
        run("average", model([2, 2], weights=[1.0, -1.0]))


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_equals_the_dense_formula(t: float) -> None:
    for case in ("two", "rank above the size"):
        stacks = CASES[case]
        for got, stack in zip(run("slerp", stacks, t=t, toward="b"), stacks, strict=True):
            torch.testing.assert_close(got, naive_slerp(*deltas(stack), t))
        for got, stack in zip(run("slerp", stacks, t=1 - t, toward="a"), stacks, strict=True):
            torch.testing.assert_close(got, naive_slerp(*deltas(stack), t))


def test_slerp_of_the_whole_model_uses_one_angle() -> None:
    stacks = CASES["two"]
    flat = [torch.cat([deltas(s)[i].flatten() for s in stacks]) for i in range(2)]
    want = naive_slerp(flat[0], flat[1], 0.3)
    got = run("slerp", stacks, t=0.3, toward="b", scope="model")
    torch.testing.assert_close(torch.cat([x.flatten() for x in got]), want)


def test_slerp_goes_straight_where_there_is_no_arc() -> None:
    one = drawn(0, 8, 6, 3)
    zero = LoraFactors(one.a, 0.0 * one.b, 1.0)
    opposite = LoraFactors(one.a, -one.b, one.scaling)
    dense = deltas(stack_of([one]))[0]
    for other, want in ((one, dense), (zero, 0.5 * dense), (opposite, 0.0 * dense)):
        (got,) = run("slerp", [stack_of([one, other])])
        torch.testing.assert_close(got, want)
    (got,) = run("slerp", [stack_of([one, None])], t=0.25, toward="b")
    torch.testing.assert_close(got, 0.75 * dense)


def test_slerp_takes_two_and_says_which_way() -> None:
    with pytest.raises(ConfigError, match=r"exactly 2 adapters, got 3.*karcher"):
        run("slerp", model([2, 2, 2]))
    with pytest.raises(ConfigError, match="toward"):
        run("slerp", model([2, 2]), t=0.3)
    with pytest.raises(ConfigError, match=r"Did you mean|Allowed: a, b"):
        run("slerp", model([2, 2]), t=0.3, toward="z")


def naive_karcher(stack: Stack, missing: str = "zero") -> Tensor:
    """Minimise the weighted squared angles by small steps along the gradient."""
    parts, weights = bare(stack), torch.tensor(stack.weights).double()
    counted = there(stack) if missing == "skip" else range(len(parts))
    norms = [float(d.norm()) for d in parts]
    length = sum(float(weights[i]) * norms[i] for i in counted) / float(sum(weights[list(counted)]))
    live = [i for i in range(len(parts)) if norms[i] > 0]
    units = [parts[i] / norms[i] for i in live]
    shares = weights[live] / weights[live].sum()
    x = total(units, shares.tolist())
    x = x / x.norm()
    for _ in range(4000):
        step = torch.zeros_like(x)
        for share, u in zip(shares, units, strict=True):
            c = float((x * u).sum().clamp(-1, 1))
            theta = math.acos(c)
            if theta > 1e-12:
                step = step + share * theta / math.sin(theta) * (u - c * x)
        x = x + 0.2 * step
        x = x / x.norm()
    return length * x


@pytest.mark.parametrize("case", ["two", "mixed ranks", "weighted", "missing", "alone"])
def test_karcher_minimises_the_angles(case: str) -> None:
    stacks = CASES[case]
    for got, stack in zip(run("karcher", stacks), stacks, strict=True):
        torch.testing.assert_close(got, naive_karcher(stack), rtol=1e-6, atol=1e-8)
    for got, stack in zip(run("karcher", stacks, missing="skip"), stacks, strict=True):
        torch.testing.assert_close(got, naive_karcher(stack, "skip"), rtol=1e-6, atol=1e-8)


def test_karcher_of_two_equally_long_is_slerp() -> None:
    one, two = drawn(0, 8, 6, 3), drawn(1, 8, 6, 2)
    sizes = [float(d.norm()) for d in deltas(stack_of([one, two]))]
    two = dataclasses.replace(two, scaling=two.scaling * sizes[0] / sizes[1])
    stacks = [stack_of([one, two])]
    torch.testing.assert_close(run("karcher", stacks)[0], run("slerp", stacks)[0])


def test_karcher_of_opposites_is_zero_and_negative_weights_are_refused() -> None:
    one = drawn(0, 8, 6, 3)
    opposite = LoraFactors(one.a, -one.b, one.scaling)
    (got,) = run("karcher", [stack_of([one, opposite])])
    torch.testing.assert_close(got, torch.zeros(8, 6).double())
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="karcher needs weights"):
            run("karcher", [stack_of([one, one], weights=weights)])


def test_model_stock_of_opposing_deltas_is_zero() -> None:
    one = drawn(0, 8, 6, 3)
    opposite = LoraFactors(one.a, -one.b, 0.5)
    (got,) = run("model_stock", [stack_of([one, opposite])])
    assert torch.count_nonzero(got) == 0


@pytest.mark.parametrize("name", ["average", "model_stock", "karcher", "task_arithmetic", "cat"])
def test_one_adapter_comes_back(name: str) -> None:
    stacks = CASES["alone"]
    for got, stack in zip(run(name, stacks), stacks, strict=True):
        torch.testing.assert_close(got, deltas(stack)[0])


EVERY: dict[str, dict[str, Any]] = {
    "average": {},
    "model_stock": {},
    "karcher": {},
    "task_arithmetic": {},
    "cat": {},
    "lines": {},
    "metric_weighted": {"metrics": {"a": 0.5, "b": 0.7, "c": 0.9}},
    "layer_assignment": {"assignment": {}, "default": {"a": 0.2, "c": 1.0}},
}


@pytest.mark.parametrize("name", EVERY)
def test_laws(name: str) -> None:
    options, stacks = EVERY[name], CASES["missing"]
    want = run(name, stacks, **options)
    backward = run(name, stacks[::-1], **options)
    assert all(torch.equal(x, y) for x, y in zip(backward[::-1], want, strict=True))
    draw = torch.Generator().manual_seed(5)

    def regauged(f: LoraFactors | None) -> LoraFactors | None:
        if f is None:
            return None
        turn = torch.randn(f.rank, f.rank, generator=draw).double()
        return LoraFactors(torch.linalg.inv(turn) @ f.a, f.b @ turn, f.scaling)

    order = [2, 0, 1]
    turned = [
        dataclasses.replace(
            s,
            names=tuple(s.names[i] for i in order),
            factors=tuple(regauged(s.factors[i]) for i in order),
        )
        for s in stacks
    ]
    for got, x in zip(run(name, turned, **options), want, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-7)
    larger = [
        dataclasses.replace(
            s,
            factors=tuple(
                None if f is None else dataclasses.replace(f, scaling=3.0 * f.scaling)
                for f in s.factors
            ),
        )
        for s in stacks
    ]
    for got, x in zip(run(name, larger, **options), want, strict=True):
        torch.testing.assert_close(got, 3.0 * x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_narrow_factors_are_merged_in_float32(name: str, dtype: torch.dtype) -> None:
    stacks = model([2, None, 3], [1, 2, 2], dtype=dtype)
    wide = [
        dataclasses.replace(
            s,
            factors=tuple(
                None if f is None else LoraFactors(f.a.double(), f.b.double(), f.scaling)
                for f in s.factors
            ),
        )
        for s in stacks
    ]
    options = EVERY[name]
    for got, want in zip(run(name, stacks, **options), run(name, wide, **options), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_metric_weighted_follows_the_metric() -> None:
    stacks = CASES["weighted"]
    metrics = {"a": 0.5, "b": 0.25, "c": 2.0}
    for loss, power in ((False, 1.0), (True, 2.0), (False, 0.0)):
        g = [(1 / m if loss else m) ** power for m in metrics.values()]
        weights = stacks[0].weights
        shares = np.array([w * x for w, x in zip(weights, g, strict=True)])
        shares = shares / shares.sum()
        found = run("metric_weighted", stacks, metrics=metrics, loss=loss, power=power)
        for got, stack in zip(found, stacks, strict=True):
            torch.testing.assert_close(got, total(bare(stack), shares.tolist()))


def test_metric_weighted_in_factor_space_averages_a_and_b_apart() -> None:
    stacks = model([3, 3], [2, 2])
    found = run("metric_weighted", stacks, metrics={"a": 1.0, "b": 3.0}, average_of="factor")
    for got, stack in zip(found, stacks, strict=True):
        pairs = [stack.scaled(i) for i in range(2)]
        b = 0.25 * pairs[0][0] + 0.75 * pairs[1][0]
        a = 0.25 * pairs[0][1] + 0.75 * pairs[1][1]
        torch.testing.assert_close(got, b @ a)
    with pytest.raises(ConfigError, match="same rank everywhere"):
        run("metric_weighted", model([3, 2]), metrics={"a": 1.0, "b": 3.0}, average_of="factor")


@pytest.mark.parametrize(
    "options",
    [
        {"metrics": {"a": 1.0}},
        {"metrics": {"a": 1.0, "b": 1.0, "bb": 1.0}},
        {"metrics": {"a": 1.0, "b": 0.0}},
        {"metrics": {"a": 1.0, "b": float("nan")}},
        {"metrics": {"a": 1.0, "b": 2.0}, "power": "x"},
        {"metrics": {"a": 1.0, "b": 2.0}, "average_of": "both"},
    ],
)
def test_metric_weighted_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run("metric_weighted", model([2, 2]), **options)


def test_layer_assignment_takes_each_layer_from_whom_you_say() -> None:
    stacks = model([2, 2], [3, 1], [1, 1], [2, 2], [2, 3])
    assignment = {BLOCKS[0]: {"a": 1.0}, BLOCKS[3]: {"a": 0.5, "b": 0.5}, "outside": {"b": -1.0}}
    found = run("layer_assignment", stacks, assignment=assignment, default={"b": 2.0}, lam=0.5)
    shares = [(1, 0), (0, 2), (0, 2), (0.5, 0.5), (0, -1)]
    for got, stack, share in zip(found, stacks, shares, strict=True):
        torch.testing.assert_close(got, 0.5 * total(deltas(stack), share))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"assignment": {"model.layers.7": {"a": 1.0}}}, "names the layer 'model.layers.7'"),
        ({"assignment": {BLOCKS[0]: {"z": 1.0}}}, "names the adapter 'z'"),
        ({"assignment": {BLOCKS[0]: {"a": 1.0}}}, "says nothing about the layer"),
        ({"assignment": {}, "default": {"z": 1.0}}, "default names the adapter 'z'"),
        ({"assignment": {BLOCKS[0]: {"a": float("nan")}}}, "finite"),
    ],
)
def test_layer_assignment_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run("layer_assignment", model([2, 2], [2, 2]), **options)


def test_zones_put_one_adapter_at_both_ends() -> None:
    layers = [f"model.layers.{i}" for i in range(12)] + ["outside"]
    found = zones(layers[::-1], outer="en", inner="math", bottom=3, top=2, transition=1)
    shares = [found[layer]["en"] for layer in layers]
    assert shares == [1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0.5, 1, 1, 0]
    assert all(sum(row.values()) == 1.0 for row in found.values())
    with pytest.raises(ConfigError, match="need 9 blocks, the adapters change 4"):
        zones(BLOCKS, outer="en", inner="math")
    with pytest.raises(ConfigError, match="one kind"):
        zones(["encoder.block.0", "decoder.block.0"], outer="en", inner="math")


def test_lines_rises_from_the_first_block_to_the_last() -> None:
    stacks = model([2, 2], [2, 3], [1, 2], [3, 1], [2, 2])
    want = [0.5, 2 / 3, 5 / 6, 1.0, 0.5]
    for got, stack, scale in zip(run("lines", stacks), stacks, want, strict=True):
        torch.testing.assert_close(got, scale * total(deltas(stack), (1, 1)))
    factors = lines_factors([*BLOCKS, "outside"], first=0.2, last=0.8)
    assert [round(factors[b], 9) for b in BLOCKS] == [0.2, 0.4, 0.6, 0.8]
    assert factors["outside"] == 0.2
    assert lines_factors(["model.layers.4"], first=0.3) == {"model.layers.4": 0.3}
    pair = lines_factors(["encoder.block.0", "encoder.block.1", "decoder.block.0"], first=0.0)
    assert list(pair.values()) == [0.0, 0.0, 1.0]


def test_a_stack_refuses_deltas_of_different_shapes() -> None:
    with pytest.raises(AdapterError, match="differ in shape"):
        stack_of([drawn(0, 8, 6, 2), drawn(1, 8, 7, 2)])
