"""Sweeps: the file, the local driver on tiny models, and the entry point of W&B's agent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import wandb_records
from commands import himerge, himerge_process
from peft import PeftModel
from snapshot import moved, snapshot
from test_cli import EVALS

from peft_himerge import HiMergeConfig, MergePlan, merge_adapters_hi
from peft_himerge.errors import ConfigError, EvalError, MissingExtraError
from peft_himerge.events import Event, StateScored
from peft_himerge.sweep import Sweep, merger, read_sweep, run_agent, run_local
from peft_himerge.tracking.book import overall

optuna = pytest.importorskip("optuna")
pytest.importorskip("yaml")

RECIPE = Path(__file__).parents[1] / "recipes" / "sweep.yaml"
NAMES = list(tiny.NAMES[:2])
HEAD = """
method: {method}
metric: {{name: himerge/best_score, goal: maximize}}
parameters:
  himerge.max_export_drop: {{value: null}}
"""


def write(folder: Path, *lines: str, method: str = "bayes", head: str = HEAD) -> Path:
    file = folder / "sweep.yaml"
    text = head.format(method=method) + "".join(f"  {line}\n" for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def tiny_merge(**options: Any) -> Any:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    fns = options.pop("fns", None) or tiny.eval_fns("llama", NAMES, n_examples=3)
    return merger(model, NAMES, fns, **options)


# ---------------------------------------------------------------------------------- the file


def test_shipped_recipe_reads_and_gives_options() -> None:
    sweep = read_sweep(RECIPE)
    assert sweep.method == "bayes"
    assert sorted(sweep.space) == ["density", "layer_scale", "scale"]
    assert sweep.adapters["en"] == RECIPE.parent / "adapters" / "en"
    assert sweep.trials == 20
    config = sweep.config({"density": 0.3, "scale": 0.9, "layer_scale": 0.5})
    assert (config.density, config.scale, config.accept) == (0.3, 0.9, "no_regression")


def test_shipped_recipe_is_one_that_wandb_can_run() -> None:
    # The SDK ships no schema (0.31); recipes/wandb/README.md says how it was checked.
    import yaml

    data = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    wanted = ["himerge", "sweep", "${program}", "--agent", "--eval", "my_evals.py"]
    assert data["command"] == wanted
    assert data["program"] == "sweep.yaml"
    assert all(key.startswith("himerge.") for key in data["parameters"])
    json.dumps(data)  # W&B sends it as JSON


def test_options_may_differ_per_adapter(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "himerge.density.zh: {min: 0.1, max: 1.0}",
        "himerge.density.en: {value: 0.5}",
        "himerge.scale.zh: {values: [0.5, 1.0]}",
        "himerge.scale.en: {value: 1.0}",
    )
    config = read_sweep(file).config({"density.zh": 0.25, "scale.zh": 0.5})
    assert config.density == {"zh": 0.25, "en": 0.5}
    assert config.scale == {"zh": 0.5, "en": 1.0}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("density: {min: 0.1, max: 1.0}", "must be named 'himerge.density'"),
        ("himerge.densty: {value: 1.0}", "Did you mean 'density'"),
        ("himerge.accept.zh: {value: always}", "unknown option in 'himerge.accept.zh'"),
        ("himerge.density: 0.5", "must hold value, values, or min and max"),
        ("himerge.density: {values: []}", "must be a list that is not empty"),
        ("himerge.density: {min: 1.0, max: 0.5}", "min <= max"),
        ("himerge.density: {min: 0.1}", "min <= max"),
        (
            "himerge.density: {min: 0.1, max: 1.0, distribution: normal}",
            "distribution got 'normal'",
        ),
        ("himerge.base: {values: [a, b]}", "himerge.base cannot be varied"),
        ("himerge.density: {min: 0.5, max: 1.5}", None),
        ("himerge.density: {min: -0.5, max: 1.0}", "density"),
    ],
)
def test_bad_parameters_are_refused(line: str, text: str | None, tmp_path: Path) -> None:
    file = write(tmp_path, line)
    if text is None:  # only the trials that meet it fail
        assert read_sweep(file)
        return
    with pytest.raises(ConfigError, match=text):
        read_sweep(file)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    head = "method: guess\nrun_cap: 0\nagents: 2\nmetric: {{name: loss}}\nparameters:\n"
    file = write(tmp_path, "density: {value: 1.0}", head=head)
    with pytest.raises(ConfigError) as caught:
        read_sweep(file)
    for text in ("unknown key 'agents'", "method got 'guess'", "run_cap", "metric must", "density"):
        assert text in str(caught.value)


@pytest.mark.parametrize(("text", "match"), [("[", "no valid YAML"), ("- a", "a table of keys")])
def test_files_that_are_no_sweep_are_refused(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        read_sweep(file)
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_sweep(file)


# -------------------------------------------------------------------------- the local driver


def density_and_scale(folder: Path, method: str = "bayes") -> Sweep:
    return read_sweep(
        write(
            folder,
            "himerge.density: {min: 0.1, max: 1.0}",
            "himerge.scale: {min: 0.2, max: 1.0}",
            method=method,
        )
    )


def test_local_sweep_finds_the_best_of_its_trials(tmp_path: Path) -> None:
    sweep = density_and_scale(tmp_path)
    seen: list[tuple[int, float | None]] = []
    found = run_local(
        sweep, tiny_merge(), trials=6, on_trial=lambda number, score: seen.append((number, score))
    )
    scores = [score for _, score in seen if score is not None]
    assert [number for number, _ in seen] == list(range(6))
    assert found.score == max(scores)
    assert sum(found.trials.values()) == 6
    assert set(found.importances) == {"density", "scale"}
    # The best trial's options and plan give its score again.
    again = tiny_merge()(sweep.config(found.values), ())
    assert overall(again.scores) == pytest.approx(found.score, abs=1e-9)
    assert MergePlan.from_json(found.plan).fingerprint == again.plan.fingerprint


def test_study_is_resumed(tmp_path: Path) -> None:
    sweep, file = density_and_scale(tmp_path), tmp_path / "deep" / "study.db"
    first: list[int] = []
    second: list[int] = []
    run_local(sweep, tiny_merge(), study=file, trials=3, on_trial=lambda n, _: first.append(n))
    found = run_local(
        sweep, tiny_merge(), study=file, trials=5, on_trial=lambda n, _: second.append(n)
    )
    assert (first, second) == ([0, 1, 2], [3, 4])
    assert sum(found.trials.values()) == 5
    nothing = run_local(sweep, lambda *_: pytest.fail("no trial is left"), study=file, trials=5)
    assert nothing == found


def test_study_of_another_space_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    run_local(density_and_scale(tmp_path), tiny_merge(), study=file, trials=1)
    other = read_sweep(write(tmp_path, "himerge.density: {min: 0.2, max: 1.0}"))
    with pytest.raises(ConfigError, match="made for another space"):
        run_local(other, tiny_merge(), study=file, trials=2)


def test_grid_takes_every_value_once_and_stops(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "himerge.density: {min: 0.5, max: 1.0, q: 0.5, distribution: q_uniform}",
        "himerge.scale: {values: [0.5, 1.0]}",
        "himerge.rank: {value: exact}",
        method="grid",
    )
    done: list[HiMergeConfig] = []
    merge = tiny_merge()

    def noted(config: HiMergeConfig, listeners: Any) -> Any:
        done.append(config)
        return merge(config, listeners)

    run_local(read_sweep(file), noted, trials=50)
    assert sorted((c.density, c.scale) for c in done) == [
        (0.5, 0.5),
        (0.5, 1.0),
        (1.0, 0.5),
        (1.0, 1.0),
    ]
    with pytest.raises(ConfigError, match="method grid needs values"):
        run_local(density_and_scale(tmp_path, "grid"), noted, trials=1)


def test_trials_that_differ_late_reuse_scores(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "himerge.variant: {value: paper}",
        "himerge.density: {value: 0.5}",
        "himerge.scale: {value: 1.0}",
        "himerge.layer_scale: {values: [0.3, 0.6]}",
        method="grid",
    )
    counts: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, StateScored):
            counts[-1] += 1

    merge = tiny_merge(journal=tmp_path / "scores.jsonl")

    def counted(config: HiMergeConfig, listeners: Any) -> Any:
        counts.append(0)
        return merge(config, listeners)

    run_local(read_sweep(file), counted, listeners=[count])
    # Base, adapters alone, first merge and layer analysis are the same: only what repair and export
    # make of another layer_scale is scored again, each on two tasks.
    assert counts[0] > 40
    assert counts[1] <= 4


def test_trial_is_pruned_by_the_first_task(tmp_path: Path) -> None:
    sweep = density_and_scale(tmp_path, "random")
    merge = tiny_merge()
    calls: list[int] = []
    analysed: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, StateScored) and event.stage == "analysis":
            analysed[-1] += 1

    def counted(config: HiMergeConfig, listeners: Any) -> Any:
        calls.append(1)
        analysed.append(0)
        return merge(config, listeners)

    found = run_local(sweep, counted, trials=14, listeners=[count])
    assert found.trials["pruned"] > 0
    # A pruned trial never comes to the layer analysis.
    assert sum(n == 0 for n in analysed) == found.trials["pruned"]


def test_failed_trials_do_not_end_the_sweep(tmp_path: Path) -> None:
    merge = tiny_merge()
    calls: list[int] = []

    def sometimes(config: HiMergeConfig, listeners: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise EvalError("NaN")
        return merge(config, listeners)

    found = run_local(density_and_scale(tmp_path), sometimes, trials=3)
    assert found.trials == {"complete": 2, "fail": 1}
    with pytest.raises(ConfigError, match="no trial of the sweep succeeded"):
        run_local(density_and_scale(tmp_path), _fails, trials=2)


def _fails(*_: Any) -> Any:
    raise EvalError("NaN")


def test_merger_leaves_the_model_as_it_was() -> None:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    before = snapshot(model)
    fns = tiny.eval_fns("llama", NAMES, n_examples=2)
    merger(model, NAMES, fns)(HiMergeConfig(density=1.0, scale=1.0), ())
    assert moved(before, snapshot(model)) == []


# ------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    model.save_pretrained(
        root / "adapters", selected_adapters=["zh", "en"], save_embedding_layers=False
    )
    model.unload().save_pretrained(root / "base")
    (root / "my_evals.py").write_text(EVALS, encoding="utf-8")
    text = RECIPE.read_text(encoding="utf-8").replace("no_regression", "always")
    (root / "sweep.yaml").write_text(
        text + "  himerge.max_export_drop: {value: null}\n", encoding="utf-8"
    )
    return root


def test_sweep_command_with_two_workers_writes_the_best_adapter(
    folders: Path, tmp_path: Path
) -> None:
    study, out = tmp_path / "study.db", tmp_path / "best"
    args = [
        "sweep.yaml",
        "--eval",
        "my_evals.py",
        "--study",
        study,
        "--trials",
        4,
        "--workers",
        2,
        "--out",
        out,
    ]
    done = himerge_process("sweep", *args, cwd=folders, OMP_NUM_THREADS="1")
    assert done.code == 0, done.stderr
    assert "Best score" in done.stdout
    numbers = {line.split(":")[0] for line in done.stdout.splitlines() if "trial " in line}
    assert {f"trial {n}" for n in range(4)} <= numbers
    held = optuna.load_study(study_name="himerge", storage=f"sqlite:///{study}")
    report = json.loads((out / "report.json").read_text())
    exported = report["scores"]["exported"]
    assert sum(exported.values()) / 2 == pytest.approx(held.best_value, abs=1e-9)
    base = tiny.tiny_model("llama")
    assert PeftModel.from_pretrained(base, str(out)).active_adapter == "default"


def test_sweep_command_needs_the_places_and_the_file(folders: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "himerge.density: {min: 0.1, max: 1.0}")
    done = himerge("sweep", file)
    assert done.code == 2
    assert "needs himerge.recipe, or himerge.base and himerge.adapters" in done.stderr
    done = himerge("sweep", folders / "sweep.yaml")
    assert done.code == 2
    assert "--eval is missing" in done.stderr
    more = write(tmp_path, "himerge.density: {value: 0.5}", "himerge.eval: {value: my_evals.py}")
    with pytest.raises(ConfigError, match=r"cannot name code to run.*--eval my_evals\.py"):
        read_sweep(more)


def test_agent_runs_one_trial_with_the_options_of_the_run(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # What `wandb agent` does: it starts the command with the chosen values in a file.
    chosen = {"himerge.density": 0.5, "himerge.scale": 0.75, "himerge.layer_scale": 0.25}
    lines = ["wandb_version: 1"]
    lines += [f"{name}:\n  value: {value}" for name, value in chosen.items()]
    (tmp_path / "chosen.yaml").write_text("\n".join(lines) + "\n")
    done = himerge_process(
        *("sweep", "sweep.yaml", "--agent", "--eval", "my_evals.py"),
        cwd=folders,
        OMP_NUM_THREADS="1",
        WANDB_MODE="offline",
        WANDB_DIR=str(tmp_path),
        WANDB_SWEEP_PARAM_PATH=str(tmp_path / "chosen.yaml"),
    )
    assert done.code == 0, done.stderr
    found = wandb_records.read_run(tmp_path)
    (plan,) = {row["himerge/score"] for row in found.rows if "himerge/score" in row}
    assert found.summary["himerge/best_score"] == plan
    config = read_sweep(folders / "sweep.yaml").config(
        {name.removeprefix("himerge."): value for name, value in chosen.items()}
    )
    model = PeftModel.from_pretrained(
        tiny.tiny_model("llama"), str(folders / "adapters" / "zh"), adapter_name="zh"
    )
    model.load_adapter(str(folders / "adapters" / "en"), adapter_name="en")
    scope: dict[str, Any] = {}
    exec(EVALS, scope)
    want = merge_adapters_hi(model, ["zh", "en"], scope["eval_fns"](None), config=config)
    assert plan == pytest.approx(overall(want.scores), abs=1e-6)


def test_agent_logs_the_base_score_of_a_trial_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    plain = tiny.eval_fns("llama", NAMES, n_examples=2)
    calls: list[int] = []

    def dies(model: PeftModel) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return plain["zh"](model)

    fns = {"en": plain["en"], "zh": dies}
    sweep = read_sweep(
        write(tmp_path, "himerge.density: {value: 0.5}", "himerge.scale: {value: 1}")
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        run_agent(sweep, tiny_merge(fns=fns))
    assert wandb.run is None
    wandb.teardown()
    found = wandb_records.read_run(tmp_path)
    base = tiny.tiny_model("llama")
    want = sum(float(fn(base).mean()) for fn in plain.values()) / 2
    assert found.values("himerge/best_score") == [pytest.approx(want, abs=1e-6)]


def test_agent_without_wandb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'peft-himerge\[wandb\]'"):
        run_agent(density_and_scale(tmp_path), _fails)


def test_a_sweep_of_no_parameters_is_refused(tmp_path: Path) -> None:
    for written in ("{}", "[]"):
        head = HEAD.partition("parameters:")[0] + f"parameters: {written}\n"
        file = write(tmp_path, head=head.replace("{}", "{{}}"))
        with pytest.raises(ConfigError, match="parameters is empty: name the options to vary"):
            read_sweep(file)
