"""Contribution analysis of Gemma-3-270M with the demo's adapters, sharing on against off.

Run: ``python tests/benchmarks/analysis.py`` (``--examples 16`` for a quick look). Both
ways go through the same engine and the same order of states; only `prefix_cache_gb` differs. The
two ways take turns task by task, so that other load on the machine hits both. Block-forwards are
counted by the memo that skips them; the distinct edges are counted here, from the plans alone.
Embedding and output layer (262144 tokens wide) run in every score and cannot be shared.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from _measure import demo_model, options, plan_of, stopwatch
from _report import write_row

from peft_himerge.blocks import find_blocks
from peft_himerge.combine import Combiner
from peft_himerge.contribution import states
from peft_himerge.demo import load_tasks
from peft_himerge.engine import Engine
from peft_himerge.evals import multiple_choice
from peft_himerge.plan import MergePlan
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

EDGES, TIME = 1.02, 0.65
CACHE_BYTES = 2 * 10**9


def tree(model: Any, combiner: Combiner, task: str, plan: MergePlan) -> tuple[int, int]:
    """Return (distinct edges, naive block-forwards) of the states of one task."""
    labels = [layer.label for layer in combiner.layers]
    blocks = list(find_blocks(model.base_model.model, labels))
    inside = {b: [m for m in combiner.modules if m.startswith(f"{b}.")] for b in blocks}
    wanted = {state.fingerprint: state for _, state in states(task, plan, labels)}
    edges = set()
    for state in wanted.values():
        path: tuple[object, ...] = ()
        for modules in inside.values():
            path = (*path, tuple(combiner.terms(state, module) for module in modules))
            edges.add(path)
    return len(edges), len(blocks) * len(wanted)


def main() -> None:
    """Analyse every task both ways, print and write the row."""
    parser = options(__doc__)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.5)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    model, tokenizer = demo_model(chosen.device)
    combiner, plan = plan_of(model, chosen.density, 0.9)
    labels = [layer.label for layer in combiner.layers]
    tasks = {
        name: Task(
            name,
            multiple_choice(splits.validation, tokenizer, batch_size=64, max_rows=chosen.examples),
            "log_likelihood",
        )
        for name, splits in load_tasks().items()
    }

    def analyse(task: str, cache_bytes: int) -> tuple[list[Any], Any, float, float]:
        probe = Probe(model, combiner, cache_bytes=cache_bytes)
        with probe, stopwatch() as took:
            scores = Engine(probe, tasks, lambda _: None).score_many(states(task, plan, labels))
        rows = [s.examples.tolist() if s.examples is not None else s.value for s in scores]
        return rows, probe.blocks, took.wall, took.cpu

    wall, cpu = {"on": 0.0, "off": 0.0}, {"on": 0.0, "off": 0.0}
    run = skipped = edges = naive = scored = 0
    equal = True
    for turn, task in enumerate(tasks):
        found = {}
        for way in ("on", "off") if turn % 2 else ("off", "on"):
            rows, memo, seconds, cpu_seconds = analyse(task, CACHE_BYTES if way == "on" else 0)
            found[way] = rows
            wall[way] += seconds
            cpu[way] += cpu_seconds
            if way == "on":
                run, skipped = run + memo.run, skipped + memo.skipped
            print(task, way, round(seconds, 1), round(cpu_seconds, 1), flush=True)
        equal = equal and found["on"] == found["off"]
        scored += len(found["on"])
        more = tree(model, combiner, task, plan)
        edges, naive = edges + more[0], naive + more[1]
    assert run + skipped == naive
    values = {
        "block_forwards": run,
        "distinct_edges": edges,
        "naive_block_forwards": naive,
        "block_forwards_per_edge": round(run / edges, 4),
        "block_forwards_share": round(run / naive, 4),
        "time_share": round(wall["on"] / wall["off"], 3),
        "cpu_share": round(cpu["on"] / cpu["off"], 3),
        "seconds": round(wall["on"], 1),
        "seconds_without_sharing": round(wall["off"], 1),
        "scores": scored,
        "examples": chosen.examples,
        "density": chosen.density,
        "equal_bits": equal,
    }
    slowest = max(values["time_share"], values["cpu_share"])  # wall alone moves with other load
    reached = run <= EDGES * edges and slowest <= TIME and equal
    print("contribution_analysis", json.dumps(values), "reached" if reached else "NOT reached")
    if not chosen.no_write:
        target = f"at most {EDGES:g} x distinct edges, at most {TIME:g} of the time, equal bits"
        write_row("contribution_analysis", values, target=target, reached=reached)


if __name__ == "__main__":
    main()
