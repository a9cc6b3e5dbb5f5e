"""Scores survive kill -9 to the last one, and nothing damaged or foreign is ever believed."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import paper
from peft import PeftModel
from snapshot import run_python

from peft_himerge import MergeResult, merge_adapters_hi, randomness
from peft_himerge import journal as journal_room
from peft_himerge.errors import ConfigError, HiMergeError, JournalError
from peft_himerge.journal import (
    FORMAT,
    Journal,
    _checksum,
    _line,
    pack_score,
    unpack_score,
)
from peft_himerge.scoring import Score

IDENTITY = {"base model": "abc", "torch": "2"}
STATE = {"seed": 1}
SCORES = {
    "one": Score(0.1 + 0.2),
    "two": Score(-1e-310, np.array([0.1, -0.0, 1 / 3, 5e-324])),
    "größer": Score(2.5, np.array([2.0, 3.0]), {"accuracy": 2.5, "f1": 1e300}),
}


def key(name: str) -> dict[str, Any]:
    return {"task": name, "adapters": {"zh": "1", "en": "2"}}


def write(path: Path, identity: Mapping[str, str] = IDENTITY) -> bytes:
    with Journal(path, identity, STATE) as journal:
        for name, score in SCORES.items():
            journal.add(key(name), score, 0.25)
    return path.read_bytes()


def read(path: Path, identity: Mapping[str, str] = IDENTITY) -> dict[str, Score]:
    with Journal(path, identity, {"seed": 2}) as journal:
        found = {name: journal.find(key(name)) for name in SCORES}
        return {name: kept.score for name, kept in found.items() if kept is not None}


def same(one: Score, other: Score) -> bool:
    return json.dumps(pack_score(one)) == json.dumps(pack_score(other))


def aside(folder: Path, kind: str) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if f".{kind}-" in p.name)


# ---------------------------------------------------------------------------------------- the file


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_scores_go_through_text_without_losing_a_bit(values: list[float]) -> None:
    score = Score(values[0], np.array(values), {"m": values[-1]})
    back = unpack_score(json.loads(json.dumps(pack_score(score))))
    assert back.value.hex() == score.value.hex()
    assert back.examples is not None
    assert back.examples.tobytes() == np.array(values).tobytes()
    assert math.copysign(1.0, back.metrics["m"]) == math.copysign(1.0, values[-1])


def test_what_was_added_is_found_again_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    write(file)
    with Journal(file, IDENTITY, {"seed": 2}) as journal:
        assert journal.found == len(SCORES)
        assert journal.random_state == STATE  # the first run's, not this one's
        for name, score in SCORES.items():
            kept = journal.find(key(name))
            assert kept is not None
            assert same(kept.score, score)
            assert kept.seconds == 0.25
        assert journal.find(key("three")) is None
        assert journal.find({**key("one"), "adapters": {"zh": "1", "en": "3"}}) is None


def test_every_line_is_json(tmp_path: Path) -> None:
    lines = write(tmp_path / "scores.jsonl").decode("utf-8").splitlines()
    assert len(lines) == 1 + len(SCORES)
    assert all(set(json.loads(line)) == {"sha256", "record"} for line in lines)


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    whole = write(tmp_path / "scores.jsonl")
    names = list(SCORES)
    cut = tmp_path / "cut"
    cut.mkdir()
    ends = {n for n in range(len(whole)) if whole[n : n + 1] == b"\n"}  # before and after a newline
    for end in sorted({*range(0, len(whole), 7), *ends, *(n + 1 for n in ends)}):
        file = cut / "scores.jsonl"
        file.write_bytes(whole[:end])
        lines = whole[:end].count(b"\n")
        with Journal(file, IDENTITY, STATE) as journal:
            assert journal.found == max(0, lines - 1), end
            journal.add(key("more"), Score(1.5), 0.0)
        assert sorted(read(file)) == sorted(names[: max(0, lines - 1)]), end
        assert [p.name for p in cut.iterdir()] == ["scores.jsonl"]  # nothing set aside
        file.unlink()


def test_a_file_with_any_byte_changed_is_never_believed(tmp_path: Path) -> None:
    whole = write(tmp_path / "scores.jsonl")
    trial = tmp_path / "trial"
    trial.mkdir()
    for place in (*range(0, len(whole), 5), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01 if place % 2 else 0x20
        file = trial / "scores.jsonl"
        file.write_bytes(damaged)
        found = read(file)
        others = [p for p in trial.iterdir() if p != file]
        if place == len(whole) - 1:  # the last newline: the line before it counts as torn
            assert (list(found), others) == (list(SCORES)[:2], [])
        else:
            assert found == {}, place
            assert [p.read_bytes() for p in others] == [bytes(damaged)]
        for path in trial.iterdir():
            path.unlink()


def test_a_file_of_something_else_is_set_aside_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    for kind, raw in (("corrupt", b"my notes, without a newline"), ("foreign", b"my notes\n")):
        file.write_bytes(raw)
        assert read(file) == {}
        assert (tmp_path / f"scores.jsonl.{kind}-1").read_bytes() == raw
    write(file)
    assert list(read(file)) == list(SCORES)


def test_a_header_without_an_identity_is_corrupt(tmp_path: Path) -> None:
    record = json.dumps({"format": FORMAT, "identity": [], "random_state": {}})
    file = tmp_path / "scores.jsonl"
    file.write_text(_line(_checksum("", record), record) + "\n", encoding="utf-8")
    assert read(file) == {}
    assert aside(tmp_path, "corrupt") == ["scores.jsonl.corrupt-1"]


def test_a_journal_that_is_renamed_before_it_is_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, old = tmp_path / "scores.jsonl", tmp_path / "old.jsonl"
    written = write(file)
    lock, calls = journal_room.fcntl.lockf, []

    def late(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            file.rename(old)
        lock(descriptor, how)

    monkeypatch.setattr(journal_room.fcntl, "lockf", late)
    assert read(file) == {}
    assert len(calls) == 2
    assert old.read_bytes() == written


@pytest.mark.parametrize("change", ["dropped", "swapped", "repeated"])
def test_lines_out_of_order_are_corrupt(tmp_path: Path, change: str) -> None:
    file = tmp_path / "scores.jsonl"
    lines = write(file).splitlines(keepends=True)
    if change == "dropped":
        lines = [*lines[:2], lines[3]]
    elif change == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines.append(lines[-1])
    file.write_bytes(b"".join(lines))
    assert read(file) == {}
    assert aside(tmp_path, "corrupt") == ["scores.jsonl.corrupt-1"]


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        ({**IDENTITY, "base model": "abd"}, "base model 'abc', this run on 'abd'"),
        ({"base model": "abc"}, "torch '2', this run on None"),
        ({**IDENTITY, "device": "cuda"}, "device None, this run on 'cuda'"),
    ],
)
def test_a_journal_of_another_run_is_set_aside_with_its_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, identity: dict[str, str], text: str
) -> None:
    file = tmp_path / "scores.jsonl"
    before = write(file)
    with caplog.at_level(logging.WARNING):
        assert read(file, identity) == {}
    assert text in caplog.text
    assert (tmp_path / "scores.jsonl.foreign-1").read_bytes() == before
    second = write(file, identity)
    assert read(file) == {}
    assert aside(tmp_path, "foreign") == ["scores.jsonl.foreign-1", "scores.jsonl.foreign-2"]
    assert (tmp_path / "scores.jsonl.foreign-2").read_bytes() == second


@pytest.mark.parametrize("text", ["# my notes\nall of them\n", '{"a": 1}\n', "\n"])
def test_a_file_that_is_no_journal_is_set_aside(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="utf-8")
    write(file)
    assert sorted(read(file)) == sorted(SCORES)
    assert (tmp_path / "notes.txt.foreign-1").read_text(encoding="utf-8") == text


def test_a_journal_of_a_later_format_is_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("peft_himerge.journal.FORMAT", "peft_himerge.journal/2")
        write(file)
    assert read(file) == {}
    assert aside(tmp_path, "foreign") == ["scores.jsonl.foreign-1"]


def test_a_folder_holds_one_file_per_identity(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "journals"
    with Journal(folder, IDENTITY, STATE) as one, Journal(folder, {"a": "b"}, STATE) as two:
        assert one.file.parent == two.file.parent == folder
        assert one.file != two.file
        one.add(key("one"), SCORES["one"], 0.0)
    with Journal(folder, {"a": "b"}, STATE) as two:
        assert two.found == 0
    with Journal(folder, IDENTITY, STATE) as one:
        assert one.found == 1


def test_a_journal_is_open_once(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    with Journal(file, IDENTITY, STATE) as journal:
        for _ in range(2):
            with (
                pytest.raises(JournalError, match="in use by another merge"),
                Journal(file, IDENTITY, STATE),
            ):
                pass
        journal.add(key("one"), SCORES["one"], 0.0)
        # The refused attempts did not drop the lock for others: see the next test.
        assert _other_process_may_lock(file) is False
    assert _other_process_may_lock(file) is True
    assert list(read(file)) == ["one"]


def _other_process_may_lock(file: Path) -> bool:
    code = (
        "import fcntl, sys\n"
        "try: fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except OSError: print('no')\n"
        "else: print('yes')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "yes"


def test_a_journal_in_use_elsewhere_is_refused_until_that_process_is_killed(
    tmp_path: Path,
) -> None:
    file = tmp_path / "scores.jsonl"
    write(file)
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with (
            pytest.raises(JournalError, match="in use by another merge") as caught,
            Journal(file, IDENTITY, STATE),
        ):
            pass
        assert isinstance(caught.value, HiMergeError)
        assert isinstance(caught.value, OSError)
        other.kill()
    assert sorted(read(file)) == sorted(SCORES)


def test_a_full_disk_ends_the_merge_with_the_scores_before_it_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.jsonl"
    write(file)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Journal(file, IDENTITY, STATE) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(JournalError, match="No space left on device"):
            journal.add(key("more"), Score(1.0), 0.0)
        assert journal.find(key("more")) is None
    assert sorted(read(file)) == sorted(SCORES)


def test_a_journal_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with (
        pytest.raises(JournalError, match="cannot be used"),
        Journal(tmp_path / "file" / "scores.jsonl", IDENTITY, STATE),
    ):
        pass


# --------------------------------------------------------------------------------------- the merge


def counted(names: list[str], seed: int = 0) -> tuple[dict[str, Any], Counter[str]]:
    fns, calls = tiny.eval_fns("llama", names, seed=seed), Counter[str]()

    def wrap(name: str) -> Any:
        def fn(model: Any) -> Any:
            calls[name] += 1
            return fns[name](model)

        fn.fingerprint = f"{name} {seed}"  # type: ignore[attr-defined]
        return fn

    return {name: wrap(name) for name in names}, calls


def merge(
    model: PeftModel, names: list[str], fns: Mapping[str, Any], journal: Path | None, **options: Any
) -> MergeResult:
    config = paper(**{"density": 0.4, "scale": 0.9, "max_export_drop": None, **options})
    return merge_adapters_hi(model, names, fns, config=config, journal=journal)


def facts(result: MergeResult) -> dict[str, Any]:
    told = result.to_dict()
    del told["cost"]
    scores = {s: {t: pack_score(x) for t, x in row.items()} for s, row in result.states.items()}
    return {**told, "states": scores}


NAMES = ["zh", "en"]


def test_a_second_merge_computes_nothing_and_ends_the_same(tmp_path: Path) -> None:
    fns, calls = counted(NAMES)
    plain = merge(tiny.peft_model("llama"), NAMES, fns, None)
    assert list(tmp_path.iterdir()) == []
    first = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path / "j.jsonl")
    assert calls.total() == 2 * plain.scores_computed
    second = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path / "j.jsonl")
    assert calls.total() == 2 * plain.scores_computed
    assert second.scores_computed == 0
    assert facts(plain) == facts(first) == facts(second)


def test_another_eval_function_is_computed_anew_and_only_that_one(tmp_path: Path) -> None:
    fns, _ = counted(NAMES)
    merge(tiny.peft_model("llama"), NAMES, fns, tmp_path)
    others, calls = counted(NAMES, seed=1)
    result = merge(tiny.peft_model("llama"), NAMES, {**fns, "en": others["en"]}, tmp_path)
    assert calls["zh"] == 0
    fresh, all_calls = counted(NAMES, seed=1)
    want = merge(tiny.peft_model("llama"), NAMES, {**fns, "en": fresh["en"]}, None)
    assert calls["en"] == all_calls["en"]
    assert facts(result) == facts(want)


def test_a_changed_adapter_is_computed_anew_where_it_is_live(tmp_path: Path) -> None:
    fns, _ = counted(NAMES)
    merge(tiny.peft_model("llama"), NAMES, fns, tmp_path)
    model = tiny.peft_model("llama")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.en" in n)[0, 0] += 0.01
    fns, calls = counted(NAMES)
    result = merge(model, NAMES, fns, tmp_path)
    # L = 5 layers; zh is in 4 of them, en alone in "outside". Per task: base, two alone, merged
    # before the repair, 2L states alone and 2L merged ("outside" merged is en's alone), export.
    total = {"zh": 1 + 2 + 1 + 2 * 4 + 2 * 5 + 1, "en": 1 + 2 + 1 + 2 * 5 + (2 * 5 - 1) + 1}
    # Known: the base and zh alone on both tasks, and what the analysis of zh asks of it alone.
    known = {"zh": 1 + 1 + 2 * 4, "en": 1 + 1}
    merged = {name: calls[name] - (total[name] - known[name]) for name in NAMES}
    assert set(merged.values()) <= {0, 1}  # the merged state, if any layer was edited
    assert facts(result) == facts(_fresh(model, fns))


def _fresh(model: PeftModel, fns: Mapping[str, Any]) -> MergeResult:
    model.delete_adapter("merged")
    return merge(model, NAMES, fns, None)


def test_a_third_adapter_finds_the_scores_of_the_two(tmp_path: Path) -> None:
    names = [*NAMES, "math"]
    fns, calls = counted(names)
    merge(tiny.peft_model("llama"), NAMES, fns, tmp_path)  # math is a guard task here
    calls.clear()
    result = merge(tiny.peft_model("llama", 3), names, fns, tmp_path)
    found = calls.copy()
    calls.clear()
    want = merge(tiny.peft_model("llama", 3), names, fns, None)
    assert facts(result) == facts(want)
    # base, both alone; their own analysis alone, 2 states per layer they are in; and, asked of
    # zh's task, the layer "outside", where only en is
    saved = {name: calls[name] - found[name] for name in names}
    assert saved == {"zh": 3 + 2 * 4 + 1, "en": 3 + 2 * 5, "math": 3}


def test_another_metric_is_another_score(tmp_path: Path) -> None:
    inner, calls = counted(NAMES)

    def both(name: str) -> Any:
        def fn(model: Any) -> Any:
            score = inner[name](model)
            return {"up": score, "down": -score}

        fn.fingerprint = name  # type: ignore[attr-defined]
        return fn

    fns = {name: both(name) for name in NAMES}
    up = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path, metric="up")
    before = calls.total()
    down = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path, metric="down")
    assert calls.total() > before
    assert down.scores["base"]["zh"] == -up.scores["base"]["zh"]
    assert down.states["base"]["zh"].metrics["up"] == up.scores["base"]["zh"]


def test_another_base_model_is_foreign(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    fns, calls = counted(NAMES)
    first = merge(tiny.peft_model("llama"), NAMES, fns, file)
    model = tiny.peft_model("llama")
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight[5, 5] += 1.0
    calls.clear()
    second = merge(model, NAMES, fns, file)
    assert calls.total() == second.scores_computed > 0
    assert second.scores["base"] != first.scores["base"]
    assert aside(tmp_path, "foreign") == ["j.jsonl.foreign-1"]


def test_a_merge_that_is_refused_leaves_no_journal(tmp_path: Path) -> None:
    fns, _ = counted(NAMES)
    with pytest.raises(ConfigError):
        merge(tiny.peft_model("llama"), ["zh"], {"en": fns["en"]}, tmp_path / "j.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_closes_its_journal(tmp_path: Path) -> None:
    fns, calls = counted(NAMES)
    good = fns["en"]

    def bad(model: Any) -> Any:
        if calls["en"] == 4:
            raise ValueError("out of luck")
        return good(model)

    bad.fingerprint = good.fingerprint  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="out of luck"):
        merge(tiny.peft_model("llama"), NAMES, {**fns, "en": bad}, tmp_path)
    computed = calls.total()
    assert computed == calls["zh"] + 4
    result = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path)
    whole = merge(tiny.peft_model("llama"), NAMES, fns, None)
    assert computed + result.scores_computed == whole.scores_computed
    assert facts(result) == facts(whole)


@pytest.mark.parametrize("target", ["own", "merged"])
def test_a_search_by_optuna_goes_on_where_it_stopped(tmp_path: Path, target: str) -> None:
    options: dict[str, Any] = {
        **{"density": "search", "scale": "search", "search": "optuna", "search_budget": 12},
        **{"search_target": target, "accept": "no_regression"},
    }
    fns, calls = counted(NAMES)
    whole = merge(tiny.peft_model("llama"), NAMES, fns, None, **options)
    searched = [t for t in whole.search if t.adapter == "en"]
    assert len(searched) == 12 + 6 * (target == "merged")  # both scaled together first
    assert whole.plan.adapters["en"] == max(searched, key=lambda t: t.value).edit
    calls.clear()
    good = fns["en"]

    def bad(model: Any) -> Any:
        if calls["en"] == 9:
            raise ValueError("out of luck")
        return good(model)

    bad.fingerprint = good.fingerprint  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="out of luck"):
        merge(tiny.peft_model("llama"), NAMES, {**fns, "en": bad}, tmp_path, **options)
    computed = calls.total()
    result = merge(tiny.peft_model("llama"), NAMES, fns, tmp_path, **options)
    assert computed + result.scores_computed == whole.scores_computed == calls.total()
    assert facts(result) == facts(whole)


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import tiny
from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge import randomness

folder, NAMES = Path(sys.argv[2]), ["zh", "en"]
CALLS = folder / "calls"
CONFIG = HiMergeConfig(variant="paper", search="coarse", reanalyze="each", accept="no_regression",
                       max_export_drop=None, density="search", scale=0.9)

def noisy(name):
    plain = tiny.eval_fns("llama", [name])[name]
    def fn(model):
        with CALLS.open("a") as file:
            file.write(f"{os.getpid()} {name}\\n")
        time.sleep(0.004)
        noise = float(torch.rand(())) + random.random() + np.random.rand()
        return plain(model) + 1e-3 * noise
    return fn

def child(journal, out, seed):
    pid = os.fork()
    if pid:
        return pid
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    if journal is None:  # start as the first of the killed runs did
        first = json.loads((folder / "j.jsonl").read_text().splitlines()[0])
        randomness.install(first["record"]["random_state"])
    fns = {name: noisy(name) for name in NAMES}
    result = merge_adapters_hi(tiny.peft_model("llama", 2), NAMES, fns, config=CONFIG,
                               journal=journal)
    told = result.to_dict()
    told["computed"] = told.pop("cost")["scores"]
    told["examples"] = repr([[s.examples.tolist() for s in row.values()]
                             for row in result.states.values()])
    out.write_text(json.dumps(told))
    os._exit(0)

def calls():
    return len(CALLS.read_text().splitlines()) if CALLS.exists() else 0

random.seed(1)
kills, seed = 0, 0
journal, out = folder / "j.jsonl", folder / "out.json"
for _ in range(6):
    seed += 1
    at, moment = calls() + random.randint(1, 16), random.random() * 0.01
    pid = child(journal, out, seed)
    while calls() < at and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert os.waitpid(child(journal, out, 99), 0)[1] == 0
ended = json.loads(out.read_text())
resumed = calls()
assert os.waitpid(child(None, folder / "plain.json", 100), 0)[1] == 0
plain = json.loads((folder / "plain.json").read_text())
print(json.dumps({"kills": kills, "resumed": resumed, "last": ended.pop("computed"),
                  "whole": plain.pop("computed"), "same": ended == plain,
                  "files": sorted(p.name for p in folder.iterdir())}))
"""


