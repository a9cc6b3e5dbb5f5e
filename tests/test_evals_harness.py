"""lm-evaluation-harness in process: its numbers, per document, and nothing left behind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import bytewise
import pytest
import tiny
import torch
from snapshot import rng_states, snapshot

from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.errors import ConfigError
from peft_himerge.evals import (
    MultipleChoiceRow,
    lm_eval_task,
    multiple_choice,
)
from peft_himerge.identity import eval_digest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TOKENIZER = bytewise.tokenizer()
ROWS = [
    {"question": "a long question?", "choices": ["yes", "no", "maybe so"], "answer": 2},
    {"question": "q?", "choices": ["x", "yz"], "answer": 0},
    {"question": "one more?", "choices": ["A", "B", "C"], "answer": 1},
    {"question": "and another one?", "choices": ["who", "what"], "answer": 1},
    {"question": "the last?", "choices": ["it is", "it is not"], "answer": 0},
]
CHOICE = """
task: himerge_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
WRITE = """
task: himerge_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""
ROLL = """
task: himerge_roll
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""
GROUP = "group: himerge_all\ntask: [himerge_choice, himerge_other]\n"


def task_file(
    folder: Path, template: str, rows: list[dict[str, Any]] | None = None, name: str = "task"
) -> Path:
    data = folder / f"{name}.jsonl"
    lines = (
        (json.dumps(row) for row in ROWS if rows is None) if rows is None else map(json.dumps, rows)
    )
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(template.format(rows=data, cache=folder / "cache"), encoding="utf-8")
    return file


def adapted() -> Any:
    specs = {
        n: {"target_modules": ["q_proj", "v_proj"], "seed": i} for i, n in enumerate(("zh", "en"))
    }
    return tiny.add_adapters(bytewise.llama(), specs)


def as_rows(rows: list[dict[str, Any]]) -> list[MultipleChoiceRow]:
    return [
        MultipleChoiceRow(r["question"], tuple(f" {c}" for c in r["choices"]), r["answer"])
        for r in rows
    ]


def test_multiple_choice_gives_the_same_as_our_own(tmp_path: Path) -> None:
    model = adapted()
    task = lm_eval_task(task_file(tmp_path, CHOICE), TOKENIZER, batch_size=2)
    found = task(model)
    ours = multiple_choice(as_rows(ROWS), TOKENIZER)(model)["accuracy"].tolist()
    assert found["acc"] == ours
    # The harness normalises by the characters of a choice without the space before it.
    assert len(found["acc_norm"]) == len(ROWS)
    assert set(found["acc"]) == {0.0, 1.0}
    assert task.size == 5
    assert lm_eval_task(task_file(tmp_path, CHOICE), TOKENIZER, limit=2)(model)["acc"] == ours[:2]


