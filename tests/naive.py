"""Merging methods the slow way: dense float64, one entry at a time, straight from the formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from stacks import deltas

from peft_himerge.methods.stack import Stack

Matrix = NDArray[np.float64]
Table = list[list[Matrix]]  # [module][adapter]


def dense(stacks: Sequence[Stack], *, weighted: bool = False) -> Table:
    """Return every module's deltas of every adapter."""
    table = []
    for stack in stacks:
        row = [d.numpy().copy() for d in deltas(stack)]
        if not weighted:
            row = [
                d / w if w else bare(stack, i)
                for i, (d, w) in enumerate(zip(row, stack.weights, strict=True))
            ]
        table.append(row)
    return table


def bare(stack: Stack, i: int) -> Matrix:
    f = stack.factors[i]
    if f is None:
        return np.zeros(stack.shape)
    return (f.scaling * (f.b.double() @ f.a.double())).numpy()


def kept(density: float, entries: int) -> int:
    return math.ceil(Fraction(str(density)) * entries)


def floor(density: float, entries: int) -> int:
    return int(density * entries)


def trim(
    stacks: Sequence[Stack],
    table: Table,
    densities: Sequence[float],
    scope: str,
    count: Callable[[float, int], int] = kept,
) -> Table:
    """Keep the largest entries of every adapter, by sorting all of them."""
    key = {"model": lambda s: 0, "layer": lambda s: s.layer, "module": lambda s: s.module}[scope]
    groups: dict[object, list[int]] = {}
    for place, stack in enumerate(stacks):
        groups.setdefault(key(stack), []).append(place)
    result = [[d.copy() for d in row] for row in table]
    for group, i in itertools.product(groups.values(), range(len(densities))):
        here = [m for m in group if stacks[m].factors[i] is not None]
        if not here:
            continue
        sizes = sorted(abs(float(x)) for m in here for x in table[m][i].flat)[::-1]
        keep = count(densities[i], len(sizes))
        cut = sizes[keep - 1] if keep else math.inf
        for m in here:
            result[m][i][np.abs(table[m][i]) < cut] = 0.0
    return result


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def vote(
    table: Table,
    weights: Sequence[float],
    *,
    weighted: bool = True,
    by: str = "total",
    tie: str = "positive",
    merge: str = "count",
) -> list[Matrix]:
    """Elect a sign per entry and merge the entries that have it."""

    def voters(m: int, at: tuple[int, ...]) -> list[float]:
        entries = [float(d[at]) for d in table[m]]
        return [w * x for w, x in zip(weights, entries, strict=True)] if weighted else entries

    def ahead(found: list[float]) -> int:
        return sign(sum(found) if by == "total" else sum(map(sign, found)))

    places = [(m, at) for m, row in enumerate(table) for at in np.ndindex(row[0].shape)]
    majority = sign(sum(ahead(voters(m, at)) for m, at in places)) if tie == "majority" else 1
    result = [np.zeros(row[0].shape) for row in table]
    for m, at in places:
        found = voters(m, at)
        elected = ahead(found) or majority
        agree = [i for i, x in enumerate(found) if x != 0.0 and sign(x) == elected]
        parts = [weights[i] * float(table[m][i][at]) for i in agree]
        if not parts:
            continue
        if merge == "count":
            result[m][at] = sum(parts) / len(parts)
        elif merge == "weight":
            share = sum(weights[i] for i in agree)
            result[m][at] = sum(parts) / (share if abs(share) >= 1e-8 else 1.0)
        elif merge == "sum":
            result[m][at] = sum(parts)
        else:
            result[m][at] = max(parts, key=abs)
    return result


def add(table: Table, weights: Sequence[float]) -> list[Matrix]:
    return [sum((w * d for w, d in zip(weights, row, strict=True)), 0.0 * row[0]) for row in table]


def uniform(stack: Stack, i: int) -> Matrix:
    """Return the random numbers that decide about adapter i's entries."""
    import torch

    generator = stack.generator(stack.names[i])
    return torch.rand(stack.shape, generator=generator).double().numpy()


def dare(
    stacks: Sequence[Stack], table: Table, densities: Sequence[float], rescale: str | None
) -> Table:
    result = []
    for stack, row in zip(stacks, table, strict=True):
        new = []
        for i, d in enumerate(row):
            p = densities[i]
            keep = d * (uniform(stack, i) < np.float32(p)) if p < 1.0 else d.copy()
            if rescale == "prob":
                keep = keep / p if p else 0.0 * keep
            elif rescale == "l1" and np.abs(keep).sum() > 0:
                keep = keep * (np.abs(d).sum() / np.abs(keep).sum())
            new.append(keep)
        result.append(new)
    return result