def test_killed_at_any_moment_and_run_again_no_score_is_computed_twice(tmp_path: Path) -> None:
    here = Path(__file__).parent
    told = run_python(KILLED, here, tmp_path, PYTHONWARNINGS="ignore")
    found = json.loads(told.splitlines()[-1])
    assert found["kills"] >= 3
    assert 0 < found["last"] < found["whole"]
    # A kill costs at most the score in flight, which is begun once more.
    assert found["whole"] <= found["resumed"] <= found["whole"] + found["kills"]
    # The eval functions draw random numbers and every run was seeded otherwise.
    assert found["same"]
    assert found["files"] == ["calls", "j.jsonl", "out.json", "plain.json"]


def test_random_states_of_gpus_are_kept_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)]
    before = [state.tolist() for state in gpus]

    def put(states: list[torch.Tensor]) -> None:
        gpus[:] = states

    def put_current(state: torch.Tensor) -> None:
        gpus[0] = state

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_rng_state_all", lambda: [state.clone() for state in gpus])
    monkeypatch.setattr(cuda, "set_rng_state_all", put)
    monkeypatch.setattr(cuda, "get_rng_state", lambda: gpus[0].clone())
    monkeypatch.setattr(cuda, "set_rng_state", put_current)
    kept, told = randomness.states(), json.loads(json.dumps(randomness.capture()))
    drawn = float(torch.rand(()))
    gpus[:] = [state + 1 for state in gpus]
    randomness.put_back(kept)
    assert [state.tolist() for state in gpus] == before
    assert float(torch.rand(())) == drawn
    gpus[:] = [state + 1 for state in gpus]
    randomness.install(told)
    assert gpus[0].tolist() == before[0]  # the one in use; the others draw nothing
    assert float(torch.rand(())) == drawn
    with monkeypatch.context() as forked:  # after the parent used a GPU
        forked.setattr(cuda, "_is_in_bad_fork", lambda: True)
        assert randomness.states()[3] == []
        assert randomness.capture()["cuda"] is None
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    gpus[0] = gpus[0] + 1
    randomness.install(told)  # a journal of a machine with a GPU
    assert gpus[0].tolist() != before[0]
