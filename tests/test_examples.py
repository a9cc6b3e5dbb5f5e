"""Every example runs as a user runs it, on this machine, without a network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import wandb_records

from peft_himerge import MergePlan

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("0*.py"))
NEEDS = {"03_sft_trainer": "trl", "04_wandb_offline": "wandb", "05_sweep_local": "optuna"}


def run(name: str, out: Path, *args: str) -> str:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    environment = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--out", str(out), *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=out.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def whole_adapter(folder: Path) -> MergePlan:
    assert (folder / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    return MergePlan.from_json(folder / "plan.json")


def test_every_example_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES:
        assert f'run("{example.stem}"' in source


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_docstring_names_the_command(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{path.name}" in doc


def test_merge_two_adapters(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("01_merge_two_adapters", out)
    plan = whole_adapter(out)
    assert plan.fingerprint[:16] in printed
    scores = json.loads((out / "report.json").read_text())["scores"]
    mean = {state: sum(row.values()) / len(row) for state, row in scores.items()}
    # accept="no_regression": the edits never make the first merge worse.
    assert mean["base"] < mean["model_wise"] <= mean["merged"]


def test_trainer_callback(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("02_trainer_callback", out)
    assert set(whole_adapter(out / "himerge" / "merged").adapters) == {"default", "up"}
    rows = [json.loads(r) for r in (out / "himerge" / "rounds.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["event"] == "round"]
    assert [row["trigger"] for row in rounds] == ["evaluate"] * 3 + ["train_end"]
    best = max(rounds[:3], key=lambda row: row["score"])
    assert f"best step: {best['global_step']}" in printed


def test_sft_trainer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("03_sft_trainer", out)
    assert set(whole_adapter(out / "himerge" / "merged").adapters) == {"default", "up"}
    assert "step 60 (train_end)" in printed


def test_wandb_offline(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("04_wandb_offline", out)
    found = wandb_records.read_run(out)
    scores = found.values("himerge/score")
    assert len(scores) == 2
    assert found.summary["himerge/best_score"] == max(scores)
    assert (out / "dashboard.png").read_bytes()[:4] == b"\x89PNG"


def test_sweep_local(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("05_sweep_local", out, "--trials", "3")
    second = run("05_sweep_local", out, "--trials", "4")
    assert [line.split(":")[0] for line in first.splitlines() if line.startswith("trial")] == [
        "trial 0",
        "trial 1",
        "trial 2",
    ]
    assert [line.split(":")[0] for line in second.splitlines() if line.startswith("trial")] == [
        "trial 3"
    ]
    whole_adapter(out / "merged")


# --------------------------------------------------------------------- the W&B dashboard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces 0.4 on import
def test_dashboard_shows_keys_that_a_merge_logs() -> None:
    pytest.importorskip("wandb_workspaces")
    panels = _dashboard()
    logged = _logged_keys()
    for panel in panels:
        keys = [*(getattr(panel, "y", None) or []), *(getattr(panel, "media_keys", None) or [])]
        keys += [k for k in [getattr(panel, "metric", None)] if k]
        keys += [k for k in [getattr(panel, "table_name", None)] if k]
        for key in keys:
            assert str(getattr(key, "name", key)) in logged
        pattern = getattr(panel, "metric_regex", None)
        if pattern:
            assert any(key.startswith(pattern.removesuffix(".*")) for key in logged)


def test_readme_of_the_dashboard_has_its_figure() -> None:
    folder = ROOT / "recipes" / "wandb"
    assert "](dashboard.png)" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "dashboard.png").read_bytes()[:4] == b"\x89PNG"


def _dashboard() -> list[Any]:
    spec = importlib.util.spec_from_file_location(
        "workspace", ROOT / "recipes" / "wandb" / "workspace.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    view = module.dashboard("entity", "project")
    return [panel for section in view.sections for panel in section.panels]


def _logged_keys() -> set[str]:
    """Return the keys of one merge, from the listener's own scalars and charts."""
    from peft_himerge import HiMergeConfig, merge_adapters_hi
    from peft_himerge.tracking import Book
    from peft_himerge.tracking.tensorboard import scalars

    names = list(tiny.NAMES[:2])
    model = tiny.peft_model("llama", 2)
    book, rounds = Book(), []
    merge_adapters_hi(
        model,
        names,
        tiny.eval_fns("llama", names, n_examples=2),
        config=HiMergeConfig(density=1.0, scale=1.0, max_export_drop=None),
        callbacks=[lambda event: rounds.append(book.take(event))],
    )
    done = next(r for r in rounds if r is not None)
    charts = ("contributions", "heatmap_image", "conflict_image", "round")
    return {f"himerge/{name}" for name in (*scalars(done), *charts)} | {"train/global_step"}


def test_list_of_pitfalls_names_tests_that_exist() -> None:
    import re

    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|", text, re.M)
    assert rows == [str(n) for n in range(1, 26)]
    known = "".join(
        (ROOT / "tests" / f"test_{room}.py").read_text(encoding="utf-8")
        for room in ("callback", "tracking", "sweep")
    )
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in known, name
