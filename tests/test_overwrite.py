"""overwrite=True: the new adapter is there, or the old one is, object for object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from snapshot import moved, snapshot
from tiny import add_adapters, peft_model, tiny_model

from peft_himerge import add_weighted_adapter, merge_adapters
from peft_himerge import export as export_room
from peft_himerge import merging as merging_room
from peft_himerge import overwrite as overwrite_room
from peft_himerge import weighted as weighted_room

PAIR = ["zh", "en"]


class Stopped(BaseException):
    """Like Ctrl-C: no Exception."""


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which stops the program at its n-th call."""
    left = [calls]

    def stops(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        return function(*args, **kwargs)

    return stops


def rich_model() -> PeftModel:
    """Return a model whose adapters hold more than factors."""
    base = tiny_model("qwen2", dtype=torch.float32)
    specs = {
        "zh": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "en": {"target_modules": ["q_proj", "v_proj"], "seed": 1, "lora_bias": True},
        "old": {
            "target_modules": ["o_proj", "embed_tokens"],
            "seed": 2,
            "modules_to_save": ["norm"],
        },
    }
    model = add_adapters(base, specs)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name or name.endswith("bias"):
                value.add_(torch.linspace(0.1, 1.0, value.numel()).view(value.shape))
    model.set_adapter("old")
    return model


@pytest.mark.parametrize("name", ["old", "zh", "new"])
@pytest.mark.parametrize(
    ("room", "function", "call"),
    [
        (export_room, "_fill", 1),
        (export_room, "_fill", 5),
        (merging_room, "fill", 1),
        (overwrite_room, "_move", 1),
        (overwrite_room, "_move", 20),
    ],
)
def test_a_stopped_merge_leaves_all_as_it_was(
    room: Any, function: str, call: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "new" and room is overwrite_room:
        pytest.skip("a new name takes nobody's place")
    model = rich_model()
    before = snapshot(model)
    tables = overwrite_room._tables(model)
    keys = [list(table) if not isinstance(table, set) else set(table) for table in tables]
    monkeypatch.setattr(room, function, after(call, getattr(room, function)))
    with pytest.raises(Stopped):
        merge_adapters(
            model, PAIR, "cat", adapter_name=name, overwrite=True, modules_to_save="sole"
        )
    assert moved(before, snapshot(model)) == []
    for table, held in zip(tables, keys, strict=True):
        assert (set(table) if isinstance(table, set) else list(table)) == held
    assert not any("_new" in path for path, _ in model.named_modules())


def outputs(model: PeftModel, name: str) -> torch.Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


@pytest.mark.parametrize("name", ["old", "zh"])
def test_taking_a_name_over_is_the_same_as_taking_a_free_one(name: str) -> None:
    """Also where the old one is a source whose saved module and bias are carried over."""
    options: dict[str, Any] = {"weights": [1.0, 0.5], "modules_to_save": "sole"}
    free = rich_model()
    merge_adapters(free, PAIR, "cat", adapter_name="free", **options)
    model = rich_model()
    others = snapshot(model, but=name)
    merge_adapters(model, PAIR, "cat", adapter_name=name, overwrite=True, **options)
    still = [fact for fact in moved(others, snapshot(model, but=name)) if "_active" not in fact]
    assert still == []  # a wrapper that holds the new adapter no more is not active for it
    assert model.active_adapter == "old"
    assert sorted(model.peft_config) == ["en", "old", "zh"]
    assert list(model.peft_config)[-1] == name
    held = {
        path.replace(f".{name}.", ".*.").replace(f".{name}", ".*")
        for path, _ in model.named_parameters()
        if name in path.split(".")
    }
    wanted = {
        path.replace(".free.", ".*.").replace(".free", ".*")
        for path, _ in free.named_parameters()
        if "free" in path.split(".")
    }
    assert held == wanted
    assert torch.equal(outputs(model, name), outputs(free, "free"))
    model.set_adapter("en")
    model.delete_adapter(name)  # PEFT itself finds everything of it
    assert not any(name in path.split(".") for path, _ in model.named_modules())


def test_a_source_may_be_replaced_in_pefts_own_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    free = peft_model("llama", 2, torch.float32)
    call: dict[str, Any] = {"combination_type": "svd", "svd_rank": 4, "compat": "peft"}
    add_weighted_adapter(free, PAIR, [1.0, 0.5], "free", **call)
    model = peft_model("llama", 2, torch.float32)
    add_weighted_adapter(model, PAIR, [1.0, 0.5], "zh", overwrite=True, **call)
    assert torch.equal(outputs(model, "zh"), outputs(free, "free"))
    before = snapshot(model)
    own = weighted_room._PEFT_OWN

    def half(*args: Any) -> None:
        own(*args)
        raise Stopped

    monkeypatch.setattr(weighted_room, "_PEFT_OWN", half)
    with pytest.raises(Stopped):
        add_weighted_adapter(model, PAIR, [2.0, 0.5], "zh", overwrite=True, **call)
    assert moved(before, snapshot(model)) == []


def test_the_name_in_between_is_one_that_is_free() -> None:
    model = peft_model("llama", 2, torch.float32)
    for name in ("m", "m_new", "m_new_"):
        add_weighted_adapter(model, PAIR, [1.0, 0.5], name, "cat")
    others = {name: outputs(model, name) for name in ("m_new", "m_new_")}
    add_weighted_adapter(model, PAIR, [2.0, 1.0], "m", "cat", overwrite=True)
    add_weighted_adapter(model, PAIR, [2.0, 1.0], "free", "cat")
    assert torch.equal(outputs(model, "m"), outputs(model, "free"))
    assert set(model.peft_config) == {*PAIR, "m", "m_new", "m_new_", "free"}
    assert all(torch.equal(outputs(model, name), want) for name, want in others.items())
