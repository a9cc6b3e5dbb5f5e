"""RegMean and Fisher merging, against dense float64 oracles that share no code with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_model import DenseModel
from peft import LoraConfig, PeftModel, get_peft_model
from snapshot import moved, snapshot
from test_mixture import convolutions
from tiny import KINDS, NAMES, add_adapters, default_specs, eval_fns, peft_model, tiny_model
from torch import Tensor, nn

from peft_himerge import focus_adapters, merge_adapters
from peft_himerge.errors import ConfigError
from peft_himerge.merging import AdapterMerge
from peft_himerge.methods import regmean as regmean_method
from peft_himerge.methods.stack import named_generator

TRIO = sorted(NAMES[:3])
Inputs = dict[str, list[dict[str, Tensor]]]


def inputs_of(kind: str, names: Any, n: int = 6, per: int = 4, *, labels: bool = False) -> Inputs:
    """Return each task's examples in batches of `per`, the last one smaller."""
    tasks = eval_fns(kind, names, n)
    found: Inputs = {}
    for name, task in tasks.items():
        rows = dict(task.inputs)
        if labels:
            rows["labels"] = task.targets
        found[name] = [{k: v[i : i + per] for k, v in rows.items()} for i in range(0, n, per)]
    return found


def dense_of(model: PeftModel, kind: str) -> DenseModel:
    return DenseModel(model, tiny_model(kind, dtype=torch.float64))


def stored(dense: DenseModel, module: str, delta: Tensor) -> Tensor:
    """Return an (out, in) delta as the weight is stored."""
    weight = dense.plain.get_submodule(module).weight
    turned = (
        isinstance(dense.plain.get_submodule(module), nn.Embedding)
        or type(dense.plain.get_submodule(module)).__name__ == "Conv1D"
    )
    return (delta.t() if turned else delta).reshape(weight.shape).double()


def same(merge: AdapterMerge, want: Mapping[str, Tensor], dense: DenseModel, tol: float) -> None:
    assert sorted(m.module for m in merge.modules) == sorted(want)
    for module, delta in want.items():
        got = stored(dense, module, merge.delta(module))
        torch.testing.assert_close(got, delta, rtol=tol, atol=tol * float(delta.abs().max()))


# ----------------------------------------------------------------------------------------- RegMean


