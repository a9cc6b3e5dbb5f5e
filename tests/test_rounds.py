"""One round of a merge in training, without a trainer: who takes part, what comes of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from peft import PeftModel
from snapshot import bits, moved, snapshot

from peft_himerge import Edit, HiMergeConfig, MergePlan, apply_plan
from peft_himerge import rounds as room
from peft_himerge.adapters import read_adapters
from peft_himerge.conflict import Conflict, ConflictKind, Resolution
from peft_himerge.contribution import Contributions
from peft_himerge.errors import AdapterError, ConfigError, ProcessError
from peft_himerge.events import AdapterSaved, Event, MergeFinished, MergeStarted, StateScored
from peft_himerge.processes import Team
from peft_himerge.rounds import Job, digest, facts, improved, merged, rebuilt, save, tell
from peft_himerge.tracking import Round

CONFIG = HiMergeConfig(density=0.5, scale=0.9, rank=6, prune_scope="layer", max_export_drop=None)
NAMES = ("default", "zh")


def job(**options: Any) -> Job:
    settings = {"siblings": ("zh",), "folders": {}, "eval_fns": trainers.eval_fns()}
    return Job(**{**settings, "config": CONFIG, **options})


class Heard(list[Event]):
    """A listener that keeps what it hears."""

    def __call__(self, event: Event) -> None:
        self.append(event)


# --------------------------------------------------------------------------------- who takes part


def test_the_adapter_in_training_comes_first_and_once(tmp_path: Path) -> None:
    model = trainers.in_training()
    assert job().names(model) == ["default", "zh"]
    named = job(siblings=("zh", "default"), folders={"en": tmp_path}, eval_fns={})
    assert named.names(model) == ["default", "zh", "en"]


def test_a_sibling_that_is_missing_is_named_with_both_ways_out() -> None:
    with pytest.raises(ConfigError) as caught:
        job(siblings=("zhh",)).names(trainers.in_training())
    assert str(caught.value) == (
        "the model has no adapter 'zhh'. Did you mean 'zh'? Allowed: default, zh. Load it before "
        "training, or give its folder: adapters={'zhh': folder}."
    )


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    model = trainers.in_training()
    taken = "the model has an adapter 'zh' already; choose another name for the "
    with pytest.raises(ConfigError) as caught:
        job(adapter_name="zh").names(model)
    assert str(caught.value) == f"{taken}merged adapter."
    with pytest.raises(ConfigError) as caught:
        job(siblings=(), folders={"zh": tmp_path}).names(model)
    assert str(caught.value) == f"{taken}one in the folder."


def test_every_adapter_needs_an_eval_function_if_there_are_any() -> None:
    model, fns = trainers.in_training(), trainers.eval_fns()
    for absent, what in (("default", "the adapter in training"), ("zh", "the sibling")):
        (left,) = set(fns) - {absent}
        with pytest.raises(ConfigError) as caught:
            job(eval_fns={left: fns[left]}).names(model)
        assert str(caught.value) == (
            f"eval_fns has no function for {what}, {absent!r}. Allowed: {left}."
        )


def test_what_is_no_model_in_training_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError) as caught:
        digest(trainers.plain())
    assert str(caught.value) == (
        "the model in training must be a peft.PeftModel, got LlamaForCausalLM. Wrap it with "
        "get_peft_model(model, LoraConfig(...)) before it goes to the trainer."
    )
    model = trainers.in_training()
    model.base_model.set_adapter(["default", "zh"])
    with pytest.raises(ConfigError) as caught:
        digest(model)
    assert str(caught.value) == (
        "exactly one adapter must be in training, active are ['default', 'zh']. Call "
        "model.set_adapter(name)."
    )


def test_check_looks_into_folders_and_into_options_per_name(tmp_path: Path) -> None:
    model = trainers.in_training(sibling=False)
    folder = trainers.sibling_folder(tmp_path)
    fine = job(siblings=(), folders={"zh": folder})
    fine.check(model)
    with pytest.raises(AdapterError, match=r"'zh'.*has no adapter_config\.json"):
        dataclasses.replace(fine, folders={"zh": tmp_path}).check(model)
    for config, text in (
        (HiMergeConfig(density={"default": 1.0}, scale=1.0), r"density.*\['default', 'zh'\]"),
        (HiMergeConfig(metric={"zhh": "bleu"}), "task 'zhh'.*Did you mean 'zh'"),
    ):
        with pytest.raises(ConfigError, match=text):
            dataclasses.replace(fine, config=config).check(model)


def test_digest_is_that_of_the_adapter_in_training() -> None:
    model = trainers.in_training()
    before = digest(model)
    assert before == read_adapters(model, ["default"])[0].digest()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "zh" in name.split("."):
                weight.mul_(2.0)
    assert digest(model) == before
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(2.0)
    assert digest(model) != before


# ---------------------------------------------------------------------------------- what it makes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainers.sibling_folder(tmp_path_factory.mktemp("siblings"))


def weights(model: PeftModel, name: str) -> dict[str, str]:
    """The bits of one adapter's weights."""
    found = model.named_parameters()
    return {path: bits(weight) for path, weight in found if name in path.split(".")}


