"""Two rank-8 adapters on all linear layers of Gemma-3-270M to one of rank 16, against PEFT.

Run: ``python tests/benchmarks/exact_merge.py`` (``--blocks 2`` gives PEFT a part of the model; its
full SVDs cost the same for every block). Both sides are called in the same process on the same
random factors, which have the shapes of the real model.

How long PEFT takes depends on the BLAS and on how threads wait: 9 to 18 s on two free cores, many
times that where threads spin on busy ones. More than half of our call is PEFT's own creation of an
adapter, which it cannot do without: it is measured alone, and bounds the ratio that any
implementation can reach. The arithmetic is reported beside it.
"""

from __future__ import annotations

import json
import statistics

import torch
from _measure import LAYERS, options, random_model, stopwatch
from _report import write_row
from peft import PeftModel

import peft_himerge
from peft_himerge import export
from peft_himerge.adapters import lora_layers, read_adapters
from peft_himerge.combine import Combiner
from peft_himerge.plan import Edit

RANK = 8
FASTER, CLOSE = 300, 1e-5


def furthest(model: PeftModel, one: str, other: str) -> float:
    """Return the largest relative Frobenius distance of two adapters' deltas in any module."""
    worst = 0.0
    for layer in lora_layers(model).values():
        want = layer.get_delta_weight(other)
        worst = max(worst, float((layer.get_delta_weight(one) - want).norm() / want.norm()))
    return worst


def ours(model: PeftModel, repeats: int) -> tuple[float, float]:
    """Return median (wall, CPU) seconds of our call; the result stays as adapter "ours"."""
    walls, cpus = [], []
    for _ in range(repeats):
        if "ours" in model.peft_config:
            model.delete_adapter("ours")
        with stopwatch() as took:
            peft_himerge.add_weighted_adapter(
                model, ["a", "b"], [1.0, 1.0], "ours", "svd", svd_rank=2 * RANK
            )
        walls.append(took.wall)
        cpus.append(took.cpu)
    return statistics.median(walls), statistics.median(cpus)


def arithmetic(model: PeftModel, repeats: int) -> float:
    """Return median wall seconds of reading and factoring alone, nothing put into the model."""
    walls = []
    for _ in range(repeats):
        with stopwatch() as took:
            combiner = Combiner(read_adapters(model, ["a", "b"]))
            plan = combiner.plan(dict.fromkeys(["a", "b"], Edit(1.0, 1.0)))
            export.approximate(combiner, plan, 2 * RANK)
        walls.append(took.wall)
    return statistics.median(walls)


def creation(model: PeftModel, repeats: int) -> float:
    """Return median wall seconds of PEFT's creation of an empty adapter like ours."""
    walls = []
    for _ in range(repeats):
        with stopwatch() as took:
            model.add_adapter("empty", model.peft_config["ours"])
        walls.append(took.wall)
        model.delete_adapter("empty")
    return statistics.median(walls)


def main() -> None:
    """Run both sides, print and write the row."""
    parser = options(__doc__)
    parser.add_argument("--blocks", type=int, default=LAYERS, help="blocks that PEFT merges")
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    whole = random_model(LAYERS, ["a", "b"], RANK, chosen.device)
    ours(whole, 1)  # first calls load libraries
    wall_whole, cpu_whole = ours(whole, chosen.repeats)
    model = whole
    if chosen.blocks != LAYERS:
        model = random_model(chosen.blocks, ["a", "b"], RANK, chosen.device)
    wall, cpu = ours(model, chosen.repeats)
    with stopwatch() as peft:
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "peft", "svd", svd_rank=2 * RANK)
    after, cpu_after = ours(model, chosen.repeats)
    wall, cpu = (wall + after) / 2, (cpu + cpu_after) / 2
    alone, empty = arithmetic(model, chosen.repeats), creation(model, chosen.repeats)
    distance = furthest(model, "ours", "peft")
    times = LAYERS / chosen.blocks
    values = {
        "ratio": round(peft.wall / wall, 1),
        "ratio_cpu": round(peft.cpu / cpu, 1),
        "blocks_compared": chosen.blocks,
        "seconds": round(wall, 4),
        "peft_seconds": round(peft.wall, 2),
        "arithmetic_seconds": round(alone, 4),
        "creation_seconds": round(empty, 4),
        "ratio_if_all_but_creation_were_free": round(peft.wall / empty, 1),
        "ratio_of_peft_to_our_arithmetic": round(peft.wall / alone, 1),
        "seconds_18_blocks": round(wall_whole, 4),
        "cpu_seconds_18_blocks": round(cpu_whole, 4),
        "ratio_18_blocks_if_peft_is_linear_in_blocks": round(peft.wall * times / wall_whole, 1),
        "ratio_cpu_18_blocks_if_peft_is_linear_in_blocks": round(peft.cpu * times / cpu_whole, 1),
        "largest_relative_distance": distance,
    }
    reached = values["ratio"] >= FASTER and distance <= CLOSE
    print("exact_merge_rank16", json.dumps(values), "reached" if reached else "NOT reached")
    if not chosen.no_write:
        target = f"at least {FASTER} times faster than PEFT's svd, deltas equal to {CLOSE:g}"
        write_row("exact_merge_rank16", values, target=target, reached=reached)


if __name__ == "__main__":
    main()
