"""`lazy` against `fold`: one forward of 512 tokens of Gemma-3-270M with both demo adapters.

Run: ``python tests/benchmarks/lazy_fold.py``. The forward asks for the logits of the last token
only, so that the large output layer, the same for both, does not flatter the ratio. Putting the
state in place is not part of it: `fold` makes the deltas there, `lazy` in every forward; it is
reported beside it.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from _measure import demo_model, options, plan_of, stopwatch
from _report import write_row

from peft_himerge.probe import Probe, Strategy

TOKENS, MOST = 512, 1.25
WAYS: tuple[Strategy, ...] = ("fold", "lazy")


def measure(model: Any, density: float, repeats: int) -> dict[str, Any]:
    """Return the ratio of paired forwards at one density, and the seconds."""
    combiner, plan = plan_of(model, density, 0.9)
    ids = torch.arange(3, 3 + TOKENS, device=model.device)[None]
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    show: dict[str, list[float]] = {way: [] for way in WAYS}
    logits = {}
    for turn in range(repeats + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            probe = Probe(model, combiner, way)
            with probe, torch.no_grad():
                with stopwatch() as placed:
                    probe.show(plan)
                with stopwatch() as took:
                    logits[way] = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            if turn:  # the first turn warms up
                wall[way].append(took.wall)
                cpu[way].append(took.cpu)
                show[way].append(placed.wall)

    def ratio(of: dict[str, list[float]]) -> float:
        pairs = zip(of["lazy"], of["fold"], strict=True)
        return round(statistics.median(lazy / fold for lazy, fold in pairs), 3)

    return {
        "ratio": ratio(wall),
        "ratio_cpu": ratio(cpu),
        "lazy_seconds": [round(x, 3) for x in wall["lazy"]],
        "fold_seconds": [round(x, 3) for x in wall["fold"]],
        "fold_show_seconds": round(statistics.median(show["fold"]), 3),
        "equal_bits": torch.equal(logits["lazy"], logits["fold"]),
    }


def main() -> None:
    """Measure unpruned and pruned, print and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    model, _ = demo_model(chosen.device)
    for title, density in (("lazy_fold_unpruned", 1.0), ("lazy_fold_density0.5", 0.5)):
        values = measure(model, density, chosen.repeats)
        reached = values["ratio"] <= MOST
        print(title, json.dumps(values), "reached" if reached else "NOT reached", flush=True)
        if not chosen.no_write:
            target = f"a forward of {TOKENS} tokens at most {MOST:g} times fold's"
            write_row(title, values, target=target, reached=reached)


if __name__ == "__main__":
    main()
