"""`HiMergeCallback`: training is bit-identical, whatever it does; and what it does is seen."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trainers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from snapshot import bits, moved, snapshot
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from peft_himerge import HiMergeConfig, HiMergeError, MergePlan
from peft_himerge.adapters import lora_layers
from peft_himerge.callback import HiMergeCallback
from peft_himerge.errors import AdapterError, ConfigError
from peft_himerge.events import AdapterSaved, Event, MergeStarted, RoundStarted, StateScored
from peft_himerge.guests import guests
from peft_himerge.probe import preserved
from peft_himerge.tracking import Round
from peft_himerge.training import evaluation_set, refuse_sharded

CONFIG = HiMergeConfig(density=0.5, scale=0.9, max_export_drop=None)
SIBLINGS = [trainers.SIBLING]

pytestmark = pytest.mark.filterwarnings(
    # A run on two cores has no use for pinned memory, and CPU autocast is what we ask for.
    "ignore:.*pin_memory.*:UserWarning",
)


def callback(**options: Any) -> HiMergeCallback:
    settings = {"config": CONFIG, "on_error": "raise", "listeners": (), "artifact": "off"}
    adapters = options.pop("adapters", SIBLINGS)
    fns = options.pop("eval_fns", None) or trainers.eval_fns()
    return HiMergeCallback(adapters, fns, **{**settings, **options})


def trained(out: Path, callbacks: list[Any], resume: str | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    run = trainers.trainer(out, callbacks, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def falling() -> dict[str, Any]:
    """Return eval functions whose score falls with every call."""
    worse = iter(range(1000))

    def falls(model: PeftModel) -> float:
        return -float(next(worse))

    return {"default": falls, "zh": falls}


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


# ------------------------------------------------------------------ training is bit-identical

SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16 autocast": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 3, "eval_steps": 1},
    "several sets": {"eval_dataset": {"a": trainers.Rows(4, 5), "b": trainers.Rows(4, 6)}},
    "saving": {"save_strategy": "steps", "save_steps": 2},
    "evaluation first": {"eval_on_start": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_training_is_bit_identical_with_and_without(setup: str, tmp_path: Path) -> None:
    options = SETUPS[setup]
    without = trainers.facts(trained(tmp_path / "a", [], **options))
    again = trainers.facts(trained(tmp_path / "b", [], **options))
    assert moved(without, again) == []  # else the comparison would prove nothing
    back = callback(artifact="all")
    found = trainers.facts(trained(tmp_path / "c", [back], **options))
    assert back.memory["round"] >= 2
    assert moved(without, found) == []


@pytest.mark.parametrize("analysis", ["full", "scores", "off"])
def test_training_is_bit_identical_with_a_sibling_from_a_folder(
    analysis: str, tmp_path: Path
) -> None:
    folder = trainers.sibling_folder(tmp_path / "siblings")
    model = trainers.in_training(sibling=False)
    layers = set(lora_layers(model))
    without = trainers.facts(trained(tmp_path / "a", [], model=model))
    back = callback(adapters={"zh": folder}, analysis=analysis)
    model = trainers.in_training(sibling=False)
    found = trainers.facts(trained(tmp_path / "b", [back], model=model))
    assert back.memory["round"] == 2
    assert moved(without, found) == []
    assert set(lora_layers(model)) == layers  # the sibling adapts up_proj, this one does not


def test_training_is_bit_identical_while_its_adapter_is_focused(tmp_path: Path) -> None:
    without = trainers.facts(trained(tmp_path / "a", []))
    config = HiMergeConfig(variant="focused", scale=0.9, max_export_drop=None)
    back = callback(config=config, artifact="last")
    found = trainers.facts(trained(tmp_path / "b", [back]))
    assert back.memory["round"] == 2
    assert moved(without, found) == []
    focused = {path.parent.name for path in tmp_path.rglob("focused/*/adapter_config.json")}
    assert focused == {"default", "zh"}


@pytest.mark.parametrize("analysis", ["scores", "off"])
def test_rounds_without_analysis_focus_too_if_they_look_at_scores(
    analysis: str, tmp_path: Path
) -> None:
    without = trainers.facts(trained(tmp_path / "a", []))
    back = callback(config=HiMergeConfig(), analysis=analysis, artifact="last")
    found = trainers.facts(trained(tmp_path / "b", [back]))
    assert back.memory["round"] == 2
    assert moved(without, found) == []
    focused = {path.parent.name for path in tmp_path.rglob("focused/*/adapter_config.json")}
    assert focused == ({"default", "zh"} if analysis == "scores" else set())


def test_training_is_bit_identical_when_an_eval_function_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = trainers.facts(trained(tmp_path / "a", []))
    calls = []

    def fails(model: PeftModel) -> float:
        calls.append(torch.rand(3))
        if len(calls) % 4 == 0:
            raise RuntimeError("the test set is gone")
        return 0.5

    fns = {**trainers.eval_fns(), "zh": fails}
    with caplog.at_level(logging.WARNING, logger="peft_himerge.callback"):
        run = trained(tmp_path / "b", [callback(eval_fns=fns, on_error="warn")])
    assert moved(without, trainers.facts(run)) == []
    assert "training goes on" in caplog.text
    assert "the test set is gone" in caplog.text  # the traceback
    with pytest.raises(RuntimeError, match="the test set is gone"):
        trained(tmp_path / "c", [callback(eval_fns=fns)])


def test_own_loop_is_bit_identical_and_merge_now_returns_the_record(tmp_path: Path) -> None:
    def loop(back: HiMergeCallback | None) -> tuple[dict[str, Any], list[Round | None]]:
        torch.manual_seed(1)
        model = trainers.in_training().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        rounds = []
        for step in range(4):
            batch = trainers.Rows().rows[step * 4 : step * 4 + 4]
            model(input_ids=batch, labels=batch).loss.backward()
            if step % 2 and back is not None:  # gradients are there: they must stay
                folder = tmp_path / f"merged-{step}"
                rounds.append(back.merge_now(model, global_step=step, save_to=folder))
            optimizer.step()
            if step % 2 == 0:
                optimizer.zero_grad()
        found = snapshot(model)
        values = {k: v for k, v in found.items() if not k.startswith(("object", "storage"))}
        states = optimizer.state_dict()["state"]
        values |= {f"{i} {k}": bits(v) for i, row in states.items() for k, v in row.items()}
        return values, rounds

    without, _ = loop(None)
    found, rounds = loop(callback())
    assert moved(without, found) == []
    assert [r.global_step for r in rounds if r] == [1, 3]
    assert all(r.trigger == "now" and len(r.contributions) for r in rounds if r)
    plan = MergePlan.from_json(tmp_path / "merged-3" / "plan.json")
    assert rounds[1] is not None
    assert plan.fingerprint == rounds[1].plan.fingerprint


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    folder = trainers.sibling_folder(tmp_path)
    model = trainers.in_training(sibling=False).train()
    before = snapshot(model)
    callback(adapters={"zh": folder}).merge_now(model)
    assert moved(before, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import of its compiler
def test_merge_now_unwraps_a_compiled_model() -> None:
    model = trainers.in_training()
    before = snapshot(model)
    assert callback(analysis="scores").merge_now(torch.compile(model)) is not None
    assert moved(before, snapshot(model)) == []


def test_guests_leave_no_trace_when_the_second_folder_is_bad(tmp_path: Path) -> None:
    folder = trainers.sibling_folder(tmp_path)
    model = trainers.in_training(sibling=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_config"), preserved(model):
        with guests(model, {"zh": folder, "bad": tmp_path / "nowhere"}):
            pytest.fail("not to be reached")
    after = snapshot(model)
    assert [m for m in moved(before, after) if "tuner" not in m] == []


# ------------------------------------------------------------------------- when it merges


def test_several_sets_and_a_save_at_one_step_are_one_round(tmp_path: Path) -> None:
    heard = Heard()
    sets = {"a": trainers.Rows(4, 5), "b": trainers.Rows(4, 6)}
    back = callback(listeners=[heard], artifact="last")
    trained(tmp_path, [back], eval_dataset=sets, save_strategy="steps", save_steps=2)
    started = heard.of(RoundStarted)
    assert [(e.round, e.trigger, e.global_step) for e in started] == [
        (1, "evaluate", 2),
        (2, "evaluate", 4),
    ]
    assert [e.folder.name for e in heard.of(AdapterSaved)] == ["merged"]


def test_weights_that_change_at_one_step_make_a_new_round(tmp_path: Path) -> None:
    heard = Heard()
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    options |= {"metric_for_best_model": "himerge_score", "greater_is_better": True}
    back = callback(listeners=[heard], analysis="scores", eval_fns=falling())
    trained(tmp_path, [back], **options)  # the best weights are the first ones
    assert [e.trigger for e in heard.of(RoundStarted)] == ["evaluate", "evaluate", "train_end"]


def test_every_counts_steps_and_not_sets(tmp_path: Path) -> None:
    heard = Heard()
    sets = {"a": trainers.Rows(4, 5), "b": trainers.Rows(4, 6)}
    back = callback(listeners=[heard], every=2, on=("evaluate",), analysis="scores")
    trained(tmp_path, [back], eval_dataset=sets, eval_steps=1)
    assert [e.global_step for e in heard.of(RoundStarted)] == [2, 4]


def test_analysis_may_differ_per_event(tmp_path: Path) -> None:
    heard = Heard()
    kinds = {"evaluate": "scores", "train_end": "full"}
    back = callback(listeners=[heard], analysis=kinds, on=("evaluate", "train_end"))
    run = trained(tmp_path, [back], eval_steps=4)
    assert [r["conflicts"] != [] for r in back.memory["history"]] == [False, True]
    # M adapters on M tasks: base, each alone, merged.
    first = [e for e in heard.events[: heard.events.index(heard.of(RoundStarted)[1])]]
    assert sum(isinstance(e, StateScored) for e in first) == 2 * 4
    assert run.state.global_step == 4


def test_analysis_off_needs_no_eval_functions_and_saves(tmp_path: Path) -> None:
    back = HiMergeCallback(SIBLINGS, config=CONFIG, analysis="off", listeners=(), on=["train_end"])
    trained(tmp_path, [back])
    assert (tmp_path / "himerge" / "merged" / "adapter_model.safetensors").is_file()
    assert back.memory["metrics"] == {}


def test_eval_function_that_evaluates_starts_no_round_in_a_round(tmp_path: Path) -> None:
    heard = Heard()
    runs: list[Any] = []

    def evaluates(model: PeftModel) -> float:
        return -float(runs[0].evaluate(metric_key_prefix="inner")["inner_loss"])

    fns = {**trainers.eval_fns(), "zh": evaluates}
    back = callback(eval_fns=fns, listeners=[heard], analysis="scores", on=("evaluate",))
    runs.append(trainers.trainer(tmp_path, [back], eval_steps=4))
    runs[0].train()
    assert len(heard.of(RoundStarted)) == len(heard.of(MergeStarted)) == 1


# ---------------------------------------------------------------------- metrics and stopping


def test_metrics_reach_the_trainer_and_choose_the_best_checkpoint(tmp_path: Path) -> None:
    back = callback(analysis="scores")
    run = trained(
        tmp_path,
        [back],
        save_strategy="best",
        metric_for_best_model="eval_himerge_score",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    best = max(row["score"] for row in back.memory["history"])
    assert run.state.best_metric == best
    metrics = run.evaluate()
    assert metrics["eval_himerge_best_score"] == best
    assert metrics["eval_himerge_score"] == pytest.approx(best, abs=1e-6)
    for task in trainers.TASKS:
        assert {f"eval_himerge_{k}_{task}" for k in ("merged", "base", "alone", "kept")} < {
            *metrics
        }


def test_early_stopping_counts_one_evaluation_of_several_sets_once(tmp_path: Path) -> None:
    stopper = EarlyStoppingCallback(early_stopping_patience=2)
    run = trained(
        tmp_path,
        [callback(eval_fns=falling(), analysis="scores", on=("evaluate",)), stopper],
        eval_dataset={"a": trainers.Rows(4, 5), "b": trainers.Rows(4, 6)},
        max_steps=8,
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_himerge_score",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    # Best at step 1, worse at 2 and 3.
    assert run.state.global_step == 3
    assert run.state.best_global_step == 1


def test_failed_round_gives_nan_and_never_counts_as_best(tmp_path: Path) -> None:
    def fails(model: PeftModel) -> float:
        raise RuntimeError("no data")

    fns = {**trainers.eval_fns(), "zh": fails}
    run = trained(
        tmp_path,
        [callback(eval_fns=fns, on_error="warn")],
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="himerge_score",
        greater_is_better=True,
    )
    assert run.state.best_metric == float("-inf")
    assert math.isnan(run.evaluate()["eval_himerge_score"])


@pytest.mark.parametrize(
    "options", [{"every": 2}, {"on": ("save",)}, {"analysis": {"evaluate": "off"}}]
)
def test_best_metric_that_would_be_missing_is_refused_at_start(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs a score at every evaluation"):
        trained(tmp_path, [callback(**options)], metric_for_best_model="eval_himerge_score")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["eval_loss", "epoch"], "eval"),
        (["eval_data1_loss", "eval_data1_runtime"], "eval_data1"),
        (["test_accuracy", "test_runtime"], "test"),
        ([], "eval"),
    ],
)
def test_evaluation_set(keys: list[str], prefix: str) -> None:
    assert evaluation_set(dict.fromkeys(keys, 0.0)) == prefix


# ---------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("rebuild", [False, True])
def test_resume_is_bit_identical_and_keeps_the_history(rebuild: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 1}
    whole = callback(analysis="scores")
    trained(tmp_path / "b", [whole], **options)
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    without = trainers.facts(trained(tmp_path / "a", [], resume=checkpoint, **options))
    again = callback(analysis="scores")
    run = trained(
        tmp_path / "b",
        [again],
        resume=checkpoint,
        restore_callback_states_from_checkpoint=rebuild,
        **options,
    )
    assert moved(without, trainers.facts(run)) == []
    found = next(c for c in run.callback_handler.callbacks if isinstance(c, HiMergeCallback))
    assert found.memory["history"] == whole.memory["history"]
    assert found.memory["best_score"] == whole.memory["best_score"]
    assert [row["round"] for row in found.memory["history"]] == [1, 2, 3, 4]


def test_round_of_a_save_is_in_that_checkpoint(tmp_path: Path) -> None:
    back = callback(on=("save",), analysis="scores")
    trained(tmp_path, [back], save_strategy="steps", save_steps=2)
    for step, rounds in ((2, 1), (4, 2)):
        file = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        kept = json.loads(file.read_text())["stateful_callbacks"]["HiMergeCallback"]
        assert kept["attributes"]["memory"]["round"] == rounds


def test_two_callbacks_keep_two_histories(tmp_path: Path) -> None:
    first = callback(analysis="scores", on=("save",))
    guard = {**trainers.eval_fns(), "guard": trainers.eval_fns()["zh"]}
    second = callback(analysis="scores", on=("save", "train_end"), eval_fns=guard)
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, [first, second], **options)
    third = callback(analysis="scores", on=("save",))
    fourth = callback(analysis="scores", on=("save", "train_end"), eval_fns=guard)
    trained(tmp_path, [third, fourth], resume=str(tmp_path / "checkpoint-2"), **options)
    assert third.memory["history"] == first.memory["history"]
    assert fourth.memory["history"] == second.memory["history"]


def test_checkpoint_of_a_run_without_the_callback_resumes_with_it(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, [], **options)
    checkpoint = str(tmp_path / "checkpoint-2")
    without = trainers.facts(trained(tmp_path / "a", [], resume=checkpoint, **options))
    back = callback(analysis="scores")
    run = trained(tmp_path / "b", [back], resume=checkpoint, **options)
    assert moved(without, trainers.facts(run)) == []
    assert back.memory["round"] == 1


def test_rebuilding_for_other_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run has none like it"):
        HiMergeCallback(restore='[["nobody"], [], []]')


def test_state_is_plain_json_and_a_second_training_starts_anew(tmp_path: Path) -> None:
    back = callback(analysis="scores")
    for folder in ("a", "b"):  # as a hyper-parameter search does
        trained(tmp_path / folder, [back])
        assert json.loads(json.dumps(back.state())) == back.state()
        assert back.memory["round"] == 2


# ------------------------------------------------------------------------------- artifacts


@pytest.mark.parametrize(
    ("artifact", "folders"),
    [
        ("off", set()),
        ("last", {"merged"}),
        ("best", {"merged", "best"}),
        ("all", {"merged", "step-2", "step-4"}),
    ],
)
def test_artifacts_lie_beside_the_checkpoints(
    artifact: str, folders: set[str], tmp_path: Path
) -> None:
    run = trained(tmp_path, [callback(artifact=artifact)], save_strategy="steps", save_steps=2)
    root = tmp_path / "himerge"
    assert {p.name for p in root.glob("*") if p.is_dir()} == folders
    # The merged adapter is never in the model when the trainer saves it.
    saved = {p.parent.name for p in (tmp_path / "checkpoint-4").rglob("adapter_config.json")}
    assert saved == {"checkpoint-4", "zh"}
    assert list(run.model.peft_config) == ["default", "zh"]


def test_saved_adapter_is_the_round_s_plan_and_loads(tmp_path: Path) -> None:
    back = callback(artifact="last")
    run = trained(tmp_path, [back])
    folder = tmp_path / "himerge" / "merged"
    plan = MergePlan.from_json(folder / "plan.json")
    assert plan.fingerprint == back.memory["history"][-1]["fingerprint"]
    report = json.loads((folder / "report.json").read_text())
    assert report["contributions"]
    assert report["scores"]["exported"]
    fresh = PeftModel.from_pretrained(tiny.tiny_model("llama"), str(folder)).eval()
    score = trainers.eval_fns()["zh"](fresh).mean().item()
    assert score == pytest.approx(report["scores"]["exported"]["zh"], abs=1e-6)
    assert run.model.active_adapter == "default"


def test_default_listeners_write_a_file_and_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="peft_himerge.tracking"):
        trained(tmp_path, [callback(listeners=None, artifact="last")])
    lines = (tmp_path / "himerge" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["round", "round", "saved"]
    assert "merge 2 at step 4: score" in caplog.text


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on": "evaluate"}, "on must be a list of names"),
        ({"on": ["evaluated"]}, "Did you mean 'evaluate'"),
        ({"every": 0}, "every must be a whole number >= 1"),
        ({"every": True}, "every must be a whole number >= 1"),
        ({"analysis": "none"}, "analysis got 'none'"),
        ({"analysis": {"evaluated": "off"}}, "analysis got 'evaluated'"),
        ({"artifact": True}, "artifact got True"),
        ({"on_error": "ignore"}, "on_error got 'ignore'"),
        ({"adapters": "zh"}, "adapters must be a list of names"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        callback(**options)


def test_eval_functions_are_needed_unless_analysis_is_off() -> None:
    with pytest.raises(ConfigError, match="eval_fns is empty"):
        HiMergeCallback(SIBLINGS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapters": ["en"]}, "the model has no adapter 'en'"),
        ({"eval_fns": {"zh": len}}, "the adapter in training, 'default'"),
        ({"eval_fns": {"default": len}}, "the sibling, 'zh'"),
        ({"adapter_name": "zh"}, "the model has an adapter 'zh' already"),
        ({"config": HiMergeConfig(density={"zh": 1.0}, scale=1.0)}, "one value per adapter"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    # on_error="warn" is for what happens later.
    with pytest.raises(HiMergeError, match=text):
        trained(tmp_path, [callback(**{"on_error": "warn", **options})])


def test_bad_folders_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = trainers.in_training(sibling=False)
    for make, text in (
        (lambda folder: None, "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no adapter_model"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "not valid JSON"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "is IA3, only LORA",
        ),
    ):
        make(tmp_path)
        with pytest.raises(AdapterError, match=text):
            callback(adapters={"zh": tmp_path}).merge_now(model)


def test_plain_model_and_two_active_adapters_are_refused() -> None:
    back = callback()
    with pytest.raises(ConfigError, match=r"must be a peft\.PeftModel"):
        back.merge_now(trainers.plain())
    model = trainers.in_training()
    model.base_model.set_adapter(["default", "zh"])
    with pytest.raises(ConfigError, match="exactly one adapter must be in training"):
        back.merge_now(model)


@pytest.mark.parametrize(
    ("shared", "text"),
    [
        ({"distributed_type": DistributedType.FSDP}, "FSDP"),
        (
            {
                "distributed_type": DistributedType.DEEPSPEED,
                "deepspeed_plugins": {"default": type("Plugin", (), {"zero_stage": 3})()},
            },
            "DeepSpeed ZeRO-3",
        ),
    ],
)
def test_sharded_training_is_refused_at_start(
    shared: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", shared)
    state = TrainerState()
    with pytest.raises(ConfigError, match=f"cannot work with {text}: every process holds only"):
        callback().on_train_begin(None, state, TrainerControl(), model=trainers.in_training())


def test_sharded_parameters_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 3  # what DeepSpeed ZeRO-3 writes on each parameter
    with pytest.raises(ConfigError, match="sharded parameters"):
        refuse_sharded(model)


# -------------------------------------------------------------------------- other trainers


def test_seq2seq_trainer(tmp_path: Path) -> None:
    def model() -> PeftModel:
        specs = tiny.default_specs("t5", 2)
        made = tiny.add_adapters(tiny.tiny_model("t5"), specs)
        made.set_adapter("en")
        return made

    def run(name: str, callbacks: list[Any]) -> Any:
        torch.manual_seed(3)
        settings = trainers.arguments(tmp_path / name).to_dict()
        keep = ("max_steps", "logging_steps", "eval_strategy", "eval_steps", "learning_rate")
        args = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / name),
            **{key: settings[key] for key in keep},
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        made = Seq2SeqTrainer(
            model=model(),
            args=args,
            train_dataset=trainers.Rows(),
            eval_dataset=trainers.Rows(8, 1),
            callbacks=callbacks,
        )
        made.train()
        return made

    without = trainers.facts(run("a", []))
    fns = tiny.eval_fns("t5", ["en", "zh"], n_examples=3)
    back = callback(eval_fns=fns, analysis="scores")
    assert moved(without, trainers.facts(run("b", [back]))) == []
    assert back.memory["round"] == 2


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning",  # TRL 1.16 sets the old name
    "ignore::DeprecationWarning",
)
def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = trainers.Rows().rows.tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows})

    def run(name: str, callbacks: list[Any]) -> Any:
        torch.manual_seed(3)
        settings = trainers.arguments(tmp_path / name).to_dict()
        keep = ("max_steps", "logging_steps", "eval_strategy", "eval_steps", "learning_rate")
        args = trl.SFTConfig(
            output_dir=str(tmp_path / name),
            **{key: settings[key] for key in keep},
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        made = trl.SFTTrainer(
            model=trainers.in_training(),
            args=args,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
        made.train()
        return made

    without = trainers.facts(run("a", []))
    back = callback(analysis="scores")
    assert moved(without, trainers.facts(run("b", [back]))) == []
    assert back.memory["round"] == 2


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


# --------------------------------------------------------------------------- two processes

_WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tiny, trainers
from peft_himerge import HiMergeConfig
from peft_himerge.callback import HiMergeCallback

out, kind = Path(sys.argv[2]), sys.argv[3]
torch.manual_seed(3)
heard = []
rank = int(__import__("os").environ["RANK"])
fns = trainers.eval_fns()
if kind == "fails":
    def fails(model):
        if rank == 1 and not torch.is_grad_enabled():
            raise RuntimeError("only on the second process")
        return float(fns["zh"](model).mean())
    fns = {**fns, "zh": fails}
callbacks = []
if kind != "without":
    config = HiMergeConfig(density=0.5, scale=0.9, max_export_drop=None,
                           processes="off" if kind == "alone" else "auto")
    callbacks = [HiMergeCallback(["zh"], fns, config=config, listeners=[heard.append],
                                 on_error="warn")]
run = trainers.trainer(out, callbacks, ddp_backend="gloo", eval_steps=2)
run.train()
facts = trainers.facts(run)
memory = callbacks[0].memory if callbacks else None
metrics = {k: v for k, v in run.evaluate().items() if "himerge" in k}
(out / f"rank{rank}.json").write_text(json.dumps(
    {"facts": {k: repr(v) for k, v in facts.items()}, "memory": memory, "heard": len(heard),
     "metrics": metrics}))
# Taking gloo down at interpreter exit aborts now and then ("terminate called without an active
# exception"), with plain DDP and no callback too; everything to be compared is written by now.
torch.distributed.barrier()
__import__("os")._exit(0)
"""


def two_processes(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    out = tmp_path / kind
    out.mkdir()
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", str(script)),
        *(str(Path(__file__).parent), str(out), kind),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_train_alike_and_only_the_main_one_logs(tmp_path: Path) -> None:
    without = two_processes(tmp_path, "without")
    found = two_processes(tmp_path, "with")
    for rank in (0, 1):
        assert moved(without[rank]["facts"], found[rank]["facts"]) == []
    assert found[0]["memory"] == found[1]["memory"]
    assert found[0]["memory"]["round"] == 2
    assert found[0]["metrics"] == found[1]["metrics"] != {}
    assert found[0]["heard"] > 0
    assert found[1]["heard"] == 0


@pytest.mark.parametrize("kind", ["fails", "alone"])
def test_two_processes_do_not_hang(kind: str, tmp_path: Path) -> None:
    first, second = two_processes(tmp_path, kind)
    assert first["memory"] == second["memory"]
    assert first["memory"]["round"] == (0 if kind == "fails" else 2)
