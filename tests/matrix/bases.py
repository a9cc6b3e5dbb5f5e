"""The tiny base models of the matrix, their inputs, and what a model says to them.

A base is known by name and dtype alone, so that a fresh process builds the same one.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import tiny
import torch
import transformers as tf
from peft.tuners.tuners_utils import replicate_layers
from torch import Tensor, nn

from matrix.cells import QUANTISED

_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BERT = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": tiny.LABELS,
}


def _qwen3() -> tuple[Any, Any]:
    return tf.Qwen3ForCausalLM, tf.Qwen3Config(**_TEXT, head_dim=8, tie_word_embeddings=False)


def _mistral() -> tuple[Any, Any]:
    return tf.MistralForCausalLM, tf.MistralConfig(**_TEXT, sliding_window=4)


def _opt() -> tuple[Any, Any]:
    config = tf.OPTConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=24,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=24,
        max_position_embeddings=32,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tf.OPTForCausalLM, config


def _bart() -> tuple[Any, Any]:
    config = tf.BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=0.0,
    )
    return tf.BartForConditionalGeneration, config


def _roberta() -> tuple[Any, Any]:
    return tf.RobertaForSequenceClassification, tf.RobertaConfig(**_BERT)


def _vit() -> tuple[Any, Any]:
    config = tf.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=8,
        patch_size=4,
        num_labels=tiny.LABELS,
    )
    return tf.ViTForImageClassification, config


def _whisper() -> tuple[Any, Any]:
    config = tf.WhisperConfig(
        vocab_size=tiny.VOCAB,
        num_mel_bins=8,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return tf.WhisperForConditionalGeneration, config


def _mamba() -> tuple[Any, Any]:
    config = tf.MambaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        expand=2,
        time_step_rank=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tf.MambaForCausalLM, config


def _mixtral() -> tuple[Any, Any]:
    config = tf.MixtralConfig(
        **_TEXT, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
    )
    config._experts_implementation = "eager"  # the fused kernel knows no float64
    return tf.MixtralForCausalLM, config


def _wide_llama() -> tuple[Any, Any]:
    """As wide as the 4-bit kernels on the CPU ask for."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "tie_word_embeddings": False}
    return tf.LlamaForCausalLM, tf.LlamaConfig(**_TEXT | wide)


_MORE: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3": _qwen3,
    "mistral": _mistral,
    "opt": _opt,
    "bart": _bart,
    "roberta": _roberta,
    "vit": _vit,
    "whisper": _whisper,
    "mamba": _mamba,
    "mixtral": _mixtral,
    "wide llama": _wide_llama,
}


# ------------------------------------------------------------------------- modules of other kinds


class PlainExperts(nn.Module):
    """Mixtral's experts as one Linear each, as before transformers 5 fused them."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        gates, downs = fused.gate_up_proj.detach(), fused.down_proj.detach()
        self.gate_up = nn.ModuleList(_linear(weight) for weight in gates)
        self.down = nn.ModuleList(_linear(weight) for weight in downs)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            gate, up = gate_up(hidden).chunk(2, dim=-1)
            total = total + share.to(hidden.dtype) * down(nn.functional.silu(gate) * up)
        return total


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    made.weight.data = weight.clone()
    return made


class Stages(nn.Module):
    """An embedding, a linear layer, convolutions of one to three dimensions, attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Embedding(tiny.VOCAB, 12),
                nn.Linear(12, 16),
                nn.Conv1d(16, 16, 3, padding=1),
                nn.Conv2d(4, 6, (2, 3), padding=1),
                nn.Conv3d(1, 3, 2, padding=1),
                nn.Conv1d(3, 6, 3, groups=3),
                nn.MultiheadAttention(6, 2, batch_first=True),
                nn.Linear(6, 5),
            ]
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        embed, line, one, two, three, grouped, mix, head = self.stages
        x = torch.tanh(line(embed(input_ids)))
        x = torch.tanh(one(x.transpose(1, 2)))
        x = torch.tanh(two(x.unflatten(1, (4, 4))))
        x = torch.tanh(three(x.unsqueeze(1)))
        x = torch.tanh(grouped(x.flatten(2)[..., :40])).transpose(1, 2)
        out: Tensor = head(x + mix(x, x, x, need_weights=False)[0])
        return out


# --------------------------------------------------------------------------------- quantised bases


def _quantised(name: str) -> nn.Module:
    """Quantise as users do, while loading a folder."""
    if name.endswith("torchao 8-bit"):
        from torchao.quantization import Int8WeightOnlyConfig

        config = tf.TorchAoConfig(Int8WeightOnlyConfig())
    elif name.endswith("QLoRA"):
        config = tf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        four = name.endswith("4-bit")
        config = tf.BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)
    with tempfile.TemporaryDirectory() as folder:
        build("wide llama").save_pretrained(folder)
        return tf.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        ).eval()


# --------------------------------------------------------------------------------------- by name


# A token that stands in every example, always and only at this place: it calls activated LoRA.
CALL, CALLED = 5, 2


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a base model in eval mode; its weights depend on its name and dtype alone.

    In float64 the quantised ones are plain.
    """
    if name in tiny.BUILDERS:
        return tiny.tiny_model(name, dtype=dtype)
    if name == "stages":
        return _stages(dtype)
    if name == "llama, replicated":
        model = tiny.tiny_llama(dtype=dtype)
        replicate_layers(model, [(0, 3), (1, 4)])
        return model
    if name in QUANTISED and dtype != torch.float64:
        return _quantised(name)
    plain = name == "mixtral, plain experts"
    cls, config = _MORE[name.partition(",")[0]]()
    model = tiny._build(cls, config, dtype, 0)
    if plain:
        for layer in model.model.layers:
            layer.mlp.experts = PlainExperts(layer.mlp.experts)
    return model


def _stages(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = Stages()
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=drawn("stages", name), dtype=torch.float64)
        p.data = noise / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1 * noise
    return model.to(dtype).eval()


def drawn(*key: object) -> torch.Generator:
    """Return a generator seeded by a stable hash of `key`."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def inputs(name: str, task: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return four examples of a task as the arguments of the base's forward."""
    draw = drawn("inputs", name, task)
    tokens = torch.randint(CALL + 1, tiny.VOCAB, (4, 7), generator=draw)
    tokens[:, CALLED] = CALL
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw).to(dtype)}
    if name == "whisper":
        heard = torch.randn(4, 8, 20, generator=draw).to(dtype)
        return {"input_features": heard, "decoder_input_ids": tokens[:, :5]}
    if name in ("t5", "bart"):
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)[:, :5]}
    return {"input_ids": tokens}


@torch.no_grad()
def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the model says to a batch: its logits, or its output if that is a tensor."""
    said = model(**batch)
    found: Tensor = said if isinstance(said, Tensor) else said.logits
    return found.detach().double().cpu()
