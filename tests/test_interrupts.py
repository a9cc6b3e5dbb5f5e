"""Ctrl-C, once and twice, at any moment: the model comes back, the journal keeps what is known."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch
from paper import paper
from peft import PeftModel
from snapshot import moved, snapshot

import peft_himerge
from peft_himerge import merge_adapters, merge_adapters_hi
from peft_himerge.interrupts import heard, held
from peft_himerge.outputs import owning

ROOT = str(Path(peft_himerge.__file__).parent)
NAMES = ["zh", "en"]


def press() -> None:
    signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------------------- what waits


def stopped_by(body: Callable[[], None], error: type[BaseException] = KeyboardInterrupt) -> None:
    """Assert that `body`, held, ends with `error`, and that Python's own handler is back."""

    def run() -> None:
        with held():
            body()

    with pytest.raises(error):
        run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_waits_in_held_until_something_is_heard() -> None:
    seen = []

    def body() -> None:
        press()
        seen.append("held")
        with heard():
            seen.append("never")

    stopped_by(body)
    assert seen == ["held"]


def test_it_ends_what_is_heard_at_once_and_a_second_one_changes_nothing() -> None:
    seen = []

    def body() -> None:
        try:
            with heard():
                press()
                seen.append("never")
        finally:
            press()
            seen.append("cleaned up")

    stopped_by(body)
    assert seen == ["cleaned up"]


def test_one_that_nothing_heard_is_raised_at_the_end() -> None:
    seen = []

    def body() -> None:
        with held():  # the outer one decides
            press()
        seen.append("done")

    stopped_by(body)
    assert seen == ["done"]

    def failing() -> None:
        press()
        raise ValueError

    stopped_by(failing, ValueError)


def test_who_insists_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen = []

    def body() -> None:
        for seconds in (0.0, 5.0, 11.0, 12.0):
            now[0] = seconds
            seen.append(seconds)
            press()

    stopped_by(body)
    assert seen == [0.0, 5.0, 11.0]


def test_a_handler_of_the_users_own_and_other_threads_are_left_alone() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        with held(), heard():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert got == [signal.SIGINT]

    def other() -> None:
        with held(), heard():
            got.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert got[-1] is True


# ------------------------------------------------------------------------------- the model, always


