"""What the rank of the exported adapter costs: a cell's plan, exported anew. Writes ranks.json.

    python examples/bench/ranks.py --base BASE --adapters ADAPTERS --data DATA trec+thucnews

Reads the plan that Hi-Merging found from cells/merges/<setting>/hi_joint.json, so it needs the
adapters of that run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from peft_himerge import HiMergeConfig, MergePlan, apply_plan
from peft_himerge.adapters import read_adapters
from peft_himerge.bench.tasks import load_tasks
from peft_himerge.combine import Combiner
from peft_himerge.folders import load_peft_model
from peft_himerge.hi import score_plans
from peft_himerge.plan import IDENTITY
from peft_himerge.result import versions

RANKS = (4, 8, 16, 32, 64, "exact")
EXPORTED = "exported"


def score_rank(model: Any, plan: MergePlan, rank: int | str, tasks: Any) -> dict[str, Any]:
    """Export `plan` with one rank, score that adapter on the test rows, and take it out again."""
    made = apply_plan(model, plan, adapter_name=EXPORTED, rank=rank)
    try:
        whole = Combiner(read_adapters(model, [EXPORTED])).plan({EXPORTED: IDENTITY})
        tests = {name: task.test for name, task in tasks.items()}
        config = HiMergeConfig(metric={name: task.measure for name, task in tasks.items()})
        found = score_plans(model, [EXPORTED], {"it": whole}, tests, config=config)["it"]
    finally:
        model.delete_adapter(EXPORTED)
    test = {name: {"value": score.value, "se": score.se} for name, score in found.items()}
    return {"asked": rank, "rank": made.rank, "export_error": made.export_error, "test": test}


def main() -> None:
    """Export and score setting by setting, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", nargs="+", help="settings of the benchmark, as a+b")
    parser.add_argument("--base", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--cells", type=Path, default=Path(__file__).with_name("cells"))
    parser.add_argument("--contender", default="hi_joint", help="whose plans; none that focuses")
    parser.add_argument("--test-rows", type=int, default=200, help="test rows per task")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ranks.json"))
    args = parser.parse_args()
    start = time.perf_counter()
    names = sorted({name for setting in args.settings for name in setting.split("+")})
    folders = {name: args.adapters / name for name in names}
    model, tokenizer = load_peft_model(args.base, folders, dtype=getattr(torch, args.dtype))
    sizes = {"rows": 1, "test_rows": args.test_rows, "batch_size": args.batch_size}
    tasks = load_tasks(args.data, names, tokenizer, **sizes)
    found = {}
    for setting in args.settings:
        cell = args.cells / "merges" / setting / f"{args.contender}.json"
        plan = MergePlan.from_dict(json.loads(cell.read_text(encoding="utf-8"))["chosen"]["plan"])
        own = {name: tasks[name] for name in setting.split("+")}
        found[setting] = [score_rank(model, plan, rank, own) for rank in RANKS]
    told = {
        "contender": args.contender,
        "test_rows": args.test_rows,
        "dtype": args.dtype,
        "settings": found,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