@pytest.mark.parametrize("analysis", ["full", "scores", "off"])
@pytest.mark.parametrize("guest", [False, True])
def test_the_merged_adapter_is_there_for_a_while_and_nothing_stays(
    analysis: Any, guest: bool, folder: Path
) -> None:
    model = trainers.in_training(sibling=not guest).train()
    who: dict[str, Any] = {"siblings": (), "folders": {"zh": folder}} if guest else {}
    before, heard = snapshot(model), Heard()
    with merged(model, job(**who, adapter_name="both"), analysis, [heard]) as result:
        assert set(model.peft_config) == {"default", "zh", "both"}
        assert model.active_adapter == "default"
        assert result.adapter_name == "both"
        assert (result.rank, result.plan.prune_scope) == (6, "layer")
        assert result.plan.adapters == {name: Edit(0.5, 0.9) for name in NAMES}
    assert moved(before, snapshot(model)) == []
    states = {"base", *NAMES, "merged"}
    if analysis == "full":
        states |= {"model_wise", "exported"}
        assert len(result.contributions) == len(result.conflicts) * 2 > 0
    assert set(result.states) == (set() if analysis == "off" else states)
    assert isinstance(heard[0], MergeStarted)
    assert isinstance(heard[-1], MergeFinished)
    assert heard[-1].plan == result.plan


def test_a_round_without_analysis_scores_the_model_wise_merge() -> None:
    model = trainers.in_training()
    heard = Heard()
    extra = {**trainers.eval_fns(), "guard": lambda model: {"f1": 0.25, "loss": 9.0}}
    each = HiMergeConfig(
        density={"default": 0.5, "zh": 0.4},
        scale={"default": 0.9, "zh": 1.2},
        metric={"guard": "f1"},
    )
    with merged(model, job(eval_fns=extra, config=each), "scores", [heard]) as result:
        plan = result.plan
    assert plan.adapters == {"default": Edit(0.5, 0.9), "zh": Edit(0.4, 1.2)}
    assert set(plan.edits) == {f"model.layers.{i}" for i in range(4)}
    started, *scored, finished = heard
    assert started == MergeStarted(
        NAMES, ("default", "zh", "guard"), tuple(plan.edits), 12, plan.sources
    )
    assert result.scores_computed == 12 == len(scored)  # 4 states, 3 tasks
    assert all(isinstance(event, StateScored) for event in scored)
    assert {row["guard"] for row in result.scores.values()} == {0.25}
    assert finished == MergeFinished(plan, result.scores)
    # The same states, looked at through PEFT alone.
    model = trainers.in_training().eval()
    with model.disable_adapter():
        base = trainers.eval_fns()["zh"](model).mean().item()
    assert result.scores["base"]["zh"] == pytest.approx(base, abs=1e-6)
    apply_plan(model, plan.solo("zh"), adapter_name="alone", rank="exact")
    model.set_adapter("alone")
    alone = trainers.eval_fns()["zh"](model).mean().item()
    assert result.scores["zh"]["zh"] == pytest.approx(alone, abs=1e-5)


def test_a_round_that_scores_nothing_says_so() -> None:
    heard = Heard()
    with merged(trainers.in_training(), job(config=HiMergeConfig()), "off", [heard]) as result:
        assert result.plan.adapters == {name: Edit(1.0, 1.0) for name in NAMES}  # no search
    assert (result.states, result.scores_computed) == ({}, 0)
    assert [type(event) for event in heard] == [MergeStarted, MergeFinished]
    assert isinstance(heard[0], MergeStarted)
    assert (heard[0].tasks, heard[0].scores) == ((), 0)


def test_only_the_main_process_tells_the_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_main", lambda: False)
    heard = Heard()
    with merged(trainers.in_training(), job(), "off", [heard]):
        assert heard == []


def test_a_failure_within_the_round_leaves_nothing_behind(folder: Path) -> None:
    model = trainers.in_training(sibling=False).train()
    before = snapshot(model)
    made = job(siblings=(), folders={"zh": folder}, adapter_name="best")

    def broken(model: Any) -> float:
        raise RuntimeError("the test set is gone")

    with pytest.raises(RuntimeError, match="adapters 'best'"), merged(model, made, "off"):
        raise RuntimeError(f"the disk is full of adapters {list(model.peft_config)[-1]!r}")
    assert moved(before, snapshot(model)) == []
    failing = dataclasses.replace(made, eval_fns={"default": broken, "zh": broken})
    with pytest.raises(RuntimeError, match="the test set is gone"), merged(model, failing, "full"):
        pass
    assert moved(before, snapshot(model)) == []


