"""The rows eval functions take: frozen records that check themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .base import EvalRowError

__all__ = [
    "IGNORED",
    "ClassificationRow",
    "GenerationRow",
    "MultipleChoiceRow",
    "PairRow",
    "TokenRow",
    "label_indices",
]

IGNORED = -100
"""Label of a word that is not scored; the number that PyTorch's losses leave out."""


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
class GenerationRow:
    """One prompt, and the texts that would be good answers.

    Args:
        prompt: Text before the answer.
        references: One or more good answers; a single text stands for one.
        lang: Language code of the answers, e.g. "zh"; it decides how BLEU and ROUGE split them
            into words. Empty: decided by their script (`text.language`).
    """

    prompt: str
    references: tuple[str, ...]
    lang: str = ""

    def __post_init__(self) -> None:
        """Check the row; a text or a list becomes a tuple."""
        given: Any = self.references
        references = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "references", references)
        if not self.prompt:
            raise EvalRowError("a row needs a prompt, got an empty text")
        if not references or not all(_is_text(text) for text in references):
            raise EvalRowError(
                f"references must be one or more texts with more than spaces in them, got "
                f"{references!r} for the prompt {self.prompt!r}"
            )


@dataclass(frozen=True, slots=True)
class ClassificationRow:
    """A text, or two, and its class.

    Args:
        text: The text.
        label: Its class: a number from 0 on, or a name of those given to the eval function.
        second: A second text, e.g. the hypothesis of an entailment pair (may be empty).
    """

    text: str
    label: int | str
    second: str = ""

    def __post_init__(self) -> None:
        """Check the row."""
        if not self.text:
            raise EvalRowError("a row needs a text, got an empty one")
        _check_label(self.label, self.text)
        if self.label == IGNORED:
            raise EvalRowError(f"the label {IGNORED} is for words only, not for {self.text!r}")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The words of a sentence, and a class for each.

    Args:
        words: The words.
        labels: A class per word: numbers, or names of those given to the eval function; -100 for
            a word that is not scored.
    """

    words: tuple[str, ...]
    labels: tuple[int | str, ...]

    def __post_init__(self) -> None:
        """Check the row; lists (from JSON) become tuples."""
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "labels", tuple(self.labels))
        if not self.words or not all(self.words):
            raise EvalRowError(f"a row needs words, none of them empty, got {self.words!r}")
        if len(self.labels) != len(self.words):
            raise EvalRowError(
                f"a row needs a label per word, got {len(self.labels)} labels for {self.words!r}"
            )
        for label in self.labels:
            _check_label(label, " ".join(self.words))
        if all(label == IGNORED for label in self.labels):
            raise EvalRowError(f"no word is scored in {self.words!r}: every label is {IGNORED}")


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two texts, and how alike people find them.

    Args:
        first: One text.
        second: The other.
        score: How alike they are, on any scale; more is more alike.
    """

    first: str
    second: str
    score: float

    def __post_init__(self) -> None:
        """Check the row."""
        if not self.first or not self.second:
            raise EvalRowError(f"a pair needs two texts, got {self.first!r} and {self.second!r}")
        if not abs(self.score) < float("inf"):  # false for NaN too
            raise EvalRowError(f"score must be a finite number, got {self.score!r}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_label(label: object, where: str) -> None:
    known = isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool))
    if not known or label == "" or (isinstance(label, int) and label < 0 and label != IGNORED):
        raise EvalRowError(
            f"a label must be a number from 0 on or a name, got {label!r} for {where!r}"
        )


def label_indices(
    given: Iterable[int | str], labels: tuple[str, ...] | None, where: str
) -> tuple[int, ...]:
    """Return labels as numbers; -100 stays.

    Args:
        given: numbers or names.
        labels: the names, in the order of the model's outputs; None if rows hold numbers.
        where: the row, for messages.

    Raises:
        EvalRowError: a label is not among them.
    """
    found = []
    for label in given:
        if isinstance(label, str):
            if labels is None or label not in labels:
                known = "labels= was not given" if labels is None else f"labels are {labels!r}"
                raise EvalRowError(f"{where}: the label {label!r} is not known: {known}")
            found.append(labels.index(label))
        elif labels is not None and label != IGNORED and label >= len(labels):
            raise EvalRowError(f"{where}: label {label!r}, but there are {len(labels)} labels")
        else:
            found.append(label)
    return tuple(found)
