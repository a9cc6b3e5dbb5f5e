"""Sweep density and scale with Optuna: no server, resumable, scores shared between trials.

    python examples/05_sweep_local.py

The sweep is a file in W&B's format (see recipes/sweep.yaml); from the command line the same is
`himerge sweep FILE --eval my_evals.py`. Run it twice: the second run goes on where the first one
stopped.
"""

import argparse
from pathlib import Path

import torch
from tiny_tasks import TASKS, base_model, score_of, train_adapter

from peft_himerge import MergePlan, apply_plan
from peft_himerge.sweep import merger, read_sweep, run_local

SWEEP = """
method: bayes
metric: {name: himerge/best_score, goal: maximize}
parameters:
  himerge.density: {min: 0.2, max: 1.0}
  himerge.scale: {min: 0.4, max: 1.0}
  himerge.partial_target: {values: [degrader, degraded]}
  himerge.accept: {value: no_regression}
  himerge.max_export_drop: {value: null}
"""


def main(out: Path, trials: int) -> None:
    """Train two adapters, sweep, rebuild the best merge."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "sweep.yaml"
    file.write_text(SWEEP, encoding="utf-8")
    model = None
    for task in TASKS:
        model = train_adapter(model if model is not None else base_model(), task)
    merge = merger(
        model,
        list(TASKS),
        {task: score_of(task, n=16) for task in TASKS},
        journal=out / "scores.jsonl",
    )

    def tell(number: int, score: float | None) -> None:
        print(f"trial {number}: " + ("pruned" if score is None else f"{score:.3f}"))

    found = run_local(read_sweep(file), merge, study=out / "study.db", trials=trials, on_trial=tell)
    print(f"best: {found.score:.3f} with {dict(found.values)}")
    for option, share in found.importances.items():
        print(f"  {option}: explains {share:.0%}")
    apply_plan(model, MergePlan.from_json(found.plan)).save(out / "merged")
    print(f"merged adapter: {out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sweep-run"))
    parser.add_argument("--trials", type=int, default=10)
    torch.set_num_threads(1)
    args = parser.parse_args()
    main(args.out, args.trials)
