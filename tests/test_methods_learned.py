"""Learned coefficients against plain autograd through materialised W0 + sum_i c_i D_i."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_model import DenseModel
from peft import PeftModel
from snapshot import moved, snapshot
from test_methods_inputs import Inputs, dense_of, inputs_of, same, unused
from test_mixture import evidence_of
from tiny import NAMES, add_adapters, default_specs, peft_model, tiny_model
from torch import Tensor

from peft_himerge import add_weighted_adapter, combine, merge_adapters
from peft_himerge.errors import ConfigError
from peft_himerge.factors import LoraFactors
from peft_himerge.layers import layer_of
from peft_himerge.merging import AdapterMerge
from peft_himerge.methods import fisher, learning
from peft_himerge.methods.registry import Fitted, get_method, list_methods
from peft_himerge.methods.stack import Factored, Stack
from peft_himerge.request import stacks_of

PAIR = ["en", "zh"]
TRIO = sorted(NAMES[:3])
Table = dict[str, Tensor]  # key of a row -> (adapters,)


def key_of(per: str) -> Callable[[str], str]:
    return {"module": str, "layer": layer_of, "model": lambda m: "model"}[per]


def spread(dense: DenseModel, c: Table, per: str) -> dict[str, Tensor]:
    return {m: c[key_of(per)(m)] for m in dense.d}


def started(dense: DenseModel, per: str, value: float) -> Table:
    keys = sorted({key_of(per)(m) for m in dense.d})
    rows = torch.full((len(keys), len(dense.names)), value, dtype=torch.float64)
    return {k: rows[i].clone().requires_grad_() for i, k in enumerate(keys)}


def entropy(dense: DenseModel, c: Table, per: str, batch: Any, *, last: bool = False) -> Tensor:
    logits = dense(dense.weights(spread(dense, c, per)), batch).logits
    if logits.dim() == 3:
        mask = batch["attention_mask"].bool()
        rows = [x[m][-1:] if last else x[m] for x, m in zip(logits, mask, strict=True)]
        logits = torch.cat(rows)
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def compare(merge: AdapterMerge, dense: DenseModel, c: Table, per: str, tol: float = 1e-6) -> None:
    """The coefficients of the report, and the deltas, are those of the oracle."""
    for key, found in merge.fitted["coefficients"].items():
        for name, value in found.items():
            want = float(c[key][dense.names.index(name)].detach())
            assert value == pytest.approx(want, rel=tol, abs=tol), (key, name)
    want = {
        m: sum(v * dense.d[m][n] for v, n in zip(row.detach(), dense.names, strict=True))
        for m, row in spread(dense, c, per).items()
    }
    same(merge, want, dense, max(tol, 1e-6))
    assert merge.export_error < 1e-6


# -------------------------------------------------------------------------------------- AdaMerging


@pytest.mark.parametrize(
    ("kind", "per", "clamp", "last"),
    [
        ("bert", "module", True, False),
        ("llama", "layer", False, False),
        ("gpt2", "model", True, True),
    ],
)
def test_adamerging_is_adam_on_the_entropy(kind: str, per: str, clamp: bool, last: bool) -> None:
    model = peft_model(kind, 3)
    dense, inputs = dense_of(model, kind), inputs_of(kind, TRIO)
    before = snapshot(model)
    merge = merge_adapters(
        model,
        TRIO,
        "adamerging",
        inputs=inputs,
        per=per,
        steps=5,
        lr=0.2,
        init=0.4,
        clamp=clamp,
        positions="last" if last else "all",
    )
    assert moved(before, snapshot(model, but="merged")) == []
    c = started(dense, per, 0.4)
    adam = torch.optim.Adam(c.values(), lr=0.2)
    losses = []
    for step in range(5):
        adam.zero_grad()
        loss = sum(
            entropy(dense, c, per, inputs[n][step % len(inputs[n])], last=last) for n in TRIO
        )
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
        if clamp:
            for row in c.values():
                row.data.clamp_(0.0, 1.0)
    compare(merge, dense, c, per)
    assert merge.fitted["loss"] == pytest.approx(losses, rel=1e-7)
    if clamp:
        values = [v for row in merge.fitted["coefficients"].values() for v in row.values()]
        assert min(values) >= 0.0
        assert max(values) <= 1.0


def test_entropy_of_impossible_classes_is_that_without_them() -> None:
    rows = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -4.0]], dtype=torch.float64)
    wide = torch.cat([rows, torch.full((2, 2), -math.inf)], dim=1).requires_grad_()
    value = learning.entropy(wide)
    value.backward()
    p = rows.softmax(-1)
    assert float(value.detach()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
    assert wide.grad is not None
    assert torch.equal(wide.grad[:, 3:], torch.zeros(2, 2, dtype=torch.float64))
    assert bool(torch.isfinite(wide.grad).all())


def test_adamerging_lowers_the_entropy() -> None:
    model = peft_model("llama", 2)
    inputs = inputs_of("llama", PAIR, per=6)
    merge = merge_adapters(model, PAIR, "adamerging", inputs=inputs, steps=30, lr=0.05)
    losses = merge.fitted["loss"]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.02


# ------------------------------------------------------------------------------------------- aTLAS


@pytest.mark.parametrize(("per", "penalty", "power"), [("module", 0.0, 1), ("layer", 0.5, 2)])
def test_atlas_is_adamw_on_the_labels_from_the_base(per: str, penalty: float, power: int) -> None:
    model = peft_model("bert", 3)
    dense = dense_of(model, "bert")
    inputs = inputs_of("bert", TRIO, labels=True)
    merge = merge_adapters(
        model,
        TRIO,
        "atlas",
        inputs=inputs,
        per=per,
        epochs=3,
        lr=0.1,
        clip=0.05,
        penalty=penalty,
        power=power,
    )
    c = started(dense, per, 0.0)
    adam = torch.optim.AdamW(c.values(), lr=0.1, weight_decay=0.1)
    losses = []
    for step in range(3 * 2):
        adam.zero_grad()
        terms = []
        for n in TRIO:
            batch = inputs[n][step % 2]
            logits = dense(dense.weights(spread(dense, c, per)), batch).logits
            terms.append(F.cross_entropy(logits, batch["labels"]) / 3)
        loss = sum(terms)
        if penalty:
            norms = [torch.linalg.vector_norm(row, ord=power) for row in c.values()]
            loss = loss + penalty * sum(norms) / len(norms)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(c.values(), 0.05)
        adam.step()
        losses.append(float(loss.detach()))
    compare(merge, dense, c, per)
    assert merge.fitted["loss"] == pytest.approx(losses, rel=1e-7)


def test_atlas_without_steps_is_the_base() -> None:
    model, _, inputs = unused()
    merge = merge_adapters(model, PAIR, "atlas", inputs=inputs, epochs=0)
    assert all(float(merge.delta(m.module).abs().max()) == 0.0 for m in merge.modules)
    assert merge.fitted["loss"] == []


# -------------------------------------------------------------------------------------- FW-Merging


@pytest.mark.parametrize(
    ("per", "loss", "cosine"),
    [("module", "labels", True), ("layer", "entropy", False), ("model", "labels", True)],
)
def test_fw_merging_walks_to_the_steepest_vertex(per: str, loss: str, cosine: bool) -> None:
    model = peft_model("bert", 3)
    dense = dense_of(model, "bert")
    inputs = inputs_of("bert", TRIO, n=7, labels=True)
    options = {"steps": 4, "step_size": 0.6, "lam": 0.9, "init": 0.2}
    merge = merge_adapters(
        model, TRIO, "fw_merging", inputs=inputs, per=per, loss=loss, cosine=cosine, **options
    )
    c = started(dense, per, 0.2)
    for t in range(4):
        # Gradients in the dense weights, as a textbook has it.
        weights = dense.weights({m: row.detach() for m, row in spread(dense, c, per).items()})
        leaves = {k: w.detach().requires_grad_() for k, w in weights.items()}
        total = 0.0
        for n in TRIO:
            for batch in inputs[n]:
                logits = dense(leaves, batch).logits
                p = logits.softmax(-1)
                if loss == "labels":
                    value = F.cross_entropy(logits, batch["labels"])
                else:
                    value = -(p * p.log()).sum(-1).mean()
                total = total + value / len(inputs[n]) / 3
        grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
        assert merge.fitted["loss"][t] == pytest.approx(float(total.detach()), rel=1e-7)
        for key, row in c.items():
            mine = [m for m in dense.d if key_of(per)(m) == key]
            scores = []
            for n in dense.names:
                inner = sum(float((grads[f"{m}.weight"] * dense.d[m][n]).sum()) for m in mine)
                size = math.sqrt(sum(float(dense.d[m][n].square().sum()) for m in mine))
                scores.append(inner / size if cosine and size else inner if size else math.inf)
            best = min(range(3), key=scores.__getitem__)
            aim = torch.zeros(3, dtype=torch.float64)
            if scores[best] < 0.0:
                aim[best] = 1.0
            picked = dense.names[best] if scores[best] < 0.0 else None
            assert merge.fitted["picks"][t][key] == picked
            row.data += 0.9 * 0.6 * 2.0 / (t + 2) * (aim - row.data)
    compare(merge, dense, c, per)
    for row in merge.fitted["coefficients"].values():
        assert sum(row.values()) <= 1.0 + 1e-12
        assert min(row.values()) >= 0.0


# ---------------------------------------------------------------------------------- Expert Merging


def expert_loss(
    dense: DenseModel,
    weights: Mapping[str, Tensor],
    name: str,
    batch: Any,
    hidden: float,
    layers: Sequence[int],
    temperature: float,
) -> Tensor:
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expert = dense(dense.alone(name), batch, output_hidden_states=True)
    merged = dense(weights, batch, output_hidden_states=True)
    aim = (expert.logits[mask] / temperature).softmax(-1)
    logs = (merged.logits[mask] / temperature).log_softmax(-1)
    loss = temperature**2 * -(aim * logs).sum(-1).mean()
    errors = [
        (merged.hidden_states[k + 1][mask] - expert.hidden_states[k + 1][mask]).square().mean()
        for k in layers
    ]
    return loss + hidden * sum(errors) / len(errors)


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2]])
def test_expert_merging_is_the_dense_objective(layers: list[int]) -> None:
    model = peft_model("llama", 3)
    dense, inputs = dense_of(model, "llama"), inputs_of("llama", TRIO, n=3, per=1)
    cut, frozen = "model.layers.1.self_attn.v_proj", "model.layers.0.self_attn.q_proj"
    merge = merge_adapters(
        model,
        TRIO,
        "expert_merging",
        inputs=inputs,
        epochs=2,
        lr=0.3,
        init=0.2,
        accumulate=4,
        temperature=1.5,
        hidden=0.7,
        layers=[f"model.layers.{k}" for k in layers],
        shrink=0.4,
        importance={"en": 2.0},
        chunks={cut: 3, frozen: 0},
    )
    rows = torch.arange(12) * 3 // 12
    present = {m: torch.tensor([n in dense.has[m] for n in dense.names]) for m in dense.d}
    raw = {
        m: torch.full((3 if m == cut else 1, 3), math.log(0.25), dtype=torch.float64)
        for m in dense.d
    }
    raw = {m: x.requires_grad_(m != frozen) for m, x in raw.items()}
    free = [x for m, x in raw.items() if m != frozen]
    adam = torch.optim.AdamW(free, lr=0.3, weight_decay=0.0)
    todo = [(n, inputs[n][k]) for k in range(3) for n in TRIO] * 2
    chunks = [todo[:4], todo[4:8], todo[8:9]] * 2

    def weights() -> dict[str, Tensor]:
        changed = {}
        for m, x in raw.items():
            c = x.sigmoid() if m != frozen else torch.full_like(x, 0.2)
            per_row = c[rows] if m == cut else c.expand(len(next(iter(dense.d[m].values()))), 3)
            total = sum(per_row[:, i, None] * dense.d[m][n] for i, n in enumerate(dense.names))
            changed[f"{m}.weight"] = dense.plain.get_submodule(m).weight.detach() + total
        return changed

    losses = []
    count = sum(int(present[m].sum()) * len(x) for m, x in raw.items() if m != frozen)
    for step, terms in enumerate(chunks):
        adam.zero_grad()
        loss = 0.0
        for n, batch in terms:
            scale = (2.0 if n == "en" else 1.0) / len(terms)
            loss = loss + scale * expert_loss(dense, weights(), n, batch, 0.7, layers, 1.5)
        for m, x in raw.items():
            if m != frozen:
                away = (x.sigmoid() - 0.2).abs() * present[m]
                loss = loss + 0.4 * 3 / count * away.sum()
        loss.backward()
        adam.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * step / len(chunks))) / 2
        adam.step()
        losses.append(float(loss.detach()))
    assert merge.fitted["loss"] == pytest.approx(losses, rel=1e-6)
    base = {m: dense.plain.get_submodule(m).weight.detach() for m in dense.d}
    want = {m: weights()[f"{m}.weight"].detach() - base[m] for m in dense.d}
    same(merge, want, dense, 1e-6)
    found = merge.fitted["coefficients"]
    assert merge.fitted["aligned_layers"] == [f"model.layers.{k}" for k in layers]
    assert {f"{cut}[{k}]" for k in range(3)} <= set(found)
    assert found[frozen] == pytest.approx({"en": 0.2, "zh": 0.2})
    assert merge.export_error < 1e-6


def test_expert_merging_aligns_all_blocks_by_default_and_only_logits_without_any() -> None:
    model = peft_model("t5", 2)
    merge = merge_adapters(model, PAIR, "expert_merging", inputs=inputs_of("t5", PAIR))
    blocks = [f"{part}.block.{k}" for part in ("decoder", "encoder") for k in range(2)]
    assert merge.fitted["aligned_layers"] == blocks
    model, _, inputs = unused()
    merge = merge_adapters(model, PAIR, "expert_merging", inputs=inputs, epochs=3, accumulate=2)
    assert merge.fitted["aligned_layers"] == []
    assert len(merge.fitted["loss"]) == 3


# -------------------------------------------------------------------- what every method must honour

FAST: dict[str, dict[str, Any]] = {
    "regmean": {},
    "fisher": {},
    "adamerging": {"steps": 3, "lr": 0.05},
    "atlas": {"epochs": 2, "lr": 0.05},
    "fw_merging": {"steps": 3},
    "expert_merging": {"accumulate": 2},
}
LEARNED = sorted(FAST)


def test_all_methods_that_need_inputs_are_tested_here() -> None:
    found = [m.name for m in list_methods() if m.needs in ("inputs", "gradients")]
    assert found == LEARNED
    low = [m.name for m in list_methods() if m.name in LEARNED and m.low_rank]
    assert low == [n for n in LEARNED if n != "fisher"]


def merged(model: PeftModel, names: Sequence[str], method: str, inputs: Inputs, **o: Any) -> Any:
    merge = merge_adapters(model, names, method, inputs=inputs, **{**FAST[method], **o})
    return {m.module: merge.delta(m.module) for m in merge.modules}


@pytest.mark.parametrize("method", LEARNED)
def test_runs_twice_and_in_any_order_give_the_same_bits(method: str) -> None:
    model = peft_model("llama", 3)
    inputs = inputs_of("llama", TRIO, 3, 2, labels=True)
    one = merged(model, TRIO, method, inputs, adapter_name="first")
    torch.rand(5)
    turned = {n: inputs[n] for n in reversed(TRIO)}
    two = merged(model, TRIO[::-1], method, turned, adapter_name="second")
    for module, delta in one.items():
        assert torch.equal(delta, two[module])


@pytest.mark.parametrize("method", LEARNED)
def test_the_order_of_modules_does_not_matter(method: str) -> None:
    model = peft_model("llama", 3)
    inputs = inputs_of("llama", TRIO, 3, 2, labels=True)
    evidence = evidence_of(model, {n: tuple(inputs[n]) for n in TRIO})
    adapters = list(evidence.combiner.adapters.values())
    stacks = list(stacks_of(model, adapters, dict.fromkeys(TRIO, 1.0), 0))
    found = []
    for order in (stacks, stacks[::-1]):
        fit: Fitted = get_method(method).function(order, evidence, **FAST[method])
        found.append({m: d.dense() for m, d in fit.run(order)})
        again = {m: d.dense() for m, d in fit.run(order)}
        assert all(torch.equal(again[m], d) for m, d in found[-1].items())
    assert list(found[0]) == list(found[1])[::-1]
    for module, delta in found[0].items():
        torch.testing.assert_close(found[1][module], delta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", LEARNED)
def test_how_a_delta_is_split_does_not_matter(method: str) -> None:
    """(B G, G^-1 A) is the same delta."""
    model, other = peft_model("llama", 2), peft_model("llama", 2)
    inputs = inputs_of("llama", PAIR, 3, 2, labels=True)
    for layer in other.base_model.model.modules():
        for name in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            g = torch.eye(len(a), dtype=a.dtype) * 2.0 + torch.ones(len(a), len(a)).double().tril()
            b.data, a.data = b.data @ g, torch.linalg.inv(g) @ a.data
    one, two = (merged(m, PAIR, method, inputs) for m in (model, other))
    for module, delta in one.items():
        torch.testing.assert_close(two[module], delta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", LEARNED)
def test_one_adapter_alone(method: str) -> None:
    model = peft_model("llama", 1)
    dense = dense_of(model, "llama")
    inputs = inputs_of("llama", ["zh"], 3, 2, labels=True)
    options: dict[str, Any] = {}
    if method == "adamerging":
        options = {"steps": 2, "init": 1.0, "lr": 1e-9, "clamp": False}
    found = merged(model, ["zh"], method, inputs, **options)
    if method in ("regmean", "fisher", "adamerging"):  # the expert itself
        for module, delta in found.items():
            torch.testing.assert_close(delta, dense.d[module]["zh"], rtol=1e-6, atol=1e-7)
    else:  # a multiple of it in every module
        for module, delta in found.items():
            d = dense.d[module]["zh"]
            c = float((delta * d).sum() / d.square().sum())
            torch.testing.assert_close(delta, c * d, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:adapter 'nil' changes nothing")
@pytest.mark.parametrize("method", LEARNED)
def test_an_untrained_adapter_beside_others(method: str) -> None:
    specs = {**default_specs("llama", 1), "nil": {"target_modules": ["q_proj", "gate_proj"]}}
    model = add_adapters(tiny_model("llama", dtype=torch.float64), specs)
    for name, parameter in model.named_parameters():
        if "lora_B.nil" in name:
            parameter.data.zero_()
    inputs = inputs_of("llama", ["nil", "zh"], 3, 2, labels=True)
    found = merged(model, ["zh", "nil"], method, inputs)
    for module, delta in found.items():
        assert bool(torch.isfinite(delta).all())
        if "gate_proj" in module:
            assert not delta.any()
        elif "v_proj" in module and method in ("regmean", "fisher"):
            assert delta.any()


@pytest.mark.parametrize("method", LEARNED)
def test_eight_adapters_of_mixed_ranks_in_half_precision(method: str) -> None:
    specs = default_specs("llama", 5)
    for i, name in enumerate(("x", "y", "w")):
        specs[name] = {"r": 1 + i, "alpha": 3, "target_modules": ["q_proj"], "seed": 50 + i}
    names = [*NAMES, "x", "y", "w"]
    inputs = inputs_of("llama", names, 2, 2, labels=True)
    half = add_adapters(tiny_model("llama", dtype=torch.bfloat16), specs)
    before = snapshot(half)
    merge = merge_adapters(half, names, method, inputs=inputs, **FAST[method])
    assert moved(before, snapshot(half, but="merged")) == []
    for m in merge.modules:
        delta = merge.delta(m.module)
        assert delta.dtype == torch.float32
        assert bool(torch.isfinite(delta).all())
    if method in ("regmean", "adamerging"):  # the others go down a path that halves can fork
        whole = add_adapters(tiny_model("llama", dtype=torch.bfloat16).double(), specs)
        for name, parameter in half.named_parameters():
            if ".merged." not in name:
                whole.get_parameter(name).data = parameter.data.double()
        wide = merge_adapters(whole, names, method, inputs=inputs, **FAST[method])
        for m in merge.modules:
            want = wide.delta(m.module)
            lost = float((merge.delta(m.module).double() - want).norm() / want.norm())
            assert lost < 0.2, (m.module, lost)


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("exc", [RuntimeError, KeyboardInterrupt])
def test_whatever_the_model_raises_it_is_as_before(method: str, exc: type[BaseException]) -> None:
    specs = {n: {**s, "lora_dropout": 0.3} for n, s in default_specs("llama", 2).items()}
    model = add_adapters(tiny_model("llama"), specs)
    model.train()
    inputs = inputs_of("llama", PAIR, 4, 1, labels=True)
    calls: list[int] = []

    def failing(*_: Any) -> None:
        calls.append(1)
        torch.rand(2)
        if len(calls) == 4:
            raise exc

    model.base_model.model.model.layers[2].register_forward_hook(failing)
    before = snapshot(model)
    with pytest.raises(exc):
        merge_adapters(model, PAIR, method, inputs=inputs, **FAST[method])
    assert len(calls) == 4
    assert moved(before, snapshot(model)) == []


@pytest.mark.parametrize("method", [n for n in LEARNED if n != "fisher"])
def test_no_dense_delta_is_formed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(*_: Any, **__: Any) -> Any:
        raise AssertionError("a dense delta was formed")

    model = peft_model("llama", 3)
    inputs = inputs_of("llama", TRIO, 3, 2, labels=True)
    for owner in (Stack, LoraFactors):
        monkeypatch.setattr(owner, "blocks", dense)
    for owner in (combine, fisher):
        monkeypatch.setattr(owner, "new_dense", dense)
    monkeypatch.setattr(Factored, "dense", dense)
    merge = merge_adapters(model, TRIO, method, inputs=inputs, **FAST[method])
    assert merge.export_error < 1e-6
    with pytest.raises(AssertionError, match="dense delta"):  # the check itself works
        merge_adapters(model, TRIO, "fisher", inputs=inputs, adapter_name="other")


def test_weights_scale_the_deltas_first() -> None:
    model = peft_model("llama", 2)
    inputs = inputs_of("llama", PAIR, 3, 2)
    dense = dense_of(model, "llama")
    merge = merge_adapters(
        model, PAIR, "adamerging", inputs=inputs, steps=0, init=0.5, weights={"zh": 3.0, "en": -1.0}
    )
    want = {m: 1.5 * d["zh"] - 0.5 * d["en"] for m, d in dense.d.items()}
    same(merge, want, dense, 1e-6)


def test_the_report_is_saved(tmp_path: Any) -> None:
    import json

    model = peft_model("llama", 2)
    merge = merge_adapters(
        model, PAIR, "fw_merging", inputs=inputs_of("llama", PAIR, labels=True), per="layer"
    )
    merge.save(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fitted"] == merge.fitted
    assert set(report["fitted"]["coefficients"]) >= {f"model.layers.{i}" for i in range(4)}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("adamerging", {"per": "tensor"}, "per got 'tensor'"),
    ("adamerging", {"steps": -1}, "steps must be"),
    ("adamerging", {"lr": 0.0}, "lr must be positive"),
    ("adamerging", {"init": float("nan")}, "init must be"),
    ("adamerging", {"positions": "first"}, "positions got 'first'"),
    ("adamerging", {"clamp": "yes"}, "clamp must be True or False"),
    ("adamerging", {"inputs": None}, "needs gradients: pass inputs"),
    ("atlas", {}, "atlas needs labels, but batch 0 of inputs"),
    ("atlas", {"power": 3}, "power got 3"),
    ("atlas", {"clip": 0.0}, "clip must be"),
    ("fw_merging", {}, "needs labels"),
    ("fw_merging", {"loss": "hope"}, "loss got 'hope'"),
    ("fw_merging", {"loss": "entropy", "init": 0.6}, "init must be"),
    ("fw_merging", {"loss": "entropy", "step_size": 2.0}, "step_size must be"),
    ("fw_merging", {"loss": "entropy", "cosine": 0}, "cosine must be True or False"),
    ("expert_merging", {"init": 1.0}, "init must be"),
    ("expert_merging", {"accumulate": 0}, "accumulate must be"),
    ("expert_merging", {"temperature": 0.0}, "temperature must be"),
    ("expert_merging", {"layers": ["model.layers.9"]}, "layers has 'model.layers.9'. Did you mean"),
    ("expert_merging", {"layers": "model.layers.1"}, "layers must be a list"),
    ("expert_merging", {"importance": {"e": 1.0}}, "names the adapter 'e'"),
    ("expert_merging", {"importance": {"en": -1.0}}, "importance"),
    ("expert_merging", {"chunks": {"v_proj": 2}}, "chunks names 'v_proj'"),
    ("expert_merging", {"chunks": {"lm_head": 65}}, "has 64 rows to cut"),
    ("expert_merging", {"chunks": {"lm_head": 2}, "per": "layer"}, "need per='module'"),
]


@pytest.mark.parametrize(("method", "options", "text"), BAD)
def test_bad_options_are_refused_and_nothing_is_touched(
    method: str, options: dict[str, Any], text: str
) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)
    given = {"inputs": inputs_of("llama", PAIR, 2, 2), **options}
    with pytest.raises(ConfigError, match=text):
        merge_adapters(model, PAIR, method, **given)
    assert moved(before, snapshot(model)) == []


def test_a_diverging_descent_is_told() -> None:
    model = peft_model("bert", 2)
    before = snapshot(model)
    inputs = inputs_of("bert", PAIR, labels=True)
    with pytest.raises(ConfigError, match=r"the loss of task '..' is nan.*lower lr"):
        merge_adapters(model, PAIR, "atlas", inputs=inputs, lr=1e300, epochs=3)
    assert moved(before, snapshot(model)) == []


def test_the_drop_in_offers_no_method_that_needs_inputs() -> None:
    model = peft_model("llama", 2)
    with pytest.raises(ConfigError, match="Invalid combination_type: regmean"):
        add_weighted_adapter(model, PAIR, [1.0, 1.0], "new", combination_type="regmean")
