"""Eval functions: callables that take a model and return per-example scores.

`multiple_choice` asks a causal LM which of several continuations is the most likely one. It
returns, per row, whether the right one won ("accuracy") and how sure the model was of the right
one ("log_likelihood", smooth, hence the better guide for an analysis on few rows).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_himerge.errors import HiMergeError

__all__ = ["EvalRowError", "MultipleChoiceRow", "multiple_choice"]


class EvalRowError(HiMergeError, ValueError):
    """A row of an evaluation task is malformed."""


@dataclass(frozen=True, slots=True)
class MultipleChoiceRow:
    """One question: a prompt, the possible continuations, and which of them is right.

    Args:
        prompt: Text before the answer.
        choices: The continuations, spaces included, e.g. `(" A", " B")`.
        answer: Index of the right one in `choices`.
        options: What the choices stand for, for humans (may be empty).
        lang: Language code of the question, for humans (may be empty).

    Example:
        >>> row = MultipleChoiceRow("1 + 1 =", (" 2", " 3"), 0)
        >>> row.choices[row.answer]
        ' 2'
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    options: tuple[str, ...] = ()
    lang: str = ""

    def __post_init__(self) -> None:
        """Check the row; lists (from JSON) become tuples."""
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "options", tuple(self.options))
        if not self.prompt:
            raise EvalRowError("a row needs a prompt, got an empty text")
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise EvalRowError(
                f"a row needs two or more different choices, got {self.choices!r} "
                f"for the prompt {self.prompt!r}"
            )
        if not all(self.choices):
            raise EvalRowError(f"choices must not be empty, got {self.choices!r}")
        if not 0 <= self.answer < len(self.choices):
            raise EvalRowError(
                f"answer must be an index into the {len(self.choices)} choices, "
                f"got {self.answer!r} for the prompt {self.prompt!r}"
            )
        if self.options and len(self.options) != len(self.choices):
            raise EvalRowError(
                f"options must be as many as choices, got {len(self.options)} and "
                f"{len(self.choices)} for the prompt {self.prompt!r}"
            )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A row as token ids."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int


def multiple_choice(
    rows: Sequence[MultipleChoiceRow],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> Callable[[nn.Module], dict[str, Tensor]]:
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

    Returns:
        `eval_fn(model) -> {"accuracy": ..., "log_likelihood": ...}`: two float32 vectors on the
        CPU, one entry per row, in the order of `rows`. Accuracy is 0 or 1; log_likelihood is the
        natural log of the right choice's probability among the choices (0 is best).

    Raises:
        EvalRowError: If there are no rows, or two choices of a row have the same tokens.
        ValueError: If `batch_size` or `max_rows` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be None or at least 1, got {max_rows!r}")
    kept = list(rows)[:max_rows]
    if not kept:
        raise EvalRowError("multiple_choice needs at least one row, got none")
    tokens = [_tokenise(row, tokenizer) for row in kept]
    answers = torch.tensor([row.answer for row in tokens])
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    pad = 0 if pad is None else int(pad)
    single = all(len(choice) == 1 for row in tokens for choice in row.choices)
    score = _score_single if single else _score_several

    def eval_fn(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad(), _eval_mode(model):
            table = score(model, tokens, batch_size, pad)
        log_probs = table.log_softmax(dim=1)
        right = log_probs.gather(1, answers[:, None]).squeeze(1)
        hits = log_probs.argmax(dim=1) == answers
        return {"accuracy": hits.float(), "log_likelihood": right.float()}

    return eval_fn


def _tokenise(row: MultipleChoiceRow, tokenizer: Any) -> _Tokens:
    prompt = list(tokenizer(row.prompt)["input_ids"])
    eos = tokenizer.eos_token_id
    if len(prompt) > 1 and prompt[-1] == eos:  # some tokenizers close every text
        prompt.pop()
    if not prompt:
        raise EvalRowError(f"the tokenizer gives no token for the prompt {row.prompt!r}")
    choices = tuple(_choice_ids(row.prompt, prompt, choice, tokenizer) for choice in row.choices)
    if not all(choices) or len(set(choices)) < len(choices):
        raise EvalRowError(
            f"the choices {row.choices!r} of the prompt {row.prompt!r} must differ as tokens, "
            f"got {choices!r}; use other texts for the choices"
        )
    return _Tokens(tuple(prompt), choices, row.answer)


def _choice_ids(text: str, prompt: list[int], choice: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of `choice` after the prompt; on its own if the joined text tokenises apart."""
    joined = list(tokenizer(text + choice)["input_ids"])
    if len(joined) > 1 and joined[-1] == tokenizer.eos_token_id:
        joined.pop()
    if len(joined) > len(prompt) and joined[: len(prompt)] == prompt:
        return tuple(joined[len(prompt) :])
    return tuple(tokenizer(choice, add_special_tokens=False)["input_ids"])


def _score_single(model: nn.Module, rows: Sequence[_Tokens], batch_size: int, pad: int) -> Tensor:
    """Logits of the choices after each prompt, (rows, choices); missing choices are -inf."""
    table = _empty_table(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        last = _last_logits(model, [rows[i].prompt for i in batch], 1, pad)[:, -1]
        for logits, i in zip(last, batch, strict=True):
            ids = [choice[0] for choice in rows[i].choices]
            table[i, : len(ids)] = logits[ids].double().cpu()
    return table


def _score_several(model: nn.Module, rows: Sequence[_Tokens], batch_size: int, pad: int) -> Tensor:
    """Sum of token log-probabilities per choice, (rows, choices); missing choices are -inf."""
    table = _empty_table(rows)
    jobs = [(i, j) for i, row in enumerate(rows) for j in range(len(row.choices))]
    jobs.sort(key=lambda job: len(rows[job[0]].prompt) + len(rows[job[0]].choices[job[1]]))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        # The last token of a choice predicts nothing we ask for, so it is not put in.
        inputs = [rows[i].prompt + rows[i].choices[j][:-1] for i, j in batch]
        keep = max(len(rows[i].choices[j]) for i, j in batch)
        logits = _last_logits(model, inputs, keep, pad)
        for line, (i, j) in zip(logits, batch, strict=True):
            ids = torch.tensor(rows[i].choices[j], device=line.device)
            log_probs = line[-len(ids) :].double().log_softmax(dim=-1)
            table[i, j] = log_probs.gather(1, ids[:, None]).sum().cpu()
    return table


def _empty_table(rows: Sequence[_Tokens]) -> Tensor:
    width = max(len(row.choices) for row in rows)
    return torch.full((len(rows), width), -torch.inf, dtype=torch.float64)


def _last_logits(
    model: nn.Module, sequences: Sequence[Sequence[int]], keep: int, pad: int
) -> Tensor:
    """Logits at the last `keep` positions of left-padded sequences, (batch, keep, vocabulary)."""
    device = _input_device(model)
    width = max(keep, max(len(ids) for ids in sequences))
    input_ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(input_ids)
    for line, ids in enumerate(sequences):
        input_ids[line, width - len(ids) :] = torch.tensor(ids)
        mask[line, width - len(ids) :] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    accepted = _accepted_arguments(model)
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


def _input_device(model: Any) -> torch.device:
    """Where the token ids go; a sharded model's embedding may be away from its other parts."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _accepted_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments of the innermost model's forward (PEFT's wrapper hides them)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off inside the block; every module's flag is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
