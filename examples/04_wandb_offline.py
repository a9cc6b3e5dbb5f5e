"""Log merges to W&B without a network, and draw what the dashboard shows.

    python examples/04_wandb_offline.py
    wandb sync RUN_FOLDER          # later, where there is a network

The listener joins the run that is there and leaves it open. Without W&B, or with W&B failing, the
merges are the same.
"""

import argparse
import os
from pathlib import Path

import torch
import wandb
from tiny_tasks import TASKS, base_model, score_of, train_adapter

from peft_himerge import HiMergeConfig, merge_adapters_hi
from peft_himerge.tracking import Book, JsonlListener, Round, WandbListener, figures


def main(out: Path) -> None:
    """Merge twice with other options, as two rounds of one run."""
    os.environ.setdefault("WANDB_MODE", "offline")
    out.mkdir(parents=True, exist_ok=True)
    model = None
    for task in TASKS:
        model = train_adapter(model if model is not None else base_model(), task)
    eval_fns = {task: score_of(task) for task in TASKS}

    rounds: list[Round] = []
    book = Book()

    def keep(event: object) -> None:
        """Any callable is a listener; this one keeps each merge's record for the figure."""
        done = book.take(event)
        if done is not None:
            rounds.append(done)

    with wandb.init(project="himerge-example", dir=str(out)) as run:
        listeners = [WandbListener(), JsonlListener(out / "merges.jsonl"), keep]
        for scale in (1.0, 0.7):
            config = HiMergeConfig(
                density=0.5, scale=scale, accept="no_regression", max_export_drop=None
            )
            name = f"merged-{scale:g}".replace(".", "-")
            merge_adapters_hi(
                model,
                list(TASKS),
                eval_fns,
                adapter_name=name,
                config=config,
                callbacks=listeners,
            )
        print(f"best score in the run's summary: {run.summary['himerge/best_score']:.3f}")
    if figures.available():
        figures.overview(rounds[-1]).savefig(out / "dashboard.png", dpi=110)
        print(f"figure: {out / 'dashboard.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("wandb-run"))
    torch.set_num_threads(1)
    main(parser.parse_args().out)
