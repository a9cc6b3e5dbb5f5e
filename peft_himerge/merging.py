"""`merge_adapters`: any method of the registry, from a live model to a new adapter in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from . import export
from .byhi import HI, merge_by_hi
from .carried import fill
from .combine import Combiner
from .errors import AdapterError, ConfigError
from .interrupts import heard, held
from .layers import layer_of
from .lowrank import LowRank, Rank, low_rank_of_dense, low_rank_of_product
from .merged import AdapterMerge
from .methods.depth import Lines
from .methods.registry import MethodInfo, describe, get_method
from .methods.registry import list_methods as list_methods
from .methods.stack import Delta, Factored, Stack
from .mixture import gather
from .overwrite import taking_over
from .probe import Probe, preserved
from .request import (
    Request,
    check_evidence,
    check_names,
    check_pad,
    check_post,
    check_rank,
    check_weights,
    prepare,
)
from .result import ModuleError
from .scoring import EvalFn
from .trials import Trials, tasks_of

# `list_methods` is handed on from here, where all are known: `byhi` registers one more.
__all__ = ["AdapterMerge", "list_methods", "merge_adapters", "run", "scored"]


def merge_adapters(
    model: PeftModel,
    adapters: Sequence[str],
    method: str | Callable[..., Iterator[tuple[str, Delta]]] = "ties",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    adapter_name: str = "merged",
    space: str = "full",
    rank: int | float | str = "auto",
    pad_rank: int = 1,
    post: str | Lines | None = None,
    modules_to_save: str = "error",
    strict_base: bool = True,
    overwrite: bool = False,
    seed: int = 0,
    eval_fns: Mapping[str, EvalFn] | None = None,
    metric: str | Mapping[str, str] | None = None,
    inputs: Mapping[str, Iterable[Any]] | None = None,
    **options: Any,
) -> AdapterMerge:
    """Merge LoRA adapters of `model` by a method of the registry, on their true deltas.

    Args:
        model: a PeftModel with the adapters loaded; comes back bit-identical but for the new
            adapter, which is frozen and not active (``model.set_adapter(adapter_name)``).
        adapters: names of the adapters, at least one, each once. Their order does not matter, but
            for pairing with a list of weights.
        method: a name (`list_methods`), or a function of the same form: ``f(stacks, *, options)``
            that yields (module, delta).
        weights: one number per adapter, as a list or by name; 1.0 each by default. Negative ones
            subtract.
        adapter_name: name of the new adapter.
        space: "full"; or "knots" or "core": small coordinates in which methods that work entry by
            entry give an exact low-rank result.
        rank: the largest rank allowed; a share of the energy in (0, 1) to keep; "exact"; or "auto":
            exact where the method's result is a product of thin factors, otherwise the sum of the
            sources' ranks.
        pad_rank: pad the adapter with zeros up to this rank (for hot-swapping, or a server that
            wants one rank).
        post: "lines" or a `Lines`: scale the layers of the result, more the deeper (LiNeS).
        modules_to_save: what becomes of saved modules, trained token rows and LoRA biases:
            "error", or "sole", "first", "average" (`carried.carried_of`).
        strict_base: refuse adapters that name different base models.
        overwrite: replace an adapter of that name.
        seed: random masks depend on it and on the names of module and adapter, nothing else.
        eval_fns: adapter -> what scores the model on its task, higher is better (a number, or
            better one per example); for methods whose `needs` is "scores". Further names are guard
            tasks: scored at the end and reported.
        metric: which entry of a dict of metrics is the score: one name, or one per task.
        inputs: adapter -> batches of its task (dicts of tensors, as the model takes them), or the
            task's eval function, which is run once to see what it gives the model; for methods
            whose `needs` is "inputs" or "gradients".
        **options: the method's own.

    Returns:
        An `AdapterMerge`: method, options, rank, error per module; ``save(folder)``. For "hi", its
        `hi` is the `MergeResult`; journal and listeners are with `merge_adapters_hi`.

    Raises:
        ConfigError: an argument is not allowed; nothing was touched.
        AdapterError: an adapter cannot be merged exactly; nothing was touched.
        EvalError: an eval function returned no score; the model was put back.
    """
    start = time.perf_counter()
    names = check_names(model, adapters, adapter_name, overwrite=overwrite)
    of = check_weights(names, weights)
    if isinstance(method, str):
        info = get_method(method)
    elif callable(method):
        info = describe(method, getattr(method, "__name__", "custom"), elementwise=True)
    else:
        raise ConfigError(f"method must be a name or a function, got {method!r}.")
    check_evidence(info, eval_fns=eval_fns, inputs=inputs)
    if info is HI:
        unread: dict[str, Any] = {"space": (space, "full"), "pad_rank": (pad_rank, 1)}
        unread |= {"modules_to_save": (modules_to_save, "error"), "seed": (seed, 0)}
        unread |= {"post": (post, None)}
        unread |= {"strict_base": (strict_base, True)}
        options |= {"rank": rank, "metric": metric}
        return merge_by_hi(
            model, names, adapter_name, eval_fns or {}, options, weights=of, unread=unread
        )
    request = prepare(
        model,
        info,
        of,
        options=options,
        space=space,
        rank=check_rank(rank),
        post=check_post(post),
        policy=modules_to_save,
        strict_base=strict_base,
        least_rank=check_pad(pad_rank),
        seed=seed,
    )
    evidence: Callable[[Probe], Any] | None = scored(
        info, names, eval_fns, metric, request.carried.settings
    )
    if evidence is None:
        evidence = gather(model, names, inputs, request.carried.settings, seed)
    return run(model, adapter_name, request, start, evidence)


@held()
def run(
    model: PeftModel,
    adapter_name: str,
    request: Request,
    start: float,
    evidence: Callable[[Probe], Any] | None = None,
) -> AdapterMerge:
    """Run a checked merge, and only then add its result to the model.

    `evidence` makes what the method is fitted to, for methods that need scores, inputs or
    gradients.
    """
    combiner = Combiner(request.adapters)
    with taking_over(model, adapter_name) as made, preserved(model):
        probe = Probe(model, combiner)  # refuses deltas that don't fit the base's weights
        with torch.no_grad():
            if evidence is not None:
                request = request.fit(evidence(probe))
            with heard():
                parts = _compressed(request)
        rank = export.add_adapter(
            model,
            made,
            combiner,
            parts,
            least_rank=request.least_rank,
            settings=request.carried.settings,
        )
        fill(model, made, request.carried)
    return AdapterMerge(
        adapter_name=adapter_name,
        model=model,
        method=request.info,
        weights=request.weights,
        options=request.options,
        space=request.space,
        seed=request.seed,
        modules=tuple(ModuleError(m, p.rank, p.error, p.norm) for m, p in parts.items()),
        rank=rank,
        notes=tuple(f"{m}: {p.note}" for m, p in parts.items() if p.note),
        fitted=request.fitted.report if request.fitted else {},
        seconds=time.perf_counter() - start,
        _deltas=_exact(request),
        _sources={a.name: (a, a.version()) for a in request.adapters},
        _carried=request.carried.settings,
    )


def scored(
    info: MethodInfo,
    names: Sequence[str],
    eval_fns: Mapping[str, EvalFn] | None,
    metric: str | Mapping[str, str] | None,
    carried: Mapping[str, Any],
) -> Callable[[Probe], Trials] | None:
    """Return what makes the evidence of a method that needs scores; None for others.

    Raises:
        ConfigError: the eval functions do not fit the adapters, `metric` would not be read, or the
            adapters hold more than factors, which no score would show.
    """
    if info.needs == "scores":
        if carried:
            raise ConfigError(
                f"method {info.name!r} scores the model with deltas alone, but these adapters also "
                f"have {', '.join(carried)}. Choose a method that needs nothing."
            )
        return partial(Trials, tasks=tasks_of(names, eval_fns or {}, metric))
    if metric is not None:
        raise ConfigError(
            f"method {info.name!r} needs {info.needs}, so metric would not be read. Leave it out."
        )
    return None


def _compressed(request: Request) -> dict[str, LowRank]:
    """Run the method, and compress one module after the other."""
    todo = {stack.module: stack for stack in request.stacks}
    total = max([sum(stack.ranks) for stack in request.stacks], default=0)
    parts: dict[str, LowRank] = {}
    norm = 0.0
    for module, delta in request.deltas():
        stack = todo.pop(module, None)
        if stack is None:
            raise ConfigError(f"method {request.info.name!r} gave the module {module!r} twice.")
        held = (delta.a, delta.b) if isinstance(delta, Factored) else (delta.delta,)
        if not all(bool(torch.isfinite(x).all()) for x in held):
            raise AdapterError(
                f"method {request.info.name!r} gave NaN or infinity in module {module!r}."
            )
        part = _low_rank(stack, delta, request.rank, total)
        norm += request.post.norm_of(delta) if request.post else 0.0
        parts[module] = part if request.finish is None else request.finish(part)
    if todo:
        raise ConfigError(f"method {request.info.name!r} gave nothing for {next(iter(todo))!r}.")
    if request.post is not None:
        scales = request.post.scales(request.stacks, norm)
        parts = {m: _times(p, scales[layer_of(m)]) for m, p in parts.items()}
    return {module: parts[module] for module in sorted(parts)}


def _low_rank(stack: Stack, delta: Delta, rank: Rank, total: int) -> LowRank:
    if isinstance(delta, Factored):
        return low_rank_of_product(delta.b, delta.a, "exact" if rank == "auto" else rank)
    start = torch.cat([stack.scaled(i)[1] for i in stack.present])
    limit = total if rank == "auto" else rank
    return low_rank_of_dense(delta.delta, limit, start=start, name=stack.module)


def _times(part: LowRank, scale: float) -> LowRank:
    return replace(part, b=part.b * scale, norm=part.norm * abs(scale))


def _exact(request: Request) -> Callable[[], Iterator[tuple[str, Delta]]]:
    def deltas() -> Iterator[tuple[str, Delta]]:
        scales: Mapping[str, float] = {}
        if request.post is not None:
            norm = sum(request.post.norm_of(delta) for _, delta in request.deltas())
            scales = request.post.scales(request.stacks, norm)
        for module, delta in request.deltas():
            scale = scales.get(layer_of(module), 1.0)
            if isinstance(delta, Factored):
                yield module, Factored(delta.b * scale, delta.a)
            else:
                yield module, replace(delta, delta=delta.delta * scale)

    return deltas
