"""Sharing blocks between scores: the same bits as full runs, and as few block calls as possible."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from peft_himerge import HiMergeConfig, MergePlan, hi, merge_adapters_hi
from peft_himerge.adapters import read_adapters
from peft_himerge.blocks import BlockMemo, find_blocks
from peft_himerge.combine import Combiner
from peft_himerge.contribution import states
from peft_himerge.engine import Engine
from peft_himerge.plan import Edit
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

KINDS = ("llama", "gemma3", "gpt2", "qwen2", "bert", "t5")
EvalFn = Callable[[Any], Any]


def analyse(
    model: PeftModel, fns: dict[str, EvalFn], cache_bytes: int
) -> tuple[list[Any], BlockMemo, Engine]:
    """Score every state of the analysis; return scores, the memo with its counts, the engine."""
    names = [name for name in model.peft_config if name in fns]
    combiner = Combiner(read_adapters(model, names))
    plan = combiner.plan({name: Edit(0.4, 0.9) for name in names})
    probe = Probe(model, combiner, cache_bytes=cache_bytes)
    tasks = {name: Task(name, fns[name]) for name in names}
    layers = [layer.label for layer in combiner.layers]
    with probe:
        engine = Engine(probe, tasks, lambda _: None)
        requests = [r for name in names for r in states(name, plan, layers)]
        scores = engine.score_many(requests)
    values = [s.examples.tolist() if s.examples is not None else s.value for s in scores]
    return values, probe.blocks, engine


def assert_shared_equals_full(model: PeftModel, fns: dict[str, EvalFn]) -> BlockMemo:
    full, memo, _ = analyse(model, fns, 0)
    assert (memo.run, memo.skipped) == (0, 0)
    shared, memo, _ = analyse(model, fns, 10**9)
    assert shared == full
    return memo


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_are_bit_identical_to_full_runs(kind: str, use_cache: bool) -> None:
    model = tiny.peft_model(kind, 2, dtype=torch.float32)
    model.base_model.model.config.use_cache = use_cache
    memo = assert_shared_equals_full(model, tiny.eval_fns(kind, tiny.NAMES[:2]))
    assert memo.skipped > 0


@pytest.mark.parametrize("kind", KINDS)
def test_block_calls_are_the_distinct_edges_of_the_prefix_tree(kind: str) -> None:
    model = tiny.peft_model(kind, 2, dtype=torch.float32)
    names = tiny.NAMES[:2]
    fns = tiny.eval_fns(kind, names)
    _, memo, engine = analyse(model, fns, 10**9)
    combiner = Combiner(read_adapters(model, names))
    plan = combiner.plan({name: Edit(0.4, 0.9) for name in names})
    labels = [layer.label for layer in combiner.layers]
    edges, naive = set(), 0
    blocks = list(find_blocks(model.base_model.model, labels))
    for name in names:
        seen = {}
        for _, state in states(name, plan, labels):
            seen[state.fingerprint] = state
        for state in seen.values():
            naive += len(blocks)
            embedded = [m for m in combiner.modules if combiner.kind(m) == "embedding"]
            path: list[object] = [name, [combiner.terms(state, m) for m in embedded]]
            for block in blocks:
                inside = [m for m in combiner.modules if m.startswith(f"{block}.")]
                path.append([combiner.terms(state, m) for m in inside])
                edges.add(repr(path))
    assert memo.run + memo.skipped == naive
    assert memo.run <= 1.02 * len(edges)
    assert engine.done == naive // len(blocks)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "t5"])
def test_generation_with_a_cache_is_bit_identical(kind: str) -> None:
    model = tiny.peft_model(kind, 2, dtype=torch.float32)
    ids = torch.arange(3, 27).reshape(2, 12)

    def fn(shift: int) -> EvalFn:
        def generate(m: Any) -> list[float]:
            made = m.generate(
                input_ids=ids + shift, max_new_tokens=5, min_new_tokens=5, do_sample=True,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            return (made.sequences.double().mean(1) + made.logits[-1].double().sum(1)).tolist()

        return generate

    memo = assert_shared_equals_full(model, {"zh": fn(0), "en": fn(5)})
    assert memo.skipped > 0


def test_an_eval_function_may_go_on_decoding_from_the_cache_itself() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    ids = torch.arange(3, 27).reshape(2, 12)

    def decode(m: Any) -> torch.Tensor:
        first = m(input_ids=ids, use_cache=True)
        step = first.logits[:, -1:].argmax(-1)
        second = m(input_ids=step, past_key_values=first.past_key_values, use_cache=True)
        assert second.past_key_values.get_seq_length() == 13
        return second.logits[:, -1].log_softmax(-1).max(-1).values

    assert_shared_equals_full(model, {"zh": decode, "en": decode})


def test_several_batches_and_several_calls_per_batch_are_shared() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    ids = torch.arange(3, 51).reshape(4, 12)

    def contrast(m: Any) -> torch.Tensor:
        parts = []
        for batch in ids.split(2):
            right = m(input_ids=batch).logits[:, -1, 5]
            wrong = m(input_ids=batch.flip(1), output_hidden_states=True)
            parts.append(right - wrong.logits[:, -1, 5] + wrong.hidden_states[2].sum((1, 2)))
        return torch.cat(parts)

    memo = assert_shared_equals_full(model, {"zh": contrast, "en": contrast})
    assert memo.skipped > 0.3 * memo.run


def test_calls_with_gradients_or_attentions_run_in_full() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    model.base_model.model.set_attn_implementation("eager")
    ids = torch.arange(3, 27).reshape(2, 12)

    def gradient(m: Any) -> float:
        with torch.enable_grad():
            embeds = m.get_input_embeddings()(ids).detach().requires_grad_()
            m(inputs_embeds=embeds).logits.sum().backward()
        return float(embeds.grad.norm())

    def attention(m: Any) -> torch.Tensor:
        found = m(input_ids=ids, output_attentions=True).attentions
        assert len(found) == 4
        return torch.stack([a[:, 0, -1, 0] for a in found]).sum(0)

    memo = assert_shared_equals_full(model, {"zh": gradient, "en": attention})
    assert memo.skipped == 0


def test_what_exceeds_the_budget_is_run_again() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    fns = tiny.eval_fns("llama", tiny.NAMES[:2])
    full, _, _ = analyse(model, fns, 0)
    enough, rich, _ = analyse(model, fns, 10**9)
    little, poor, _ = analyse(model, fns, 60_000)
    assert full == enough == little
    assert rich.skipped > poor.skipped > 0


def test_random_eval_functions_and_changing_inputs_are_seen() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    calls = []

    def noisy(m: Any) -> torch.Tensor:
        calls.append(1)
        ids = torch.randint(3, 60, (2, 12)) if len(calls) % 2 else torch.full((2, 12), 7)
        return m(input_ids=ids).logits[:, -1].log_softmax(-1)[:, 5]

    full, _, _ = analyse(model, {"zh": noisy, "en": noisy}, 0)
    calls.clear()
    shared, memo, _ = analyse(model, {"zh": noisy, "en": noisy}, 10**9)
    assert shared == full
    assert memo.run > memo.skipped


def test_an_eval_function_that_writes_into_outputs_does_not_spoil_later_scores() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    ids = torch.arange(3, 27).reshape(2, 12)

    def spoil(m: Any) -> torch.Tensor:
        out = m(input_ids=ids, output_hidden_states=True)
        score = out.logits[:, -1].log_softmax(-1)[:, 5].clone()
        for hidden in out.hidden_states:
            hidden.zero_()
        return score

    assert_shared_equals_full(model, {"zh": spoil, "en": spoil})


class Odd(nn.Module):
    """Blocks in a container of its own, which is not understood."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x).tanh()
        return x


