"""One row per family of methods: ours against PEFT's call, and against the authors' dense form.

Run: ``python tests/benchmarks/families.py``. One square module per width, two rank-16 adapters,
float32, everything in one process, ours and theirs in turn. Ours and PEFT's are whole calls that
end with the adapter in the model; the dense forms of KnOTS-TIES and TSV-M (written here from the
papers) are timed without that, and TSV-M's keeps only directions that carry something, which
spares it two large SVDs. What takes PEFT or the dense form long is a full SVD of a width x width
delta, the same for all types; so at 4096 one sparse type, and one run, is enough.

`cat` is listed beside `svd` and not judged: PEFT's only copies factors, ours also finds the
smallest rank that holds the sum, so it cannot be faster.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _measure import options, stopwatch
from _report import write_row
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_himerge import add_weighted_adapter, merge_adapters
from peft_himerge.adapters import lora_layers

RANK, PAIR, DENSITY = 16, ["a", "b"], 0.2
COPIES = "cat"
ROUNDING = 1e-5  # an error that is none
# Relative distance of a trimmed delta to the dense form's: in float32 an entry or two next to the
# threshold fall to the other side, each worth some 0.3 %; in float64 both are 1e-13 apart.
CLOSE = 1e-2
SLACK = 1.02  # our error may be so many times PEFT's: both cut the same delta to the same rank


class OneModule(nn.Module):
    """A model of one linear layer."""

    def __init__(self, width: int) -> None:
        """Make it."""
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.proj(x)


def model_of(width: int, device: str) -> PeftModel:
    """Return the model with random adapters of unlike sizes."""
    torch.manual_seed(width)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["proj"])
    model = get_peft_model(OneModule(width), config, adapter_name=PAIR[0])
    for name in PAIR[1:]:
        model.add_adapter(name, config)
    for size, name in enumerate(PAIR, 1):
        layer = lora_layers(model)["proj"]
        for holder in (layer.lora_A[name], layer.lora_B[name]):
            holder.weight.data = torch.randn(holder.weight.shape) * size / width**0.5
    return model.to(device).eval()


def delta_of(model: PeftModel, name: str) -> Tensor:
    """Return one adapter's delta, dense."""
    with torch.no_grad():
        return lora_layers(model)["proj"].get_delta_weight(name)


def timed(
    call: Callable[[str], Any], model: PeftModel, name: str, repeats: int
) -> tuple[float, Any]:
    """Return the median wall seconds of a call that adds an adapter, and what the last returned."""
    walls = []
    for _ in range(repeats):
        if name in model.peft_config:
            model.delete_adapter(name)
        with stopwatch() as took:
            found = call(name)
        walls.append(took.wall)
    return statistics.median(walls), found


def apart(left: Tensor, right: Tensor) -> float:
    """Return the relative Frobenius distance."""
    return float((left - right).norm() / right.norm())


def against_peft(model: PeftModel, kind: str, repeats: int) -> dict[str, float]:
    """Return seconds and errors of one combination type, both ways."""
    rank = 2 * RANK
    more: dict[str, Any] = {} if kind in ("svd", "cat") else {"density": DENSITY}
    if kind != "cat":
        more["svd_rank"] = rank
    weights = [1.0, 0.5]

    def ours(name: str) -> Any:
        return add_weighted_adapter(model, PAIR, weights, name, kind, **more)

    def peft(name: str) -> None:
        model.add_weighted_adapter(PAIR, weights, name, kind, **more)

    seconds, result = timed(ours, model, "ours", repeats)
    peft_seconds, _ = timed(peft, model, "peft", repeats if kind == "cat" else 1)
    values = {
        "ratio": peft_seconds / seconds,
        "seconds": seconds,
        "peft_seconds": peft_seconds,
        "error": result.export_error,
    }
    if not kind.startswith("dare"):  # masks are drawn differently
        exact = result.delta("proj")
        values["error"] = apart(delta_of(model, "ours"), exact)
        values["peft_error"] = apart(delta_of(model, "peft"), exact)
    return values


