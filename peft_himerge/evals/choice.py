"""Multiple choice: which of several continuations does a causal LM find most likely?

Per row: whether the right one won ("accuracy") and how sure the model was of the right one
("probability" and its log, "log_likelihood"; "calibrated_probability" at the temperature that fits
best: smooth, hence better guides for an analysis on few rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, suggest
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
from .calibration import calibrated
from .forward import eval_mode, last_logits
from .rows import MultipleChoiceRow

__all__ = ["Normalize", "multiple_choice"]

Normalize = Literal["none", "tokens", "bytes"]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A row as token ids, and what each choice's log-probability is divided by."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    lengths: tuple[int, ...]


def multiple_choice(
    rows: Sequence[MultipleChoiceRow],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_rows: int | None = None,
    normalize: Normalize = "none",
) -> EvalFunction:
    """Build an eval function that scores a causal LM on multiple-choice rows.

    A choice's log-probability is the sum over its tokens, given the prompt. Rows are tokenised
    here, once. If every choice is one token, one forward pass per batch answers all choices.
    The model's mode, config and the random states are as before after a call.

    Args:
        rows: The questions.
        tokenizer: A Hugging Face tokenizer that fits the model.
        batch_size: Sequences per forward pass (a sequence is a prompt, or a prompt with one
            of its choices if choices have several tokens).
        max_rows: Use only the first so many rows; None uses all.
        normalize: What choices are compared by: "none", their log-probability; "tokens", that
            per token; "bytes", that per UTF-8 byte of the choice's text, so that long answers
            are not at a disadvantage and tokenizers compare (lm-evaluation-harness' acc_norm).

    Returns:
        `eval_fn(model) -> {"accuracy": ..., "calibrated_probability": ..., "probability": ...,
        "log_likelihood": ...}`: float32 vectors on the CPU, one entry per row, in the order of
        `rows`. Accuracy is 0 or 1; probability is the right choice's share among the choices, which
        are weighted by exp(what they are compared by): as smooth as its natural log, log_likelihood
        (0 is best), but a row that is badly wrong cannot outweigh all others.
        calibrated_probability is the same after a temperature that is fitted to the rows
        (`calibration.calibrated`): a model wins nothing by being surer of all its answers.

    Raises:
        EvalRowError: If there are no rows, or two choices of a row have the same tokens.
        ConfigError: If an option has a value that is not allowed.
    """
    at_least_one(batch_size=batch_size)
    if normalize not in get_args(Normalize):
        hint = suggest(str(normalize), get_args(Normalize))
        raise ConfigError(f"normalize is {normalize!r}, which is not known.{hint}")
    kept = first_rows("multiple_choice", rows, MultipleChoiceRow, max_rows)
    tokens = [_tokenise(row, tokenizer, normalize) for row in kept]
    answers = torch.tensor([row.answer for row in tokens])
    pad = pad_id(tokenizer)
    single = all(len(choice) == 1 for row in tokens for choice in row.choices)
    score = _score_single if single else _score_several

    def run(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad(), eval_mode(model):
            table = score(model, tokens, batch_size, pad)
        log_probs = table.log_softmax(dim=1)
        right = log_probs.gather(1, answers[:, None]).squeeze(1)
        hits = log_probs.argmax(dim=1) == answers
        likely, fitted = right.float(), calibrated(table, answers).float()
        return {
            "accuracy": hits.float(),
            "calibrated_probability": fitted.exp(),
            "probability": likely.exp(),
            "log_likelihood": likely,
        }

    name = "multiple_choice"
    return EvalFunction(name, len(kept), fingerprint(name, rows=tokens, batch=batch_size), run)


def _tokenise(row: MultipleChoiceRow, tokenizer: Any, normalize: Normalize) -> _Tokens:
    prompt = open_ids(row.prompt, tokenizer)
    choices = tuple(continuation_ids(row.prompt, prompt, c, tokenizer) for c in row.choices)
    if not all(choices) or len(set(choices)) < len(choices):
        raise EvalRowError(
            f"the choices {row.choices!r} of the prompt {row.prompt!r} must differ as tokens, "
            f"got {choices!r}; use other texts for the choices"
        )
    lengths = {
        "none": tuple(1 for _ in choices),
        "tokens": tuple(map(len, choices)),
        "bytes": tuple(len(text.encode()) for text in row.choices),
    }
    return _Tokens(tuple(prompt), choices, row.answer, lengths[normalize])


def _score_single(model: nn.Module, rows: Sequence[_Tokens], batch_size: int, pad: int) -> Tensor:
    """What choices of one token are compared by, (rows, choices); missing choices are -inf.

    Undivided, logits do as well as log-probabilities: they differ by one number per row.
    """
    table = _empty_table(rows)
    divided = any(length != 1 for row in rows for length in row.lengths)
    for batch in batches([len(row.prompt) for row in rows], batch_size):
        last = last_logits(model, [rows[i].prompt for i in batch], 1, pad)[:, -1]
        ids = torch.zeros(len(batch), table.shape[1], dtype=torch.long)
        for line, i in enumerate(batch):
            ids[line, : len(rows[i].choices)] = torch.tensor([c[0] for c in rows[i].choices])
        ids = ids.to(last.device)
        if divided:
            lines = [
                logits.double().log_softmax(dim=-1)[own]
                for logits, own in zip(last, ids, strict=True)
            ]
            found = torch.stack(lines)
        else:
            found = last.gather(1, ids)
        # Once per batch: the host waits for the device every time it fetches.
        for values, i in zip(found.double().cpu(), batch, strict=True):
            lengths = torch.tensor(rows[i].lengths, dtype=torch.float64)
            table[i, : len(lengths)] = values[: len(lengths)] / lengths
    return table


def _score_several(model: nn.Module, rows: Sequence[_Tokens], batch_size: int, pad: int) -> Tensor:
    """What choices are compared by, (rows, choices); missing choices are -inf."""
    table = _empty_table(rows)
    jobs = [(i, j) for i, row in enumerate(rows) for j in range(len(row.choices))]
    lengths = [len(rows[i].prompt) + len(rows[i].choices[j]) for i, j in jobs]
    for indices in batches(lengths, batch_size):
        batch = [jobs[index] for index in indices]
        # The last token of a choice predicts nothing we ask for, so it is not put in.
        inputs = [rows[i].prompt + rows[i].choices[j][:-1] for i, j in batch]
        keep = max(len(rows[i].choices[j]) for i, j in batch)
        logits = last_logits(model, inputs, keep, pad)
        totals = []
        for line, (i, j) in zip(logits, batch, strict=True):
            ids = torch.tensor(rows[i].choices[j], device=line.device)
            log_probs = line[-len(ids) :].double().log_softmax(dim=-1)
            totals.append(log_probs.gather(1, ids[:, None]).sum())
        for total, (i, j) in zip(torch.stack(totals).cpu(), batch, strict=True):
            table[i, j] = total / rows[i].lengths[j]
    return table


def _empty_table(rows: Sequence[_Tokens]) -> Tensor:
    width = max(len(row.choices) for row in rows)
    return torch.full((len(rows), width), -torch.inf, dtype=torch.float64)