def test_a_structure_that_is_not_understood_is_said_once_and_runs_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1", "2"], init_lora_weights=False)
    model = get_peft_model(Odd(), config, adapter_name="zh")
    model.add_adapter("en", config)
    x = torch.randn(4, 8)
    fns = {"zh": lambda m: m(x).sum(1), "en": lambda m: m(x).square().sum(1)}
    with caplog.at_level(logging.WARNING, "peft_himerge.blocks"):
        result = merge_adapters_hi(
            model, ["zh", "en"], fns, config=HiMergeConfig(density=1.0, scale=1.0)
        )
    assert len(caplog.records) == 1
    assert "runs in full" in caplog.text
    assert len(result.contributions) == 6


def test_every_patched_forward_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)

    def marked(*args: Any, **kwargs: Any) -> Any:
        return type(model.base_model.model).forward(model.base_model.model, *args, **kwargs)

    model.base_model.model.forward = marked
    before = {id(m): vars(m).get("forward") for m in model.modules()}
    hi.score_plans(
        model, ["zh"], {"base": MergePlan.base()}, {"t": tiny.eval_fns("llama", ["zh"])["zh"]}
    )
    assert {id(m): vars(m).get("forward") for m in model.modules()} == before


def test_calls_that_a_run_did_not_make_are_forgotten() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    base = model.base_model.model
    ids = torch.arange(3, 15).reshape(1, 12)
    with torch.no_grad(), BlockMemo(base, find_blocks(base, ["model.layers.0"]), 10**9) as memo:

        def score(calls: int) -> tuple[int, int]:
            before = memo.run, memo.skipped
            with memo.scoring("task", lambda _: "same"):
                for call in range(calls):
                    base(input_ids=ids + call)
            return memo.run - before[0], memo.skipped - before[1]

        assert [score(2), score(2)] == [(8, 0), (0, 8)]
        assert score(1) == (0, 4)
        assert score(2) == (4, 4)  # the second call was not made last time
        base(input_ids=ids)  # outside of any task
        assert score(2) == (0, 8)


