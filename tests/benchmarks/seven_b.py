"""Two rank-16 adapters with Qwen2-7B shapes, merged from folder to folder on a small machine.

Run: ``python tests/benchmarks/seven_b.py`` (``--layers 4`` for a short look; only the full 28
layers are written to results.json). Each step runs in its own process, so that its peak memory is
its own.

The yardstick is one plain pass of ``B @ A`` over all modules in torch: for every module of both
adapters, make the dense float32 product and let it go. The products need ``28 * 233`` million
entries per adapter; no larger part of the method can be skipped when anything is pruned. A second
yardstick, the same products in blocks that stay in the cache, is reported beside it, since on some
systems most of the plain pass goes into fetching fresh memory for the dense results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import write_row
from safetensors import safe_open
from safetensors.torch import save_file

from peft_himerge import HiMergeConfig
from peft_himerge.factors import LoraFactors
from peft_himerge.folders import read_folder
from peft_himerge.offline import merge_folders
from peft_himerge.threads import spread

HIDDEN, INTERMEDIATE, KV, LAYERS, RANK = 3584, 18944, 512, 28, 16
SHAPES = {  # module -> (out, in), the config of Qwen2-7B
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_adapter(folder: Path, seed: int, layers: int, dtype: torch.dtype) -> None:
    """Write one random adapter; alpha is 2 * rank, as is usual."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module, (out, width) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}.lora_"
            a = torch.randn(RANK, width, generator=draw) / width**0.5
            b = torch.randn(out, RANK, generator=draw) * 0.01
            tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = a.to(dtype), b.to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "Qwen/Qwen2-7B",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in SHAPES}),
    }
    text = json.dumps(config)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def factors(folders: list[Path]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield float32 (B, A) of every module of every adapter."""
    for folder in folders:
        with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
            for key in opened.keys():
                if key.endswith("lora_A.weight"):
                    a = opened.get_tensor(key).float()
                    yield opened.get_tensor(key.replace("lora_A", "lora_B")).float(), a


def plain_pass(folders: list[Path]) -> dict[str, float]:
    """Time the plain products; returns seconds."""
    start = time.perf_counter()
    for b, a in factors(folders):
        b @ a
    return {"seconds": time.perf_counter() - start}


def blocked_pass(folders: list[Path]) -> dict[str, float]:
    """Time the same products in blocks that stay in the cache, modules spread over the cores."""

    def walk(one: LoraFactors) -> None:
        for _ in one.blocks():
            pass

    start = time.perf_counter()
    read = [read_folder(str(number), folder) for number, folder in enumerate(folders)]
    for _ in spread(walk, [one for adapter in read for one in adapter.factors.values()]):
        pass
    return {"seconds": time.perf_counter() - start}


def merge(folders: list[Path], out: Path, density: float, scale: float) -> dict[str, float]:
    """Time one merge; returns seconds, relative error and rank."""
    config = HiMergeConfig(density=density, scale=scale, rank=2 * RANK)
    adapters = {f"a{i}": folder for i, folder in enumerate(folders)}
    done = merge_folders(adapters, out, config=config)
    return {"seconds": done.seconds, "relative_error": done.export_error, "rank": done.rank}


def step(name: str, root: Path, *more: str) -> dict[str, float]:
    """Run one step in a process of its own and add its peak memory."""
    command = [sys.executable, __file__, "--step", name, "--root", str(root), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(name: str, root: Path) -> None:
    """The inside of `step`."""
    folders = [root / "a0", root / "a1"]
    steps: dict[str, Any] = {
        "import": lambda: {"seconds": 0.0},
        "plain": lambda: plain_pass(folders),
        "blocked": lambda: blocked_pass(folders),
        "whole": lambda: merge(folders, root / "whole", 1.0, 1.0),
        "pruned": lambda: merge(folders, root / "pruned", 0.1, 0.9),
    }
    found = steps[name]()
    print(json.dumps({**found, "peak_gb": peak_gb()}))


def peak_gb() -> float:
    """Return VmHWM, the process's largest resident set, mapped files included."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    """Make the adapters, run the steps in turn, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--step")
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.root)
        return
    names = ("plain", "blocked", "whole", "pruned")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(2):
            make_adapter(root / f"a{i}", i, options.layers, DTYPES[options.dtype])
        idle = step("import", root)["peak_gb"]
        for turn in range(options.repeats):
            for name in names:
                runs[name].append(step(name, root))
                print(turn, name, runs[name][-1], flush=True)
    full = options.layers == LAYERS
    report(runs, idle, options.dtype, write=full)


def report(
    runs: dict[str, list[dict[str, float]]], idle: float, dtype: str, *, write: bool
) -> None:
    """Print ratios of turns that followed each other, and write the rows."""
    for name, title, most, gigabytes in (
        ("whole", "7b_folders_rank32_unpruned", 1.0, 1.5),
        ("pruned", "7b_folders_rank32_density0.1", 12.0, 3.0),
    ):
        pairs = list(zip(runs[name], runs["plain"], runs["blocked"], strict=True))
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b, _ in pairs)
        values = {
            "ratio_to_plain_pass": round(ratio, 3),
            "ratio_to_blocked_pass": round(
                statistics.median(a["seconds"] / c["seconds"] for a, _, c in pairs), 3
            ),
            "seconds": [round(a["seconds"], 2) for a, _, _ in pairs],
            "plain_pass_seconds": [round(b["seconds"], 2) for _, b, _ in pairs],
            "blocked_pass_seconds": [round(c["seconds"], 2) for _, _, c in pairs],
            "peak_gb": round(max(a["peak_gb"] for a, _, _ in pairs), 3),
            "peak_gb_after_import": round(idle, 3),
            "relative_error": pairs[0][0]["relative_error"],
            "dtype": dtype,
        }
        reached = ratio <= most and values["peak_gb"] <= gigabytes
        target = f"at most {most:g} plain passes, peak under {gigabytes:g} GB"
        print(title, json.dumps(values), "reached" if reached else "NOT reached")
        if write:
            write_row(title, values, target=target, reached=reached)


if __name__ == "__main__":
    main()
