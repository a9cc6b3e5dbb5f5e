"""Generation: what a model writes, judged by BLEU and ROUGE against good answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .base import (
    EvalFunction,
    EvalRowError,
    at_least_one,
    batches,
    fingerprint,
    first_rows,
    pad_id,
    vocabulary_digest,
)
from .bootstrap import estimate
from .forward import (
    check_length,
    contiguous_head_input,
    eval_mode,
    inner_model,
    input_device,
    padded,
    preserved_settings,
)
from .rows import GenerationRow
from .text import ROUGES, bleu_of_counts, language, score_texts

__all__ = ["generate_texts", "generation"]


def generation(
    rows: Sequence[GenerationRow],
    tokenizer: Any,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    max_rows: int | None = None,
    lang: str = "",
    stemmer: bool = False,
) -> EvalFunction:
    """Build an eval function that lets a model write and scores what it wrote.

    Text is generated greedily: always the most likely token. Whatever the model's own
    generation_config says (sampling, beams, penalties) is left aside, but for its end tokens.
    Spaces around a text are dropped before it is judged.

    Args:
        rows: The prompts, each with one or more good answers.
        tokenizer: A Hugging Face tokenizer that fits the model.
        max_new_tokens: Most tokens to write per prompt.
        stop: Texts that end an answer; they are cut off, with all that follows.
        batch_size: Prompts per generate call.
        max_rows: Use only the first so many rows; None uses all.
        lang: Language code of all answers. Empty: each row's own; if no row has one, decided once
            by the script of all references (`text` has the rule).
        stemmer: ROUGE compares English word stems.

    Returns:
        `eval_fn(model) -> {"bleu", "rouge1", "rouge2", "rougeL", "corpus_bleu"}`. The first four
        are float64 vectors, one entry per row: sentence BLEU-4 and ROUGE F1 (the best of several
        references). "corpus_bleu" is one number with a bootstrap standard error. All lie in 0..1,
        BLEU too, so that no task outweighs another in a mean over tasks: sacrebleu's numbers
        divided by 100.

    Raises:
        EvalRowError: If there are no rows, or the tokenizer gives no token for a prompt.
        ConfigError: If an option has a value that is not allowed.
        MissingExtraError: If sacrebleu or rouge-score is not installed.
    """
    at_least_one(batch_size=batch_size, max_new_tokens=max_new_tokens)
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop must be a list of texts, none of them empty, got {stop!r}")
    kept = first_rows("generation", rows, GenerationRow, max_rows)
    prompts = [_prompt_ids(row.prompt, tokenizer) for row in kept]
    langs = _languages(kept, lang)
    references = [row.references for row in kept]
    score_texts([""] * len(kept), references, langs)  # says now what is not installed
    told = fingerprint(
        "generation",
        prompts=prompts,
        references=references,
        langs=langs,
        stemmer=stemmer,
        options=[max_new_tokens, list(stop), batch_size],
        vocabulary=vocabulary_digest(tokenizer),
    )

    def run(model: nn.Module) -> dict[str, Any]:
        texts = generate_texts(
            model, prompts, tokenizer, max_new_tokens, tuple(stop), batch_size=batch_size
        )
        found = score_texts(texts, references, langs, stemmer=stemmer)
        whole = estimate(found.counts, lambda counts: bleu_of_counts(counts) / 100)
        scores = {name: found.rouge[name] for name in ROUGES}
        return {"bleu": found.bleu / 100, **scores, "corpus_bleu": whole}

    return EvalFunction("generation", len(kept), told, run)


def _prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise EvalRowError(f"the tokenizer gives no token for the prompt {prompt!r}")
    return ids


def _languages(rows: Sequence[GenerationRow], lang: str) -> list[str]:
    """Return "zh", "ja" or "" per row."""
    if not lang and not any(row.lang for row in rows):
        whole = language(text for row in rows for text in row.references)
        return [whole] * len(rows)
    return [language(row.references, lang or row.lang) for row in rows]


def generate_texts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    *,
    batch_size: int = 16,
) -> list[str]:
    """Return what the model writes after each prompt, greedily; stripped, and cut at `stop`.

    The model's mode, config, generation_config and the random states are as before afterwards.

    Raises:
        EvalError: a prompt with `max_new_tokens` more is longer than the model's positions.
    """
    from transformers import GenerationConfig

    inner = inner_model(model)
    answers = 0 if inner.config.is_encoder_decoder else max_new_tokens
    if not inner.config.is_encoder_decoder:
        prompts = [_open_ended(ids, tokenizer.eos_token_id) for ids in prompts]
    longest = max(len(ids) for ids in prompts)
    check_length(
        model,
        longest + answers,
        f"the longest prompt with max_new_tokens={max_new_tokens}",
        "Lower max_new_tokens, or leave out that row.",
    )
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=_end_ids(inner, tokenizer),
        decoder_start_token_id=inner.generation_config.decoder_start_token_id,
        stop_strings=list(stop) or None,
    )
    texts = [""] * len(prompts)
    settings = preserved_settings(model, generation_config=options)
    with torch.no_grad(), eval_mode(model), settings, contiguous_head_input(inner):
        for batch in batches([len(ids) for ids in prompts], batch_size):
            written = _generate(inner, [prompts[i] for i in batch], tokenizer)
            for i, text in zip(batch, written, strict=True):
                texts[i] = _cut(text, stop)
    return texts


def _open_ended(ids: Sequence[int], end: int | None) -> Sequence[int]:
    """Drop an end token from a prompt that is to be continued; some tokenizers close every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


def _generate(inner: Any, prompts: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Return the decoded continuations of one batch; the prompts are on the left of them."""
    both = inner.config.is_encoder_decoder  # then only the answer comes back
    input_ids, mask = padded(prompts, pad_id(tokenizer), "right" if both else "left")
    device = input_device(inner)
    ids = inner.generate(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), tokenizer=tokenizer
    )
    answers = ids if both else ids[:, input_ids.shape[1] :]
    return [tokenizer.decode(line, skip_special_tokens=True) for line in answers.cpu()]


def _end_ids(inner: Any, tokenizer: Any) -> list[int] | None:
    """Return the ids that end a text, for the tokenizer or for the model (chat models differ)."""
    found = [tokenizer.eos_token_id]
    own = inner.generation_config.eos_token_id
    found += own if isinstance(own, (list, tuple)) else [own]
    ends = list(dict.fromkeys(int(token) for token in found if token is not None))
    return ends or None


def _cut(text: str, stop: tuple[str, ...]) -> str:
    ends = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(ends)].strip() if ends else text.strip()
