"""Language modelling: how likely a causal LM finds whole texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .base import (
    EvalFunction,
    EvalRowError,
    at_least_one,
    batches,
    fingerprint,
    first_rows,
    pad_id,
)
from .bootstrap import estimate
from .forward import check_length, eval_mode, last_logits

__all__ = ["perplexity"]


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of one text: what the model reads, and how many tokens at its end it predicts."""

    text: int
    tokens: tuple[int, ...]
    targets: int


def perplexity(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int = 512,
    batch_size: int = 8,
    max_rows: int | None = None,
) -> EvalFunction:
    """Build an eval function that scores a causal LM by the likelihood of texts.

    The first token of a text has nothing before it and is not predicted, so it counts only if the
    tokenizer puts a start token there. A text longer than `max_length` tokens is read in windows
    that overlap by half: each token is predicted once, from at least `max_length // 2` tokens
    before it, if there are so many.

    Args:
        texts: The texts.
        tokenizer: A Hugging Face tokenizer that fits the model.
        max_length: Most tokens the model reads at once, at least 2. Longer needs more memory:
            batch_size x max_length x vocabulary numbers.
        batch_size: Windows per forward pass.
        max_rows: Use only the first so many texts; None uses all.

    Returns:
        `eval_fn(model) -> {"log_likelihood": ..., "perplexity": ...}`. log_likelihood, the score to
        use: a float64 vector, per text the mean natural log of the probability of its tokens
        (higher is better, 0 is best). perplexity: exp(-mean over all tokens of all texts), one
        number with a bootstrap standard error, for reading only: lower is better, while a
        score must be higher for better.

    Raises:
        EvalRowError: If there are no texts, or one has fewer than two tokens.
        ConfigError: If an option has a value that is not allowed.
    """
    at_least_one(batch_size=batch_size, max_length=max_length)
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2, got {max_length!r}")
    kept = first_rows("perplexity", texts, str, max_rows)
    tokens = [_text_ids(number, text, tokenizer) for number, text in enumerate(kept, 1)]
    windows = [w for text, ids in enumerate(tokens) for w in _windows(text, ids, max_length)]
    longest = max(len(window.tokens) for window in windows)
    pad = pad_id(tokenizer)
    told = fingerprint("perplexity", texts=tokens, options=[max_length, batch_size])

    def run(model: nn.Module) -> dict[str, Any]:
        check_length(model, longest, "the longest text", "Lower max_length.")
        sums = np.zeros((len(tokens), 2))  # of log-probabilities, of tokens
        with torch.no_grad(), eval_mode(model):
            for batch in batches([len(window.tokens) for window in windows], batch_size):
                _add(sums, model, [windows[i] for i in batch], pad)
        return {
            "log_likelihood": sums[:, 0] / sums[:, 1],
            "perplexity": estimate(sums, _perplexity),
        }

    return EvalFunction("perplexity", len(kept), told, run)


def _text_ids(number: int, text: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        ids.pop()
    if len(ids) < 2:
        raise EvalRowError(f"text {number} has fewer than two tokens: {text!r}")
    return ids


def _windows(text: int, ids: Sequence[int], most: int) -> list[_Window]:
    found, start, done = [], 0, 1
    while done < len(ids):
        end = min(start + most, len(ids))
        found.append(_Window(text, tuple(ids[start:end]), end - done))
        start, done = end - most // 2, end
    return found


def _add(sums: npt.NDArray[np.float64], model: nn.Module, batch: list[_Window], pad: int) -> None:
    """Add the log-probabilities of a batch's targets to the sums of their texts."""
    keep = max(window.targets for window in batch)
    # The last token predicts nothing we ask for, so it is not put in.
    logits = last_logits(model, [window.tokens[:-1] for window in batch], keep, pad)
    totals = []
    for line, window in zip(logits, batch, strict=True):
        targets = torch.tensor(window.tokens[-window.targets :], device=line.device)
        wide = torch.promote_types(line.dtype, torch.float32)
        losses: Tensor = F.cross_entropy(
            line[-window.targets :].to(wide), targets, reduction="none"
        )
        totals.append(-losses.double().sum())
    # Once per batch: the host waits for the device every time it fetches.
    for total, window in zip(torch.stack(totals).tolist(), batch, strict=True):
        sums[window.text] += (total, window.targets)


def _perplexity(sums: npt.NDArray[np.float64]) -> float:
    total, tokens = sums.sum(axis=0)
    return math.exp(min(-total / tokens, 700.0))  # a finite number even for a broken model
