"""Adapters that act only where their own task's inputs are: what is left of most interference.

Two adapters hurt each other because each also answers to the other's inputs. Focusing gives every
adapter the part of RegMean's solution that is its own,

    D_i' = D_i G_i (sum_j G_j)^-1          G_i = X_i^T X_i, the inputs of the module on task i,

which is D_i itself on directions that only task i uses, 0 on those that only others use, and their
share in between. The sum of the focused deltas is RegMean's merge. D_i' = B_i (A_i G_i (...)^-1)
keeps its rank, so a focused adapter is a LoRA adapter like any other, and all that follows (density
and scale, contributions, repair) works on it as it is.

The inputs are measured twice, alone and in the model merged by then, and in the second round an
adapter's errors count relative to its own effect, unless RegMean's options say otherwise.

Source: RegMean (arXiv 2212.09849), equation 3, in rounds after RegMean++ (arXiv 2508.03121); taking
it apart by adapter, to merge the parts by Hi-Merging, is ours. Labels are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch.nn.functional import pad

from . import export
from .combine import Combiner
from .factors import Adapter, LoraFactors
from .interrupts import heard, held
from .lowrank import LowRank, low_rank_of_product
from .methods.registry import get_method
from .methods.stack import Factored
from .mixture import gather
from .names import check_adapter_names, check_new_name
from .probe import Probe, preserved
from .request import Request, check_evidence, check_present, prepare
from .scoring import EvalFn

__all__ = [
    *("USUAL", "Parts", "focus_adapters", "focused_parts", "recalled", "refocused"),
    *("remember", "write_focused"),
]

Parts = Mapping[str, LowRank]
"""Module -> an adapter's own part of RegMean's solution."""

USUAL: Mapping[str, Any] = {"rounds": 2, "relative": True}
"""RegMean's options when adapters are focused and nothing else is said."""

_LATEST: WeakKeyDictionary[PeftModel, dict[str, Adapter]] = WeakKeyDictionary()


@held()
def focus_adapters(
    model: PeftModel,
    adapters: Sequence[str],
    inputs: Mapping[str, Iterable[Any] | EvalFn],
    *,
    suffix: str = "_focused",
    **options: Any,
) -> dict[str, str]:
    """Add, for each adapter, one that acts only where its own task's inputs are.

    Merge these instead of the adapters themselves::

        focused = focus_adapters(model, ["en", "zh"], eval_fns)
        merge_adapters_hi(
            model, list(focused.values()), {focused[n]: fn for n, fn in eval_fns.items()}
        )

    Alone, a focused adapter is weaker than its source: it leaves to the others what is theirs.

    Args:
        model: a PeftModel with the adapters loaded; comes back bit-identical but for the new
            adapters, which are frozen and not active.
        adapters: names of the adapters, at least one, each once.
        inputs: adapter -> batches (dicts of tensors that the model takes) of its own task; or the
            task's eval function, which is run once to see what it gives the model. No labels are
            needed. A few dozen examples are enough.
        suffix: what the new names end with.
        options: RegMean's `off_diagonal`, `ridge`, `gram_gib`, `rounds` and `relative`, of which
            the last two are 2 and True here; ``rounds=1, relative=False`` is RegMean as published.

    Returns:
        adapter -> name of its focused adapter.

    Raises:
        ConfigError: an argument is not allowed, or a name is taken; nothing was touched.
        AdapterError: an adapter is not there, or not plain LoRA.
    """
    names = check_adapter_names(adapters)
    made = {name: f"{name}{suffix}" for name in names}
    taken = model.peft_config if isinstance(model, PeftModel) else ()
    for new in made.values():
        check_new_name(new, taken, f"call model.delete_adapter({new!r}) first, or give a suffix")
    request, parts = _measured(model, names, inputs, options)
    with preserved(model), torch.no_grad():
        added: list[str] = []
        try:
            for adapter in request.adapters:
                new = made[adapter.name]
                added.append(new)
                export.add_adapter(model, new, Combiner([adapter]), parts[adapter.name])
        except BaseException:
            for new in added:
                export.remove_adapter(model, new)
            raise
    return made


