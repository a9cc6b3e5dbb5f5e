"""The front door: the promised names, sorted, documented, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import pytest

import peft_himerge
from peft_himerge import errors

PROMISED = {
    "HiMergeConfig",
    "HiMergeError",
    "MergePlan",
    "MergeResult",
    "apply_plan",
    "merge_adapters_hi",
}
# Looked at by tests of their own: the command line and the demo, which need extras or a terminal,
# and the collection of methods.
SKIPPED = {"__main__", "cli", "cli_check", "demo", "methods"}


def rooms() -> list[ModuleType]:
    names = [m.name for m in pkgutil.iter_modules(peft_himerge.__path__) if m.name not in SKIPPED]
    return [importlib.import_module(f"peft_himerge.{name}") for name in names]


def natural(name: str) -> tuple[int, list[Any]]:
    """Sort key of RUF022: CONSTANTS, then Classes, then the rest; numbers by value."""
    group = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    parts = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    return group, parts


def test_front_door_offers_what_was_promised() -> None:
    assert set(peft_himerge.__all__) >= PROMISED
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", peft_himerge.__version__)


@pytest.mark.parametrize("module", ["peft_himerge", "peft_himerge.evals"])
def test_front_door_has_no_other_name(module: str) -> None:
    door = importlib.import_module(module)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'merge_adapter'"):
        _ = door.merge_adapter
    assert not hasattr(door, "merge_adapter")


def test_front_door_lists_exactly_its_public_names() -> None:
    public = {
        name
        for name, value in vars(peft_himerge).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    # Names that are made on first use (`__getattr__`) are listed without being there yet.
    assert public <= set(peft_himerge.__all__)
    for name in peft_himerge.__all__:
        assert getattr(peft_himerge, name) is not None


@pytest.mark.parametrize("module", [peft_himerge, *rooms()], ids=lambda m: m.__name__)
def test_all_is_sorted_unique_and_true(module: ModuleType) -> None:
    names = list(module.__all__)
    assert names == sorted(set(names), key=natural)
    for name in names:
        assert hasattr(module, name), name


@pytest.mark.parametrize("module", [peft_himerge, *rooms()], ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module: ModuleType) -> None:
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), name
        if not inspect.isclass(value) or value.__module__ != module.__name__:
            continue
        for attribute, member in vars(value).items():
            if attribute.startswith("_"):
                continue
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function):
                assert inspect.getdoc(function), f"{name}.{attribute}"


def test_options_are_keyword_only_after_the_first_three() -> None:
    parameters = inspect.signature(peft_himerge.merge_adapters_hi).parameters
    kinds = {name: p.kind for name, p in parameters.items()}
    assert list(parameters)[:3] == ["model", "adapters", "eval_fns"]
    assert {"adapter_name", "config", "callbacks"} <= set(parameters)
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in list(kinds.values())[3:])
    parameters = inspect.signature(peft_himerge.apply_plan).parameters
    assert list(parameters)[:2] == ["model", "plan"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[2:])


def test_every_error_derives_from_the_root_and_from_a_builtin() -> None:
    leaves = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value)
        and issubclass(value, Exception)
        and value is not errors.HiMergeError
    ]
    assert len(leaves) >= 6
    for leaf in leaves:
        assert issubclass(leaf, errors.HiMergeError), leaf
        assert issubclass(leaf, (ValueError, RuntimeError, ImportError, OSError)), leaf
    assert not issubclass(errors.HiMergeError, (ValueError, RuntimeError))


@pytest.mark.parametrize(
    ("got", "allowed", "text"),
    [
        ("scal", ["density", "scale"], " Did you mean 'scale'? Allowed: density, scale."),
        ("xyz", ["density", "scale"], " Allowed: density, scale."),
    ],
)
def test_suggestion_names_the_near_one_and_all(got: str, allowed: list[str], text: str) -> None:
    assert errors.suggest(got, allowed) == text


def test_package_ships_its_types() -> None:
    from pathlib import Path

    assert (Path(peft_himerge.__path__[0]) / "py.typed").exists()
