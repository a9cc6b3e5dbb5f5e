"""The subspace methods against naive dense float64 versions of their formulas, and their laws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import MODULE, deltas, drawn, random_stack, stack_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_himerge import combine
from peft_himerge.errors import AdapterError, ConfigError
from peft_himerge.factors import LoraFactors
from peft_himerge.methods.bank import ReversibleBank, reversible_bank
from peft_himerge.methods.registry import get_method
from peft_himerge.methods.stack import Delta, Factored, Stack
from peft_himerge.methods.subspace import iso_c, iso_cts, opcm, tsv_m
from peft_himerge.methods.widen import widen
from peft_himerge.methods.wudi import aswudi, optmerge, swudi, wudi

Method = Callable[..., Iterator[tuple[str, Delta]]]
METHODS: dict[str, Method] = {
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "opcm": opcm,
    "wudi": wudi,
    "optmerge": optmerge,
    "swudi": swudi,
    "aswudi": aswudi,
    "widen": widen,
}
every_method = pytest.mark.parametrize("name", METHODS)

CASES: dict[str, Stack] = {
    "two": random_stack([3, 3]),
    "mixed ranks": random_stack([2, 4, 3], seed=1),
    "eight": random_stack([2, 2, 3, 2, 2, 3, 2, 4], seed=2),
    "missing": random_stack([2, None, 4], seed=3),
    "weighted": random_stack([3, 2, 2], seed=4, weights=[0.3, 2.0, -1.1]),
    "wide": random_stack([3, 4], 9, 31, seed=5),
    "rank above the size": random_stack([5, 8, 3], 6, 7, seed=6),
    "one by one": random_stack([1, 2], 1, 1, seed=7),
    "one row": random_stack([2, 2, 1], 1, 8, seed=8),
    "alone": random_stack([3], seed=9),
}
every_case = pytest.mark.parametrize("case", CASES)


def run(method: Method, stack: Stack, **options: Any) -> Tensor:
    ((module, delta),) = method([stack], **options)
    assert module == stack.module
    assert isinstance(delta, Factored)
    assert delta.b.dtype == delta.a.dtype == stack.dtype
    return delta.dense()


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == expected.shape
    size = max(float(expected.norm()), 1e-300)
    assert float((got.double() - expected).norm()) <= tolerance * size


# ------------------------------------------------------------------ naive dense versions


def thin(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = s > 1e-12 * max(float(s[0]), 1e-300)
    return u[:, kept], s[kept], v[kept]


def nearest_isometry(x: Tensor) -> Tensor:
    # X (X^T X)^(-1/2) with the pseudo-inverse, by the eigen-decomposition of the Gram matrix.
    values, vectors = torch.linalg.eigh(x.t() @ x)
    root = torch.where(values > 1e-10 * values.max(), values.clamp_min(1e-300).rsqrt(), 0.0)
    return x @ vectors @ torch.diag(root) @ vectors.t()


def naive_tsv_m(stack: Stack) -> Tensor:
    ds = [d for d in deltas(stack) if bool(d.any())]
    k = max(1, min(stack.shape) // len(ds))
    us, ss, vs = zip(*[thin(d) for d in ds], strict=True)
    u = nearest_isometry(torch.cat([u[:, :k] for u in us], 1))
    v = nearest_isometry(torch.cat([v[:k] for v in vs], 0).t())
    return u @ torch.diag(torch.cat([s[:k] for s in ss])) @ v.t()


def naive_iso_c(stack: Stack) -> Tensor:
    u, s, v = thin(torch.stack(deltas(stack)).sum(0))
    return s.mean() * u @ v


def naive_iso_cts(stack: Stack, common: float = 0.8, rank: int | None = None) -> Tensor:
    ds = [d for d in deltas(stack) if bool(d.any())]
    budget = min(*stack.shape, rank or sum(len(thin(d)[1]) for d in ds))
    own = min(round((budget - int(budget * common)) / len(ds)), budget // len(ds))
    c = budget - own * len(ds)
    u, s, v = (
        x.narrow(i, 0, min(c, x.shape[i])) for x, i in zip(thin(sum(ds)), (1, 0, 0), strict=True)
    )
    us, ss, vs = [], [], []
    for d in ds:
        rest = d - u @ u.t() @ d
        ru, rs, rv = torch.linalg.svd(rest, full_matrices=False)
        k = min(own, int((rs > 1e-12 * d.norm()).sum()))
        us.append(ru[:, :k])
        ss.append(rs[:k])
        vs.append(rv[:k])
    left = nearest_isometry(torch.cat([*us, u], 1))
    right = nearest_isometry(torch.cat([*vs, v], 0).t())
    return torch.cat([*ss, s]).mean() * left @ right.t()


def naive_opcm(stacks: Sequence[Stack], alpha: float = 0.5) -> list[Tensor]:
    ds = [deltas(stack) for stack in stacks]
    count = len(ds[0])
    norm = [torch.cat([d[i].flatten() for d in ds]).norm() for i in range(count)]
    merged, lam = [d[0] for d in ds], 1.0
    for i in range(1, count):
        for k, m in enumerate(merged):
            d = ds[k][i]
            new = d.clone()
            if bool(m.any()):
                u, s, v = thin(m)
                share = s.cumsum(0) / s.sum()
                q = next((j for j in range(len(s)) if share[j] > alpha), len(s))
                new -= u[:, :q] @ u[:, :q].t() @ d @ v[:q].t() @ v[:q]
                for j in range(q, len(s)):
                    new -= (u[:, j] @ d @ v[j]) * torch.outer(u[:, j], v[j])
            merged[k] = lam * m + new
        a = sum(norm[: i + 1]) / (i + 1)
        lam = float(torch.cat([m.flatten() for m in merged]).norm() / a)
        merged = [m / lam for m in merged]
    return merged


def normal_equations(ds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ds = [d for d in ds if bool(d.any())]
    c = torch.stack([d.t() @ d / d.square().sum() for d in ds]).sum(0)
    e = torch.stack([d @ d.t() @ d / d.square().sum() for d in ds]).sum(0)
    return c, e


def naive_wudi(stack: Stack) -> Tensor:
    c, e = normal_equations(deltas(stack))
    return e @ torch.linalg.pinv(c, hermitian=True, rtol=1e-11)


def naive_optmerge(
    stack: Stack, steps: int = 300, lr: float = 1e-4, momentum: float = 0.9
) -> Tensor:
    ds = deltas(stack)
    present = [d for d in ds if bool(d.any())]
    k = max(1, min(stack.shape) // len(present))
    merged = torch.stack(ds).mean(0).requires_grad_()
    descent = torch.optim.SGD([merged], lr=lr, momentum=momentum)
    cut = []
    for d in present:
        u, s, v = torch.linalg.svd(d, full_matrices=False)
        cut.append((u[:, :k] @ torch.diag(s[:k]) @ v[:k], torch.diag(s[:k]) @ v[:k]))
    for _ in range(steps):
        descent.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for d, (target, rows) in zip(present, cut, strict=True):
            loss = loss + ((merged - target) @ rows.t()).square().sum() / d.square().sum()
        loss.backward()
        descent.step()
    return merged.detach()


def naive_swudi(
    stack: Stack, time: float | None = 300.0, ratio: float = 0.65, start: str = "sum"
) -> Tensor:
    ds = deltas(stack)
    c, e = normal_equations(ds)
    mu, v = torch.linalg.eigh(c)
    mu, v = mu.flip(0), v.flip(1)
    rank = int((mu > 1e-12 * mu[0]).sum())
    f = torch.zeros_like(mu)
    f[: -int(-ratio * rank // 1)] = 1.0
    if time is not None:
        f *= 1.0 - torch.exp(-time * mu)
    m0 = {"sum": sum(ds), "mean": sum(ds) / len(ds), "zero": 0.0 * sum(ds)}[start]
    step = torch.where(f > 0, f / mu.clamp_min(1e-300), 0.0)
    return m0 - m0 @ v @ torch.diag(f) @ v.t() + e @ v @ torch.diag(step) @ v.t()


def naive_aswudi(stack: Stack) -> Tensor:
    c, _ = normal_equations(deltas(stack))
    mu = torch.linalg.eigvalsh(c)
    mu = mu[mu > 1e-12 * mu.max()]
    k = -int(-float(mu.sqrt().sum() ** 2 / mu.sum()) // 1)
    return naive_swudi(stack, time=None, ratio=(k - 0.5) / len(mu))


def naive_widen(stack: Stack, ratio: float = 1.0, calibration: float = 1.0) -> Tensor:
    assert stack.base is not None
    base = stack.base()
    present = [d for d in deltas(stack) if bool(d.any())]
    width = base.shape[1]
    scores = []
    for measure in (
        lambda w: (w.norm(dim=0) - base.norm(dim=0)).abs(),
        lambda w: 1.0 - (w * base).sum(0) / (w.norm(dim=0) * base.norm(dim=0)),
    ):
        ranks = torch.zeros(len(present), width, dtype=torch.float64)
        for i, d in enumerate(present):
            # Rounded: columns that tie keep their order.
            change = [round(x, 12) for x in measure(base + d).tolist()]
            for place, j in enumerate(sorted(range(width), key=change.__getitem__)):
                ranks[i, j] = place / width
        score = torch.exp(ranks) / torch.exp(ranks).sum(0)
        for i in range(len(present)):
            above = 2 * width * ranks[i] > ratio * (width - 1) + 1e-9  # above the mean rank
            score[i, above] = calibration
        scores.append(score)
    weight = (scores[0] + scores[1]) / 2
    return sum(d * w for d, w in zip(present, weight, strict=True))


NAIVE: dict[str, Callable[[Stack], Tensor]] = {
    "tsv_m": naive_tsv_m,
    "iso_c": naive_iso_c,
    "iso_cts": naive_iso_cts,
    "opcm": lambda stack: naive_opcm([stack])[0],
    "wudi": naive_wudi,
    "optmerge": naive_optmerge,
    "swudi": naive_swudi,
    "aswudi": naive_aswudi,
    "widen": naive_widen,
}


# ------------------------------------------------------------------ agreement


@every_method
@every_case
def test_method_agrees_with_its_dense_formula(name: str, case: str) -> None:
    # Inverse singular values amplify rounding where a module is nearly rank deficient.
    same(run(METHODS[name], CASES[case]), NAIVE[name](CASES[case]), 1e-6)


@every_method
def test_method_on_bfloat16_factors_agrees_with_the_dense_formula_on_their_values(
    name: str,
) -> None:
    stack = random_stack([2, 4, 3], seed=1, dtype=torch.bfloat16)
    got = run(METHODS[name], stack)
    assert got.dtype == torch.float32
    same(got, NAIVE[name](stack), 1e-4)


def test_options_reach_the_formula() -> None:
    stack = CASES["mixed ranks"]
    same(run(iso_cts, stack, common=0.4, lam=0.7), 0.7 * naive_iso_cts(stack, 0.4), 1e-8)
    same(run(iso_cts, stack, common=0.0), naive_iso_cts(stack, 0.0), 1e-8)
    same(run(iso_cts, stack, common=1.0), naive_iso_c(stack), 1e-8)
    # 3 tasks would round 5 / 3 up to 2 directions each, one more than there are.
    same(run(iso_cts, stack, common=0.0, directions=5), naive_iso_cts(stack, 0.0, 5), 1e-8)
    same(run(tsv_m, stack, lam=-2.0), -2.0 * naive_tsv_m(stack), 1e-8)
    same(
        run(optmerge, stack, steps=40, lr=0.05, momentum=0.5), naive_optmerge(stack, 40, 0.05, 0.5)
    )
    for start in ("sum", "mean", "zero"):
        got = run(swudi, stack, time=2.0, ratio=0.3, start=start)
        same(got, naive_swudi(stack, 2.0, 0.3, start), 1e-8)
    same(run(swudi, stack, time=None, ratio=1.0, start="zero"), naive_wudi(stack), 1e-8)
    same(run(widen, stack, ratio=0.5, calibration=0.8), naive_widen(stack, 0.5, 0.8), 1e-8)
    for alpha in (0.0, 0.3, 0.9, 1.0):
        same(run(opcm, stack, alpha=alpha), naive_opcm([stack], alpha)[0], 1e-8)


def test_tsv_m_rank_keeps_that_many_directions_per_adapter() -> None:
    one, two = drawn(0, 24, 20, 4), drawn(1, 24, 20, 4)
    got = run(tsv_m, stack_of([one, two]), directions=1)
    assert int(torch.linalg.matrix_rank(got)) == 2


def test_optmerge_default_stays_near_the_mean_and_converges_to_wudi_when_told_to() -> None:
    stack = CASES["two"]
    mean, minimum = sum(deltas(stack)) / 2, naive_wudi(stack)
    default = run(optmerge, stack)
    assert 0.5 < float((default - minimum).norm() / (mean - minimum).norm()) < 1.0
    same(run(optmerge, stack, steps=3000, lr=0.5), minimum, 1e-6)


def test_optmerge_is_close_to_the_exponential_filter_of_the_same_length() -> None:
    # 2 * lr * steps / (1 - momentum) = 0.6: METHODS 3.21 measured 0.6 % between the two.
    stack = CASES["mixed ranks"]
    flow = run(swudi, stack, time=0.6, ratio=1.0, start="mean")
    same(run(optmerge, stack), flow, 0.01)


def test_wudi_has_no_gradient_left_and_no_worse_objective_than_any_neighbour() -> None:
    stack = CASES["eight"]
    c, e = normal_equations(deltas(stack))
    got = run(wudi, stack)
    assert float((got @ c - e).norm()) < 1e-10 * float(e.norm())


def test_opcm_measures_its_norms_over_the_whole_model() -> None:
    stacks = [
        random_stack([2, 3, 2], seed=11, module="model.layers.0.q_proj"),
        random_stack([2, None, 4], 10, 14, seed=12, module="model.layers.1.up_proj"),
    ]
    expected = naive_opcm(stacks)
    for (_, got), dense in zip(opcm(stacks), expected, strict=True):
        same(got.dense(), dense, 1e-8)
    alone = run(opcm, stacks[0])
    assert float((alone - expected[0]).norm()) > 1e-3 * float(alone.norm())


def test_opcm_order_names_the_sequence() -> None:
    one, two, three = (drawn(i, 12, 10, 2) for i in range(3))
    got = run(opcm, stack_of([one, two, three]), order=["c", "a", "b"])
    same(got, naive_opcm([stack_of([three, one, two])])[0], 1e-8)
    assert list(opcm([])) == []


# ------------------------------------------------------------------ laws


@every_method
def test_one_adapter_is_given_back(name: str) -> None:
    stack = CASES["alone"]
    got = run(METHODS[name], stack)
    if name in ("iso_c", "iso_cts"):  # they even out the spectrum: only the directions come back
        u, s, v = thin(deltas(stack)[0])
        same(got, s.mean() * u @ v, 1e-8)
    else:
        same(got, deltas(stack)[0], 1e-8)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"opcm"}))
def test_order_of_adapters_does_not_matter(name: str) -> None:
    stack = CASES["weighted"]
    turned = dataclasses.replace(
        stack,
        names=stack.names[::-1],
        factors=stack.factors[::-1],
        weights=stack.weights[::-1],
    )
    same(run(METHODS[name], turned), run(METHODS[name], stack), 1e-7)


@every_method
def test_split_of_a_delta_into_factors_does_not_matter(name: str) -> None:
    stack = CASES["mixed ranks"]
    turned = []
    for i, f in enumerate(stack.factors):
        assert f is not None
        g = torch.linalg.qr(drawn(50 + i, f.rank, f.rank, f.rank).b).Q
        g = g * torch.linspace(0.1, 10.0, f.rank, dtype=torch.float64)
        turned.append(LoraFactors(torch.linalg.inv(g) @ f.a, f.b @ g, f.scaling))
    changed = dataclasses.replace(stack, factors=tuple(turned))
    same(run(METHODS[name], changed), run(METHODS[name], stack), 1e-7)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"widen"}))
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_common_scale_goes_through(name: str, scale: float) -> None:
    stack = CASES["missing"]
    factors = tuple(
        None if f is None else dataclasses.replace(f, scaling=f.scaling * scale)
        for f in stack.factors
    )
    got = run(METHODS[name], dataclasses.replace(stack, factors=factors))
    same(got, scale * run(METHODS[name], stack), 1e-7)


def zero_of(out: int, width: int, rank: int) -> LoraFactors:
    return dataclasses.replace(drawn(99, out, width, rank), b=torch.zeros(out, rank).double())


@every_method
def test_missing_module_is_a_zero_delta(name: str) -> None:
    stack = CASES["missing"]
    first, _, last = stack.factors
    filled = dataclasses.replace(stack, factors=(first, zero_of(24, 20, 3), last))
    same(run(METHODS[name], filled), run(METHODS[name], stack), 1e-8)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "swudi", "aswudi", "widen"])
def test_zero_adapter_changes_nothing(name: str) -> None:
    stack = CASES["two"]
    more = dataclasses.replace(
        stack,
        names=("a", "b", "c"),
        factors=(*stack.factors, zero_of(24, 20, 2)),
        weights=(1.0,) * 3,
    )
    same(run(METHODS[name], more), run(METHODS[name], stack), 1e-8)


def test_zero_adapter_takes_no_share_of_the_directions() -> None:
    one, two = drawn(0, 6, 8, 3), drawn(1, 6, 8, 3)
    same(run(tsv_m, stack_of([one, two, zero_of(6, 8, 3)])), naive_tsv_m(stack_of([one, two])))


def test_iso_cts_does_not_raise_what_is_common_already() -> None:
    one = drawn(0, 24, 20, 3)
    same(run(iso_cts, stack_of([one, one])), naive_iso_c(stack_of([one, one])), 1e-8)


@pytest.mark.parametrize(("out", "width"), [(30, 6), (6, 30)])
def test_rank_of_the_result_is_at_most_the_smaller_side(out: int, width: int) -> None:
    ((_, delta),) = iso_c([random_stack([5, 8, 3], out, width)])
    assert isinstance(delta, Factored)
    assert delta.b.shape[1] == 6


@every_method
@pytest.mark.parametrize("count", [1, 3])
def test_all_zero_module_gives_zeros(name: str, count: int) -> None:
    stack = random_stack([2] * count)
    zeros = dataclasses.replace(stack, factors=tuple(zero_of(24, 20, 2) for _ in range(count)))
    got = run(METHODS[name], zeros)
    assert torch.equal(got, torch.zeros(24, 20, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "optmerge"])
def test_same_adapter_twice_merges_to_itself(name: str) -> None:
    one = drawn(0, 24, 20, 3)
    same(run(METHODS[name], stack_of([one, one])), deltas(stack_of([one]))[0], 1e-8)


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "iso_c"])
def test_float32_copies_at_different_scalings_do_not_raise_rounding_to_a_direction(
    name: str,
) -> None:
    # Folding 1/3 and 1/7 into b rounds each copy differently: the joint basis gains directions at
    # 1e-8 of the others, which a polar factor or an inverse would bring to full size.
    one = drawn(0, 24, 20, 3, torch.float32)
    stack = stack_of(
        [dataclasses.replace(one, scaling=1 / 3), dataclasses.replace(one, scaling=1 / 7)]
    )
    d = one.b.double() @ one.a.double()
    u, s, v = thin(d)
    expected = {
        "tsv_m": (1 / 3 + 1 / 7) / 2 * d,
        "wudi": (1 / 3 + 1 / 7) / 2 * d,
        "iso_c": (1 / 3 + 1 / 7) * s.mean() * u @ v,
    }[name]
    same(run(METHODS[name], stack), expected, 1e-5)


def test_sum_that_cancels_has_no_directions() -> None:
    one = drawn(0, 24, 20, 3)
    assert not bool(run(iso_c, stack_of([one, one], weights=[1.0, -1.0])).any())


def test_widen_guards_a_base_column_of_zeros_and_ranks_it_last() -> None:
    stack = random_stack([2, 2], seed=3)
    assert stack.base is not None
    base = stack.base().clone()
    base[:, 4] = 0.0
    for f in stack.factors:
        assert f is not None
        f.a[:, 4] *= 20.0
    got = run(widen, dataclasses.replace(stack, base=lambda: base))
    assert bool(torch.isfinite(got).all())
    # Length and direction changed the most of all columns, in both, so both count fully.
    same(got[:, 4], deltas(stack)[0][:, 4] + deltas(stack)[1][:, 4])


def test_widen_agrees_with_its_formula_where_deltas_are_larger_than_the_base() -> None:
    stack = random_stack([3, 4, 2], 6, 300, seed=17)
    assert stack.base is not None
    base = stack.base() / 2.0
    changed = dataclasses.replace(stack, base=lambda: base)
    same(run(widen, changed), naive_widen(changed))


def test_widen_tells_tiny_changes_of_direction_apart() -> None:
    # At 1e-9 of the base, 1 - cos is 1e-18: below float64's resolution next to 1.
    stack = random_stack([2, 2], seed=5)
    small = tuple(
        dataclasses.replace(f, scaling=f.scaling * 1e-9) for f in stack.factors if f is not None
    )
    little = tuple(
        dataclasses.replace(f, scaling=f.scaling * 1e-4) for f in stack.factors if f is not None
    )
    tiny = run(widen, dataclasses.replace(stack, factors=small))
    same(1e5 * tiny, run(widen, dataclasses.replace(stack, factors=little)), 1e-6)


# ------------------------------------------------------------------ memory and refusals


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return result


@every_method
def test_no_dense_matrix_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("a dense delta was made")

    monkeypatch.setattr(combine, "new_dense", refuse)
    stack = random_stack([2, 4, None, 3], 600, 80)
    with Largest() as largest:
        list(METHODS[name]([stack]))
    # widen reads the base in blocks of 256 rows; the others hold at most (out, R).
    assert largest.numel <= (256 * 80 if name == "widen" else 600 * 9)


@every_method
def test_method_is_registered_as_low_rank(name: str) -> None:
    info = get_method(name)
    assert info.function is METHODS[name]
    assert info.low_rank
    assert not info.elementwise


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"widen"}))
def test_values_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    bad = drawn(1, 24, 20, 2)
    bad.b[3, 1] = value
    with pytest.raises(AdapterError, match=rf"'b'.*{MODULE}"):
        list(METHODS[name]([stack_of([drawn(0, 24, 20, 2), bad])]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsv_m", {"directions": 0}),
        ("tsv_m", {"lam": float("nan")}),
        ("iso_c", {"lam": "1"}),
        ("iso_cts", {"common": 1.2}),
        ("iso_cts", {"directions": -1}),
        ("opcm", {"alpha": -0.1}),
        ("opcm", {"order": ["a"]}),
        ("opcm", {"order": ["a", "z"]}),
        ("opcm", {"order": ["a", "a"]}),
        ("wudi", {"lam": None}),
        ("optmerge", {"steps": -1}),
        ("optmerge", {"lr": -1.0}),
        ("optmerge", {"momentum": 2.0}),
        ("optmerge", {"lr": 100.0}),
        ("swudi", {"time": -1.0}),
        ("swudi", {"ratio": 1.5}),
        ("swudi", {"start": "median"}),
        ("aswudi", {"start": "none"}),
        ("widen", {"ratio": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        list(METHODS[name]([CASES["two"]], **options))


def test_widen_without_base_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=MODULE):
        list(widen([dataclasses.replace(CASES["two"], base=None)]))


# ------------------------------------------------------------------ reversible bank


def rebuilt(bank: ReversibleBank, name: str, module: str = MODULE) -> Tensor:
    f = bank.rebuild(name).factors[module]
    return f.scaling * (f.b.double() @ f.a.double())


@every_case
def test_bank_with_all_directions_gives_every_adapter_back(case: str) -> None:
    stack = dataclasses.replace(CASES[case], weights=(1.0,) * len(CASES[case].names))
    bank = reversible_bank([stack], directions=len(stack.names) - 1)
    for name, delta, original in zip(stack.names, deltas(stack), stack.factors, strict=True):
        if original is None:
            assert MODULE not in bank.rebuild(name).factors
        else:
            assert bank.rebuild(name).factors[MODULE].rank == original.rank
            same(rebuilt(bank, name), delta, 1e-9)


def test_bank_agrees_with_a_principal_component_analysis_of_each_position() -> None:
    stack = random_stack([3, 3, 3, 3, 3], seed=13)
    bank = reversible_bank([stack], directions=2)
    pairs = [stack.scaled(i) for i in range(5)]
    for side, vectors in (("b", [b for b, _ in pairs]), ("a", [a.t() for _, a in pairs])):
        held = getattr(bank.modules[MODULE], side)
        for position in (0, 7, 19):
            x = torch.stack([v[position] for v in vectors])
            centred = x - x.mean(0)
            _, directions = torch.linalg.eigh(centred.t() @ centred)
            w = directions[:, -2:]
            expected = x.mean(0) + centred @ w @ w.t()
            got = torch.stack([held.rebuild(i)[position] for i in range(5)])
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_bank_without_directions_is_the_mean_of_the_factors() -> None:
    stack = random_stack([2, 2], seed=14)
    bank = reversible_bank([stack], directions=0)
    (b, a), (d, c) = stack.scaled(0), stack.scaled(1)
    for name in stack.names:
        same(rebuilt(bank, name), (b + d) @ (a + c) / 4)


def test_bank_ratio_counts_what_is_stored() -> None:
    # p (r + T) + r numbers per position instead of r T: (8 + 8 + 8) / 64.
    assert reversible_bank([random_stack([8] * 8)], directions=1).ratio == 24 / 64


def test_bank_comes_back_from_its_file(tmp_path: Path) -> None:
    stacks = [
        random_stack([2, 4, None], seed=15, module="model.layers.0.q_proj"),
        random_stack([2, 2, 3], 10, 14, seed=16, module="model.layers.1.q_proj"),
    ]
    bank = reversible_bank(stacks, directions=1)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ReversibleBank.load(tmp_path / "bank.safetensors")
    assert loaded.names == bank.names
    for name in bank.names:
        assert loaded.rebuild(name).digest() == bank.rebuild(name).digest()


def test_bank_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    bank = reversible_bank([CASES["two"]])
    with pytest.raises(ConfigError, match="'z'"):
        bank.rebuild("z")
    with pytest.raises(ConfigError):
        reversible_bank([CASES["two"]], directions=-1)
    with pytest.raises(ConfigError):
        reversible_bank([])
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="other"):
        ReversibleBank.load(tmp_path / "other.safetensors")
