"""The story of a merge for readers: every number of it comes from the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from paper import paper

from peft_himerge import Edit, MergeResult, merge_adapters_hi
from peft_himerge.card import render_card
from peft_himerge.conflict import Conflict, ConflictKind, Resolution
from peft_himerge.plan import DROP, IDENTITY
from peft_himerge.report import (
    conflict_record,
    describe_edit,
    render_markdown,
    score_rows,
)


def resolution(
    kind: ConflictKind,
    edits: dict[str, Edit],
    accepted: bool = True,
    winner: str | None = None,
    after: dict[str, float] | None = None,
) -> Resolution:
    conflict = Conflict("h.0", kind, 1.5, {"en": 0.5, "zh": 1.0}, winner)
    measured = {"en": 0.2} if after is None else after
    return Resolution(conflict, edits, accepted, {"en": 0.1}, measured)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (resolution(ConflictKind.MUTUAL, {}, False), "left alone"),
        (
            resolution(ConflictKind.SEVERE, {"en": IDENTITY, "zh": DROP}, winner="en"),
            "kept only en",
        ),
        (
            resolution(ConflictKind.PARTIAL, {"en": Edit(0.15, 0.45)}),
            "en: density 0.15, scale 0.45",
        ),
        (
            resolution(ConflictKind.PARTIAL, {"en": Edit(0.15, 0.45)}, accepted=False),
            "en: density 0.15, scale 0.45 (undone: it did not win)",
        ),
        (
            resolution(ConflictKind.PARTIAL, {"en": Edit(0.15, 0.45)}, False, after={}),
            "en: density 0.15, scale 0.45 (not tried)",
        ),
        (resolution(ConflictKind.PARTIAL, {}, False), "left alone"),
    ],
)
def test_edit_is_described_in_words(given: Resolution, text: str) -> None:
    assert describe_edit(given) == text


def test_conflict_record_is_plain_json() -> None:
    given = resolution(ConflictKind.SEVERE, {"en": IDENTITY, "zh": DROP}, winner="en")
    record = conflict_record(given)
    assert json.loads(json.dumps(record)) == record
    assert record["kind"] == "severe"
    assert record["edits"]["zh"] == {"density": 0.0, "scale": 0.0}
    assert (record["before"], record["after"]) == ({"en": 0.1}, {"en": 0.2})


def test_score_rows_hold_score_error_and_mean() -> None:
    header, rows = score_rows(
        {"base": {"en": 0.25, "zh": 0.75}, "merged": {"en": 1.0, "zh": 0.5}},
        {"base": {"en": 0.01, "zh": None}},
    )
    assert header == ["state", "en", "zh", "mean"]
    assert rows == [
        ["base", "0.250 ± 0.010", "0.750", "0.500"],
        ["merged", "1.000", "0.500", "0.750"],
    ]


def test_score_rows_of_nothing_are_empty() -> None:
    assert score_rows({}, {})[1] == []


@pytest.fixture(scope="module")
def result() -> MergeResult:
    names = ["zh", "en"]
    model, fns = tiny.peft_model("llama", 2, torch.float32), tiny.eval_fns("llama", names)
    config = paper(density=0.4, scale=0.9, max_export_drop=None)
    return merge_adapters_hi(model, names, fns, adapter_name="both", config=config)


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the markdown table under a heading, without header and rule."""
    body = text.split(f"## {title}\n\n", 1)[1].split("\n\n", 1)[0]
    return [[c.strip() for c in line.strip("| ").split(" | ")] for line in body.splitlines()[2:]]


def test_markdown_holds_every_state_layer_and_contribution(result: MergeResult) -> None:
    text = render_markdown(result.to_dict())
    assert text.startswith("# Merge report: both\n")
    assert [row[0] for row in table(text, "Scores")] == list(result.scores)
    for row, (state, scores) in zip(table(text, "Scores"), result.scores.items(), strict=True):
        assert row[-1] == f"{sum(scores.values()) / 2:.3f}", state
    layers = table(text, "Layers, worst first")
    assert [row[0] for row in layers] == [r.conflict.layer for r in result.conflicts]
    assert [row[1] for row in layers] == [r.conflict.kind.value for r in result.conflicts]
    rows = table(text, "Contributions")
    assert [row[:2] for row in rows] == [[c.layer, c.task] for c in result.contributions]
    assert [row[2] for row in rows] == [f"{c.alpha_alone:+.4f}" for c in result.contributions]
    assert f"{result.scores_computed} scores" in text
    assert f"Rank {result.rank}" in text
    assert result.plan.fingerprint[:16] in text


def test_markdown_of_a_replayed_plan_needs_no_scores(result: MergeResult) -> None:
    from peft_himerge import apply_plan

    replayed = apply_plan(tiny.peft_model("llama", 2, torch.float32), result.plan)
    text = render_markdown(replayed.to_dict())
    assert "## Scores" not in text
    assert "## Model-wise step" in text


def test_markdown_of_names_with_a_bar_keeps_its_columns(result: MergeResult) -> None:
    facts: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    facts["scores"] = {"base": {"a|b": 0.5}}
    facts["standard_errors"] = {}
    assert "| state | a\\|b | mean |" in render_markdown(facts)


def test_card_names_the_sources_the_base_and_the_method(result: MergeResult) -> None:
    card = render_card(result.to_dict(), "org/base")
    head = card.split("---")[1]
    assert "base_model: org/base" in head
    assert "library_name: peft" in head
    for name, digest in result.plan.sources.items():
        assert f"`{name}`, digest `{digest[:16]}`" in card
    assert "2506.12379" in card
    assert "base_model" not in render_card(result.to_dict(), None).split("---")[1]


def test_facts_are_plain_json_without_nan(result: MergeResult, tmp_path: Path) -> None:
    facts = result.to_dict()
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text)["scores"] == result.scores
    assert facts["cost"]["scores"] == result.scores_computed
    assert facts["export"]["relative_error"] == result.export_error
    assert {m["module"] for m in facts["export"]["modules"]} == {m.module for m in result.modules}
    assert set(facts["versions"]) == {"python", "torch", "transformers", "peft"}
    assert str(tmp_path.parent) not in text  # no path of this machine


def test_edits_by_degrees_are_said_in_words() -> None:
    conflict = Conflict("h.0", ConflictKind.PARTIAL, 0.1, {"a": 0.2, "b": -0.1}, offenders=("b",))
    for edit, words in (
        (Edit(1.0, 0.0), "dropped a"),
        (Edit(1.0, 1.5), "a: scale 1.5"),
        (Edit(0.25, 0.5), "a: density 0.25, scale 0.5"),
    ):
        assert describe_edit(Resolution(conflict, {"a": edit}, accepted=True)) == words


def test_a_layer_without_a_conflict_that_was_edited_all_the_same_says_so() -> None:
    edits = {"en": Edit(1.0, 1.5), "zh": Edit(1.0, 0.0)}
    assert describe_edit(resolution(ConflictKind.MUTUAL, edits)) == "en: scale 1.5, dropped zh"
    assert describe_edit(resolution(ConflictKind.MUTUAL, {})) == "left alone"
