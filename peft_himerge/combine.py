"""(adapters, plan) -> merged delta, one module at a time. The only sum over adapters.

`Combiner` turns a plan into `Term`s: for each module, which adapters take part, the magnitude
below which their entries are dropped, and the factor on the rest. Equal terms mean equal weights,
which is how the live-model room knows what it need not touch. Cuts are exact (`select`) and each
is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from .errors import PlanError, suggest
from .factors import Adapter, Kind, LoraFactors, as_matrix, working_dtype
from .layers import OUTSIDE, LayerGroup, group_modules, layer_of
from .plan import DROP, MOST_SCALE, Edit, MergePlan
from .select import prune_, thresholds

__all__ = ["Combiner", "DeltaLike", "Term", "add_to_weight"]


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's part in one module: ``scale * delta`` where ``|delta| >= cut``, else 0."""

    adapter: str
    cut: float
    scale: float


class DeltaLike(Protocol):
    """One module's delta from elsewhere than a plan."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, fresh tensor of the delta's rows), all rows once."""

    def dense(self) -> Tensor:
        """Return the (out, in) delta."""


class Combiner:
    """The merged deltas of any plan over a fixed set of adapters.

    Args:
        adapters: the adapters, in any order; sums always run in the order of their names, so the
            result does not depend on it.
    """

    def __init__(self, adapters: Iterable[Adapter]) -> None:
        self.adapters: Mapping[str, Adapter] = MappingProxyType(
            {a.name: a for a in sorted(adapters, key=lambda a: a.name)}
        )
        names = {m for a in self.adapters.values() for m in a.factors}
        self.layers: tuple[LayerGroup, ...] = group_modules(names)
        self._members = {layer.label: layer.modules for layer in self.layers}
        self._cuts: dict[tuple[str, str, float, float], Mapping[str, float]] = {}

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that some adapter changes, layer by layer."""
        return tuple(m for layer in self.layers for m in layer.modules)

    def in_order(self) -> tuple[LayerGroup, ...]:
        """Return the layers in the order they are run: `outside` first if it has embeddings."""
        last = self.layers[-1]
        if last.label == OUTSIDE and any(self.kind(m) == "embedding" for m in last.modules):
            return (last, *self.layers[:-1])
        return self.layers

    def table(self) -> dict[str, tuple[str, ...]]:
        """Return layer label -> the adapters that have modules in that layer."""
        return {
            layer.label: tuple(
                name
                for name, adapter in self.adapters.items()
                if any(m in adapter.factors for m in layer.modules)
            )
            for layer in self.layers
        }

    def plan(self, edits: Mapping[str, Edit], *, prune_scope: str = "model") -> MergePlan:
        """Return the model-wise plan of these adapters with the given edits."""
        sources = {name: self.adapters[name].digest() for name in edits}
        return MergePlan.model_wise(self.table(), edits, prune_scope=prune_scope, sources=sources)

    def check(self, plan: MergePlan) -> None:
        """Refuse a plan that was made for other adapters.

        Raises:
            PlanError: the plan names an adapter or a layer that is not here, lacks one that is,
                holds the digest of other weights, or scales by more than `MOST_SCALE`.
        """
        layers = self.table()
        for layer, name, edit in plan.live():
            scale = plan.adapters[name].scale * edit.scale
            if not abs(scale) <= MOST_SCALE:
                raise PlanError(
                    f"the plan scales adapter {name!r} by {scale:g} in layer {layer!r}; allowed "
                    f"are at most {MOST_SCALE:g} either way."
                )
        for name in plan.adapters:
            if name not in self.adapters:
                raise PlanError(
                    f"the plan merges the adapter {name!r}, which was not given."
                    f"{suggest(name, self.adapters)}"
                )
        for layer in plan.edits:
            if layer not in layers:
                raise PlanError(
                    f"the plan edits the layer {layer!r}, where no adapter has a module."
                    f"{suggest(layer, layers)}"
                )
        for layer, names in layers.items():
            for name in names:
                if name in plan.adapters and name not in plan.edits.get(layer, {}):
                    raise PlanError(
                        f"the plan says nothing about the adapter {name!r} in layer {layer!r}, "
                        f"where it has modules: it was made for another adapter."
                    )
        for name, digest in plan.sources.items():
            if name in self.adapters and self.adapters[name].digest() != digest:
                raise PlanError(
                    f"the weights of adapter {name!r} are not those the plan was made for "
                    f"(digest {digest[:12]}…). Use the original adapter (for a merge of focused "
                    f"ones those in the folder 'focused' beside the plan), or drop 'sources' from "
                    f"the plan to apply it all the same."
                )

    def prepare(self, adapter: str, densities: Iterable[float], scope: str = "model") -> None:
        """Compute the model-wise cuts of all `densities` of one adapter in shared passes."""
        missing = [p for p in sorted(set(densities)) if (adapter, scope, p, 1.0) not in self._cuts]
        factors = self.adapters[adapter].factors
        cuts: dict[float, dict[str, float]] = {p: {} for p in missing}
        for group in self._groups(adapter, scope) if missing else ():
            found = thresholds([(factors[m], 0.0) for m in group], missing)
            for density, tau in found.items():
                cuts[density].update(dict.fromkeys(group, tau))
        for density in missing:
            self._cuts[adapter, scope, density, 1.0] = cuts[density]

    def cut(self, adapter: str, module: str, scope: str, whole: float, layer: float) -> float:
        """Return the magnitude below which `adapter`'s entries of `module` are dropped.

        Args:
            adapter: adapter name.
            module: module path.
            scope: what the model-wise density counts over.
            whole: model-wise density p.
            layer: layer-wise density p_l, counted over the layer's entries of delta' (zeros
                included), so it removes nothing where the model-wise step left fewer.
        """
        self.prepare(adapter, [whole], scope)
        first = self._cuts[adapter, scope, whole, 1.0]
        if layer == 1.0:
            return first[module]
        label = layer_of(module)
        key = (adapter, f"{scope}/{label}", whole, layer)
        if key not in self._cuts:
            factors = self.adapters[adapter].factors
            members = [m for m in self._members[label] if m in factors]
            tau = thresholds([(factors[m], first[m]) for m in members], [layer])[layer]
            self._cuts[key] = {m: max(tau, first[m]) for m in members}
        return self._cuts[key][module]

    def _groups(self, adapter: str, scope: str) -> list[list[str]]:
        modules = list(self.adapters[adapter].factors)
        if scope == "model":
            return [modules]
        if scope == "module":
            return [[m] for m in modules]
        return [list(layer.modules) for layer in group_modules(modules)]

    def terms(self, plan: MergePlan, module: str) -> tuple[Term, ...]:
        """Return what `plan` adds to the weight of `module`; empty if nothing."""
        row = plan.edits.get(layer_of(module), {})
        terms = []
        for name, adapter in self.adapters.items():
            edit, whole = row.get(name, DROP), plan.adapters.get(name, DROP)
            if module not in adapter.factors or edit.drops or whole.drops:
                continue
            cut = self.cut(name, module, plan.prune_scope, whole.density, edit.density)
            if not math.isinf(cut):
                terms.append(Term(name, cut, whole.scale * edit.scale))
        return tuple(terms)

    def factors(self, module: str, terms: Sequence[Term]) -> list[tuple[LoraFactors, Term]]:
        """Return the factors and terms that add up to the delta of `module`."""
        return [(self.adapters[t.adapter].factors[module], t) for t in terms]

    def kind(self, module: str) -> Kind:
        """Return how `module` stores its weight."""
        return next(a.factors[module].kind for a in self.adapters.values() if module in a.factors)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (out, in) of `module`'s delta."""
        return next(a.factors[module].shape for a in self.adapters.values() if module in a.factors)

    def blocks(self, module: str, terms: Sequence[Term]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, merged delta of those rows) in the working dtype, block by block."""
        parts = self.factors(module, terms)
        if not parts:
            return
        dtype = working_dtype(*(f.dtype for f, _ in parts))
        for pieces in zip(*(f.blocks() for f, _ in parts), strict=True):
            total: Tensor | None = None
            for (_, block), (_, term) in zip(pieces, parts, strict=True):
                kept = prune_(block, term.cut).to(dtype)
                total = (
                    kept.mul_(term.scale) if total is None else total.add_(kept, alpha=term.scale)
                )
            assert total is not None
            yield pieces[0][0], total

    def delta(self, module: str, terms: Sequence[Term]) -> Tensor:
        """Return the merged delta of one module, dense (out, in); zeros where nothing is added."""
        held = [a.factors[module] for a in self.adapters.values() if module in a.factors]
        dtype = working_dtype(*(f.dtype for f in held))
        # Zeroing what is filled next would be one more pass over all of it.
        dense = new_dense(self.shape(module), dtype, held[0].b.device, zero=not terms)
        for rows, block in self.blocks(module, terms):
            dense[rows] = block
        return dense


def add_to_weight(weight: Tensor, kind: Kind, blocks: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """Return weight + delta in the weight's dtype and layout, without a dense delta.

    Args:
        weight: the base weight; not written to.
        kind: how it is stored.
        blocks: the delta as (rows, fresh tensor of those rows), which is overwritten; all rows or
            none.
    """
    new = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, target = as_matrix(weight, kind), as_matrix(new, kind)
    empty = True
    for rows, block in blocks:
        # The sum is taken in the wider of both dtypes, and rounded once.
        local = block.to(weight.device, torch.promote_types(block.dtype, weight.dtype))
        target[rows] = local.add_(source[rows])
        empty = False
    return new.copy_(weight) if empty else new


def new_dense(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device | None, *, zero: bool = True
) -> Tensor:
    """Allocate one module's dense delta, (out, in), as zeros or to be filled: the only place."""
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)
