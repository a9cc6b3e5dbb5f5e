"""Tiny seeded models with LoRA adapters and smooth eval functions, built in code in a moment.

Nothing here is downloaded and nothing draws from the global random state. All matrices are redrawn
with a spread of ``1/sqrt(fan_in)``, so that (unlike with the usual 0.02 initialisation) the outputs
depend visibly on every block and a relative weight change of 10-50 % moves the scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

KINDS = ("llama", "gpt2", "bert", "t5", "gemma3", "qwen2")
NAMES = ("zh", "en", "math", "code", "law")  # not in alphabetical order, on purpose
VOCAB = 64
LABELS = 4
LENGTH = 9

# Matrices this small gain nothing from a second thread, and where the cores are shared with other
# work the threads wait for each other: measured 1.3 s instead of 4 ms per forward.
torch.set_num_threads(1)

# Which modules the 1st, 2nd, ... adapter of a kind targets. They overlap but differ; "outside"
# layers (head, embedding, pooler) occur in llama, qwen2 and bert.
TARGETS: Mapping[str, tuple[list[str], ...]] = {
    "llama": (
        ["q_proj", "v_proj", "down_proj"],
        ["q_proj", "v_proj", "up_proj", "lm_head"],
        ["k_proj", "o_proj", "v_proj"],
    ),
    "gpt2": (["c_attn", "c_fc"], ["c_attn", "c_proj"], ["c_attn"]),
    "bert": (["query", "value"], ["query", "dense"], ["key", "value", "dense"]),
    "t5": (["q", "v"], ["q", "k", "wo"], ["q", "v", "o", "wi"]),
    "gemma3": (["q_proj", "v_proj"], ["q_proj", "v_proj", "up_proj"], ["o_proj", "gate_proj"]),
    "qwen2": (["q_proj", "v_proj"], ["v_proj", "embed_tokens"], ["k_proj", "v_proj", "down_proj"]),
}
# (r, alpha, rsLoRA) of the 1st, 2nd, ... adapter; alpha/r is never 1.
SHAPES = ((3, 4, False), (5, 3, False), (2, 5, True), (4, 9, False), (6, 2, False))
# The 2nd adapter also has a rank of its own on one module and an alpha of its own on another.
PATTERNS: Mapping[str, tuple[dict[str, int], dict[str, int]]] = {
    "llama": ({"v_proj": 2}, {"up_proj": 7}),
    "gpt2": ({"mlp.c_proj": 2}, {"c_attn": 7}),
    "bert": ({"query": 2}, {"pooler.dense": 7}),
    "t5": ({"k": 2}, {"wo": 7}),
    "gemma3": ({"v_proj": 2}, {"up_proj": 7}),
    "qwen2": ({"v_proj": 2}, {"embed_tokens": 7}),
}


# ------------------------------------------------------------------------------------------ bases


class Float64RMSNorm(nn.Module):
    """RMS norm in the precision of its input; transformers' own always computes in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        """Take over ``weight``; the gain is ``weight + offset`` (Gemma stores the gain minus 1)."""
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        gain = self.weight + self.offset
        return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _generator(*key: object) -> torch.Generator:
    """Return a generator seeded by a stable hash of ``key`` (no PYTHONHASHSEED, no call order)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def _build(
    cls: type[PreTrainedModel], config: Any, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Build, redraw every parameter from a seed of its own name, cast, and switch to eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some biases of Mamba are drawn
        model = cls(config)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=_generator(seed, name), dtype=torch.float64)
        if weight.ndim < 2:  # gains stay near what they were, biases near zero
            weight.data = weight.data + (0.1 * noise).to(weight.dtype)
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        fan_in = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        # T5 divides the output of its tied head by sqrt(width) itself.
        spread = (
            1.0 if cls is T5ForConditionalGeneration and name == "shared.weight" else fan_in**-0.5
        )
        weight.data = (spread * noise).to(weight.dtype)
    model = model.to(dtype)
    model.config.dtype = dtype
    if dtype == torch.float64:
        _replace_norms(model)
    return model.eval()


def _replace_norms(model: nn.Module) -> None:
    """Swap the float32 RMS norms, which would bury effects below 1e-7 of a float64 score."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind == "T5LayerNorm":
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            offset = 1.0 if kind.startswith("Gemma") else 0.0
            model.set_submodule(name, Float64RMSNorm(module.weight, float(eps), offset))


