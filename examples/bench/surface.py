"""What density and scale do to a single adapter on its own task. Writes surface.json.

    python examples/bench/surface.py --base BASE --adapters ADAPTERS --data DATA trec thucnews

Nothing is merged here: it is the ground that the model-wise step (paper, section 3.2) searches.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch

from peft_himerge import HiMergeConfig
from peft_himerge.adapters import read_adapters
from peft_himerge.bench.tasks import load_tasks
from peft_himerge.combine import Combiner
from peft_himerge.folders import load_peft_model
from peft_himerge.hi import score_plans
from peft_himerge.plan import Edit
from peft_himerge.result import versions

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SCALES = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)


def main() -> None:
    """Score every point on validation rows, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="+", help="tasks, named like their adapters")
    parser.add_argument("--base", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--rows", type=int, default=256, help="validation rows per task")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("surface.json"))
    args = parser.parse_args()
    start = time.perf_counter()
    folders = {name: args.adapters / name for name in args.tasks}
    model, tokenizer = load_peft_model(args.base, folders, dtype=getattr(torch, args.dtype))
    tasks = load_tasks(
        args.data,
        args.tasks,
        tokenizer,
        rows=args.rows,
        test_rows=1,
        guide="measure",
        batch_size=args.batch_size,
        seed=args.seed,
    )
    surfaces = {}
    for name, task in tasks.items():
        combiner = Combiner(read_adapters(model, [name]))
        points = list(product(DENSITIES, SCALES))
        plans = {f"{p} {s}": combiner.plan({name: Edit(density=p, scale=s)}) for p, s in points}
        config = HiMergeConfig(metric={name: task.measure})
        found = score_plans(model, [name], plans, {name: task.validation}, config=config)
        surfaces[name] = [
            {"density": p, "scale": s, "score": score.value, "se": score.se}
            for (p, s), score in zip(points, (row[name] for row in found.values()), strict=True)
        ]
    told = {
        "rows": args.rows,
        "dtype": args.dtype,
        "seed": args.seed,
        "surfaces": surfaces,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
