"""What must fit together in a recipe: method and options, tasks and adapters, folders.

These checks read the raw table, piece by piece, so that a fault in one piece does not hide those in
another; a piece of the wrong type is left to the record's own check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ..carried import SavedPolicy
from ..config import HiMergeConfig
from ..errors import ConfigError, suggest
from ..methods import get_method, list_methods
from ..methods.registry import REQUIRED, MethodInfo
from ..methods.spaces import Space
from ..names import check_new_name
from ..request import check_pad, check_post, check_weights
from .faults import Fault
from .inputs import input_kinds
from .schema import BASE, HUB, TaskSpec
from .tasks import FUNCTION, HARNESS, KINDS, options_of

__all__ = ["SHARED", "check_rules", "sound_parts"]

Table = Mapping[str, Any]
_ON_THE_LINE = "name the folder of your tasks on the command line, --include-path DIR"

# Keywords of `merge_adapters` that a recipe may give as options of any method but "hi".
SHARED = ("weights", "space", "pad_rank", "post", "modules_to_save", "strict_base", "seed")
# Lines of the score tables, beside the adapters.
_STATES = (BASE, "model_wise", "merged", "exported")
# What the recipe says elsewhere.
_ELSEWHERE = {
    "rank": "give rank at the top of the recipe.",
    "metric": "give it with the task: tasks.NAME.metric.",
}


def check_rules(data: Table, file: Path) -> list[Fault]:
    """Return the faults of a raw recipe that are no matter of types."""
    names = list(_table(data, "adapters"))
    faults = [*_tasks(data), *_folders(data, file)]
    if isinstance(data.get("method", "hi"), str):
        faults += _method(data, names)
    try:
        HiMergeConfig(rank=data.get("rank", "auto"))
    except ConfigError as exc:
        faults.append(Fault("rank", str(exc).removeprefix("rank: ")))
    name = data.get("name", "merged")
    if name == BASE:
        faults.append(Fault("name", f"{name!r} means the base model; choose another."))
    if isinstance(name, str) and name:
        faults += _caught("name", lambda: check_new_name(name, names, "rename that adapter"))
    faults += [
        Fault("adapters", f"the name {name!r} must have no dots; as for PEFT.")
        for name in names
        if isinstance(name, str) and ("." in name or not name)
    ]
    faults += [
        Fault("adapters", f"the name {name!r} means a state of the merge; rename the adapter.")
        for name in names
        if name in _STATES
    ]
    return faults


def sound_parts(data: dict[str, Any]) -> dict[str, Any]:
    """Return a raw recipe without a method and tasks that the rules refuse; types are left alone.

    What is left can be looked at, not run: an unknown method becomes Hi-Merging without options.
    """
    method = data.get("method", "hi")
    if not isinstance(method, str) or method not in ("hi", *(i.name for i in list_methods())):
        data = {key: value for key, value in data.items() if key not in ("method", "options")}
        method = "hi"
    if not isinstance(data.get("tasks"), dict):
        return data
    tasks = {}
    for name, spec in data["tasks"].items():
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            continue
        wrong = {fault.key for fault in _task_keys(f"tasks.{name}", kind, spec)}
        if method != "hi" and get_method(method).needs in ("inputs", "gradients"):
            faults = _input_task(method, name, spec, [name], _table(data, "options"))
            wrong |= {f"tasks.{name}.validation" for fault in faults if fault.key.endswith("kind")}
        tasks[name] = {k: v for k, v in spec.items() if f"tasks.{name}.{k}" not in wrong}
    return data | {"tasks": tasks}


def _table(data: Table, key: str) -> Table:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _caught(key: str, call: Callable[[], Any]) -> Iterator[Fault]:
    try:
        call()
    except ConfigError as exc:
        yield Fault(key, str(exc))


# ---------------------------------------------------------------------------------------- tasks


def _tasks(data: Table) -> Iterator[Fault]:
    for name, spec in _table(data, "tasks").items():
        if not isinstance(spec, dict):
            continue
        key = f"tasks.{name}"
        if spec.get("validation") is None and spec.get("test") is None:
            yield Fault(key, "there is no data: give validation, test, or both.")
        kind = spec.get("kind")
        if not isinstance(kind, str):
            continue
        if kind not in KINDS:
            yield Fault(f"{key}.kind", f"got {kind!r}.{suggest(kind, KINDS)}")
            continue
        yield from _task_keys(key, kind, spec)
        yield from _metrics(key, kind, spec)


def _task_keys(key: str, kind: str, spec: Table) -> Iterator[Fault]:
    options, own = options_of(kind), set(TaskSpec.model_fields)
    of_rows = ("columns", "subset", "max_rows", "max_test_rows")
    known = [*sorted(own if KINDS[kind].rows else own - set(of_rows)), *options]
    for option, value in spec.items():
        place = f"{key}.{option}"
        if option == "include_path":
            yield Fault(place, f"a recipe cannot name code to run; {_ON_THE_LINE}.")
        elif option == "unsafe_code":
            yield Fault(place, "a recipe cannot name code to run; write a function and use --eval.")
        elif option not in known:
            yield Fault(place, f"a task of kind {kind} has no such key.{suggest(option, known)}")
        elif option in options:
            yield from _typed(place, value, options[option])
    for split in ("validation", "test"):
        source = spec.get(split)
        if not isinstance(source, str):
            continue
        if kind == HARNESS and not source.replace("_", "").replace("-", "").isalnum():
            text = f"expected the name of a task of lm-evaluation-harness, got {source!r}. A file "
            text += f"of tasks may hold code, which a recipe cannot name: {_ON_THE_LINE}, and the "
            yield Fault(f"{key}.{split}", f"{text}task's name here.")
        elif source.startswith(HUB) and not KINDS[kind].rows:
            yield Fault(f"{key}.{split}", f"a task of kind {kind} takes no rows, got {source!r}.")


def _metrics(key: str, kind: str, spec: Table) -> Iterator[Fault]:
    known = tuple(dict.fromkeys(KINDS[kind].metrics))
    for option in ("metric", "test_metric"):
        metric = spec.get(option)
        if not isinstance(metric, str) or kind in (FUNCTION, HARNESS):
            continue
        if not known:
            yield Fault(f"{key}.{option}", f"a task of kind {kind} has one score; leave it out.")
        elif metric not in known:
            yield Fault(f"{key}.{option}", f"got {metric!r}.{suggest(metric, known)}")
    if kind == HARNESS and spec.get("metric") is None:
        yield Fault(f"{key}.metric", "this key is missing: acc, acc_norm, ..., as the task has it.")


def _typed(key: str, value: Any, hint: Any) -> Iterator[Fault]:
    """Check a value against a parameter's annotation."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except PydanticSchemaGenerationError:  # a class of ours; who takes it checks it
        return
    try:
        if isinstance(value, bool) and hint is not Any and bool not in (hint, *get_args(hint)):
            yield Fault(key, f"expected {_words(hint)}, got {value!r}.")
        else:
            adapter.validate_python(value)
    except ValidationError as exc:
        first = exc.errors()[0]
        if first["type"] == "literal_error":
            allowed = [str(choice) for choice in get_args(hint)]
            yield Fault(key, f"got {value!r}.{suggest(str(value), allowed)}")
        else:
            yield Fault(key, f"expected {_words(hint)}, got {value!r:.80}.")