class Scaled(nn.Module):
    """Blocks whose inputs are more than tensors and whose output is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        for layer in self.layers:
            layer.forward = self._around(layer.forward)

    def _around(self, linear: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def forward(x: torch.Tensor, scale: float, extra: Any) -> dict[str, torch.Tensor]:
            more = extra.sum() if isinstance(extra, torch.Tensor) else len(extra or ())
            return {"x": linear(x) * scale + more}

        return forward

    def forward(self, x: torch.Tensor, scale: float, extra: Any = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, scale, extra)["x"]
        return x


def test_a_block_is_skipped_only_if_every_input_is_equal() -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    x = torch.randn(3, 4)
    calls = [  # inputs, and how many of the two blocks are run
        ((x, 0.5), 2),
        ((x.clone(), 1.0 / 2.0), 0),
        ((x, 0.25), 2),
        ((x, 0.25, torch.ones(2)), 2),
        ((x, 0.25, torch.ones(2)), 0),
        ((x, 0.25, [1, 2]), 2),
        ((x, 0.25, [1, 2]), 0),
        ((x, 0.25, [1, 2, 3]), 2),
        ((x, 0.25, {1, 2}), 2),
        ((x, 0.25, {1, 2}), 2),  # a set is nothing this room can compare
        ((x.double().float()[:2], 0.25), 2),
    ]
    with torch.no_grad():
        wanted = [model(*inputs) for inputs, _ in calls]
        labels = find_blocks(model, ["layers.0"])
        with BlockMemo(model, labels, 10**9) as memo:
            for (inputs, run), want in zip(calls, wanted, strict=True):
                before = memo.run
                with memo.scoring("task", lambda _: "same"):
                    assert torch.equal(model(*inputs), want)
                assert memo.run - before == run, inputs
    assert memo.skipped == 6


def test_inference_tensors_and_unknown_caches_run_in_full() -> None:
    class Own(DynamicCache):
        """A cache that may do anything."""

    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    ids = torch.arange(3, 27).reshape(2, 12)

    def inference(m: Any) -> list[float]:
        with torch.inference_mode():
            return list(m(input_ids=ids).logits[:, -1].log_softmax(-1)[:, 5].tolist())

    def cached(m: Any) -> torch.Tensor:
        cache = Own(config=m.base_model.model.config)
        found = m(input_ids=ids, past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == 12
        return found[:, -1].log_softmax(-1)[:, 5]

    memo = assert_shared_equals_full(model, {"zh": inference, "en": cached})
    assert memo.skipped == 0

    model = tiny.peft_model("t5", 2, dtype=torch.float32)

    def crossed(m: Any) -> torch.Tensor:
        cache = EncoderDecoderCache(DynamicCache(), Own())
        found = m(
            input_ids=ids, decoder_input_ids=ids[:, :3], past_key_values=cache, use_cache=True
        )
        assert cache.cross_attention_cache.get_seq_length() == 12
        return found.logits[:, -1].log_softmax(-1)[:, 5]

    def plain(m: Any) -> torch.Tensor:
        found = m(input_ids=ids, decoder_input_ids=ids[:, :3], use_cache=False)
        return found.logits[:, -1].log_softmax(-1)[:, 5]

    crossing = assert_shared_equals_full(model, {"zh": crossed, "en": crossed})
    without = assert_shared_equals_full(model, {"zh": plain, "en": plain})
    assert 0 < crossing.skipped < without.skipped  # the encoder alone has no cache
