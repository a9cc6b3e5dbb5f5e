"""What the benchmark scripts share: a stopwatch, Gemma-3-270M's shapes, the demo's model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from peft_himerge.adapters import read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.demo import adapter_dirs, load_base
from peft_himerge.plan import Edit, MergePlan

__all__ = ["LAYERS", "Took", "demo_model", "options", "plan_of", "random_model", "stopwatch"]

LAYERS = 18


@dataclass(slots=True)
class Took:
    """Wall seconds, and seconds of all of this process's threads together."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Took]:
    """Time the block, what it left for a GPU to do included; the numbers are there at its end."""
    took = Took()
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield took
    finally:
        _wait()
        took.wall, took.cpu = time.perf_counter() - wall, time.process_time() - cpu


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="torch threads; fewer on a busy machine")
    parser.add_argument("--device", default="cpu", help="where the model is; use --no-write too")
    parser.add_argument("--no-write", action="store_true", help="leave results.json as it is")
    return parser


def random_model(blocks: int, names: Sequence[str], rank: int, device: str = "cpu") -> PeftModel:
    """Return a model with Gemma-3-270M's linear layers and random adapters on all of them.

    The vocabulary is small: no adapter is on the embedding, so it plays no part.
    """
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=16,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False
    )
    model = get_peft_model(Gemma3ForCausalLM(config), lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model.to(device).eval()


def demo_model(device: str = "cpu") -> tuple[PeftModel, Any]:
    """Return Gemma-3-270M with the adapters that ship with the demo, and its tokenizer."""
    base, tokenizer = load_base()
    (first, folder), *others = sorted(adapter_dirs().items())
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name)
    return model.to(device).eval(), tokenizer


def plan_of(model: PeftModel, density: float, scale: float) -> tuple[Combiner, MergePlan]:
    """Return the combiner of the demo's adapters and their model-wise plan."""
    combiner = Combiner(read_adapters(model, sorted(adapter_dirs())))
    edit = Edit(density, scale)
    return combiner, combiner.plan(dict.fromkeys(sorted(adapter_dirs()), edit))
