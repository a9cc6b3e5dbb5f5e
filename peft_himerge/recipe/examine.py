"""Looking at what a recipe names, without loading a weight of the base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
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
from .faults import Fault, RecipeError
from .inputs import Inputs, build_inputs, needs_inputs, reads_labels
from .read import read_sound
from .schema import HUB, Recipe, TaskSpec
from .tasks import FUNCTION, HEADED, KINDS, Scored, build_task, hi_config, rows_of

__all__ = ["Examined", "Look", "examine", "examine_file"]


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
        inputs: task -> examples, for a method that runs the model on them instead.
        test: task -> eval function of the table at the end.
        heads: adapter -> folder, for adapters that saved a head, which stays with their task; only
            the bodies are merged.
        cost: what the merge costs at most; None if no score decides it, or adapters have faults.
    """

    recipe: Recipe
    looks: list[Look] = field(default_factory=list)
    validation: dict[str, Scored] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)
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


def examine(
    recipe: Recipe, evals: str | Path | None = None, include_path: str | Path | None = None
) -> Examined:
    """Read everything a recipe names but the base model's weights, and build its eval functions.

    Args:
        recipe: from `read_recipe`.
        evals: Python file of the user's with `eval_fns`, which is executed; None for none.
        include_path: folder with tasks of lm-evaluation-harness, which may hold code that is
            executed; None for the built-in tasks alone.
    """
    found = Examined(recipe)
    _look(found, evals, include_path)
    return found


def examine_file(
    path: str | Path,
    overrides: Sequence[str] = (),
    evals: str | Path | None = None,
    include_path: str | Path | None = None,
) -> Examined:
    """Read a recipe and examine it: faults of its keys and of the files it names, told together.

    Where the recipe itself has faults, the files that its sound parts name are looked at; whether
    the adapters fit together, and what the merge costs, is then left for the next time.

    Args:
        path: a YAML file.
        overrides: as for `read_recipe`.
        evals: as for `examine`.
        include_path: as for `examine`.

    Raises:
        RecipeError: nothing of the file can be read.
    """
    recipe, faults = read_sound(path, overrides)
    if recipe is None:
        raise RecipeError(path, faults)
    found = Examined(recipe, [Look(fault.key, "fault", fault.what) for fault in faults])
    _look(found, evals, include_path)
    return found


def _look(found: Examined, evals: str | Path | None, include_path: str | Path | None) -> None:
    recipe = found.recipe
    with _looking(found, "base", recipe.base):
        if recipe.base is not None:
            found.looks.append(Look("base", "ok", _base(recipe.place(recipe.base))))
    read = _adapters(found)
    if not found.faults:
        with _looking(found, "adapters"):
            common_base(read)
            _fit(found)
    _tasks(found, evals, include_path)
    for key in ("out", "merged"):
        given = getattr(recipe, key)
        if given is not None and recipe.place(given).is_file():
            found.looks.append(Look(key, "fault", f"{given!r} is a file; give a folder."))


