"""`merge_adapters`: any method of the registry, from a live model to a new adapter in it."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import Tensor

from . import card, checkpoint, export, files
from .carried import fill
from .combine import Combiner
from .errors import AdapterError, ConfigError, suggest
from .factors import Adapter
from .layers import layer_of
from .lowrank import LowRank, Rank, low_rank_of_dense, low_rank_of_product
from .methods.depth import Lines
from .methods.registry import MethodInfo, describe, get_method
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
from .spool import waiting

__all__ = ["AdapterMerge", "merge_adapters", "run"]


@dataclass(frozen=True, eq=False)
class AdapterMerge:
    """A finished merge by a method of the registry.

    Attributes:
        adapter_name: name of the merged adapter in `model`; frozen, and not active.
        model: the model it was added to.
        method: what was done.
        weights: adapter -> weight, in the user's order.
        options: the method's options, defaults included.
        space: where it was done.
        seed: what random masks were drawn from.
        modules: per module, the rank and the error of the adapter against the exact result.
        rank: the adapter's rank.
        notes: what had to be done differently (an SVD that did not converge); usually empty.
        fitted: what the method learned from data (`Fitted.report`); {} if it needed none.
        seconds: wall time.
    """

    adapter_name: str
    model: PeftModel
    method: MethodInfo
    weights: Mapping[str, float]
    options: Mapping[str, Any]
    space: str
    seed: int
    modules: tuple[ModuleError, ...]
    rank: int
    notes: tuple[str, ...]
    fitted: Mapping[str, Any]
    seconds: float
    _deltas: Callable[[], Iterator[tuple[str, Delta]]] = field(repr=False)
    _sources: Mapping[str, tuple[Adapter, int]] = field(repr=False)
    _carried: Mapping[str, Any] = field(repr=False)

    @property
    def export_error(self) -> float:
        """Relative Frobenius error of the adapter over all modules together."""
        whole = sum(m.norm**2 for m in self.modules)
        lost = sum((m.error * m.norm) ** 2 for m in self.modules)
        return float((lost / whole) ** 0.5) if whole else 0.0

    def delta(self, module: str) -> Tensor:
        """Return the exact merged delta of one module, (out, in), which the adapter approximates.

        The method runs again for it: free for sums, as long as the merge for the others.

        Raises:
            AdapterError: no adapter changes that module, or a source's weights have changed since.
        """
        self._check_sources()
        for found, delta in self._deltas():
            if found == module:
                return delta.dense()
        raise AdapterError(
            f"no module {module!r}.{suggest(module, [m.module for m in self.modules])}"
        )

    def _check_sources(self) -> None:
        for name, (adapter, version) in self._sources.items():
            if adapter.version() != version:
                raise AdapterError(
                    f"the weights of adapter {name!r} changed since the merge. Merge again, or "
                    f"keep a copy of the adapter."
                )

    def save(self, folder: str | Path, *, sources: Mapping[str, str | Path] | None = None) -> Path:
        """Write the merged adapter in PEFT's layout, report.json and the model card README.md.

        Args:
            folder: created if it is not there; files of these names are replaced.
            sources: adapter -> folder it was loaded from, as far as you like: licences that their
                model cards name go into ours.

        Returns:
            The folder. Load it with ``PeftModel.from_pretrained(base, folder)``.

        Raises:
            ConfigError: `sources` names another adapter.
        """
        licences = card.licences_of(sources, self._sources)
        target = Path(folder)
        facts = self.to_dict()
        text = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
        files.write_text(target / "report.json", text + "\n")
        base = self.model.peft_config[self.adapter_name].base_model_name_or_path
        files.write_text(target / "README.md", card.render_card(facts, base, licences))
        return export.save_adapter(self.model, self.adapter_name, target)

    def save_merged(self, base: str | Path, folder: str | Path) -> Path:
        """Write base + exact merged delta as a full checkpoint, streamed from the folder `base`.

        The method runs once more. Deltas that are no product of thin factors wait on disk, beside
        the checkpoint, for their turn.

        Raises:
            ConfigError: the adapter also holds what is no delta (saved modules, trained tokens,
                biases), or `base` is no plain checkpoint.
            AdapterError: a source's weights have changed since the merge.
            PlanError: `base` is not the adapters' base.
        """
        self._check_sources()
        if self._carried:
            raise ConfigError(
                f"the merged adapter also holds {', '.join(self._carried)}, which are no deltas of "
                f"base weights. Use model.merge_and_unload() for them."
            )
        combiner = Combiner([adapter for adapter, _ in self._sources.values()])
        parent = Path(folder).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent) as spool:
            blocks = waiting(self._deltas, spool)
            return checkpoint.save_checkpoint(base, combiner, blocks, folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the merge as plain JSON values; the content of report.json."""
        return {
            "format": "peft_himerge.adapter_merge/1",
            "adapter_name": self.adapter_name,
            "method": {
                "name": self.method.name,
                "title": self.method.title,
                "url": self.method.url,
                "variant": self.method.variant,
            },
            "weights": dict(self.weights),
            "options": dict(self.options),
            "space": self.space,
            "seed": self.seed,
            "sources": {name: adapter.digest() for name, (adapter, _) in self._sources.items()},
            "export": {
                "rank": self.rank,
                "relative_error": self.export_error,
                "modules": [
                    {"module": m.module, "rank": m.rank, "relative_error": m.error}
                    for m in self.modules
                ],
            },
            "notes": list(self.notes),
            "fitted": dict(self.fitted),
            "seconds": self.seconds,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "peft": peft.__version__,
            },
        }


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
    eval_fns: Mapping[str, Callable[[Any], Any]] | None = None,
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
        eval_fns: adapter -> what scores the model on its task, higher is better; for methods whose
            `needs` is "scores".
        inputs: adapter -> batches of its task (dicts of tensors, as the model takes them); for
            methods whose `needs` is "inputs" or "gradients".
        **options: the method's own.

    Returns:
        An `AdapterMerge`: method, options, rank, error per module; ``save(folder)``.

    Raises:
        ConfigError: an argument is not allowed; nothing was touched.
        AdapterError: an adapter cannot be merged exactly; nothing was touched.
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
    evidence = gather(model, names, inputs, request.carried.settings, seed)
    return run(model, adapter_name, request, start, evidence)


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


def _compressed(request: Request) -> dict[str, LowRank]:
    """Run the method, and compress one module after the other."""
    todo = {stack.module: stack for stack in request.stacks}
    total = max(sum(stack.ranks) for stack in request.stacks)
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
