"""Plans: frozen, fingerprinted by the state they make, and round-tripped through JSON."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_himerge import Edit, MergePlan
from peft_himerge.errors import HiMergeError, PlanError
from peft_himerge.plan import DROP, IDENTITY

EDITS = st.builds(
    Edit,
    st.floats(0, 1),
    st.floats(-4, 4, allow_nan=False).map(lambda value: 0.0 if value == 0 else value),
)


@st.composite
def plans(draw: st.DrawFn) -> MergePlan:
    names = draw(st.lists(st.sampled_from(["en", "zh", "数学", "a b"]), unique=True, min_size=1))
    layers = draw(st.lists(st.sampled_from(["h.0", "h.1", "h.10", "outside"]), unique=True))
    return MergePlan(
        {name: draw(EDITS) for name in names},
        {layer: {name: draw(EDITS) for name in names if draw(st.booleans())} for layer in layers},
        draw(st.sampled_from(["model", "layer", "module"])),
        {name: f"digest of {name}" for name in names},
        {"origin": "test"},
    )


def two() -> MergePlan:
    return MergePlan.model_wise(
        {"h.0": ["zh", "en"], "h.1": ["en"], "outside": ["zh"]},
        {"zh": Edit(0.3, 0.9), "en": Edit(0.5, 0.7)},
    )


# ------------------------------------------------------------------------------------------ edits


def test_edit_holds_floats_and_is_frozen() -> None:
    edit = Edit(1, 2)
    assert (type(edit.density), type(edit.scale)) == (float, float)
    assert Edit(1.0, -sys.float_info.max).scale == -sys.float_info.max
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.density = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_edit_with_a_density_that_is_no_share_is_refused(density: object) -> None:
    with pytest.raises(PlanError, match="density"):
        Edit(density, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, False, "1", None])
def test_edit_with_a_scale_that_is_no_number_is_refused(scale: object) -> None:
    with pytest.raises(PlanError, match="scale"):
        Edit(0.5, scale)  # type: ignore[arg-type]


def test_edit_drops_when_density_or_scale_is_zero() -> None:
    assert DROP.drops
    assert (DROP, IDENTITY) == (Edit(0.0, 0.0), Edit(1.0, 1.0))
    assert Edit(0.0, 1.0).drops
    assert Edit(1.0, 0.0).drops
    assert not IDENTITY.drops
    assert not Edit(1e-9, -1.0).drops


def test_plan_error_is_a_value_error_of_the_library() -> None:
    assert issubclass(PlanError, ValueError)
    assert issubclass(PlanError, HiMergeError)


# ------------------------------------------------------------------------------------------ plans


def test_plan_is_read_only() -> None:
    plan = two()
    with pytest.raises(TypeError):
        plan.edits["h.0"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.edits["h.0"]["zh"] = DROP  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.adapters["zh"] = DROP  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.prune_scope = "layer"  # type: ignore[misc]


def test_plan_does_not_follow_the_dicts_it_was_made_of() -> None:
    adapters, row = {"en": IDENTITY}, {"en": IDENTITY}
    plan = MergePlan(adapters, {"h.0": row})
    fingerprint = plan.fingerprint
    adapters["en"], row["en"] = DROP, DROP
    assert plan.fingerprint == fingerprint
    assert plan.adapters["en"] == plan.edits["h.0"]["en"] == IDENTITY


def test_model_wise_plan_holds_only_the_adapters_each_layer_has() -> None:
    plan = two()
    assert {k: set(v) for k, v in plan.edits.items()} == {
        "h.0": {"zh", "en"},
        "h.1": {"en"},
        "outside": {"zh"},
    }
    assert all(edit == IDENTITY for row in plan.edits.values() for edit in row.values())


def test_model_wise_plan_keeps_scope_and_sources() -> None:
    plan = MergePlan.model_wise({}, {}, prune_scope="layer", sources={"zh": "1"})
    assert (plan.prune_scope, dict(plan.sources)) == ("layer", {"zh": "1"})
    assert dict(MergePlan.model_wise({}, {}).sources) == {}


def test_base_plan_has_nothing_live() -> None:
    assert list(MergePlan.base().live()) == []
    assert not MergePlan.base().pruned


def test_solo_only_without_and_edits_name_the_states_they_say() -> None:
    plan = two()

    def live(plan: MergePlan) -> set[tuple[str, str]]:
        return {(layer, name) for layer, name, _ in plan.live()}

    everything = {("h.0", "zh"), ("h.0", "en"), ("h.1", "en"), ("outside", "zh")}
    assert live(plan) == everything
    assert live(plan.solo("zh")) == {("h.0", "zh"), ("outside", "zh")}
    assert live(plan.only("h.0")) == {("h.0", "zh"), ("h.0", "en")}
    assert live(plan.without("h.0")) == {("h.1", "en"), ("outside", "zh")}
    assert live(plan.with_edit("h.0", "zh", DROP)) == everything - {("h.0", "zh")}
    both = plan.with_edits("h.0", {"zh": Edit(0.2, 0.3), "en": DROP})
    assert both.edits["h.0"] == {"zh": Edit(0.2, 0.3), "en": DROP}
    assert both.edits["h.1"] == plan.edits["h.1"]
    assert plan.with_edits("h.0", {}) == plan
    assert live(plan.with_adapter("en", DROP)) == {("h.0", "zh"), ("outside", "zh")}
    assert plan.solo("zh").only("h.1").fingerprint == MergePlan.base().fingerprint
    assert live(plan) == everything  # every call gave a new plan


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: p.solo("em"), "adapter 'em'"),
        (lambda p: p.only("h.3"), "layer 'h.3'.*Did you mean 'h.[01]'"),
        (lambda p: p.without("h.3"), "layer 'h.3'"),
        (lambda p: p.with_edit("h.9", "zh", DROP), "layer 'h.9'"),
        (lambda p: p.with_edit("h.1", "zh", DROP), "adapter 'zh'.*Allowed: en"),
        (lambda p: p.with_adapter("fr", DROP), "adapter 'fr'"),
    ],
)
def test_plan_names_what_it_does_not_have(call: object, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        call(two())  # type: ignore[operator]


def test_plan_with_unknown_scope_or_adapter_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'models'.*Did you mean 'model'"):
        MergePlan({}, {}, "models")
    with pytest.raises(PlanError, match=r"'h.0'.*'zh'"):
        MergePlan({"en": IDENTITY}, {"h.0": {"zh": IDENTITY}})


def test_pruned_is_about_live_deltas_only() -> None:
    assert two().pruned
    full = two().with_adapter("zh", Edit(1.0, 0.5)).with_adapter("en", Edit(1.0, 0.5))
    assert not full.pruned
    assert full.with_edit("h.1", "en", Edit(0.5, 1.0)).pruned
    assert not full.with_edit("h.1", "en", DROP).pruned
    assert not full.with_adapter("en", Edit(0.4, 0.0)).pruned


# ----------------------------------------------------------------------------------- fingerprints


@given(plans())
def test_fingerprint_survives_json_pickle_and_copy(plan: MergePlan) -> None:
    for twin in (
        MergePlan.from_json(plan.to_json()),
        MergePlan.from_dict(plan.to_dict()),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
    ):
        assert twin == plan
        assert twin.fingerprint == plan.fingerprint
        assert hash(twin) == hash(plan)


@given(plans())
def test_fingerprint_does_not_depend_on_the_order_of_names(plan: MergePlan) -> None:
    turned = MergePlan(
        dict(reversed(plan.adapters.items())),
        {k: dict(reversed(row.items())) for k, row in reversed(plan.edits.items())},
        plan.prune_scope,
    )
    assert turned.fingerprint == plan.fingerprint


@given(plans(), st.data())
def test_fingerprint_changes_with_the_state(plan: MergePlan, data: st.DataObject) -> None:
    live = list(plan.live())
    if not live:
        assert plan.fingerprint == MergePlan.base().fingerprint
        return
    layer, name, edit = data.draw(st.sampled_from(live))
    louder = plan.with_edit(layer, name, Edit(edit.density, edit.scale * 2))
    assert louder.fingerprint != plan.fingerprint
    assert plan.with_edit(layer, name, DROP).fingerprint != plan.fingerprint


def test_fingerprint_is_that_of_the_state_and_not_of_the_spelling() -> None:
    plan = two()
    split = plan.with_adapter("en", Edit(0.5, 1.4))
    for layer in ("h.0", "h.1"):
        split = split.with_edit(layer, "en", Edit(1.0, 0.5))
    assert split.fingerprint == plan.fingerprint
    noted = dataclasses.replace(plan, notes={"a": "b"}, sources={"zh": "1"})
    assert noted.fingerprint == plan.fingerprint
    dropped = plan.with_adapter("en", DROP)
    assert dropped.fingerprint == plan.solo("zh").fingerprint
    # The scope matters where something is pruned, and nowhere else.
    assert dataclasses.replace(plan, prune_scope="layer").fingerprint != plan.fingerprint
    full = plan.with_adapter("zh", IDENTITY).with_adapter("en", IDENTITY)
    assert dataclasses.replace(full, prune_scope="layer").fingerprint == full.fingerprint


def test_fingerprint_of_a_known_plan_never_changes() -> None:
    # Stored plans and score journals rely on this; a change needs a new format number.
    assert two().fingerprint == ("047f07ba2a6102b902b964457e2f74d1fec8de6fcb3b02c50b5eeabc6299d2d5")
    whole = MergePlan({"en": Edit(1.0, 0.5)}, {"h.0": {"en": Edit(0.25, 3.0)}}, "layer")
    text = b'{"rows":{"h.0":{"en":[1.0,0.25,1.5]}},"scope":""}'
    assert whole.fingerprint == hashlib.sha256(text).hexdigest()
    assert hash(whole) != hash(two())


# ------------------------------------------------------------------------------------------- JSON


def test_plan_goes_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = two().to_json(path)
    assert path.read_text(encoding="utf-8") == text
    assert MergePlan.from_json(path) == MergePlan.from_json(str(path)) == two()


def test_plan_text_is_for_readers() -> None:
    plan = MergePlan({"数学": Edit(0.5, 2.0)}, {"h.0": {}}, "module", {"数学": "ab"}, {"by": "é"})
    nothing_live = hashlib.sha256(b'{"rows":{},"scope":""}').hexdigest()
    assert plan.to_json().splitlines(keepends=True) == [
        "{\n",
        '  "format": "peft_himerge.plan/1",\n',
        f'  "fingerprint": "{nothing_live}",\n',
        '  "prune_scope": "module",\n',
        '  "adapters": {\n',
        '    "数学": {\n',
        '      "density": 0.5,\n',
        '      "scale": 2.0\n',
        "    }\n",
        "  },\n",
        '  "edits": {\n',
        '    "h.0": {}\n',
        "  },\n",
        '  "sources": {\n',
        '    "数学": "ab"\n',
        "  },\n",
        '  "notes": {\n',
        '    "by": "é"\n',
        "  }\n",
        "}\n",
    ]
    assert MergePlan.from_json(f"\n {plan.to_json()}") == plan


def test_plan_without_sources_and_notes_has_none() -> None:
    data = two().to_dict()
    del data["sources"], data["notes"]
    plan = MergePlan.from_dict(data)
    assert plan == two()
    assert (dict(plan.sources), dict(plan.notes)) == ({}, {})


def test_plan_file_is_plain_json_a_reader_can_edit() -> None:
    data = json.loads(two().to_json())
    assert data["adapters"]["zh"] == {"density": 0.3, "scale": 0.9}
    data["edits"]["h.0"]["zh"] = {"density": 0.15, "scale": 0.45}
    del data["fingerprint"]
    edited = MergePlan.from_json(json.dumps(data))
    assert edited == two().with_edit("h.0", "zh", Edit(0.15, 0.45))


def broken(**changes: object) -> dict[str, object]:
    data = {**two().to_dict(), **changes}
    return {key: value for key, value in data.items() if value is not ...}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (broken(format="other/1"), "format is 'other/1'"),
        (broken(format=...), "format is None"),
        (broken(edit={}), "'edit'.*Did you mean 'edits'"),
        (broken(adapters=...), "KeyError"),
        (broken(adapters=["zh"]), "malformed"),
        (broken(adapters={"zh": {"p": 0.5}}), "malformed"),
        (broken(adapters={"zh": {"density": 2.0}}), "density"),
        (broken(fingerprint="abc"), "fingerprint is 'abc'"),
        (broken(prune_scope="layer"), "fingerprint"),
        (broken(prune_scope=3), "malformed"),
        (broken(sources={"zh": "1", "en": 2}), "sources and notes hold texts, got 2"),
        (broken(notes={"by": None}), "sources and notes hold texts, got None"),
        (["a", "list"], "format is 'list'"),
    ],
)
def test_plan_that_is_damaged_is_refused_with_what_is_wrong(data: object, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        MergePlan.from_dict(data)  # type: ignore[arg-type]


def test_plan_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not valid JSON"):
        MergePlan.from_json("{oops")
    path = tmp_path / "plan.json"
    path.write_text("[1, 2", encoding="utf-8")
    with pytest.raises(PlanError, match="not valid JSON"):
        MergePlan.from_json(path)
    with pytest.raises((PlanError, FileNotFoundError), match="absent"):
        MergePlan.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize("field", ["sources", "notes"])
def test_sources_and_notes_that_are_no_texts_are_refused(field: str) -> None:
    told = MergePlan.base().to_dict() | {field: {"zh": 3}}
    with pytest.raises(PlanError, match=r"malformed: .*sources and notes hold texts, got 3"):
        MergePlan.from_dict(told)
