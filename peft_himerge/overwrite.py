"""A new adapter takes an old one's name only when it is whole; until then the old one is in place.

PEFT has no renaming. Every table that PEFT keeps per adapter (factors, scalings, ranks, saved
modules, configs) is found by its keys, so that nothing here depends on which tables there are.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .probe import preserved

__all__ = ["taking_over"]

_TORCH = frozenset(vars(nn.Module()))  # tables of parameters, hooks and so on: not per adapter


@contextmanager
def taking_over(model: PeftModel, name: str) -> Iterator[str]:
    """Give the name under which to build the adapter that is to be `name`.

    On success it is called `name`, in place of an adapter of that name. Otherwise whatever was
    built is taken out again, and the old adapter is as it was: the same objects, never moved. What
    building disturbs is put back inside of this (`probe.preserved`).

    Args:
        model: the user's model.
        name: a name that is free, or that may be taken from the adapter that has it.
    """
    if name not in model.peft_config:
        made = name
    else:
        made = f"{name}_new"
        while made in model.peft_config:
            made += "_"
    try:
        yield made
        if made != name:
            _rename(model, made, name)
    except BaseException:
        with preserved(model):
            _take_out(model, made)
        raise


def _take_out(model: PeftModel, name: str) -> None:
    if name in model.peft_config:
        with warnings.catch_warnings():
            # PEFT says that it switches to another adapter; here somebody puts the right one back.
            warnings.filterwarnings("ignore", message=".* was active which is now deleted")
            model.delete_adapter(name)


def _rename(model: PeftModel, made: str, name: str) -> None:
    """Call the adapter `made` `name`; all of it, or, if anything stops it, none."""
    tables = [table for table in _tables(model) if made in table or name in table]
    before = [(table, _items(table)) for table in tables]
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    active = [(wrapper, wrapper._active_adapter) for wrapper in wrappers]
    try:
        for table in tables:
            _move(table, made, name)
        for wrapper in wrappers:
            # PEFT fails on a wrapper whose active adapter is none of its own.
            if name not in wrapper._adapters and name in wrapper.active_adapters:
                wrapper._active_adapter = [n for n in wrapper.active_adapters if n != name]
    except BaseException:
        for table, items in before:
            table.clear()
            table.update(items)
        for wrapper, names in active:
            wrapper._active_adapter = names
        raise


def _tables(model: PeftModel) -> list[Any]:
    """Return every table or set that PEFT keeps per adapter, each once."""
    found: dict[int, Any] = {id(model.peft_config): model.peft_config}
    for module in model.modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        held = [v for k, v in vars(module).items() if k not in _TORCH]
        for value in [*held, *module._modules.values()]:
            if isinstance(value, (dict, set)) or (
                hasattr(value, "keys") and hasattr(value, "pop") and hasattr(value, "clear")
            ):
                found[id(value)] = value
    return list(found.values())


def _items(table: Any) -> Any:
    # Some of torch's tables sort what they are given, unless it is ordered by its type.
    return set(table) if isinstance(table, set) else OrderedDict(table.items())


def _move(table: Any, made: str, name: str) -> None:
    if isinstance(table, set):
        table.discard(name)
        if made in table:
            table.discard(made)
            table.add(name)
        return
    if name in table:
        table.pop(name)
    if made in table:
        table[name] = table.pop(made)