@contextmanager
def _looking(found: Examined, key: str, path: str | None = None) -> Iterator[None]:
    """Turn refusals and warnings of the block into looks; `path` is what it reads, if it is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="peft_himerge")
        try:
            yield
        except HiMergeError as exc:
            hint = "" if path is None else _nearby(found.recipe, path)
            found.looks.append(Look(key, "fault", f"{exc}{hint}"))
    found.looks.extend(Look(key, "warning", str(warning.message)) for warning in caught)


def _nearby(recipe: Recipe, path: str) -> str:
    """Return the path that may have been meant, if nothing is where this one leads."""
    parts = Path(path).parts
    for count in range(len(parts)):
        above = Path(*parts[:count])
        inside = recipe.place(str(above))
        if inside.is_dir() and not (inside / parts[count]).exists():
            names = [entry.name for entry in inside.iterdir()]
            close = get_close_matches(parts[count], sorted(names), n=1, cutoff=0.5)
            return f" Did you mean {str(above / close[0])!r}?" if close else ""
    return ""


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
        with _looking(found, key, recipe.adapters[name]):
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


def _tasks(found: Examined, evals: str | Path | None, include_path: str | Path | None) -> None:
    recipe = found.recipe
    if not recipe.tasks:
        return
    tokenizer: Any = None
    functions: Mapping[str, Callable[[Any], Any]] | None = None
    if recipe.base is not None and not any(fault.key == "base" for fault in found.faults):
        with _looking(found, "base"):
            tokenizer = _tokenizer(recipe, recipe.place(recipe.base))
    if recipe.base is None or any(fault.key == "base" for fault in found.faults):
        _rows_alone(found)
        return
    with _looking(found, "tasks"):
        if evals is not None:
            functions = load_evals(evals)(tokenizer)
    if evals is not None and functions is None:
        return
    for name, spec in recipe.tasks.items():
        if spec.validation is not None and needs_inputs(recipe):
            _task_inputs(found, name, tokenizer)
        elif spec.validation is not None:
            _task(found, name, "validation", tokenizer, functions, include_path)
        if spec.test is not None:
            _task(found, name, "test", tokenizer, functions, include_path)
        _same_rows(found, name)


def _tokenizer(recipe: Recipe, base: Path) -> Any:
    tokenizer = load_tokenizer(base)
    if tokenizer is None and any(task.kind != FUNCTION for task in recipe.tasks.values()):
        raise ConfigError(f"the base {str(base)!r} holds no tokenizer, which tasks need.")
    return tokenizer


def _rows_alone(found: Examined) -> None:
    """Read the rows of all tasks, where there is no base to score them with."""
    for name, spec in found.recipe.tasks.items():
        for split in ("validation", "test"):
            if getattr(spec, split) is not None and KINDS[spec.kind].rows:
                key = f"tasks.{name}.{split}"
                with _looking(found, key, _path(spec, split)):
                    rows = rows_of(found.recipe, spec, split)
                    found.looks.append(Look(key, "ok", f"{len(rows)} rows"))


def _task(
    found: Examined,
    name: str,
    split: str,
    tokenizer: Any,
    functions: Mapping[str, Callable[[Any], Any]] | None,
    include_path: str | Path | None,
) -> None:
    """Build the eval function of one task on one split."""
    held = found.validation if split == "validation" else found.test
    key, head = f"tasks.{name}.{split}", found.heads.get(name)
    with _looking(found, key, _path(found.recipe.tasks[name], split)):
        made = build_task(found.recipe, name, split, tokenizer, functions, head, include_path)
        held[name] = made
        text = "a function" if made.size is None else f"{made.size} rows"
        text += "" if made.metric is None else f", {made.metric}"
        found.looks.append(Look(key, "ok", text))


def _path(spec: TaskSpec, split: str) -> str | None:
    """Return the file or folder of a split; None if it is something else."""
    source: str = getattr(spec, split)
    return source if KINDS[spec.kind].rows and not source.startswith(HUB) else None


def _task_inputs(found: Examined, name: str, tokenizer: Any) -> None:
    """Make the examples of one task."""
    recipe, key = found.recipe, f"tasks.{name}.validation"
    with _looking(found, key, _path(recipe.tasks[name], "validation")):
        made = build_inputs(recipe, name, tokenizer)
        found.inputs[name] = made
        labelled = "with" if reads_labels(recipe.method, recipe.options) else "without"
        text = f"{len(made.rows)} rows as inputs, {labelled} labels"
        found.looks.append(Look(key, "ok", text))


def _same_rows(found: Examined, name: str) -> None:
    """Warn about a task whose test rows the merge has seen."""
    spec = found.recipe.tasks[name]
    looked: Scored | Inputs | None = found.validation.get(name) or found.inputs.get(name)
    if looked is None or name not in found.test:
        return
    seen, rows = set(looked.rows), found.test[name].rows
    again = sum(row in seen for row in rows)
    if again:
        text = f"{again} of {len(rows)} test rows are also validation rows, which the merge is "
    elif not rows and spec.validation == spec.test:
        text = "validation and test are the same, which the merge is "
    else:
        return
    text += "decided by: the test scores will be too good. Give other rows."
    found.looks.append(Look(f"tasks.{name}.test", "warning", text))
