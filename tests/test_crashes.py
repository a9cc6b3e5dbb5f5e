"""Killed, interrupted, out of disk, not alone: outputs are absent or whole, nothing is lost."""

from __future__ import annotations

import collections
import errno
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults import DIED, child, failing_at, killed_after, killed_before, steps
from paper import paper
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_himerge.result as result_room
from peft_himerge import (
    HiMergeConfig,
    apply_plan,
    merge_adapters,
    merge_adapters_hi,
    merge_folders,
)
from peft_himerge.errors import HiMergeError, OutputError
from peft_himerge.files import replacing, write_text
from peft_himerge.outputs import LOCK, owning, publishing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")

NAMES = ["zh", "en"]
KILLS = 50


@cache
def model() -> PeftModel:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    specs = {
        name: {"r": 2, "alpha": 3, "target_modules": ["q_proj", "v_proj"], "seed": place}
        for place, name in enumerate(NAMES)
    }
    return tiny.add_adapters(tiny._build(LlamaForCausalLM, config, torch.float32, 0), specs)


class Eval:
    """The mean logit of one token; every call is told to a file before it begins."""

    def __init__(self, name: str, calls: Path | None = None) -> None:
        self.fingerprint = name
        self._token, self._calls = 3 + NAMES.index(name), calls

    def __call__(self, model: Any) -> float:
        if self._calls is not None:
            with self._calls.open("a", encoding="utf-8") as file:
                file.write(f"{self.fingerprint}\n")
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([[1, 2, self._token]])).logits[..., 5].mean())


def evals(calls: Path | None = None) -> dict[str, Eval]:
    return {name: Eval(name, calls) for name in NAMES}


@dataclass(frozen=True)
class Inputs:
    """What merges read: a base and two adapters in folders."""

    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    model().save_pretrained(root, selected_adapters=NAMES, save_embedding_layers=False)
    config = model().base_model.model.config
    plain = tiny._build(LlamaForCausalLM, config, torch.float32, 0)
    plain.save_pretrained(root / "base", max_shard_size="2KB")
    assert len(list((root / "base").glob("*.safetensors"))) > 1
    return Inputs(root / "base", {name: root / name for name in NAMES})


def everything(inputs: Inputs, root: Path, density: float = 0.4, calls: Path | None = None) -> None:
    """Analyse, merge in every way and write every kind of output under `root`; in a child only."""
    result_room.available = lambda: False  # no page: 5 MB, written as the other files are
    config = paper(density=density, scale=0.9, rank=3, max_export_drop=None)
    journal = root / "scores.jsonl"
    found = merge_adapters_hi(model(), NAMES, evals(calls), config=config, journal=journal)
    found.save(root / "hi")
    found.save_merged(inputs.base, root / "hi-full")
    other = merge_adapters(model(), NAMES, "ties", adapter_name="other", density=density)
    other.save(root / "ties")
    other.save_merged(inputs.base, root / "ties-full")
    numbers = paper(density=density, scale=0.9, rank=3)
    merge_folders(inputs.adapters, root / "folders", config=numbers)


def contents(root: Path) -> dict[str, bytes]:
    """Return every file and empty folder, but for times that are told in reports."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            if not any(path.iterdir()):
                found[name + "/"] = b""
        elif path.name in ("report.json", "report.md", "report.html", "README.md", "scores.jsonl"):
            found[name] = b"a report"
        else:
            found[name] = path.read_bytes()
    return found


def configs(root: Path) -> list[Path]:
    marks = ("adapter_config.json", "config.json")
    return [
        path
        for name in marks
        for path in root.rglob(name)
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def assert_whole(root: Path, *generations: dict[str, bytes]) -> None:
    """Every folder that has a config, so that it can be loaded, is of one writing only."""
    for config in configs(root):
        folder = config.parent
        seen = {n: text for n, text in contents(folder).items() if not n.startswith(".")}
        head = f"{folder.relative_to(root)}/"
        wholes = [
            {n.removeprefix(head): text for n, text in whole.items() if n.startswith(head)}
            for whole in generations
        ]
        assert seen in wholes, folder
        for path in folder.glob("*.safetensors"):
            load_file(path)


# ------------------------------------------------------------------------------ at random moments


@pytest.fixture(scope="module")
def reference(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what an undisturbed run gives at two densities, its calls and its time."""
    root = tmp_path_factory.mktemp("reference")
    new, old, calls = root / "new", root / "old", root / "calls"
    calls.touch()
    for path in (old, new):
        path.mkdir()
    assert child(lambda: everything(inputs, old, 0.7)) == 0
    start = time.perf_counter()
    assert child(lambda: everything(inputs, new, calls=calls)) == 0
    took = time.perf_counter() - start
    lines = calls.read_text(encoding="utf-8").splitlines()
    return {
        "new": contents(new), "old": contents(old), "seconds": took, "calls": len(lines),
        "folder": old,
    }  # fmt: skip


