"""Eval functions on tiny models, against one row at a time without padding, in float64."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import bytewise
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, sentence_bleu
from scipy.stats import spearmanr
from snapshot import bits, rng_states, snapshot
from tokenizers import processors
from torch import nn
from transformers import BatchEncoding, GenerationConfig

from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.errors import ConfigError, EvalError, HiMergeError
from peft_himerge.evals import (
    ClassificationRow,
    EvalRowError,
    GenerationRow,
    MultipleChoiceRow,
    PairRow,
    TokenRow,
    embedding_similarity,
    generation,
    likelihood,
    multiple_choice,
    perplexity,
    sequence_classification,
    token_classification,
)
from peft_himerge.evals.base import fingerprint
from peft_himerge.evals.calibration import calibrated
from peft_himerge.evals.generation import generate_texts
from peft_himerge.identity import eval_digest
from peft_himerge.plan import Edit, MergePlan
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

TOKENIZER = bytewise.tokenizer()

CHOICES = [
    MultipleChoiceRow("a long question with many words?", (" yes", " no", " maybe so"), 2),
    MultipleChoiceRow("q?", ("A", "大洋洲"), 0),
    MultipleChoiceRow("another one?", ("x", "y", "z"), 1),
]
LETTERS = [
    MultipleChoiceRow("a long question with many words?", ("A", "B"), 1),
    MultipleChoiceRow("q?", ("C", "A", "D"), 0),
]
PROMPTS = [
    GenerationRow("Describe the place: ", ("a b c d", "e f g")),
    GenerationRow("x", ("the cat sat",)),
    GenerationRow("One more, somewhat longer prompt = ", ("one", "two", "three")),
]
PARAGRAPHS = [
    "a first text",
    "b",
    "中文文本",
    "A much longer text, of which there is more than one window",
]
CLASSES = [
    ClassificationRow("a good film", "pos"),
    ClassificationRow("bad", "neg", second="indeed"),
    ClassificationRow("so it goes, on and on", "none"),
    ClassificationRow("?", "pos"),
    ClassificationRow("neither here nor there", "neg", second="or is it, after all"),
]
LABELS = ["neg", "pos", "none"]
WORDS = [
    TokenRow(("Anna", "sees", "Rome"), ("PER", "O", "LOC")),
    TokenRow(("a",), ("O",)),
    TokenRow(("In", "Paris", "it", "rained"), ("O", "LOC", -100, "O")),
]
TAGS = ["O", "PER", "LOC"]
PAIRS = [
    PairRow("a cat", "a dog", 3.0),
    PairRow("a cat sat on the mat", "one two three", 0.5),
    PairRow("a cat", "a cat", 5.0),
    PairRow("tea", "coffee at noon", 3.0),
    PairRow("x", "y", 1),
]


def row_ids(text: str, second: str | None = None) -> list[int]:
    return TOKENIZER(text, second)["input_ids"]


@torch.no_grad()
def logits_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]


# ---------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize("kind", bytewise.CAUSAL)
@pytest.mark.parametrize("normalize", ["none", "tokens", "bytes"])
@pytest.mark.parametrize("rows", [CHOICES, LETTERS], ids=["several", "single"])
def test_multiple_choice_padded_equals_unpadded(kind: str, normalize: str, rows: Any) -> None:
    model = bytewise.CAUSAL[kind](torch.float64)
    found = multiple_choice(rows, TOKENIZER, batch_size=4, normalize=normalize)(model)
    compared = torch.full((len(rows), 9), -torch.inf, dtype=torch.float64)
    for i, row in enumerate(rows):
        totals = []
        for choice in row.choices:
            ids, prompt = row_ids(row.prompt + choice), len(row_ids(row.prompt))
            table = logits_of(model, ids).log_softmax(-1)
            total = math.fsum(float(table[k - 1, ids[k]]) for k in range(prompt, len(ids)))
            tokens, size = len(ids) - prompt, len(choice.encode("utf-8"))
            totals.append(total / {"none": 1, "tokens": tokens, "bytes": size}[normalize])
        share = math.exp(totals[row.answer]) / math.fsum(map(math.exp, totals))
        assert float(found["log_likelihood"][i]) == pytest.approx(math.log(share), abs=1e-5)
        assert float(found["probability"][i]) == pytest.approx(share, abs=1e-5)
        assert found["accuracy"][i] == (max(totals) == totals[row.answer])
        compared[i, : len(totals)] = torch.tensor(totals)
    fitted = calibrated(compared, torch.tensor([row.answer for row in rows])).exp()
    torch.testing.assert_close(found["calibrated_probability"].double(), fitted, rtol=0, atol=1e-5)


def test_multiple_choice_normalisation_changes_what_wins() -> None:
    model = bytewise.llama(torch.float64)
    rows = [MultipleChoiceRow(f"question {i}:", ("a", "longer answer"), 1) for i in range(8)]
    won = [
        float(multiple_choice(rows, TOKENIZER, normalize=n)(model)["accuracy"].sum())
        for n in ("none", "tokens")
    ]
    assert won[0] == 0 < won[1]


# -------------------------------------------------------------------------------------- generation


@torch.no_grad()
def written(model: nn.Module, prompt: str, tokens: int) -> str:
    """Greedy decoding without a cache, one row, no padding."""
    ids = row_ids(prompt)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
        if ids[-1] == bytewise.EOS:
            break
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("kind", bytewise.CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_padded_equals_greedy_steps_unpadded(kind: str, batch_size: int) -> None:
    model = bytewise.CAUSAL[kind](torch.float64)
    prompts = [row_ids(row.prompt) for row in PROMPTS]
    texts = generate_texts(model, prompts, TOKENIZER, 9, batch_size=batch_size)
    assert texts == [written(model, row.prompt, 9).strip() for row in PROMPTS]
    assert len(set(texts)) == 3


def test_generation_scores_what_was_written() -> None:
    model = bytewise.llama(torch.float64)
    texts = [written(model, row.prompt, 12).strip() for row in PROMPTS]
    # References that share pieces with what the model writes, so that the scores are not all 0.
    rows = [
        GenerationRow(row.prompt, (f"{text[:6]} and {text[6:]}", f"not {text}", "far off"))
        for row, text in zip(PROMPTS, texts, strict=True)
    ]
    found = generation(rows, TOKENIZER, max_new_tokens=12, batch_size=2)(model)
    bleu = [sentence_bleu(t, r.references).score / 100 for t, r in zip(texts, rows, strict=True)]
    assert found["bleu"].tolist() == pytest.approx(bleu, abs=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in row.references)
            for text, row in zip(texts, rows, strict=True)
        ]
        assert found[name].tolist() == best
    turned = [list(column) for column in zip(*(row.references for row in rows), strict=True)]
    assert float(found["corpus_bleu"]) == pytest.approx(corpus_bleu(texts, turned).score / 100)
    assert found["corpus_bleu"].se > 0
    assert 0 < sum(bleu) < 3


def test_generation_stops_at_a_stop_text_and_drops_it() -> None:
    model = bytewise.llama(torch.float64)
    plain = [written(model, row.prompt, 12) for row in PROMPTS]
    letter = plain[0].strip()[3]
    texts = generate_texts(
        model, [row_ids(r.prompt) for r in PROMPTS], TOKENIZER, 12, (letter, "never"), batch_size=2
    )
    assert texts == [text.split(letter)[0].strip() for text in plain]
    assert len(texts[0]) <= 3


def test_generation_ends_at_the_model_s_own_end_tokens_too() -> None:
    model = bytewise.llama(torch.float64)
    plain = written(model, PROMPTS[0].prompt, 12)
    end = row_ids(plain)[4]  # the fourth token the model writes
    model.generation_config = GenerationConfig(
        eos_token_id=[bytewise.EOS, end], do_sample=True, temperature=0.3, repetition_penalty=1.9
    )
    [text] = generate_texts(model, [row_ids(PROMPTS[0].prompt)], TOKENIZER, 12)
    stops = plain.index(TOKENIZER.decode([end]))
    assert text == plain[: stops + 1].strip()
    assert model.generation_config.temperature == 0.3


def test_generation_with_an_encoder_decoder_equals_greedy_steps() -> None:
    model = bytewise.t5(torch.float64)
    prompts = [row_ids(row.prompt) for row in PROMPTS]
    texts = generate_texts(model, prompts, TOKENIZER, 7, batch_size=3)
    for text, ids in zip(texts, prompts, strict=True):
        answer = [bytewise.PAD]
        with torch.no_grad():
            for _ in range(7):
                inputs = {
                    "input_ids": torch.tensor([ids]),
                    "decoder_input_ids": torch.tensor([answer]),
                }
                answer.append(int(model(**inputs).logits[0, -1].argmax()))
                if answer[-1] == bytewise.EOS:
                    break
        assert text == TOKENIZER.decode(answer, skip_special_tokens=True).strip()


def test_a_tokenizer_that_closes_texts_does_not_end_a_prompt() -> None:
    closing = bytewise.tokenizer.__wrapped__()
    closing._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bytewise.BOS), ("<eos>", bytewise.EOS)]
    )
    prompts = [row_ids(row.prompt) for row in PROMPTS]
    closed = [closing(row.prompt)["input_ids"] for row in PROMPTS]
    assert [ids[:-1] for ids in closed] == prompts
    for model in (bytewise.llama(), bytewise.t5()):
        same = model.config.is_encoder_decoder  # its encoder is to read the end token
        texts = generate_texts(model, closed, closing, 6)
        assert (texts == generate_texts(model, prompts, TOKENIZER, 6)) is not same


def test_an_end_token_that_a_tokenizer_adds_is_no_part_of_any_text() -> None:
    closing = bytewise.tokenizer.__wrapped__()
    closing._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bytewise.BOS), ("<eos>", bytewise.EOS)]
    )
    model = bytewise.llama()
    for build, rows in (
        (multiple_choice, CHOICES),
        (likelihood, PROMPTS),
        (perplexity, PARAGRAPHS),
    ):
        found, want = build(rows, closing)(model), build(rows, TOKENIZER)(model)
        found, want = (x if isinstance(x, dict) else {"score": x} for x in (found, want))
        assert found.keys() == want.keys()
        for metric, values in want.items():
            assert torch.equal(torch.as_tensor(found[metric]), torch.as_tensor(values)), build


def test_padding_needs_no_token_of_its_own() -> None:
    bare = bytewise.tokenizer.__wrapped__()
    bare.pad_token = bare.eos_token = None
    assert bare.pad_token_id is None
    model = bytewise.llama()
    found, want = (multiple_choice(CHOICES, t, batch_size=3)(model) for t in (bare, TOKENIZER))
    assert all(torch.equal(found[metric], values) for metric, values in want.items())


class Mute:
    """A tokenizer that leaves nothing of a text, as one does that drops unknown characters."""

    pad_token_id = eos_token_id = 0

    def __call__(self, *_texts: Any, **_options: Any) -> BatchEncoding:
        encoding = self._inner.encode("", add_special_tokens=False)
        return BatchEncoding({"input_ids": []}, encoding)

    _inner = bytewise.tokenizer()._tokenizer

    def get_vocab(self) -> dict[str, int]:
        return {}


class Same(Mute):
    """A tokenizer to which all texts are the same."""

    def __call__(self, *_texts: Any, **_options: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": [1, 2]})


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: multiple_choice(CHOICES, Mute()), "no token for the prompt 'a long question"),
        (lambda: generation(PROMPTS, Mute()), "no token for the prompt 'Describe"),
        (lambda: likelihood(PROMPTS, Mute()), "no token for the prompt 'Describe"),
        (lambda: perplexity(PARAGRAPHS, Mute()), "text 1 has fewer than two tokens"),
        (lambda: sequence_classification(CLASSES, Mute(), LABELS), "no token for a row"),
        (lambda: token_classification(WORDS, Mute(), TAGS), "row 1: .* the word 'Anna'"),
        (lambda: embedding_similarity(PAIRS, Mute()), "no token for the text 'a cat'"),
        (lambda: multiple_choice(CHOICES, Same()), "must differ as tokens, got .*use other texts"),
    ],
)
def test_a_row_of_which_no_token_is_left_is_refused(build: Any, text: str) -> None:
    with pytest.raises(EvalRowError, match=text):
        build()


def test_a_fingerprint_is_of_plain_values_alone() -> None:
    assert fingerprint("f", rows=CHOICES) == fingerprint("f", rows=list(CHOICES))
    for value in (object(), {1, 2}, torch.ones(2)):
        with pytest.raises(TypeError, match=f"no fingerprint of a {type(value).__name__}"):
            fingerprint("f", rows=[value])  # its address or order would differ in every process


def test_generation_refuses_more_tokens_than_the_model_has_positions() -> None:
    eval_fn = generation(PROMPTS, TOKENIZER, max_new_tokens=bytewise.POSITIONS - 10)
    with pytest.raises(EvalError, match=r"positions \(max_position_embeddings\).*Lower"):
        eval_fn(bytewise.gpt2())


def test_generation_gives_the_head_contiguous_input_and_takes_its_hook_away() -> None:
    model = bytewise.llama()
    seen: list[bool] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    generation(PROMPTS, TOKENIZER, max_new_tokens=3)(model)
    handle.remove()
    assert len(seen) >= 3
    assert all(seen)
    assert not head._forward_pre_hooks


# -------------------------------------------------------------------------------------- likelihood


def mean_log_probability(model: nn.Module, prompt: str, answer: str, end: bool) -> float:
    ids = row_ids(prompt + answer) + [TOKENIZER.eos_token_id] * end
    table = logits_of(model, ids).log_softmax(-1)
    each = [float(table[k - 1, ids[k]]) for k in range(len(row_ids(prompt)), len(ids))]
    return math.fsum(each) / len(each)


@pytest.mark.parametrize("kind", bytewise.CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("end", [False, True])
def test_likelihood_is_that_of_the_likeliest_answer(kind: str, batch_size: int, end: bool) -> None:
    model = bytewise.CAUSAL[kind](torch.float64)
    found = likelihood(PROMPTS, TOKENIZER, batch_size=batch_size, separator="", with_end=end)(model)
    for i, row in enumerate(PROMPTS):
        each = [mean_log_probability(model, row.prompt, text, end) for text in row.references]
        assert float(found["log_likelihood"][i]) == pytest.approx(max(each), abs=1e-6)
        assert float(found["probability"][i]) == pytest.approx(math.exp(max(each)), abs=1e-6)


def test_likelihood_reads_the_first_answers_after_a_separator() -> None:
    model = bytewise.llama(torch.float64)
    found = likelihood(PROMPTS, TOKENIZER, max_references=1, separator="\n")(model)
    for i, row in enumerate(PROMPTS):
        expected = mean_log_probability(model, row.prompt, "\n" + row.references[0], False)
        assert float(found["log_likelihood"][i]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["multiple_choice", "likelihood", "perplexity"])
def test_likelihoods_are_refused_by_an_encoder_decoder(name: str) -> None:
    with pytest.raises(EvalError, match=r"causal LM, but T5For.* is an encoder-decoder: use gen"):
        CAUSAL_EVALS[name]()(bytewise.t5())


def test_likelihood_knows_which_answer_a_model_was_trained_on() -> None:
    model = bytewise.llama()
    ids = torch.tensor([row_ids("say: yes")])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    rows = [GenerationRow("say:", (text,)) for text in ("yes", "no", "maybe")]
    scores = likelihood(rows, TOKENIZER)(model)["probability"].tolist()
    assert scores[0] > 0.5 > max(scores[1:])


# -------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("kind", bytewise.CAUSAL)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_a_text_at_a_time(kind: str, batch_size: int) -> None:
    model = bytewise.CAUSAL[kind](torch.float64)
    found = perplexity(PARAGRAPHS, TOKENIZER, batch_size=batch_size)(model)
    total, count = 0.0, 0
    for i, text in enumerate(PARAGRAPHS):
        ids = row_ids(text)
        table = logits_of(model, ids).log_softmax(-1)
        each = [float(table[k - 1, ids[k]]) for k in range(1, len(ids))]
        assert found["log_likelihood"][i] == pytest.approx(sum(each) / len(each), abs=1e-5)
        total, count = total + sum(each), count + len(each)
    assert float(found["perplexity"]) == pytest.approx(math.exp(-total / count), rel=1e-6)
    assert found["perplexity"].se > 0


@pytest.mark.parametrize("most", [2, 5, 8, 13])
def test_perplexity_predicts_every_token_once_from_half_a_window_or_more(most: int) -> None:
    model = bytewise.llama(torch.float64)
    found = perplexity(PARAGRAPHS, TOKENIZER, max_length=most, batch_size=3)(model)
    for i, text in enumerate(PARAGRAPHS):
        ids, each, done = row_ids(text), [], 1
        while done < len(ids):
            start = 0 if done == 1 else done - most // 2
            end = min(start + most, len(ids))
            table = logits_of(model, ids[start:end]).log_softmax(-1)
            each += [float(table[k - start - 1, ids[k]]) for k in range(done, end)]
            done = end
        assert len(each) == len(ids) - 1
        assert found["log_likelihood"][i] == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    model = bytewise.llama(torch.float64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = perplexity(PARAGRAPHS, TOKENIZER)(model)
    assert float(found["perplexity"]) == pytest.approx(bytewise.VOCAB)
    assert found["log_likelihood"] == pytest.approx(np.full(4, -math.log(bytewise.VOCAB)))


# ---------------------------------------------------------------------------------- classification


def naive_f1(gold: list[Any], chosen: list[Any], leave: tuple[Any, ...] = ()) -> float:
    scores = []
    right = Counter(g for g, c in zip(gold, chosen, strict=True) if g == c)
    for label in (set(gold) | set(chosen)) - set(leave):
        precision = right[label] / chosen.count(label) if label in chosen else 0.0
        recall = right[label] / gold.count(label) if label in gold else 0.0
        total = precision + recall
        scores.append(2 * precision * recall / total if total else 0.0)
    return sum(scores) / len(scores)


@torch.no_grad()
def classify(model: nn.Module, row: ClassificationRow) -> torch.Tensor:
    inputs = TOKENIZER(row.text, row.second or None, return_tensors="pt")
    if "Bert" not in type(model).__name__:
        inputs.pop("token_type_ids")
    return model(**inputs).logits[0].log_softmax(-1)


@pytest.mark.parametrize("build", [bytewise.bert, bytewise.llama_classifier])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_sequence_classification_equals_a_row_at_a_time(build: Any, batch_size: int) -> None:
    model = build()
    found = sequence_classification(CLASSES, TOKENIZER, LABELS, batch_size=batch_size)(model)
    tables = [classify(model, row) for row in CLASSES]
    gold = [LABELS.index(str(row.label)) for row in CLASSES]
    chosen = [int(table.argmax()) for table in tables]
    likely = [float(table[g]) for table, g in zip(tables, gold, strict=True)]
    assert found["log_likelihood"].tolist() == pytest.approx(likely, abs=1e-6)
    assert found["accuracy"].tolist() == [float(g == c) for g, c in zip(gold, chosen, strict=True)]
    assert float(found["macro_f1"]) == pytest.approx(naive_f1(gold, chosen))
    assert found["macro_f1"].se is not None


def test_sequence_classification_takes_numbers_and_cuts_long_texts() -> None:
    model = bytewise.bert()
    rows = [ClassificationRow(row.text[:5], LABELS.index(str(row.label))) for row in CLASSES]
    whole = [ClassificationRow(row.text, row.label) for row in CLASSES]
    short = sequence_classification(rows, TOKENIZER)(model)
    cut = sequence_classification(whole, TOKENIZER, LABELS, max_length=6)(model)
    assert cut["log_likelihood"].tolist() == pytest.approx(short["log_likelihood"].tolist())


def test_a_causal_classifier_without_a_padding_token_is_scored_in_batches() -> None:
    model = bytewise.llama_classifier()
    expected = sequence_classification(CLASSES, TOKENIZER, LABELS)(model)["log_likelihood"]
    model.config.pad_token_id = None
    found = sequence_classification(CLASSES, TOKENIZER, LABELS)(model)["log_likelihood"]
    assert found.tolist() == expected.tolist()
    assert model.config.pad_token_id is None


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("outside", [None, "O"])
def test_token_classification_equals_a_row_at_a_time(batch_size: int, outside: Any) -> None:
    model = bytewise.bert_tokens()
    found = token_classification(WORDS, TOKENIZER, TAGS, batch_size=batch_size, outside=outside)(
        model
    )
    gold, chosen = [], []
    for i, row in enumerate(WORDS):
        table = logits_of(model, TOKENIZER("".join(row.words))["input_ids"]).log_softmax(-1)
        place, hits, likely = 1, [], []
        for word, label in zip(row.words, row.labels, strict=True):
            if label != -100:
                line, right = table[place], TAGS.index(str(label))
                gold.append(label)
                chosen.append(TAGS[int(line.argmax())])
                hits.append(float(chosen[-1] == label))
                likely.append(float(line[right]))
            place += len(word)  # one token per letter
        assert found["accuracy"][i] == pytest.approx(sum(hits) / len(hits))
        assert found["log_likelihood"][i] == pytest.approx(sum(likely) / len(likely), abs=1e-6)
    left = () if outside is None else ("O",)
    assert float(found["macro_f1"]) == pytest.approx(naive_f1(gold, chosen, left))


def test_macro_f1_is_zero_where_only_the_outside_is_wanted_and_chosen() -> None:
    model = bytewise.bert_tokens()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    rows = [TokenRow(("it", "rained"), ("O", "O")), TokenRow(("so",), ("O",))]
    scored = {
        outside: token_classification(rows, TOKENIZER, TAGS, outside=outside)(model)
        for outside in (None, "O")
    }
    assert all(found["accuracy"].tolist() == [1.0, 1.0] for found in scored.values())
    assert float(scored[None]["macro_f1"]) == 1.0
    assert float(scored["O"]["macro_f1"]) == 0.0


def test_a_classifier_with_other_outputs_is_refused_with_the_way_out() -> None:
    for labels, rows in ((LABELS, CLASSES), (None, [ClassificationRow("x", 4)])):
        with pytest.raises(EvalError, match=r"tells 2 classes apart.*head="):
            sequence_classification(rows, TOKENIZER, labels)(bytewise.bert(2))


# ------------------------------------------------------------------------------------------- heads


def two_heads(tmp_path: Path) -> tuple[PeftModel, dict[str, Path], dict[str, nn.Module]]:
    """Return bodies of two adapters in one model, their saved folders, and each one's own model."""
    folders, alone = {}, {}
    for seed, (name, labels) in enumerate({"zh": 3, "en": 4}.items()):
        model = get_peft_model(
            bytewise.bert(labels),
            LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS"),
        )
        assert "classifier" in model.peft_config["default"].modules_to_save  # PEFT's own doing
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_" in path or "modules_to_save" in path:
                    noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                    parameter.copy_(0.5 * noise)
        model.eval().save_pretrained(tmp_path / name)
        folders[name], alone[name] = tmp_path / name, model
    # The bodies only, as plain LoRA: what can be merged.
    body: PeftModel | None = None
    for name in folders:
        config = LoraConfig.from_pretrained(folders[name])
        config.modules_to_save, config.task_type = None, TaskType.FEATURE_EXTRACTION
        held = {
            key.replace("default", name): value
            for key, value in alone[name].state_dict().items()
            if "lora_" in key
        }
        if body is None:
            body = PeftModel(bytewise.bert(2), config, adapter_name=name)
        else:
            body.add_adapter(name, config)
        assert not body.load_state_dict(held, strict=False).unexpected_keys
    assert body is not None
    return body.eval(), folders, alone


