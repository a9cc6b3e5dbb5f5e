"""The method of Hi-Merging written down naively: dense, float64, one loop per sentence.

Derived from part 1 of the design alone (paper: arXiv 2506.12379, ACL 2025); shares no code with
the library. Every delta is held densely in the orientation (out, in), every threshold is a full
sort, and every score runs a fresh deep copy of the model. Section numbers in the docstrings are
those of the design: 1.1 prune and scale, 1.2 initial merge, 1.3 contributions, 1.4 elimination,
1.5 choices.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EvalFn = Callable[[Any], Any]
Deltas = dict[str, Tensor]  # module name -> (out, in); one adapter, or a merged state
Table = dict[str, Deltas]  # adapter name -> its deltas

OUTSIDE = "outside"


@dataclass(frozen=True)
class Contribution:
    """What one layer does for one task, alone and merged (1.3)."""

    layer: str
    task: str
    alpha_alone: float
    beta_alone: float
    alpha_merged: float
    beta_merged: float
    c_alone: float
    c_merged: float
    gamma: float
    gamma_se: float  # paired over examples; nan when there is one example only


@dataclass(frozen=True)
class Conflict:
    """What was decided and done in one layer (1.4)."""

    layer: str
    kind: str  # "severe", "partial" or "mutual"
    Gamma: float  # as first measured: it gives the order
    gammas: dict[str, float]  # those the kind was decided on
    kept: str | None  # severe: the one adapter that stays
    repruned: tuple[str, ...]  # partial: the adapters pruned and scaled again
    accepted: bool  # False only when accept="no_regression" took the edit back
    score_before: float | None  # mean over tasks; measured only with accept="no_regression"
    score_after: float | None


@dataclass(frozen=True)
class OracleResult:
    """Everything the method produces on its way."""

    thresholds: dict[str, dict[str, float]]  # adapter -> group ("model", a layer, a module) -> tau
    pruned: Table  # delta' of 1.1, per adapter
    contributions: dict[tuple[str, str], Contribution]  # (layer, task)
    conflicts: dict[str, Conflict]  # in the order in which the layers were treated
    edited: Table  # the deltas per adapter after 1.4
    deltas: Deltas  # the merged delta


# ------------------------------------------------------------------------------ deltas and layers


def deltas(model: PeftModel, name: str) -> Deltas:
    """Return ``scaling * B @ A`` of every module the adapter has, as float64 (out, in).

    ``scaling`` is computed from the adapter's config: alpha/r, or alpha/sqrt(r) with rsLoRA, where
    ``alpha_pattern`` and ``rank_pattern`` override alpha and r. A pattern's key fits a module if it
    matches the whole name or a dotted end of it. Factors of bare parameters are left out.
    """
    config = model.peft_config[name]
    result = {}
    for path, module in model.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}) and not isinstance(module, ParamWrapper):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        elif name in getattr(module, "lora_embedding_A", {}):
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            continue
        r = _pattern(config.rank_pattern, path, config.r)
        alpha = _pattern(config.alpha_pattern, path, config.lora_alpha)
        if a.shape[0] != r:
            raise AssertionError(f"{path}: A has rank {a.shape[0]}, the config says {r}")
        scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        result[path] = scaling * (b.detach().double().flatten(1) @ a.detach().double().flatten(1))
    return result


def _pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def weight_delta(module: nn.Module, delta: Tensor) -> Tensor:
    """Turn a delta (out, in) into the orientation in which ``module`` stores its weight.

    Linear stores (out, in); GPT-2's Conv1D stores (in, out); Embedding stores (tokens, width), that
    is (in, out), a token being a one-hot input; a convolution stores (out, in, *kernel).
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, nn.Linear):
        return delta
    if isinstance(base, (Conv1D, nn.Embedding)):
        return delta.T
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return delta.reshape(base.weight.shape)
    raise TypeError(f"the oracle knows no {type(base).__name__}")


def layer_of(module_name: str) -> str:
    """Return the block a module lies in: its path up to the first number, or "outside"."""
    parts = module_name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return OUTSIDE


