"""Which entries of each adapter stay: the largest, random ones, all but the outliers.

Thresholds are exact order statistics found by passes over the blocks (`order`). Random masks are
drawn from generators named by (seed, module, adapter), so that neither the order of modules nor a
repeated pass changes them. An adapter without the module has zeros there, and they do not count
among its entries. Counts of kept entries are ``ceil(density * entries)``; entries equal to the
threshold are all kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..factors import working_dtype
from ..select import kept_count, prune_
from .check import choice, fraction
from .kernel import Sparsify, Step, everything
from .order import Passes, largest
from .stack import StackLike

__all__ = [
    "Density",
    "entries_of",
    "exactly",
    "groups",
    "keep_band",
    "keep_by_rank",
    "keep_crumbs",
    "keep_largest",
    "keep_random",
    "magnitudes",
    "numel",
    "present",
]

Density = float | Mapping[str, float]


def present(stack: StackLike) -> Sequence[int]:
    """Return the indices of the adapters that have the module; all, where the stack can't tell."""
    here: Sequence[int] = getattr(stack, "present", range(len(stack.names)))
    return here


def densities_of(density: Density, names: Sequence[str], name: str = "density") -> list[float]:
    """Return the density of each adapter; one number stands for all."""
    if not isinstance(density, Mapping):
        return [fraction(name, density)] * len(names)
    missing = [n for n in names if n not in density]
    extra = [n for n in density if n not in names]
    if missing or extra:
        raise ConfigError(
            f"{name} must have one value per adapter ({', '.join(names)}); "
            f"{'missing' if missing else 'unknown'}: {(missing or extra)[0]!r}."
        )
    return [fraction(f"{name}[{n!r}]", density[n]) for n in names]


def groups(stacks: Sequence[StackLike], scope: str) -> list[list[StackLike]]:
    """Return the modules that share a threshold: all, those of a layer, or each its own."""
    choice("scope", scope, ("model", "layer", "module"))
    if scope == "model":
        return [list(stacks)]
    found: dict[str, list[StackLike]] = {}
    for stack in stacks:
        found.setdefault(stack.module if scope == "module" else stack.layer, []).append(stack)
    return list(found.values())


def magnitudes(group: Sequence[StackLike], sparsify: Sparsify) -> Passes:
    """Return passes over the magnitudes of what `sparsify` leaves of each adapter."""

    def blocks() -> Iterator[list[Tensor | None]]:
        for stack in group:
            step, here = sparsify(stack), present(stack)
            for _, pieces in stack.blocks():
                kept = step(pieces)
                yield [x.abs() if i in here else None for i, x in enumerate(kept)]

    return blocks


def numel(stack: StackLike) -> int:
    """Return the number of entries of one delta of the module."""
    return stack.shape[0] * stack.shape[1]


def entries_of(group: Sequence[StackLike]) -> list[int]:
    """Return how many entries each adapter has in a group of modules."""
    counts = [0] * len(group[0].names)
    for stack in group:
        for i in present(stack):
            counts[i] += numel(stack)
    return counts


def keep_largest(
    stacks: Sequence[StackLike],
    density: Density,
    scope: str,
    before: Sparsify = everything,
    count: Callable[[float, int], int] = kept_count,
) -> Sparsify:
    """Keep each adapter's largest entries by magnitude, of those that `before` leaves."""
    densities = densities_of(density, stacks[0].names)
    parts = groups(stacks, scope)
    if all(d == 1.0 for d in densities):
        return before
    cuts: dict[str, list[float]] = {}
    for group in parts:
        counts = [count(d, n) for d, n in zip(densities, entries_of(group), strict=True)]
        wanted = [[k] if k and d < 1.0 else [] for k, d in zip(counts, densities, strict=True)]
        dtype = working_dtype(*(s.dtype for s in group))
        found = largest(magnitudes(group, before), wanted, dtype)
        row = [
            0.0 if d == 1.0 else at[k] if k else math.inf
            for d, k, at in zip(densities, counts, found, strict=True)
        ]
        cuts.update(dict.fromkeys((s.module for s in group), row))

    def start(stack: StackLike) -> Step:
        step, row = before(stack), cuts[stack.module]
        return lambda blocks: tuple(
            prune_(x, cut) for x, cut in zip(step(blocks), row, strict=True)
        )

    return start


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    # Always float32 on the CPU: the same masks for every dtype and device.
    return torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device)


