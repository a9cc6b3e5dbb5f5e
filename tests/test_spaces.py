"""KnOTS and Core Space against their dense definitions, with every elementwise method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from stacks import MODULE, deltas, drawn, random_stack, stack_of
from test_methods_subspace import CASES, Largest, every_case, same, zero_of
from torch import Tensor

import peft_himerge.methods.compete
import peft_himerge.methods.linear
import peft_himerge.methods.sparse  # noqa: F401  (registers its methods)
from peft_himerge import combine
from peft_himerge.errors import AdapterError, ConfigError
from peft_himerge.factors import LoraFactors
from peft_himerge.methods.registry import REQUIRED, MethodInfo, get_method, list_methods
from peft_himerge.methods.spaces import in_space, to_space
from peft_himerge.methods.stack import Delta, Dense, Factored, Stack, StackLike
from peft_himerge.methods.subspace import tsv_m

SPACES = ("knots", "core")
every_space = pytest.mark.parametrize("space", SPACES)
ELEMENTWISE = [info for info in list_methods() if info.elementwise]


def merged(method: Any, stack: Stack, space: Any, **options: Any) -> Tensor:
    ((module, delta),) = in_space(method, [stack], space, **options)
    assert module == stack.module
    assert isinstance(delta, Factored)
    assert delta.b.dtype == delta.a.dtype == stack.dtype
    assert delta.b.shape[1] <= max(1, sum(stack.ranks))
    return delta.dense()


def plain_sum(stacks: Sequence[StackLike]) -> Iterator[tuple[str, Delta]]:
    for stack in stacks:
        rows = [
            sum((w * d for w, d in zip(stack.weights, block, strict=True)), torch.zeros(()))
            for _, block in stack.blocks()
        ]
        yield stack.module, Dense(torch.cat(rows))


def unweighted(stack: Stack) -> Stack:
    return dataclasses.replace(stack, weights=(1.0,) * len(stack.names))


def represented(stack: Stack, space: Any) -> tuple[list[Tensor], Tensor, Tensor | None]:
    small, lift = to_space(stack, space)
    return deltas(unweighted(small)), lift.left, lift.right


# ------------------------------------------------------------------ dense definitions


def dense_knots(stack: Stack) -> tuple[Tensor, list[Tensor]]:
    """U and P_i of the SVD of the dense deltas side by side."""
    ds = deltas(unweighted(stack))
    u, s, v = torch.linalg.svd(torch.cat(ds, dim=1), full_matrices=False)
    kept = s > 1e-12 * s[0]
    p = torch.diag(s[kept]) @ v[kept]
    return u[:, kept], list(p.split(stack.shape[1], dim=1))


def dense_core(stack: Stack) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U_B, V_A and U_B^T D_i V_A^T from SVDs of the stacked factors."""
    pairs = [stack.scaled(i) for i in range(len(stack.names))]
    u, s, _ = torch.linalg.svd(torch.cat([b for b, _ in pairs], dim=1), full_matrices=False)
    _, t, v = torch.linalg.svd(torch.cat([a for _, a in pairs]), full_matrices=False)
    u, v = u[:, s > 1e-12 * s[0]], v[t > 1e-12 * t[0]]
    return u, v, [u.t() @ d @ v.t() for d in deltas(unweighted(stack))]


def naive_ties(ds: Sequence[Tensor], density: float, weights: Sequence[float]) -> Tensor:
    trimmed = []
    for d, weight in zip(ds, weights, strict=True):
        k = max(1, math.ceil(density * d.numel() - 1e-9))
        cut = d.abs().flatten().sort(descending=True).values[k - 1]
        trimmed.append(weight * torch.where(d.abs() >= cut, d, torch.zeros_like(d)))
    joint = torch.stack(trimmed)
    agrees = (torch.sign(joint) == torch.sign(joint.sum(0))) & (joint != 0)
    return torch.where(agrees, joint, torch.zeros_like(joint)).sum(0) / agrees.sum(0).clamp_min(1)


def ties(stacks: Sequence[StackLike], *, density: float) -> Iterator[tuple[str, Delta]]:
    for stack in stacks:
        blocks = [block for _, block in stack.blocks()]
        ds = [torch.cat([block[i] for block in blocks]) for i in range(len(stack.names))]
        yield stack.module, Dense(naive_ties(ds, density, stack.weights))


def up_to_sign(got: Tensor, expected: Tensor) -> None:
    """Compare matrices whose rows may differ in sign."""
    assert got.shape == expected.shape
    signs = torch.sign((got * expected).sum(1, keepdim=True))
    same(got, signs * expected, 1e-7)


# ------------------------------------------------------------------ representations


