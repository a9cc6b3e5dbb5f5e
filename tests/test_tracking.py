"""Listeners, read back from what they wrote: W&B's own record file, event files, JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trainers
import wandb_records

from peft_himerge import HiMergeConfig, MergePlan, MergeResult, merge_adapters_hi
from peft_himerge.callback import HiMergeCallback
from peft_himerge.contribution import Contributions
from peft_himerge.errors import MissingExtraError
from peft_himerge.events import (
    AdapterSaved,
    Event,
    MergeFinished,
    MergeStarted,
    MergeTested,
    RoundStarted,
)
from peft_himerge.tracking import (
    Book,
    JsonlListener,
    LogListener,
    Round,
    TensorBoardListener,
    WandbListener,
    figures,
)
from peft_himerge.tracking.book import kept_shares, overall

wandb = pytest.importorskip("wandb")

CONFIG = HiMergeConfig(density=0.5, scale=0.9, max_export_drop=None)
NAMES = list(tiny.NAMES[:2])


def merge(*listeners: Any, fns: Any = None, name: str = "merged") -> MergeResult:
    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    fns = fns or tiny.eval_fns("llama", NAMES, n_examples=3)
    return merge_adapters_hi(
        model, NAMES, fns, config=CONFIG, callbacks=listeners, adapter_name=name
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for an offline run; W&B is shut down afterwards, so that nothing is in flight."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    wandb.teardown()  # a session that another test began would keep its own mode and folder
    yield tmp_path
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def written(folder: Path) -> wandb_records.RunFile:
    """End the run, wait until all is on disk, and read it."""
    wandb.finish()
    wandb.teardown()
    return wandb_records.read_run(folder)


# -------------------------------------------------------------------------------------- W&B


def test_training_run_holds_everything(offline: Path) -> None:
    back = HiMergeCallback([trainers.SIBLING], trainers.eval_fns(), config=CONFIG)
    run = trainers.trainer(offline / "out", [back], report_to=["wandb"], logging_steps=1)
    run.train()
    assert wandb.run is not None  # transformers started it; it is not ours to finish
    found = written(offline)
    mine = [row for row in found.rows if "himerge/score" in row]
    history = back.memory["history"]
    assert [row["himerge/round"] for row in mine] == [1, 2]
    assert [row["himerge/score"] for row in mine] == [row["score"] for row in history]
    # W&B's own step has run ahead of the trainer's, so step= would have lost these rows.
    assert [row["train/global_step"] for row in mine] == [2, 4]
    at = [found.steps[found.rows.index(row)] for row in mine]
    assert all(own > row["train/global_step"] for own, row in zip(at, mine, strict=True))
    assert not [row for row in found.rows if any(k.startswith("train/himerge") for k in row)]
    for task in trainers.TASKS:
        for kind in ("merged", "base", "alone", "kept"):
            assert found.values(f"himerge/{kind}/{task}")
    # Best is the largest so far and never falls, also in the summary a sweep reads.
    best = found.values("himerge/best_score")
    assert best == [history[0]["score"], max(row["score"] for row in history)]
    assert found.summary["himerge/best_score"] == best[-1]
    assert found.summary["himerge/plan"] == history[-1]["fingerprint"]
    axes = {m.name or m.glob_name: m.step_metric for m in found.metrics}
    assert axes["himerge/*"] == "himerge/round"
    assert axes["*"] == "train/global_step"  # transformers' own stays
    assert found.config["himerge"]["tasks"] == ["default", "zh"]
    assert found.exits == 1


def test_training_run_holds_table_charts_images_and_artifacts(offline: Path) -> None:
    back = HiMergeCallback(
        [trainers.SIBLING], trainers.eval_fns(), config=CONFIG, on=["evaluate", "train_end"]
    )
    trainers.trainer(offline / "out", [back], report_to=["wandb"]).train()
    found = written(offline)
    tables = found.values("himerge/contributions")
    assert [entry["nrows"] for entry in tables] == [8, 16]  # all rounds so far, under one key
    last = wandb_records.table(offline, tables[-1])
    assert last["columns"][:6] == ["round", "layer", "task", "c_alone", "c_merged", "gamma"]
    assert sorted({row[0] for row in last["data"]}) == [1, 2]
    report = json.loads((offline / "out" / "himerge" / "merged" / "report.json").read_text())
    want = {(r["layer"], r["task"]): r["gamma"] for r in report["contributions"]}
    assert {(row[1], row[2]): row[5] for row in last["data"] if row[0] == 2} == want
    for image in ("heatmap_image", "conflict_image"):
        entries = found.values(f"himerge/{image}")
        assert len(entries) == 2
        assert all(e["_type"] == "image-file" for e in entries)
    for chart in ("heatmap_table", "conflict_chart_table"):
        assert len(found.values(f"himerge/{chart}")) == 2
    assert found.config["_wandb"]["visualize"].keys() >= {
        "himerge/heatmap",
        "himerge/conflict_chart",
    }
    kinds = [(a.name.rsplit("-", 1)[0], a.type) for a in found.artifacts]
    assert kinds.count(("himerge-plan", "himerge-plan")) == 2
    assert kinds.count(("himerge-adapter", "model")) == 1
    (adapter,) = [a for a in found.artifacts if a.name.startswith("himerge-adapter")]
    files = {entry.path for entry in adapter.manifest.contents}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "plan.json"}


def test_joins_the_user_s_run_and_leaves_it_open(offline: Path) -> None:
    run = wandb.init(project="mine")
    run.log({"own": 1.0})
    with WandbListener(start={"project": "other"}) as listener:
        result = merge(listener)
    assert wandb.run is run
    run.log({"own": 2.0})
    found = written(offline)
    assert found.values("own") == [1.0, 2.0]
    (score,) = found.values("himerge/score")
    assert score == pytest.approx(sum(result.scores["exported"].values()) / 2)
    assert not found.values("train/global_step")


def test_starts_a_run_if_asked_and_finishes_only_that(offline: Path) -> None:
    with WandbListener(start={"project": "merging"}, images=False) as listener:
        merge(listener)
        assert wandb.run is not None
        merge(listener)
    assert wandb.run is None
    found = written(offline)
    assert found.values("himerge/round") == [1, 1, 2, 2]  # scalars and charts of each
    assert found.exits == 1


def test_without_a_run_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb")
    merge(WandbListener())
    assert "wandb" not in sys.modules  # joining a run needs no import: it is not there


def test_disabled_mode_writes_nothing(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with WandbListener(start={"project": "merging"}) as listener:
        merge(listener)
    assert not list(offline.rglob("*.wandb"))


def test_wandb_that_is_not_installed_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb -> ImportError
    with caplog.at_level(logging.WARNING), WandbListener(start={}) as listener:
        assert merge(listener).plan is not None
    assert "W&B: start failed" in caplog.text


class Broken:
    """A run of which every call fails."""

    id = "broken"

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"no {name}: the network is down")


def test_failing_calls_are_logged_once_and_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=Broken()))
    listener = WandbListener()
    with caplog.at_level(logging.WARNING, logger="peft_himerge.tracking"):
        for _ in range(2):
            result = merge(listener)
            listener(AdapterSaved(tmp_path, result.plan))
    warned = [record.message for record in caplog.records]
    assert warned == [
        "W&B: start failed; the merge goes on without it.",
        "W&B: log failed; the merge goes on without it.",
        "W&B: upload failed; the merge goes on without it.",
    ]
    assert all(record.exc_info for record in caplog.records)


def test_failing_charts_do_not_take_the_scalars_along(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no table today")

    monkeypatch.setattr(wandb, "Table", fails)
    with WandbListener(start={"project": "merging"}) as listener:
        merge(listener)
    found = written(offline)
    assert found.values("himerge/score")
    assert not found.values("himerge/contributions")
    assert [a.type for a in found.artifacts] == ["himerge-plan"]


def test_a_run_that_is_replaced_between_merges_is_found(offline: Path) -> None:
    # transformers' hyper-parameter search finishes one run and starts the next.
    listener = WandbListener(images=False)
    ids = []
    for _ in range(2):
        wandb.finish()
        run = wandb.init(project="search")
        ids.append(run.id)
        merge(listener)
        assert run.summary["himerge/best_score"] is not None
    assert len(set(ids)) == 2


# ------------------------------------------------------------------------------- other places


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    back = HiMergeCallback([trainers.SIBLING], trainers.eval_fns(), config=CONFIG)
    trainers.trainer(tmp_path, [back], report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "runs" / "himerge"))
    events.Reload()
    scores = events.Scalars("himerge/score")
    assert [e.step for e in scores] == [2, 4]
    want = [row["score"] for row in back.memory["history"]]
    assert [e.value for e in scores] == pytest.approx(want)
    assert {"himerge/heatmap", "himerge/conflicts"} <= set(events.Tags()["images"])
    assert "himerge/plan/text_summary" in events.Tags()["tensors"]


def test_tensorboard_outside_of_training_counts_merges(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardListener(tmp_path) as listener:
        merge(listener)
        merge(listener)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("himerge/score")] == [1, 2]


def test_tensorboard_of_a_merge_without_analysis_has_no_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    with TensorBoardListener(tmp_path) as listener:
        result = merge_adapters_hi(
            model, NAMES[:1], tiny.eval_fns("llama", NAMES[:1]), config=CONFIG, callbacks=[listener]
        )
    assert len(result.contributions) == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == []
    assert not [name for name in tags["scalars"] if "conflicts" in name]
    (merged,) = events.Scalars(f"himerge/merged/{NAMES[0]}")
    assert merged.value == pytest.approx(result.scores["exported"][NAMES[0]])


def test_tensorboard_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'peft-himerge\[tensorboard\]'"):
        TensorBoardListener(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_json_lines_hold_the_whole_story(tmp_path: Path) -> None:
    file = tmp_path / "new" / "merges.jsonl"
    listener = JsonlListener(file)
    result = merge(listener)
    listener(MergeTested(result.states, 0.5))
    listener(AdapterSaved(tmp_path, result.plan))
    merge(listener)
    first, tested, saved, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert (first["round"], second["round"]) == (1, 2)
    assert tested == {"event": "tested", "scores": result.scores, "kept": 0.5}
    assert saved == {"event": "saved", "folder": str(tmp_path)}
    assert first["scores"] == result.scores
    assert first["contributions"] == result.contributions.to_records()
    assert MergePlan.from_dict(first["plan"]).fingerprint == result.plan.fingerprint
    assert len(first["conflicts"]) == len(result.conflicts)
    assert first["scores_computed"] == result.scores_computed


def test_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_himerge.tracking"):
        merge(LogListener())
    assert caplog.messages[0].startswith("merge 1: score -")
    assert "kept: en " in caplog.text


def test_every_metric_of_a_dict_is_in_the_record() -> None:
    plain = tiny.eval_fns("llama", NAMES, n_examples=3)

    def both(name: str) -> Any:
        return lambda model: {"nll": plain[name](model), "constant": 0.25}

    rounds: list[Round] = []
    book = Book()

    def listen(event: Event) -> None:
        rounds.extend(filter(None, [book.take(event)]))

    model = tiny.peft_model("llama", 2, dtype=torch.float32)
    config = CONFIG.model_copy(update={"metric": "nll"})
    fns = {name: both(name) for name in NAMES}
    merge_adapters_hi(model, NAMES, fns, config=config, callbacks=[listen])
    (done,) = rounds
    assert {task: row["constant"] for task, row in done.metrics.items()} == dict.fromkeys(
        NAMES, 0.25
    )
    assert {task: row["nll"] for task, row in done.metrics.items()} == pytest.approx(
        dict(done.final)
    )


# ------------------------------------------------------------------------------------ numbers


def test_kept_shares_by_hand() -> None:
    scores = {
        "base": {"a": 0.2, "b": 0.5, "guard": 0.9},
        "a": {"a": 0.6, "b": 0.1, "guard": 0.9},
        "b": {"a": 0.0, "b": 0.5, "guard": 0.9},
        "merged": {"a": 0.5, "b": 0.4, "guard": 0.6},
    }
    # (0.5 - 0.2) / (0.6 - 0.2); b gains nothing alone, so nothing can be kept.
    assert kept_shares(scores, ("a", "b")) == {"a": pytest.approx(0.75), "b": None}
    assert overall(scores) == pytest.approx(0.5)
    scores["exported"] = {"a": 0.2, "b": 0.5, "guard": 0.9}
    assert kept_shares(scores, ("a", "b"))["a"] == 0.0
    assert overall({}) is None


def test_best_score_never_falls_and_goes_on_after_a_resume() -> None:
    book, plan = Book(), MergePlan.base()
    found = []
    for number, value in enumerate((0.4, 0.9, 0.5), start=4):
        start = RoundStarted(number, "evaluate", 10 * number, 0.5, best_score=0.6)
        scores = {"base": {"a": 0.0}, "merged": {"a": value}}
        for event in (start, MergeStarted(("a",), ("a",), (), 1, {}), MergeFinished(plan, scores)):
            done = book.take(event)
        assert done is not None
        found.append((done.round, done.global_step, done.best_score))
    assert found == [(4, 40, 0.6), (5, 50, 0.9), (6, 60, 0.9)]


def test_pictures_are_drawn_without_pyplot() -> None:
    pytest.importorskip("matplotlib")
    rounds: list[Round] = []
    book = Book()
    merge(lambda event: rounds.extend(filter(None, [book.take(event)])))
    for draw in (figures.heatmap, figures.conflict_chart, figures.overview):
        image = figures.pixels(draw(rounds[0]))
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.std() > 10  # not blank


def test_pictures_of_a_merge_without_analysis() -> None:
    pytest.importorskip("matplotlib")
    empty = Round(
        *(1, None, None, None, (), {}, {}, None, None, {}),
        *(Contributions(), (), MergePlan.base(), 0, 0.0),
    )
    assert figures.pixels(figures.overview(empty)).size
