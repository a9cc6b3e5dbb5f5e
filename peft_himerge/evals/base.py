"""What all eval functions have in common: how they are called, told apart and checked up front."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError, HiMergeError

__all__ = [
    "EvalFunction",
    "EvalRowError",
    "at_least_one",
    "batches",
    "fingerprint",
    "first_rows",
    "pad_id",
    "vocabulary_digest",
]

# To be raised when an eval function of this room gives other scores for the same rows and model:
# scores in old journals are then not taken for new ones.
_REVISION = "2"

_Row = TypeVar("_Row")


class EvalRowError(HiMergeError, ValueError):
    """A row of an evaluation task is malformed."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EvalFunction:
    """An eval function of this room: called with a model, it returns scores.

    Attributes:
        name: the function that built it, for progress bars and reports.
        size: number of rows it scores.
        fingerprint: changes with everything that decides a score besides the model: rows as
            tokens, options, the room's revision. A journal of scores goes by it.
    """

    name: str
    size: int
    fingerprint: str
    run: Callable[[nn.Module], Any] = field(repr=False)

    def __call__(self, model: nn.Module) -> Any:
        """Score a model."""
        return self.run(model)

    @property
    def __name__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{self.name}({self.size} rows, {self.fingerprint[:8]})"


def fingerprint(name: str, **parts: Any) -> str:
    """Return a digest of plain values, sequences of them, and dataclasses of those."""
    told = json.dumps([name, _REVISION, parts], sort_keys=True, default=_plain)
    return hashlib.sha256(told.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"no fingerprint of a {type(value).__name__}")


def vocabulary_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer's tokens and their ids (0.3 s for 262 144 of them)."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def at_least_one(**numbers: int | None) -> None:
    """Check options that count something.

    Raises:
        ConfigError: one of them is given and is no whole number from 1 on.
    """
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")


def first_rows(name: str, rows: Sequence[_Row], kind: type, max_rows: int | None) -> list[_Row]:
    """Return the first `max_rows` rows, checked.

    Raises:
        EvalRowError: there is none, or one is of another kind.
        ConfigError: `max_rows` is below 1, or `rows` is one text.
    """
    at_least_one(max_rows=max_rows)
    if isinstance(rows, str):
        raise ConfigError(f"{name} needs a list of rows, got one text: put it in brackets")
    kept = list(rows)[:max_rows]
    if not kept:
        raise EvalRowError(f"{name} needs at least one row, got none")
    for number, row in enumerate(kept, 1):
        if not isinstance(row, kind):
            raise EvalRowError(
                f"{name} needs rows of type {kind.__name__}, but row {number} is a "
                f"{type(row).__name__}: {row!r:.80}. `load_rows(file, {name!r})` makes them."
            )
    return kept


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of sequences in batches of like length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_id(tokenizer: Any) -> int:
    """Return the id to pad with; padding is masked, so any id will do if there is none for it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def open_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text that goes on: without an end token.

    Raises:
        EvalRowError: the tokenizer gives none.
    """
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        ids.pop()
    if not ids:
        raise EvalRowError(f"the tokenizer gives no token for the prompt {text!r}")
    return ids


def continuation_ids(text: str, ids: Sequence[int], more: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids of `more` after a text; on its own if the two tokenise apart.

    Args:
        text: what comes before.
        ids: its token ids, from `open_ids`.
        more: what goes on.
        tokenizer: the tokenizer.
    """
    joined = open_ids(text + more, tokenizer)
    if len(joined) > len(ids) and joined[: len(ids)] == list(ids):
        return tuple(joined[len(ids) :])
    return tuple(tokenizer(more, add_special_tokens=False)["input_ids"])