@every_case
@every_space
def test_lifted_representation_is_the_delta(case: str, space: str) -> None:
    stack = CASES[case]
    small, lift = to_space(stack, space)  # type: ignore[arg-type]
    assert (small.module, small.layer, small.names) == (stack.module, stack.layer, stack.names)
    assert (small.weights, small.seed) == (stack.weights, stack.seed)
    assert small.present == stack.present
    assert small.shape[0] <= min(stack.shape[0], sum(stack.ranks))
    if space == "core":
        assert small.shape[1] <= min(stack.shape[1], sum(stack.ranks))
    for x, d in zip(deltas(unweighted(small)), deltas(unweighted(stack)), strict=True):
        same(lift(x).dense(), d)
        same(lift(Dense(x)).dense(), d)
    for f, d in zip(small.factors, deltas(unweighted(stack)), strict=True):
        if f is not None:
            b, a = f.scaled()
            same(lift(Factored(b, a)).dense(), d)


@every_case
def test_knots_is_the_svd_of_the_deltas_side_by_side(case: str) -> None:
    stack = CASES[case]
    u, p = dense_knots(stack)
    got, left, right = represented(stack, "knots")
    assert right is None
    up_to_sign(left.t(), u.t())
    up_to_sign(torch.cat(got, dim=1), torch.cat(p, dim=1))


@every_case
def test_core_is_the_delta_between_the_singular_vectors_of_the_stacked_factors(case: str) -> None:
    stack = CASES[case]
    u, v, x = dense_core(stack)
    got, left, right = represented(stack, "core")
    assert right is not None
    up_to_sign(left.t(), u.t())
    up_to_sign(right, v)
    same(torch.stack(got).abs(), torch.stack(x).abs(), 1e-7)


@every_space
def test_signs_of_the_basis_are_fixed(space: str) -> None:
    stack = CASES["mixed ranks"]
    negated = dataclasses.replace(
        stack,
        factors=tuple(
            None if f is None else LoraFactors(-f.a, -f.b, f.scaling) for f in stack.factors
        ),
    )
    _, one, _ = represented(stack, space)
    _, two, _ = represented(negated, space)
    assert float(one.gather(0, one.abs().argmax(0, keepdim=True)).min()) > 0.0
    torch.testing.assert_close(one, two)


@every_space
def test_dependent_adapters_take_only_the_directions_they_span(space: str) -> None:
    one = drawn(0, 24, 20, 3)
    small, _ = to_space(stack_of([one, dataclasses.replace(one, scaling=2.0), one]), space)  # type: ignore[arg-type]
    assert small.shape == ((3, 20) if space == "knots" else (3, 3))


@every_space
def test_all_zero_module_stays_zero(space: str) -> None:
    stack = stack_of([zero_of(9, 7, 2), None, zero_of(9, 7, 3)])
    got = merged(plain_sum, stack, space)
    assert torch.equal(got, torch.zeros(9, 7, dtype=torch.float64))
    assert torch.equal(merged(ties, stack, space, density=0.5), got)


@every_space
def test_adapter_of_zeros_beside_others_is_zero_in_the_space(space: str) -> None:
    small, _ = to_space(stack_of([drawn(0, 9, 7, 2), zero_of(9, 7, 2)]), space)  # type: ignore[arg-type]
    assert not bool(deltas(small)[1].any())


def test_split_into_factors_does_not_matter_to_knots() -> None:
    stack = CASES["mixed ranks"]
    turned = []
    for f in stack.factors:
        assert f is not None
        g = torch.diag(torch.linspace(0.2, 30.0, f.rank, dtype=torch.float64))
        g[0, -1] = 2.0
        turned.append(LoraFactors(torch.linalg.inv(g) @ f.a, f.b @ g, f.scaling))
    changed = dataclasses.replace(stack, factors=tuple(turned))
    got = merged(ties, changed, "knots", density=0.4)
    same(got, merged(ties, stack, "knots", density=0.4))


@every_space
def test_order_of_adapters_does_not_matter(space: str) -> None:
    stack = CASES["weighted"]
    turned = dataclasses.replace(
        stack, names=stack.names[::-1], factors=stack.factors[::-1], weights=stack.weights[::-1]
    )
    same(merged(ties, turned, space, density=0.4), merged(ties, stack, space, density=0.4))


@every_space
def test_orthogonal_adapters_do_not_vote_on_each_other(space: str) -> None:
    # Rotated into the joint basis, each is rounding noise where the other lives; noise that agreed
    # in sign would halve the mean of TIES.
    left = torch.linalg.qr(drawn(0, 24, 24, 24).b).Q
    right = torch.linalg.qr(drawn(1, 20, 20, 20).b).Q.t()
    size = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    one = LoraFactors(right[:3], left[:, :3] * size, 1.0)
    two = LoraFactors(right[3:6], left[:, 3:6] * size * 0.77, 1.0)
    stack = stack_of([one, two])
    same(merged(ties, stack, space, density=1.0), sum(deltas(stack)), 1e-12)


# ------------------------------------------------------------------ methods in the spaces


@every_case
@every_space
@pytest.mark.parametrize("method", [plain_sum, get_method("task_arithmetic").function])
def test_plain_sum_in_a_space_is_the_plain_sum(
    case: str, space: str, method: Callable[..., Any]
) -> None:
    same(merged(method, CASES[case], space), sum(deltas(CASES[case])), 1e-12)


@every_case
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots_ties_is_ties_on_the_dense_svd(case: str, density: float) -> None:
    stack = CASES[case]
    u, p = dense_knots(stack)
    expected = u @ naive_ties(p, density, stack.weights)
    same(merged(ties, stack, "knots", density=density), expected, 1e-7)