def keep_random(density: Density, names: Sequence[str], rescale: str | None) -> Sparsify:
    """Keep each entry with probability `density` (DARE)."""
    densities = densities_of(density, names)
    choice("rescale", rescale, ("prob", "l1", None))

    def drop(x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
        if keep == 0.0:
            return torch.zeros_like(x)
        if keep == 1.0:
            return x
        kept = x * (_uniform(x, generator) < keep)
        return kept / keep if rescale == "prob" else kept

    def start(stack: StackLike) -> Step:
        generators = [stack.generator(name) for name in stack.names]
        return lambda blocks: tuple(map(drop, blocks, densities, generators))

    return _keeping_l1(start) if rescale == "l1" else start


def keep_by_rank(density: Density, window: float, names: Sequence[str], rescale: str) -> Sparsify:
    """Keep each entry with a probability that grows with its rank by magnitude in its row."""
    densities = densities_of(density, names)
    half = fraction("window", window) / 2.0
    choice("rescale", rescale, ("prob", "l1", None))
    for d in densities:
        if d - half < 0.0 or d + half > 1.0:
            raise ConfigError(
                f"density={d} with window={window} gives probabilities from {d - half:g} to "
                f"{d + half:g}; they must be in [0, 1]. Use a smaller window."
            )

    def drop(x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
        columns = x.shape[1]
        place = x.abs().argsort(dim=1, stable=True).argsort(dim=1)
        share = place.to(x.dtype) / (columns - 1) if columns > 1 else torch.full_like(x, 0.5)
        chance = (keep - half) + 2.0 * half * share
        kept = torch.where(_uniform(x, generator) < chance, x, torch.zeros_like(x))
        return kept / chance.clamp(min=1e-12) if rescale == "prob" else kept

    def start(stack: StackLike) -> Step:
        generators = [stack.generator(name) for name in stack.names]
        return lambda blocks: tuple(map(drop, blocks, densities, generators))

    return _keeping_l1(start) if rescale == "l1" else start


def _keeping_l1(sparsify: Sparsify) -> Sparsify:
    """Scale what `sparsify` leaves of a module back to the L1 norm it had."""

    def start(stack: StackLike) -> Step:
        step = sparsify(stack)
        norms = torch.zeros(2, len(stack.names), dtype=torch.float64)
        for _, blocks in stack.blocks():
            norms[0] += torch.stack([x.abs().sum(dtype=torch.float64).cpu() for x in blocks])
            kept = step(blocks)
            norms[1] += torch.stack([x.abs().sum(dtype=torch.float64).cpu() for x in kept])
        ratio = torch.where(norms[1] > 0.0, norms[0] / norms[1], torch.ones(())).tolist()
        again = sparsify(stack)
        return lambda blocks: tuple(x * r for x, r in zip(again(blocks), ratio, strict=True))

    return start


def keep_crumbs(density: Density, outliers: float, names: Sequence[str]) -> Sparsify:
    """Per row: drop the largest, then keep the largest of the rest."""
    densities = densities_of(density, names)
    fraction("outliers", outliers)

    def keep(x: Tensor, share: float) -> Tensor:
        columns = x.shape[1]
        dropped = math.floor(exactly(outliers, columns))
        kept = min(kept_count(share, columns), columns - dropped)
        order = x.abs().argsort(dim=1, descending=True, stable=True)[:, dropped : dropped + kept]
        return torch.zeros_like(x).scatter(1, order, x.gather(1, order))

    def start(_stack: StackLike) -> Step:
        return lambda blocks: tuple(map(keep, blocks, densities))

    return start


def exactly(share: float, count: int) -> float:
    """Return share * count, where 0.3 of 10 is 3 and not a little less or more."""
    return round(share * count, 9)


def keep_band(stacks: Sequence[StackLike], density: Density, outliers: float) -> Sparsify:
    """Per module: drop the largest entries, then the smallest, until `density` of all is left."""
    densities = densities_of(density, stacks[0].names)
    fraction("outliers", outliers)
    limits: dict[str, list[tuple[float, float]]] = {}
    for stack in stacks:
        size = numel(stack)
        places = []
        for d in densities:
            kept = math.floor(exactly(d, size))
            dropped = min(math.floor(exactly(outliers, size)), size - kept)
            places.append((dropped, kept))
        here = present(stack)
        wanted = [
            sorted({dropped + 1, dropped + kept}) if kept and i in here else []
            for i, (dropped, kept) in enumerate(places)
        ]
        found = largest(magnitudes([stack], everything), wanted, stack.dtype)
        limits[stack.module] = [
            (at[dropped + kept], at[dropped + 1]) if at else (math.inf, math.inf)
            for (dropped, kept), at in zip(places, found, strict=True)
        ]

    def keep(x: Tensor, limit: tuple[float, float]) -> Tensor:
        low, high = limit
        size = x.abs()
        return torch.where((size >= low) & (size <= high), x, torch.zeros_like(x))

    def start(stack: StackLike) -> Step:
        return lambda blocks: tuple(map(keep, blocks, limits[stack.module]))

    return start
