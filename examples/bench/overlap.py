"""Do the adapters read the same directions of their inputs? Writes overlap.json.

    python examples/bench/overlap.py --adapters ADAPTERS trec thucnews sst2 e2e

LoRA starts from a random A and a B of zero, and A moves little: adapters that were trained from the
same seed read nearly the same directions, those of different seeds nearly independent ones.
"""

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_himerge.result import versions


def bases(folder: Path) -> dict[str, Tensor]:
    """Return module -> (in, rank) orthonormal basis of what its A reads."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        name: torch.linalg.qr(a.double().t()).Q
        for name, a in weights.items()
        if name.endswith("lora_A.weight")
    }


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the mean cosine of the principal angles between two bases, 0..1."""
    return float(torch.linalg.svdvals(one.t() @ other).mean())


def main() -> None:
    """Compare every pair of adapters module by module, and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", help="names of two or more adapters")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("overlap.json"))
    args = parser.parse_args()
    found = {name: bases(args.adapters / name) for name in args.names}
    first = found[args.names[0]]
    draw = torch.Generator().manual_seed(0)
    random = {
        name: torch.linalg.qr(torch.randn(q.shape, generator=draw, dtype=q.dtype)).Q
        for name, q in first.items()
    }
    pairs = {}
    for one, other in combinations(args.names, 2):
        every = [cosine(q, found[other][m]) for m, q in found[one].items() if m in found[other]]
        if not every:
            parser.error(f"{one!r} and {other!r} have no module in common")
        pairs[f"{one}+{other}"] = {
            "modules": len(every),
            "mean": statistics.fmean(every),
            "least": min(every),
        }
    told = {
        "pairs": pairs,
        "random": statistics.fmean(cosine(q, random[name]) for name, q in first.items()),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