def knots_ties(deltas: list[Tensor]) -> Tensor:
    """KnOTS-TIES, dense: SVD of the deltas side by side, TIES on S V of each, back by U."""
    width = deltas[0].shape[1]
    u, s, v = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = int((s > s[0] * 1e-5).sum())
    u, rows = u[:, :kept], s[:kept, None] * v[:kept]
    parts = []
    for part in rows.split(width, dim=1):
        count = math.ceil(DENSITY * part.numel())
        cut = part.abs().flatten().kthvalue(part.numel() - count + 1).values
        parts.append(part * (part.abs() >= cut))
    sign = torch.stack(parts).sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agree = [(part.sign() == sign) & (part != 0) for part in parts]
    total = torch.stack([p * a for p, a in zip(parts, agree, strict=True)]).sum(0)
    return u @ (total / torch.stack(agree).sum(0).clamp(min=1))


def tsv_m(deltas: list[Tensor]) -> Tensor:
    """TSV-M, dense: the SVD of each delta, then orthogonal factors of all of them together."""
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    us = torch.cat([u[:, :RANK] for u, _, _ in found], dim=1)
    vs = torch.cat([v[:RANK] for _, _, v in found], dim=0)
    sizes = torch.cat([s[:RANK] for _, s, _ in found])
    left, _, right = torch.linalg.svd(us, full_matrices=False)
    other, _, last = torch.linalg.svd(vs, full_matrices=False)
    return (left @ right * sizes) @ (other @ last)


DENSE: dict[str, tuple[Callable[[list[Tensor]], Tensor], dict[str, Any]]] = {
    "knots_ties": (knots_ties, {"method": "ties", "space": "knots", "density": DENSITY}),
    "tsv_m": (tsv_m, {"method": "tsv_m", "directions": RANK}),
}


def against_dense(model: PeftModel, kind: str, repeats: int) -> dict[str, float]:
    """Return seconds of one subspace method and of its dense form, and how far they are apart."""
    dense, options = DENSE[kind]

    def ours(name: str) -> Any:
        return merge_adapters(model, PAIR, adapter_name=name, **options)

    seconds, _ = timed(ours, model, "ours", repeats)
    with stopwatch() as took:
        want = dense([delta_of(model, name) for name in PAIR])
    return {
        "ratio": took.wall / seconds,
        "seconds": seconds,
        "dense_seconds": took.wall,
        "distance": apart(delta_of(model, "ours"), want),
    }


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[PeftModel, str, int], dict[str, float]]]] = {
    "linear": (("svd", "cat"), against_peft),
    "sparse": (("ties_svd", "dare_ties_svd", "magnitude_prune_svd"), against_peft),
    "subspace": (("knots_ties", "tsv_m"), against_dense),
}


def fine(row: dict[str, float]) -> bool:
    """Return True if ours is faster, and as good as the other side or equal to it."""
    good = row["error"] <= max(SLACK * row["peft_error"], ROUNDING) if "peft_error" in row else True
    return row["ratio"] > 1.0 and good and row.get("distance", 0.0) <= CLOSE


def main() -> None:
    """Run all families at all widths, print and write the rows."""
    parser = options(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    against_peft(model_of(64, chosen.device), "svd", 1)  # first calls load libraries
    largest = max(chosen.widths)
    for family, (kinds, measure) in FAMILIES.items():
        values: dict[str, Any] = {}
        for width in chosen.widths:
            some = kinds[:1] if width == largest >= 4096 and family == "sparse" else kinds
            model = model_of(width, chosen.device)
            rows = {kind: measure(model, kind, chosen.repeats) for kind in some}
            values[f"width_{width}"] = {
                kind: {key: float(f"{value:.4g}") for key, value in row.items()}
                for kind, row in rows.items()
            }
            print(f"family_{family}", width, json.dumps(values[f"width_{width}"]), flush=True)
        cells = [row for rows in values.values() for k, row in rows.items() if k != COPIES]
        values["least_ratio"] = min(row["ratio"] for row in cells)
        values["largest_ratio"] = max(row["ratio"] for row in cells)
        reached = all(fine(row) for row in cells)
        print(f"family_{family}", "reached" if reached else "NOT reached", flush=True)
        other = "the authors' dense form" if family == "subspace" else "PEFT's call"
        if not chosen.no_write:
            target = f"faster than {other} at every width, deltas as good"
            write_row(f"family_{family}", values, target=target, reached=reached)


if __name__ == "__main__":
    main()
