"""Change one thing at a time in a copy of a room, and see whether the room's tests notice.

The work is mutmut's. This makes it a folder per room, with a copy of the repository in which mutmut
also reaches properties, context managers and what is `held` (it leaves decorated functions alone),
and holds what survives against tests/MUTANTS.md, which says of every survivor why it may live. A
second run looks only at the functions that changed and at what survived; without build/mutants it
begins anew.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
COPIED = ("peft_himerge", "tests", "recipes", "examples", "README.md", "CHANGELOG.md")

# Room -> the tests meant to guard it.
ROOMS: dict[str, list[str]] = {
    "conflict": ["tests/test_conflict.py"],
    "contribution": ["tests/test_contribution.py"],
    "search": ["tests/test_search.py"],
    "sampler": ["tests/test_sampler.py"],
    "plan": ["tests/test_plan.py"],
    "select": ["tests/test_select.py", "tests/test_select_brackets.py"],
    "rounds": ["tests/test_rounds.py"],
    "config": ["tests/test_config.py"],
    "run": ["tests/test_run.py"],
    "lowrank": ["tests/test_lowrank.py", "tests/test_randomised.py"],
    "hi": ["tests/test_hi_steps.py"],
}

# Hypothesis need not look for the smallest example of a failure that nobody reads.
QUICK = """
from hypothesis import Phase

settings.register_profile(
    "mutants", settings.get_profile("fixed"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("mutants")
"""


def bare(source: str) -> str:
    """Return `source` with `@property`, `@contextmanager` and `@held()` after their functions."""
    lines = source.splitlines()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(found, key=lambda node: -node.lineno):
        match node.decorator_list:
            case [ast.Name(id="property" | "contextmanager" as name, lineno=at)]:
                indent = " " * node.col_offset
                lines.insert(node.end_lineno or 0, f"{indent}{node.name} = {name}({node.name})")
                del lines[at - 1]
            case [ast.Call(func=ast.Name(id="held"), args=[], lineno=at)]:
                lines.insert(node.end_lineno or 0, f"{node.name} = held()({node.name})")
                del lines[at - 1]
    return "\n".join(lines) + "\n"


def prepare(room: str) -> Path:
    """Return the folder in which mutmut runs for one room, with the repository as it is now."""
    folder = WORK / room
    folder.mkdir(parents=True, exist_ok=True)
    # Which test reaches which function is found anew: a test may have changed.
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder / name)
    path = folder / "peft_himerge" / f"{room}.py"
    path.write_text(bare(path.read_text(encoding="utf-8")), encoding="utf-8")
    with (folder / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
        conftest.write(QUICK)
    options = {
        "source_paths": ["peft_himerge"],
        "only_mutate": [f"peft_himerge/{room}.py"],
        "also_copy": [name for name in COPIED if name != "peft_himerge"],
        "pytest_add_cli_args_test_selection": ROOMS[room],
        "pytest_add_cli_args": ["-p", "no:cacheprovider"],
        "process_isolation": "forkserver",  # torch's threads do not outlive a fork
        "use_git_change_detection": False,
    }
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(f"{config}\n[tool.mutmut]\n{lines}", encoding="utf-8")
    return folder


def mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut in `folder` and return what it said."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mutmut")), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def survivors(folder: Path) -> list[str]:
    """Return the names of the mutants that no test noticed, or that no test reached."""
    rows = [row.strip().partition(": ") for row in mutmut(folder, "results").splitlines()]
    return [name for name, _, verdict in rows if verdict not in ("timeout", "segfault")]


def left(diff: str) -> list[str]:
    """Return the lines that a mutant puts into the room, or those it takes away if it puts none."""
    lines = [line for line in diff.splitlines() if line[:1] in ("+", "-")][2:]
    return [line[1:].strip() for line in lines if line[0] == "+"] or [x[1:].strip() for x in lines]


def test(room: str) -> bool:
    """Run the mutants of one room; return True if no survivor is new."""
    again = (WORK / room / "mutants").is_dir()
    folder = prepare(room)
    children = f"--max-children={os.environ.get('CHILDREN', '2')}"
    mutmut(folder, "run", children)
    if again and (names := survivors(folder)):
        mutmut(folder, "run", children, *names)
    mutmut(folder, "export-cicd-stats")
    counts = json.loads((folder / "mutants" / "mutmut-cicd-stats.json").read_text())
    print(room, {key: value for key, value in counts.items() if value}, flush=True)
    argued = (ROOT / "tests" / "MUTANTS.md").read_text(encoding="utf-8")
    diffs = [mutmut(folder, "show", name) for name in survivors(folder)]
    new = [diff for diff in diffs if not all(line in argued for line in left(diff))]
    print("\n".join(new), flush=True)
    return not new


if __name__ == "__main__":
    rooms = sys.argv[1:] or list(ROOMS)
    unknown = sorted(set(rooms) - set(ROOMS))
    if unknown:
        raise SystemExit(f"no tests are named for {unknown}. Allowed: {', '.join(ROOMS)}")
    raise SystemExit(0 if all([test(room) for room in rooms]) else 1)
