"""Recipes with methods that run the model on examples: the rows become the right batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bytewise
import pytest
import torch
import workshop
from typer.testing import CliRunner

from peft_himerge import list_methods, merge_adapters
from peft_himerge.cli import app
from peft_himerge.errors import ConfigError
from peft_himerge.folders import load_peft_model
from peft_himerge.recipe import examine, read_recipe, run_recipe
from peft_himerge.recipe.inputs import reads_labels

RECIPE = workshop.RECIPES / "two_tasks.yaml"
TOKENIZER = bytewise.tokenizer()
PAIR = ["en", "zh"]
LEARNED = [info for info in list_methods() if info.needs in ("inputs", "gradients")]
# Enough to see that a step was made.
FEW: dict[str, dict[str, Any]] = {
    "adamerging": {"steps": 2},
    "atlas": {"epochs": 1},
    "fw_merging": {"steps": 2},
    "expert_merging": {"epochs": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    workshop.furnish(folder, "two_tasks.yaml", rows=5)
    workshop.write(folder / "texts.jsonl", workshop.texts(8, 3))
    return folder


def model_of(root: Path) -> Any:
    folders = {name: root / "adapters" / name for name in PAIR}
    return load_peft_model(root / "models" / "base", folders)[0]


def changes(root: Path, out: Path, method: str, *more: str) -> list[str]:
    options = json.dumps(FEW.get(method, {}))
    given = [*workshop.pointed(root, "two_tasks.yaml"), f"out={out}", "rank=exact"]
    return [*given, f"method={method}", f"options={options}", *more]


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def by_hand(root: Path, name: str, size: int, labelled: bool) -> list[dict[str, torch.Tensor]]:
    """Batches of `size` rows, from the file: byte by byte, as this tokenizer reads."""
    found = []
    lines = (root / "data" / f"{name}.validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for start in range(0, len(rows), size):
        ids, labels = [], []
        for row in rows[start : start + size]:
            prompt = TOKENIZER(row["prompt"])["input_ids"]
            whole = TOKENIZER(row["prompt"] + row["choices"][row["answer"]])["input_ids"]
            ids.append(whole if labelled else prompt)
            labels.append([-100] * len(prompt) + whole[len(prompt) :])
        batch = {
            "input_ids": padded(ids, bytewise.PAD),
            "attention_mask": padded([[1] * len(one) for one in ids], 0),
        }
        found.append(batch | ({"labels": padded(labels, -100)} if labelled else {}))
    return found


@pytest.mark.parametrize("method", [info.name for info in LEARNED])
def test_a_method_that_learns_is_what_python_would_do(
    method: str, root: Path, tmp_path: Path
) -> None:
    sizes = [f"tasks.{name}.batch_size=2" for name in PAIR]
    found = examine(read_recipe(RECIPE, changes(root, tmp_path / "out", method, *sizes)))
    assert not found.faults
    labelled = reads_labels(method, {})
    told = {look.key: look.found for look in found.looks}
    word = "with" if labelled else "without"
    assert told["tasks.en.validation"] == f"5 rows as inputs, {word} labels"
    done = run_recipe(found)
    inputs = {name: by_hand(root, name, 2, labelled) for name in PAIR}
    options = FEW.get(method, {})
    wanted = merge_adapters(model_of(root), PAIR, method, inputs=inputs, rank="exact", **options)
    assert done.result.fitted == wanted.fitted
    assert done.result.fitted["examples"] == {"en": 5, "zh": 5}
    for record in wanted.modules:
        assert torch.equal(done.result.delta(record.module), wanted.delta(record.module))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "on examples of the tasks." in card
    assert "without training or training data" not in card
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What was learned" in page


def test_what_reads_labels_is_known_of_every_method(root: Path) -> None:
    model = model_of(root)
    inputs = {name: by_hand(root, name, 5, False) for name in PAIR}
    cases = [(info.name, FEW.get(info.name, {})) for info in LEARNED]
    cases += [("fisher", {"labels": "given"}), ("fw_merging", {"steps": 1, "loss": "entropy"})]
    asked = {}
    for method, options in cases:
        told = ""
        try:
            merge_adapters(model, PAIR, method, inputs=inputs, overwrite=True, **options)
        except ConfigError as exc:
            told = str(exc)
        asked[(method, *options)] = told.partition(",")[0].endswith("needs labels")
        assert asked[(method, *options)] or not told, told
    assert asked == {(m, *options): reads_labels(m, options) for m, options in cases}


def test_texts_are_cut_and_are_their_own_labels(root: Path, tmp_path: Path) -> None:
    text = f"{{kind: perplexity, validation: {root}/texts.jsonl, max_length: 6}}"
    given = changes(root, tmp_path, "atlas", f"tasks={{en: {text}, zh: {text}}}")
    (batch,) = examine(read_recipe(RECIPE, given)).inputs["en"].batches
    rows = [TOKENIZER(row["text"])["input_ids"][:6] for row in workshop.texts(8, 3)]
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == rows


def test_prompts_of_generation_are_inputs_without_labels(root: Path, tmp_path: Path) -> None:
    workshop.write(root / "say.jsonl", workshop.answers(8, 3))
    task = f"{{kind: generation, validation: {root}/say.jsonl}}"
    given = changes(root, tmp_path, "regmean", f"tasks={{en: {task}, zh: {task}}}")
    (batch,) = examine(read_recipe(RECIPE, given)).inputs["zh"].batches
    rows = [TOKENIZER(row["prompt"])["input_ids"] for row in workshop.answers(8, 3)]
    assert batch["input_ids"].tolist() == padded(rows, bytewise.PAD).tolist()
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_command_line_plans_and_warns(root: Path, tmp_path: Path) -> None:
    given = changes(root, tmp_path / "out", "regmean", "tasks.en.max_rows=3")
    given.append(f"tasks.zh.test={root}/data/zh.validation.jsonl")
    flags = [part for change in given for part in ("--set", change)]
    plan = CliRunner().invoke(app, ["plan", str(RECIPE), *flags])
    assert plan.exit_code == 0, plan.output
    assert "no score decides this merge; it runs the model on 8 rows" in plan.output
    validated = CliRunner().invoke(app, ["validate", str(RECIPE), *flags])
    assert validated.exit_code == 0, validated.output
    (look,) = examine(read_recipe(RECIPE, given)).warnings
    assert "5 of 5 test rows are also validation rows" in look.found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("tasks.en.batch_size=0", "batch_size must be a whole number, at least 1"),
        ("tasks.en.validation=none.jsonl", "there is no file"),
    ],
)
def test_rows_that_cannot_be_inputs_are_told(
    change: str, text: str, root: Path, tmp_path: Path
) -> None:
    given = changes(root, tmp_path, "regmean", change)
    (fault,) = [
        f for f in examine(read_recipe(RECIPE, given)).faults if f.key == "tasks.en.validation"
    ]
    assert text in fault.what
