"""Nothing runs from an adapter folder or a recipe, nobody is called, and the wheel is complete.

Python tells audit hooks of everything that is compiled, executed, imported, started or connected
to. A child does what the command line does, on folders full of traps, and tells what it was told.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import workshop
import yaml

ROOT = Path(__file__).parents[1]
NAMES = ("zh", "en")

WATCHED = """
import json, os, sys
root, log, commands = sys.argv[1:]
told = open(log, "w", buffering=1)
inside = os.path.realpath(root)

# Asking for this machine's own name is no call, making a socket neither; numpy and torch pickle.
QUIET = ("socket.gethostname", "socket.__new__", "pickle.find_class")

def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn",
                         "os.spawn", "os.fork", "pickle.")) and event not in QUIET:
        told.write(json.dumps([event, repr(arguments)[:200]]) + "\\n")
    elif event in ("compile", "exec", "import"):
        names = [a for a in arguments if isinstance(a, str)]
        names += [getattr(a, "co_filename", "") for a in arguments]
        if any(os.path.realpath(n).startswith(inside) for n in names if n.startswith("/")):
            told.write(json.dumps([event, repr(arguments)[:200]]) + "\\n")
    elif event == "open" and isinstance(arguments[0], str):
        if arguments[0].endswith((".py", ".pyc", ".bin", ".pt", ".pkl", ".so")):
            if os.path.realpath(arguments[0]).startswith(inside):
                told.write(json.dumps([event, arguments[0]]) + "\\n")

sys.addaudithook(hook)
from peft_himerge.cli import main
for command in json.loads(commands):
    sys.argv = ["himerge", *command]
    code = 0
    try:
        main()
    except SystemExit as exc:
        code = exc.code
    told.write(json.dumps(["ended", code]) + "\\n")
