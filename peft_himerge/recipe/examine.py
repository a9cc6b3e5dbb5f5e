"""Looking at what a recipe names, without loading a weight of the base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..adapters import common_base
from ..config import HiMergeConfig
from ..errors import ConfigError, HiMergeError
from ..evals import load_evals
from ..factors import Adapter
from ..folders import check_base, load_tokenizer, read_folder, saved_modules
from ..json_file import read_object
from ..preview import Preview, preview
from ..search import check_search
from .faults import Fault
from .schema import Recipe
from .tasks import HEADED, Scored, build_task, hi_config

__all__ = ["Examined", "Look", "examine"]


@dataclass(frozen=True, slots=True)
class Look:
    """One thing that was looked at.

    Attributes:
        key: its place in the recipe.
        state: "ok", "warning", or "fault".
        found: what it is, or what is wrong with it.
    """

    key: str
    state: Literal["ok", "warning", "fault"]
    found: str


@dataclass(slots=True)
class Examined:
    """A recipe whose files were looked at.

    Attributes:
        recipe: the recipe.
        looks: what was found, in the order of the recipe.
        validation: task -> eval function that decides the merge.
        test: task -> eval function of the table at the end.
        heads: adapter -> folder, for adapters that saved a head, which stays with their task; only
            the bodies are merged.
        cost: what the merge costs at most; None if no score decides it, or adapters have faults.
    """

    recipe: Recipe
    looks: list[Look] = field(default_factory=list)
    validation: dict[str, Scored] = field(default_factory=dict)
    test: dict[str, Scored] = field(default_factory=dict)
    heads: dict[str, Path] = field(default_factory=dict)
    cost: Preview | None = None

    @property
    def faults(self) -> list[Fault]:
        """What keeps the recipe from running."""
        return [Fault(look.key, look.found) for look in self.looks if look.state == "fault"]

    @property
    def warnings(self) -> list[Look]:
        """What should be looked at, and keeps nothing from running."""
        return [look for look in self.looks if look.state == "warning"]


def examine(recipe: Recipe, evals: str | Path | None = None) -> Examined:
    """Read everything a recipe names but the base model's weights, and build its eval functions.

    Args:
        recipe: from `read_recipe`.
        evals: Python file of the user's with `eval_fns`, which is executed; None for none.
    """
    found = Examined(recipe)
    with _looking(found, "base"):
        if recipe.base is not None:
            found.looks.append(Look("base", "ok", _base(recipe.place(recipe.base))))
    read = _adapters(found)
    if not found.faults:
        with _looking(found, "adapters"):
            common_base(read)
            _fit(found)
    _tasks(found, evals)
    for key in ("out", "merged"):
        given = getattr(recipe, key)
        if given is not None and recipe.place(given).is_file():
            found.looks.append(Look(key, "fault", f"{given!r} is a file; give a folder."))
    return found


@contextmanager
def _looking(found: Examined, key: str) -> Iterator[None]:
    """Turn refusals and warnings of the block into looks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="peft_himerge")
        try:
            yield
        except HiMergeError as exc:
            found.looks.append(Look(key, "fault", str(exc)))
    found.looks.extend(Look(key, "warning", str(warning.message)) for warning in caught)


def _base(folder: Path) -> str:
    check_base(folder)
    settings = read_object(folder / "config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"the base {str(folder)!r} holds no weights (*.safetensors).")
    return str((settings.get("architectures") or [settings.get("model_type")])[0])


def _adapters(found: Examined) -> list[Adapter]:
    recipe = found.recipe
    heads: dict[str, list[str]] = {}
    for name, folder in recipe.folders.items() if recipe.is_scored or not recipe.is_hi else ():
        task = recipe.tasks.get(name)
        if task is not None and task.kind in HEADED and recipe.base is not None:
            with _looking(Examined(recipe), ""):  # its faults are told below
                heads[name] = saved_modules(name, folder)
    found.heads = {name: recipe.folders[name] for name, saved in heads.items() if saved}
    read = []
    for name, folder in recipe.folders.items():
        key = f"adapters.{name}"
        with _looking(found, key):
            adapter = read_folder(name, folder, body=bool(found.heads))
            ranks = sorted({factors.a.shape[0] for factors in adapter.factors.values()})
            span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            text = f"LoRA of rank {span} on {len(adapter.factors)} modules"
            if name in found.heads:
                text += f"; its head ({', '.join(heads[name])}) stays with its task"
            found.looks.append(Look(key, "ok", text))
            read.append(adapter)
    return read


def _fit(found: Examined) -> None:
    """Check that the adapters fit the base model, and the cost the budget."""
    recipe = found.recipe
    scored = recipe.is_hi and recipe.is_scored
    config = hi_config(recipe) if scored else HiMergeConfig()
    base = None if recipe.base is None else recipe.place(recipe.base)
    cost = preview(base, recipe.folders, config, recipe.guards, bodies=bool(found.heads))
    if not scored:
        return
    check_search(config)
    found.cost = cost
    most, allowed = cost.cost.scores, recipe.budget.scores
    if allowed is not None and most > allowed:
        raise ConfigError(
            f"the merge may need {most} scores, and budget.scores is {allowed}. Raise it, or need "
            f"fewer: density and scale as numbers, reanalyze=once, accept=always; himerge plan "
            f"shows what each step costs."
        )


def _tasks(found: Examined, evals: str | Path | None) -> None:
    recipe = found.recipe
    if not recipe.tasks or recipe.base is None:
        return
    tokenizer: Any = None
    functions: Mapping[str, Callable[[Any], Any]] | None = None
    with _looking(found, "base"):
        base = recipe.place(recipe.base)
        check_base(base)
        tokenizer = load_tokenizer(base)
        if tokenizer is None and any(task.kind != "function" for task in recipe.tasks.values()):
            raise ConfigError(f"the base {str(base)!r} holds no tokenizer, which tasks need.")
    with _looking(found, "tasks"):
        if evals is not None:
            functions = load_evals(evals)(tokenizer)
    if found.faults and (tokenizer is None or (evals is not None and functions is None)):
        return
    for name, spec in recipe.tasks.items():
        head = found.heads.get(name)
        for split, held in (("validation", found.validation), ("test", found.test)):
            if getattr(spec, split) is None:
                continue
            with _looking(found, f"tasks.{name}.{split}"):
                held[name] = build_task(recipe, name, split, tokenizer, functions, head)
                size = held[name].size
                text = "a function" if size is None else f"{size} rows"
                by = held[name].metric
                text += "" if by is None else f", {by}"
                found.looks.append(Look(f"tasks.{name}.{split}", "ok", text))
        _same_rows(found, name)


def _same_rows(found: Examined, name: str) -> None:
    """Warn about a task whose test rows the merge has seen."""
    spec = found.recipe.tasks[name]
    if name not in found.validation or name not in found.test:
        return
    seen, rows = set(found.validation[name].rows), found.test[name].rows
    again = sum(row in seen for row in rows)
    if again:
        text = f"{again} of {len(rows)} test rows are also validation rows, which the merge is "
    elif not rows and spec.validation == spec.test:
        text = "validation and test are the same, which the merge is "
    else:
        return
    text += "decided by: the test scores will be too good. Give other rows."
    found.looks.append(Look(f"tasks.{name}.test", "warning", text))
