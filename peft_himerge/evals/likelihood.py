"""How likely a causal LM finds the good answers: a smooth, cheap guide where text is generated.

One forward pass per answer in place of one per generated token, and a score that moves with every
edit of a layer, while BLEU and ROUGE move only when a token tips over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import (
    EvalFunction,
    EvalRowError,
    at_least_one,
    batches,
    continuation_ids,
    fingerprint,
    first_rows,
    open_ids,
    pad_id,
)
from .forward import check_length, eval_mode, last_logits
from .rows import GenerationRow

__all__ = ["likelihood"]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One good answer to the prompt of a row, as token ids."""

    row: int
    prompt: tuple[int, ...]
    ids: tuple[int, ...]


def likelihood(
    rows: Sequence[GenerationRow],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_rows: int | None = None,
    max_references: int | None = None,
    separator: str = " ",
    with_end: bool = False,
) -> EvalFunction:
    """Build an eval function that scores a causal LM by the likelihood of good answers.

    Choose and analyse a merge of adapters that generate by it, and put `generation` on the test
    rows. The model's mode, config and the random states are as before after a call.

    Args:
        rows: The prompts, each with one or more good answers.
        tokenizer: A Hugging Face tokenizer that fits the model.
        batch_size: Sequences (a prompt with one of its answers) per forward pass; the logits of
            all answer tokens of a batch are held at once.
        max_rows: Use only the first so many rows; None uses all.
        max_references: Use only the first so many answers per row; None uses all.
        separator: What stands between a prompt and its answer, as in training: references hold
            the bare text.
        with_end: The end token after an answer counts too, for adapters that learnt to stop.

    Returns:
        `eval_fn(model) -> {"probability": ..., "log_likelihood": ...}`: float64 vectors on the
        CPU, one entry per row. log_likelihood is the mean natural log of the probabilities of an
        answer's tokens given the prompt, for the likeliest answer of the row (0 is best);
        probability is its exp, in 0..1: as smooth, but a row that is badly wrong cannot outweigh
        all others.

    Raises:
        EvalRowError: If there are no rows, the tokenizer gives no token for a prompt or an answer,
            or it knows no end token and `with_end` asks for it.
        ConfigError: If an option has a value that is not allowed.
    """
    at_least_one(batch_size=batch_size, max_references=max_references)
    kept = first_rows("likelihood", rows, GenerationRow, max_rows)
    end = _end(tokenizer) if with_end else ()
    answers = [
        _answer(number, row.prompt, separator + text, tokenizer, end)
        for number, row in enumerate(kept)
        for text in row.references[:max_references]
    ]
    longest = max(len(answer.prompt) + len(answer.ids) - 1 for answer in answers)
    pad = pad_id(tokenizer)
    told = fingerprint("likelihood", answers=answers, batch=batch_size)

    def run(model: nn.Module) -> dict[str, Tensor]:
        check_length(model, longest, "the longest prompt with its answer", "Leave out that row.")
        best = torch.full((len(kept),), -torch.inf, dtype=torch.float64)
        # By answer, not by sequence: every answer's logits are kept at the longest one's length.
        lengths = [len(answer.ids) for answer in answers]
        with torch.no_grad(), eval_mode(model):
            for indices in batches(lengths, batch_size):
                _add(best, model, [answers[i] for i in indices], pad)
        return {"probability": best.exp(), "log_likelihood": best}

    return EvalFunction("likelihood", len(kept), told, run)


def _end(tokenizer: Any) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise EvalRowError("with_end=True needs a tokenizer with an end token, and it has none.")
    return (int(tokenizer.eos_token_id),)


def _answer(number: int, prompt: str, text: str, tokenizer: Any, end: tuple[int, ...]) -> _Answer:
    before = open_ids(prompt, tokenizer)
    ids = continuation_ids(prompt, before, text, tokenizer)
    if not ids:
        raise EvalRowError(f"the tokenizer gives no token for the answer {text!r} to {prompt!r}")
    return _Answer(number, tuple(before), ids + end)


def _add(best: Tensor, model: nn.Module, batch: list[_Answer], pad: int) -> None:
    """Raise each row's entry to the mean log-probability of its answers in a batch."""
    keep = max(len(answer.ids) for answer in batch)
    # The last token of an answer predicts nothing we ask for, so it is not put in.
    logits = last_logits(model, [a.prompt + a.ids[:-1] for a in batch], keep, pad)
    means = []
    for line, answer in zip(logits, batch, strict=True):
        own = line[-len(answer.ids) :]
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        ids = torch.tensor(answer.ids, device=own.device)
        log_probs = own.gather(1, ids[:, None]).squeeze(1) - own.logsumexp(dim=-1)
        means.append(log_probs.double().mean())
    # Once per batch: the host waits for the device every time it fetches.
    for mean, answer in zip(torch.stack(means).cpu(), batch, strict=True):
        best[answer.row] = max(best[answer.row], mean)
