"""BLEU and ROUGE as `evaluate.Metric` classes that need no network.

`evaluate.load("bleu")` downloads its code; these are in the package, use the same libraries and
can split Chinese (`text` has the rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .text import ROUGES, bleu_of_counts, language, score_texts

__all__ = ["Bleu", "Rouge"]

_USAGE = """
Args:
    predictions: list of texts.
    references: for every text a reference, or a list of references.
    lang: language code of the texts, e.g. "zh"; empty: decided by the script of all references.
"""


def _info(description: str, citation: str) -> evaluate.MetricInfo:
    text = datasets.Value("string")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=_USAGE,
        features=[
            datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            datasets.Features({"predictions": text, "references": text}),
        ],
    )


def _lists(references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    return [[known] if isinstance(known, str) else list(known) for known in references]


class _Offline(evaluate.Metric):  # type: ignore[misc]
    """Keeps what it is given in memory, and draws nothing from NumPy's global generator."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, "seed": 0, **options})


class Bleu(_Offline):
    """Corpus BLEU-4 and the sentence BLEU of every text, 0..100 as sacrebleu gives them.

    Example:
        >>> text = ["the cat sat here"]
        >>> found = Bleu().compute(predictions=text, references=text)
        >>> round(found["bleu"], 6)
        100.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("BLEU-4 by sacrebleu", "https://aclanthology.org/W18-6319")

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Any], lang: str = ""
    ) -> dict[str, Any]:
        known = _lists(references)
        chosen = language((text for texts in known for text in texts), lang)
        found = score_texts(predictions, known, [chosen] * len(known))
        return {"bleu": bleu_of_counts(found.counts), "sentence_bleu": found.bleu.tolist()}


class Rouge(_Offline):
    """Mean F1 of ROUGE-1, -2 and -L, 0..1 as rouge-score gives them, and that of every text.

    Example:
        >>> found = Rouge().compute(predictions=["a cat"], references=[["a dog", "a cat"]])
        >>> found["rouge1"], found["sentence_rouge1"]
        (1.0, [1.0])
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE by rouge-score", "https://aclanthology.org/W04-1013")

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Any],
        lang: str = "",
        use_stemmer: bool = False,
    ) -> dict[str, Any]:
        known = _lists(references)
        chosen = language((text for texts in known for text in texts), lang)
        found = score_texts(predictions, known, [chosen] * len(known), stemmer=use_stemmer)
        means: dict[str, Any] = {name: float(found.rouge[name].mean()) for name in ROUGES}
        return means | {f"sentence_{name}": found.rouge[name].tolist() for name in ROUGES}