def layers(model: PeftModel, table: Mapping[str, Deltas]) -> list[str]:
    """Return the layers with a delta of any adapter, in the order of the model, outside last."""
    adapted = {module for one in table.values() for module in one}
    found = [
        layer_of(path) for path, _ in model.base_model.model.named_modules() if path in adapted
    ]
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda layer: layer == OUTSIDE)  # stable


def only(state: Deltas, layer: str) -> Deltas:
    """Keep the deltas of one layer."""
    return {module: d for module, d in state.items() if layer_of(module) == layer}


def without(state: Deltas, layer: str) -> Deltas:
    """Drop the deltas of one layer."""
    return {module: d for module, d in state.items() if layer_of(module) != layer}


def plain_sum(table: Mapping[str, Deltas]) -> Deltas:
    """Add the adapters up, module by module (1.2: a plain sum, no averaging)."""
    total: Deltas = {}
    for one in table.values():
        for module, d in one.items():
            total[module] = total[module] + d if module in total else d.clone()
    return total


# ------------------------------------------------------------------------------- prune and scale


def threshold(state: Deltas, density: float) -> float:
    """Return the ceil(p*N)-th largest absolute entry (1.1); infinity for p = 0.

    p is taken as the decimal number it is written as, so that 0.1 of 10 entries is 1 entry.
    """
    entries = torch.cat([d.abs().flatten() for d in state.values()])
    rank = math.ceil(Fraction(str(float(density))) * entries.numel())
    if rank == 0:
        return math.inf
    return float(entries.sort(descending=True).values[rank - 1])


def _group(scope: str, module: str) -> str:
    return {"model": "model", "layer": layer_of(module), "module": module}[scope]


def thresholds(state: Deltas, density: float, scope: str = "model") -> dict[str, float]:
    """Return tau of each group: the whole model (key "model"), each layer, or each module."""
    groups: dict[str, Deltas] = {}
    for module, d in state.items():
        groups.setdefault(_group(scope, module), {})[module] = d
    return {group: threshold(members, density) for group, members in groups.items()}


def prune_and_scale(state: Deltas, p: float, s: float, scope: str = "model") -> Deltas:
    """Return ``s * delta * 1[|delta| >= tau]`` (1.1)."""
    tau = thresholds(state, p, scope)
    return {
        module: s * torch.where(d.abs() >= tau[_group(scope, module)], d, torch.zeros_like(d))
        for module, d in state.items()
    }


# ------------------------------------------------------------------------------------------ score


@torch.no_grad()
def score(model: PeftModel, eval_fn: EvalFn, dense: Deltas) -> np.ndarray:
    """Return the per-example scores of base + ``dense``, run on a deep copy with adapters off.

    A weight is replaced, not written to, so a weight tied to it elsewhere keeps its base value,
    just as a LoRA adapter on a tied module leaves the other use alone.
    """
    twin = copy.deepcopy(model)
    twin.base_model.disable_adapter_layers()
    for name, d in dense.items():
        base = twin.base_model.model.get_submodule(name).get_base_layer()
        old = base.weight
        new = (old.double() + weight_delta(base, d)).to(old.dtype)
        base.weight = nn.Parameter(new, requires_grad=False)
    value = torch.as_tensor(eval_fn(twin)).detach().cpu().double()
    return np.atleast_1d(value.numpy())


def score_table(
    model: PeftModel, fns: Mapping[str, EvalFn], states: Mapping[str, Deltas]
) -> dict[str, dict[str, float]]:
    """Return the mean score of every task in every named state: state -> task -> score."""
    return {
        state: {task: float(score(model, fn, dense).mean()) for task, fn in fns.items()}
        for state, dense in states.items()
    }


def _mean_over_tasks(model: PeftModel, fns: Mapping[str, EvalFn], state: Deltas) -> float:
    """Mean over tasks of the mean scores."""
    return float(np.mean([score(model, fn, state).mean() for fn in fns.values()]))


# ---------------------------------------------------------------------------------- contributions