@pytest.mark.parametrize("part", range(5))
def test_killed_at_a_random_moment_and_run_again(
    part: int, inputs: Inputs, reference: dict[str, Any], tmp_path: Path
) -> None:
    draw = random.Random(part)
    share = KILLS // 5
    for number in range(share):
        root, calls = tmp_path / str(number), tmp_path / f"{number}.calls"
        over = number % 2 == 1  # over the outputs of an earlier merge, but for its scores
        run = partial(everything, inputs, root, calls=calls)

        def fresh(root: Path = root, calls: Path = calls, over: bool = over) -> None:
            calls.write_text("", encoding="utf-8")
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            if over:
                shutil.copytree(reference["folder"], root, dirs_exist_ok=True)
                (root / "scores.jsonl").unlink()

        # Spread over the run: one moment in each of as many equal pieces as there are kills.
        moment = (number + draw.random()) / share * reference["seconds"]
        fresh()
        while killed_after(run, moment) != DIED:  # it was done already: faster than at first
            fresh()
            moment *= 0.8
        assert_whole(root, reference["new"], *([reference["old"]] if over else []))
        assert child(run) == 0
        assert contents(root) == reference["new"], moment  # and no file beside
        made = len(calls.read_text(encoding="utf-8").splitlines())
        assert made - reference["calls"] in (0, 1), moment  # the score in flight is lost, no other


# ------------------------------------------------------------------------- before every operation

WRITERS = ("hi", "checkpoint", "focused", "ties", "ties checkpoint", "folders")


@dataclass(frozen=True)
class Writer:
    """Writes one kind of output to a folder, at a density of 0.4 or 0.7.

    Attributes:
        every: only every n-th operation is tried, for kinds that share their code with another.
    """

    every: int
    call: Callable[[Path, float], Any]

    def __call__(self, out: Path, density: float) -> Any:
        return self.call(out, density)


@pytest.fixture(params=WRITERS)
def write(
    request: pytest.FixtureRequest,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Writer]:
    monkeypatch.setattr(result_room, "available", lambda: False)  # 5 MB, written as the others are
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow, and SIGKILL loses no write
    kind, plans, results = request.param, {}, {}
    for density in (0.4, 0.7):
        numbers = paper(density=density, scale=0.9, rank=3)
        plan = merge_folders(inputs.adapters, tmp_path / "plan", config=numbers).plan
        name = f"x{plan.fingerprint[:6]}"
        if kind == "focused":
            seen = evals()
            for fn in seen.values():
                fn._token += round(10 * density)
            config = HiMergeConfig(variant="focused", scale=density, accept="never", rank=3)
            results[density] = merge_adapters_hi(
                model(), NAMES, seen, adapter_name=name, config=config
            )
        elif kind in ("hi", "checkpoint"):
            results[density] = apply_plan(model(), plan, adapter_name=name, rank=3)
        elif kind != "folders":
            results[density] = merge_adapters(
                model(), NAMES, "ties", adapter_name=name, density=density
            )
        plans[density] = numbers

    def of(out: Path, density: float) -> Any:
        if kind == "folders":
            return merge_folders(inputs.adapters, out, config=plans[density])
        if kind.endswith("checkpoint"):
            return results[density].save_merged(inputs.base, out)
        return results[density].save(out)

    yield Writer({"hi": 1, "checkpoint": 1, "focused": 6}.get(kind, 5), of)
    for result in results.values():
        model().delete_adapter(result.adapter_name)


def generations(write: Writer, root: Path) -> tuple[dict[str, bytes], ...]:
    for density in (0.4, 0.7):
        write(root / str(density) / "out", density)
    return contents(root / "0.4"), contents(root / "0.7")


@pytest.mark.parametrize("over", [False, True])
def test_killed_before_any_operation_and_run_again(
    write: Writer, over: bool, tmp_path: Path
) -> None:
    new, old = generations(write, tmp_path / "whole")
    assert new != old
    root = tmp_path / "root"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if over:
            shutil.copytree(tmp_path / "whole" / "0.7" / "out", root / "out")
            (root / "out" / "notes.txt").write_text("the user's own", encoding="utf-8")

    more = {"out/notes.txt": b"the user's own"} if over else {}
    fresh()
    told = steps(root, lambda: write(root / "out", 0.4), tmp_path / "log")
    assert contents(root) == new | more
    assert len(told) > 30
    assert_synced(told)
    for number in range(1, len(told) + 1, write.every if over else 5):
        fresh()
        assert killed_before(root, lambda: write(root / "out", 0.4), number) == DIED
        assert_whole(root, new | more, old | more)
        write(root / "out", 0.4)
        assert contents(root) == new | more, told[number - 1]


