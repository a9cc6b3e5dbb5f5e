"""Several processes make one merge: the same bits for any number, and one that fails ends all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import paper
from snapshot import run_python
from test_identity import offload

from peft_himerge import merge_adapters_hi
from peft_himerge.engine import _pieces
from peft_himerge.errors import ConfigError
from peft_himerge.identity import base_digest
from peft_himerge.processes import Team, own_device, together

# One process that forks the others, so that the imports are paid for once. A scenario is a number
# of processes and what goes wrong; every process writes what it saw to a file of its own.
TEAMS = """
import json, os, random, sys, time
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import tiny
import torch.distributed as dist
from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.events import StateScored
import peft_himerge.engine as engine

folder, NAMES = Path(sys.argv[2]), ["zh", "en"]
SEARCH = {"density": "search", "scale": 0.9, "reanalyze": "each", "accept": "no_regression"}
FIXED = {"density": 0.4, "scale": 0.9}
OPTUNA = {"search": "optuna", "search_budget": 10}
FOCUSED = {"variant": "focused", "scale": 0.9}

def one(name, size, rank, wrong):
    torch.manual_seed(rank); random.seed(rank); np.random.seed(rank)
    calls, events = [], []
    def fn_of(task):
        plain = tiny.eval_fns("llama", [task])[task]
        def fn(model):
            calls.append(task)
            if wrong == "eval" and rank == size - 1 and len(calls) == 9:
                raise ValueError("no such row")
            if wrong == "dies" and rank == size - 1 and len(calls) == 9:
                os._exit(7)
            if wrong == "slow":
                time.sleep(0.003)
            noise = float(torch.rand(())) + random.random() + np.random.rand()
            return plain(model) + 1e-3 * noise
        fn.fingerprint = task
        return fn
    def listen(event):
        events.append(type(event).__name__)
        if wrong == "listener" and events[-1] == "ContributionsMeasured":
            raise OSError("no one listens")
    model = tiny.peft_model("llama", 2)
    names = NAMES
    if wrong == "weights" and rank == 1:
        with torch.no_grad():
            model.base_model.model.model.norm.weight[0] += 1e-6
    if wrong == "arguments" and rank == 1:
        names = ["zh"]
    if wrong == "slow":
        engine._EXCHANGE_SECONDS = 0.01 * (1 + rank)
    before = torch.get_rng_state(), random.getstate()
    options = {None: SEARCH, "optuna": OPTUNA, "focused": FOCUSED}.get(wrong, FIXED)
    config = HiMergeConfig(**{"variant": "paper", **options}, max_export_drop=None)
    fns = {name: fn_of(name) for name in names}
    journal = folder / f"{name}.jsonl" if wrong in (None, "slow") else None
    found = {"rank": rank}
    try:
        result = merge_adapters_hi(model, names, fns, config=config, callbacks=[listen],
                                   journal=journal)
    except Exception as exc:
        found["error"] = f"{type(exc).__name__}: {exc}"
        found["notes"] = getattr(exc, "__notes__", [])
    else:
        told = result.to_dict()
        found["computed"] = told.pop("cost")["scores"]
        found["result"] = told
        found["examples"] = repr([[s.examples.tolist() for s in row.values()]
                                  for row in result.states.values()])
        lora = [p for n, p in model.named_parameters() if ".merged." in n]
        found["adapter"] = repr([p.sum().item() for p in lora])
    found["calls"], found["events"] = len(calls), events
    found["rng kept"] = bool(torch.equal(before[0], torch.get_rng_state())
                             and before[1] == random.getstate())
    return found

def team(name, size, wrong):
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store",
                                        rank=rank, world_size=size)
            found = one(name, size, rank, wrong)
            (folder / f"{name}.{rank}").write_text(json.dumps(found))
            os._exit(0)
        pids.append(pid)
    ends, limit = {}, time.monotonic() + 90
    while len(ends) < size and time.monotonic() < limit:
        for pid in set(pids) - set(ends):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                ends[pid] = status
        time.sleep(0.01)
    hang = set(pids) - set(ends)
    for pid in hang:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    files = [folder / f"{name}.{rank}" for rank in range(size)]
    return {"hang": len(hang), "ranks": [json.loads(f.read_text()) for f in files if f.exists()]}

told = {}
for name, size, wrong in json.loads(sys.argv[3]):
    told[name] = team(name, size, wrong)
