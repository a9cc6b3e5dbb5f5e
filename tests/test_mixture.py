"""The live model with multiples of the deltas: the dense truth, its gradient, and no trace left."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_model import DenseModel
from peft import LoraConfig, PeftModel, get_peft_model
from snapshot import moved, snapshot
from tiny import KINDS, NAMES, add_adapters, default_specs, eval_fns, peft_model, tiny_model
from torch import Tensor, nn

from peft_himerge.adapters import read_adapters
from peft_himerge.batches import Batches
from peft_himerge.combine import Combiner
from peft_himerge.errors import ConfigError
from peft_himerge.mixture import Evidence, Mixture, chunk_of_row, logits_of

TRIO = list(NAMES[:3])


def evidence_of(model: PeftModel, batches: Any = None) -> Evidence:
    adapters = read_adapters(model, sorted(model.peft_config))
    return Evidence(model, Combiner(adapters), Batches(batches or {}), 0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(kind: str) -> dict[str, Tensor]:
    return dict(eval_fns(kind, ["zh"], 5)["zh"].inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_multiples_of_all_deltas_and_their_gradient_are_the_dense_ones(kind: str) -> None:
    model = peft_model(kind, 3)
    dense = DenseModel(model, tiny_model(kind, dtype=torch.float64))
    batch = inputs_of(kind)
    c = {m: drawn(3, seed=i).requires_grad_() for i, m in enumerate(dense.modules)}
    probe = drawn(*dense(dense.weights(c), batch).logits.shape, seed=99)
    want = dense(dense.weights(c), batch).logits
    wanted = torch.autograd.grad((want * probe).sum(), list(c.values()), allow_unused=True)
    with evidence_of(model).mixture() as mixture:
        assert mixture.names == tuple(dense.names)
        mixture.show(c)
        with torch.enable_grad():
            got = mixture.run(batch, grad=True).logits
            size = (got * probe).sum()
        gradient = torch.autograd.grad(size, list(c.values()), allow_unused=True)
        assert not mixture.run(batch).logits.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for module, one, other in zip(c, gradient, wanted, strict=True):
        present = [n in dense.has[module] for n in dense.names]
        torch.testing.assert_close(one[present], other[present], rtol=1e-7, atol=1e-8)
        assert not one[[not p for p in present]].any()


def test_gradient_is_that_of_finite_differences_and_of_the_dense_weight() -> None:
    """dL/dc_i = <dL/dW, D_i>, which is what Frank-Wolfe and all others rest on."""
    model = peft_model("llama", 3)
    dense = DenseModel(model, tiny_model("llama", dtype=torch.float64))
    batch = inputs_of("llama")
    start = {m: drawn(3, seed=i) for i, m in enumerate(dense.modules)}
    module = "model.layers.1.self_attn.v_proj"

    def loss(mixture: Mixture, c: dict[str, Tensor], grad: bool = False) -> Tensor:
        mixture.show(c)
        return logits_of(mixture.run(batch, grad=grad)).log_softmax(-1).square().mean()

    weights = {k: w.detach().requires_grad_() for k, w in dense.weights(start).items()}
    out = dense(weights, batch).logits.log_softmax(-1).square().mean()
    (g,) = torch.autograd.grad(out, [weights[f"{module}.weight"]])
    with evidence_of(model).mixture() as mixture:
        leaf = {**start, module: start[module].clone().requires_grad_()}
        with torch.enable_grad():
            (got,) = torch.autograd.grad(loss(mixture, leaf, True), [leaf[module]])
        for i, name in enumerate(dense.names):
            step = torch.zeros(3, dtype=torch.float64)
            step[i] = 1e-6
            up, down = (
                loss(mixture, {**start, module: start[module] + sign * step}) for sign in (1, -1)
            )
            assert float(up - down) / 2e-6 == pytest.approx(float(got[i]), rel=1e-5, abs=1e-9)
            assert float((g * dense.d[module][name]).sum()) == pytest.approx(float(got[i]))


@pytest.mark.parametrize("kind", KINDS)
def test_solo_is_pefts_own_forward_of_one_adapter(kind: str) -> None:
    model = peft_model(kind, 3)
    batch = inputs_of(kind)
    with torch.no_grad():
        model.set_adapter("en")
        want = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
    with evidence_of(model).mixture() as mixture:
        torch.testing.assert_close(mixture.run(batch).logits, base, rtol=0, atol=0)
        mixture.solo("en")
        torch.testing.assert_close(mixture.run(batch).logits, want, rtol=1e-10, atol=1e-10)
        mixture.solo("zh")
        torch.testing.assert_close(mixture.alone("en", batch).logits, want, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(mixture.run(batch).logits, want)


def test_chunks_have_multiples_of_their_own() -> None:
    model = peft_model("gpt2", 2)
    dense = DenseModel(model, tiny_model("gpt2", dtype=torch.float64))
    module, batch = "transformer.h.2.mlp.c_fc", inputs_of("gpt2")
    c = drawn(2, 3)
    rows = chunk_of_row(40, 3)
    assert [int((rows == k).sum()) for k in range(3)] == [14, 13, 13]
    assert torch.equal(rows, rows.sort().values)
    d = dense.d[module]
    change = sum(d[n] * c[i][rows] for i, n in enumerate(dense.names))  # stored (in, out)
    weight = dense.plain.get_submodule(module).weight.detach() + change
    with evidence_of(model).mixture() as mixture:
        mixture.show({module: c})
        got = mixture.run(batch).logits
    want = dense({f"{module}.weight": weight}, batch).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Convolutions(nn.Module):
    """Every kind of convolution, with padding and strides, and a look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=2, padding=1)
        self.conv3 = nn.Conv3d(1, 3, 2, dilation=(1, 2, 1))
        self.head = nn.Linear(3, 7)

    def forward(self, ids: Tensor) -> Any:
        x = self.conv1(self.table(ids).transpose(1, 2)).tanh()
        x = self.conv2(x[:, None]).tanh()
        x = self.conv3(x[:, None]).tanh().flatten(2).mean(-1)
        return SimpleNamespace(logits=self.head(x))