"""

TRAP = "import pathlib, sys; pathlib.Path({mark!r}).touch()\n"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def plant(folder: Path, mark: Path) -> None:
    """Put everything into a folder that somebody might be led to execute."""
    code = TRAP.format(mark=str(mark))
    for name in ("modeling_llama.py", "configuration_custom.py", "tokenization_custom.py",
                 "adapter_model.py", "__init__.py", "conftest.py", "setup.py", "evals.py",
                 "sitecustomize.py", "trec.py", f"{folder.name}.py"):  # fmt: skip
        (folder / name).write_text(code, encoding="utf-8")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "lib.so").write_bytes(b"\x7fELF")


def change(path: Path, **fields: Any) -> None:
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(told | fields), encoding="utf-8")


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with traps everywhere, and a recipe without any."""
    root = tmp_path_factory.mktemp("trapped")
    workshop.causal(root, list(NAMES))
    mark = root / "EXECUTED"
    for folder in (root, root / "models" / "base", *(root / "adapters" / name for name in NAMES)):
        plant(folder, mark)
    auto = {
        "AutoConfig": "configuration_custom.Custom",
        "AutoModelForCausalLM": "modeling_llama.Custom",
        "AutoTokenizer": ["tokenization_custom.Custom", None],
    }
    base = root / "models" / "base"
    change(base / "config.json", auto_map=auto, trust_remote_code=True)
    change(base / "tokenizer_config.json", auto_map=auto, trust_remote_code=True)
    change(base / "generation_config.json", custom_generate="modeling_llama.py")
    for folder in (root / "adapters" / name for name in NAMES):
        change(
            folder / "adapter_config.json",
            auto_mapping={"base_model_class": "Custom", "parent_library": "modeling_llama"},
            base_model_name_or_path="someone/else",
        )
    for name in NAMES:
        workshop.write(root / "data" / name / "validation.jsonl", workshop.choices(1, 3))
        workshop.write(root / "data" / name / "test.jsonl", workshop.choices(20, 3))
        plant(root / "data" / name, mark)
    recipe = {
        "base": "models/base",
        "adapters": {name: f"adapters/{name}" for name in NAMES},
        "tasks": {
            name: {
                "kind": "multiple_choice",
                "validation": f"data/{name}/validation.jsonl",
                "test": f"data/{name}/test.jsonl",
            }
            for name in NAMES
        },
        "options": {"density": 0.5, "scale": 1.0, "max_export_drop": None},
        "out": "out",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root


Event = tuple[str, Any]


def watched(root: Path, *commands: list[str]) -> tuple[list[tuple[int, list[Event]]], str]:
    """Run commands in a child; return each one's exit code and events, and all that they said."""
    log = root.parent / f"{root.name}.log"
    env = os.environ | {"COLUMNS": "300", "PYTHONWARNINGS": "ignore", "PYTHONSAFEPATH": "1"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        env.pop(name, None)  # no network access even where it is allowed
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(root), str(log), json.dumps(commands)],
        capture_output=True, text=True, env=env, check=False, cwd=root,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    found: list[tuple[int, list[Event]]] = []
    events: list[Event] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        event, what = json.loads(line)
        if event == "ended":
            found.append((what, events))
            events = []
        else:
            events.append((event, what))
    return found, text


def by_flags(root: Path) -> list[str]:
    return [x for n in NAMES for x in ("--adapter", f"{n}={root / 'adapters' / n}")]


def test_no_code_of_the_folders_runs_and_nobody_is_called(trapped: Path) -> None:
    numbers = ["--set", "density=0.5", "--set", "scale=1"]
    pickled = trapped / "pickled"
    shutil.copytree(trapped / "adapters" / "zh", pickled)
    (pickled / "adapter_model.safetensors").rename(trapped / "away.safetensors")
    bomb = pickle.dumps(Bomb(trapped / "EXECUTED"))
    (pickled / "adapter_model.bin").write_bytes(bomb)
    commands = {
        "merge recipe": ["merge", "recipe.yaml"],
        "merge folders": ["merge", *by_flags(trapped), "--out", "folders", *numbers],
        "validate": ["validate", "recipe.yaml"],
        "plan": ["plan", "recipe.yaml"],
        "report": ["report", "folders"],
        "check": ["check", "adapters/zh"],
        "check pickle": ["check", str(pickled)],
        "merge pickle": ["merge", "--adapter", f"x={pickled}", "--out", "no", *numbers],
    }
    found, text = watched(trapped, *commands.values())
    seen = dict(zip(commands, [events for _, events in found], strict=True))
    assert {name: events for name, events in seen.items() if events} == {}, text
    assert not (trapped / "EXECUTED").exists()
    codes = dict(zip(commands, [code for code, _ in found], strict=True))
    assert [codes[name] for name in list(commands)[:5]] == [0] * 5, text
    assert codes["merge pickle"] == 2
    assert "adapter_model.bin" in text
    assert "Traceback" not in text
    assert (trapped / "out" / "adapter_config.json").exists()
    assert not (trapped / "no").exists()


def test_the_hook_sees_what_it_should(trapped: Path, tmp_path: Path) -> None:
    evals = tmp_path / "inside" / "evals.py"
    evals.parent.mkdir()
    evals.write_text(
        "import os, socket\n"
        "os.system('true')\n"
        "try: socket.create_connection(('127.0.0.1', 9), 0.1)\n"
        "except OSError: pass\n"
        "eval_fns = {}\n",
        encoding="utf-8",
    )
    base = str(trapped / "models" / "base")
    arguments = ["merge", *by_flags(trapped), "--out", "o", "--base", base, "--eval", str(evals)]
    [(_, events)], _ = watched(evals.parent, arguments)
    names = {event for event, _ in events}
    assert {"open", "compile", "exec", "os.system", "socket.connect"} <= names


@pytest.mark.parametrize(
    "changes",
    [
        {"trust_remote_code": True},
        {"eval": "evals.py"},
        {"evals": ["evals.py"]},
        {"method": "evals.py"},
        {"method": "os.system"},
        {"options": {"trust_remote_code": True}},
        {"tasks": {"zh": {"kind": "evals.py", "validation": "data/zh/validation.jsonl"}}},
        {"tasks": {"zh": {"kind": "function", "validation": "evals:score"}}},
        {
            "tasks": {
                "zh": {
                    "kind": "multiple_choice",
                    "validation": "data/zh/validation.jsonl",
                    "trust_remote_code": True,
                }
            }
        },
        {"tasks": {"zh": {"kind": "multiple_choice", "validation": "data/zh/zh.py"}}},
        {"tasks": {"zh": {"kind": "multiple_choice", "validation": "data/zh/x.pkl"}}},
        "!!python/object/apply:os.system ['touch EXECUTED']",
        "base: !!python/name:os.system",
    ],
    ids=str,
)
def test_a_recipe_that_asks_for_code_is_refused(
    changes: dict[str, Any] | str, trapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from peft_himerge.cli import app
    from peft_himerge.errors import ConfigError

    file = trapped / "asking.yaml"
    if isinstance(changes, str):
        file.write_text(changes, encoding="utf-8")
    else:
        told = yaml.safe_load((trapped / "recipe.yaml").read_text(encoding="utf-8"))
        if "tasks" in changes:
            changes = {"tasks": told["tasks"] | changes["tasks"]}
        file.write_text(yaml.safe_dump(told | changes), encoding="utf-8")
    monkeypatch.chdir(trapped)
    done = CliRunner().invoke(app, ["merge", str(file)])
    refused = isinstance(done.exception, ConfigError) or done.exit_code == 2
    assert refused, (done.exit_code, done.output, done.exception)
    assert not (trapped / "EXECUTED").exists()
    assert not (trapped / "asking").exists()


# -------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a wheel and an sdist of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    code = (
        "import os, sys; from hatchling import build; "
        "build.build_sdist(sys.argv[1]); build.build_wheel(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True)
    return out


def tracked(*below: str) -> set[str]:
    """Return the files that a package should hold: all but what Python and editors make."""
    return {
        str(path.relative_to(ROOT))
        for name in below
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".venv" not in path.parts
    }


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        assert wheel.testzip() is None
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "himerge = peft_himerge.cli:main" in wheel.read(entry).decode()
        meta = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    package = {name for name in names if ".dist-info/" not in name}
    assert package == tracked("peft_himerge")
    assert "peft_himerge/py.typed" in package
    assert any(name.startswith("peft_himerge/page/templates/") for name in package)
    assert any(name.endswith("adapter_model.safetensors") for name in package)  # the demo's
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in meta
    assert "Requires-Dist: filelock" in meta


def test_the_sdist_holds_what_its_tests_and_its_wheel_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = tracked("peft_himerge", "recipes", "tests", "examples")
    wanted |= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    assert wanted <= names


def test_the_wheel_of_the_sdist_is_the_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    code = "import sys; from hatchling import build; build.build_wheel(sys.argv[1])"
    source = next(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True)
    texts = []
    for path in (next(built.glob("*.whl")), next(tmp_path.glob("*.whl"))):
        with zipfile.ZipFile(path) as wheel:
            texts.append({name: wheel.read(name) for name in wheel.namelist()})
    assert texts[0] == texts[1]


def test_the_installed_wheel_runs_without_the_checkout(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)  # pure Python: what pip does; .ci/wheel lets pip do it
    import torch

    others = Path(torch.__file__).parents[1]  # the third parties of this environment, but not us
    ours = [p for p in others.iterdir() if "himerge" not in p.name.lower()]
    party = tmp_path / "party"
    party.mkdir()
    for path in ours:
        (party / path.name).symlink_to(path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(party)}
    code = (
        "import sys, peft_himerge; print(peft_himerge.__file__); sys.argv = ['himerge', '--help']; "
        "from peft_himerge.__main__ import main; main()"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(site)
    assert "Merge LoRA adapters" in done.stdout
