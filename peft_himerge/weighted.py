"""`add_weighted_adapter`: PEFT's call, on true deltas.

PEFT's own `linear`, `ties`, `dare_*` and `magnitude_prune` combine A and B apart, so that their
product holds cross terms of different adapters. Here every type works on scaling * B @ A.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraModel

from .adapters import check_config, check_model
from .byhi import HI, merge_by_hi
from .carried import FIELDS
from .errors import AdapterError, ConfigError, suggest
from .interrupts import held
from .lowrank import LowRank, low_rank_of_product
from .merged import AdapterMerge
from .merging import run, scored
from .methods.registry import MethodInfo, get_method, list_methods
from .overwrite import taking_over
from .probe import preserved
from .request import check_evidence, check_names, check_weights, prepare
from .scoring import EvalFn

__all__ = ["COMBINATION_TYPES", "add_weighted_adapter"]

# PEFT's combination type -> the method of the registry that does the same on true deltas.
COMBINATION_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "svd": "cat",
        "linear": "cat",
        "cat": "cat",
        "ties": "ties_peft",
        "ties_svd": "ties_peft",
        "dare_ties": "dare_ties_peft",
        "dare_ties_svd": "dare_ties_peft",
        "dare_linear": "dare_linear",
        "dare_linear_svd": "dare_linear",
        "magnitude_prune": "magnitude_prune",
        "magnitude_prune_svd": "magnitude_prune",
    }
)
# PEFT asks for equal ranks in these.
_EVEN = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
# Taken before anyone can put ours in its place.
_PEFT_OWN = LoraModel.add_weighted_adapter


def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    compat: str | None = None,
    overwrite: bool = False,
    modules_to_save: str = "sole",
    strict_base: bool = True,
    seed: int = 0,
    eval_fns: Mapping[str, EvalFn] | None = None,
    metric: str | Mapping[str, str] | None = None,
) -> AdapterMerge | None:
    """Add the weighted combination of adapters as a new adapter: PEFT's call, on true deltas.

    What differs from `PeftModel.add_weighted_adapter`: the product scaling * B @ A is what is
    weighted, pruned and added up, never A and B apart; the result covers every module of every
    adapter; different ranks are fine; a name that is taken, a wrong number of weights, another
    base model, DoRA and the like are errors; all is checked before anything is touched; the model,
    its random states and the sources stay bit-identical; masks depend on `seed` alone.

    The function may stand in for `LoraModel.add_weighted_adapter` itself. There it keeps PEFT's
    rule that `linear`, `ties`, `dare_*` and `magnitude_prune` want equal ranks.

    Args:
        model: a PeftModel, or its LoraModel.
        adapters: names, each once. With one adapter every type is weight * delta, as in PEFT.
        weights: one finite number per adapter; negative ones subtract.
        adapter_name: name of the new adapter, which is frozen and not active.
        combination_type: one of PEFT's: svd, linear, cat (the exact weighted sum; they differ in
            rank only), ties, dare_linear, dare_ties, magnitude_prune, each also with _svd; or a
            method of the registry (`list_methods`), with its default options, among them "hi".
        svd_rank: rank of the new adapter, whatever the type. Without it: the sum of the ranks for
            cat, "auto" (`HiMergeConfig.rank`) for hi, else the largest rank of any source.
            `export_error` of the result says what the
            rank costs.
        svd_clamp: quantile in [0, 1] at which the entries of U * S and V are clamped.
        svd_full_matrices: accepted and without effect: no full SVD is ever computed.
        svd_driver: a cuSOLVER driver; only used with ``compat="peft"``, the SVDs here are small.
        density: kept share, for the types that prune; in [0, 1].
        majority_sign_method: "total" or "frequency", for the types that vote.
        compat: "peft" gives the numbers of PEFT's own method (cross terms included), with the
            checks of this one. Returns None.
        overwrite: replace an adapter of that name.
        modules_to_save: "sole" (take a saved module over if only one adapter has it), "error",
            "first" or "average".
        strict_base: refuse adapters that name different base models.
        seed: of random masks.
        eval_fns: adapter -> what scores the model on its task, higher is better; for hi and the
            other types that need scores.
        metric: which entry of a dict of metrics is the score: one name, or one per task.

    Returns:
        An `AdapterMerge`, with the error against the exact result.

    Raises:
        ConfigError, AdapterError: both are ValueErrors; nothing was touched.
    """
    start = time.perf_counter()
    owner = _owner(model)
    names = check_names(owner, adapters, adapter_name, overwrite=overwrite)
    of = check_weights(names, weights)
    strict = compat == "peft" or isinstance(model, LoraModel)
    _refuse_configs(owner, names, strict=strict)
    rank = _new_rank(owner, names, combination_type, svd_rank, strict=strict)
    _check_svd(svd_clamp, svd_driver, compat)
    info, options = _method(combination_type, density, majority_sign_method, alone=len(names) == 1)
    _check_needs(info, model, eval_fns, compat)
    if info is HI:
        unread: dict[str, Any] = {"svd_clamp": (svd_clamp, None), "seed": (seed, 0)}
        unread |= {"strict_base": (strict_base, True)}
        unread |= {"modules_to_save": (modules_to_save, "sole", "error")}
        options |= {"rank": "auto" if svd_rank is None else svd_rank, "metric": metric}
        return merge_by_hi(
            owner, names, adapter_name, eval_fns or {}, options, weights=of, unread=unread
        )
    request = prepare(
        owner,
        info,
        of,
        options=options,
        rank=rank,
        policy=modules_to_save,
        strict_base=strict_base,
        finish=None if svd_clamp is None else partial(_clamped, quantile=svd_clamp),
        least_rank=rank,
        seed=seed,
    )
    if compat is None:
        evidence = scored(info, names, eval_fns, metric, request.carried.settings)
        return run(owner, adapter_name, request, start, evidence)
    numbers = (svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)

    def own(made: str) -> None:
        _PEFT_OWN(owner.base_model, names, list(of.values()), made, combination_type, *numbers)

    _as_peft_does(owner, adapter_name, own, seed)
    return None


def _owner(model: Any) -> PeftModel:
    """Return a PeftModel around a bare LoraModel, so that one code path serves both."""
    if not isinstance(model, LoraModel):
        check_model(model)
        return model
    shell = PeftModel.__new__(PeftModel)
    torch.nn.Module.__init__(shell)
    shell.peft_type = PeftType.LORA
    shell.special_peft_forward_args = {"adapter_names", "alora_offsets"}
    shell._is_prompt_learning = False
    shell._adapters_disabled = False
    shell.base_model = model
    active = model.active_adapters
    shell.active_adapter = active[0] if active else ""
    return shell


def _refuse_configs(model: PeftModel, names: Sequence[str], *, strict: bool) -> None:
    for name in names:
        config = model.peft_config[name]
        if strict and getattr(config, "target_parameters", None):
            raise AdapterError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic "
                f"adapter '{name}'). Target nn.Linear modules instead."
            )
        check_config(name, config, FIELDS)


def _new_rank(
    model: PeftModel,
    names: Sequence[str],
    combination_type: str,
    svd_rank: int | None,
    *,
    strict: bool,
) -> int:
    known = (
        *COMBINATION_TYPES,
        *(
            m.name
            for m in list_methods()
            if m.name not in COMBINATION_TYPES and m.needs in ("nothing", "scores")
        ),
    )
    if combination_type not in known:
        raise ConfigError(
            f"Invalid combination_type: {combination_type}.{suggest(str(combination_type), known)}"
        )
    if svd_rank is not None and (
        isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank < 1
    ):
        raise ConfigError(f"svd_rank must be a whole number >= 1, got {svd_rank!r}.")
    configs = [model.peft_config[name] for name in names]
    ranks = [max(c.r, *(getattr(c, "rank_pattern", None) or {"": c.r}).values()) for c in configs]
    if strict and combination_type in _EVEN and len(set(ranks)) > 1:
        raise ConfigError(
            f"All adapters must have the same r value when using combination_type "
            f"{combination_type}, got {dict(zip(names, ranks, strict=True))}. Use "
            f"'{combination_type}_svd', 'svd' or 'cat', or call "
            f"peft_himerge.add_weighted_adapter(model, ...) without compat='peft'."
        )
    if svd_rank is not None:
        return svd_rank
    return sum(ranks) if combination_type == "cat" else max(ranks)


def _method(
    combination_type: str, density: float | None, majority_sign_method: str, *, alone: bool
) -> tuple[MethodInfo, dict[str, Any]]:
    """Return the method that does `combination_type`, and its options."""
    if majority_sign_method not in ("total", "frequency"):
        raise ConfigError(
            f"majority_sign_method must be 'total' or 'frequency', got {majority_sign_method!r}."
        )
    if density is not None and not _share(density):
        raise ConfigError(
            f"density is the kept share and must be in [0, 1], got {density!r}. Leave it out to "
            f"prune nothing."
        )
    info = get_method(COMBINATION_TYPES.get(combination_type, combination_type))
    if alone and info.needs == "nothing":
        return get_method("cat"), {}
    if "density" in info.options and density is None and combination_type in COMBINATION_TYPES:
        raise ConfigError(
            f"combination_type={combination_type!r} needs density, the share of entries to keep "
            f"(0.5 for example)."
        )
    options: dict[str, Any] = {}
    if density is not None and "density" in info.options:
        options["density"] = density
    if "majority_sign_method" in info.options:
        options["majority_sign_method"] = majority_sign_method
    return info, options


def _check_needs(
    info: MethodInfo, model: Any, eval_fns: Mapping[str, EvalFn] | None, compat: str | None
) -> None:
    """Refuse a method that cannot be run from here, or without what it needs."""
    check_evidence(info, eval_fns=eval_fns)
    if info.needs != "nothing" and (compat is not None or not isinstance(model, PeftModel)):
        raise ConfigError(
            f"combination_type={info.name!r} scores the model: pass the PeftModel that the eval "
            f"functions are for, and leave compat out."
        )


def _share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 <= value <= 1.0


def _check_svd(svd_clamp: Any, svd_driver: Any, compat: Any) -> None:
    if compat not in (None, "peft"):
        raise ConfigError(f"compat must be None or 'peft', got {compat!r}.")
    if svd_driver not in _DRIVERS:
        raise ConfigError(f"svd_driver must be one of {_DRIVERS}, got {svd_driver!r}.")
    if svd_clamp is not None and not _share(svd_clamp):
        raise ConfigError(f"svd_clamp is a quantile and must be in [0, 1], got {svd_clamp!r}.")


def _clamped(part: LowRank, *, quantile: float) -> LowRank:
    """Clamp the entries of U * S and V at a quantile of all of them, as PEFT's svd_clamp does.

    The error is the largest it can be: what the rank cost, and what clamping moved.
    """
    if part.rank == 0:
        return part
    left, right, sizes = _singular(part)
    values = torch.cat([(left * sizes).flatten(), right.flatten()]).double().sort().values
    place = quantile * (len(values) - 1)
    below, above = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    high = float(below + (above - below) * (place - int(place)))
    b, a = (left * sizes).clamp(-high, high), right.clamp(-high, high)
    moved = low_rank_of_product(torch.cat([part.b, -b], 1), torch.cat([part.a, a]), "exact").norm
    return replace(part, b=b, a=a, error=part.error + moved / part.norm)


def _singular(part: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U, V and S of factors that split sqrt(S) over both sides."""
    sizes = part.b.norm(dim=0) * part.a.norm(dim=1)
    return part.b / part.b.norm(dim=0), part.a / part.a.norm(dim=1)[:, None], sizes


@held()
def _as_peft_does(
    model: PeftModel, adapter_name: str, own: Callable[[str], None], seed: int
) -> None:
    """Run PEFT's own method; put back all that it moves."""
    with taking_over(model, adapter_name) as made, preserved(model):
        torch.manual_seed(seed)
        own(made)
