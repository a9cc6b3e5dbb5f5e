"""`multiple_choice` against a naive computation: one row, one choice, no padding at a time."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_himerge.errors import HiMergeError
from peft_himerge.evals import EvalRowError, MultipleChoiceRow, multiple_choice


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, with a start token, as Gemma and Llama have."""
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2():
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
    )
    return GPT2LMHeadModel(config)


class Bare(nn.Module):
    """A causal LM whose forward knows none of the optional arguments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions
        )


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bare": lambda: Bare(tiny_llama())}

LETTERS = [
    MultipleChoiceRow("a long question with many words?", ("A", "B", "C"), 2),
    MultipleChoiceRow("q?", ("A", "B"), 0),
    MultipleChoiceRow("another one?", ("C", "A", "B", "D"), 1),
    MultipleChoiceRow("q!", ("B", "A"), 1),
    MultipleChoiceRow("中文问题", ("D", "A", "C"), 0),
]
WORDS = [
    MultipleChoiceRow("a long question with many words?", (" yes", " no", " maybe so"), 2),
    MultipleChoiceRow("q?", (" no", " yes"), 0),
    MultipleChoiceRow("another one?", ("A", " never", "大洋洲"), 1),
    MultipleChoiceRow("q!", ("B", "A"), 1),
]


def naive(model, tokenizer, rows):
    accuracy, log_likelihood = [], []
    for row in rows:
        totals = []
        for choice in row.choices:
            prompt = tokenizer(row.prompt)["input_ids"]
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            total = 0.0
            for offset, token in enumerate(answer):
                total += logits[len(prompt) + offset - 1].double().log_softmax(-1)[token]
            totals.append(total)
        log_probs = torch.stack(totals).log_softmax(0)
        accuracy.append(float(log_probs.argmax() == row.answer))
        log_likelihood.append(float(log_probs[row.answer]))
    return {
        "accuracy": torch.tensor(accuracy),
        "log_likelihood": torch.tensor(log_likelihood),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("rows", [LETTERS, WORDS, LETTERS + WORDS], ids=["one", "many", "mixed"])
def test_multiple_choice_equals_a_row_at_a_time_without_padding(tokenizer, name, batch_size, rows):
    model = MODELS[name]().eval()
    scores = multiple_choice(rows, tokenizer, batch_size=batch_size)(model)
    expected = naive(model, tokenizer, rows)
    assert torch.equal(scores["accuracy"], expected["accuracy"])
    torch.testing.assert_close(
        scores["log_likelihood"], expected["log_likelihood"], rtol=1e-4, atol=1e-4
    )
    assert scores["accuracy"].dtype == scores["log_likelihood"].dtype == torch.float32


def test_multiple_choice_keeps_row_order_and_takes_the_first_rows(tokenizer):
    model = tiny_llama().eval()
    full = multiple_choice(LETTERS, tokenizer, batch_size=2)(model)["log_likelihood"]
    turned = multiple_choice(LETTERS[::-1], tokenizer, batch_size=2)(model)["log_likelihood"]
    first = multiple_choice(LETTERS, tokenizer, max_rows=2)(model)["log_likelihood"]
    torch.testing.assert_close(turned.flip(0), full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, full[:2], rtol=1e-4, atol=1e-4)
    assert full.std() > 0.01


def test_multiple_choice_leaves_model_and_random_states_alone(tokenizer):
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, lora_alpha=8, lora_dropout=0.5, task_type="CAUSAL_LM")
    )
    model.train()
    model.base_model.model.model.layers[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    eval_fn = multiple_choice(LETTERS, tokenizer, batch_size=2)
    first, second = eval_fn(model), eval_fn(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_multiple_choice_restores_the_mode_when_forward_raises(tokenizer):
    model = Bare(tiny_llama()).train()
    model.inner.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        multiple_choice(LETTERS, tokenizer)(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": ""}, "needs a prompt"),
        ({"choices": ("A",)}, "two or more different choices"),
        ({"choices": ("A", "A")}, "two or more different choices"),
        ({"choices": ("A", "")}, "must not be empty"),
        ({"answer": 2}, "answer must be an index"),
        ({"answer": -1}, "answer must be an index"),
        ({"options": ("one",)}, "options must be as many"),
    ],
)
def test_row_when_malformed_is_refused(fields, text):
    good = {"prompt": "q", "choices": ["A", "B"], "answer": 0}
    assert MultipleChoiceRow(**good).choices == ("A", "B")
    with pytest.raises(EvalRowError, match=text):
        MultipleChoiceRow(**{**good, **fields})


def test_row_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LETTERS[0].answer = 1


def test_multiple_choice_refuses_bad_arguments(tokenizer):
    with pytest.raises(HiMergeError, match="at least one row"):
        multiple_choice([], tokenizer)
    with pytest.raises(ValueError, match="batch_size"):
        multiple_choice(LETTERS, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="max_rows"):
        multiple_choice(LETTERS, tokenizer, max_rows=0)