def test_each_adapter_is_scored_with_its_own_head(tmp_path: Path) -> None:
    model, folders, alone = two_heads(tmp_path)
    for name, labels in (("zh", 3), ("en", 4)):
        rows = [ClassificationRow(row.text, i % labels) for i, row in enumerate(CLASSES)]
        expected = sequence_classification(rows, TOKENIZER)(alone[name])["log_likelihood"]
        model.set_adapter(name)
        before = snapshot(model)
        heads: list[Any] = [folders[name], str(folders[name])]
        state = alone[name].state_dict()
        heads.append({key: state[key] for key in state if "modules_to_save" in key})
        for head in heads:
            found = sequence_classification(rows, TOKENIZER, head=head)(model)["log_likelihood"]
            assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
        assert snapshot(model) == before


def test_adapters_with_heads_of_their_own_are_merged_and_scored(tmp_path: Path) -> None:
    model, folders, _ = two_heads(tmp_path)
    evals = {}
    for name, labels in (("zh", 3), ("en", 4)):
        rows = [ClassificationRow(row.text, i % labels) for i, row in enumerate(CLASSES)]
        evals[name] = sequence_classification(rows, TOKENIZER, head=folders[name])
    before = snapshot(model)
    config = HiMergeConfig(density=0.6, scale=0.9, metric="log_likelihood", max_export_drop=None)
    result = merge_adapters_hi(model, ["zh", "en"], evals, config=config)
    assert snapshot(model, but="merged") == before
    shown = {state: row["zh"] for state, row in result.states.items() if "zh" in row}
    assert len({score.value for score in shown.values()}) > 2
    assert all(score.se is not None for score in shown.values())


