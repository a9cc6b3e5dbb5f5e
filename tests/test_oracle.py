"""The oracle itself: numbers worked by hand, and agreement with PEFT where PEFT is right."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import oracle
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

# ------------------------------------------------------------------------ a model to work by hand


class Chain(nn.Module):
    """y = w1 * w0 * x with 1x1 weights, both 1: the score of a state is a product one can write."""

    def __init__(self) -> None:
        """Set both weights to 1."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False).double() for _ in range(2))
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the chain."""
        return self.layers[1](self.layers[0](x))


def chain(values: dict[str, tuple[float, float]]) -> PeftModel:
    """Return a chain with adapters whose deltas are ``values`` (alpha/r = 2: A = 1, B = d/2)."""
    model: PeftModel | None = None
    for name, deltas in values.items():
        config = LoraConfig(r=1, lora_alpha=2, target_modules=["0", "1"])
        if model is None:
            model = get_peft_model(Chain(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for module, delta in zip(model.base_model.model.layers, deltas, strict=True):
            module.lora_A[name].weight.data = torch.ones(1, 1, dtype=torch.float64)
            module.lora_B[name].weight.data = torch.full((1, 1), delta / 2, dtype=torch.float64)
    assert model is not None
    return model.eval()


def product(model: nn.Module) -> np.ndarray:
    """Score 2 examples, x = 1 and x = 3; the mean score is 2*y(1)."""
    with torch.no_grad():
        return model(torch.tensor([[1.0], [3.0]], dtype=torch.float64)).flatten().numpy()


def negated(model: nn.Module) -> np.ndarray:
    return -product(model)


def flat(model: nn.Module) -> float:
    """Score the same always: as a float, not an array."""
    return 0.5


# ---------------------------------------------------------------------------- thresholds, pruning


def state(*rows: list[float]) -> oracle.Deltas:
    return {f"h.{i}.w": torch.tensor([row], dtype=torch.float64) for i, row in enumerate(rows)}


@pytest.mark.parametrize(
    ("p", "tau"),
    # entries sorted by magnitude: 10 9 8 7 6 5 4 3 2 1; the ceil(10 p)-th of them, by hand
    [(0.1, 10.0), (0.11, 9.0), (0.3, 8.0), (0.6, 5.0), (0.7, 4.0), (1.0, 1.0), (0.001, 10.0)],
)
def test_threshold_of_ten_entries(p: float, tau: float) -> None:
    assert oracle.threshold(state([1, -2, 3, -4], [5, -6, 7, -8, 9, -10]), p) == tau


def test_threshold_density_zero_keeps_nothing() -> None:
    assert oracle.threshold(state([1, 2]), 0.0) == math.inf
    pruned = oracle.prune_and_scale(state([1, 2], [0, 3]), 0.0, 1.0)
    assert all(not d.any() for d in pruned.values())


def test_prune_and_scale_by_scope() -> None:
    # p = 0.5. Model: 3rd largest of 6 is 4. Layer h.0: 2nd largest of (1, -2, 3) is 2; h.1: 2nd of
    # (4, 5, -6) is 5. Module: the same, as each layer has one module.
    given = state([1, -2, 3], [4, 5, -6])
    model = oracle.prune_and_scale(given, 0.5, 10.0)
    assert [d.tolist() for d in model.values()] == [[[0, 0, 0]], [[40, 50, -60]]]
    for scope in ("layer", "module"):
        other = oracle.prune_and_scale(given, 0.5, 10.0, scope)
        assert [d.tolist() for d in other.values()] == [[[0, -20, 30]], [[0, 50, -60]]]


def test_prune_and_scale_keeps_all_equal_to_the_threshold() -> None:
    pruned = oracle.prune_and_scale(state([2, -2, 2, 1]), 0.25, 1.0)  # 1st largest is 2, thrice
    assert pruned["h.0.w"].tolist() == [[2, -2, 2, 0]]


def test_prune_layer_again_counts_zeros() -> None:
    # Layer h.0 has 4 entries, 3 of them zero. p = 0.25: the 1st largest is 6. p = 0.5: the 2nd is
    # 0, so everything stays. Both times h.0 is scaled by 0.5 and the other layer is untouched.
    given = state([0, 6, 0, 0], [1, 1])
    for p in (0.25, 0.5):
        again = oracle.prune_layer_again(given, "h.0", p, 0.5)
        assert [d.tolist() for d in again.values()] == [[[0, 3, 0, 0]], [[1, 1]]]
    again = oracle.prune_layer_again(state([5, 6, -7, 0]), "h.0", 0.5, 0.5)
    assert again["h.0.w"].tolist() == [[0, 3, -3.5, 0]]


def test_layer_of() -> None:
    assert oracle.layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert oracle.layer_of("encoder.block.0.layer.0.SelfAttention.q") == "encoder.block.0"
    assert oracle.layer_of("decoder.block.0.layer.2.DenseReluDense.wo") == "decoder.block.0"
    assert oracle.layer_of("transformer.h.11.attn.c_attn") == "transformer.h.11"
    assert oracle.layer_of("model.embed_tokens") == oracle.layer_of("lm_head") == "outside"
    assert oracle.layer_of("block1.q") == "outside"  # a digit inside a word is no number


# ---------------------------------------------------------------------------------- contributions


def test_contributions_by_hand() -> None:
    # Weights (1, 1); up = (+1, +2), down = (+1, -1); G = (+2, +1). The score of up's task is
    # 2*w0*w1, of down's task -2*w0*w1 (the mean of x = 1 and x = 3 is 2).
    # up alone:   E = 2*2*3 = 12, without layer 0: 2*1*3 = 6, only layer 0: 2*2*1 = 4, base 2
    #             -> layer 0: alpha 6, beta 2; layer 1: 12 - 4 = 8, 6 - 2 = 4
    # G, up:      E = 2*3*2 = 12, without layer 0: 4, only layer 0: 6
    #             -> layer 0: alpha 8, beta 4; layer 1: 12 - 6 = 6, 4 - 2 = 2
    # gamma up:   layer 0: 8 - 12 = -4; layer 1: 12 - 8 = 4
    # down alone: E = -2*2*0 = 0, without layer 0: 0, only layer 0: -4, base -2
    #             -> layer 0: alpha 0, beta -2; layer 1: 0 + 4 = 4, 0 + 2 = 2
    # G, down: minus those of up; gamma down: layer 0: -2 + 12 = 10; layer 1: 6 + 8 = 14
    model = chain({"up": (1.0, 2.0), "down": (1.0, -1.0)})
    table = {name: oracle.deltas(model, name) for name in ("up", "down")}
    assert oracle.layers(model, table) == ["layers.0", "layers.1"]
    records = oracle.contributions(model, {"up": product, "down": negated}, table)
    rows = {
        key: (c.alpha_alone, c.beta_alone, c.alpha_merged, c.beta_merged, c.gamma)
        for key, c in records.items()
    }
    assert rows == {
        ("layers.0", "up"): (6, 2, 8, 4, -4),
        ("layers.1", "up"): (8, 4, 6, 2, 4),
        ("layers.0", "down"): (0, -2, -8, -4, 10),
        ("layers.1", "down"): (4, 2, -6, -2, 14),
    }
    assert records["layers.1", "up"].c_alone == 12
    assert records["layers.1", "up"].c_merged == 8
    # Per example gamma is (x = 1: half the mean, x = 3: 1.5 times): for up, layer 0: (-2, -6).
    # Their standard deviation (ddof 1) is sqrt(8), over sqrt(2): 2.
    assert records["layers.0", "up"].gamma_se == pytest.approx(2.0, rel=1e-15)
    assert oracle.total_gamma(records, "layers.0") == 6
    assert oracle.total_gamma(records, "layers.1") == 18
    # |E(alone) - E(base)|: up 12 - 2 = 10, down 0 + 2 = 2
    gained = oracle.contributions(model, {"up": product, "down": negated}, table, normalize="gain")
    assert gained["layers.1", "up"].gamma == 0.4
    assert gained["layers.1", "down"].gamma == 7.0
    assert gained["layers.0", "up"].gamma_se == pytest.approx(0.2, rel=1e-15)


def test_hi_merge_by_hand() -> None:
    # The numbers above, p = s = 1: layer 1 first (Gamma 18 > 6). Both gammas > 0: severe; c alone
    # is 12 for up and 6 for down: up's +2 stays. Layer 0: up -4, down 10: partial. Degrader: up
    # does not lose, its +1 is halved (one entry, p_l = 1/2 keeps it). Result: 0.5 + 1 = 1.5 and 2.
    fns = {"up": product, "down": negated}
    model = chain({"up": (1.0, 2.0), "down": (1.0, -1.0)})
    result = oracle.hi_merge(model, fns, ["up", "down"], 1.0, 1.0)
    assert result.thresholds == {"up": {"model": 1.0}, "down": {"model": 1.0}}
    assert list(result.conflicts) == ["layers.1", "layers.0"]
    assert result.conflicts["layers.1"].kind == "severe"
    assert result.conflicts["layers.1"].kept == "up"
    assert result.conflicts["layers.0"].kind == "partial"
    assert result.conflicts["layers.0"].repruned == ("up",)
    assert {k: d.item() for k, d in result.deltas.items()} == {"layers.0": 1.5, "layers.1": 2.0}
    # The other reading halves down's +1 instead: the same sum here, but in the other adapter.
    other = oracle.hi_merge(model, fns, ["up", "down"], 1.0, 1.0, partial_target="degraded")
    assert other.edited["down"]["layers.0"].item() == 0.5
    assert other.edited["up"]["layers.0"].item() == 1.0


def test_hi_merge_reanalyze_by_hand() -> None:
    # As above; after layer 1 was treated the state is (2, 2). Layer 0 again, for up:
    # E = 2*3*3 = 18, without layer 0: 6, so alpha 12; beta stays 4; gamma 8 - 16 = -8.
    # For down: -2 + 16 = 14.
    fns = {"up": product, "down": negated}
    model = chain({"up": (1.0, 2.0), "down": (1.0, -1.0)})
    result = oracle.hi_merge(model, fns, ["up", "down"], 1.0, 1.0, reanalyze="each")
    assert result.conflicts["layers.1"].gammas == {"up": 4.0, "down": 14.0}
    assert result.conflicts["layers.0"].gammas == {"up": -8.0, "down": 14.0}
    assert result.contributions["layers.0", "up"].gamma == -4.0  # the first measurement stays


def test_hi_merge_accept_by_hand() -> None:
    # With two opposite tasks the mean score is always 0: nothing falls, everything is accepted. So
    # make down's task count double: the mean of 2y and -4y is -y. Model-wise y = 3*2 = 6. Layer 1
    # (severe, up stays: y = 3*3 = 9) lowers the mean from -6 to -9: taken back. Layer 0 (partial,
    # up halved: y = 2.5*2 = 5) raises it from -6 to -5: stays. c alone at layer 1 would now be 12
    # for both, and down would win by name: let up count a hair more.
    fns = {
        "up": lambda model: 1.0001 * product(model),
        "down": lambda model: 2 * negated(model),
    }
    model = chain({"up": (1.0, 2.0), "down": (1.0, -1.0)})
    result = oracle.hi_merge(model, fns, ["up", "down"], 1.0, 1.0, accept="no_regression")
    assert [c.accepted for c in result.conflicts.values()] == [False, True]
    assert {k: d.item() for k, d in result.deltas.items()} == {"layers.0": 1.5, "layers.1": 1.0}
    assert result.conflicts["layers.1"].score_before == pytest.approx(-6.0, rel=1e-3)
    assert result.conflicts["layers.1"].score_after == pytest.approx(-9.0, rel=1e-3)
    # A third task that is no adapter guards too: one that pays 2y more turns both verdicts round.
    fns["general"] = lambda model: 2 * product(model)
    result = oracle.hi_merge(model, fns, ["up", "down"], 1.0, 1.0, accept="no_regression")
    assert [c.accepted for c in result.conflicts.values()] == [True, False]


def test_hi_merge_float_scores_and_ties() -> None:
    # A constant score: every gamma is 0, so everything is mutual, in layer order, error nan.
    model = chain({"up": (1.0, 2.0), "down": (1.0, -1.0)})
    result = oracle.hi_merge(model, {"up": flat, "down": flat}, ["up", "down"], 1.0, 0.5)
    assert list(result.conflicts) == ["layers.0", "layers.1"]
    assert {c.kind for c in result.conflicts.values()} == {"mutual"}
    assert all(math.isnan(c.gamma_se) for c in result.contributions.values())
    assert {k: d.item() for k, d in result.deltas.items()} == {"layers.0": 1.0, "layers.1": 0.5}
    record = oracle.Contribution("l", "t", 0, 0, 0, 0, 3.0, 0, 1.0, 0.1)
    twin = oracle.Contribution("l", "s", 0, 0, 0, 0, 3.0, 0, 1.0, 0.1)
    records, gains = {("l", "t"): record, ("l", "s"): twin}, {"t": 1.0, "s": 1.0}
    delta = {"l.0.q": torch.ones(1, 1)}
    held = {"t": delta, "s": delta}
    at = {("l.0", task): c for (_, task), c in records.items()}
    assert oracle.severe_winner(at, "l.0", held, gains) == "s"
    # An adapter without a delta in the layer has nothing to keep; c counts in units of the gain.
    assert oracle.severe_winner(at, "l.0", held | {"s": {}}, gains) == "t"
    assert oracle.severe_winner(at, "l.0", held, gains | {"s": 2.0}) == "t"


@pytest.mark.parametrize(
    ("gammas", "kind", "degrader", "degraded"),
    [
        ({"a": 1.0, "b": 0.1}, "severe", (), ("a", "b")),
        ({"a": 1.0, "b": 0.0}, "partial", ("b",), ("a",)),
        ({"a": -1.0, "b": 2.0, "c": 0.0}, "partial", ("a", "c"), ("b",)),
        ({"a": 0.0, "b": -1.0}, "mutual", ("a", "b"), ()),
    ],
)
def test_kind_of(
    gammas: dict[str, float], kind: str, degrader: tuple[str, ...], degraded: tuple[str, ...]
) -> None:
    assert oracle.kind_of(gammas.values()) == kind
    assert oracle.offending(gammas, "degrader") == degrader
    assert oracle.offending(gammas, "degraded") == degraded


def test_counted_tolerance() -> None:
    record = oracle.Contribution("l", "t", 0, 0, 0, 0, 0, 0, -0.3, 0.1)
    assert oracle.counted(record, 0.0) == -0.3
    assert oracle.counted(record, 0.3) == -0.3  # below, not at
    assert oracle.counted(record, 0.31) == 0.0
    assert oracle.counted(record, "2se") == -0.3
    assert oracle.counted(record, "3.5se") == 0.0


# ----------------------------------------------------------------------------- agreement with PEFT


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_plain_sum_is_several_active_adapters(kind: str) -> None:
    names = list(tiny.NAMES[:3])
    model = tiny.peft_model(kind, 3)
    fns = tiny.eval_fns(kind, names)
    merged = oracle.plain_sum({name: oracle.deltas(model, name) for name in names})
    for task in names:
        captured: list[torch.Tensor] = []

        def logits(
            twin: nn.Module, inputs: dict = fns[task].inputs, out: list = captured
        ) -> torch.Tensor:
            with torch.no_grad():
                out.append(twin(**inputs).logits)
            return out[-1].flatten()

        oracle.score(model, logits, merged)
        model.base_model.set_adapter(names)
        logits(model)
        with model.disable_adapter():
            logits(model)
        ours, theirs, base = captured
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
        assert (theirs - base).abs().max() > 0.1


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_deltas_match_each_modules_own(kind: str) -> None:
    model = tiny.peft_model(kind, 5)
    for name in tiny.NAMES:
        dense = oracle.deltas(model, name)
        assert dense
        for path, d in dense.items():
            module = model.base_model.model.get_submodule(path)
            theirs = module.get_delta_weight(name)
            assert theirs.dtype == torch.float64
            torch.testing.assert_close(
                oracle.weight_delta(module, d), theirs, rtol=1e-12, atol=1e-14
            )
            size = (d.norm() / module.get_base_layer().weight.norm()).item()
            assert 0.1 < size < 0.6


def test_score_leaves_the_model_alone() -> None:
    model = tiny.peft_model("gpt2", 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fns = tiny.eval_fns("gpt2", tiny.NAMES[:2])
    oracle.hi_merge(model, fns, tiny.NAMES[:2], 0.3, 0.9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.active_adapter == tiny.NAMES[0]


# ------------------------------------------------------------------------------------ tiny models


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tiny_is_seeded_and_leaves_the_global_random_state(kind: str) -> None:
    before = torch.get_rng_state()
    one, two = tiny.peft_model(kind, 3), tiny.peft_model(kind, 3)
    other = tiny.peft_model(kind, 3, seed=1)
    task = tiny.eval_fns(kind, ["x"])["x"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(task(one), task(two))
    assert not torch.equal(task(one), task(other))
    assert task(one).shape == (12,)
    assert task(one).dtype == torch.float64
    assert not any(module.training for module in one.modules())
    assert all(weight.dtype == torch.float64 for weight in one.parameters())
    small = tiny.peft_model(kind, 3, dtype=torch.float32)
    assert all(weight.dtype == torch.float32 for weight in small.parameters())
    torch.testing.assert_close(task(small), task(one), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tiny_float64_is_computed_in_float64(kind: str) -> None:
    # A change of 1e-9 in the weights must show in the scores, linearly: float32 would hide it.
    model = tiny.peft_model(kind, 1)
    task = tiny.eval_fns(kind, ["x"])["x"]
    dense = oracle.deltas(model, tiny.NAMES[0])
    base = oracle.score(model, task, {})
    steps = [
        oracle.score(model, task, {k: size * d for k, d in dense.items()}) - base
        for size in (1e-9, 2e-9)
    ]
    assert np.abs(steps[0]).max() > 1e-12
    np.testing.assert_allclose(steps[1], 2 * steps[0], rtol=0.02, atol=1e-13)


def test_tiny_tasks_differ_by_name_and_not_by_order() -> None:
    one = tiny.eval_fns("llama", ["a", "b"])
    two = tiny.eval_fns("llama", ["b", "a"])
    assert torch.equal(one["a"].targets, two["a"].targets)
    assert not torch.equal(one["a"].inputs["input_ids"], one["b"].inputs["input_ids"])
    assert not torch.equal(one["a"].targets, one["b"].targets)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_hi_merge_meets_every_kind_of_conflict(kind: str) -> None:
    seen: Counter[str] = Counter()
    names = tiny.NAMES[:2]
    fns = tiny.eval_fns(kind, names, n_examples=6)
    for seed in range(8):
        model = tiny.peft_model(kind, 2, seed=seed)
        result = oracle.hi_merge(model, fns, names, 0.4, 0.9)
        seen.update(conflict.kind for conflict in result.conflicts.values())
        if len(seen) == 3:
            break
    assert set(seen) == {"severe", "partial", "mutual"}


def test_hi_merge_adapter_order_does_not_matter() -> None:
    names = tiny.NAMES[:3]
    model = tiny.peft_model("qwen2", 3, seed=1)
    fns = tiny.eval_fns("qwen2", names)
    one = oracle.hi_merge(model, fns, names, 0.4, 0.9)
    two = oracle.hi_merge(model, fns, names[::-1], 0.4, 0.9)
    assert list(one.conflicts) == list(two.conflicts)
    assert one.deltas.keys() == two.deltas.keys()
    for module, d in one.deltas.items():
        torch.testing.assert_close(d, two.deltas[module], rtol=1e-12, atol=1e-14)


def test_hi_merge_tolerance_above_everything_is_model_wise() -> None:
    names = tiny.NAMES[:2]
    model = tiny.peft_model("bert", 2)
    fns = tiny.eval_fns("bert", names)
    result = oracle.hi_merge(model, fns, names, 0.4, 0.9, tolerance=1e6)
    assert {c.kind for c in result.conflicts.values()} == {"mutual"}
    expected = oracle.plain_sum(result.pruned)
    assert all(torch.equal(d, expected[module]) for module, d in result.deltas.items())


@pytest.mark.parametrize("reanalyze", ["once", "each"])
def test_hi_merge_no_regression_is_never_worse_than_model_wise(reanalyze: str) -> None:
    names = tiny.NAMES[:3]
    model = tiny.peft_model("qwen2", 3, seed=2)
    fns = tiny.eval_fns("qwen2", names)
    result = oracle.hi_merge(
        model, fns, names, 0.5, 1.0, accept="no_regression", reanalyze=reanalyze
    )
    states = {"model_wise": oracle.plain_sum(result.pruned), "merged": result.deltas}
    table = oracle.score_table(model, fns, states)
    assert sum(table["merged"].values()) >= sum(table["model_wise"].values())