class Pressing:
    """Presses Ctrl-C before chosen lines of the package, counted from 1."""

    def __init__(self, *lines: int) -> None:
        self.lines, self.count = set(lines), 0

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            self.count += 1
            if self.count in self.lines:
                press()
        return self

    def during(self, body: Callable[[], Any]) -> bool:
        """Run `body`; return whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            body()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def merged(model: PeftModel) -> None:
    config = paper(density=0.4, scale=0.9, rank=3, max_export_drop=None)
    merge_adapters_hi(model, NAMES, small_evals(), config=config)


def by_soup(model: PeftModel) -> None:
    merge_adapters(model, NAMES, "greedy_soup", eval_fns=small_evals())


def by_ties(model: PeftModel) -> None:
    merge_adapters(model, NAMES, "ties", density=0.5)


def small_evals() -> dict[str, Callable[[Any], float]]:
    def of(token: int) -> Callable[[Any], float]:
        @torch.no_grad()
        def score(model: Any) -> float:
            return float(model(input_ids=torch.tensor([[1, 2, token]])).logits[..., 5].mean())

        return score

    return {name: of(3 + place) for place, name in enumerate(NAMES)}


@pytest.mark.parametrize("merge", [merged, by_soup, by_ties])
def test_at_any_line_the_model_comes_back(merge: Callable[[PeftModel], None]) -> None:
    draw = random.Random(merge.__name__)
    model = tiny.peft_model("llama", 2, torch.float32)
    model.set_adapter("en")
    merge(model)
    model.delete_adapter("merged")
    before = snapshot(model)
    count = Pressing()
    assert count.during(lambda: merge(model)) is False
    model.delete_adapter("merged")
    assert moved(before, snapshot(model)) == []
    stopped = 0
    late = [count.count - back for back in (0, 1, 2, 5, 10, 20, 40, 80, 160)]
    for line in [*(draw.randint(1, count.count) for _ in range(16)), *late]:
        second = line + draw.randint(1, 60)
        if Pressing(line, second).during(lambda: merge(model)):
            stopped += 1
        if "merged" in model.peft_config:  # it was done when Ctrl-C came
            model.delete_adapter("merged")
        assert moved(before, snapshot(model)) == [], (line, second, count.count)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stopped >= 16


def test_the_journal_keeps_the_scores_before_it(tmp_path: Path) -> None:
    calls: list[str] = []
    config = paper(density=0.4, scale=0.9, rank=3, max_export_drop=None)
    model = tiny.peft_model("llama", 2, torch.float32)

    def run(stop: int | None, journal: Path | None) -> int:
        calls.clear()

        def of(name: str) -> Callable[[Any], float]:
            inner = small_evals()[name]

            def score(model: Any) -> float:
                calls.append(name)
                if len(calls) == stop:
                    press()
                return inner(model)

            score.fingerprint = name  # type: ignore[attr-defined]
            return score

        fns = {name: of(name) for name in NAMES}
        try:
            merge_adapters_hi(model, NAMES, fns, config=config, journal=journal)
            model.delete_adapter("merged")
        except KeyboardInterrupt:
            assert len(calls) == stop
        return len(calls)

    whole = run(None, None)
    assert run(9, tmp_path / "scores.jsonl") == 9
    assert run(None, tmp_path / "scores.jsonl") == whole - 8  # the ninth was in flight


def test_nothing_is_written_half(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    result = merge_adapters(model, NAMES, "ties", density=0.5)
    count = Pressing()
    count.during(lambda: result.save(tmp_path / "count"))
    want = {p.name for p in (tmp_path / "count").iterdir()}
    for line in range(1, count.count + 1, max(1, count.count // 40)):
        out = tmp_path / str(line)
        Pressing(line, line + 7).during(lambda out=out: result.save(out))
        if out.exists():
            names = {p.name for p in out.iterdir()}
            assert "adapter_config.json" not in names or names - {".himerge.lock"} == want
        with owning(out):  # what was declared ready is moved
            pass
        assert not out.exists() or {p.name for p in out.iterdir()} == want, line


# -------------------------------------------------------------------------------- the command line

EVALS = """
import os, pathlib, time
def eval_fns(tokenizer):
    def fn(model):
        with open({calls!r}, "a") as file:
            file.write("x")
        time.sleep(0.2)
        return 0.5
    fn.fingerprint = "fixed"
    return {{"zh": fn, "en": fn}}
"""


@pytest.mark.parametrize("times", [1, 2])
def test_the_command_says_so_and_ends_with_130(times: int, tmp_path: Path) -> None:
    import workshop

    workshop.causal(tmp_path, NAMES)
    calls, out, journal = tmp_path / "calls", tmp_path / "out", tmp_path / "scores.jsonl"
    (tmp_path / "evals.py").write_text(EVALS.format(calls=str(calls)), encoding="utf-8")
    command = [sys.executable, "-m", "peft_himerge", "merge", "--out", str(out)]
    command += ["--base", str(tmp_path / "models" / "base"), "--eval", str(tmp_path / "evals.py")]
    command += ["--journal", str(journal), "--set", "density=0.5", "--set", "scale=1"]
    for name in NAMES:
        command += ["--adapter", f"{name}={tmp_path / 'adapters' / name}"]
    env = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as running:
        end = time.monotonic() + 120
        while not calls.exists() or calls.stat().st_size < 3:
            assert running.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        for _ in range(times):
            running.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "stopped by Ctrl-C" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert journal.read_text(encoding="utf-8").count("\n") >= 3  # the header, and two scores
