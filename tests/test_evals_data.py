"""Rows from files, and the user's own eval functions: what loads, and what errors name."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from peft_himerge.errors import ConfigError, HiMergeError
from peft_himerge.evals import (
    ClassificationRow,
    EvalRowError,
    GenerationRow,
    MultipleChoiceRow,
    PairRow,
    TokenRow,
    load_evals,
    load_rows,
)

CHOICE: list[dict[str, Any]] = [
    {
        "prompt": "What is the sentiment?\nfine .\nOptions:\nA. negative\nB. positive\nAnswer:",
        "choices": [" A", " B"], "answer": 1, "options": ["negative", "positive"], "lang": "en",
    },
    {
        "prompt": "这条新闻标题属于哪个类别？\n男子无牌新车出事故\n答案：",
        "choices": ["A", "B", "C"], "answer": 2, "options": ["财经", "房产", "社会"], "lang": "zh",
    },
]  # fmt: skip
WRITTEN: list[dict[str, Any]] = [
    {"prompt": "name[Cocum]\nDescription:", "references": ["Cocum is a pub.", "A pub, Cocum."]},
    {"prompt": "name[Cotto]\nDescription:", "references": ["Cotto is a pub."]},
]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "validation.jsonl", CHOICE)
    jsonl(tmp_path / "test.jsonl", CHOICE[::-1])
    return tmp_path


def test_rows_of_a_file_and_of_a_folder_s_split(folder: Path) -> None:
    expected = [MultipleChoiceRow(**record) for record in CHOICE]
    assert load_rows(folder / "validation.jsonl", "multiple_choice") == expected
    assert load_rows(str(folder), "multiple_choice") == expected
    assert load_rows(folder, "multiple_choice", split="test") == expected[::-1]
    assert load_rows(folder, "multiple_choice", limit=1) == expected[:1]
    assert load_rows(folder, "multiple_choice", limit=9) == expected


def test_parquet_and_json_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    expected = [MultipleChoiceRow(**record) for record in CHOICE]
    datasets.Dataset.from_list(CHOICE).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(CHOICE), encoding="utf-8")
    flat = [
        {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
        for record in CHOICE
    ]
    table = datasets.Dataset.from_list(flat)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    for suffix in ("parquet", "json", "csv", "tsv"):
        assert load_rows(tmp_path / f"rows.{suffix}", "multiple_choice") == expected


def test_generation_rows_with_one_or_several_references(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", WRITTEN)
    rows = load_rows(file, "generation")
    assert rows == [GenerationRow(r["prompt"], tuple(r["references"])) for r in WRITTEN]
    training = [
        {"prompt": r["prompt"], "target": r["references"][0], "lang": "en"} for r in WRITTEN
    ]
    file = jsonl(tmp_path / "train.jsonl", training)
    rows = load_rows(file, "generation", columns={"references": "target"})
    assert rows[0] == GenerationRow(WRITTEN[0]["prompt"], ("Cocum is a pub.",), "en")
    (tmp_path / "rows.csv").write_text('prompt,references\np,one\nq,"[""a"", ""b""]"\n')
    rows = load_rows(tmp_path / "rows.csv", "generation")
    assert [row.references for row in rows] == [("one",), ("a", "b")]


def test_rows_of_the_other_kinds(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "texts.jsonl", [{"text": "one", "source": 3}, {"text": "NA"}])
    assert load_rows(file, "perplexity") == ["one", "NA"]
    (tmp_path / "classes.csv").write_text("sentence,label,second\nNone,1,\nNA,0,and more\n")
    rows = load_rows(
        tmp_path / "classes.csv", "sequence_classification", columns={"text": "sentence"}
    )
    assert rows == [ClassificationRow("None", 1), ClassificationRow("NA", 0, "and more")]
    file = jsonl(tmp_path / "words.jsonl", [{"words": ["a", "b"], "labels": [0, -100]}])
    assert load_rows(file, "token_classification") == [TokenRow(("a", "b"), (0, -100))]
    file = jsonl(tmp_path / "named.jsonl", [{"words": ["a", "b"], "labels": ["O", "PER"]}])
    assert load_rows(file, "token_classification") == [TokenRow(("a", "b"), ("O", "PER"))]
    file = jsonl(tmp_path / "pairs.jsonl", [{"first": "a", "second": "b", "score": 2.5}])
    assert load_rows(file, "embedding_similarity") == [PairRow("a", "b", 2.5)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": None}, r"row 2: the column 'prompt' is empty"),
        ({"prompt": ""}, r"row 2, columns 'prompt', .*needs a prompt"),
        ({"answer": 9}, r"row 2, columns .*index into the 3 choices, got 9"),
        ({"choices": ["A"]}, r"row 2, columns .*two or more different choices"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, change: Any, text: str) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [CHOICE[0], CHOICE[1] | change])
    with pytest.raises(EvalRowError, match=rf"(?s)rows\.jsonl, {text}"):
        load_rows(file, "multiple_choice")


@pytest.mark.parametrize(
    ("kind", "record", "text"),
    [
        ("multiple_choice", {"question": "q"}, r"no column 'prompt'. Columns: question.*columns="),
        ("multiple_choice", {"prompt": 3, "choices": ["a", "b"], "answer": 0}, "expected str"),
        (
            "multiple_choice",
            {"prompt": "p", "choices": "ab", "answer": 0},
            "expected a list of str",
        ),
        ("multiple_choice", {"prompt": "p", "choices": ["a", "b"], "answer": "b"}, "expected int"),
        ("multiple_choice", {"prompt": "p", "choices": ["a", "b"], "answer": True}, "expected int"),
        ("generation", {"prompt": "p", "references": [1]}, "column 'references': expected a list"),
        ("sequence_classification", {"text": "t", "label": 0.5}, "expected int or str"),
        (
            "token_classification",
            {"words": ["a"], "labels": [0.5]},
            "expected a list of int or str",
        ),
        ("embedding_similarity", {"first": "a", "second": "b", "score": "x"}, "expected int or fl"),
        ("perplexity", {"text": ["t"]}, "column 'text': expected str"),
    ],
)
def test_a_cell_of_another_type_is_named(
    tmp_path: Path, kind: str, record: dict[str, Any], text: str
) -> None:
    with pytest.raises(EvalRowError, match=rf"rows\.jsonl, row 1.*{text}"):
        load_rows(jsonl(tmp_path / "rows.jsonl", [record]), kind)


# datasets leaves a CSV file open that it has not read to the end.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_list_in_a_csv_file_is_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,choices,answer\np,a or b,0\n", encoding="utf-8")
    with pytest.raises(EvalRowError, match=r"rows\.csv, row 1.*expected a list as JSON, got 'a or"):
        load_rows(file, "multiple_choice")
    file.write_text('prompt,references\np,[a\nq,"[""a"", ""b""]"\n', encoding="utf-8")
    with pytest.raises(EvalRowError, match=r"row 1.*expected a list as JSON, got '\[a'"):
        load_rows(file, "generation")
    gc.collect()
    file.write_text('prompt,references\np,a\nq,"[""a"", ""b""]"\n', encoding="utf-8")
    assert [row.references for row in load_rows(file, "generation")] == [("a",), ("a", "b")]


def test_wrong_calls_are_refused(folder: Path) -> None:
    for arguments, text in (
        ((folder, "multiple-choice"), "Did you mean 'multiple_choice'"),
        ((folder / "absent.jsonl", "perplexity"), "no file or folder"),
        ((str(folder / "absent.jsonl"), "perplexity"), "no file or folder"),
        (("./absent", "perplexity"), "no file or folder"),
        ((Path("absent"), "perplexity"), "no file or folder"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_rows(*arguments)
    with pytest.raises(ConfigError, match=r"one file for the split 'train', found 0.*test\.jsonl"):
        load_rows(folder, "multiple_choice", split="train")
    with pytest.raises(ConfigError, match=r"no field 'answr'\. Did you mean 'answer'"):
        load_rows(folder, "multiple_choice", columns={"answr": "x"})
    with pytest.raises(EvalRowError, match="no column 'opts'"):
        load_rows(folder, "multiple_choice", columns={"options": "opts"})
    with pytest.raises(ConfigError, match="limit"):
        load_rows(folder, "multiple_choice", limit=0)
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be read. Allowed: \.jsonl"):
        load_rows(folder / "notes.txt", "perplexity")


def test_a_damaged_file_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl: could not be read: .+"):
        load_rows(tmp_path / "rows.jsonl", "perplexity")
    for suffix in ("jsonl", "json", "csv"):
        (tmp_path / f"empty.{suffix}").write_text("\n" if suffix == "csv" else "")
        with pytest.raises(HiMergeError, match=rf"empty\.{suffix}"):
            load_rows(tmp_path / f"empty.{suffix}", "perplexity")


def test_only_a_name_that_is_no_path_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("owner/name", "perplexity", split="test", subset="small") == ["one"]
    assert asked == [("owner/name", {"split": "test", "name": "small"})]


def test_a_data_set_that_is_not_on_this_machine_is_named() -> None:
    with pytest.raises(ConfigError, match="nobody/nothing-of-the-kind: could not be read"):
        load_rows("nobody/nothing-of-the-kind", "perplexity")


# ------------------------------------------------------------------------- the user's own functions


def test_evals_of_a_file_by_function_or_table(tmp_path: Path) -> None:
    file = tmp_path / "my_evals.py"
    file.write_text("def eval_fns(tokenizer):\n    return {'en': lambda model: tokenizer}\n")
    assert load_evals(file)("t")["en"](None) == "t"
    file.write_text("eval_fns = {'en': lambda model: 0.5}\n")
    assert load_evals(str(file))("t")["en"](None) == 0.5


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("absent.py", None, "is not a file"),
        ("evals.txt", "x = 1", "is not a Python file"),
        ("evals.py", "x = 1", r"defines no eval_fns\(tokenizer\)"),
        ("evals.py", "eval_fns = 3", r"defines no eval_fns\(tokenizer\)"),
    ],
)
def test_a_file_without_evals_is_refused(
    tmp_path: Path, name: str, code: str | None, text: str
) -> None:
    if code is not None:
        (tmp_path / name).write_text(code)
    with pytest.raises(ConfigError, match=text):
        load_evals(tmp_path / name)


# ----------------------------------------------------------------------------------- the front door

PROBE = """
import sys
EXTRAS = {"datasets", "evaluate", "sacrebleu", "rouge_score", "scipy", "lm_eval"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ImportError(name)
import peft, transformers  # what these load by themselves is not ours to judge
sys.meta_path.insert(0, Absent())
for name in [m for m in sys.modules if m.split(".")[0] in EXTRAS]:
    del sys.modules[name]
import peft_himerge.evals as evals
from peft_himerge.errors import MissingExtraError
class Words:
    pad_token_id = eos_token_id = 0
    def __call__(self, *texts, **options):
        return {"input_ids": [1, 2]}
row = evals.GenerationRow("p", ("r",))
pairs = [evals.PairRow("a", "b", 1), evals.PairRow("a", "c", 2)]
for call in (
    lambda: evals.Bleu,
    lambda: evals.generation([row], Words()),
    lambda: evals.embedding_similarity(pairs, Words()),
    lambda: evals.lm_eval_task("arc_easy", Words()),
    lambda: evals.load_rows(sys.argv[1], "perplexity"),
):
    try:
        call()
    except MissingExtraError as exc:
        print(exc)
"""


def test_without_the_extras_every_function_says_what_to_install(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert sum("pip install 'peft-himerge[evals]'" in line for line in lines) == 4
    assert "pip install 'peft-himerge[lm-eval]'" in lines[3]