def _words(hint: Any) -> str:
    text = getattr(hint, "__name__", "") if not get_args(hint) else ""
    return (text or str(hint)).replace("collections.abc.", "").replace("typing.", "")


# --------------------------------------------------------------------------------------- method


def _method(data: Table, names: list[str]) -> Iterator[Fault]:
    method = data.get("method", "hi")
    options = _table(data, "options")
    tasks = {n: t for n, t in _table(data, "tasks").items() if isinstance(t, dict)}
    scored = {name for name, task in tasks.items() if task.get("validation") is not None}
    if method == "hi":
        yield from _hi_options(options, names, bool(scored))
        if scored:
            yield from _own_tasks(method, names, scored)
    else:
        known = [info.name for info in list_methods()]
        if method not in known:
            known = sorted({"hi", *known})
            yield Fault("method", f"got {method!r}.{suggest(method, known)}")
            return
        info = get_method(method)
        yield from _needs(info, names, tasks, options)
        yield from _options(info, options, names)
    if data.get("base") is None and (tasks or method != "hi"):
        why = "tasks are scored with it" if tasks else f"{method!r} merges in a model"
        yield Fault("base", f"this key is missing: {why}.")
    if not (method == "hi" and scored):
        tested = any(task.get("test") is not None for task in tasks.values())
        yield from _unread(data, method, tested)


def _unread(data: Table, method: Any, tested: bool) -> Iterator[Fault]:
    """Refuse what would have no effect where no score decides the merge, or not by Hi-Merging."""
    why = "only Hi-Merging with validation data reads it"
    for key in ("journal", "budget"):
        if data.get(key):
            yield Fault(key, f"{why}; leave it out.")
    tracking = data.get("tracking")
    to = tracking.get("to") if isinstance(tracking, dict) else tracking
    if to not in (None, "none") and not tested:
        yield Fault("tracking", "no score would be told: give tasks test data, or leave it out.")
    if data.get("merged") is not None and method == "hi":
        yield Fault(
            "merged", "without validation data the base model is not read; leave it out, or use "
            "model.merge_and_unload() on the result."
        )  # fmt: skip


def _own_tasks(method: str, names: list[str], scored: set[str]) -> Iterator[Fault]:
    text = f"{method!r} needs validation data for every adapter"
    for name in names:
        if name not in scored:
            yield Fault(f"tasks.{name}", f"{text}{', or for none' if method == 'hi' else ''}.")


