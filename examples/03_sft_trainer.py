"""The same with TRL's SFTTrainer, and the sibling in a folder.

    pip install trl
    python examples/03_sft_trainer.py

A sibling that lies in a folder is loaded, frozen, for each round, and taken out again: it is never
in the model during a training step, and never in a checkpoint.
"""

import argparse
from pathlib import Path

import datasets
import torch
from tiny_tasks import VOCAB, base_model, batch, lora, score_of, train_adapter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_himerge import HiMergeCallback, HiMergeConfig


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the numbers themselves."""
    words = {f"<{n}>": n for n in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<0>", eos_token="<0>", bos_token="<0>"
    )


def rows(task: str, n: int, seed: int) -> datasets.Dataset:
    """Return a data set that is tokenized already, with the loss on the answer alone."""
    ids, labels = batch(task, n, seed)
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def main(out: Path) -> None:
    """Train "back" with SFTTrainer and merge it with the saved "up"."""
    finished = train_adapter(base_model(), "up")
    finished.save_pretrained(str(out / "siblings"))

    callback = HiMergeCallback(
        {"up": out / "siblings" / "up"},
        # SFTTrainer names the adapter it makes "default".
        {"up": score_of("up"), "default": score_of("back")},
        config=HiMergeConfig(density=0.5, scale=0.9, max_export_drop=None),
        on=["evaluate", "train_end"],
        analysis={"evaluate": "scores", "train_end": "full"},
    )
    trainer = SFTTrainer(
        model=base_model(),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=60,
            per_device_train_batch_size=32,
            learning_rate=4e-3,
            eval_strategy="steps",
            eval_steps=30,
            save_strategy="no",
            logging_steps=30,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        peft_config=lora(),
        train_dataset=rows("back", 2048, 1),
        eval_dataset=rows("back", 64, 2),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    for row in callback.memory["history"]:
        print(f"step {row['global_step']} ({row['trigger']}): merged score {row['score']:.3f}")
    print(f"merged adapter: {out / 'himerge' / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sft-run"))
    torch.set_num_threads(1)
    main(parser.parse_args().out)