def test_a_round_asks_the_other_processes_before_it_merges() -> None:
    asked: list[Any] = []

    class Others(Team):
        def exchange(self, what: str, mine: Any) -> list[Any]:
            asked.append((what, mine))
            raise ProcessError("process 1 failed")

    model, heard = trainers.in_training(), Heard()
    with (
        pytest.raises(ProcessError, match="process 1"),
        merged(model, job(), "off", [heard], Others()),
    ):
        pass
    assert asked == [("the adapters of this round", None)]
    assert heard == []
    assert set(model.peft_config) == set(NAMES)


def test_the_journal_of_a_round_spares_the_next_one_its_scores(tmp_path: Path) -> None:
    model, made = trainers.in_training(), job(journal=tmp_path / "journal")
    with merged(model, made, "full") as first:
        assert first.scores_computed > 0
    with merged(model, made, "full") as second:
        assert second.scores_computed == 0
        assert second.plan == first.plan


def reloaded(model: PeftModel) -> None:
    """Put the same weights into the adapter in training as new parameters, and spoil the old."""
    for path, old in list(model.named_parameters()):
        if "default" in path.split("."):
            module = model.get_submodule(path.removesuffix(".weight"))
            module.weight = torch.nn.Parameter(old.detach().clone(), requires_grad=True)
            old.data.zero_()


def test_rebuilt_is_the_same_adapter_with_its_story(folder: Path) -> None:
    model = trainers.in_training(sibling=False).train()
    made = job(siblings=(), folders={"zh": folder}, adapter_name="round")
    module = "model.layers.0.self_attn.v_proj"
    with merged(model, made, "full") as first:
        want, delta = weights(model, "round"), first.delta(module)
    reloaded(model)  # as a trainer does that takes back its best checkpoint
    before = snapshot(model)
    with rebuilt(model, made, first) as again:
        assert weights(model, "round") == want != {}
        assert torch.equal(again.delta(module), delta)
        for field in dataclasses.fields(again):
            if not field.name.startswith("_"):  # its options too, which the card tells
                assert getattr(again, field.name) == getattr(first, field.name), field.name
    assert moved(before, snapshot(model)) == []


# ----------------------------------------------------------------------------- what is remembered


def done(**changes: Any) -> Round:
    partial = Conflict("h.1", ConflictKind.PARTIAL, 0.5, {"en": 1.0, "zh": -0.5}, None, ("zh",))
    found = Round(
        round=3,
        trigger="evaluate",
        global_step=40,
        epoch=0.5,
        adapters=("en", "zh"),
        scores={
            "base": {"en": 0.1, "zh": 0.2},
            "en": {"en": 0.5, "zh": 0.3},
            "merged": {"en": 0.4, "zh": 0.6},
        },
        metrics={},
        score=0.5,
        best_score=0.7,
        kept={"en": 0.75, "zh": None},
        contributions=Contributions(),
        conflicts=(Resolution(partial, {"zh": Edit(0.5, 0.5)}, True),),
        plan=MergePlan.base(),
        scores_computed=6,
        seconds=1.5,
    )
    return dataclasses.replace(found, **changes)


def test_facts_are_what_the_trainer_logs_and_a_checkpoint_keeps() -> None:
    assert facts(done()) == {
        "round": 3,
        "best_score": 0.7,
        "metrics": {
            "score": 0.5,
            "best_score": 0.7,
            "merged_en": 0.4,
            "base_en": 0.1,
            "alone_en": 0.5,
            "kept_en": 0.75,
            "merged_zh": 0.6,
            "base_zh": 0.2,
        },
        "history": {
            "round": 3,
            "trigger": "evaluate",
            "global_step": 40,
            "score": 0.5,
            "kept": {"en": 0.75, "zh": None},
            "fingerprint": MergePlan.base().fingerprint,
            "conflicts": [["h.1", "partial", 0.5]],
        },
    }


def test_facts_of_a_round_without_scores_have_no_metrics() -> None:
    found = facts(done(scores={}, kept={}, score=None, best_score=0.7))
    assert found["metrics"] == {}
    assert found["best_score"] == 0.7


@pytest.mark.parametrize(
    ("score", "best", "better"),
    [(0.5, None, True), (0.5, 0.4, True), (0.5, 0.5, False), (0.5, 0.6, False), (None, None, False),
     (None, 0.1, False), (math.nan, 0.1, False), (-1.0, None, True)],
)  # fmt: skip
def test_improved(score: float | None, best: float | None, better: bool) -> None:
    assert improved(done(score=score), best) is better


def test_tell_and_save_reach_every_listener_in_order(tmp_path: Path) -> None:
    order: list[Any] = []
    tell([lambda e: order.append((1, e)), lambda e: order.append((2, e))], MergeStarted)  # type: ignore[arg-type]
    assert order == [(1, MergeStarted), (2, MergeStarted)]
    heard, folders = Heard(), [tmp_path / "a", tmp_path / "b"]
    with merged(trainers.in_training(), job(), "off") as result:
        save(result, folders, [heard])
    assert heard == [AdapterSaved(folder, result.plan) for folder in folders]
    for folder in folders:
        assert MergePlan.from_json(folder / "plan.json") == result.plan
        assert (folder / "adapter_model.safetensors").is_file()
        assert not list(folder.glob("*.html"))
