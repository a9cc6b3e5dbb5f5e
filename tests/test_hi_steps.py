"""What `hi` hands to the rooms below, and what it makes of what comes back, on a net of two layers.

Whether the numbers are right is seen elsewhere, against the oracle (`test_hi`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from paper import paper
from peft import LoraConfig, PeftModel, get_peft_model
from snapshot import moved, snapshot
from torch import Tensor, nn

from peft_himerge import Edit, HiMergeConfig, MergePlan, apply_plan, merge_adapters_hi
from peft_himerge import hi as room
from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.engine import Engine
from peft_himerge.errors import (
    AdapterError,
    ConfigError,
    EvalError,
    ExportError,
    JournalError,
    PlanError,
    ProcessError,
)
from peft_himerge.events import Event, MergeFinished, MergeStarted, StateScored
from peft_himerge.hi import score_plans
from peft_himerge.plan import DROP, IDENTITY
from peft_himerge.processes import Team, together
from peft_himerge.randomness import capture
from peft_himerge.reached import Reached
from peft_himerge.result import ModuleError
from peft_himerge.run import Run

FIXED = paper(density=0.5, scale=0.75, max_export_drop=None)
MODULES = ("h.0", "h.1")


class Net(nn.Module):
    """Two layers of 4 by 4."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.h = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = torch.tanh(layer(x))
        return x