def test_a_head_that_peft_wraps_is_exchanged_whichever_copy_is_on() -> None:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(bytewise.bert(), config).eval()
    draw = torch.Generator().manual_seed(1)
    head = {
        "classifier.weight": torch.randn(3, 24, generator=draw, dtype=torch.float64),
        "classifier.bias": torch.randn(3, generator=draw, dtype=torch.float64),
    }
    eval_fn = sequence_classification(CLASSES, TOKENIZER, LABELS, head=head)
    before = snapshot(model)
    on = eval_fn(model)["log_likelihood"].tolist()
    with model.disable_adapter():
        off = eval_fn(model)["log_likelihood"].tolist()
    assert on == off  # B is still 0, so only the head could differ
    assert (
        on != sequence_classification(CLASSES, TOKENIZER, LABELS)(model)["log_likelihood"].tolist()
    )
    assert snapshot(model) == before


def test_a_head_of_several_layers_is_exchanged_whole_or_not_at_all() -> None:
    model, donor = bytewise.roberta(3, seed=0), bytewise.roberta(3, seed=1)
    state = donor.state_dict()
    head = {f"base_model.model.{k}": state[k] for k in state if k.startswith("classifier.")}
    assert len(head) == 4
    found = sequence_classification(CLASSES, TOKENIZER, LABELS, head=head)(model)
    model.classifier, own = donor.classifier, model.classifier
    expected = sequence_classification(CLASSES, TOKENIZER, LABELS)(model)
    assert found["log_likelihood"].tolist() == expected["log_likelihood"].tolist()
    model.classifier = own
    half = {name: head[name] for name in head if "dense" in name}
    with pytest.raises(ConfigError, match=r"comes without 'classifier\.out_proj\.weight'"):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=half)(model)


