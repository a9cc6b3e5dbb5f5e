"""How the adapters' deltas lie to each other, layer by layer, and what the merged one is made of.

    <delta_i, delta_j> = sum of (B_i^T B_j) * (A_i A_j^T)       (rank_i, rank_j), elementwise

so norms and cosines are exact from products of factors and nothing dense is formed. Signs are
counted entry by entry: over all of them in a layer of up to 16 million entries, block by block,
and over 262144 drawn ones in a larger layer, with the standard error of that share.
Singular values are those of the small core (`lowrank`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .combine import Combiner
from .factors import Adapter, LoraFactors
from .layers import LayerGroup
from .lowrank import low_rank_of_product
from .threads import spread

__all__ = [
    "LayerGeometry",
    "PairGeometry",
    "layer_geometry",
    "singular_values",
    "spectra_of",
    "to_records",
]

_ALL_SIGNS = 1 << 24  # entries of a layer up to which every one is looked at: a fifth of a second
_SAMPLE = 1 << 18  # entries drawn otherwise; the share is then known to 0.001
_CHUNK = 1 << 16
_WIDEST = 256  # a rank above it would take longer than it tells: QR and SVD grow with its square

_Pair = tuple[str, str]
# Per pair: the inner product; entries where both are non-zero; those of them with equal signs.
_Sums = dict[_Pair, tuple[float, int, int]]


@dataclass(frozen=True, slots=True)
class PairGeometry:
    """Two adapters' source deltas in one layer.

    Attributes:
        adapters: their names.
        cosine: in [-1, 1]; None if one of them is zero. Modules that only one of them adapts count
            in its norm.
        sign_agreement: share of entries with equal signs among those where both are non-zero, in
            [0, 1]; None if there are none.
        sign_agreement_se: its standard error; 0 if every entry was looked at.
        entries: how many entries, both non-zero, were looked at.
    """

    adapters: _Pair
    cosine: float | None
    sign_agreement: float | None
    sign_agreement_se: float
    entries: int


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One layer: Frobenius norm of every adapter's source delta, and its pairs of adapters."""

    layer: str
    norms: Mapping[str, float]
    pairs: tuple[PairGeometry, ...]


def layer_geometry(combiner: Combiner) -> list[LayerGeometry]:
    """Return the geometry of the source deltas (before pruning and scaling) in every layer.

    Args:
        combiner: holds the adapters.

    Returns:
        One record per layer, in the layers' order; pairs in the order of the adapters' names.
    """
    return [_layer(layer, combiner.adapters) for layer in combiner.layers]


def _layer(layer: LayerGroup, adapters: Mapping[str, Adapter]) -> LayerGeometry:
    held: dict[str, dict[str, LoraFactors]] = {}
    for module in layer.modules:
        parts = {n: a.factors[module] for n, a in adapters.items() if module in a.factors}
        held[module] = parts
    numel = sum(next(iter(parts.values())).numel for parts in held.values())
    share = 1.0 if numel <= _ALL_SIGNS else _SAMPLE / numel

    def work(item: tuple[str, Mapping[str, LoraFactors]]) -> tuple[dict[str, float], _Sums]:
        return _module(*item, share)

    on_host = all(f.b.device.type == "cpu" for parts in held.values() for f in parts.values())
    squares: dict[str, float] = {}
    sums: _Sums = {}
    for own, pairs in spread(work, held.items(), most=None if on_host else 1):
        for name, square in own.items():
            squares[name] = squares.get(name, 0.0) + square
        for pair, found in pairs.items():
            dot, both, same = sums.get(pair, (0.0, 0, 0))
            sums[pair] = (dot + found[0], both + found[1], same + found[2])
    norms = {name: math.sqrt(squares[name]) for name in adapters if name in squares}
    pairs_of = combinations(norms, 2)
    return LayerGeometry(
        layer.label,
        norms,
        tuple(_pair(p, norms, sums.get(p, (0.0, 0, 0)), sampled=share < 1.0) for p in pairs_of),
    )


def _pair(
    pair: _Pair, norms: Mapping[str, float], sums: tuple[float, int, int], *, sampled: bool
) -> PairGeometry:
    dot, both, same = sums
    size = norms[pair[0]] * norms[pair[1]]
    cosine = max(-1.0, min(1.0, dot / size)) if size else None
    agreed = same / both if both else None
    se = math.sqrt(agreed * (1.0 - agreed) / both) if sampled and agreed is not None else 0.0
    return PairGeometry(pair, cosine, agreed, se, both)