def contributions(
    model: PeftModel,
    fns: Mapping[str, EvalFn],
    pruned: Mapping[str, Deltas],
    *,
    merged: Deltas | None = None,
    only_layers: Sequence[str] | None = None,
    normalize: str = "none",
) -> dict[tuple[str, str], Contribution]:
    """Measure alpha, beta, c and gamma of every layer for every task (1.3).

    Args:
        model: The PeftModel.
        fns: Task -> eval function; tasks that are no adapter are passed over.
        pruned: Adapter -> its delta'.
        merged: The merged state G; default the plain sum of ``pruned``.
        only_layers: Default all layers.
        normalize: "none", or "gain": gamma (and its error) over |E(alone) - E(base)|.
    """
    merged = plain_sum(pruned) if merged is None else merged
    names = layers(model, pruned) if only_layers is None else only_layers
    records = {}
    for task, alone in pruned.items():
        e_base = score(model, fns[task], {})
        e_alone = score(model, fns[task], alone)
        e_merged = score(model, fns[task], merged)
        gain = abs(float((e_alone - e_base).mean())) if normalize == "gain" else 1.0
        for layer in names:
            alpha_alone = e_alone - score(model, fns[task], without(alone, layer))
            beta_alone = score(model, fns[task], only(alone, layer)) - e_base
            alpha_merged = e_merged - score(model, fns[task], without(merged, layer))
            beta_merged = score(model, fns[task], only(merged, layer)) - e_base
            gamma = ((alpha_alone + beta_alone) - (alpha_merged + beta_merged)) / gain
            n = len(gamma)
            records[layer, task] = Contribution(
                layer=layer,
                task=task,
                alpha_alone=float(alpha_alone.mean()),
                beta_alone=float(beta_alone.mean()),
                alpha_merged=float(alpha_merged.mean()),
                beta_merged=float(beta_merged.mean()),
                c_alone=float((alpha_alone + beta_alone).mean()),
                c_merged=float((alpha_merged + beta_merged).mean()),
                gamma=float(gamma.mean()),
                gamma_se=float(gamma.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
            )
    return records


def total_gamma(records: Mapping[tuple[str, str], Contribution], layer: str) -> float:
    """Return Gamma of a layer: the sum of its gammas over the tasks (1.3)."""
    return math.fsum(c.gamma for (at, _), c in records.items() if at == layer)


# ------------------------------------------------------------------------------------ elimination


def counted(record: Contribution, tolerance: float | str) -> float:
    """Return gamma, or 0 where it is below the tolerance: a number, or e.g. "2se" (1.5)."""
    if isinstance(tolerance, str):
        limit = float(tolerance.removesuffix("se")) * record.gamma_se
    else:
        limit = tolerance
    return 0.0 if abs(record.gamma) < limit else record.gamma


def kind_of(gammas: Iterable[float]) -> str:
    """Return the kind of conflict of one layer (1.4)."""
    loses = [gamma > 0 for gamma in gammas]
    if all(loses):
        return "severe"
    return "partial" if any(loses) else "mutual"


def offending(gammas: Mapping[str, float], partial_target: str = "degrader") -> tuple[str, ...]:
    """Return whose delta a partial conflict prunes again (1.4)."""
    if partial_target == "degrader":  # those that do not lose, while another does
        return tuple(sorted(name for name, gamma in gammas.items() if gamma <= 0))
    if partial_target == "degraded":
        return tuple(sorted(name for name, gamma in gammas.items() if gamma > 0))
    raise ValueError(partial_target)


def severe_winner(
    records: Mapping[tuple[str, str], Contribution],
    layer: str,
    pruned: Mapping[str, Deltas],
    gains: Mapping[str, float],
) -> str:
    """Return the adapter with the largest c alone in this layer, the first by name if equal.

    Only adapters that have a delta there can be kept; c is in units of the task's gain.
    """
    mine = [c for (at, task), c in records.items() if at == layer and only(pruned[task], layer)]
    return min(mine, key=lambda c: (-c.c_alone / gains[c.task], c.task)).task


def prune_layer_again(state: Deltas, layer: str, p: float, s: float) -> Deltas:
    """Prune and scale one adapter's delta' once more inside one layer (1.4).

    The threshold is the ceil(p*n)-th largest of all n entries of the layer, zeros counted; where
    it is 0 everything stays.
    """
    inside = only(state, layer)
    if not inside:
        return dict(state)
    return {**state, **prune_and_scale(inside, p, s)}


def _of(value: float | Mapping[str, float], name: str) -> float:
    return value[name] if isinstance(value, Mapping) else value


def eliminate(
    model: PeftModel,
    fns: Mapping[str, EvalFn],
    pruned: Mapping[str, Deltas],
    records: Mapping[tuple[str, str], Contribution],
    *,
    layer_density: float | Mapping[str, float],
    layer_scale: float | Mapping[str, float],
    partial_target: str = "degrader",
    tolerance: float | str = 0.0,
    reanalyze: str = "once",
    accept: str = "always",
    normalize: str = "none",
) -> tuple[Table, dict[str, Conflict]]:
    """Treat the layers in descending Gamma (1.4) and return the edited deltas and what was done.

    ``accept="no_regression"`` looks at all of ``fns``, also at tasks that are no adapter. A layer's
    kind follows ``records``, or with ``reanalyze="each"`` a new measurement in the edited state.
    """
    order = sorted(layers(model, pruned), key=lambda layer: -total_gamma(records, layer))  # stable
    current: Table = {name: dict(one) for name, one in pruned.items()}
    gains = {
        name: 1.0
        if normalize == "none"
        else abs(float((score(model, fns[name], one) - score(model, fns[name], {})).mean()))
        for name, one in pruned.items()
    }
    done = {}
    for layer in order:
        now = {key: c for key, c in records.items() if key[0] == layer}
        if reanalyze == "each":
            now = contributions(
                model,
                fns,
                pruned,
                merged=plain_sum(current),
                only_layers=[layer],
                normalize=normalize,
            )
        gammas = {task: counted(c, tolerance) for (_, task), c in now.items()}
        kind = kind_of(gammas.values())
        kept, again, edited = None, (), current
        if kind == "severe":
            kept = severe_winner(now, layer, pruned, gains)
            edited = {
                name: one if name == kept else without(one, layer) for name, one in current.items()
            }
        elif kind == "partial":
            again = offending(gammas, partial_target)
            edited = {
                name: prune_layer_again(
                    one, layer, _of(layer_density, name), _of(layer_scale, name)
                )
                if name in again
                else one
                for name, one in current.items()
            }
        before = after = None
        accepted = True
        if accept == "no_regression" and kind != "mutual":
            before = _mean_over_tasks(model, fns, plain_sum(current))
            after = _mean_over_tasks(model, fns, plain_sum(edited))
            accepted = after >= before
        if accepted:
            current = edited
        gamma_sum = total_gamma(records, layer)
        done[layer] = Conflict(layer, kind, gamma_sum, gammas, kept, again, accepted, before, after)
    return current, done


# ------------------------------------------------------------------------------------- end to end


def hi_merge(
    model: PeftModel,
    fns: Mapping[str, EvalFn],
    adapters: Sequence[str],
    density: float | Mapping[str, float],
    scale: float | Mapping[str, float],
    *,
    prune_scope: str = "model",
    layer_density: float | Mapping[str, float] | None = None,
    layer_scale: float | Mapping[str, float] | None = None,
    partial_target: str = "degrader",
    tolerance: float | str = 0.0,
    reanalyze: str = "once",
    accept: str = "always",
    normalize: str = "none",
) -> OracleResult:
    """Run the method from the adapters to the merged delta (1.1 to 1.4).

    ``layer_density`` and ``layer_scale`` default to half of the adapter's model-wise value.
    """
    raw = {name: deltas(model, name) for name in adapters}
    taus = {name: thresholds(raw[name], _of(density, name), prune_scope) for name in adapters}
    pruned = {
        name: prune_and_scale(raw[name], _of(density, name), _of(scale, name), prune_scope)
        for name in adapters
    }
    if layer_density is None:
        layer_density = {name: _of(density, name) / 2 for name in adapters}
    if layer_scale is None:
        layer_scale = {name: _of(scale, name) / 2 for name in adapters}
    records = contributions(model, fns, pruned, normalize=normalize)
    edited, conflicts = eliminate(
        model,
        fns,
        pruned,
        records,
        layer_density=layer_density,
        layer_scale=layer_scale,
        partial_target=partial_target,
        tolerance=tolerance,
        reanalyze=reanalyze,
        accept=accept,
        normalize=normalize,
    )
    return OracleResult(taus, pruned, records, conflicts, edited, plain_sum(edited))