def _needs(
    info: MethodInfo, names: list[str], tasks: Mapping[str, Table], options: Table
) -> Iterator[Fault]:
    scored = {name for name, task in tasks.items() if task.get("validation") is not None}
    if info.needs == "scores":
        yield from _own_tasks(info.name, names, scored)
    elif info.needs != "nothing":
        yield from _own_tasks(info.name, names, scored)
        for name in sorted(scored, key=str):
            yield from _input_task(info.name, name, tasks[name], names, options)
    elif scored:
        yield Fault(
            f"tasks.{min(scored)}.validation",
            f"the method {info.name!r} looks at no score, so validation data would not be read; "
            f"give it as test.",
        )


def _input_task(
    method: str, name: str, task: Table, names: list[str], options: Table
) -> Iterator[Fault]:
    """Check a task whose validation rows are what a method runs the model on."""
    key, kind, known = f"tasks.{name}", task.get("kind"), input_kinds(method, options)
    if name not in names:
        yield Fault(
            f"{key}.validation",
            f"the method {method!r} looks at the adapters' own tasks alone; give it as test.",
        )
    elif isinstance(kind, str) and kind in KINDS and kind not in known:
        yield Fault(
            f"{key}.kind",
            f"{method!r} runs the model on the rows, which it cannot do with those of {kind!r}. "
            f"Allowed: {', '.join(known)}; or call merge_adapters(..., inputs=...) in Python.",
        )
    if task.get("metric") is not None:
        text = f"the method {method!r} looks at no score; leave it out, or give test_metric."
        yield Fault(f"{key}.metric", text)


def _hi_options(options: Table, names: list[str], scored: bool) -> Iterator[Fault]:
    fields = [f for f in HiMergeConfig.model_fields if f not in _ELSEWHERE]
    good = {}
    for name, value in options.items():
        key = f"options.{name}"
        if name in _ELSEWHERE:
            yield Fault(key, _ELSEWHERE[name])
        elif name not in fields:
            yield Fault(key, f"Hi-Merging has no such option.{suggest(str(name), fields)}")
        else:
            good[name] = value
            try:
                HiMergeConfig(**{name: value})
            except ConfigError as exc:
                if str(exc).startswith(f"{name}: "):  # and not how it goes with the others
                    yield Fault(key, str(exc).removeprefix(f"{name}: "))
                    del good[name]
    if len(good) < len(options):
        return
    try:
        config = HiMergeConfig(**good)
        config.check_names(names, names)
    except ConfigError as exc:
        yield Fault("options", str(exc).removeprefix("config: "))
        return
    if (config.searches() or config.focus) and not scored:
        yield Fault(
            "options",
            "without validation data nothing can be focused or searched: give density and scale as "
            "numbers (and no variant: focused), or tasks with validation data.",
        )


def _options(info: MethodInfo, options: Table, names: list[str]) -> Iterator[Fault]:
    hints = get_type_hints(info.function)
    known = [*info.options, *SHARED]
    checks: dict[str, Callable[[Any], Any]] = {
        "weights": lambda value: check_weights(names, value),
        "pad_rank": check_pad,
        "post": check_post,
    }
    shared = {"space": Space, "modules_to_save": SavedPolicy, "strict_base": bool, "seed": int}
    for name, value in options.items():
        key = f"options.{name}"
        if name in _ELSEWHERE:
            yield Fault(key, _ELSEWHERE[name])
        elif name in info.options:
            yield from _typed(key, value, hints.get(name, Any))
        elif name == "weights" and not isinstance(value, dict):
            yield Fault(key, f"expected one number per adapter, by name, got {value!r:.80}.")
        elif name in checks:
            yield from _caught(key, lambda name=name, value=value: checks[name](value))  # type: ignore[misc]
        elif name in shared:
            yield from _typed(key, value, shared[name])
        else:
            text = f"the method {info.name!r} has no such option."
            yield Fault(key, f"{text}{suggest(str(name), known)}")
    for name, default in info.options.items():
        if default is REQUIRED and name not in options:
            yield Fault(f"options.{name}", f"the method {info.name!r} needs this option.")


# -------------------------------------------------------------------------------------- folders


def _folders(data: Table, file: Path) -> Iterator[Fault]:
    """Refuse to write over what is read."""
    read = {f"adapters.{name}": folder for name, folder in _table(data, "adapters").items()}
    read["base"] = data.get("base")
    places = {
        (file.parent / folder).resolve(): key
        for key, folder in read.items()
        if isinstance(folder, str)
    }
    for key in ("out", "merged"):
        folder = data.get(key)
        if isinstance(folder, str) and (file.parent / folder).resolve() in places:
            other = places[(file.parent / folder).resolve()]
            yield Fault(key, f"this is the folder of {other}; choose another.")
    out, merged = data.get("out"), data.get("merged")
    if isinstance(out, str) and out == merged:
        yield Fault("merged", "this is the folder of out; choose another.")
