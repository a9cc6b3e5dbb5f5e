"""BLEU and ROUGE against their libraries and against counts by hand; bootstrap errors."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from snapshot import rng_states

from peft_himerge.errors import ConfigError
from peft_himerge.evals import Bleu, Rouge, bootstrap_se
from peft_himerge.evals.text import bleu_of_counts, language, score_texts
from peft_himerge.journal import pack_score, unpack_score
from peft_himerge.scoring import Estimate, Task, read_score

TEXTS = [
    "Cocum is a cheap coffee shop, rated 1 out of 5.",
    "The Eagle serves Chinese food near Burger King.",
    "Nothing alike",
    "The Eagle is a coffee shop that serves Chinese food by the river, near Burger King.",
]
REFERENCES = [
    ["Cocum is a moderately priced coffee shop rated 1 out of 5.", "Cocum: a cheap coffee shop."],
    ["Near Burger King, The Eagle serves Chinese food."],
    ["A pub in the city centre.", "There is a pub.", "The pub lies in the centre of the city."],
    [
        "The Eagle is a coffee shop which serves Chinese food by the river near Burger King.",
        "By the river near Burger King is a coffee shop that serves Chinese food, The Eagle.",
    ],
]
CHINESE = ["北京是中国的首都，人口很多。", "他在学校读书", "The 上海 tower"]
CHINESE_REFERENCES = [
    ["北京是中国首都，人口众多。", "中国的首都是北京。"],
    ["她在学校里教书"],
    ["上海中心大厦"],
]


# ------------------------------------------------------------------------------- against libraries


def test_bleu_equals_sacrebleu() -> None:
    found = Bleu().compute(predictions=TEXTS, references=REFERENCES)
    # sacrebleu wants the k-th references of all texts together, None where there is none.
    width = max(map(len, REFERENCES))
    turned = [[r[k] if k < len(r) else None for r in REFERENCES] for k in range(width)]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, turned).score, abs=1e-12)
    alone = [sacrebleu.sentence_bleu(t, r).score for t, r in zip(TEXTS, REFERENCES, strict=True)]
    assert found["sentence_bleu"] == alone
    assert 0 < min(alone) or alone[2] == 0.0
    assert len(set(alone)) == 4


def test_bleu_of_chinese_equals_sacrebleu_with_its_chinese_tokenizer() -> None:
    turned = [[r[k] if k < len(r) else None for r in CHINESE_REFERENCES] for k in range(2)]
    expected = sacrebleu.corpus_bleu(CHINESE, turned, tokenize="zh").score
    for lang in ("", "zh", "zh-CN"):
        found = Bleu().compute(predictions=CHINESE, references=CHINESE_REFERENCES, lang=lang)
        assert found["bleu"] == pytest.approx(expected, abs=1e-12)
        assert found["sentence_bleu"] == [
            sacrebleu.sentence_bleu(t, r, tokenize="zh").score
            for t, r in zip(CHINESE, CHINESE_REFERENCES, strict=True)
        ]
    by_words = Bleu().compute(predictions=CHINESE, references=CHINESE_REFERENCES, lang="en")
    assert by_words["bleu"] < expected / 2  # why the choice matters


def test_bleu_takes_one_reference_as_a_text() -> None:
    first = [r[0] for r in REFERENCES]
    found = Bleu().compute(predictions=TEXTS, references=first)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, [first]).score, abs=1e-12)


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_equals_rouge_score_with_the_best_reference(stemmer: bool) -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    found = Rouge().compute(predictions=TEXTS, references=REFERENCES, use_stemmer=stemmer)
    scorer = RougeScorer(names, use_stemmer=stemmer)
    for name in names:
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in known)
            for text, known in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert found[f"sentence_{name}"] == best
        assert found[name] == pytest.approx(sum(best) / len(best))


def f1_of_ngrams(text: Sequence[str], reference: Sequence[str], n: int) -> float:
    def grams(words: Sequence[str]) -> Counter[Any]:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    one, other = grams(text), grams(reference)
    shared = sum(min(count, other[gram]) for gram, count in one.items())
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def f1_of_longest(text: Sequence[str], reference: Sequence[str]) -> float:
    def longest(i: int, j: int) -> int:
        if i == len(text) or j == len(reference):
            return 0
        if text[i] == reference[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return 2 * longest(0, 0) / (len(text) + len(reference))


def test_rouge_of_chinese_counts_characters() -> None:
    texts, known = ["他在学校读书", "Go 大学 2024"], ["她在学校里教书", "大学 go 2024"]
    words = [[list("他在学校读书"), ["go", "大", "学", "2024"]],
             [list("她在学校里教书"), ["大", "学", "go", "2024"]]]  # fmt: skip
    found = Rouge().compute(predictions=texts, references=known)
    for i in range(2):
        text, reference = words[0][i], words[1][i]
        assert found["sentence_rouge1"][i] == pytest.approx(f1_of_ngrams(text, reference, 1))
        assert found["sentence_rouge2"][i] == pytest.approx(f1_of_ngrams(text, reference, 2))
        assert found["sentence_rougeL"][i] == pytest.approx(f1_of_longest(text, reference))
    by_words = Rouge().compute(predictions=texts, references=known, lang="en")
    assert by_words["sentence_rouge1"] == [0.0, 1.0]  # why the choice matters


def test_metrics_leave_random_states_alone() -> None:
    random.seed(5)
    np.random.seed(6)
    before = rng_states()
    Bleu().compute(predictions=TEXTS, references=REFERENCES)
    Rouge().compute(predictions=TEXTS, references=REFERENCES)
    assert rng_states() == before


# ------------------------------------------------------------------------------------ the language


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("北京是首都", "", "zh"),
        ("北京 hotel", "", ""),  # 2 of 7 letters
        ("北京 ab", "", "zh"),  # half of the letters
        ("学校で勉強する", "", "ja"),
        ("カタカナ", "", "ja"),
        ("大学" * 20 + "の", "", "zh"),  # one kana in 41 characters
        ("서울은 수도", "", ""),
        ("", "", ""),
        ("1234 ...", "", ""),
        ("tea", "zh", "zh"),
        ("tea", "zh_Hant", "zh"),
        ("tea", "YUE", "zh"),
        ("北京", "en", ""),
        ("tea", "ja-JP", "ja"),
        ("\U00020000\U0002a6df", "", "zh"),
    ],
)
def test_language_follows_its_rule(text: str, lang: str, expected: str) -> None:
    assert language([text], lang) == expected


def test_japanese_is_scored_by_characters() -> None:
    found = score_texts(["学校で勉強"], [["学校で学ぶ"]], ["ja"])
    expected = sacrebleu.sentence_bleu("学校で勉強", ["学校で学ぶ"], tokenize="char").score
    assert found.bleu[0] == expected > 0
    assert found.rouge["rouge1"][0] == pytest.approx(0.6)  # 学, 校, で of five


# ------------------------------------------------------------------------------ bootstrap, Estimate


def test_bootstrap_of_a_mean_agrees_with_the_formula() -> None:
    values = np.random.default_rng(3).normal(size=400)
    exact = values.std(ddof=1) / math.sqrt(len(values))
    assert bootstrap_se(values, n=4000) == pytest.approx(exact, rel=0.05)


def test_bootstrap_equals_a_naive_loop_and_leaves_the_global_generator_alone() -> None:
    rows = np.random.default_rng(4).normal(size=(30, 2))

    def ratio(drawn: np.ndarray) -> float:
        return float(drawn[:, 0].sum() / (5 + drawn[:, 1].sum() ** 2))

    np.random.seed(7)
    before = rng_states()
    found = bootstrap_se(rows, ratio, n=50, seed=9)
    assert rng_states() == before
    draw = np.random.default_rng(9)
    values = []
    for _ in range(50):
        picked = draw.integers(0, 30, 30)
        values.append(ratio(np.stack([rows[i] for i in picked])))
    centre = math.fsum(values) / 50
    assert found == pytest.approx(math.sqrt(math.fsum((v - centre) ** 2 for v in values) / 49))
    assert found != bootstrap_se(rows, ratio, n=50, seed=10)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.5, 3))
def test_bootstrap_scales_with_the_examples(values: list[float], factor: float) -> None:
    one = bootstrap_se(values, n=20)
    other = bootstrap_se([factor * v for v in values], n=20)
    assert one is not None
    assert other == pytest.approx(factor * one, abs=1e-9)


def test_bootstrap_needs_two_examples_and_two_draws() -> None:
    assert bootstrap_se([1.0]) is None
    for bad in ({"n": 1}, {"n": 0}, {"n": 2.5}):
        with pytest.raises(ConfigError):
            bootstrap_se([1.0, 2.0], **bad)
    with pytest.raises(ConfigError, match="axes"):
        bootstrap_se(3.0)


def test_corpus_bleu_has_an_error_that_shrinks_with_more_rows() -> None:
    few = score_texts(TEXTS, REFERENCES, [""] * 4)
    many = np.tile(few.counts, (16, 1))
    assert bleu_of_counts(many) == pytest.approx(bleu_of_counts(few.counts))
    small, large = (bootstrap_se(c, bleu_of_counts, n=200) for c in (many, few.counts))
    assert small is not None
    assert large is not None
    assert 0 < 2.5 * small < large  # a quarter, less what 200 draws make it waver


def test_estimate_gives_a_score_its_error() -> None:
    task = Task("t", lambda model: 0.0)
    score = read_score(Estimate(0.25, 0.5), task)
    assert (score.value, score.examples, score.se) == (0.25, None, 0.5)
    assert type(score.value) is float
    assert read_score(Estimate(0.25), task).se is None
    named = Task("t", task.fn, metric="bleu")
    score = read_score({"bleu": Estimate(0.5, 0.125), "rouge1": [0.5, 1.0]}, named)
    assert (score.se, dict(score.metrics)) == (0.125, {"bleu": 0.5, "rouge1": 0.75})
    other = read_score({"bleu": Estimate(0.5, 0.125), "r": [0.5, 1.0]}, Task("t", task.fn, "r"))
    assert other.se == pytest.approx(0.25)  # of the examples, not of the other metric
    for kept in (score, other):
        again = unpack_score(pack_score(kept))
        assert (again.value, again.se, again.metrics) == (kept.value, kept.se, kept.metrics)


def test_estimate_is_a_number_and_refuses_an_impossible_error() -> None:
    made = pickle.loads(pickle.dumps(Estimate(1.5, 0.1)))
    assert (made, made.se) == (1.5, 0.1)
    assert made + 1 == 2.5
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="standard error"):
            Estimate(1.0, bad)
