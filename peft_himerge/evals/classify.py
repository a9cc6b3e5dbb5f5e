"""Classification of texts and of words: accuracy, F1, and how sure the model was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import ConfigError, EvalError
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
from .forward import accepted_arguments, check_length, eval_mode, inner_model, input_device, padded
from .heads import Head, head_digest, read_head, wearing
from .rows import IGNORED, ClassificationRow, TokenRow, label_indices

__all__ = ["macro_f1", "sequence_classification", "token_classification"]

_Counts = npt.NDArray[np.float64]
_LONGER = "Give max_length= to cut texts, or leave out that row."


def sequence_classification(
    rows: Sequence[ClassificationRow],
    tokenizer: Any,
    labels: Sequence[str] | None = None,
    *,
    head: Head | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> EvalFunction:
    """Build an eval function that scores a sequence classifier.

    Works with encoders and with causal LMs (`AutoModelForSequenceClassification`), padded on the
    right.

    Args:
        rows: Texts, or pairs of texts, with their classes.
        tokenizer: A Hugging Face tokenizer that fits the model.
        labels: Names of the classes, in the order of the model's outputs; needed if rows hold
            names. Given, the model must have just as many outputs.
        head: The task's own head: an adapter's folder or a state dict (`heads`). None scores
            with the head the model has.
        max_length: Cut texts to so many tokens; None does not cut.
        batch_size: Rows per forward pass.
        max_rows: Use only the first so many rows; None uses all.

    Returns:
        `eval_fn(model) -> {"accuracy", "log_likelihood", "macro_f1"}`: two float64 vectors, one
        entry per row (0 or 1; natural log of the right class' probability), and the mean F1 over
        the classes that occur, one number with a bootstrap standard error.

    Raises:
        EvalRowError: If there are no rows, or a label is not known.
        ConfigError: If an option has a value that is not allowed, or `head` holds no head.
    """
    at_least_one(batch_size=batch_size, max_length=max_length)
    kept = first_rows("sequence_classification", rows, ClassificationRow, max_rows)
    names = _names(labels)
    gold = [
        label_indices([row.label], names, f"row {number}")[0] for number, row in enumerate(kept, 1)
    ]
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    inputs = [_encoded(tokenizer(row.text, row.second or None, **cut)) for row in kept]
    worn, pad = read_head(head), pad_id(tokenizer)
    told = fingerprint(
        "sequence_classification", inputs=inputs, gold=gold, names=names, head=head_digest(worn)
    )

    def run(model: nn.Module) -> dict[str, Any]:
        likely = np.zeros(len(kept))
        chosen = np.zeros(len(kept), dtype=np.int64)
        classes = 0
        with torch.no_grad(), eval_mode(model), wearing(model, worn), _pads(model, pad):
            for batch, logits in _logits(model, inputs, batch_size, pad):
                classes = _check_classes(logits, names, max(gold))
                right = torch.tensor([gold[i] for i in batch])
                likely[batch] = logits.log_softmax(-1).gather(1, right[:, None])[:, 0].numpy()
                chosen[batch] = logits.argmax(-1).numpy()
        counts = _count([[g] for g in gold], [[int(c)] for c in chosen], classes)
        return {
            "accuracy": (chosen == np.asarray(gold)).astype(np.float64),
            "log_likelihood": likely,
            "macro_f1": estimate(counts, macro_f1),
        }

    return EvalFunction("sequence_classification", len(kept), told, run)


def token_classification(
    rows: Sequence[TokenRow],
    tokenizer: Any,
    labels: Sequence[str] | None = None,
    *,
    head: Head | None = None,
    outside: str | int | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> EvalFunction:
    """Build an eval function that scores a token classifier word by word.

    A word is judged at its first token, as models are trained to (Hugging Face's rule).

    Args:
        rows: Sentences as words, with a class per word; -100 leaves a word out.
        tokenizer: A fast Hugging Face tokenizer that fits the model.
        labels: Names of the classes, in the order of the model's outputs; needed if rows hold
            names. Given, the model must have just as many outputs.
        head: The task's own head, as for `sequence_classification`.
        outside: The class of words that are nothing special, e.g. "O"; left out of the mean F1.
        max_length: Refuse sentences of more tokens; None takes what the model has positions for.
        batch_size: Rows per forward pass.
        max_rows: Use only the first so many rows; None uses all.

    Returns:
        `eval_fn(model) -> {"accuracy", "log_likelihood", "macro_f1"}`: two float64 vectors, one
        entry per row (share of its words that are right; mean natural log of the right class'
        probability), and the mean F1 over the classes that occur, counted over all words, one
        number with a bootstrap standard error over rows.

    Raises:
        EvalRowError: If there are no rows, a label is not known, a word has no token, or a
            sentence is longer than `max_length`.
        ConfigError: If an option has a value that is not allowed, or `head` holds no head.
    """
    at_least_one(batch_size=batch_size, max_length=max_length)
    kept = first_rows("token_classification", rows, TokenRow, max_rows)
    names = _names(labels)
    left_out = None if outside is None else label_indices([outside], names, "outside")[0]
    inputs, places, gold = [], [], []
    for number, row in enumerate(kept, 1):
        known = label_indices(row.labels, names, f"row {number}")
        encoded, first = _words(row, number, tokenizer, max_length)
        inputs.append(encoded)
        places.append([place for place, g in zip(first, known, strict=True) if g != IGNORED])
        gold.append([g for g in known if g != IGNORED])
    worn, pad = read_head(head), pad_id(tokenizer)
    told = fingerprint(
        "token_classification",
        inputs=inputs,
        gold=[gold, places, names, left_out],
        head=head_digest(worn),
    )
    most = max(label for line in gold for label in line)

    def run(model: nn.Module) -> dict[str, Any]:
        likely, right = np.zeros(len(kept)), np.zeros(len(kept))
        chosen: list[list[int]] = [[] for _ in kept]
        classes = 0
        with torch.no_grad(), eval_mode(model), wearing(model, worn), _pads(model, pad):
            for batch, logits in _logits(model, inputs, batch_size, pad):
                classes = _check_classes(logits, names, most)
                for line, i in zip(logits, batch, strict=True):
                    words = line[places[i]].log_softmax(-1)
                    wanted = torch.tensor(gold[i])
                    likely[i] = float(words.gather(1, wanted[:, None]).mean())
                    found = words.argmax(-1)
                    right[i] = float((found == wanted).double().mean())
                    chosen[i] = found.tolist()
        whole = estimate(_count(gold, chosen, classes, left_out), macro_f1)
        return {"accuracy": right, "log_likelihood": likely, "macro_f1": whole}

    return EvalFunction("token_classification", len(kept), told, run)


def _names(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    names = tuple(labels)
    good = all(isinstance(name, str) and name for name in names)
    if isinstance(labels, str) or not good or len(set(names)) < max(2, len(names)):
        raise ConfigError(f"labels must be two or more different names, got {labels!r}")
    return names


def _encoded(found: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return token ids, and which of two texts each belongs to if the tokenizer says so."""
    if not found["input_ids"]:
        raise EvalRowError("the tokenizer gives no token for a row")
    return {key: list(found[key]) for key in ("input_ids", "token_type_ids") if key in found}


def _words(
    row: TokenRow, number: int, tokenizer: Any, max_length: int | None
) -> tuple[dict[str, list[int]], list[int]]:
    """Return (inputs, place of each word's first token)."""
    found = tokenizer(list(row.words), is_split_into_words=True)
    first: dict[int, int] = {}
    for place, word in enumerate(found.word_ids()):
        if word is not None:
            first.setdefault(word, place)
    missing = [word for word in range(len(row.words)) if word not in first]
    if missing:
        raise EvalRowError(
            f"row {number}: the tokenizer gives no token for the word {row.words[missing[0]]!r}"
        )
    tokens = len(found["input_ids"])
    if max_length is not None and tokens > max_length:
        raise EvalRowError(f"row {number} has {tokens} tokens, more than {max_length=}; split it")
    return _encoded(found), [first[word] for word in range(len(row.words))]


@contextmanager
def _pads(model: Any, pad: int) -> Iterator[None]:
    """Tell the model the padding token: a causal LM looks for the last token that is none."""
    config = inner_model(model).config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = pad
    try:
        yield
    finally:
        config.pad_token_id = before


def _logits(
    model: Any, inputs: Sequence[Mapping[str, list[int]]], batch_size: int, pad: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (rows, their logits in float64 on the CPU), right-padded batch by batch."""
    lengths = [len(row["input_ids"]) for row in inputs]
    check_length(model, max(lengths), "the longest row", _LONGER)
    typed = "token_type_ids" in accepted_arguments(model) and "token_type_ids" in inputs[0]
    device = input_device(model)
    for batch in batches(lengths, batch_size):
        input_ids, mask = padded([inputs[i]["input_ids"] for i in batch], pad, "right")
        tensors = {"input_ids": input_ids, "attention_mask": mask}
        if typed:
            tensors["token_type_ids"], _ = padded(
                [inputs[i]["token_type_ids"] for i in batch], 0, "right"
            )
        output = model(**{name: value.to(device) for name, value in tensors.items()})
        yield batch, output.logits.double().cpu()


def _check_classes(logits: Tensor, names: tuple[str, ...] | None, most: int) -> int:
    classes = int(logits.shape[-1])
    if (names is not None and classes != len(names)) or classes <= most:
        wanted = f"{most + 1} or more" if names is None else f"{len(names)} {names!r}"
        raise EvalError(
            f"the model tells {classes} classes apart, the rows have {wanted}. Give the task's own "
            f"head with head=, the folder of the adapter that was trained on it."
        )
    return classes


def _count(
    gold: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    classes: int,
    outside: int | None = None,
) -> _Counts:
    """Return (rows, 3, classes): per row and class, how often right, chosen and wanted."""
    counts = np.zeros((len(gold), 3, classes))
    for row, wanted, found in zip(counts, gold, chosen, strict=True):
        for g, c in zip(wanted, found, strict=True):
            row[0, g] += g == c
            row[1, c] += 1
            row[2, g] += 1
    return counts if outside is None else np.delete(counts, outside, axis=2)


def macro_f1(counts: _Counts) -> float:
    """Return the mean F1 over the classes that are chosen or wanted at least once; 0 for none.

    Args:
        counts: (rows, 3, classes): how often a class was right, chosen and wanted.
    """
    right, chosen, wanted = counts.sum(axis=0)
    occurs = chosen + wanted > 0
    if not occurs.any():
        return 0.0
    return float((2 * right[occurs] / (chosen + wanted)[occurs]).mean())