def declared(told: list[str]) -> int:
    """Return the number of the operation, from 1, that declares the new files ready."""
    return 1 + next(n for n, what in enumerate(told) if what.endswith(".himerge-ready"))


def assert_synced(told: list[str]) -> None:
    """All is on the disk before it is declared ready; the config goes first and comes last."""
    ops = [what.split()[1:] for what in told]
    before, after = ops[: declared(told) - 1], ops[declared(told) :]
    synced = {paths[0] for op, *paths in before if op == "fsync"}
    made = {paths[0] for op, *paths in before if op == "open"}
    made |= {paths[1] for op, *paths in before if op == "os.rename"}
    files = {p for p in made if "/.himerge-new/" in p and not p.endswith(".himerge-tmp")}
    assert files
    assert files <= synced
    assert any(p.endswith("/.himerge-new") for p in synced)
    moved = [paths[1] for op, *paths in after if op == "os.rename"]
    assert len(moved) == len(files)
    config = [Path(path).name in ("adapter_config.json", "config.json") for path in moved]
    assert config == sorted(config)
    assert config[-1]
    assert moved[-1].endswith("/out/" + Path(moved[-1]).name)
    # Of every folder: configs gone, others there, configs there.
    folders = {Path(path).parent for path in moved}
    folders |= {
        up for f in folders for up in f.parents if up.is_relative_to(Path(moved[-1]).parent)
    }
    gone = collections.Counter(paths[0] for op, *paths in after if op == "fsync")
    assert gone == {str(folder): 3 for folder in folders}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_operation_is_told_and_tried_again(
    code: int, write: Writer, tmp_path: Path
) -> None:
    new, old = generations(write, tmp_path / "whole")
    root = tmp_path / "root"
    shutil.copytree(tmp_path / "whole" / "0.7", root)
    told = steps(root, lambda: write(root / "out", 0.4), tmp_path / "log")

    def tried() -> None:
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write(root / "out", 0.4)
        assert str(root / "out") in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert caught.value.__cause__ is not None

    # What comes last takes away the lock, which needs no room.
    last = max(n for n, what in enumerate(told) if " os.rename " in what or " fsync " in what)
    ready = declared(told)
    every = write.every if code == errno.ENOSPC else 7
    for number in range(1, last + 2, every):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "whole" / "0.7", root)
        error = OSError(code, os.strerror(code))
        assert failing_at(root, tried, number, error) == 0, told[number - 1]
        assert_whole(root, new, old)
        if number <= ready:
            assert contents(root) == old, told[number - 1]
        write(root / "out", 0.4)
        assert contents(root) == new, told[number - 1]


def test_a_file_too_large_for_the_disk_is_told(write: Writer, tmp_path: Path) -> None:
    import resource

    whole, _ = generations(write, tmp_path / "whole")
    out, limit = tmp_path / "out", max(map(len, whole.values())) // 2

    def tried() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OutputError, match="File too large"):
            write(out, 0.4)

    assert child(tried) == 0
    assert not out.exists()


def test_a_folder_that_may_not_be_written_is_refused_before_anything_else(
    inputs: Inputs, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "out").mkdir(parents=True)
    for path in (root / "out", root):
        path.chmod(0o555)

    def tried() -> None:
        for folder in ("out", "other"):
            with (
                pytest.raises(OutputError, match=r"cannot be written: .*Permission denied"),
                owning(root / folder),
            ):
                pass

    def nobody() -> None:
        os.chdir(root)  # the folders above may be closed to others
        os.setegid(65534)
        os.seteuid(65534)
        for folder in ("out", "other"):
            with pytest.raises(OutputError, match="Permission denied"), owning(folder):
                pass

    with owning(tmp_path / "warm"):  # so that everything is imported
        pass
    assert child(nobody if os.geteuid() == 0 else tried) == 0
    assert contents(root) == {"out/": b""}


# ------------------------------------------------------------------------ files by themselves