def token_rows(
    dense: DenseModel,
    inputs: Inputs,
    module: str,
    kind: str,
    merged: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return adapter -> every input row of `module` that is no padding, from the dense model.

    With each adapter alone, or with the weights `merged`.
    """
    found = {}
    for name in dense.names:
        rows = []
        for batch in inputs[name]:
            weights = dense.alone(name) if merged is None else merged
            for x in dense.inputs(weights, batch)[module]:
                layer: Any = dense.plain.get_submodule(module)
                if "attention_mask" not in batch:
                    mask = torch.ones(x.shape[:2], dtype=torch.bool)
                else:
                    mask = batch["attention_mask"].bool()
                decoder = kind == "t5" and module.startswith("decoder")
                if decoder and not ("EncDec" in module and module[-2:] in (".k", ".v")):
                    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
                if isinstance(layer, nn.Embedding):
                    ids = x[mask] if x.shape == mask.shape and kind != "t5" else x.flatten()
                    rows.append(nn.functional.one_hot(ids, len(layer.weight)).double())
                elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    rows.append(patches_of(layer, x))
                else:
                    rows.append(x[mask] if x.dim() == 3 else x)
        found[name] = torch.cat(rows)
    return found


def patches_of(conv: Any, x: Tensor) -> Tensor:
    """(examples * places, width): what the convolution gives for kernels of one entry each."""
    width = conv.weight[0].numel()
    probes = torch.eye(width, dtype=torch.float64).reshape(width, *conv.weight.shape[1:])
    return conv._conv_forward(x, probes, None).flatten(2).transpose(1, 2).flatten(0, 1)


def shrunk(rows: Tensor, off: float) -> Tensor:
    g = rows.t() @ rows / len(rows)
    return off * g + (1.0 - off) * torch.diag(torch.diag(g))


def delta_of(dense: DenseModel, module: str, name: str) -> Tensor:
    """The delta as (out, in), however the weight is stored."""
    turned = type(dense.plain.get_submodule(module)).__name__ in ("Conv1D", "Embedding")
    return dense.d[module][name].t() if turned else dense.d[module][name].flatten(1)


def regmean_truth(dense: DenseModel, rows: Mapping[str, Tensor], module: str, *fit: Any) -> Tensor:
    """The formula, dense, as the weight is stored; `fit` is what `regmean_parts` takes."""
    parts = regmean_parts(dense, rows, module, *fit)
    return stored(dense, module, torch.stack(list(parts.values())).sum(0))


def regmean_parts(
    dense: DenseModel,
    rows: Mapping[str, Tensor],
    module: str,
    off: float,
    ridge: float,
    shares: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Each adapter's summand, (out, in)."""
    shares = shares or dict.fromkeys(dense.names, 1.0 / len(dense.names))
    grams = [shares[name] * shrunk(rows[name], off) for name in dense.names]
    total = torch.stack(grams).sum(0)
    extra = ridge * torch.trace(total) / len(total)
    eye = torch.eye(len(total), dtype=torch.float64)
    parts = {}
    for name, g in zip(dense.names, grams, strict=True):
        d = delta_of(dense, module, name)
        below = torch.linalg.inv(total + extra * eye)
        parts[name] = d @ (g + shares[name] * extra * eye) @ below
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_regmean_is_the_dense_formula(kind: str) -> None:
    model = peft_model(kind, 3)
    dense = dense_of(model, kind)
    inputs = inputs_of(kind, TRIO)
    before = snapshot(model)
    merge = merge_adapters(model, TRIO, "regmean", inputs=inputs, off_diagonal=0.8, ridge=1e-4)
    assert moved(before, snapshot(model, but="merged")) == []
    want = {}
    for module in dense.modules:
        rows = token_rows(dense, inputs, module, kind)
        want[module] = regmean_truth(dense, rows, module, 0.8, 1e-4)
    same(merge, want, dense, 1e-6)
    assert merge.export_error < 1e-6
    assert merge.fitted["examples"] == dict.fromkeys(TRIO, 6)
    assert merge.fitted["without_input"] == []


def relative_shares(
    dense: DenseModel, inputs: Inputs, module: str, kind: str
) -> Mapping[str, float]:
    """What errors count divided by effects, of the modules that are given the very same tensors."""
    seen = dense.inputs(dense.alone(dense.names[0]), inputs[dense.names[0]][0])
    alike = [
        m
        for m in dense.modules
        if type(dense.plain.get_submodule(m)).__name__ != "Embedding"
        and [x.data_ptr() for x in seen[m]] == [x.data_ptr() for x in seen[module]]
    ] or [module]
    effects = dict.fromkeys(dense.names, 0.0)
    for m in alike:
        for name, rows in token_rows(dense, inputs, m, kind).items():
            d = delta_of(dense, m, name)
            effects[name] += float(torch.trace(d @ shrunk(rows, 0.8) @ d.t()))
    least = sum(effects.values()) / len(effects) / 2
    raw = {name: 1.0 / max(effect, least) for name, effect in effects.items()}
    return {name: one / sum(raw.values()) for name, one in raw.items()}


def in_rounds(
    dense: DenseModel, inputs: Inputs, kind: str, rounds: int, relative: bool
) -> list[dict[str, Tensor]]:
    """Return what each round gives, module -> delta as the weight is stored."""
    found: list[dict[str, Tensor]] = []
    merged, shares = None, {}
    for _ in range(rounds):
        now = {
            module: regmean_truth(
                *(dense, token_rows(dense, inputs, module, kind, merged), module, 0.8, 1e-4),
                shares.get(module),
            )
            for module in dense.modules
        }
        merged = {
            f"{module}.weight": dense.plain.get_submodule(module).weight.detach() + delta
            for module, delta in now.items()
        }
        if relative and not shares:
            shares = {m: relative_shares(dense, inputs, m, kind) for m in dense.modules}
            even = 1.0 / len(dense.names)
            assert max(abs(x - even) for one in shares.values() for x in one.values()) > 0.05
        found.append(now)
    return found


@pytest.mark.parametrize(
    ("kind", "relative"), [("llama", False), *((kind, True) for kind in KINDS)]
)
def test_regmean_in_rounds_sees_what_the_merged_model_gives(kind: str, relative: bool) -> None:
    model = peft_model(kind, 3)
    dense, inputs = dense_of(model, kind), inputs_of(kind, TRIO)
    options: dict[str, Any] = {"off_diagonal": 0.8, "ridge": 1e-4, "rounds": 3}
    options |= {"relative": relative}
    before = snapshot(model)
    merge = merge_adapters(model, TRIO, "regmean", inputs=inputs, **options)
    assert moved(before, snapshot(model, but="merged")) == []
    *_, old, want = in_rounds(dense, inputs, kind, 3, relative)
    same(merge, want, dense, 1e-6)
    assert max(float((old[m] - want[m]).norm() / want[m].norm()) for m in want) > 1e-4
    assert merge.fitted["passes"] == 3
    # The same, taken apart by adapter.
    made = focus_adapters(model, TRIO, inputs, **options)
    parts = merge_adapters(model, list(made.values()), "cat", adapter_name="parts")
    same(parts, want, dense, 1e-6)


def test_regmean_minimises_the_error_of_the_outputs() -> None:
    """Without shrinking it is the least-squares solution on the stacked inputs, from a solver."""
    model = peft_model("llama", 3)
    dense = dense_of(model, "llama")
    inputs = inputs_of("llama", TRIO)
    merge = merge_adapters(model, TRIO, "regmean", inputs=inputs, off_diagonal=1.0, ridge=0.0)
    want = {}
    for module in dense.modules:
        rows = token_rows(dense, inputs, module, "llama")
        scaled = {n: x / len(x) ** 0.5 for n, x in rows.items()}
        x = torch.cat([scaled[n] for n in TRIO])
        y = torch.cat([scaled[n] @ dense.d[module][n].t() for n in TRIO])
        assert len(x) > 3 * x.shape[1]
        want[module] = torch.linalg.lstsq(x, y).solution.t()
    same(merge, want, dense, 1e-6)


def test_regmean_without_ridge_gives_the_least_norm_where_inputs_are_few() -> None:
    model = peft_model("llama", 2)
    names = ["en", "zh"]
    dense = dense_of(model, "llama")
    inputs: Inputs = {
        n: [{"input_ids": torch.tensor([[5 + i, 9 + i, 11]])}] for i, n in enumerate(names)
    }
    module = "model.layers.2.self_attn.q_proj"
    merge = merge_adapters(model, names, "regmean", inputs=inputs, off_diagonal=1.0, ridge=0.0)
    rows = {n: dense.inputs(dense.alone(n), inputs[n][0])[module][0][0] for n in names}
    x = torch.cat(list(rows.values()))
    y = torch.cat([rows[n] @ dense.d[module][n].t() for n in names])
    want = (torch.linalg.pinv(x) @ y).t()
    torch.testing.assert_close(merge.delta(module), want, rtol=1e-5, atol=1e-6)
    model.delete_adapter("merged")
    # With a ridge, what no input reaches is the average.
    merge = merge_adapters(model, names, "regmean", inputs=inputs, off_diagonal=1.0, ridge=1e-8)
    away = torch.eye(24, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    mean = sum(dense.d[module].values()) / 2
    torch.testing.assert_close(merge.delta(module) @ away, mean @ away, rtol=1e-4, atol=1e-4)


def test_a_ridge_that_rounding_outweighs_is_raised() -> None:
    # Two inputs seen of four, in float32: where there was none rounding leaves less than nothing.
    names, rows = ["en", "zh"], torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    total = rows.t() @ rows - torch.diag(torch.tensor([0.0, 0.0, 1e-6, 3e-6]))
    solve, extra = regmean_method._solver(total, 1e-8)
    assert extra == pytest.approx(1e-5)
    want = torch.linalg.inv(total.double() + extra * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(solve(torch.eye(4, dtype=torch.float64)), want)
    # A model in float32 and three tokens: no error, and a small ridge does as well as none.
    model = peft_model("llama", 2).float()
    inputs: Inputs = {
        n: [{"input_ids": torch.tensor([[5 + i, 9, 11]])}] for i, n in enumerate(names)
    }
    merge = merge_adapters(model, names, "regmean", inputs=inputs, off_diagonal=1.0, ridge=1e-12)
    assert all(bool(merge.delta(m.module).isfinite().all()) for m in merge.modules)


def test_regmean_does_not_see_padding_nor_how_examples_are_batched() -> None:
    model = peft_model("llama", 2)
    names = ["en", "zh"]
    inputs = inputs_of("llama", names)
    longer = {
        n: [{k: torch.nn.functional.pad(v, (0, 3)) for k, v in b.items()} for b in inputs[n]]
        for n in names
    }
    single = inputs_of("llama", names, per=1)
    one = merge_adapters(model, names, "regmean", inputs=inputs, adapter_name="one")
    for other in (longer, single):
        two = merge_adapters(model, names, "regmean", inputs=other, adapter_name="two")
        for m in one.modules:
            torch.testing.assert_close(
                two.delta(m.module), one.delta(m.module), rtol=1e-7, atol=1e-9
            )
        model.delete_adapter("two")


@pytest.mark.parametrize("more", [{}, {"rounds": 2, "relative": True}], ids=["one", "two"])
def test_regmean_in_more_passes_gives_the_same_bits(more: dict[str, Any]) -> None:
    model = peft_model("llama", 3)
    inputs = inputs_of("llama", TRIO)
    one, two = (
        merge_adapters(model, TRIO, "regmean", inputs=inputs, adapter_name=name, **more, **size)
        # Two float64 Grams of 24 x 24 are 9 KB: one group per pass, and q, k and v are one group.
        for name, size in (("one", {}), ("two", {"gram_gib": 1e-6}))
    )
    rounds = more.get("rounds", 1)
    assert one.fitted["passes"] == rounds
    assert two.fitted["passes"] == rounds * (4 * 4 + 1)
    for m in one.modules:
        assert torch.equal(one.delta(m.module), two.delta(m.module))


def test_regmean_shares_are_those_of_relative_errors_and_bounded() -> None:
    shares = regmean_method._shares
    assert shares([0.5, 0.5], [3.0, 3.0]) == [0.5, 0.5]
    assert shares([0.5, 0.5], [1.0, 2.0]) == pytest.approx([2 / 3, 1 / 3])
    assert shares([0.5, 0.5], [0.0, 1.0]) == pytest.approx([0.8, 0.2])  # 0 counts as 1/4
    assert shares([0.25, 0.75], [0.0, 0.0]) == [0.25, 0.75]
    assert shares([0.0, 1.0], [2.0, 2.0]) == [0.0, 1.0]


def test_regmean_weights_say_how_much_an_experts_error_counts() -> None:
    model = peft_model("llama", 2)
    names = ["en", "zh"]
    dense, inputs = dense_of(model, "llama"), inputs_of("llama", ["en", "zh"])
    merge = merge_adapters(model, names, "regmean", inputs=inputs, weights={"zh": 0.0, "en": 3.0})
    same(merge, {m: d["en"] for m, d in dense.d.items()}, dense, 1e-6)
    for weights in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match="regmean needs weights >= 0"):
            merge_adapters(model, names, "regmean", inputs=inputs, weights=weights, overwrite=True)


class Unused(nn.Module):
    """A module that no input reaches, and one that is called twice."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.twice(torch.tanh(self.twice(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def unused() -> tuple[PeftModel, DenseModel, Inputs]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        base, plain = Unused().double(), Unused().double()
        plain.load_state_dict(base.state_dict())
        config = {"lora_alpha": 3, "target_modules": ["twice", "never"]}
        model = get_peft_model(base, LoraConfig(r=2, **config), "en")
        model.add_adapter("zh", LoraConfig(r=1, **config))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.5 * torch.randn_like(parameter, dtype=torch.float64)
        inputs: Inputs = {
            n: [{"x": torch.randn(7, 5, dtype=torch.float64), "labels": torch.arange(7) % 5}]
            for n in ["en", "zh"]
        }
    return model, DenseModel(model, plain), inputs


def test_regmean_with_modules_called_twice_or_never() -> None:
    model, dense, inputs = unused()
    merge = merge_adapters(model, ["en", "zh"], "regmean", inputs=inputs, off_diagonal=1.0)
    rows = {n: torch.cat(dense.inputs(dense.alone(n), inputs[n][0])["twice"]) for n in ["en", "zh"]}
    assert len(rows["en"]) == 14
    want = {
        "twice": regmean_truth(dense, rows, "twice", 1.0, 1e-6),
        "never": sum(dense.d["never"].values()) / 2,
    }
    same(merge, want, dense, 1e-6)
    assert merge.fitted["without_input"] == ["never"]


CONVOLUTIONS = ["conv1", "conv2", "conv3"]


@pytest.mark.parametrize(("rounds", "relative"), [(1, False), (3, True)])
def test_regmean_solves_convolutions_by_their_patches(rounds: int, relative: bool) -> None:
    """Circular padding, zeros, strides and dilation, in one, two and three dimensions."""
    model, plain = convolutions()
    dense = DenseModel(model, plain)
    ids = torch.arange(24).reshape(2, 12)
    inputs: Inputs = {"en": [{"ids": ids}], "zh": [{"ids": ids[:1]}, {"ids": ids.flip(0) // 2}]}
    options: dict[str, Any] = {"off_diagonal": 0.8, "ridge": 1e-4, "rounds": rounds}
    options |= {"relative": relative}
    before = snapshot(model)
    merge = merge_adapters(model, ["en", "zh"], "regmean", inputs=inputs, **options)
    assert moved(before, snapshot(model, but="merged")) == []
    want = in_rounds(dense, inputs, "convolutions", rounds, relative)[-1]
    same(merge, want, dense, 1e-6)
    for module in CONVOLUTIONS:
        mean = sum(dense.d[module].values()) / 2
        assert (want[module] - mean).norm() > 0.1 * mean.norm()
    made = focus_adapters(model, ["en", "zh"], inputs, **options)
    parts = merge_adapters(model, list(made.values()), "cat", adapter_name="parts")
    same(parts, want, dense, 1e-6)


# ------------------------------------------------------------------------------------------ Fisher


def fisher_truth(
    dense: DenseModel,
    inputs: Inputs,
    loss_terms: Any,
    *,
    weights: Mapping[str, float] | None = None,
    normalize: bool = True,
    floor: float = 1e-6,
) -> dict[str, Tensor]:
    """Squared gradients of dense weights by autograd, one example and one term at a time."""
    above = {m: torch.zeros_like(d[dense.names[0]]) for m, d in dense.d.items()}
    below = {m: torch.zeros_like(x) for m, x in above.items()}
    for name in dense.names:
        f = {m: torch.zeros_like(x) for m, x in above.items()}
        examples = [
            {k: v[i : i + 1] for k, v in b.items()}
            for b in inputs[name]
            for i in range(len(next(iter(b.values()))))
        ]
        for n, example in enumerate(examples):
            leaves = {k: w.clone().requires_grad_() for k, w in dense.alone(name).items()}
            output = dense(leaves, example)
            for share, term in loss_terms(name, n, example, output):
                grads = torch.autograd.grad(
                    term, list(leaves.values()), retain_graph=True, allow_unused=True
                )
                for path, g in zip(leaves, grads, strict=True):
                    if g is not None:
                        f[path.removesuffix(".weight")] += share * g.square() / len(examples)
        mean = sum(float(x.sum()) for x in f.values()) / sum(x.numel() for x in f.values())
        norm = sum(float(x.square().sum()) for x in f.values()) ** 0.5 if normalize else 1.0
        for m, x in f.items():
            share = (weights or {}).get(name, 1.0) * x.clamp(min=floor * mean) / norm
            above[m] += share * dense.d[m][name]
            below[m] += share
    return {m: above[m] / below[m] for m in above}


def every_class(name: str, n: int, example: Any, output: Any) -> Any:
    logs = output.logits.log_softmax(-1)[0]
    return [(float(logs[y].detach().exp()), logs[y]) for y in range(len(logs))]


def test_fisher_of_a_classifier_is_the_exact_expectation() -> None:
    model = peft_model("bert", 3)
    dense = dense_of(model, "bert")
    inputs = inputs_of("bert", TRIO)
    before = snapshot(model)
    weights = dict(zip(TRIO, (1.0, 2.0, 0.5), strict=True))
    merge = merge_adapters(model, TRIO, "fisher", inputs=inputs, weights=weights)
    assert moved(before, snapshot(model, but="merged")) == []
    same(merge, fisher_truth(dense, inputs, every_class, weights=weights), dense, 1e-6)
    assert merge.fitted["examples"] == dict.fromkeys(TRIO, 6)
    assert merge.export_error > 0.01  # entry by entry: of full rank
    other = merge_adapters(
        model, TRIO, "fisher", inputs=inputs, adapter_name="other", normalize=False, floor=0.3
    )
    want = fisher_truth(dense, inputs, every_class, normalize=False, floor=0.3)
    same(other, want, dense, 1e-6)


def test_fisher_of_convolutions_is_that_of_their_kernels() -> None:
    model, plain = convolutions()
    dense = DenseModel(model, plain)
    ids = torch.arange(24).reshape(2, 12)
    inputs: Inputs = {"en": [{"ids": ids}], "zh": [{"ids": ids[:1]}, {"ids": ids.flip(0) // 2}]}
    weights = {"en": 1.0, "zh": 3.0}
    before = snapshot(model)
    merge = merge_adapters(model, ["en", "zh"], "fisher", inputs=inputs, weights=weights)
    assert moved(before, snapshot(model, but="merged")) == []
    same(merge, fisher_truth(dense, inputs, every_class, weights=weights), dense, 1e-6)
    for module in CONVOLUTIONS:
        mean = (dense.d[module]["en"] + 3.0 * dense.d[module]["zh"]) / 4.0
        assert (stored(dense, module, merge.delta(module)) - mean).norm() > 0.1 * mean.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_fisher_of_a_language_model_draws_a_label_for_every_token(kind: str) -> None:
    model = peft_model(kind, 2)
    names = ["en", "zh"]
    dense = dense_of(model, kind)
    inputs = inputs_of(kind, names, 3, 2)

    def drawn(name: str, n: int, example: Any, output: Any) -> Any:
        logs = output.logits[example["attention_mask"].bool()].log_softmax(-1)
        generator = named_generator(7, "fisher", name, n)
        p = logs.detach().exp()
        for _ in range(2):
            y = torch.multinomial(p, 1, generator=generator)[:, 0]
            yield 0.5, sum(logs[t, y[t]] for t in range(len(y)))

    merge = merge_adapters(model, names, "fisher", inputs=inputs, seed=7, samples=2)
    same(merge, fisher_truth(dense, inputs, drawn), dense, 1e-5)


def test_fisher_of_given_labels_is_the_empirical_one() -> None:
    model, dense, inputs = unused()
    merge = merge_adapters(model, ["en", "zh"], "fisher", inputs=inputs, labels="given")
    want = fisher_truth(dense, inputs, lambda name, n, example, output: [(1.0, output.loss)])
    same(merge, want, dense, 1e-7)
    with pytest.raises(ConfigError, match="needs labels, but batch 0"):
        merge_adapters(
            model,
            ["en", "zh"],
            "fisher",
            inputs={n: [{"x": b[0]["x"]}] for n, b in inputs.items()},
            labels="given",
            adapter_name="other",
        )


def test_fisher_is_per_example_and_not_of_the_batch() -> None:
    """Batching changes nothing; a gradient summed over a batch and squared would."""
    model = peft_model("bert", 2)
    names = ["en", "zh"]
    one = merge_adapters(
        model, names, "fisher", inputs=inputs_of("bert", names, per=6), adapter_name="one"
    )
    two = merge_adapters(
        model, names, "fisher", inputs=inputs_of("bert", names, per=1), adapter_name="two"
    )
    for m in one.modules:
        assert torch.equal(one.delta(m.module), two.delta(m.module))


def test_fisher_refuses_a_model_of_one_class() -> None:
    model, _, inputs = unused()

    def squeezed(_module: nn.Module, _args: Any, output: Any) -> Any:
        return SimpleNamespace(logits=output.logits[:, :1], loss=output.loss)

    handle = model.base_model.model.register_forward_hook(squeezed)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="two or more classes"):
        merge_adapters(model, ["en", "zh"], "fisher", inputs=inputs)
    assert moved(before, snapshot(model)) == []
    handle.remove()


# ------------------------------------------------------------------------- options and hard values

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("regmean", {"off_diagonal": 1.5}, "off_diagonal must be"),
    ("regmean", {"ridge": -1.0}, "ridge must be"),
    ("regmean", {"gram_gib": "much"}, "gram_gib must be"),
    ("regmean", {"rounds": 0}, "rounds must be"),
    ("regmean", {"relative": 1}, "relative must be True or False"),
    ("regmean", {"relative": True}, "relative=True needs rounds=2 or more"),
    ("regmean", {"inputs": None}, "needs inputs: pass inputs"),
    ("regmean", {"inputs": {"en": []}}, "no batches for adapter 'zh'"),
    ("regmean", {"space": "knots"}, "space='knots'"),
    ("fisher", {"labels": "mine"}, "labels got 'mine'"),
    ("fisher", {"samples": 0}, "samples must be"),
    ("fisher", {"normalize": 1}, "normalize must be True or False"),
    ("fisher", {"floor": -1}, "floor must be"),
    ("fisher", {"weights": [-1.0, 1.0]}, "fisher needs weights >= 0"),
    ("task_arithmetic", {}, "inputs would not be read"),
]


@pytest.mark.parametrize(("method", "options", "text"), BAD)
def test_bad_options_are_refused_and_nothing_is_touched(
    method: str, options: dict[str, Any], text: str
) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)
    given = {"inputs": inputs_of("llama", ["en", "zh"]), **options}
    with pytest.raises(ConfigError, match=text):
        merge_adapters(model, ["en", "zh"], method, **given)
    assert moved(before, snapshot(model)) == []


@pytest.mark.parametrize("method", ["regmean", "fisher", "adamerging"])
def test_inputs_of_nan_are_named_and_nothing_is_touched(method: str) -> None:
    model, _, inputs = unused()
    inputs["zh"][0]["x"][3, 2] = float("nan")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"'zh'.*[Nn]a[Nn]|[Nn]a[Nn].*'zh'"):
        merge_adapters(model, ["en", "zh"], method, inputs=inputs)
    assert moved(before, snapshot(model)) == []


def test_adapters_with_more_than_factors_are_refused() -> None:
    specs = default_specs("bert", 2)
    for spec in specs.values():
        spec["modules_to_save"] = ["classifier"]
    model = add_adapters(tiny_model("bert"), specs)
    with pytest.raises(ConfigError, match="these adapters also have modules_to_save"):
        merge_adapters(
            model,
            ["en", "zh"],
            "regmean",
            inputs=inputs_of("bert", ["en", "zh"]),
            modules_to_save="average",
        )
