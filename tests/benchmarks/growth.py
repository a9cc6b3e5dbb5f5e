"""How time and memory of a folder merge grow with adapters, layers and ranks.

Run: ``python tests/benchmarks/growth.py``. Every point runs in a fresh process forked from one
that has imported everything, so that its peak memory is its own; the peak is given less what
imports take. Exponents are slopes of a least-squares line through the logarithms: 1 is linear.

An unpruned merge is exact, by QR and SVD of the stacked factors. Their cost has a part that grows
with the square of the summed ranks, so at a small width time grows faster than linearly with the
adapters; the wider the model, the later. Linux only: peaks are read from /proc.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import options, stopwatch
from _report import write_row
from safetensors.torch import save_file
from seven_b import peak_gb

from peft_himerge import HiMergeConfig
from peft_himerge.offline import merge_folders

WIDTH, INNER = 512, 1024
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
USUAL = {"adapters": 2, "layers": 16, "rank": 8}
AXES = {
    "adapters": (2, 4, 8, 16),
    "layers": (4, 8, 16, 32, 64),
    "rank": (4, 16, 64, 256),
}
DENSITIES = {"unpruned": 1.0, "density0.1": 0.1}
LINEAR = 1.15  # the largest exponent that counts as linear


def make_adapter(folder: Path, seed: int, layers: int, rank: int) -> None:
    """Write one random adapter."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module, (out, width) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, width, generator=draw) / width**0.5
            tensors[f"{key}B.weight"] = torch.randn(out, rank, generator=draw) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in SHAPES})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def point(size: dict[str, int], density: float, threads: int | None, back: Any) -> None:
    """Measure one merge; runs in a process of its own."""
    if threads:
        torch.set_num_threads(threads)
    idle = peak_gb()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        adapters = {}
        for i in range(size["adapters"]):
            adapters[f"a{i}"] = root / f"a{i}"
            make_adapter(root / f"a{i}", i, size["layers"], size["rank"])
        config = HiMergeConfig(density=density, scale=0.9 if density < 1 else 1.0)
        Path("/proc/self/clear_refs").write_text("5")  # making the adapters is not counted
        with stopwatch() as took:
            merge_folders(adapters, root / "out", config=config)
        extra_mb = (peak_gb() - idle) * 1000
        back.send((took.wall, took.cpu, extra_mb))


def measure(
    size: dict[str, int], density: float, threads: int | None, repeats: int
) -> tuple[float, float, float]:
    """Return the least (wall seconds, CPU seconds, MB) of some runs of one point."""
    context = multiprocessing.get_context("forkserver")
    found = []
    for _ in range(repeats):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=point, args=(size, density, threads, there))
        process.start()
        there.close()
        found.append(here.recv())
        process.join()
    wall, cpu, megabytes = (min(column) for column in zip(*found, strict=True))
    return wall, cpu, megabytes


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(max(v, 1e-6)) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return round(slope / sum((a - mx) ** 2 for a in x), 2)


def main() -> None:
    """Measure all points, print the fits and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=DENSITIES, nargs="+", default=list(DENSITIES))
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)  # for the record; every process sets its own
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["growth", "_measure"])
    for title in chosen.only:
        density = DENSITIES[title]
        values: dict[str, Any] = {"usual": USUAL}
        for axis, sizes in AXES.items():
            runs = [
                measure({**USUAL, axis: n}, density, chosen.threads, chosen.repeats) for n in sizes
            ]
            walls, cpus, megabytes = ([run[i] for run in runs] for i in range(3))
            values[axis] = {
                "sizes": list(sizes),
                "seconds": [round(x, 3) for x in walls],
                "cpu_seconds": [round(x, 3) for x in cpus],
                "peak_mb_beyond_imports": [round(x, 1) for x in megabytes],
                "exponent_seconds": exponent(sizes, walls),
                "exponent_cpu_seconds": exponent(sizes, cpus),
                "exponent_peak_mb": exponent(sizes, megabytes),
            }
            print(f"growth_{title}", axis, json.dumps(values[axis]), flush=True)
        reached = all(
            values[axis][f"exponent_{what}"] <= LINEAR
            for axis in ("adapters", "layers")
            for what in ("cpu_seconds", "peak_mb")
        )
        print(f"growth_{title}", "reached" if reached else "NOT reached", flush=True)
        if not chosen.no_write:
            target = f"linear in adapters and layers: exponents of at most {LINEAR:g}"
            write_row(f"growth_{title}", values, target=target, reached=reached)


if __name__ == "__main__":
    main()