def test_a_text_killed_before_any_operation_is_the_old_or_the_new(tmp_path: Path) -> None:
    root = tmp_path / "root"
    path = root / "deep" / "cell.json"

    path.parent.mkdir(parents=True)

    def rewrite() -> None:
        write_text(path, "new" * 10_000)

    told = steps(root, rewrite, tmp_path / "log")
    renames = [n for n, what in enumerate(told) if "os.rename" in what]
    assert any(" fsync " in what for what in told[: renames[0]])
    assert " fsync " in told[-1]  # the folder, so that the name survives a power cut
    for old in (None, "old"):
        for number in range(1, len(told) + 1):
            shutil.rmtree(root, ignore_errors=True)
            path.parent.mkdir(parents=True)
            if old is not None:
                write_text(path, old)
            assert killed_before(root, rewrite, number) == DIED
            found = path.read_text(encoding="utf-8") if path.exists() else None
            assert found in (old, "new" * 10_000)
            rewrite()
            assert [p.name for p in path.parent.iterdir()] == ["cell.json"]


def test_what_a_living_process_or_another_machine_is_writing_stays(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    mine = [tmp_path / f".cell.json.{name}.himerge-tmp" for name in ("far-1", f"far-{2**22 + 1}")]
    for other in mine:
        other.touch()
    with replacing(path) as one:
        write_text(path, "whole")  # the same process: the same name, which is free again after
        one.write_text("mine", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "mine"
    assert sorted(tmp_path.iterdir()) == sorted([*mine, path])


# ---------------------------------------------------------------------------------- not alone


def publish(folder: Path, name: str) -> None:
    with publishing(folder) as new:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text("new", encoding="utf-8")


def test_a_file_is_not_written_where_a_folder_is_nor_a_folder_where_a_file_is(
    tmp_path: Path,
) -> None:
    for made, taken in (("plan.json", "plan.json/mine"), ("focused/en/plan.json", "focused")):
        folder = tmp_path / Path(taken).name
        (folder / taken).parent.mkdir(parents=True)
        (folder / taken).write_text("mine", encoding="utf-8")
        was = contents(folder)
        for _ in range(2):
            with pytest.raises(OutputError, match=r"It is as it was\. Make room"):
                publish(folder, made)
            assert contents(folder) == was
        publish(folder, "other.json")  # nothing is in the way of what comes next
        assert contents(folder) == was | {"other.json": b"new"}


def owner(folder: Path, until: Path) -> Callable[[], None]:
    def own() -> None:
        with publishing(folder) as new:
            (new / "half.txt").write_text("half", encoding="utf-8")
            (folder.parent / "ready").touch()
            while not until.exists():
                time.sleep(0.01)

    return own


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("ends", ["killed", "done"])
def test_a_folder_is_written_by_one_process_at_a_time(
    ends: str, inputs: Inputs, tmp_path: Path
) -> None:
    out, until = tmp_path / "out", tmp_path / "until"
    config = paper(density=1.0, scale=1.0)

    def meanwhile(number: int) -> None:
        wait_for(tmp_path / "ready")
        for _ in range(2):  # being refused does not take the lock away
            with pytest.raises(OutputError, match="Wait until it is done") as caught:
                merge_folders(inputs.adapters, out, config=config)
            assert str(out) in str(caught.value)
            assert f"process {number} " in str(caught.value)
            assert isinstance(caught.value, HiMergeError)
        if ends == "killed":
            os.kill(number, signal.SIGKILL)
        until.touch()

    assert child(owner(out, until), meanwhile) == (DIED if ends == "killed" else 0)
    assert (out / LOCK).exists() == (ends == "killed")
    merge_folders(inputs.adapters, out, config=config)
    names = {p.name for p in out.iterdir()}
    assert "adapter_config.json" in names
    assert ("half.txt" in names) == (ends == "done")
    assert not [name for name in names if name.startswith(".")]


def test_a_folder_is_written_by_one_thread_at_a_time(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def other() -> None:
        try:
            with owning(tmp_path):
                pass
        except OutputError as exc:
            caught.append(exc)

    with owning(tmp_path), owning(tmp_path / "x" / ".."):  # the same thread may
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK).exists()
    assert len(caught) == 1
    assert f"process {os.getpid()} " in str(caught[0])
    with owning(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_an_owner_that_fails_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    for made in (owning, publishing):
        with pytest.raises(ValueError, match="on purpose"), made(tmp_path / "a" / "b"):
            raise ValueError("on purpose")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), owning(tmp_path / "file"):
        pass


def test_many_wait_for_each_other_and_none_is_lost(tmp_path: Path) -> None:
    counter = tmp_path / "out" / "counter.txt"

    def count() -> None:
        for _ in range(5):
            with owning(tmp_path / "out", wait=True):
                before = int(counter.read_text()) if counter.exists() else 0
                time.sleep(0.002)
                write_text(counter, str(before + 1))

    def together(depth: int) -> None:
        assert child(count, lambda _: together(depth - 1) if depth > 1 else count()) == 0

    together(3)
    assert counter.read_text(encoding="utf-8") == "20"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["counter.txt"]
