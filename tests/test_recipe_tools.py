"""Recipes with the real tools behind them, from the command line: W&B, lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb_records
import workshop

from peft_himerge.cli import main
from peft_himerge.page import read_report

RECIPES = workshop.RECIPES
FIXED = ["options.density=0.5", "options.scale=0.9", "options.max_export_drop=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a tiny base model, two adapters and data; and the recipe's copy."""
    root = tmp_path_factory.mktemp("tools")
    workshop.furnish(root, "two_tasks.yaml", rows=4)
    for name in ("two_tasks.yaml", "drop_in_ties.yaml"):
        (root / name).write_text((RECIPES / name).read_text(encoding="utf-8"), encoding="utf-8")
    return root


@pytest.fixture
def himerge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that calls the command line, and its exit code."""

    def call(*args: object, sets: list[str] | None = None) -> int:
        flags = [part for change in sets or [] for part in ("--set", change)]
        monkeypatch.setattr(sys, "argv", ["himerge", *map(str, args), *flags])
        try:
            main()
        except SystemExit as exc:
            return int(exc.code or 0)
        raise AssertionError("the command line always exits")

    return call


# -------------------------------------------------------------------------------------- W&B


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for an offline run; W&B is shut down afterwards, so that nothing is in flight."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    wandb.teardown()
    yield tmp_path
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def read_back(place: Path) -> wandb_records.RunFile:
    import wandb

    assert wandb.run is None  # the recipe's run was the recipe's to finish
    wandb.teardown()
    return wandb_records.read_run(place)


def test_a_recipe_s_run_in_wandb_holds_config_table_and_final_scores(
    folder: Path, offline: Path, himerge: Callable[..., int]
) -> None:
    out = offline / "out"
    sets = [*FIXED, "tracking={to: wandb, project: merging, run: first}"]
    assert himerge("merge", folder / "two_tasks.yaml", "--out", out, sets=sets) == 0
    found = read_back(offline)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    # What the merge was told: the recipe as it stands, and every option with its default.
    told = found.config["recipe"]
    assert told["adapters"] == {"en": "adapters/en", "zh": "adapters/zh"}
    assert told["options"]["density"] == 0.5
    assert "tracking" not in told
    assert found.config["himerge"]["options"] == report["options"]
    assert found.config["himerge"]["adapters"] == report["plan"]["sources"]
    # What was measured, cell by cell.
    (entry,) = found.values("himerge/contributions")
    table = wandb_records.table(offline, entry)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == len(report["contributions"])
    for row, want in zip(rows, report["contributions"], strict=True):
        assert (row["layer"], row["task"]) == (want["layer"], want["task"])
        assert row["gamma"] == pytest.approx(want["gamma"], abs=1e-12)
    # What came out: on validation data, and on test data, of which there is a table too.
    for task in ("en", "zh"):
        assert found.summary[f"himerge/merged/{task}"] == report["scores"]["exported"][task]
        for state, name in (("base", "base"), ("alone", task), ("merged", "merged")):
            want = report["test"]["scores"][name][task]
            assert found.summary[f"himerge/test/{state}/{task}"] == want
            assert found.values(f"himerge/test/{state}/{task}") == [want]
    assert found.summary.get("himerge/test/kept") == report["test"]["kept"]
    (entry,) = found.values("himerge/test_scores")
    table = wandb_records.table(offline, entry)
    assert [row[:2] for row in table["data"]] == [
        [state, task] for state in ("base", "en", "zh", "merged") for task in ("en", "zh")
    ]
    for state, task, score, se in table["data"]:
        assert score == pytest.approx(report["test"]["scores"][state][task])
        assert se == pytest.approx(report["test"]["standard_errors"][state][task])
    # The artifact is the folder as the user finds it, the test table and the recipe included.
    (adapter,) = [a for a in found.artifacts if a.type == "model"]
    held = {entry.path: entry.size for entry in adapter.manifest.contents}
    assert {"adapter_model.safetensors", "plan.json", "recipe.yaml"} <= set(held)
    assert held["report.json"] == (out / "report.json").stat().st_size
    assert found.exits == 1


@pytest.mark.parametrize(
    ("recipe", "sets"),
    [
        ("drop_in_ties.yaml", ["rank=8"]),
        ("two_tasks.yaml", ["tasks.en.validation=null", "tasks.zh.validation=null", *FIXED[:2]]),
    ],
)
def test_a_merge_that_looks_at_no_score_tells_wandb_its_test_scores(
    recipe: str, sets: list[str], folder: Path, offline: Path, himerge: Callable[..., int]
) -> None:
    out = offline / "out"
    told = [*sets, "tracking={to: wandb, project: merging, run: plain}"]
    assert himerge("merge", folder / recipe, "--out", out, sets=told) == 0
    found = read_back(offline)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found.config["recipe"]["adapters"] == {"en": "adapters/en", "zh": "adapters/zh"}
    assert found.config["recipe"].get("method") == ("ties" if "ties" in recipe else None)
    scores = report["test"]["scores"]
    for task in ("en", "zh"):
        assert found.values(f"himerge/test/merged/{task}") == [scores["merged"][task]]
    mean = sum(scores["merged"].values()) / 2
    assert found.summary["himerge/test/score"] == pytest.approx(mean, abs=1e-12)
    (entry,) = found.values("himerge/test_scores")
    assert len(wandb_records.table(offline, entry)["data"]) == 8
    (adapter,) = [a for a in found.artifacts if a.type == "model"]
    held = {entry.path: entry.size for entry in adapter.manifest.contents}
    assert held["report.json"] == (out / "report.json").stat().st_size
    assert "plan.json" in held or "ties" in recipe
    assert (found.exits, found.exit_codes) == (1, [0])


def test_a_run_of_a_merge_that_failed_is_told_to_have_failed(
    folder: Path, offline: Path, himerge: Callable[..., int]
) -> None:
    sets = [*FIXED, "tracking=wandb", "budget.seconds=1e-9"]
    out = offline / "out"
    assert himerge("merge", folder / "two_tasks.yaml", "--out", out, sets=sets) == 1
    found = read_back(offline)
    assert found.exit_codes == [1]
    assert found.config["recipe"]["budget"] == {"seconds": 1e-9}
    assert not out.exists()


# ------------------------------------------------------------------------- lm-evaluation-harness


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Path:
    """A folder with lm-evaluation-harness tasks on the recipe's own rows."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    place = folder / "harness"
    place.mkdir()
    for name in ("en", "zh"):
        for split in ("validation", "test"):
            told = {
                "name": f"own_{name}_{split}",
                "rows": folder / "data" / f"{name}.{split}.jsonl",
                "cache": folder / "cache",
            }
            (place / f"{name}_{split}.yaml").write_text(CHOICE.format(**told), encoding="utf-8")
    return place