print(json.dumps(told))
"""

Told = dict[str, dict[str, Any]]


def run_teams(folder: Path, scenarios: list[tuple[str, int, str | None]]) -> Told:
    told = run_python(
        TEAMS,
        Path(__file__).parent,
        folder,
        json.dumps(scenarios),
        PYTHONWARNINGS="ignore",
        GLOO_SOCKET_IFNAME="lo",
    )
    found = json.loads(told.splitlines()[-1])
    assert {name: team["hang"] for name, team in found.items()} == dict.fromkeys(found, 0)
    return {name: {r["rank"]: r for r in team["ranks"]} for name, team in found.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("teams")
    plain: list[tuple[str, int, str | None]] = [("one", 1, None), ("two", 2, None)]
    plain += [("three", 3, None), ("one", 3, None)]
    plain += [("slow", 3, "slow"), ("alone", 1, "slow")]
    plain += [("search", 2, "optuna"), ("search alone", 1, "optuna")]
    return run_teams(folder, [*plain, ("focused", 2, "focused"), ("focused alone", 1, "focused")])


def results(team: Mapping[Any, Any]) -> list[Any]:
    return [{key: seen[key] for key in ("result", "examples", "adapter")} for seen in team.values()]


def test_any_number_of_processes_gives_the_same_bits(good: Told) -> None:
    # The eval functions draw random numbers and every process was seeded otherwise: what all have
    # in common is the state of process 0.
    want = results(good["two"])[0]
    assert results(good["two"]) == [want] * 2
    assert results(good["three"]) == [want] * 3
    assert want["result"]["contributions"]
    assert results(good["slow"]) == results(good["alone"]) * 3


def test_every_process_asks_optuna_for_the_same_points(good: Told) -> None:
    assert results(good["search"]) == results(good["search alone"]) * 2
    calls = {seen["calls"] for seen in good["search alone"].values()}
    assert {sum(seen["calls"] for seen in good["search"].values())} == calls


def test_every_process_merges_the_adapters_that_the_main_one_focused(good: Told) -> None:
    (want,) = results(good["focused alone"])
    assert results(good["focused"]) == [want, want]
    assert all(seen["rng kept"] for seen in good["focused"].values())
    assert want["result"]["options"]["focus"] is True


def test_the_work_is_split_and_nothing_is_done_twice(good: Told) -> None:
    whole = sum(seen["calls"] for seen in good["two"].values())
    for name in ("two", "three"):
        team = good[name]
        assert sum(seen["calls"] for seen in team.values()) == whole
        assert {seen["computed"] for seen in team.values()} == {whole}
        assert min(seen["calls"] for seen in team.values()) > whole / (2 * len(team))
    slow = good["slow"].values()
    assert sum(seen["calls"] for seen in slow) == good["alone"][0]["calls"]


def test_only_the_main_process_calls_listeners(good: Told) -> None:
    for name in ("two", "three", "slow"):
        for rank, seen in good[name].items():
            counts = Counter(seen["events"])
            if rank == 0:
                assert counts["StateScored"] == seen["computed"]
                assert counts["MergeStarted"] == counts["MergeFinished"] == 1
            else:
                assert not counts


def test_a_journal_of_one_process_serves_three(good: Told) -> None:
    # "one" ran alone first, then with three processes on the journal of the first run.
    team = good["one"]
    assert len(team) == 3
    assert {seen["calls"] for seen in team.values()} == {0}
    assert results(team) == [results(good["two"])[0]] * 3


def test_random_states_of_every_process_come_back(good: Told) -> None:
    assert all(seen["rng kept"] for team in good.values() for seen in team.values())


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("teams")
    kinds = ("eval", "listener", "weights", "arguments", "dies")
    return run_teams(folder, [(kind, 3 if kind == "eval" else 2, kind) for kind in kinds])


def test_an_eval_function_that_fails_on_one_process_ends_all_with_its_reason(bad: Told) -> None:
    team = bad["eval"]
    assert len(team) == 3
    assert team[2]["error"] == "ValueError: no such row"
    assert "on process 2 of 3" in team[2]["notes"]
    for rank in (0, 1):
        assert team[rank]["error"] == (
            "ProcessError: process 2 of 3 failed: ValueError: no such row"
        )


def test_a_listener_that_fails_ends_all(bad: Told) -> None:
    team = bad["listener"]
    assert team[0]["error"] == "OSError: no one listens"
    assert "process 0 of 2 failed: OSError: no one listens" in team[1]["error"]


def test_other_weights_on_one_process_are_refused(bad: Told) -> None:
    for seen in bad["weights"].values():
        assert "ProcessError: weights of the model and the adapters" in seen["error"]
        assert seen["calls"] == 0


def test_a_process_with_other_arguments_ends_all(bad: Told) -> None:
    assert all("ProcessError" in seen["error"] for seen in bad["arguments"].values())


def test_a_process_that_dies_ends_the_others(bad: Told) -> None:
    assert list(bad["dies"]) == [0]
    assert "ProcessError: another process of this merge ended" in bad["dies"][0]["error"]


# --------------------------------------------------------------------------------------- accelerate

LAUNCHED = """
import sys
sys.path.insert(0, sys.argv[1])
import json
import tiny
from pathlib import Path
from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.processes import is_main

