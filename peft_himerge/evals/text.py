"""BLEU and ROUGE of texts, with words split as their language asks for.

Both come from their usual libraries, sacrebleu and rouge-score; this room only chooses how texts
are split into words, because neither library's default can split Chinese: sacrebleu's takes a
whole clause for one word, and rouge-score's throws every character away.

The rule, for a language code and for texts without one:

    language              BLEU (sacrebleu tokenize=)   ROUGE
    zh, zh-*, yue         "zh"                         each Han character or kana is a word
    ja, ja-*              "char"                       each Han character or kana is a word
    anything else         "13a" (its default)          rouge-score's own: a-z and 0-9
    none given            zh or ja if at least half of the letters are Han characters or kana;
                          ja if more than a tenth of those are kana; else like anything else
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtraError

__all__ = ["ROUGES", "TextScores", "bleu_of_counts", "language", "score_texts"]

ROUGES = ("rouge1", "rouge2", "rougeL")
"""What is computed of ROUGE (rouge-score's names)."""

_ORDER = 4  # of BLEU: n-grams of 1 to 4 words
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_ALONE = re.compile(f"[{_HAN}{_KANA}]")
_WORDS = re.compile(rf"[{_HAN}{_KANA}]|(?:(?![{_HAN}{_KANA}_])\w)+")


def language(texts: Iterable[str], lang: str = "") -> str:
    """Return "zh", "ja" or "" (anything else), from a language code or else from the texts.

    Example:
        >>> language(["in 中国北方地区"]), language(["tea"]), language(["tea"], lang="zh-TW")
        ('zh', '', 'zh')
    """
    if lang:
        code = re.split(r"[-_]", lang.lower())[0]
        return {"zh": "zh", "yue": "zh", "ja": "ja"}.get(code, "")
    letters = [c for text in texts for c in text if c.isalpha()]
    alone = [c for c in letters if _ALONE.match(c)]
    if not alone or 2 * len(alone) < len(letters):
        return ""
    kana = sum(bool(re.match(f"[{_KANA}]", c)) for c in alone)
    return "ja" if 10 * kana > len(alone) else "zh"


class _Words:
    """A tokenizer for rouge-score: Han characters and kana one by one, other words whole."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


@lru_cache(maxsize=8)
def _bleu(lang: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as exc:
        raise MissingExtraError("BLEU needs sacrebleu: pip install 'peft-himerge[evals]'.") from exc
    tokenize = {"zh": "zh", "ja": "char"}.get(lang, "13a")
    return BLEU(tokenize=tokenize, effective_order=True)


@lru_cache(maxsize=8)
def _rouge(lang: str, stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as exc:
        raise MissingExtraError(
            "ROUGE needs rouge-score: pip install 'peft-himerge[evals]'."
        ) from exc
    words = _Words() if lang in ("zh", "ja") else None
    return RougeScorer(list(ROUGES), use_stemmer=stemmer, tokenizer=words)


@dataclass(frozen=True, slots=True, eq=False)
class TextScores:
    """Scores of texts against their references, one entry per text.

    Attributes:
        bleu: sentence BLEU-4 with sacrebleu's defaults for sentences (exponential smoothing,
            effective order), 0..100.
        rouge: F1 by name of `ROUGES`, 0..1; of several references the best one counts.
        counts: (n, 10) what corpus BLEU adds up: words of the text, words of the closest
            reference, matching 1- to 4-grams, 1- to 4-grams.
    """

    bleu: npt.NDArray[np.float64]
    rouge: dict[str, npt.NDArray[np.float64]]
    counts: npt.NDArray[np.float64]


def score_texts(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    langs: Sequence[str],
    *,
    stemmer: bool = False,
) -> TextScores:
    """Score texts by BLEU and ROUGE.

    Args:
        texts: what is judged.
        references: one or more good answers per text.
        langs: "zh", "ja" or "" per text, from `language`.
        stemmer: ROUGE compares English word stems.

    Raises:
        MissingExtraError: sacrebleu or rouge-score is not installed.
    """
    bleu, counts = [], []
    rouge: dict[str, list[float]] = {name: [] for name in ROUGES}
    for text, known, lang in zip(texts, references, langs, strict=True):
        found = _bleu(lang).sentence_score(text, list(known))
        bleu.append(found.score)
        counts.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
        scores = _rouge(lang, stemmer).score_multi(list(known), text)
        for name in ROUGES:
            rouge[name].append(scores[name].fmeasure)
    return TextScores(
        np.asarray(bleu, dtype=np.float64),
        {name: np.asarray(values, dtype=np.float64) for name, values in rouge.items()},
        np.asarray(counts, dtype=np.float64),
    )


def bleu_of_counts(counts: npt.NDArray[np.float64]) -> float:
    """Return corpus BLEU-4, 0..100, of `TextScores.counts`; sacrebleu's own arithmetic."""
    words, wanted, *grams = (round(number) for number in counts.sum(axis=0).tolist())
    found = _bleu("").compute_bleu(
        correct=grams[:_ORDER],
        total=grams[_ORDER:],
        sys_len=words,
        ref_len=wanted,
        smooth_method="exp",
    )
    return float(found.score)