def della(
    stacks: Sequence[Stack], table: Table, density: float, window: float, rescale: str | None
) -> Table:
    result = []
    for stack, row in zip(stacks, table, strict=True):
        new = []
        for i, d in enumerate(row):
            chance = np.zeros_like(d)
            n = d.shape[1]
            for r in range(d.shape[0]):
                order = sorted(range(n), key=lambda c, r=r, d=d: abs(d[r, c]))
                for place, c in enumerate(order):
                    q = place / (n - 1) if n > 1 else 0.5
                    chance[r, c] = density - window / 2 + window * q
            keep = np.where(uniform(stack, i) < chance, d, 0.0)
            if rescale == "prob":
                keep = np.divide(keep, chance, out=np.zeros_like(keep), where=chance > 0)
            elif rescale == "l1" and np.abs(keep).sum() > 0:
                keep = keep * (np.abs(d).sum() / np.abs(keep).sum())
            new.append(keep)
        result.append(new)
    return result


def crumbs(table: Table, density: float, outliers: float) -> Table:
    def row_of(x: Matrix) -> Matrix:
        n = len(x)
        order = sorted(range(n), key=lambda c: -abs(x[c]))[int(n * outliers) :]
        keep = order[: kept(density, n)]
        return np.array([x[c] if c in keep else 0.0 for c in range(n)])

    return [[np.stack([row_of(x) for x in d]) for d in row] for row in table]


def band(table: Table, density: float, outliers: float) -> Table:
    def trimmed(d: Matrix) -> Matrix:
        flat = d.flatten()
        n = len(flat)
        keep = int(density * n)
        top = min(int(outliers * n), n - keep)
        order = np.argsort(np.abs(flat))[::-1][top : top + keep]
        new = np.zeros(n)
        new[order] = flat[order]
        return new.reshape(d.shape)

    return [[trimmed(d) for d in row] for row in table]


def sce(table: Table, select_topk: float) -> list[Matrix]:
    result = []
    for row in table:
        d = np.stack(row)
        if select_topk < 1.0:
            variance = d.var(axis=0).flatten()
            keep = int(select_topk * np.count_nonzero(variance))
            mask = np.zeros(len(variance))
            mask[np.argsort(variance)[::-1][:keep]] = 1.0
            d = d * mask.reshape(d.shape[1:])
        energy = (d**2).mean(axis=(1, 2))
        share = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(d), 1 / len(d))
        elected = np.where(d.sum(axis=0) >= 0, 1.0, -1.0)
        agree = (np.sign(d) == elected) * share[:, None, None]
        result.append((agree * d).sum(axis=0) / np.maximum(agree.sum(axis=0), 1e-6))
    return result


def consensus(table: Table, threshold: Sequence[float], agree: int) -> list[Matrix]:
    result = []
    for row in table:
        total = add([row], [1.0] * len(row))[0]
        votes = sum(np.abs(d) > t * np.abs(total - d) for d, t in zip(row, threshold, strict=True))
        result.append(np.where(votes >= agree, total, 0.0))
    return result


def pcb(
    stacks: Sequence[Stack], table: Table, weights: Sequence[float], density: float, clamp: float
) -> list[Matrix]:
    """PCB over the whole model; adapters have no entries in modules they lack."""
    count = len(weights)
    totals = add(table, [1.0] * count)
    top = [np.zeros(row[0].shape) for row in table]
    bottom = [np.zeros(row[0].shape) for row in table]
    for i in range(count):
        here = [m for m, s in enumerate(stacks) if s.factors[i] is not None]
        flat = np.concatenate([table[m][i].flatten() for m in here])
        others = np.concatenate([totals[m].flatten() for m in here])
        n = len(flat)
        sizes = np.sort(np.abs(flat))
        out = int(clamp * n)
        low, high = sizes[out], sizes[n - 1 - out]
        size = np.abs(flat).clip(low, high)
        intra = np.exp(count * ((size - low) / (high - low)) ** 2)
        score = intra * np.tanh(flat * others)
        order = np.sort(score)[::-1]
        level = order[min(n - 1, kept(density, n))]
        gain = (score.clip(level) - level) / (order[0] - level)
        clamped = np.sign(flat) * size
        at = 0
        for m in here:
            entries = table[m][i].size
            shape = table[m][i].shape
            g = gain[at : at + entries].reshape(shape)
            top[m] += weights[i] * g * clamped[at : at + entries].reshape(shape)
            bottom[m] += g
            at += entries
    return [t / np.maximum(b, 1e-12) for t, b in zip(top, bottom, strict=True)]