def test_a_head_comes_off_when_the_model_raises() -> None:
    model = bytewise.bert()
    held = dict(model.named_parameters())
    head = {"classifier.weight": torch.zeros(3, 24), "classifier.bias": torch.zeros(3)}
    model.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=head)(model)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


WEIGHT, BIAS = torch.zeros(3, 24), torch.zeros(3)


@pytest.mark.parametrize(
    ("head", "error", "text"),
    [
        ({}, ConfigError, "holds no parameters"),
        ({"classifier.weight": 3}, ConfigError, "must be a tensor"),
        ({"classifier.weight": WEIGHT.long(), "classifier.bias": BIAS}, ConfigError, "of floats"),
        ({"classifier.weight": WEIGHT * math.nan, "classifier.bias": BIAS}, HiMergeError, "NaN"),
        ({"classifier.weight": WEIGHT}, ConfigError, "comes without 'classifier.bias'"),
        ({"classifyer.weight": WEIGHT}, ConfigError, "Did you mean 'classifier.weight'"),
        ({"classifier.weight": WEIGHT[:, 1:], "classifier.bias": BIAS}, ConfigError, "first axis"),
        ("nowhere", ConfigError, "has no adapter_config.json"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_and_nothing_is_exchanged(
    head: Any, error: type[Exception], text: str
) -> None:
    model = bytewise.bert()
    before = {name: (id(p), bits(p)) for name, p in model.named_parameters()}
    with pytest.raises(error, match=text):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=head)(model)
    assert before == {name: (id(p), bits(p)) for name, p in model.named_parameters()}


def test_a_head_that_carries_lora_or_was_not_saved_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["classifier"])
    model = get_peft_model(bytewise.bert(), config)
    head = {"classifier.weight": WEIGHT, "classifier.bias": BIAS}
    with pytest.raises(ConfigError, match="also carries LoRA"):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=head)(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no saved modules"):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(HiMergeError, match="damaged"):
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=tmp_path)


