"""Examples of each adapter's task, as the batches that the model takes: checked, read once, kept.

A batch is a dict of tensors whose first axis counts examples, as a tokenizer or a collator gives
it; ``labels`` are optional. Batches are token ids most of the time, so that keeping them costs
nothing, and every pass over them sees the same ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import randomness
from .errors import ConfigError, suggest

__all__ = ["Batch", "Batches", "Positions", "counted_tokens", "predictions", "read_batches"]

Batch = Mapping[str, Tensor]
Positions = Literal["all", "last"]


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The examples of every adapter's task.

    Attributes:
        of: adapter -> its batches; at least one, in the order they were given.
    """

    of: Mapping[str, tuple[Batch, ...]]

    def count(self, name: str) -> int:
        """Return the number of examples of one adapter's task."""
        return sum(_size(batch) for batch in self.of[name])

    def singles(self, name: str) -> Iterator[Batch]:
        """Yield the examples of one adapter's task one at a time, as batches of one."""
        for batch in self.of[name]:
            for n in range(_size(batch)):
                yield {k: v[n : n + 1] if v.dim() else v for k, v in batch.items()}

    def turns(self, steps: int) -> Iterator[list[tuple[str, Batch]]]:
        """Yield `steps` times one batch of every task, each task's own over and over again."""
        for step in range(steps):
            yield [(name, own[step % len(own)]) for name, own in self.of.items()]

    @property
    def longest(self) -> int:
        """The largest number of batches of any task: the turns that show all of them."""
        return max(len(own) for own in self.of.values())

    def need_labels(self, method: str) -> None:
        """Refuse batches without labels.

        Raises:
            ConfigError: a batch has none.
        """
        for name, own in self.of.items():
            for place, batch in enumerate(own):
                if "labels" not in batch:
                    raise ConfigError(
                        f"{method} needs labels, but batch {place} of inputs[{name!r}] has "
                        f"{', '.join(batch)}. Add 'labels', or choose a loss that needs none."
                    )


def _size(batch: Batch) -> int:
    return next(v.shape[0] for v in batch.values() if v.dim())


def read_batches(model: nn.Module, names: Sequence[str], inputs: Any) -> Batches:
    """Read and check the user's `inputs`; random states are as before.

    Args:
        model: the base model, inside PEFT's wrappers; only its signature is read.
        names: the adapters.
        inputs: adapter -> an iterable of batches (a list, a DataLoader). It is read once.

    Raises:
        ConfigError: not one entry per adapter, no batches, or a batch that the model cannot take.
    """
    if not isinstance(inputs, Mapping):
        raise ConfigError(
            f"inputs must be a dict, adapter -> batches, got {type(inputs).__name__}."
        )
    for name in inputs:
        if name not in names:
            raise ConfigError(f"inputs names {name!r}.{suggest(str(name), names)}")
    for name in names:
        if name not in inputs:
            raise ConfigError(f"inputs has no batches for adapter {name!r}.")
    state = randomness.capture()  # a DataLoader draws a seed even if it does not shuffle
    try:
        read = {name: _read(name, inputs[name]) for name in sorted(names)}
    finally:
        randomness.install(state)
    taken = _taken(model)
    main = getattr(model, "main_input_name", None)
    for name, own in read.items():
        for place, batch in enumerate(own):
            _check(f"batch {place} of inputs[{name!r}]", batch, taken, main)
    return Batches(MappingProxyType(read))


def _read(name: str, batches: Any) -> tuple[Batch, ...]:
    single = isinstance(batches, (Mapping, str, Tensor))
    if single or not isinstance(batches, Iterable):
        raise ConfigError(
            f"inputs[{name!r}] must be a list (or another iterable) of batches, got "
            f"{type(batches).__name__}. Put a single batch into a list."
        )
    own = tuple(batches)
    if not own:
        raise ConfigError(f"inputs[{name!r}] has no batches.")
    for place, batch in enumerate(own):
        if not isinstance(batch, Mapping) or not batch:
            raise ConfigError(
                f"batch {place} of inputs[{name!r}] must be a dict of tensors, got {batch!r:.80}."
            )
    return tuple(MappingProxyType(dict(batch)) for batch in own)


def _taken(model: nn.Module) -> Collection[str]:
    """Return the names that the model's forward takes; () if it does not say."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.kind in named)


def _check(where: str, batch: Batch, taken: Collection[str], main: str | None) -> None:
    for key, value in batch.items():
        if taken and key not in taken:
            raise ConfigError(f"{where} has {key!r}.{suggest(str(key), taken)}")
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{where}: {key!r} must be a tensor, got {type(value).__name__}. Tokenize with "
                f"return_tensors='pt'."
            )
    if main in taken and main not in batch and "inputs_embeds" not in batch:
        raise ConfigError(f"{where} has no {main!r}, only {', '.join(batch)}.")
    sizes = {key: v.shape[0] for key, v in batch.items() if v.dim()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ConfigError(
            f"{where}: the first axis of every tensor must count the same examples, at least one, "
            f"got {sizes}."
        )
    for key in ("attention_mask", "decoder_attention_mask"):
        if key in batch and batch[key].dim() != 2:
            raise ConfigError(
                f"{where}: {key} must be (examples, length), to tell tokens from padding, got "
                f"{tuple(batch[key].shape)}."
            )


def counted_tokens(batch: Batch, leading: Sequence[int], *, decoder: bool) -> Tensor | None:
    """Return which rows of a module's input are tokens and not padding.

    Args:
        batch: what the model was given.
        leading: shape of the module's input without its last axis.
        decoder: True in the decoder of an encoder-decoder model.

    Returns:
        A bool tensor of shape `leading`; None if all rows count, or if they are not tokens.
    """
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if mask is None:
        return None
    if tuple(mask.shape) == tuple(leading):
        return mask.bool()
    flat = tuple(leading) == (mask.numel(),) and mask.shape[1] > 1
    return mask.flatten().bool() if flat else None


def predictions(batch: Batch, logits: Tensor, where: Positions, *, decoder: bool) -> Tensor:
    """Return the rows of `logits` that count: those of tokens, or of each example's last token.

    Args:
        batch: what the model was given.
        logits: (examples, classes), or (examples, length, classes).
        where: "all" or "last".
        decoder: True if the logits are a decoder's, whose padding is told by
            ``decoder_attention_mask`` or by labels of -100.

    Returns:
        (rows, classes).
    """
    if logits.dim() != 3:
        return logits.flatten(0, -2)
    shape = tuple(logits.shape[:2])
    mask = counted_tokens(batch, shape, decoder=decoder)
    if mask is None and decoder and "labels" in batch and tuple(batch["labels"].shape) == shape:
        mask = batch["labels"] != -100
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool)
    mask = mask.to(logits.device)
    if where == "all":
        return logits[mask]
    order = torch.arange(1, shape[1] + 1, device=mask.device)
    last = (mask * order).argmax(dim=1)
    return logits[torch.arange(shape[0], device=mask.device), last][mask.any(dim=1)]
