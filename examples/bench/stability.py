"""How many examples does the analysis need, and by which score? Writes stability.json.

    python examples/bench/stability.py --base BASE --adapters ADAPTERS --data DATA trec thucnews

Every state of the contribution analysis is scored on --rows validation rows, once; then it is
repeated on draws of 8, 16, 32, ... of them and compared with the rows that were not drawn.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from peft_himerge.bench.stability import compare, score_rows
from peft_himerge.bench.tasks import load_tasks
from peft_himerge.folders import load_peft_model
from peft_himerge.result import versions

METRICS = ("accuracy", "calibrated_probability", "probability", "log_likelihood")


def main() -> None:
    """Score, compare, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="+", help="multiple-choice tasks, named like their adapters")
    parser.add_argument("--base", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--rows", type=int, default=256, help="validation rows per task")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--draws", type=int, default=20, help="draws per size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("stability.json"))
    args = parser.parse_args()
    start = time.perf_counter()
    folders = {name: args.adapters / name for name in args.tasks}
    model, tokenizer = load_peft_model(args.base, folders, dtype=getattr(torch, args.dtype))
    sizes = {"rows": args.rows, "test_rows": 1, "batch_size": args.batch_size}
    tasks = load_tasks(args.data, args.tasks, tokenizer, **sizes)
    scored = score_rows(model, {n: t.validation for n, t in tasks.items()}, METRICS)
    sizes = [n for n in (8, 16, 32, 64, 128, 256, 512) if n <= args.rows // 2]
    found = {
        tolerance: [
            asdict(row)
            for row in compare(scored, sizes, draws=args.draws, tolerance=tolerance, seed=args.seed)
        ]
        for tolerance in (0.0, "2se")
    }
    told = {
        "setting": "+".join(args.tasks),
        "rows": args.rows,
        "draws": args.draws,
        "dtype": args.dtype,
        "seed": args.seed,
        "layers": len(scored.layers),
        "stability": found,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
