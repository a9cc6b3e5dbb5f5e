"""Norms, cosines, signs and singular values of deltas, against dense float64."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_himerge import geometry
from peft_himerge.adapters import plain_factors, read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.factors import Adapter, LoraFactors
from peft_himerge.geometry import layer_geometry, singular_values, spectra_of, to_records
from peft_himerge.layers import layer_of


def dense(factors: LoraFactors) -> torch.Tensor:
    """The naive delta: scaling * B @ A in float64."""
    return factors.scaling * (factors.b.detach().double() @ factors.a.detach().double())


def combiner_of(kind: str, n: int) -> Combiner:
    model = tiny.peft_model(kind, n)
    return Combiner(read_adapters(model, list(tiny.NAMES[:n])))


@pytest.mark.parametrize(("kind", "n"), [("llama", 3), ("gpt2", 2), ("qwen2", 3)])
def test_norms_and_cosines_are_those_of_the_dense_deltas(kind: str, n: int) -> None:
    combiner = combiner_of(kind, n)
    found = layer_geometry(combiner)
    assert [layer.layer for layer in found] == [layer.label for layer in combiner.layers]
    shared = 0
    for layer in found:
        whole = {
            name: {m: dense(f) for m, f in adapter.factors.items() if layer_of(m) == layer.layer}
            for name, adapter in combiner.adapters.items()
        }
        norms = {
            name: math.sqrt(sum(float(d.square().sum()) for d in deltas.values()))
            for name, deltas in whole.items()
            if deltas
        }
        assert layer.norms == pytest.approx(norms, rel=1e-12)
        assert [pair.adapters for pair in layer.pairs] == list(itertools.combinations(norms, 2))
        for pair in layer.pairs:
            one, other = (whole[name] for name in pair.adapters)
            both = [m for m in one if m in other]
            dot = sum(float((one[m] * other[m]).sum()) for m in both)
            size = norms[pair.adapters[0]] * norms[pair.adapters[1]]
            assert pair.cosine == pytest.approx(dot / size, rel=1e-9, abs=1e-13)
            equal = sum(int(((one[m] > 0) == (other[m] > 0)).sum()) for m in both)
            entries = sum(one[m].numel() for m in both)
            assert pair.entries == entries
            assert pair.sign_agreement_se == 0.0
            assert pair.sign_agreement == (equal / entries if entries else None)
            shared += entries
    assert shared > 0


def pair_of(b: torch.Tensor, a: torch.Tensor, b_2: torch.Tensor, a_2: torch.Tensor) -> Combiner:
    return Combiner(
        [
            Adapter("one", {"h.0.q": LoraFactors(a, b, 0.5)}),
            Adapter("two", {"h.0.q": LoraFactors(a_2, b_2, 3.0)}),
        ]
    )


def test_zeros_take_no_part_in_sign_agreement() -> None:
    b, a = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[2.0, -1.0]])
    b_2, a_2 = torch.tensor([[1.0], [5.0], [1.0]]), torch.tensor([[1.0, 0.0]])
    (layer,) = layer_geometry(pair_of(b, a, b_2, a_2))
    (pair,) = layer.pairs
    # Both are non-zero in column 0 of rows 0 (equal signs) and 2 (unequal).
    assert (pair.entries, pair.sign_agreement) == (2, 0.5)


def test_an_adapter_without_effect_has_no_direction() -> None:
    b, a = torch.ones(3, 1), torch.ones(1, 4)
    (layer,) = layer_geometry(pair_of(b, a, torch.zeros(3, 1), a))
    (pair,) = layer.pairs
    assert layer.norms["two"] == 0.0
    assert (pair.cosine, pair.sign_agreement, pair.entries) == (None, None, 0)


@given(st.floats(-4.0, 4.0).filter(lambda x: abs(x) > 1e-3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_multiple_points_the_same_way(factor: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    b, a = torch.randn(5, 2, generator=draw), torch.randn(2, 7, generator=draw)
    gauge = torch.randn(2, 2, generator=draw, dtype=torch.float64) + 3 * torch.eye(2)
    b_2 = (factor * (b.double() @ gauge)).double()
    a_2 = torch.linalg.solve(gauge, a.double())
    (layer,) = layer_geometry(pair_of(b.double(), a.double(), b_2, a_2))
    (pair,) = layer.pairs
    assert pair.cosine == pytest.approx(math.copysign(1.0, factor), abs=1e-9)
    assert pair.sign_agreement == (1.0 if factor > 0 else 0.0)
    assert layer.norms["two"] == pytest.approx(layer.norms["one"] * 6.0 * abs(factor), rel=1e-9)


def test_a_sample_of_signs_is_near_the_whole_and_says_how_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(1)
    b, a = torch.randn(300, 3, generator=draw), torch.randn(3, 400, generator=draw)
    b_2 = b + torch.randn(300, 3, generator=draw)
    combiner = pair_of(b, a, b_2, a)
    (whole,) = layer_geometry(combiner)[0].pairs
    monkeypatch.setattr(geometry, "_ALL_SIGNS", 1000)
    monkeypatch.setattr(geometry, "_SAMPLE", 20_000)
    (drawn,) = layer_geometry(combiner)[0].pairs
    assert drawn == layer_geometry(combiner)[0].pairs[0]  # the same entries every time
    assert 20_000 <= drawn.entries <= 20_001
    assert whole.sign_agreement is not None
    assert drawn.sign_agreement is not None
    assert drawn.sign_agreement_se == pytest.approx(
        math.sqrt(drawn.sign_agreement * (1 - drawn.sign_agreement) / drawn.entries)
    )
    assert abs(drawn.sign_agreement - whole.sign_agreement) < 4 * drawn.sign_agreement_se
    assert drawn.cosine == whole.cosine  # that one is never sampled


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_singular_values_are_those_of_the_dense_delta(kind: str) -> None:
    model = tiny.peft_model(kind, 2, torch.float32)
    for factors in plain_factors(model, "en").values():
        want = torch.linalg.svdvals(dense(factors))[: factors.rank]
        found = singular_values(factors)
        assert found == pytest.approx(want.tolist(), rel=1e-5)
        assert found == sorted(found, reverse=True)


def test_padding_has_no_singular_value_and_a_wide_adapter_is_left_out() -> None:
    a = torch.eye(2, 6) * torch.tensor([[3.0], [1.0]])
    padded = LoraFactors(torch.cat([a, torch.zeros(2, 6)]), torch.eye(5, 4), 2.0)
    assert singular_values(padded) == pytest.approx([6.0, 2.0])
    assert singular_values(LoraFactors(torch.zeros(2, 6), torch.zeros(5, 2), 2.0)) == []
    assert singular_values(LoraFactors(torch.ones(257, 6), torch.ones(5, 257), 1.0)) is None


def test_records_are_plain_json() -> None:
    combiner = combiner_of("llama", 3)
    merged = combiner.adapters["zh"].factors
    records = to_records(layer_geometry(combiner), spectra_of(merged))
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert set(records["singular_values"]) == set(merged)
    assert [row["layer"] for row in records["layers"]] == [g.label for g in combiner.layers]