def focused_parts(
    model: PeftModel, names: Sequence[str], inputs: Mapping[str, Iterable[Any] | EvalFn]
) -> dict[str, dict[str, LowRank]]:
    """Return adapter -> its focused factors, on the CPU, and add nothing to the model.

    Args:
        model: as for `focus_adapters`; comes back as it was.
        names: the adapters.
        inputs: as for `focus_adapters`.

    Raises:
        ConfigError, AdapterError: as `focus_adapters`.
    """
    _, parts = _measured(model, names, inputs, {})
    return {
        name: {m: LowRank(p.b.cpu(), p.a.cpu(), p.error, p.norm) for m, p in own.items()}
        for name, own in parts.items()
    }


def refocused(source: Adapter, parts: Parts) -> Adapter:
    """Return the adapter with focused factors in place of its own, as they would be stored."""
    rank = max([1, *(part.rank for part in parts.values())])
    factors = {}
    for module, part in parts.items():
        own = source.factors[module]
        dtype = torch.promote_types(own.a.dtype, own.b.dtype)
        a, b = (x.to(own.a.device, dtype) for x in (part.a, part.b))
        b, a = pad(b, (0, rank - part.rank)), pad(a, (0, 0, 0, rank - part.rank))
        # In the layout that they are read back in, since products depend on it in the last bit.
        factors[module] = LoraFactors(a.contiguous(), b.contiguous(), 1.0, own.kind, own.kernel)
    return Adapter(source.name, factors, source.base, source.settings, focused=True)


def remember(model: PeftModel, adapters: Sequence[Adapter]) -> None:
    """Keep focused adapters as long as the model lives, the latest of each name."""
    _LATEST.setdefault(model, {}).update({adapter.name: adapter for adapter in adapters})


def recalled(
    model: PeftModel, read: Sequence[Adapter], sources: Mapping[str, str]
) -> list[Adapter]:
    """Return each adapter, or the focused one of its name whose digest is the one asked for.

    Args:
        model: holds the adapters.
        read: what it holds.
        sources: adapter -> digest, as plans tell them.
    """
    kept = _LATEST.get(model, {})
    focused = {n: a for n, a in kept.items() if n in sources and a.digest() == sources[n]}
    return [focused.get(adapter.name, adapter) for adapter in read]


def write_focused(model: PeftModel, adapter: Adapter, folder: Path) -> None:
    """Write a `refocused` adapter to a new folder in PEFT's layout, bit by bit.

    PEFT writes what a model holds, so it is in the model for the while, inactive.
    """
    parts = {m: LowRank(f.b, f.a, 0.0, 0.0) for m, f in adapter.factors.items()}
    name = next(n for n in map("focused_{}".format, range(1 << 30)) if n not in model.peft_config)
    folder.mkdir(parents=True)
    with preserved(model):
        try:
            export.add_adapter(model, name, Combiner([adapter]), parts)
            export.write_adapter(model, name, folder)
        finally:
            export.remove_adapter(model, name)


def _measured(
    model: PeftModel,
    names: Sequence[str],
    inputs: Mapping[str, Iterable[Any] | EvalFn],
    options: Mapping[str, Any],
) -> tuple[Request, dict[str, dict[str, LowRank]]]:
    """Run the model on the inputs and take RegMean's solution apart."""
    check_present(model, names)
    method = get_method("regmean")
    check_evidence(method, inputs=inputs)
    weights = dict.fromkeys(names, 1.0)
    request = prepare(model, method, weights, options={**USUAL, **options}, policy="error")
    probe = Probe(model, Combiner(request.adapters))  # refuses what does not fit, before any run
    evidence = gather(model, names, inputs, request.carried.settings, 0)
    assert evidence is not None
    with preserved(model), torch.no_grad():
        request = request.fit(evidence(probe))
        with heard():
            return request, _apart(request)


def _apart(request: Request) -> dict[str, dict[str, LowRank]]:
    """Return adapter -> module -> its own part of RegMean's solution."""
    parts: dict[str, dict[str, LowRank]] = {a.name: {} for a in request.adapters}
    stacks = {stack.module: stack for stack in request.stacks}
    for module, delta in request.deltas():
        assert isinstance(delta, Factored)
        at = 0
        for name, rank in zip(stacks[module].names, stacks[module].ranks, strict=True):
            own = slice(at, at + rank)
            at += rank
            if rank:
                b, a = delta.b[:, own], delta.a[own]
                parts[name][module] = low_rank_of_product(b, a, "exact")
    return parts