def convolutions() -> tuple[PeftModel, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base, plain = Convolutions().double(), Convolutions().double()
        plain.load_state_dict(base.state_dict())
        targets = ["table", "conv1", "conv2", "conv3", "head"]
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=targets), "en")
        model.add_adapter("zh", LoraConfig(r=3, lora_alpha=5, target_modules=targets[1:]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return model, plain


def test_convolutions_and_embeddings() -> None:
    model, plain = convolutions()
    dense = DenseModel(model, plain)
    batch = {"ids": torch.arange(24).reshape(2, 12)}
    c = {m: drawn(2, seed=i) for i, m in enumerate(dense.modules)}
    with evidence_of(model).mixture() as mixture:
        mixture.show(c)
        got = mixture.run(batch).logits
    torch.testing.assert_close(got, dense(dense.weights(c), batch).logits.detach())


def test_half_precision_adds_in_float32_and_keeps_the_outputs_dtype() -> None:
    model = peft_model("llama", 2, torch.bfloat16)
    batch = inputs_of("llama")
    model.set_adapter("en")
    with torch.no_grad():
        want = model(**batch).logits
    with evidence_of(model).mixture() as mixture:
        mixture.solo("en")
        got = mixture.run(batch).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert logits_of(SimpleNamespace(logits=got)).dtype == torch.float32


def test_an_output_without_logits_is_refused() -> None:
    for odd in (SimpleNamespace(), (torch.zeros(2, 3),), torch.zeros(3)):
        with pytest.raises(ConfigError, match="must return logits"):
            logits_of(odd)
    assert logits_of(torch.zeros(2, 3)).shape == (2, 3)


# --------------------------------------------------------------------------- nothing is left behind


def messy(model: PeftModel) -> None:
    """Training mode, checkpointing, gradients from before, flags of its own, both adapters on."""
    model.train()
    model.base_model.model.lm_head.eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
        if i % 2 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.base_model.set_adapter(["en", "zh"])
    model.base_model.model.config.use_cache = True
    model.base_model.model.model.gradient_checkpointing = True


@pytest.mark.parametrize("mess", [lambda model: None, messy])
@pytest.mark.parametrize("exc", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_as_before(mess: Callable[[PeftModel], None], exc: Any) -> None:
    specs = {n: {**s, "lora_dropout": 0.3} for n, s in default_specs("llama", 2).items()}
    model = add_adapters(tiny_model("llama"), specs)
    mess(model)
    before = snapshot(model)
    batch = inputs_of("llama")

    def use() -> None:
        with evidence_of(model).mixture() as mixture:
            assert not model.training
            c = {m: torch.ones(2, dtype=torch.float64).requires_grad_() for m in mixture.bases}
            mixture.show(c)
            with torch.enable_grad():
                once = mixture.run(batch, grad=True).logits
                torch.autograd.grad(once.sum(), list(c.values()))
            torch.testing.assert_close(once, mixture.run(batch).logits)  # no dropout
            torch.rand(3)
            if exc is not None:
                raise exc

    if exc is None:
        use()
    else:
        with pytest.raises(exc):
            use()
    assert moved(before, snapshot(model)) == []


def test_an_error_while_hooks_go_in_takes_them_all_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model("llama", 2)
    before = snapshot(model)
    original, calls = nn.Module.register_forward_hook, []

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(KeyboardInterrupt), evidence_of(model).mixture():
        pass
    assert len(calls) == 4
    assert moved(before, snapshot(model)) == []


def test_it_works_inside_inference_mode() -> None:
    model = peft_model("llama", 2)
    with torch.inference_mode(), evidence_of(model).mixture() as mixture:
        c = {m: torch.ones(2, dtype=torch.float64, requires_grad=True) for m in mixture.bases}
        mixture.show(c)
        with torch.enable_grad():
            loss = mixture.run(inputs_of("llama"), grad=True).logits.sum()
            (gradient, *_) = torch.autograd.grad(loss, list(c.values()))
        assert gradient.abs().sum() > 0
    assert not torch.is_inference_mode_enabled()


def test_rows_of_padding_are_left_out_also_in_cross_attention() -> None:
    model = peft_model("t5", 3)
    batch = inputs_of("t5")
    batch["decoder_input_ids"] = torch.ones_like(batch["input_ids"])  # as long as the encoder's
    batch["decoder_attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["decoder_attention_mask"][0, -2:] = 0
    counts: dict[str, int] = {}
    with evidence_of(model).mixture() as mixture:

        def watch(module: str, x: Tensor, output: Tensor) -> Tensor:
            counts[module] = len(mixture.tokens(module, batch, x))
            return output

        mixture.watch = watch
        mixture.run(batch)
    encoder, decoder = (int(batch[k].sum()) for k in ("attention_mask", "decoder_attention_mask"))
    assert encoder != decoder
    for module, count in counts.items():
        cross = "EncDecAttention" in module and module[-2:] in (".k", ".v")
        assert count == (encoder if cross or module.startswith("encoder") else decoder), module
