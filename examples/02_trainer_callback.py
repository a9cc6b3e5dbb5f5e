"""Watch, while an adapter trains, how well it will merge with one that is finished.

    python examples/02_trainer_callback.py

One line in the trainer, `callbacks=[HiMergeCallback(...)]`. The training itself is bit-identical to
a run without it. Here the best checkpoint is the one that merges best, not the one that is best
alone.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from tiny_tasks import Rows, base_model, lora, score_of, train_adapter
from transformers import Trainer, TrainingArguments

from peft_himerge import HiMergeCallback, HiMergeConfig


def main(out: Path) -> None:
    """Train an adapter for "back" beside the finished "up"; merge the two at every evaluation."""
    model = train_adapter(base_model(), "up")
    # The trainer finds its best checkpoint again only if the adapter in training is "default".
    model.add_adapter("default", lora())
    model.set_adapter("default")

    callback = HiMergeCallback(
        ["up"],  # in the model; {"up": folder} loads it for each round instead
        {"up": score_of("up"), "default": score_of("back")},
        config=HiMergeConfig(density=0.5, scale=0.9, max_export_drop=None),
        on=["evaluate", "train_end"],
        analysis={"evaluate": "scores", "train_end": "full"},
    )
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=90,
        per_device_train_batch_size=32,
        learning_rate=4e-3,
        eval_strategy="steps",
        eval_steps=30,
        save_strategy="steps",
        save_steps=30,
        logging_steps=30,
        metric_for_best_model="eval_himerge_score",
        greater_is_better=True,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows("back", 2048),
        eval_dataset=Rows("back", 64, seed=2),
        callbacks=[callback],
    )
    trainer.train()

    for line in (out / "himerge" / "rounds.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["event"] == "round":
            kept = ", ".join(f"{k} {v:.0%}" for k, v in row["kept"].items() if v is not None)
            print(f"step {row['global_step']}: merged score {row['score']:.3f}, kept: {kept}")
    print(f"best step: {trainer.state.best_global_step}")
    print(f"merged adapter: {out / 'himerge' / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("callback-run"))
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    main(parser.parse_args().out)
