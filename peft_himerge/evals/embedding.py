"""Embeddings: do texts that people find alike lie close together?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import ConfigError, MissingExtraError, suggest
from ..scoring import Estimate
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
from .forward import check_length, eval_mode, inner_model, input_device, padded
from .rows import PairRow

__all__ = ["Pooling", "embedding_similarity"]

Pooling = Literal["mean", "cls", "last"]


def embedding_similarity(
    pairs: Sequence[PairRow],
    tokenizer: Any,
    *,
    pooling: Pooling = "mean",
    max_length: int | None = None,
    batch_size: int = 32,
    max_rows: int | None = None,
) -> EvalFunction:
    """Build an eval function that compares cosine similarities with people's judgement.

    The embedding of a text is made from the last hidden states of the model's body (of an
    encoder-decoder's encoder); a head, if there is one, is not run.

    Args:
        pairs: Pairs of texts with a score, as in STS benchmarks.
        tokenizer: A Hugging Face tokenizer that fits the model.
        pooling: "mean" over all tokens, "cls" the first token, "last" the last token.
        max_length: Cut texts to so many tokens; None does not cut.
        batch_size: Texts per forward pass.
        max_rows: Use only the first so many pairs; None uses all.

    Returns:
        `eval_fn(model) -> Estimate`: Spearman's rank correlation, -1..1, ties sharing the mean of
        their ranks. It is a property of all pairs together: there are no per-example scores, so a
        difference of two states has no paired standard error and tolerance="2se" cannot be
        used; the number itself has one by bootstrap. 0.0 if the model gives every pair the
        same similarity.

    Raises:
        EvalRowError: If there are fewer than two pairs, or all have the same score.
        ConfigError: If an option has a value that is not allowed.
        MissingExtraError: If SciPy is not installed.
    """
    at_least_one(batch_size=batch_size, max_length=max_length)
    if pooling not in get_args(Pooling):
        hint = suggest(str(pooling), get_args(Pooling))
        raise ConfigError(f"pooling is {pooling!r}, which is not known.{hint}")
    kept = first_rows("embedding_similarity", pairs, PairRow, max_rows)
    gold = np.asarray([row.score for row in kept], dtype=np.float64)
    if len(set(gold.tolist())) < 2:
        raise EvalRowError(
            f"a rank correlation needs pairs with different scores, got {len(kept)} pair(s), all "
            f"with the score {gold[0]}"
        )
    _spearman(np.stack([gold, gold], 1))  # says now what is not installed
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    texts = dict.fromkeys(text for row in kept for text in (row.first, row.second))
    tokens = {text: _text_ids(tokenizer(text, **cut)["input_ids"], text) for text in texts}
    place = {text: i for i, text in enumerate(texts)}
    ids = list(tokens.values())
    first = [place[row.first] for row in kept]
    second = [place[row.second] for row in kept]
    pad = pad_id(tokenizer)
    told = fingerprint(
        "embedding_similarity",
        tokens=ids,
        pairs=[first, second, gold.tolist()],
        options=[pooling, batch_size],
    )

    def run(model: nn.Module) -> Estimate:
        longest = max(map(len, ids))
        check_length(model, longest, "the longest text", "Give max_length= to cut texts.")
        with torch.no_grad(), eval_mode(model):
            vectors = _embed(model, ids, pooling, batch_size, pad)
        cosines = torch.cosine_similarity(vectors[first], vectors[second], dim=1)
        return estimate(np.stack([cosines.numpy(), gold], axis=1), _spearman)

    return EvalFunction("embedding_similarity", len(kept), told, run)


def _text_ids(ids: Sequence[int], text: str) -> list[int]:
    if not ids:
        raise EvalRowError(f"the tokenizer gives no token for the text {text!r}")
    return list(ids)


def _embed(
    model: Any, ids: Sequence[Sequence[int]], pooling: Pooling, batch_size: int, pad: int
) -> Tensor:
    """Return one vector per text, (texts, width), float64 on the CPU."""
    inner = inner_model(model)
    body = getattr(inner, "base_model", inner)  # transformers' name of a model without its head
    if inner.config.is_encoder_decoder:
        body = inner.get_encoder()
    device = input_device(model)
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for batch in batches([len(line) for line in ids], batch_size):
        input_ids, mask = padded([ids[i] for i in batch], pad, "right")
        output = body(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        states = output.last_hidden_state.double().cpu()
        for i, line, lit in zip(batch, states, mask.bool(), strict=True):
            words = line[lit]
            found[i] = {"mean": words.mean(0), "cls": words[0], "last": words[-1]}[pooling]
    return torch.stack(found)


def _spearman(pairs: npt.NDArray[np.float64]) -> float:
    """Return the rank correlation of two columns; 0.0 if one of them is constant."""
    try:
        from scipy.stats import rankdata
    except ImportError as exc:
        raise MissingExtraError(
            "rank correlation needs SciPy: pip install 'peft-himerge[evals]'."
        ) from exc
    ranks = rankdata(pairs, axis=0)
    ranks -= ranks.mean(axis=0)
    size = np.sqrt((ranks**2).sum(axis=0).prod())
    return float(ranks.prod(axis=1).sum() / size) if size > 0 else 0.0
