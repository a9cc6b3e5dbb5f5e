"""Who takes part: every method with what it may choose from, and nothing that was tuned on a test.

Ranges are the papers' own, or what their authors sweep. A method that has no coefficient of its own
chooses its weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from types import MappingProxyType
from typing import Any

from ..config import HiMergeConfig
from ..errors import ConfigError, suggest
from ..layers import OUTSIDE
from ..methods.depth import zones

__all__ = ["ABLATIONS", "LINEUP", "Contender", "choose"]

_WEIGHTS = (0.3, 0.5, 0.7, 1.0, 1.5)  # above 1 too: an adapter may need more than it does alone
_DENSITIES = (0.2, 0.5, 0.8)


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table.

    Attributes:
        name: short name, also of its files.
        title: what the table calls it.
        method: a method of the registry, merged at each of `weights` and `choices`; "" for one
            that is not (`hi`).
        weights: what every adapter's weight may be.
        choices: option of the method -> what it may be.
        space: where the method runs.
        hi: Hi-Merging's options, for its variants.
        most: the most adapters it can merge.
        rounds: a method of the registry merges adapters that were focused in so many rounds
            (`focus_adapters`); 0 takes the adapters themselves.
        relative: these rounds count errors relative to each adapter's effect.
        swaps: what a method may also choose from as its `assignment`: which shares of the blocks,
            the first ones and the last ones, one adapter has and the other has not.
    """

    name: str
    title: str
    method: str = ""
    weights: tuple[float, ...] = _WEIGHTS
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    space: str = "full"
    hi: HiMergeConfig | None = None
    most: int | None = None
    rounds: int = 0
    relative: bool = False
    swaps: tuple[tuple[float, float], ...] = ()

    def options(self, adapters: Sequence[str], layers: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Return option -> what it may be, when these adapters are merged.

        Args:
            adapters: their names.
            layers: labels of the layers that they change.
        """
        found: dict[str, Sequence[Any]] = dict(self.choices)
        if self.swaps:
            made: list[Any] = []
            for shares in self.swaps:
                for outer, inner in permutations(adapters, 2):
                    one = _swapped(layers, outer, inner, *shares)
                    made += [one] if one not in made else []  # few blocks: shares come to the same
            found["assignment"] = made
        return found


def _swapped(
    layers: Sequence[str], outer: str, inner: str, first: float, last: float
) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[str]] = {}  # a model may have blocks of several kinds
    for layer in layers:
        kinds.setdefault(layer.rpartition(".")[0], []).append(layer)
    found: dict[str, dict[str, float]] = {}
    for labels in kinds.values():
        count = len([label for label in labels if label != OUTSIDE])
        bottom = min(max(1, round(first * count)), count)
        top = min(max(1, round(last * count)), count - bottom)
        room = int(bottom + top + 2 <= count)  # of few blocks none is between the zones
        found |= zones(labels, outer=outer, inner=inner, bottom=bottom, top=top, transition=room)
    return found


def _row(
    name: str,
    title: str,
    method: str,
    weights: tuple[float, ...] = _WEIGHTS,
    *,
    space: str = "full",
    most: int | None = None,
    rounds: int = 0,
    relative: bool = False,
    swaps: tuple[tuple[float, float], ...] = (),
    **choices: tuple[Any, ...],
) -> Contender:
    options = MappingProxyType(choices)
    focus = (rounds, relative)
    return Contender(name, title, method, weights, options, space, None, most, *focus, swaps)


LINEUP: tuple[Contender, ...] = (
    _row("plain_sum", "plain sum", "cat", (1.0,)),
    _row("average", "average", "average", (1.0,)),
    _row("task_arithmetic", "Task Arithmetic", "task_arithmetic"),
    _row("slerp", "SLERP", "slerp", (1.0, 0.7, 1.4), most=2),
    _row("karcher", "Karcher mean", "karcher", (1.0, 0.5), lam=(1.0, 0.7, 1.4)),
    _row("model_stock", "Model Stock", "model_stock", (1.0,), lam=(1.0, 1.5, 2.0)),
    _row("lines", "LiNeS + sum", "lines", (1.0, 0.7), first=(0.5, 0.3, 0.1), last=(1.0, 0.7)),
    _row(
        *("layer_swapping", "Layer Swapping", "layer_assignment", (1.0, 0.7, 1.4)),
        most=2,
        swaps=((5 / 32, 2 / 32), (10 / 32, 4 / 32)),  # the paper's blocks of 32, and twice as many
    ),
    _row("ties", "TIES", "ties", density=_DENSITIES),
    _row("dare_linear", "DARE", "dare_linear", density=_DENSITIES),
    _row("dare_ties", "DARE-TIES", "dare_ties", density=_DENSITIES, trim=(1.0, 0.2)),
    _row("della", "DELLA", "della", density=_DENSITIES, window=(0.2,)),
    _row("breadcrumbs", "Breadcrumbs", "breadcrumbs", density=(0.15, 0.5, 0.8), lam=(1.0,)),
    _row("sce", "SCE", "sce", select_topk=(1.0, 0.5, 0.2)),
    _row("consensus", "Consensus TA", "consensus", threshold=(0.2, 0.4, 0.6), agree=(1, 2)),
    _row("pcb", "PCB-Merging", "pcb", density=(0.05, 0.1, 0.2), lam=(1.0,)),
    _row("knots_ties", "KnOTS-TIES", "ties", space="knots", density=(1.0, 0.5, 0.2)),
    _row("core_ties", "Core Space TIES", "ties", space="core", density=(1.0, 0.5, 0.2)),
    _row("tsv_m", "TSV-M", "tsv_m"),
    _row("iso_c", "Iso-C", "iso_c"),
    _row("iso_cts", "Iso-CTS", "iso_cts"),
    _row("wudi", "WUDI", "wudi"),
    _row("widen", "WIDEN", "widen"),
    _row("regmean", "RegMean (sees prompts)", "cat", (1.0,), rounds=1),
    _row("regmean_tuned", "RegMean, weights tuned", "cat", (0.7, 1.0, 1.25, 1.5), rounds=1),
    _row("regmean_pp", "RegMean++ (sees prompts)", "cat", (1.0,), rounds=2),
    _row(
        *("regmean_relative", "RegMean++, relative errors (ours)", "cat", (1.0,)),
        rounds=2,
        relative=True,
    ),
    Contender("hi_paper", "Hi-Merging, as published", hi=HiMergeConfig(variant="paper")),
    Contender(
        "hi_joint",
        "Hi-Merging, joint (ours)",
        hi=HiMergeConfig(variant="joint"),
    ),
    Contender(
        "hi_focused",
        "Hi-Merging, focused (our default)",
        hi=HiMergeConfig(variant="focused"),
    ),
)


def _ablation(name: str, title: str, **changed: Any) -> Contender:
    return Contender(f"hi_{name}", title, hi=HiMergeConfig(**{"variant": "paper", **changed}))


ABLATIONS: tuple[Contender, ...] = (
    _ablation("model_wise", "as published, model-wise only", accept="never"),
    _ablation("layer_wise", "as published, layer-wise only", density=1.0, scale=1.0),
    _ablation("scope_layer", "density per layer", prune_scope="layer"),
    _ablation("scope_module", "density per module", prune_scope="module"),
    _ablation("degraded", "partial conflict: the degraded is pruned", partial_target="degraded"),
    _ablation("each", "layers measured again after each edit", reanalyze="each"),
    _ablation("gain", "contributions per gain", normalize="gain"),
    _ablation("one_se", "conflicts of 1 standard error or more", tolerance="1se"),
    _ablation("two_se", "conflicts of 2 standard errors or more", tolerance="2se"),
    _ablation("no_regression", "edits kept if the mean does not fall", accept="no_regression"),
    _ablation("best", "edits by the best of several", accept="best"),
    _ablation("merged_search", "search on the merged model", search_target="merged"),
    _ablation(
        "careful",
        "searched on the merged model, edits kept if the mean does not fall",
        search_target="merged",
        accept="no_regression",
    ),
    _ablation("joint_every_gain", "joint, every gain counts", variant="joint", tolerance=0.0),
    _ablation("joint_model", "joint, model-wise only", variant="joint", accept="never"),
    _ablation("joint_layer", "joint, layer-wise only", variant="joint", density=1.0, scale=1.0),
    _ablation("focused_every_gain", "focused, every gain counts", variant="focused", tolerance=0.0),
    _ablation("focused_model", "focused, model-wise only", variant="focused", accept="never"),
    _ablation("focused_each", "focused, scaled one by one", variant="focused", search="coarse"),
    _ablation(
        "focused_pruned",
        "focused, density searched",
        variant="focused",
        density="search",
        search="coarse",
    ),
)
"""Hi-Merging with one option changed; run only if they are named, and ranked with nobody."""


def choose(names: Sequence[str], adapters: int) -> tuple[Contender, ...]:
    """Return the contenders of these names, in the order of the table; `LINEUP` if none is named.

    Args:
        names: names of `LINEUP`, or of `ABLATIONS`; "ablations" is all of those.
        adapters: how many adapters are merged; who cannot merge as many is left out.

    Raises:
        ConfigError: a name is not known.
    """
    known = {contender.name: contender for contender in (*LINEUP, *ABLATIONS)}
    every = [contender.name for contender in ABLATIONS]
    chosen = [one for name in names for one in (every if name == "ablations" else [name])]
    for name in chosen:
        if name not in known:
            hint = suggest(name, [*known, "ablations"])
            raise ConfigError(f"there is no contender {name!r}.{hint}")
    taking_part = [c for c in known.values() if c.name in chosen] if chosen else LINEUP
    return tuple(c for c in taking_part if c.most is None or adapters <= c.most)
