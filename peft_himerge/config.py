"""The options of a Hi-Merging run, validated when made (DESIGN 1.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError, suggest
from .plan import MOST_SCALE, Edit

__all__ = ["VARIANTS", "HiMergeConfig"]

Density = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=0.0, le=MOST_SCALE, allow_inf_nan=False)]
_AS_IT_IS = {"focus": False, "density": "search", "search": "coarse"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "paper": {**_AS_IT_IS, "search_target": "own", "accept": "always", "tolerance": 0.0},
    "joint": _AS_IT_IS,
    "focused": {},  # the fields' own defaults
}
# Who says how adapters are pruned and scaled means them as they are.
_BY_HAND = frozenset(("density", "scale", "search_budget", "search_target", "prune_scope"))
_SE = re.compile(r"^(\d+(?:\.\d+)?)se$")


class HiMergeConfig(BaseModel):
    """Options of `merge_adapters_hi`; frozen.

    Attributes:
        variant: where `focus`, `density`, `search`, `search_target`, `accept` and `tolerance` come
            from if they are not given. "focused" (ours, default) focuses the adapters on their own
            tasks' inputs, prunes them no further, scales them together by the mean score of the
            merged model, and then repairs it layer by layer where that wins beyond the noise.
            "joint" (ours) takes the adapters as they are, looks at scores alone, and searches each
            one's density and scale by the merged model's mean score; it is the default if
            `density`, `scale`, another `search`, `search_budget`, `search_target`, `prune_scope` or
            ``focus=False`` is given. "paper" is Hi-Merging as published.
        focus: merge, in place of each adapter, the part of it that acts on its own task's inputs
            (`focus_adapters`): what the adapter's eval function gives the model in one run before
            the merge. The result is far better where adapters hurt each other. What was merged is
            written to the folder `focused` beside the result, and the plan is one for those.
            One adapter is left as it is.
        density: kept fraction p of each adapter's delta, in [0, 1]: one number, one per adapter,
            or "search" (on the adapter's own task). DESIGN 1.1.
        scale: factor s on what was kept, in [0, 10,000]: one number, one per adapter, or "search".
        layer_density: kept fraction p_l in a layer with a partial conflict, counted over the
            layer's entries; None is half of the adapter's density (paper). DESIGN 1.4.
        layer_scale: further factor s_l in such a layer; None is half of the adapter's scale.
        prune_scope: what density counts over: "model" (paper), "layer" or "module" (mergekit).
        search: "together" (default) looks for one scale of all adapters, the nearest to 1 of those
            that are as good as the best within `tolerance`, and leaves the density as it is given;
            "grid" scores density and scale over 0.1..1.0 in steps of 0.1, 100 scores per adapter
            (paper); "coarse" takes at most 12; "optuna" lets Optuna's TPE choose among the grid's
            points, after density 1 and scale 1, until `search_budget` are scored.
        search_budget: most points per adapter that search="optuna" scores, each once on the task
            or tasks of `search_target`; None is 20. Only for "optuna".
        search_target: score a candidate on the adapter's "own" task, alone (paper), or by the mean
            over all tasks of the "merged" model (default), one adapter after the other; then
            scales of 1.25 and 1.5 are tried too, for an adapter that the others drown.
        reanalyze: "once" measures all layers before any edit (paper); "each" measures a layer's
            merged contribution again with the edits made so far.
        accept: "always" keeps every edit (paper); "never" keeps none: the layers are judged and
            left as they are; "no_regression" keeps an edit only if the mean score over all tasks,
            guard tasks included, does not fall; "best" (ours, default) also tries milder and
            stronger scales of one adapter at a time, and keeps what beats the rest by more than
            `tolerance`. All but "always" are never worse than the model-wise merge on the data the
            eval functions look at.
        partial_target: who is pruned in a partial conflict: the "degrader", which loses nothing
            itself (default), or the "degraded", which loses.
        normalize: "none", or "gain": divide a task's contributions by what its adapter wins alone,
            for tasks with unlike metrics.
        tolerance: a gamma of less than this magnitude counts as 0, accept="best" keeps only what
            wins more than this, and search="together" takes less for equal: a number, 0 in the
            paper; or in its own (paired) standard errors, as "2se" (needs eval functions that
            return per-example scores); or "auto": 0 without per-example scores, else one standard
            error for a gamma and for a scale of all adapters, and sqrt(2 ln n) for the n edits that
            accept="best" tries, which the best of n that change nothing seldom reaches (Donoho and
            Johnstone 1994, the universal threshold).
        metric: which entry of a dict of metrics is the score: one name, or one per task.
        rank: rank of the exported adapter: a number; a share of the delta's energy (squared
            Frobenius norm) as a float below 1; "exact"; or "auto", which is "exact" where nothing
            was pruned and otherwise the sum of the sources' ranks.
        max_export_drop: largest share of the mean gain over the base model that export may lose,
            measured by scoring the exported adapter; None never refuses.
        strategy: how a state is put into the model: "fold" swaps weights, "lazy" adds the delta
            inside forward, "auto" picks by memory and layer type.
        prefix_cache_gb: memory, in units of 1e9 bytes, for hidden states that are shared between
            scores; what does not fit is computed again. 0 runs every score in full.
        processes: "auto" spreads the scores over the processes of `accelerate launch` or
            torch.distributed, all of which must call the merge; the result is the same for any
            number of them. "off" merges on this process alone, whoever else is there.
        verify: distrust the eval functions: after every score look at the values of every weight,
            so that one that writes to the model is named at once, and score the first state of
            every task twice, so that a random one is. Without it writes are found too, most of
            them at once, the rest at the end. Costs two passes over the weights per score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["paper", "joint", "focused"] = "focused"
    focus: Annotated[bool, Field(strict=True)] = True
    density: Density | dict[str, Density] | Literal["search"] = 1.0
    scale: Scale | dict[str, Scale] | Literal["search"] = "search"
    layer_density: Density | None = None
    layer_scale: Scale | None = None
    prune_scope: Literal["model", "layer", "module"] = "model"
    search: Literal["together", "coarse", "grid", "optuna"] = "together"
    search_budget: Annotated[int, Field(ge=1)] | None = None
    search_target: Literal["own", "merged"] = "merged"
    reanalyze: Literal["once", "each"] = "once"
    accept: Literal["always", "never", "no_regression", "best"] = "best"
    partial_target: Literal["degrader", "degraded"] = "degrader"
    normalize: Literal["none", "gain"] = "none"
    tolerance: float | str = "auto"
    metric: str | dict[str, str] | None = None
    rank: int | float | Literal["auto", "exact"] = "auto"
    max_export_drop: Annotated[float, Field(ge=0.0)] | None = 0.1
    strategy: Literal["auto", "fold", "lazy"] = "auto"
    prefix_cache_gb: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 2.0
    processes: Literal["auto", "off"] = "auto"
    verify: Annotated[bool, Field(strict=True)] = False

    def __init__(self, **options: Any) -> None:
        unknown = [key for key in options if key not in type(self).model_fields]
        if unknown:
            hint = suggest(unknown[0], type(self).model_fields)
            raise ConfigError(f"unknown option {unknown[0]!r} of HiMergeConfig.{hint}")
        variant = options.setdefault("variant", _variant(options))
        preset = VARIANTS.get(variant, {}) if isinstance(variant, str) else {}
        try:
            super().__init__(**{**preset, **options})
        except ValidationError as exc:
            raise ConfigError(_readable(exc)) from None

    @field_validator(
        *("density", "scale", "layer_density", "layer_scale"),
        *("tolerance", "max_export_drop", "prefix_cache_gb", "search_budget"),
        mode="before",
    )
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        values = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(v, bool) for v in values):
            raise ValueError("must be a number, not a bool")
        return value

    @field_validator("tolerance")
    @classmethod
    def _tolerance(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            fine = value == "auto" or _SE.match(value) is not None
        else:
            fine = 0.0 <= value < float("inf")
        if not fine:
            raise ValueError("must be a number >= 0, standard errors such as '2se', or 'auto'")
        return value

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        fine = (
            value in ("auto", "exact")
            if isinstance(value, str)
            else (
                not isinstance(value, bool)
                and (
                    1 <= value < 1 << 31
                    if isinstance(value, int)
                    else isinstance(value, float) and 0 < value < 1
                )
            )
        )
        if not fine:
            raise ValueError(
                "must be a whole number >= 1, a share of the energy between 0 and 1, 'exact' or "
                "'auto'"
            )
        return value

    @model_validator(mode="after")
    def _search_both(self) -> HiMergeConfig:
        if isinstance(self.density, dict) != isinstance(self.scale, dict) and "search" in (
            self.density,
            self.scale,
        ):
            raise ValueError("density and scale: give both per adapter, or search both")
        return self

    @model_validator(mode="after")
    def _budget_is_read(self) -> HiMergeConfig:
        if self.search_budget is not None and self.search != "optuna":
            raise ValueError(
                "search_budget is read by search='optuna' alone; leave it out, or choose that"
            )
        return self

    @model_validator(mode="after")
    def _together_is_of_the_merged(self) -> HiMergeConfig:
        if self.search == "together" and self.scale == "search" and self.search_target == "own":
            raise ValueError("search='together' scales the merged model: search_target='merged'")
        if self.search == "together" and self.density == "search":
            raise ValueError(
                "search='together' looks for a scale: give density as a number, or choose another "
                "search, e.g. 'coarse'"
            )
        return self

    def searches(self) -> bool:
        """True if density or scale is left to the search."""
        return "search" in (self.density, self.scale)

    def model_wise_edit(self, adapter: str) -> Edit:
        """Return the given edit of one adapter; 1 for a value that is left to the search."""

        def pick(value: Any) -> float:
            picked = value[adapter] if isinstance(value, Mapping) else value
            return 1.0 if picked == "search" else float(picked)

        return Edit(pick(self.density), pick(self.scale))

    def tolerance_of(self, se: float | None, tries: int = 1) -> float:
        """Return the magnitude up to which a difference is noise.

        Args:
            se: its standard error, or None if it is not known.
            tries: of how many differences it may be the largest.
        """
        if not isinstance(self.tolerance, str):
            return self.tolerance
        if self.tolerance == "auto":
            return 0.0 if se is None else se * max(1.0, math.sqrt(2 * math.log(tries)))
        found = _SE.match(self.tolerance)
        assert found is not None
        if se is None:
            raise ConfigError(
                f"tolerance={self.tolerance!r} needs per-example scores: let the eval functions "
                f"return a 1-D array of at least two values, or give a number or 'auto'."
            )
        return float(found.group(1)) * se

    def metric_of(self, task: str) -> str | None:
        """Return the metric that is the score of `task`."""
        return self.metric.get(task) if isinstance(self.metric, Mapping) else self.metric

    def check_names(self, adapters: list[str], tasks: list[str]) -> None:
        """Refuse options given per adapter or per task that name others.

        Raises:
            ConfigError: a name is missing or not known.
        """
        for option in ("density", "scale"):
            value = getattr(self, option)
            if isinstance(value, Mapping) and sorted(value) != sorted(adapters):
                raise ConfigError(
                    f"{option} is given for {sorted(value)}, but the adapters are "
                    f"{sorted(adapters)}: give one value per adapter."
                )
        if isinstance(self.metric, Mapping):
            for name in self.metric:
                if name not in tasks:
                    raise ConfigError(f"metric names the task {name!r}.{suggest(name, tasks)}")


def _variant(options: Mapping[str, Any]) -> str:
    """Return the variant that goes with these options."""
    other_search = options.get("search", "together") != "together"
    by_hand = other_search or options.get("focus") is False or not _BY_HAND.isdisjoint(options)
    return "joint" if by_hand else "focused"


def _readable(exc: ValidationError) -> str:
    faults: dict[str, list[str]] = {}
    for error in exc.errors():
        name = str(error["loc"][0]) if error["loc"] else "config"
        text = error["msg"].removeprefix("Value error, ")
        faults.setdefault(name, []).append(f"{text} (got {error['input']!r})")
    return "; ".join(f"{name}: {' or '.join(dict.fromkeys(t))}" for name, t in faults.items()) + "."