def test_generation_gives_the_same_as_our_own(tmp_path: Path) -> None:
    model = bytewise.llama()
    questions = [str(row["question"]) for row in ROWS]
    texts = []
    for question in questions:
        ids = TOKENIZER(question, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        texts.append(TOKENIZER.decode(answer, skip_special_tokens=True).split("\n")[0])
    rows = [{"question": q, "target": t} for q, t in zip(questions, texts, strict=True)]
    rows[1]["target"] = "something else"
    found = lm_eval_task(task_file(tmp_path, WRITE, rows), TOKENIZER)(model)
    assert found == {"exact_match": [1.0, 0.0, 1.0, 1.0, 1.0]}


def test_a_metric_that_is_no_mean_or_gets_better_downwards_is_one_negated_number(
    tmp_path: Path,
) -> None:
    model = bytewise.llama()
    found = lm_eval_task(task_file(tmp_path, ROLL), TOKENIZER)(model)
    assert set(found) == {"negative_word_perplexity", "negative_bits_per_byte"}
    total, size = 0.0, 0
    for row in ROWS:
        # The harness puts a start token before a text that has one already, and predicts that too.
        ids = [bytewise.BOS, *TOKENIZER(row["question"])["input_ids"]]
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(float(table[k - 1, ids[k]]) for k in range(1, len(ids)))
        size += len(str(row["question"]).encode())
    assert found["negative_bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_tasks_of_a_group_are_one_list(tmp_path: Path) -> None:
    model = bytewise.llama()
    task_file(tmp_path, CHOICE)
    other = CHOICE.replace("himerge_choice", "himerge_other")
    task_file(tmp_path, other, ROWS[:2], name="other")
    (tmp_path / "group.yaml").write_text(GROUP, encoding="utf-8")
    ours = multiple_choice(as_rows([*ROWS, *ROWS[:2]]), TOKENIZER)(model)["accuracy"].tolist()
    found = lm_eval_task("himerge_all", TOKENIZER, include_path=tmp_path)
    assert found(model)["acc"] == ours
    assert found.size == 7


def test_a_call_leaves_the_model_and_the_process_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = adapted()
    inner = model.base_model.model
    model.train()
    inner.generation_config.temperature = 0.7
    inner.lm_head.weight = torch.nn.Parameter(
        inner.lm_head.weight.clone()
    )  # not tied, and to stay so
    model.config.tie_word_embeddings = True
    tokenizer = bytewise.tokenizer.__wrapped__()
    tokenizer.pad_token = None
    vocabulary = tokenizer.get_vocab()
    state, level = rng_states(), logging.getLogger("lm_eval").level
    rows = [{"question": row["question"], "target": "x"} for row in ROWS]
    tasks = [
        lm_eval_task(task_file(tmp_path, CHOICE), tokenizer, num_fewshot=2),
        lm_eval_task(task_file(tmp_path, WRITE, rows, name="write"), tokenizer),
    ]
    assert rng_states() == state
    before, own, config = snapshot(model), dict(vars(inner)), dict(vars(model.config))
    capfd.readouterr()
    for task in tasks:
        assert task(model) == task(model)
    assert "it/s" not in capfd.readouterr().err  # no progress bars of the harness
    assert snapshot(model) == before
    assert dict(vars(inner)) == own
    assert dict(vars(model.config)) == config
    assert (tokenizer.pad_token, tokenizer.get_vocab()) == (None, vocabulary)
    assert logging.getLogger("lm_eval").level == level
    inner.model.norm.register_forward_hook(lambda *_: 1 / 0)
    for task in tasks:
        with pytest.raises(ZeroDivisionError):
            task(model)
    assert rng_states() == state
    assert dict(vars(inner)) == own


def test_a_task_serves_a_merge(tmp_path: Path) -> None:
    model = adapted()
    task = lm_eval_task(task_file(tmp_path, CHOICE), TOKENIZER)
    own = multiple_choice(as_rows(ROWS), TOKENIZER)
    metric = {"zh": "acc", "en": "log_likelihood"}
    config = HiMergeConfig(density=0.5, scale=1.0, metric=metric, max_export_drop=None)
    result = merge_adapters_hi(model, ["zh", "en"], {"zh": task, "en": own}, config=config)
    for state, row in result.states.items():
        assert row["zh"].examples.shape == (5,), state
    alone = result.states["zh"]["zh"]
    model.set_adapter("zh")
    assert alone.examples.tolist() == task(model)["acc"]


def test_fingerprints_differ_where_scores_may(tmp_path: Path) -> None:
    file = task_file(tmp_path, CHOICE)
    other = task_file(tmp_path, CHOICE, ROWS[::-1], name="other")
    tasks = [
        lm_eval_task(file, TOKENIZER),
        lm_eval_task(file, TOKENIZER, limit=3),
        lm_eval_task(file, TOKENIZER, num_fewshot=1),
        lm_eval_task(file, TOKENIZER, num_fewshot=1, seed=5),
        lm_eval_task(file, TOKENIZER, batch_size=4),
        lm_eval_task(other, TOKENIZER),
    ]
    assert len({task.fingerprint for task in tasks}) == len(tasks)
    assert eval_digest(tasks[0]) == eval_digest(lm_eval_task(file, TOKENIZER))
    assert eval_digest(tasks[0]).unseen == ()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": "auto"}, "is refused"),
        ({"batch_size": "auto:4"}, "is refused"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"limit": 0.5}, "limit must be"),
        ({"num_fewshot": -1}, "num_fewshot"),
        ({"unsafe_code": 1}, "unsafe_code"),
        ({"include_path": "nowhere"}, "is not a folder"),
        ({"task": "absent.yaml"}, "is not there"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    given = {"task": task_file(tmp_path, CHOICE), **arguments}
    with pytest.raises(ConfigError, match=text):
        lm_eval_task(given.pop("task"), TOKENIZER, **given)