def harness_tasks(*names: str) -> list[str]:
    found = []
    for name in names:
        told = f"validation: own_{name}_validation, test: own_{name}_test, metric: acc"
        found.append(f"tasks.{name}={{kind: lm_eval_task, batch_size: 2, {told}}}")
    return found


def test_harness_tasks_of_the_user_s_own_decide_a_merge_and_test_it(
    folder: Path, tasks: Path, tmp_path: Path, himerge: Callable[..., int]
) -> None:
    own = [folder / "two_tasks.yaml", "--include-path", tasks]
    sets = [*FIXED, *harness_tasks("en", "zh")]
    assert himerge("validate", *own, sets=sets) == 0
    assert himerge("plan", *own, sets=sets) == 0
    assert himerge("merge", *own, "--out", tmp_path / "a", sets=sets) == 0
    # Our own eval function on the same rows is the oracle: the same choices win.
    mine = [f"tasks.{n}.metric=accuracy" for n in ("en", "zh")]
    sets = [*FIXED, *mine]
    ours = folder / "two_tasks.yaml"
    assert himerge("merge", ours, "--out", tmp_path / "b", sets=sets) == 0
    first, second = (read_report(tmp_path / name) for name in "ab")
    assert first.scores == second.scores
    assert first.plan == second.plan
    assert first.test is not None
    assert first.test == second.test
    assert {row.gamma for row in first.contributions} != {0.0}
    written = (tmp_path / "a" / "recipe.yaml").read_text(encoding="utf-8")
    assert "validation: own_en_validation" in written
    again = tmp_path / "a" / "recipe.yaml"
    assert himerge("validate", again, "--include-path", tasks) == 0


def test_what_is_wrong_with_harness_tasks_is_told(
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    himerge: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = folder / "two_tasks.yaml"
    wrong = ["tasks.zh.validation=own_zh_validatoin", "tasks.zh.metric=f1"]
    sets = [*FIXED, *harness_tasks("en", "zh"), *wrong]
    args = ("merge", recipe, "--out", tmp_path / "x")
    assert himerge(*args, "--include-path", tasks, sets=sets) == 2
    told = capsys.readouterr().err
    assert "tasks.zh.validation: lm-eval has no task, group or tag 'own_zh_validatoin'" in told
    assert "tasks.en" not in told
    assert himerge(*args, "--include-path", tmp_path / "none", sets=sets) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert himerge("merge", "--include-path", tasks, "--adapter", "a=x", "--out", "y") == 2
    assert "--include-path goes with a recipe" in capsys.readouterr().err
    sets = [*FIXED, f"tasks.en={{kind: lm_eval_task, metric: acc, test: {tasks}/en_test.yaml}}"]
    assert himerge(*args, sets=sets) == 2
    assert "--include-path DIR, and the task's name here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