def _module(
    module: str, parts: Mapping[str, LoraFactors], share: float
) -> tuple[dict[str, float], _Sums]:
    """Return per adapter the squared norm, and per pair what it adds to the layer's sums."""
    wide = {name: _thin(*(x.double() for x in f.scaled())) for name, f in parts.items()}

    def dot(one: str, other: str) -> float:
        (b, a), (b_2, a_2) = wide[one], wide[other]
        return float(((b.t() @ b_2) * (a @ a_2.t())).sum())

    squares = {name: max(0.0, dot(name, name)) for name in parts}
    pairs = list(combinations(parts, 2))
    counts = dict.fromkeys(pairs, (0, 0))
    for entries in _entries(module, parts, share) if pairs else ():
        for pair in pairs:
            both, same = _signs(*(entries[name] for name in pair))
            counts[pair] = (counts[pair][0] + both, counts[pair][1] + same)
    return squares, {pair: (dot(*pair), *counts[pair]) for pair in pairs}


def _thin(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same delta whose rank is at most the delta's smaller side."""
    out, width = b.shape[0], a.shape[1]
    if a.shape[0] <= min(out, width):
        return b, a
    unit = torch.eye(min(out, width), dtype=b.dtype, device=b.device)
    return (unit, b @ a) if out <= width else (b @ a, unit)


def _entries(
    module: str, parts: Mapping[str, LoraFactors], share: float
) -> Iterable[dict[str, Tensor]]:
    """Yield per adapter the same entries of its delta: all of them in blocks, or drawn ones."""
    if share == 1.0:
        for blocks in zip(*(f.blocks() for f in parts.values()), strict=True):
            yield {name: block for name, (_, block) in zip(parts, blocks, strict=True)}
        return
    first = next(iter(parts.values()))
    # Seeded by the module's name: the same entries whenever and wherever it is looked at.
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
    draw = torch.Generator().manual_seed(seed)
    sides = {name: (b, a.t().contiguous()) for name, (b, a) in _scaled(parts).items()}
    left = math.ceil(first.numel * share)
    while left > 0:
        n = min(left, _CHUNK, max(1, _CHUNK * 256 // first.rank))  # rows of `rank` numbers
        i = torch.randint(first.shape[0], (n,), generator=draw).to(first.b.device)
        j = torch.randint(first.shape[1], (n,), generator=draw).to(first.b.device)
        yield {name: (b[i] * columns[j]).sum(1) for name, (b, columns) in sides.items()}
        left -= n


def _scaled(parts: Mapping[str, LoraFactors]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: f.scaled() for name, f in parts.items()}


def _signs(one: Tensor, other: Tensor) -> tuple[int, int]:
    """Return at how many places both are non-zero, and at how many of those signs are equal."""
    both = (one != 0) & (other != 0)
    same = both & ((one > 0) == (other > 0))
    return int(torch.count_nonzero(both)), int(torch.count_nonzero(same))


def singular_values(factors: LoraFactors) -> list[float] | None:
    """Return the non-zero singular values of one module's delta, largest first.

    They are exact up to rounding; None for a rank above 256.
    """
    if factors.rank > _WIDEST:
        return None
    part = low_rank_of_product(*factors.scaled(), "exact")
    # Its factors share every singular value evenly between unit vectors on both sides.
    found = part.b.double().norm(dim=0) * part.a.double().norm(dim=1)
    values: list[float] = found.tolist()
    return values


def spectra_of(merged: Mapping[str, LoraFactors]) -> dict[str, list[float] | None]:
    """Return the singular values of every module of the exported adapter."""
    on_host = all(f.b.device.type == "cpu" for f in merged.values())
    found = spread(singular_values, merged.values(), most=None if on_host else 1)
    return dict(zip(merged, found, strict=True))


def to_records(
    layers: Sequence[LayerGeometry], spectra: Mapping[str, list[float] | None]
) -> dict[str, Any]:
    """Return plain JSON values: the key "geometry" of report.json.

    Args:
        layers: from `layer_geometry`.
        spectra: module -> singular values of the exported delta.
    """
    return {
        "layers": [
            {
                "layer": layer.layer,
                "norms": dict(layer.norms),
                "pairs": [
                    {
                        "adapters": list(pair.adapters),
                        "cosine": pair.cosine,
                        "sign_agreement": pair.sign_agreement,
                        "sign_agreement_se": pair.sign_agreement_se,
                        "entries": pair.entries,
                    }
                    for pair in layer.pairs
                ],
            }
            for layer in layers
        ],
        "singular_values": dict(spectra),
    }
