"""What an eval function shows the model, as batches: the examples that it looks at.

A method that learns from inputs wants batches, and who merges has eval functions. Those know their
examples; so one is run once, and the calls of the model are kept instead of its score. Where the
model is given an answer (the likelihood of a text, say), that is part of what is kept.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .errors import ConfigError
from .interrupts import heard
from .probe import preserved

__all__ = ["record"]

_MOST = 32  # examples of a batch: an eval function may ask for few logits, a method for all


def record(model: PeftModel, name: str, eval_fn: Callable[[Any], Any]) -> list[dict[str, Tensor]]:
    """Run an eval function once and return what it gave the model.

    Args:
        model: the user's model; comes back as it was.
        name: the task, for errors.
        eval_fn: function of the model; its score is thrown away.

    Returns:
        Batches of at most 32 examples: the tensors of each call that have one row per example.
        Steps of a generation after its prompt are left out, for they continue what was seen.

    Raises:
        ConfigError: it never called the model.
    """
    calls: list[dict[str, Tensor]] = []
    with preserved(model), torch.no_grad(), _overheard(model.base_model.model, calls), heard():
        eval_fn(model)
    if not calls:
        raise ConfigError(
            f"the eval function of {name!r} never called the model with tensors that have a row "
            f"per example, so that none of its task was seen. Give batches (dicts of tensors) as "
            f"inputs, or look at scores alone: HiMergeConfig(variant='joint'), another method."
        )
    return [
        {key: value[at : at + _MOST] for key, value in call.items()}
        for call in calls
        for at in range(0, len(next(iter(call.values()))), _MOST)
    ]


@contextmanager
def _overheard(inner: nn.Module, calls: list[dict[str, Tensor]]) -> Iterator[None]:
    """Add the inputs of every call of `inner` to `calls`.

    Its forward is replaced for the while: PEFT calls that directly, past any hook.
    """
    forward, own = inner.forward, vars(inner).get("forward")
    signature = inspect.signature(forward)
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        for name in rest:
            given |= given.pop(name, {})
        if not _continues(given):
            batch = _examples(given)
            if batch:
                calls.append(batch)
        return forward(*args, **kwargs)

    inner.forward = noting
    try:
        yield
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def _continues(given: Mapping[str, Any]) -> bool:
    cache = given.get("past_key_values")
    return cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length())


def _examples(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that have a row per example, and labels."""
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    wide = {k: v for k, v in tensors.items() if v.dim() > 1 or k == "labels"}
    main = next((wide[k] for k in ("input_ids", "inputs_embeds") if k in wide), None)
    if main is None:
        main = next(iter(wide.values()), None)
    return {
        k: v.detach().clone() for k, v in wide.items() if main is not None and len(v) == len(main)
    }
