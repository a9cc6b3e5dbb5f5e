"""Train the adapters that a benchmark merges, one per task, and one per mix of tasks.

    python examples/bench/train.py --base BASE --data DATA --out ADAPTERS sst2 e2e trec+thucnews

Each gets a folder below ADAPTERS with its settings and loss in training.json; one that has been
trained stays. `himerge bench` takes that folder, and a mix serves as the reference of its setting.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from peft_himerge.bench.train import SETTINGS, train_tasks

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="+", help="tasks, or mixes as a+b")
    parser.add_argument("--base", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="per task")
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    args = parser.parse_args()
    chosen = replace(SETTINGS, steps=args.steps, seed=args.seed)
    for name in args.tasks:
        if not (args.out / name / "training.json").is_file():
            train_tasks(args.base, args.data, name.split("+"), args.out, settings=chosen)