@pytest.mark.parametrize("case", ["two", "mixed ranks", "eight", "wide", "rank above the size"])
def test_registered_ties_in_knots_is_ties_on_the_dense_svd(case: str) -> None:
    stack = CASES[case]
    u, p = dense_knots(stack)
    expected = u @ naive_ties(p, 0.2, stack.weights)
    same(merged(get_method("ties").function, stack, "knots", density=0.2), expected, 1e-7)


@every_case
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_core_ties_is_ties_on_the_dense_cores(case: str, density: float) -> None:
    stack = CASES[case]
    u, v, x = dense_core(stack)
    expected = u @ naive_ties(x, density, stack.weights) @ v
    same(merged(ties, stack, "core", density=density), expected, 1e-7)


def test_tsv_in_core_is_tsv() -> None:
    stack = CASES["eight"]
    ((_, full),) = tsv_m([stack], directions=2)
    same(merged(tsv_m, stack, "core", directions=2), full.dense(), 1e-8)


@dataclasses.dataclass(frozen=True)
class Plain:
    """The least a method that works entry by entry may ask for, over dense matrices."""

    of: Stack

    module = property(lambda self: self.of.module)
    layer = property(lambda self: self.of.layer)
    names = property(lambda self: self.of.names)
    weights = property(lambda self: self.of.weights)
    shape = property(lambda self: self.of.shape)
    dtype = property(lambda self: self.of.dtype)
    present = property(lambda self: self.of.present)

    def blocks(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        ds = deltas(unweighted(self.of))
        for start in range(0, self.shape[0], 3):
            rows = slice(start, min(start + 3, self.shape[0]))
            yield rows, tuple(d[rows].clone() for d in ds)

    def generator(self, adapter: str) -> torch.Generator:
        return self.of.generator(adapter)


def options_of(info: MethodInfo) -> dict[str, Any]:
    return {name: 0.5 for name, default in info.options.items() if default is REQUIRED}


@pytest.mark.parametrize("info", ELEMENTWISE, ids=lambda info: info.name)
@every_space
def test_elementwise_method_runs_in_the_space(info: MethodInfo, space: str) -> None:
    stacks = [
        random_stack([2, 4, 3], seed=1, module="model.layers.0.q_proj"),
        random_stack([2, None, 3], 10, 30, seed=2, module="model.layers.1.up_proj"),
    ]
    options = options_of(info)
    got = dict(in_space(info.function, stacks, space, **options))  # type: ignore[arg-type]
    assert sorted(got) == [s.module for s in stacks]
    pairs = [to_space(s, space) for s in stacks]  # type: ignore[arg-type]
    plain = dict(info.function([Plain(small) for small, _ in pairs], **options))
    for stack, (small, lift) in zip(stacks, pairs, strict=True):
        delta = got[stack.module]
        assert isinstance(delta, Factored)
        assert delta.b.shape[1] == small.shape[0] <= sum(stack.ranks)
        assert bool(torch.isfinite(delta.dense()).all())
        same(delta.dense(), lift(plain[stack.module]).dense(), 1e-8)


def test_there_are_elementwise_methods() -> None:
    assert {"ties", "dare_linear", "magnitude_prune", "sce"} <= {i.name for i in ELEMENTWISE}


@every_space
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_factors_give_float32_results_near_the_float64_ones(
    space: str, dtype: torch.dtype
) -> None:
    stack = random_stack([2, 4, 3], seed=1, dtype=dtype)
    wide = dataclasses.replace(
        stack,
        factors=tuple(
            None if f is None else LoraFactors(f.a.double(), f.b.double(), f.scaling)
            for f in stack.factors
        ),
    )
    got = merged(ties, stack, space, density=0.4)
    assert got.dtype == torch.float32
    same(got, merged(ties, wide, space, density=0.4), 1e-5)


@every_space
def test_no_dense_matrix_is_made(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("a dense delta was made")

    monkeypatch.setattr(combine, "new_dense", refuse)
    stack = random_stack([2, 4, None, 3], 600, 80)
    with Largest() as largest:
        list(in_space(ties, [stack], space, density=0.2))  # type: ignore[arg-type]
    assert largest.numel <= 600 * 9


def test_full_space_is_the_method_itself() -> None:
    stack = CASES["two"]
    ((_, delta),) = in_space(ties, [stack], "full", density=0.3)
    same(delta.dense(), naive_ties(deltas(stack), 0.3, stack.weights))


def test_unknown_space_is_refused_at_the_call() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'knots'"):
        in_space(ties, [CASES["two"]], "knot", density=0.3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="full"):
        to_space(CASES["two"], "full")


@every_space
def test_values_that_are_not_finite_are_refused_by_name(space: str) -> None:
    bad = drawn(1, 24, 20, 2)
    bad.a[0, 1] = float("nan")
    with pytest.raises(AdapterError, match=rf"'b'.*{MODULE}"):
        merged(ties, stack_of([drawn(0, 24, 20, 2), bad]), space, density=0.3)
