"""Merge two LoRA adapters into one, look at the layers that fight, save the result.

    python examples/01_merge_two_adapters.py

Everything is built here: a tiny model, two adapters that are trained for a few seconds on a task
of their own, and an eval function per task. With a model of your own, only the part between the
two lines differs: load it with PeftModel.from_pretrained and model.load_adapter.
"""

import argparse
from pathlib import Path

import torch
from tiny_tasks import TASKS, accuracy, base_model, score_of, train_adapter

from peft_himerge import HiMergeConfig, MergePlan, apply_plan, merge_adapters_hi


def main(out: Path) -> None:
    """Train two adapters, merge them, print what happened."""
    model = None
    for task in TASKS:
        model = train_adapter(model if model is not None else base_model(), task)
    # -----------------------------------------------------------------------------------------
    eval_fns = {task: score_of(task) for task in TASKS}  # per-example log-likelihoods
    config = HiMergeConfig(accept="no_regression", max_export_drop=None)
    result = merge_adapters_hi(model, list(TASKS), eval_fns, config=config)
    result.save(out)
    # -----------------------------------------------------------------------------------------

    print(f"{'state':12}" + "".join(f"{task:>12}" for task in TASKS))
    for state, row in result.scores.items():
        print(f"{state:12}" + "".join(f"{row[task]:12.3f}" for task in TASKS))
    print("\nlayers, worst first:")
    for resolution in result.conflicts:
        found = resolution.conflict
        print(f"  {found.layer:16} {found.kind.value:8} Gamma {found.Gamma:+.3f}")

    model.set_adapter("merged")
    print("\naccuracy of the merged adapter:")
    for task in TASKS:
        print(f"  {task}: {accuracy(model, task):.0%}")

    # The decision is a small file; it rebuilds the adapter without any scoring.
    plan = MergePlan.from_json(out / "plan.json")
    apply_plan(model, plan, adapter_name="again", rank=result.rank)
    print(f"\nsaved to {out}; plan {plan.fingerprint[:16]} rebuilds it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("merged-adapter"))
    torch.set_num_threads(1)
    main(parser.parse_args().out)