def tiny_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Llama: 4 blocks, grouped-query attention, untied head."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(LlamaForCausalLM, config, dtype, seed)


def tiny_gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """GPT-2: 4 blocks of Conv1D modules (weights stored (in, out)), tied head."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=24,
        n_layer=4,
        n_head=4,
        n_inner=40,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(GPT2LMHeadModel, config, dtype, seed)


def tiny_bert(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """BERT sequence classifier: 3 blocks, pooler and classifier outside them."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
        pad_token_id=0,
    )
    return _build(BertForSequenceClassification, config, dtype, seed)


def tiny_t5(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """T5: 2 encoder and 2 decoder blocks."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=24,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _build(T5ForConditionalGeneration, config, dtype, seed)


def tiny_gemma3(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Gemma 3 text model: 4 blocks, sliding-window (4 tokens) and full attention, tied head."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=32,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(Gemma3ForCausalLM, config, dtype, seed)


def tiny_qwen2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Qwen2: 3 blocks with biases on q, k, v; untied head."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _build(Qwen2ForCausalLM, config, dtype, seed)


BUILDERS: Mapping[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "gemma3": tiny_gemma3,
    "qwen2": tiny_qwen2,
}


def tiny_model(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return the plain base model of one kind (see ``KINDS``)."""
    return BUILDERS[kind](dtype=dtype, seed=seed)


# --------------------------------------------------------------------------------------- adapters


def add_adapters(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> PeftModel:
    """Return a PeftModel with one trained-looking LoRA adapter per entry of ``specs``.

    A and B are random and non-zero. Their values depend on the spec's seed and the module's name
    only, not on the order of the adapters or on which other modules are targeted.

    Args:
        model: A plain model; it is wrapped in place, as PEFT does.
        specs: Adapter name -> ``r``, ``alpha``, ``target_modules``, and optionally ``rslora``
            (False), ``seed`` (0), ``rank_pattern``, ``alpha_pattern``, ``init_scale`` (0.35; the
            Frobenius norm of each delta relative to its weight). Other keys go to ``LoraConfig``.
            ``r`` defaults to 3, ``alpha`` to 5.

    Returns:
        The PeftModel in eval mode; the first adapter is active.
    """
    peft_model: PeftModel | None = None
    for name, spec in specs.items():
        options = dict(spec)
        seed = options.pop("seed", 0)
        init_scale = options.pop("init_scale", 0.35)
        config = LoraConfig(
            r=options.pop("r", 3),
            lora_alpha=options.pop("alpha", 5),
            use_rslora=options.pop("rslora", False),
            target_modules=options.pop("target_modules"),
            rank_pattern=options.pop("rank_pattern", None) or {},
            alpha_pattern=options.pop("alpha_pattern", None) or {},
            fan_in_fan_out=options.pop("fan_in_fan_out", _is_conv1d_model(model)),
            **options,
        )
        if peft_model is None:
            with torch.random.fork_rng(devices=[]):
                peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            with torch.random.fork_rng(devices=[]):
                peft_model.add_adapter(name, config)
        _fill(peft_model, name, seed, init_scale)
    if peft_model is None:
        raise ValueError("specs names no adapter")
    return peft_model.eval()


def _is_conv1d_model(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


@torch.no_grad()
def _fill(model: PeftModel, name: str, seed: int, init_scale: float) -> None:
    """Draw A and B of one adapter; scale B so that each delta has the wanted relative size."""
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}):
            holders = (module.lora_A[name], module.lora_B[name])
            a, b = (holder.weight for holder in holders)
        elif name in getattr(module, "lora_embedding_A", {}):
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            continue
        base = module.get_base_layer().weight
        draw = _generator(seed, path)
        new_a = torch.randn(a.shape, generator=draw, dtype=torch.float64)
        new_b = torch.randn(b.shape, generator=draw, dtype=torch.float64)
        size = module.scaling[name] * torch.linalg.norm(new_b.flatten(1) @ new_a.flatten(1))
        new_b *= init_scale * torch.linalg.norm(base.double()) / size
        # PEFT may have cast the factors; give them the base's precision (half stays float32).
        dtype = torch.promote_types(base.dtype, torch.float32)
        a.data, b.data = new_a.to(dtype), new_b.to(dtype)


def default_specs(
    kind: str, n_adapters: int = 2, seed: int = 0, init_scale: float = 0.35
) -> dict[str, dict[str, Any]]:
    """Return specs of up to 5 adapters that differ in rank, alpha/r (never 1), targets and size.

    The 2nd has a rank pattern and an alpha pattern, the 3rd is an rsLoRA adapter.
    """
    specs: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(NAMES[:n_adapters]):
        r, alpha, rslora = SHAPES[index]
        rank_pattern, alpha_pattern = PATTERNS[kind] if index == 1 else ({}, {})
        specs[name] = {
            "r": r,
            "alpha": alpha,
            "rslora": rslora,
            "target_modules": TARGETS[kind][index % 3],
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "seed": 1000 * seed + index,
            "init_scale": init_scale * (1.0, 1.3, 0.7, 1.1, 0.9)[index],
        }
    return specs


def peft_model(
    kind: str, n_adapters: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PeftModel:
    """Return a tiny base of one kind with ``NAMES[:n_adapters]`` as adapters."""
    if not 1 <= n_adapters <= len(NAMES):
        raise ValueError(f"n_adapters must be 1..{len(NAMES)}, got {n_adapters}")
    base = tiny_model(kind, dtype=dtype, seed=seed)
    return add_adapters(base, default_specs(kind, n_adapters, seed))


# --------------------------------------------------------------------------------- eval functions


@dataclass(frozen=True)
class TargetTask:
    """A task: inputs, and the mean log-likelihood per example of random targets.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        targets: Token (n, length) or class (n,) that should come out.
        weights: Share of each position in its example's score, same shape as ``targets``.
    """

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    weights: torch.Tensor

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Return one float64 score per example; higher is better."""
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        logits = model(**inputs).logits.double().cpu()
        chosen = logits.log_softmax(-1).gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)
        scores = chosen * self.weights
        return scores.flatten(1).sum(1) if scores.ndim > 1 else scores


def eval_fns(
    kind: str, names: Sequence[str], n_examples: int = 12, seed: int = 0
) -> dict[str, TargetTask]:
    """Return one deterministic task per name; inputs and targets depend on the name and the seed.

    Inputs have different lengths, right-padded and masked. Call them with any model of that kind.
    """
    return {name: _task(kind, n_examples, _generator(seed, kind, name)) for name in names}


def _task(kind: str, n: int, draw: torch.Generator) -> TargetTask:
    tokens = torch.randint(3, VOCAB, (n, LENGTH), generator=draw)
    lengths = torch.randint(LENGTH - 3, LENGTH + 1, (n, 1), generator=draw)
    mask = (torch.arange(LENGTH) < lengths).long()
    inputs = {"input_ids": tokens * mask, "attention_mask": mask}
    if kind == "bert":
        targets = torch.randint(0, LABELS, (n,), generator=draw)
        return TargetTask(inputs, targets, torch.ones(n, dtype=torch.float64))
    if kind == "t5":
        decoder = torch.randint(3, VOCAB, (n, LENGTH - 4), generator=draw)
        decoder[:, 0] = 0  # the start token
        inputs["decoder_input_ids"] = decoder
        mask = torch.ones_like(decoder)
    targets = torch.randint(3, VOCAB, tuple(mask.shape), generator=draw)
    return TargetTask(inputs, targets, mask.double() / mask.sum(1, keepdim=True))
