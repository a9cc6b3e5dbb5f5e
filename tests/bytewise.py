"""Tiny seeded models that read text: one token per byte, so that no vocabulary is needed."""

from __future__ import annotations

from functools import lru_cache

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, BOS, EOS = 0, 1, 2
SYMBOLS = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
VOCAB = len(SYMBOLS)  # 259
POSITIONS = 160
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
}
IDS = {"bos_token_id": BOS, "eos_token_id": EOS}


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after a start token, as Gemma and Llama have."""
    inner = Tokenizer(models.BPE({s: i for i, s in enumerate(SYMBOLS)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <eos> $B:1",
        special_tokens=[("<bos>", BOS), ("<eos>", EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = LlamaConfig(**SIZES, **IDS, num_key_value_heads=2, tie_word_embeddings=False)
    return tiny._build(LlamaForCausalLM, config, dtype, seed)


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=24, n_layer=2, n_head=4,
        pad_token_id=PAD, **IDS,
    )  # fmt: skip
    return tiny._build(GPT2LMHeadModel, config, dtype, seed)


def gemma3(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = Gemma3TextConfig(
        **SIZES, **IDS, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=6, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return tiny._build(Gemma3ForCausalLM, config, dtype, seed)


def t5(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2,
        num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=16,
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return tiny._build(T5ForConditionalGeneration, config, dtype, seed)


def bert_config(labels: int) -> BertConfig:
    return BertConfig(**SIZES, num_labels=labels)


def bert(labels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    return tiny._build(BertForSequenceClassification, bert_config(labels), dtype, seed)


def roberta(labels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A classifier whose head has two layers."""
    config = RobertaConfig(**SIZES, num_labels=labels, type_vocab_size=2)
    return tiny._build(RobertaForSequenceClassification, config, dtype, seed)


def bert_tokens(
    labels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    return tiny._build(BertForTokenClassification, bert_config(labels), dtype, seed)


def llama_classifier(
    labels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    config = LlamaConfig(**SIZES, **IDS, num_key_value_heads=2, num_labels=labels)
    return tiny._build(LlamaForSequenceClassification, config, dtype, seed)


CAUSAL = {"llama": llama, "gpt2": gpt2, "gemma3": gemma3}
