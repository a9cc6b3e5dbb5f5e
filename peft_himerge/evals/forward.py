"""Running a model on padded batches, and leaving its mode and settings as they were."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import EvalError
from ..randomness import capture, install

__all__ = [
    "accepted_arguments",
    "check_length",
    "contiguous_head_input",
    "eval_mode",
    "inner_model",
    "input_device",
    "last_logits",
    "padded",
    "preserved_settings",
]


def inner_model(model: Any) -> Any:
    """Return the model inside PEFT's wrapper; its adapters act on it all the same."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: Any) -> torch.device:
    """Where the token ids go; a sharded model's embedding may be away from its other parts."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def accepted_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments of the innermost model's forward (PEFT's wrapper hides them)."""
    return frozenset(inspect.signature(inner_model(model).forward).parameters)


def check_length(model: Any, tokens: int, what: str, fix: str) -> None:
    """Refuse a sequence that the model has no positions for.

    Raises:
        EvalError: `tokens` is more than the model's config says it was made for.
    """
    config: Any = getattr(inner_model(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < tokens:
        raise EvalError(
            f"{what} has {tokens} tokens, but the model has {most} positions "
            f"(max_position_embeddings). {fix}"
        )


def padded(
    sequences: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"], width: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (token ids, mask), both (batch, longest) and int64; 0 in the mask is padding.

    Args:
        sequences: token ids, one list per line.
        pad: id to fill up with.
        side: where the padding goes.
        width: pad to at least so many tokens.
    """
    width = max(width, max(len(ids) for ids in sequences))
    input_ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(input_ids)
    for line, ids in enumerate(sequences):
        span = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[line, span] = torch.tensor(ids)
        mask[line, span] = 1
    return input_ids, mask


def last_logits(
    model: nn.Module, sequences: Sequence[Sequence[int]], keep: int, pad: int
) -> Tensor:
    """Logits at the last `keep` positions of left-padded sequences, (batch, keep, vocabulary).

    Raises:
        EvalError: the model is an encoder-decoder.
    """
    inner = inner_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise EvalError(
            f"the likelihood of a text is asked of a causal LM, but {type(inner).__name__} is an "
            f"encoder-decoder: use generation, or an eval function of your own."
        )
    device = input_device(model)
    input_ids, mask = padded(sequences, pad, "left", width=keep)
    width = input_ids.shape[1]
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    accepted = accepted_arguments(model)
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        # As positions, not as a number: then the head's input is contiguous, and PyTorch reads the
        # (vocabulary, width) head once per batch instead of once per row.
        options["logits_to_keep"] = torch.arange(width - keep, width, device=device)
    output = model(**{name: value.to(device) for name, value in inputs.items()}, **options)
    logits: Tensor = output.logits
    return logits[:, -keep:]


@contextmanager
def contiguous_head_input(inner: Any) -> Iterator[None]:
    """Let the output head read contiguous input inside the block.

    `generate` keeps the last position of a prompt as a slice, for which PyTorch copies the
    (vocabulary, width) head once per row: more than all the rest where the vocabulary is large.
    """
    head = inner.get_output_embeddings()
    if head is None:
        yield
        return

    def contiguous(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    handle = head.register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside the block; every module's flag is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def preserved_settings(model: nn.Module, **changed: Any) -> Iterator[None]:
    """Set some attributes of the innermost model inside the block, and put everything back.

    Put back are those attributes, the values in its config, and the random states. For blocks
    that hand the model to a library which may change any of them.

    Args:
        model: the model, wrapped by PEFT or not.
        changed: name -> value to set as an attribute of the innermost model's own.
    """
    inner = inner_model(model)
    own = vars(inner)
    before = {name: own[name] for name in changed if name in own}
    config = getattr(inner, "config", None)
    settings: Mapping[str, Any] = dict(vars(config)) if config is not None else {}
    state = capture()
    try:
        own.update(changed)
        yield
    finally:
        for name in changed:
            own.pop(name, None)
        own.update(before)
        if config is not None:
            vars(config).clear()
            vars(config).update(settings)
        install(state)
