"""Coefficients that depend on the layer: who has which layer, and how much deeper ones count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError, suggest
from ..layers import OUTSIDE, group_modules
from .check import number, whole
from .linear import products, weighted_sum
from .registry import method
from .stack import Delta, Dense, Result, Stack

__all__ = ["Lines", "layer_assignment", "lines", "lines_factors", "zones"]


_ENTRIES = 1 << 18  # of a product held at once


def zones(
    layers: Iterable[str],
    *,
    outer: str,
    inner: str,
    bottom: int = 5,
    top: int = 2,
    transition: int = 1,
) -> dict[str, dict[str, float]]:
    """Return a `layer_assignment` with one adapter at both ends of the model, one in the middle.

    Source: the idea of Layer Swapping (arXiv 2410.01335): a language adapter in the outermost
    blocks, a task adapter between them, half of each in the blocks next to the border. The numbers
    are those reported for 32 blocks; we could not check them against the authors' code, so scale
    them with the depth of your model. Layers outside any block go to `inner`.

    Args:
        layers: layer labels; their order does not matter.
        outer: adapter of the `bottom` first and `top` last blocks.
        inner: adapter of the blocks between.
        bottom: number of blocks.
        top: number of blocks.
        transition: number of blocks next to each zone that take half of both.

    Raises:
        ConfigError: the zones need more blocks than there are, or the model has blocks of more
            than one kind (encoder and decoder).
    """
    for name, value in (("bottom", bottom), ("top", top), ("transition", transition)):
        whole(name, value)
    labels = sorted(set(layers))
    blocks = [g.label for g in group_modules(f"{label}.x" for label in labels if label != OUTSIDE)]
    kinds = {label.rpartition(".")[0] for label in blocks}
    if len(kinds) > 1:
        raise ConfigError(
            f"zones need blocks of one kind, the model has {sorted(kinds)}. Write the assignment "
            f"by hand."
        )
    count = len(blocks)
    needed = bottom + top + transition * ((bottom > 0) + (top > 0))
    if needed > count:
        raise ConfigError(
            f"bottom={bottom}, top={top} and transition={transition} need {needed} blocks, the "
            f"adapters change {count}."
        )
    assignment: dict[str, dict[str, float]] = {}
    for place, label in enumerate(blocks):
        from_top = count - 1 - place
        swapped = place < bottom or from_top < top
        border = (bottom and place < bottom + transition) or (top and from_top < top + transition)
        share = 1.0 if swapped else 0.5 if border else 0.0
        assignment[label] = {outer: share, inner: 1.0 - share}
    if OUTSIDE in labels:
        assignment[OUTSIDE] = {outer: 0.0, inner: 1.0}
    return assignment


@method(
    "layer_assignment",
    title="Layer assignment",
    url="https://arxiv.org/abs/2410.01335",
    variant="ours: after Layer Swapping",
    low_rank=True,
)
def layer_assignment(
    stacks: Sequence[Stack],
    *,
    assignment: Mapping[str, Mapping[str, float]],
    default: Mapping[str, float] | None = None,
    lam: float = 1.0,
) -> Result:
    """Take each layer from the adapters you say: ``M_l = lam * sum_i c[l][i] D_i``.

    Ours, a general form of Layer Swapping (arXiv 2410.01335), whose paper we could not check
    line by line and whose code is not public; `zones` makes its assignment.

    Args:
        stacks: the modules.
        assignment: layer label ("model.layers.3", "outside") -> adapter -> coefficient; adapters
            that are not named get 0.
        default: coefficients of the layers that are not named; without it every layer must be.
        lam: factor on the result.

    Raises:
        ConfigError: a layer or an adapter is unknown, or a layer is not named.
    """
    lam = number("lam", lam)
    layers = {stack.layer for stack in stacks}
    for layer, row in assignment.items():
        if layer not in layers:
            raise ConfigError(
                f"assignment names the layer {layer!r}.{suggest(layer, sorted(layers))}"
            )
        _check_row(row, stacks[0].names, f"assignment[{layer!r}]")
    if default is not None:
        _check_row(default, stacks[0].names, "default")
    unnamed = sorted(layers - set(assignment))
    if default is None and unnamed:
        raise ConfigError(
            f"assignment says nothing about the layer {unnamed[0]!r}; name it, or give default=..."
        )
    for stack in stacks:
        row = assignment.get(stack.layer, default or {})
        shares = [lam * row.get(name, 0.0) for name in stack.names]
        yield stack.module, weighted_sum(stack, products(shares, stack.weights))


def _check_row(row: Mapping[str, float], names: Sequence[str], where: str) -> None:
    for name, value in row.items():
        if name not in names:
            raise ConfigError(f"{where} names the adapter {name!r}.{suggest(name, names)}")
        number(f"{where}[{name!r}]", value)


def lines_factors(
    layers: Iterable[str], *, first: float, last: float | None = None
) -> dict[str, float]:
    """Return LiNeS' factor of every layer: `first` for the first block, rising to `last`.

    ``scale(l) = first + (last - first) * l / (L - 1)`` for block l of L; layers outside any block
    get `first`. Source: arXiv 2410.17146, equation of layer scaling (alpha = first, beta = last -
    first). Where we differ: blocks are counted within their own stack (encoder, decoder), found by
    name, never by substring; one block alone gets `first`.

    Args:
        layers: layer labels.
        first: factor of the first block.
        last: factor of the last block; 1 by default.
    """
    first = number("first", first)
    rise = (1.0 if last is None else number("last", last)) - first
    labels = sorted(set(layers))
    factors = dict.fromkeys(labels, first)
    stacks: dict[str, list[str]] = {}
    for group in group_modules(f"{label}.x" for label in labels if label != OUTSIDE):
        stacks.setdefault(group.label.rpartition(".")[0], []).append(group.label)
    for blocks in stacks.values():
        for place, label in enumerate(blocks):
            if len(blocks) > 1:
                factors[label] = first + rise * place / (len(blocks) - 1)
    return factors


@dataclass(frozen=True, slots=True)
class Lines:
    """LiNeS on top of any method's result M.

    Attributes:
        first: factor of the first block; by default ``(||sum_i D_i||_1 / ||M||_1) / T`` with the
            norms over the whole model and D_i the weighted deltas, as the authors have it. This
            takes a pass over all deltas.
        last: factor of the last block; 1 by default (ours: the authors tune it on validation data).
    """

    first: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))

    def norm_of(self, delta: Delta) -> float:
        """Return what the L1 norm of one module's result adds; 0 if it is not needed."""
        if self.first is not None:
            return 0.0
        if isinstance(delta, Dense):
            return float(delta.delta.abs().sum(dtype=torch.float64))
        step = max(1, _ENTRIES // max(1, delta.a.shape[1]))
        pieces = (b @ delta.a for b in torch.split(delta.b, step))
        return sum(float(x.abs().sum(dtype=torch.float64)) for x in pieces)

    def scales(self, stacks: Sequence[Stack], norm: float) -> dict[str, float]:
        """Return the factor of every layer.

        Args:
            stacks: what was merged.
            norm: L1 norm of the result over the whole model, the sum of `norm_of`.
        """
        first = self.first
        if first is None:
            plain = sum(self.norm_of(weighted_sum(stack, stack.weights)) for stack in stacks)
            first = plain / norm / len(stacks[0].names) if norm else 1.0
        return lines_factors((s.layer for s in stacks), first=first, last=self.last)


@method(
    "lines",
    title="LiNeS",
    url="https://arxiv.org/abs/2410.17146",
    variant="authors",
    low_rank=True,
)
def lines(
    stacks: Sequence[Stack], *, first: float | None = None, last: float | None = None
) -> Result:
    """Add the deltas up and scale each layer, more the deeper it is.

    `task_arithmetic` with `lines_factors` on top. ``post="lines"`` of `merge_adapters` does the
    same on top of any other method.

    Args:
        stacks: the modules.
        first: factor of the first block; 1/T by default, as the authors have it for a sum.
        last: factor of the last block; 1 by default (ours: the authors tune it on validation data).
    """
    start = 1.0 / len(stacks[0].names) if first is None else first
    factors = lines_factors((s.layer for s in stacks), first=start, last=last)
    for stack in stacks:
        scale = factors[stack.layer]
        yield stack.module, weighted_sum(stack, [scale * w for w in stack.weights])
