"""Scores are computed once per state, announced in order, and never guessed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from paper import paper
from peft import PeftModel
from snapshot import bits

from peft_himerge import MergeResult, merge_adapters_hi
from peft_himerge.events import (
    ContributionsMeasured,
    Event,
    LayerResolved,
    MergeFinished,
    MergeStarted,
    StateScored,
)

LAYERS = 4


def everywhere(n: int) -> tuple[PeftModel, list[str], dict[str, Any]]:
    """A model whose adapters all have modules in all layers and nowhere else."""
    names = list(tiny.NAMES[:n])
    specs = {
        name: {"r": 2 + i, "alpha": 5, "target_modules": ["q_proj", "up_proj"], "seed": i}
        for i, name in enumerate(names)
    }
    model = tiny.add_adapters(tiny.tiny_llama(dtype=torch.float64), specs)
    return model, names, tiny.eval_fns("llama", names)


def counted(fns: dict[str, Any]) -> tuple[dict[str, Any], Counter[str]]:
    calls: Counter[str] = Counter()

    def wrap(name: str) -> Any:
        def fn(model: Any) -> Any:
            calls[name] += 1
            return fns[name](model)

        return fn

    return {name: wrap(name) for name in fns}, calls


def run(
    model: PeftModel, names: list[str], fns: Any, **options: Any
) -> tuple[MergeResult, list[Event]]:
    events: list[Event] = []
    config = {"density": 0.4, "scale": 0.9, "max_export_drop": None, **options}
    result = merge_adapters_hi(model, names, fns, config=paper(**config), callbacks=[events.append])
    return result, events


@pytest.mark.parametrize("n", [2, 3])
def test_analysis_takes_4l_plus_3_scores_per_task_and_each_once(n: int) -> None:
    model, names, fns = everywhere(n)
    fns, calls = counted(fns)
    result, events = run(model, names, fns)
    assert any(r.edits for r in result.conflicts)
    # Beside M(4L + 3): each adapter alone on the others' tasks, the merged and the exported state.
    want = n * (4 * LAYERS + 3) + n * (n - 1) + n + n
    assert calls.total() == result.scores_computed == want
    assert set(calls.values()) == {want // n}
    scored = [e for e in events if isinstance(e, StateScored)]
    assert len(scored) == want
    keys = [(e.task, e.plan.fingerprint if e.plan else "exported") for e in scored]
    assert len(set(keys)) == len(keys)


def test_states_that_are_equal_cost_nothing() -> None:
    # With density 0 every state is the base model's: one score per task, and one for the export.
    model, names, fns = everywhere(2)
    fns, calls = counted(fns)
    result, _ = run(model, names, fns, density=0.0)
    assert calls == {"zh": 2, "en": 2}
    assert result.scores["merged"] == result.scores["base"] == result.scores["exported"]


def test_states_with_equal_fingerprints_have_equal_weights_and_others_not() -> None:
    model, names, _ = everywhere(2)
    seen: dict[str, set[str]] = {}
    shown: list[str] = []

    def weights(model: Any) -> float:
        inner = model.base_model.model
        folded = [p for n, p in inner.named_parameters() if "base_layer" in n]
        shown.append("".join(bits(p) for p in folded))
        return float(len(shown))

    def note(event: Event) -> None:
        if isinstance(event, StateScored) and event.plan is not None:
            seen.setdefault(event.plan.fingerprint, set()).add(shown[-1])

    config = paper(density=0.4, scale=0.9, max_export_drop=None, strategy="fold")
    merge_adapters_hi(model, names, {"zh": weights, "en": weights}, config=config, callbacks=[note])
    assert len(seen) >= 4 + 6 * LAYERS  # base, two alone, merged; each with and without a layer
    assert all(len(states) == 1 for states in seen.values())
    assert len({next(iter(states)) for states in seen.values()}) == len(seen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.0},
        {"density": 1.0, "scale": 1.0},
        {"reanalyze": "each", "accept": "no_regression"},
        {"density": "search", "scale": 1.0},
        {"density": "search", "scale": "search", "search_target": "merged"},
    ],
)
@pytest.mark.parametrize("guard", [False, True])
def test_progress_never_goes_back_and_never_passes_its_total(
    options: dict[str, Any], guard: bool
) -> None:
    model, names, fns = everywhere(2)
    if guard:
        fns["general"] = tiny.eval_fns("llama", ["general"])["general"]
    result, events = run(model, names, fns, **options)
    scored = [e for e in events if isinstance(e, StateScored)]
    assert [e.done for e in scored] == list(range(1, len(scored) + 1))
    assert all(e.done <= e.total for e in scored)
    started = events[0]
    assert isinstance(started, MergeStarted)
    # The bound given at the start holds to the end: it is what an ETA is computed from.
    assert all(e.total <= started.scores for e in scored)
    assert result.scores_computed == len(scored) <= started.scores
    assert all(e.seconds >= 0 for e in scored)


def test_events_tell_the_story_in_order() -> None:
    model, names, fns = everywhere(2)
    fns["general"] = tiny.eval_fns("llama", ["general"])["general"]
    result, events = run(model, names, fns)
    kinds = [type(e).__name__ for e in events if not isinstance(e, StateScored)]
    assert kinds == [
        "MergeStarted",
        "ContributionsMeasured",
        *["LayerResolved"] * LAYERS,
        "MergeFinished",
    ]
    started, finished = events[0], events[-1]
    assert isinstance(started, MergeStarted)
    assert isinstance(finished, MergeFinished)
    assert set(started.adapters) == set(names)
    assert started.tasks[-1] == "general"
    assert set(started.tasks) == {*names, "general"}
    assert len(started.layers) == LAYERS
    assert set(started.digests) == set(names)
    assert finished.plan == result.plan
    assert finished.scores == result.scores
    measured = next(e for e in events if isinstance(e, ContributionsMeasured))
    assert measured.contributions == result.contributions
    resolved = [e for e in events if isinstance(e, LayerResolved)]
    assert tuple(e.resolution for e in resolved) == result.conflicts
    assert resolved[-1].plan == result.plan
    stages = list(dict.fromkeys(e.stage for e in events if isinstance(e, StateScored)))
    assert stages == ["states", "analysis", "export"]
    Gammas = [e.resolution.conflict.Gamma for e in resolved]
    assert Gammas == sorted(Gammas, reverse=True)


def test_scores_in_events_are_those_of_the_result() -> None:
    model, names, fns = everywhere(2)
    result, events = run(model, names, fns)
    told = {
        (e.task, e.plan.fingerprint): e.score.value
        for e in events
        if isinstance(e, StateScored) and e.plan is not None
    }
    for task in names:
        assert told[task, result.plan.fingerprint] == result.scores["merged"][task]


def test_several_callbacks_hear_the_same_in_their_order() -> None:
    model, names, fns = everywhere(2)
    heard: list[tuple[str, Event]] = []
    config = paper(density=1.0, scale=1.0, max_export_drop=None)
    callbacks = [lambda e: heard.append(("one", e)), lambda e: heard.append(("two", e))]
    merge_adapters_hi(model, names, fns, config=config, callbacks=callbacks)
    assert [who for who, _ in heard[:4]] == ["one", "two", "one", "two"]
    assert [e for who, e in heard if who == "one"] == [e for who, e in heard if who == "two"]