calls = []
plain = tiny.eval_fns("llama", ["zh", "en"])
fns = {n: (lambda m, n=n: (calls.append(n), plain[n](m))[1]) for n in plain}
config = HiMergeConfig(variant="paper", density=0.4, scale=0.9, max_export_drop=None)
result = merge_adapters_hi(tiny.peft_model("llama", 2), list(fns), fns, config=config)
rank = 0 if is_main() else 1
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps({
    "calls": len(calls), "computed": result.scores_computed,
    "contributions": result.contributions.to_records(), "plan": result.plan.fingerprint}))
# As in test_callback: gloo's teardown at interpreter exit aborts now and then.
__import__("torch").distributed.barrier()
__import__("os")._exit(0)
"""


def test_accelerate_launch_splits_a_merge_that_knows_nothing_of_it(tmp_path: Path) -> None:
    script = tmp_path / "merge.py"
    script.write_text(LAUNCHED, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu means torchrun; without a GPU, accelerate's processes meet by gloo.
    options = {"multi_gpu": None, "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}
    options |= {"dynamo_backend": "no", "main_process_port": port}
    flags = [f"--{key}" if v is None else f"--{key}={v}" for key, v in options.items()]
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, script, here, tmp_path],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(here.parent),
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    names = ["zh", "en"]
    config = paper(density=0.4, scale=0.9, max_export_drop=None)
    want = merge_adapters_hi(
        tiny.peft_model("llama", 2), names, tiny.eval_fns("llama", names), config=config
    )
    assert main["calls"] + other["calls"] == want.scores_computed
    assert min(main["calls"], other["calls"]) > 0
    for seen in (main, other):
        assert seen["computed"] == want.scores_computed
        assert seen["plan"] == want.plan.fingerprint
        assert seen["contributions"] == want.contributions.to_records()


# ------------------------------------------------------------------------------------- one process


@given(
    st.lists(st.floats(0.0, 100.0), min_size=0, max_size=40),
    st.integers(min_value=1, max_value=9),
)
def test_pieces_are_contiguous_and_hold_everything_once(weights: list[float], size: int) -> None:
    pieces = _pieces([(weight, 1) for weight in weights], size)
    assert len(pieces) == size
    assert [index for piece in pieces for index in piece] == list(range(len(weights)))
    # No piece is heavier than its share by more than the two jobs at its ends.
    share, most = sum(weights) / size, max(weights, default=0.0)
    assert all(sum(weights[i] for i in piece) <= share + most + 1e-6 for piece in pieces)


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_one_process_is_a_team_of_one(mode: Any) -> None:
    with together(mode) as team:
        assert (team.rank, team.size, team.main) == (0, 1, True)
        assert team.exchange("anything", 5) == [5]
        assert team.first("anything", "same", 7) == 7


def test_an_exception_passes_through_a_team_of_one_untouched() -> None:
    with pytest.raises(KeyError) as caught, together("auto"):
        raise KeyError("x")
    assert getattr(caught.value, "__notes__", []) == []


def test_a_model_spread_over_processes_is_refused() -> None:
    model = tiny.tiny_llama()
    team = Team(0, 2)
    team.refuse_sharded(model)
    model.lm_head.weight.ds_id = 3
    with pytest.raises(ConfigError, match=r"lm_head.weight.* spread over processes"):
        team.refuse_sharded(model)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_merged_like_the_whole_one(where: str, tmp_path: Path) -> None:
    names = list(tiny.NAMES[:2])
    fns = tiny.eval_fns("llama", names)
    config = paper(density=0.4, scale=0.9, max_export_drop=None)
    want = merge_adapters_hi(tiny.peft_model("llama"), names, fns, config=config)
    model = tiny.peft_model("llama")
    offload(model, where, tmp_path)
    before = base_digest(model)
    got = merge_adapters_hi(model, names, fns, config=config)
    assert base_digest(model) == before
    assert got.scores_computed == want.scores_computed
    assert got.plan.fingerprint == want.plan.fingerprint
    for state, row in want.scores.items():
        assert got.scores[state] == pytest.approx(row, abs=1e-12)
    fresh = [p for n, p in model.named_parameters() if ".merged." in n]
    assert fresh
    assert not any(p.is_meta for p in fresh)
    assert sum(p.is_meta for p in model.parameters()) > 0
    torch.testing.assert_close(
        fresh, [p for n, p in want.model.named_parameters() if ".merged." in n]
    )


def test_a_model_goes_to_this_processs_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")  # more processes than GPUs share them
    assert own_device() == torch.device("cuda", 1)
