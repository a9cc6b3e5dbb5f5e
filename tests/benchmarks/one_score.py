"""One score against the paper's workflow: mergekit writes a checkpoint, it is loaded, then scored.

Run: ``python tests/benchmarks/one_score.py --mergekit DIR``, where DIR is a virtual environment
with ``pip install mergekit==0.1.5 torch==2.13.0``; without it the row is left out.

mergekit gets what is cheapest for it: both tasks' checkpoints exist already, the method is
task_arithmetic (nothing is pruned), and it stands for the state that costs it as much as any.
Ours is the mean over states of a contribution analysis of the pruned adapters: every third layer,
each with all its states, through the engine, putting states in place included. That the two ways
score the same model is checked on the unpruned state.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import demo_model, options, plan_of, stopwatch
from _report import write_row
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_himerge.contribution import states
from peft_himerge.demo import adapter_dirs, load_base, load_tasks
from peft_himerge.engine import Engine
from peft_himerge.evals import multiple_choice
from peft_himerge.probe import Probe
from peft_himerge.scoring import Task

CHEAPER, SCALE, DENSITY = 15, 0.9, 0.5
METRIC = "log_likelihood"


def write_checkpoints(root: Path) -> None:
    """Write the base model and every task's model in full."""
    base, tokenizer = load_base()
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, folder in adapter_dirs().items():
        merged = PeftModel.from_pretrained(load_base()[0], str(folder)).merge_and_unload()
        merged.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    models = [
        {"model": str(root / name), "parameters": {"weight": SCALE}} for name in adapter_dirs()
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": models,
        "dtype": "float32",
    }
    (root / "recipe.yml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def merge_with_mergekit(program: Path, root: Path, threads: int | None) -> tuple[float, float]:
    """Return wall and CPU seconds of one run of mergekit, its start included."""
    number = str(threads or torch.get_num_threads())
    before = os.times()
    with stopwatch() as took:
        subprocess.run(
            [program, root / "recipe.yml", root / "out"],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": number},
        )
    after = os.times()
    cpu = after.children_user + after.children_system
    return took.wall, cpu - before.children_user - before.children_system


def main() -> None:
    """Run both ways, print and write the row."""
    parser = options(__doc__)
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit 0.1.5")
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 64])
    chosen = parser.parse_args()
    program = (chosen.mergekit or Path()).absolute() / "bin" / "mergekit-yaml"
    if chosen.mergekit is None or not program.is_file():
        print("one_score: left out, no mergekit at --mergekit (see the top of one_score.py)")
        return
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    tasks: dict[int, dict[str, Task]] = {}
    theirs: dict[tuple[int, str], tuple[float, float]] = {}
    results: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_checkpoints(root)
        written = merge_with_mergekit(program, root, chosen.threads)
        with stopwatch() as loaded:
            merged: Any = AutoModelForCausalLM.from_pretrained(
                root / "out", dtype=torch.float32, local_files_only=True
            ).to(chosen.device)
            merged.eval()
        model, tokenizer = demo_model(chosen.device)
        for number in chosen.examples:
            tasks[number] = {
                name: Task(
                    name,
                    multiple_choice(splits.validation, tokenizer, batch_size=64, max_rows=number),
                    METRIC,
                )
                for name, splits in load_tasks().items()
            }
            for name, task in tasks[number].items():
                with stopwatch() as took:
                    found = task.fn(merged)[METRIC]
                results[number, name] = float(found.mean())
                theirs[number, name] = (took.wall, took.cpu)
        del merged
    print("mergekit", written, "load", loaded, "eval", theirs, flush=True)
    values: dict[str, Any] = {
        "mergekit_seconds": round(written[0], 2),
        "mergekit_cpu_seconds": round(written[1], 2),
        "load_seconds": round(loaded.wall, 2),
    }
    for number in chosen.examples:
        evals = [theirs[number, name] for name in tasks[number]]
        eval_wall, eval_cpu = (sum(e[i] for e in evals) / len(evals) for i in (0, 1))
        ours = our_score(model, tasks[number], {n: results[number, n] for n in tasks[number]})
        workflow = written[0] + loaded.wall + eval_wall
        workflow_cpu = written[1] + loaded.cpu + eval_cpu
        values[f"examples_{number}"] = {
            "ratio": round(workflow / ours["seconds"], 1),
            "ratio_cpu": round(workflow_cpu / ours["cpu_seconds"], 1),
            "workflow_seconds": round(workflow, 2),
            "workflow_eval_seconds": round(eval_wall, 2),
            **ours,
        }
        print(number, json.dumps(values[f"examples_{number}"]), flush=True)
    reached = all(values[f"examples_{n}"]["ratio"] >= CHEAPER for n in chosen.examples)
    print("one_score", json.dumps(values), "reached" if reached else "NOT reached")
    if not chosen.no_write:
        target = f"at least {CHEAPER} times cheaper than writing, loading and scoring a checkpoint"
        write_row("one_score", values, target=target, reached=reached)


def our_score(model: Any, tasks: dict[str, Task], want: dict[str, float]) -> dict[str, float]:
    """Return the mean seconds of a score, and how far the unpruned one is from mergekit's."""
    combiner, whole = plan_of(model, 1.0, SCALE)
    with Probe(model, combiner) as probe:
        engine = Engine(probe, tasks, lambda _: None)
        apart = max(abs(engine.score(name, whole).value - want[name]) for name in tasks)
    combiner, plan = plan_of(model, DENSITY, SCALE)
    labels = [layer.label for layer in combiner.layers][1::3]
    requests = [request for name in tasks for request in states(name, plan, labels)]
    with Probe(model, combiner, cache_bytes=2 * 10**9) as probe:
        engine = Engine(probe, tasks, lambda _: None)
        with stopwatch() as took:
            engine.score_many(requests)
    return {
        "seconds": round(took.wall / engine.done, 3),
        "cpu_seconds": round(took.cpu / engine.done, 3),
        "scores": engine.done,
        "distance_of_unpruned_score": apart,
    }


if __name__ == "__main__":
    main()