def net(*names: str, zero: Sequence[str] = (), **fields: Any) -> PeftModel:
    """The net with adapters of rank 2 on both layers, those in `zero` without effect."""
    model: PeftModel | None = None
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=3, target_modules=list(MODULES), **fields)
        with torch.random.fork_rng(devices=[]):
            if model is None:
                model = get_peft_model(Net(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        draw = torch.Generator().manual_seed(seed)
        for layer in model.base_model.model.h:
            for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                factor.data = torch.randn(factor.shape, generator=draw, dtype=torch.float64)
            if name in zero:
                layer.lora_B[name].weight.data.zero_()
    assert model is not None
    return model.eval()


def task(name: str) -> Callable[[Any], Tensor]:
    """Per example, minus the squared distance to targets that depend on the name."""
    draw = torch.Generator().manual_seed(sum(name.encode()))
    x = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    y = torch.tanh(torch.randn(5, 4, generator=draw, dtype=torch.float64))
    return lambda model: -(model(x) - y).detach().square().sum(1)


def tasks(*names: str) -> dict[str, Callable[[Any], Tensor]]:
    return {name: task(name) for name in names}


def never(_model: Any) -> float:
    raise AssertionError("scored before everything was checked")


# ------------------------------------------------------------------------------------ a whole merge


def test_a_merge_goes_through_to_its_result() -> None:
    model, fns, heard = net("zh", "en"), tasks("zh", "en", "general"), list[Event]()
    before = snapshot(model)
    result = merge_adapters_hi(
        model, ["zh", "en"], fns, adapter_name="both", config=FIXED, callbacks=[heard.append]
    )
    assert moved(before, snapshot(model, but="both")) == []
    assert result.adapter_name == "both"
    assert result.model is model
    assert result.plan.adapters == {"en": Edit(0.5, 0.75), "zh": Edit(0.5, 0.75)}
    assert list(result.plan.sources) == ["en", "zh"]
    assert list(result.states) == ["base", "en", "zh", "model_wise", "merged", "exported"]
    assert all(list(row) == ["en", "zh", "general"] for row in result.states.values())
    assert [(r.layer, r.task) for r in result.contributions] == [
        (layer, name) for layer in MODULES for name in ("en", "zh")
    ]
    assert {r.conflict.layer for r in result.conflicts} == set(MODULES)
    assert result.search == ()
    assert result.options == FIXED.model_dump()
    started, *_, finished = heard
    assert isinstance(started, MergeStarted)
    assert (started.adapters, started.tasks) == (("en", "zh"), ("en", "zh", "general"))
    assert finished == MergeFinished(result.plan, result.scores)
    scored = [event for event in heard if isinstance(event, StateScored)]
    assert [event.done for event in scored] == list(range(1, len(scored) + 1))
    assert scored[-1].total == len(scored) == result.scores_computed <= started.scores
    assert scored[-1].stage == "export"  # it knew the steps, not only their sum
    # What the adapter does, PEFT's own forward does.
    model.set_adapter("both")
    for name, fn in fns.items():
        assert result.scores["exported"][name] == pytest.approx(float(fn(model).mean()), abs=1e-12)
    assert result.rank == model.peft_config["both"].r == 4
    for record in result.modules:
        delta = result.delta(record.module)
        layer = model.get_submodule(f"base_model.model.{record.module}")
        made = (layer.lora_B["both"].weight @ layer.lora_A["both"].weight).detach()
        assert record.norm == pytest.approx(float(delta.norm()))
        assert float((delta - made).norm()) == pytest.approx(record.error * record.norm, abs=1e-9)
    assert [record.module for record in result.modules] == list(MODULES)


def test_a_merge_left_to_itself_is_named_merged_and_searches_as_configured() -> None:
    model = net("zh")
    result = merge_adapters_hi(model, ["zh"], tasks("zh"))
    assert list(model.peft_config) == ["zh", "merged"]
    assert result.adapter_name == "merged"
    assert result.options == HiMergeConfig().model_dump() | {"focus": False}
    assert {trial.adapter for trial in result.search} == {"zh"}
    assert result.plan.adapters["zh"] in [trial.edit for trial in result.search]
    assert result.scores_computed >= len(result.search)
    # Without tolerance the best one is taken; with it, one that is as good and nearer to 1.
    config = HiMergeConfig(tolerance=0.0)
    exact = merge_adapters_hi(model, ["zh"], tasks("zh"), adapter_name="exact", config=config)
    best = max(exact.search, key=lambda t: t.value).edit
    assert exact.plan.adapters["zh"] == best
    assert abs(math.log(result.plan.adapters["zh"].scale)) <= abs(math.log(best.scale))


@pytest.mark.parametrize(("rank", "want"), [(1, 1), (3, 3), ("exact", 4), ("auto", 4)])
def test_rank_is_that_of_the_options(rank: Any, want: int) -> None:
    model = net("zh", "en")
    config = FIXED.model_copy(update={"rank": rank})
    result = merge_adapters_hi(model, ["zh", "en"], tasks("zh", "en"), config=config)
    assert (result.rank, model.peft_config["merged"].r) == (want, want)
    edits = {name: Edit(0.5, 0.75) for name in ("zh", "en")}
    plan = Combiner(read_adapters(model, ["zh", "en"])).plan(edits)
    applied = apply_plan(model, plan, adapter_name="again", rank=rank)
    assert (applied.rank, model.peft_config["again"].r) == (want, want)
    assert applied.options == {"rank": rank, "focus": False}


@pytest.mark.filterwarnings("ignore:adapter .* changes nothing")
def test_an_adapter_of_zeros_is_a_guard_before_the_others() -> None:
    model = net("zh", "en", zero=["en"])
    fns = tasks("zh", "general", "en")
    result = merge_adapters_hi(model, ["zh", "en"], fns, config=FIXED)
    assert result.plan.adapters == {"en": DROP, "zh": Edit(0.5, 0.75)}
    assert len(result.contributions) == 0
    assert list(result.scores["base"]) == ["zh", "general", "en"]


@pytest.mark.filterwarnings("ignore:adapter .* changes nothing")
def test_tasks_are_the_adapters_by_name_and_then_the_guards_as_they_come() -> None:
    read = read_adapters(net("en", "de", "fr", zero=["fr"]), ["en", "de", "fr"])
    fns = dict.fromkeys(("z", "fr", "en", "y", "de"), never)
    config = HiMergeConfig(metric={"de": "bleu", "y": "f1"})
    found = room._tasks(read, fns, config)
    assert [(t.name, t.metric, t.guard) for t in found.values()] == [
        ("de", "bleu", False),
        ("en", None, False),
        ("z", None, True),
        ("fr", None, True),
        ("y", "f1", True),
    ]
    assert list(found) == [t.name for t in found.values()]
    assert all(t.fn is never for t in found.values())


# --------------------------------------------------------------------------- who is told, and where


@contextmanager
def company(monkeypatch: pytest.MonkeyPatch, team: Team) -> Iterator[list[str]]:
    """Let merges meet this team; gives the modes they asked for."""
    modes: list[str] = []

    @contextmanager
    def met(mode: Any) -> Iterator[Team]:
        modes.append(mode)
        with together("off"):
            yield team

    with monkeypatch.context() as patch:
        patch.setattr(room, "together", met)
        yield modes


class Second(Team):
    """A process that is not the main one, though it computes every score."""

    main = False  # type: ignore[assignment]


def test_only_the_main_process_has_a_journal_and_listeners(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[Event] = []
    model, fns = net("zh", "en"), tasks("zh", "en")
    config = FIXED.model_copy(update={"processes": "off"})
    with company(monkeypatch, Second()) as modes:
        merge_adapters_hi(
            model, ["zh", "en"], fns, config=config, callbacks=[heard.append], journal=tmp_path
        )
        score_plans(
            model, ["zh"], {"it": MergePlan.base()}, fns, config=config, callbacks=[heard.append]
        )
    assert modes == ["off", "off"]
    assert heard == []
    assert list(tmp_path.iterdir()) == []
    with company(monkeypatch, Team()) as modes:
        merge_adapters_hi(
            model,
            ["zh", "en"],
            fns,
            adapter_name="again",
            config=FIXED,
            callbacks=[heard.append],
            journal=tmp_path,
        )
    assert modes == ["auto"]
    assert len(heard) > 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_journal_spares_the_scores_of_the_same_merge(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    results = [
        merge_adapters_hi(net("zh", "en"), ["zh", "en"], fns, config=FIXED, journal=file)
        for fns in [tasks("zh", "en")] * 2
    ]
    first, second = results
    assert first.scores_computed > 0 == second.scores_computed
    assert second.plan == first.plan
    assert second.scores == first.scores
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


class Asked(Engine):
    """An engine that notes what it was made with."""

    made: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, probe: Any, tasks: Any, emit: Any, cost: Any, **named: Any) -> None:
        self.made.append((probe, tasks, emit, cost, named))
        super().__init__(probe, tasks, emit, cost, **named)


def test_the_engine_is_given_all_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    team = Team()
    monkeypatch.setattr(room, "Engine", Asked)
    monkeypatch.setattr(Asked, "made", [])
    fns, model = tasks("zh", "en", "general"), net("zh", "en")
    config = FIXED.model_copy(
        update={"strategy": "lazy", "prefix_cache_gb": 3.5, "verify": True, "metric": None}
    )
    with company(monkeypatch, team):
        file = tmp_path / "a.jsonl"
        result = merge_adapters_hi(model, ["zh", "en"], fns, config=config, journal=file)
        score_plans(model, ["en"], {"x": MergePlan.base(), "y": MergePlan.base()}, fns)
    (probe, held, _, cost, named), (_, plain, _, flat, rest) = Asked.made
    assert (probe.strategy, probe._verify, probe.blocks._budget) == ("lazy", True, 3_500_000_000)
    counted = (probe.blocks.run, probe.blocks.skipped)
    assert (result.blocks_run, result.blocks_skipped) == counted != counted[::-1]
    assert [t.guard for t in held.values()] == [False, False, True]
    assert [t.guard for t in plain.values()] == [False, False, False]
    assert (named["team"], rest["team"]) == (team, team)
    assert named["ledger"].journal.file == file
    assert list(named["ledger"].adapters) == ["en", "zh"]
    assert set(named["ledger"].evals) == set(fns)
    assert cost.steps[0].name == "base"
    assert flat.scores == 6
    assert rest.get("ledger") is None


@pytest.mark.parametrize(
    ("journal", "size", "told"), [(False, 1, True), (True, 1, False), (False, 2, False)]
)
def test_modules_that_no_score_ran_are_told_where_all_scores_ran_here(
    journal: bool, size: int, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = torch.ones(1, 4, dtype=torch.float64)

    def half(model: Any) -> float:
        return float(model.base_model.model.h[0](first).sum())  # never the second layer

    class Team2(Team):
        pass

    team = Team2()
    done = Run.score_export

    def grown(run: Run, engine: Engine, name: str) -> None:
        done(run, engine, name)
        team.size = size  # now that all was scored

    monkeypatch.setattr(room.Run, "score_export", grown)
    with company(monkeypatch, team), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge_adapters_hi(
            net("zh", "en"),
            ["zh", "en"],
            {"zh": half, "en": half},
            config=FIXED,
            journal=tmp_path if journal else None,
        )
    texts = [str(w.message) for w in caught]
    assert [("ran 1 of the modules" in t and "'h.1'" in t) for t in texts] == [True] * told


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_merge_that_fails_leaves_neither_adapter_nor_change(tmp_path: Path) -> None:
    model = net("zh", "en")
    before = snapshot(model)

    base = torch.ones(1, 4, dtype=torch.float64)
    for layer in model.base_model.model.h:
        base = torch.tanh(layer.base_layer(base)).detach()

    def lost(model: Any) -> float:
        if not model.base_model.model.h[0].disable_adapters:
            return -5.0
        return float((model(torch.ones(1, 4, dtype=torch.float64)) - base).norm())

    fns = {"zh": lost, "en": lost}
    config = FIXED.model_copy(update={"max_export_drop": 0.1})
    with pytest.raises(ExportError, match="loses") as caught:
        merge_adapters_hi(model, ["zh", "en"], fns, config=config, journal=tmp_path / "j.jsonl")
    assert moved(before, snapshot(model)) == []
    assert caught.value.plan is not None
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]  # its scores are good


@pytest.mark.parametrize("journal", [False, True])
def test_scores_of_a_model_that_was_written_to_are_set_aside(
    journal: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = net("zh", "en"), tmp_path / "j.jsonl"
    good = tasks("zh", "en")

    def writes(model: Any) -> Tensor:
        scores = good["zh"](model)
        model.base_model.model.h[0].base_layer.weight.data.numpy()[0, 0] += 1.0
        return scores

    with pytest.raises(EvalError, match="changed the weight") as caught:
        merge_adapters_hi(
            model,
            ["zh", "en"],
            {**good, "zh": writes},
            config=FIXED,
            journal=file if journal else None,
        )
    assert list(model.peft_config) == ["zh", "en"]
    if journal:
        assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl.tainted-1"]
        assert str(caught.value) in caplog.text


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"adapters": ["zh", "zh"]}, ConfigError, "adapters names 'zh' more than once."),
    (
        {"adapter_name": "en"},
        ConfigError,
        "the model has an adapter 'en' already. Choose another adapter_name, or call "
        "model.delete_adapter('en') first.",
    ),
    (
        {"fns": {"zh": never}},
        ConfigError,
        "eval_fns has no function for adapter 'en': every adapter needs its task. Allowed: zh. "
        "Without eval functions, build a plan with MergePlan.model_wise and use apply_plan.",
    ),
    (
        {"config": HiMergeConfig(density={"zh": 1.0}, scale=1.0)},
        ConfigError,
        "density is given for ['zh'], but the adapters are ['en', 'zh']: give one value per "
        "adapter.",
    ),
    (
        {"config": HiMergeConfig(metric={"enn": "f1"})},
        ConfigError,
        "metric names the task 'enn'. Did you mean 'en'? Allowed: zh, en.",
    ),
    (
        {"adapters": ["zh", "enn"], "fns": {"zh": never, "enn": never}},
        AdapterError,
        "the model has no adapter 'enn'. Did you mean 'en'? Allowed: zh, en.",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED)
def test_what_cannot_be_merged_is_refused_in_words_before_it_is_touched(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = net("zh", "en")
    before = snapshot(model)
    asked = {"adapters": ["zh", "en"], "fns": {"zh": never, "en": never}, **change}
    adapters, fns = asked.pop("adapters"), asked.pop("fns")
    with pytest.raises(error) as caught:
        merge_adapters_hi(model, adapters, fns, **asked)
    assert str(caught.value) == text
    assert moved(before, snapshot(model)) == []


def test_adapters_of_different_bases_are_refused() -> None:
    model = net("zh", "en")
    for name in ("zh", "en"):
        model.peft_config[name].base_model_name_or_path = f"base of {name}"
    with pytest.raises(AdapterError, match="different base models"):
        merge_adapters_hi(model, ["zh", "en"], {"zh": never, "en": never})


def test_a_search_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HiMergeConfig] = []
    monkeypatch.setattr(room, "check_search", asked.append)
    merge_adapters_hi(net("zh"), ["zh"], tasks("zh"), config=FIXED)
    assert asked == [FIXED]


@pytest.mark.parametrize("model", [Net(), None])
def test_what_is_no_model_of_peft_is_refused(model: Any) -> None:
    with pytest.raises(AdapterError, match="PeftModel"):
        merge_adapters_hi(model, ["zh"], {"zh": never})


# ------------------------------------------------------------------------------- all start the same


@dataclasses.dataclass
class Others(Team):  # type: ignore[misc]
    """A team that notes what it was asked, and has this random state."""

    many: int = 2
    state: Any = None
    asked: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(0, self.many)

    def refuse_sharded(self, model: nn.Module) -> None:
        self.asked.append(model)

    def first(self, what: str, same: object, value: Any = None) -> Any:
        self.asked.append((what, same, value))
        if isinstance(self.state, Exception):
            raise self.state
        return value if self.state is None else self.state


def drawn_with(seed: int) -> tuple[dict[str, Any], float]:
    """A random state, and the number that is drawn next from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return capture(), float(torch.rand(()))


def as_ledger(state: Any, file: str = "j.jsonl") -> Any:
    return SimpleNamespace(journal=SimpleNamespace(random_state=state, file=file))


def test_one_process_without_a_journal_draws_on() -> None:
    model, team = net("zh"), Others(1)
    before = torch.get_rng_state()
    room._start_alike(team, model, Combiner(read_adapters(model, ["zh"])), None)
    assert team.asked == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("many", [1, 2, 3])
@pytest.mark.parametrize("journal", [False, True])
def test_several_processes_and_a_resumed_run_draw_the_same(many: int, journal: bool) -> None:
    if many == 1 and not journal:
        return
    model, (kept, kept_next), (told, told_next) = net("zh", "en"), drawn_with(5), drawn_with(6)
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    ledger = as_ledger(kept) if journal else None
    team = Others(many)
    with torch.random.fork_rng(devices=[]):
        here = capture()
        room._start_alike(team, model, combiner, ledger)
        after = float(torch.rand(()))
    digests = [room.base_digest(model), *(a.digest() for a in combiner.adapters.values())]
    assert team.asked == [
        model,
        (
            "weights of the model and the adapters",
            digests if many > 1 else [],
            kept if journal else here,
        ),
    ]
    assert len(set(digests)) == 3
    assert (after == kept_next) is journal
    with torch.random.fork_rng(devices=[]):  # what the first process has is put in place
        room._start_alike(Others(many, told), model, combiner, ledger)
        assert float(torch.rand(())) == told_next


def test_a_random_state_that_cannot_be_put_in_place_is_the_journal_s_fault() -> None:
    model = net("zh")
    combiner = Combiner(read_adapters(model, ["zh"]))
    for bad, what in (({}, "KeyError('python')"), ({"python": 3}, "TypeError("), (None, "Type")):
        with pytest.raises(JournalError) as caught:
            room._start_alike(Others(1), model, combiner, as_ledger(bad))
        head = "the random state in the journal j.jsonl cannot be put in place: "
        assert str(caught.value).startswith(head + what)
        assert str(caught.value).endswith(". Move the file away to begin a new one.")
    with pytest.raises(KeyError, match="python"):  # without a journal it is not
        room._start_alike(Others(2, {"numpy": 1}), model, combiner, None)
    for ledger in (None, as_ledger(capture())):
        with pytest.raises(ProcessError, match="process 1 has others"):
            room._start_alike(
                Others(2, ProcessError("process 1 has others")), model, combiner, ledger
            )


def test_a_merge_and_plans_start_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "_start_alike", lambda *given: asked.append(given))
    model, team = net("zh"), Team()
    with company(monkeypatch, team):
        merge_adapters_hi(model, ["zh"], tasks("zh"), config=FIXED, journal=tmp_path)
        score_plans(model, ["zh"], {}, tasks("zh"))
    (one, two), (made, other) = asked, [given[2] for given in asked]
    assert one[:2] == two[:2] == (team, model)
    assert list(made.adapters) == list(other.adapters) == ["zh"]
    assert one[3].journal.file.parent == tmp_path
    assert two[3] is None


# ------------------------------------------------------------------------------ plans without a run


def test_a_plan_is_applied_as_it_stands() -> None:
    model = net("zh", "en", "de")
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    plan = combiner.plan({"zh": Edit(0.5, 0.75), "en": IDENTITY}, prune_scope="layer")
    plan = plan.with_edit("h.1", "zh", DROP)
    before = snapshot(model)
    result = apply_plan(model, plan)
    assert moved(before, snapshot(model, but="merged")) == []
    assert (result.adapter_name, result.model, result.plan) == ("merged", model, plan)
    assert (result.scores_computed, result.states, result.search) == (0, {}, ())
    assert (len(result.contributions), result.conflicts) == (0, ())
    assert (result.blocks_run, result.blocks_skipped) == (0, 0)
    assert result.options == {"rank": "auto", "focus": False}
    assert result.rank == model.peft_config["merged"].r == 4
    en = model.base_model.model.h[1]
    alone = en.scaling["en"] * en.lora_B["en"].weight @ en.lora_A["en"].weight
    assert torch.allclose(result.delta("h.1"), alone)
    assert torch.allclose(en.lora_B["merged"].weight @ en.lora_A["merged"].weight, alone)
    assert [type(record) for record in result.modules] == [ModuleError] * 2
    assert [record.rank for record in result.modules] == [4, 2]


def test_a_plan_that_does_not_fit_is_refused_in_words() -> None:
    model = net("zh", "en")
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    plan = combiner.plan(dict.fromkeys(("zh", "en"), IDENTITY))
    before = snapshot(model)
    cases: list[tuple[MergePlan, dict[str, Any], type[Exception], str]] = [
        (MergePlan.base(), {}, ConfigError, "the plan merges no adapter: it is the base model's."),
        (
            plan,
            {"adapter_name": "zh"},
            ConfigError,
            "the model has an adapter 'zh' already. Choose another adapter_name, or call "
            "model.delete_adapter('zh') first.",
        ),
        (
            dataclasses.replace(plan, sources={"zh": "0" * 64}),
            {},
            PlanError,
            "the weights of adapter 'zh' are not those the plan was made for (digest "
            "000000000000…). Use the original adapter (for a merge of focused ones those in the "
            "folder 'focused' beside the plan), or drop 'sources' from the plan to apply it all "
            "the same.",
        ),
    ]
    for given, named, error, text in cases:
        with pytest.raises(error) as caught:
            apply_plan(model, given, **named)
        assert str(caught.value) == text
        assert moved(before, snapshot(model)) == []
    model.base_model.model.h[0].base_layer.weight = nn.Parameter(torch.zeros(4, 5))
    with pytest.raises(AdapterError, match=r"'h\.0'.*the base weight is \(4, 5\)"):
        apply_plan(model, plan)


def test_plans_are_scored_by_name_and_the_model_comes_back() -> None:
    model, heard = net("zh", "en"), list[Event]()
    combiner = Combiner(read_adapters(model, ["zh", "en"]))
    plan = combiner.plan({"zh": Edit(0.5, 0.75), "en": Edit(1.0, 0.5)})
    plans = {"nothing": MergePlan.base(), "both": plan, "zh alone": plan.solo("zh")}
    fns = {"one": lambda model: {"f1": task("zh")(model), "loss": 9.0}, "two": task("en")}
    config = HiMergeConfig(metric={"one": "f1"}, strategy="lazy")
    before = snapshot(model)
    found = score_plans(model, ["zh", "en"], plans, fns, config=config, callbacks=[heard.append])
    assert moved(before, snapshot(model)) == []
    assert {name: list(row) for name, row in found.items()} == {
        name: ["one", "two"] for name in plans
    }
    assert {row["one"].metrics["loss"] for row in found.values()} == {9.0}
    events = [event for event in heard if isinstance(event, StateScored)]
    assert len(events) == len(heard) == 6
    assert [(event.done, event.total) for event in events] == [(n, 6) for n in range(1, 7)]
    with model.disable_adapter():
        assert found["nothing"]["two"].value == float(fns["two"](model).mean())
    for name in ("both", "zh alone"):
        apply_plan(model, plans[name], adapter_name="it", rank="exact")
        model.set_adapter("it")
        for key, fn in tasks("zh", "en").items():
            scored = found[name]["one" if key == "zh" else "two"]
            assert scored.value == pytest.approx(float(fn(model).mean()), abs=1e-10)
        model.set_adapter("zh")
        model.delete_adapter("it")


def test_plans_that_cannot_be_scored_are_refused() -> None:
    model = net("zh", "en")
    plan = Combiner(read_adapters(model, ["zh"])).plan({"zh": IDENTITY})
    alien = dataclasses.replace(plan, sources={"zh": "0" * 64})
    fns = {"one": never}
    cases: list[tuple[Any, Mapping[str, MergePlan], dict[str, Any], type[Exception], str]] = [
        (["zh", "zh"], {}, {}, ConfigError, "more than once"),
        (["zh"], {"it": plan, "other": alien}, {}, PlanError, "not those the plan was made for"),
        (["zh"], {}, {"metric": {"on": "f1"}}, ConfigError, "'on'.*Did you mean 'one'"),
        (
            ["zh"],
            {},
            {"density": {"en": 1.0}, "scale": 1.0},
            ConfigError,
            r"density is given for \['en'\], but the adapters are \['zh'\]",
        ),
    ]
    before = snapshot(model)
    for adapters, plans, options, error, text in cases:
        with pytest.raises(error, match=text):
            score_plans(model, adapters, plans, fns, config=HiMergeConfig(**options))
    with pytest.raises(EvalError, match="task 'one' returned None"):
        score_plans(model, ["zh"], {"it": plan}, {"one": lambda model: None})
    assert moved(before, snapshot(model)) == []


# ------------------------------------------------------------------------------------- what is told


def test_a_result_tells_what_the_run_found_and_how_long_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(100.0, 7.0)
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = net("zh", "en")
    result = merge_adapters_hi(model, ["zh", "en"], tasks("zh", "en"), config=FIXED)
    assert result.seconds == 7.0
    assert apply_plan(model, result.plan, adapter_name="again").seconds == 7.0
    assert result._versions == {a.name: a.version() for a in read_adapters(model, ["zh", "en"])}
    assert result.blocks_run > 0
    assert result.blocks_skipped > 0
    off = FIXED.model_copy(update={"prefix_cache_gb": 0.0})
    plain = merge_adapters_hi(
        model, ["zh", "en"], tasks("zh", "en"), adapter_name="plain", config=off
    )
    assert (plain.blocks_run, plain.blocks_skipped) == (0, 0)


def test_peft_adds_to_the_user_s_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = net("zh", "en"), list[bool]()
    weights = [layer.base_layer.weight for layer in model.base_model.model.h]
    add = room.export.add_adapter

    def noted(model: Any, *given: Any) -> int:
        now = [layer.base_layer.weight for layer in model.base_model.model.h]
        seen.append(all(one is other for one, other in zip(now, weights, strict=True)))
        return add(model, *given)

    monkeypatch.setattr(room.export, "add_adapter", noted)
    result = merge_adapters_hi(model, ["zh", "en"], tasks("zh", "en"), config=FIXED)
    apply_plan(model, result.plan, adapter_name="again")
    assert seen == [True, True]  # no state is left in their place


def test_modules_are_watched_through_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, tuple[str, ...]]] = []

    class Noted(Reached):
        def __init__(self, model: Any, modules: Any) -> None:
            made.append((model, tuple(modules)))
            super().__init__(model, modules)

    monkeypatch.setattr(room, "Reached", Noted)
    model = net("zh")
    merge_adapters_hi(model, ["zh"], tasks("zh"), config=FIXED)
    assert made == [(model, MODULES)]