# -------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("build", [bytewise.bert, bytewise.llama, bytewise.gemma3, bytewise.t5])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embedding_similarity_equals_spearman_of_unpadded_cosines(build: Any, pooling: Any) -> None:
    model = build(dtype=torch.float64)

    def vector(text: str) -> np.ndarray:
        ids = torch.tensor([row_ids(text)])
        with torch.no_grad():
            if build is bytewise.t5:
                states = model.encoder(ids).last_hidden_state[0].numpy()
            else:
                states = model(ids, output_hidden_states=True).hidden_states[-1][0].numpy()
        return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]

    cosines = []
    for pair in PAIRS:
        a, b = vector(pair.first), vector(pair.second)
        cosines.append(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    found = embedding_similarity(PAIRS, TOKENIZER, pooling=pooling, batch_size=4)(model)
    gold = [pair.score for pair in PAIRS]
    if pooling == "cls" and build in (bytewise.llama, bytewise.gemma3):
        assert float(found) == 0.0  # a causal model's first token has seen nothing but itself
        return
    assert float(found) == pytest.approx(spearmanr(cosines, gold).statistic, abs=1e-12)
    assert found.se is not None
    assert -1 <= float(found) <= 1


# ------------------------------------------------------------- common to all: nothing left behind


def peft_of(base: nn.Module, **options: Any) -> PeftModel:
    specs = {
        name: {"target_modules": ["q_proj", "v_proj"], "seed": i, "lora_dropout": 0.3, **options}
        for i, name in enumerate(("zh", "en"))
    }
    return tiny.add_adapters(base, specs)


CAUSAL_EVALS: dict[str, Any] = {
    "multiple_choice": lambda: multiple_choice(CHOICES, TOKENIZER, batch_size=2),
    "generation": lambda: generation(PROMPTS, TOKENIZER, max_new_tokens=6, batch_size=2),
    "likelihood": lambda: likelihood(PROMPTS, TOKENIZER, batch_size=2),
    "perplexity": lambda: perplexity(PARAGRAPHS, TOKENIZER, max_length=9),
    "embedding_similarity": lambda: embedding_similarity(PAIRS, TOKENIZER, pooling="last"),
}


def told(scores: Any) -> Any:
    if isinstance(scores, dict):
        return {name: told(value) for name, value in scores.items()}
    return scores.tolist() if hasattr(scores, "tolist") else (float(scores), scores.se)


@pytest.mark.parametrize("name", CAUSAL_EVALS)
def test_a_call_leaves_the_model_and_the_process_as_they_were(name: str) -> None:
    model = peft_of(bytewise.llama())
    model.train()
    model.base_model.model.model.layers[0].eval()
    model.base_model.model.generation_config.temperature = 0.7
    model.config.use_cache = True
    generation_config = model.base_model.model.generation_config
    settings = copy.deepcopy(vars(model.config)), copy.deepcopy(vars(generation_config))
    eval_fn = CAUSAL_EVALS[name]()
    before, own = snapshot(model), dict(vars(model.base_model.model))
    first, second = eval_fn(model), eval_fn(model)
    assert told(first) == told(second)
    assert snapshot(model) == before
    assert dict(vars(model.base_model.model)) == own
    assert model.base_model.model.generation_config is generation_config
    assert (vars(model.config), vars(generation_config)) == settings


def test_a_call_that_fails_leaves_the_model_as_it_was() -> None:
    model = peft_of(bytewise.llama())
    model.train()
    before, own = snapshot(model), dict(vars(model.base_model.model))
    eval_fns = [build() for build in CAUSAL_EVALS.values()]
    handle = model.base_model.model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    states = rng_states()
    for eval_fn in eval_fns:
        with pytest.raises(ZeroDivisionError):
            eval_fn(model)
    assert rng_states() == states
    handle.remove()
    assert snapshot(model) == before
    assert dict(vars(model.base_model.model)) == own


@pytest.mark.parametrize("name", CAUSAL_EVALS)
def test_fold_lazy_and_shared_blocks_give_the_same_scores(name: str) -> None:
    model = peft_of(bytewise.llama(torch.float64))
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    metric = "bleu" if name == "generation" else "log_likelihood"
    task = Task("zh", CAUSAL_EVALS[name](), None if name == "embedding_similarity" else metric)
    whole = MergePlan.model_wise(combiner.table(), {"zh": Edit(0.5, 0.9), "en": Edit()})
    last = combiner.layers[-1].label
    plans = [MergePlan.base(), whole.only(last), whole, whole.without(last), whole.solo("en")]
    results = []
    for strategy, cache in (("fold", 0), ("lazy", 0), ("fold", 1 << 28)):
        with Probe(model, combiner, strategy, cache) as probe:
            rows = []
            for plan in plans:
                probe.show(plan)
                score = probe.call(task)
                rows.append((score.value, dict(score.metrics)))
            results.append(rows)
            assert not cache or probe.blocks.skipped > 0
    assert results[0] == results[1] == results[2]
    if name in ("multiple_choice", "likelihood", "perplexity"):
        assert len({value for value, _ in results[0]}) == len(plans)


# -------------------------------------------------------------------------- fingerprints and checks


BUILDERS: dict[str, Any] = {
    **CAUSAL_EVALS,
    "sequence_classification": lambda: sequence_classification(CLASSES, TOKENIZER, LABELS),
    "token_classification": lambda: token_classification(WORDS, TOKENIZER, TAGS),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_an_eval_function_says_what_it_is(name: str) -> None:
    one, again = BUILDERS[name](), BUILDERS[name]()
    assert one.__name__ == name
    assert repr(one).startswith(f"{name}({one.size} rows, ")
    assert eval_digest(one) == eval_digest(again)
    assert eval_digest(one).unseen == ()


def test_fingerprints_differ_where_scores_may() -> None:
    head = {"classifier.weight": WEIGHT, "classifier.bias": BIAS}
    other = {"classifier.weight": WEIGHT + 1, "classifier.bias": BIAS}
    functions = [
        *(build() for build in BUILDERS.values()),
        multiple_choice(CHOICES[:2], TOKENIZER, batch_size=2),
        multiple_choice(CHOICES[::-1], TOKENIZER, batch_size=2),
        multiple_choice(CHOICES, TOKENIZER, batch_size=2, normalize="bytes"),
        generation(PROMPTS, TOKENIZER, max_new_tokens=7, batch_size=2),
        generation(PROMPTS, TOKENIZER, max_new_tokens=6, batch_size=2, stop=["."]),
        generation(PROMPTS, TOKENIZER, max_new_tokens=6, batch_size=2, stemmer=True),
        generation(PROMPTS, TOKENIZER, max_new_tokens=6, batch_size=2, lang="zh"),
        likelihood(PROMPTS[:2], TOKENIZER, batch_size=2),
        likelihood(PROMPTS, TOKENIZER, batch_size=2, max_references=1),
        likelihood(PROMPTS, TOKENIZER, batch_size=2, separator=""),
        likelihood(PROMPTS, TOKENIZER, batch_size=2, with_end=True),
        perplexity(PARAGRAPHS, TOKENIZER, max_length=10),
        embedding_similarity(PAIRS, TOKENIZER, pooling="mean"),
        embedding_similarity(PAIRS[:4], TOKENIZER, pooling="last"),
        sequence_classification(CLASSES, TOKENIZER, LABELS[::-1]),
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=head),
        sequence_classification(CLASSES, TOKENIZER, LABELS, head=other),
        token_classification(WORDS, TOKENIZER, TAGS, outside="O"),
    ]
    assert len({fn.fingerprint for fn in functions}) == len(functions)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: multiple_choice(CHOICES, TOKENIZER, normalize="byte"), "Did you mean 'bytes'"),
        (lambda: multiple_choice(CHOICES, TOKENIZER, batch_size=True), "batch_size"),
        (lambda: multiple_choice(PROMPTS, TOKENIZER), "row 1 is a GenerationRow"),
        (lambda: generation([], TOKENIZER), "at least one row"),
        (lambda: generation(PROMPTS, TOKENIZER, stop="x"), "stop must be a list"),
        (lambda: generation(PROMPTS, TOKENIZER, stop=[""]), "stop must be a list"),
        (lambda: generation(PROMPTS, TOKENIZER, max_new_tokens=0), "max_new_tokens"),
        (lambda: likelihood([], TOKENIZER), "at least one row"),
        (lambda: likelihood(PROMPTS, TOKENIZER, max_references=0), "max_references"),
        (lambda: perplexity("one text", TOKENIZER), "put it in brackets"),
        (lambda: perplexity([""], TOKENIZER), "fewer than two tokens"),
        (lambda: perplexity(PARAGRAPHS, TOKENIZER, max_length=1), "at least 2"),
        (lambda: perplexity(PARAGRAPHS, TOKENIZER, max_rows=0), "max_rows"),
        (lambda: sequence_classification(CLASSES, TOKENIZER), "labels= was not given"),
        (lambda: sequence_classification(CLASSES, TOKENIZER, ["neg", "pos"]), "row 3.*'none'"),
        (lambda: sequence_classification(CLASSES, TOKENIZER, "np"), "two or more different names"),
        (lambda: sequence_classification(CLASSES, TOKENIZER, ["a", "a"]), "different names"),
        (
            lambda: sequence_classification([ClassificationRow("x", 3)], TOKENIZER, LABELS),
            "label 3, but there are 3",
        ),
        (lambda: token_classification(WORDS, TOKENIZER, TAGS, max_length=4), "more than max_len"),
        (lambda: token_classification(WORDS, TOKENIZER, TAGS, outside="B"), "'B' is not known"),
        (lambda: embedding_similarity(PAIRS, TOKENIZER, pooling="max"), "pooling"),
        (lambda: embedding_similarity(PAIRS[:1], TOKENIZER), "different scores"),
        (lambda: embedding_similarity([PAIRS[0], PAIRS[3]], TOKENIZER), "different scores"),
        (lambda: GenerationRow("", ("a",)), "needs a prompt"),
        (lambda: GenerationRow("p", ()), "references must be"),
        (lambda: GenerationRow("p", ("a", " ")), "references must be"),
        (lambda: ClassificationRow("", 1), "needs a text"),
        (lambda: ClassificationRow("x", True), "a label must be"),
        (lambda: ClassificationRow("x", -1), "a label must be"),
        (lambda: ClassificationRow("x", -100), "for words only"),
        (lambda: TokenRow((), ()), "needs words"),
        (lambda: TokenRow(("a", "b"), (1,)), "a label per word"),
        (lambda: TokenRow(("a", "b"), (-100, -100)), "no word is scored"),
        (lambda: PairRow("a", "", 1), "two texts"),
        (lambda: PairRow("a", "b", math.nan), "finite"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_seen(build: Any, text: str) -> None:
    with pytest.raises((ConfigError, EvalRowError), match=text):
        build()
