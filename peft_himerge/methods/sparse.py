"""TIES, DARE, DELLA, Breadcrumbs and plain pruning: recipes for the one kernel.

The user's weights scale the deltas first unless a method says otherwise. `density` is always the
kept share; a number, or one per adapter as ``{adapter: density}``.
"""

from __future__ import annotations

from collections.abc import Sequence

from .check import choice, number
from .kernel import Vote, merged
from .pruners import (
    Density,
    keep_band,
    keep_by_rank,
    keep_crumbs,
    keep_largest,
    keep_random,
)
from .registry import method
from .stack import Result, StackLike

__all__ = [
    "breadcrumbs",
    "breadcrumbs_mergekit",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "dare_ties_mergekit",
    "dare_ties_peft",
    "della",
    "della_linear",
    "magnitude_prune",
    "ties",
    "ties_mergekit",
    "ties_peft",
]


_TIES = "https://arxiv.org/abs/2306.01708"
_DARE = "https://arxiv.org/abs/2311.03099"
_DELLA = "https://arxiv.org/abs/2406.11617"
_BREADCRUMBS = "https://arxiv.org/abs/2312.06795"


def _floor(density: float, entries: int) -> int:
    """Return the number of entries that PEFT keeps."""
    return int(density * entries)


@method(
    "magnitude_prune",
    title="Magnitude pruning",
    url="https://arxiv.org/abs/2306.01708",
    variant="peft",
    elementwise=True,
)
def magnitude_prune(
    stacks: Sequence[StackLike], *, density: Density, scope: str = "module", lam: float = 1.0
) -> Result:
    """Keep each adapter's largest entries and add them up.

    Source: PEFT's combination type of that name (the trimming of TIES without its vote), on true
    deltas; keeps floor(density * entries) as PEFT does.

    Args:
        stacks: the modules.
        density: kept share of entries; a number, or one per adapter.
        scope: one threshold per "module", "layer" or "model".
        lam: factor on the result.
    """
    lam = number("lam", lam)
    yield from merged(stacks, keep_largest(stacks, density, scope, count=_floor), None, lam)


@method("ties", title="TIES-Merging", url=_TIES, variant="authors", elementwise=True)
def ties(
    stacks: Sequence[StackLike],
    *,
    density: Density = 0.2,
    lam: float = 1.0,
    scope: str = "model",
    merge: str = "count",
) -> Result:
    """Trim, elect a sign per entry, and average the entries that have it.

    Source: arXiv 2306.01708, section 3, and the authors' code: one threshold per adapter over the
    whole model, the sign of the summed entries, ties in the vote to the sign that wins most
    entries of the model. Weights are our extension: they scale the trimmed entries before the
    vote. Where we differ: the kept count is exactly the paper's share (their code keeps one more).

    Args:
        stacks: the modules.
        density: kept share of entries; a number, or one per adapter.
        lam: factor on the result.
        scope: one threshold per "model", "layer" or "module".
        merge: "count" (mean), "sum" or "max" of the entries that agree.
    """
    lam = number("lam", lam)
    choice("merge", merge, ("count", "sum", "max"))
    vote = Vote(tie="majority", merge=merge)  # type: ignore[arg-type]
    yield from merged(stacks, keep_largest(stacks, density, scope), vote, lam)


@method("ties_peft", title="TIES-Merging", url=_TIES, variant="peft", elementwise=True)
def ties_peft(
    stacks: Sequence[StackLike],
    *,
    density: Density,
    majority_sign_method: str = "total",
    lam: float = 1.0,
) -> Result:
    """TIES as PEFT has it, on true deltas.

    One threshold per module; signs are elected on the *unweighted* entries, ties go to +; the
    weighted entries that agree are divided by their *count*; floor(density * entries) are kept.
    Source: PEFT's `ties` function. Where we differ: entries equal to the threshold are all kept.

    Args:
        stacks: the modules.
        density: kept share of entries; a number, or one per adapter.
        majority_sign_method: elect by the "total" of the entries or the "frequency" of signs.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    vote = _peft_vote(majority_sign_method)
    sparsify = keep_largest(stacks, density, "module", count=_floor)
    yield from merged(stacks, sparsify, vote, lam)


def _peft_vote(majority_sign_method: str) -> Vote:
    choice("majority_sign_method", majority_sign_method, ("total", "frequency"))
    return Vote(weighted=False, by=majority_sign_method)  # type: ignore[arg-type]


@method("ties_mergekit", title="TIES-Merging", url=_TIES, variant="mergekit", elementwise=True)
def ties_mergekit(
    stacks: Sequence[StackLike],
    *,
    density: Density = 1.0,
    normalize: bool = True,
    lam: float = 1.0,
) -> Result:
    """TIES as mergekit describes it.

    One threshold per module; signs are elected on the *weighted* entries, ties go to +; the sum of
    those that agree is divided by the *sum of their weights*.

    Args:
        stacks: the modules.
        density: kept share of entries; a number, or one per adapter.
        normalize: divide by the weights; else the sum stays.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    yield from merged(
        stacks, keep_largest(stacks, density, "module"), _mergekit_vote(normalize), lam
    )


def _mergekit_vote(normalize: bool) -> Vote:
    return Vote(merge="weight" if normalize else "sum")


@method("dare_linear", title="DARE", url=_DARE, variant="authors", elementwise=True)
def dare_linear(
    stacks: Sequence[StackLike],
    *,
    density: Density = 0.9,
    rescale: str | None = "prob",
    lam: float = 1.0,
) -> Result:
    """Drop entries at random, scale the rest up, and add them up.

    Source: arXiv 2311.03099, section 3: drop with rate p = 1 - density, rescale by 1/(1 - p). The
    default is the rate of the authors' code. ``rescale="l1"`` is mergekit's: restore the L1 norm.

    Args:
        stacks: the modules.
        density: probability that an entry is kept; a number, or one per adapter.
        rescale: "prob", "l1" or None.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    sparsify = keep_random(density, stacks[0].names, rescale)
    yield from merged(stacks, sparsify, None, lam)


@method("dare_ties", title="DARE + TIES", url=_DARE, variant="authors", elementwise=True)
def dare_ties(
    stacks: Sequence[StackLike],
    *,
    density: Density = 0.9,
    trim: Density = 0.2,
    rescale: str | None = "prob",
    scope: str = "model",
    lam: float = 1.0,
) -> Result:
    """Drop entries at random, scale the rest up, and run all of TIES on them.

    Source: arXiv 2311.03099 and the authors' code, where TIES trims what DARE left.

    Args:
        stacks: the modules.
        density: probability that an entry is kept by DARE.
        trim: share of all entries that TIES keeps then; 1 leaves its trimming out.
        rescale: "prob", "l1" or None.
        scope: TIES' threshold per "model", "layer" or "module".
        lam: factor on the result.
    """
    lam = number("lam", lam)
    dropped = keep_random(density, stacks[0].names, rescale)
    sparsify = keep_largest(stacks, trim, scope, dropped)
    yield from merged(stacks, sparsify, Vote(tie="majority"), lam)


@method("dare_ties_peft", title="DARE + TIES", url=_DARE, variant="peft", elementwise=True)
def dare_ties_peft(
    stacks: Sequence[StackLike],
    *,
    density: Density,
    majority_sign_method: str = "total",
    lam: float = 1.0,
) -> Result:
    """DARE with the vote of TIES but without its trimming, as PEFT has it, on true deltas.

    Args:
        stacks: the modules.
        density: probability that an entry is kept; a number, or one per adapter.
        majority_sign_method: elect by the "total" of the entries or the "frequency" of signs.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    sparsify = keep_random(density, stacks[0].names, "prob")
    yield from merged(stacks, sparsify, _peft_vote(majority_sign_method), lam)


@method("dare_ties_mergekit", title="DARE + TIES", url=_DARE, variant="mergekit", elementwise=True)
def dare_ties_mergekit(
    stacks: Sequence[StackLike],
    *,
    density: Density = 1.0,
    rescale: str | None = "l1",
    normalize: bool = False,
    lam: float = 1.0,
) -> Result:
    """DARE with the vote of TIES but without its trimming, as mergekit describes it.

    What is left is scaled back to its L1 norm per module; the vote is on weighted entries.

    Args:
        stacks: the modules.
        density: probability that an entry is kept; a number, or one per adapter.
        rescale: "l1", "prob" or None.
        normalize: divide by the weights that agree.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    sparsify = keep_random(density, stacks[0].names, rescale)
    yield from merged(stacks, sparsify, _mergekit_vote(normalize), lam)


@method("della", title="DELLA-Merging", url=_DELLA, variant="authors", elementwise=True)
def della(
    stacks: Sequence[StackLike],
    *,
    density: Density,
    window: float = 0.3,
    rescale: str = "prob",
    normalize: bool = True,
    lam: float = 1.0,
) -> Result:
    """Drop entries at random, small ones more often; elect signs; merge what agrees.

    In each row the entry whose magnitude has rank k of n is kept with probability ``density -
    window/2 + window * k/(n - 1)`` and divided by it. Source: arXiv 2406.11617 (MagPrune, elect,
    fuse), and the authors' code for the weighted vote. ``rescale="l1"`` is mergekit's.

    Args:
        stacks: the modules.
        density: mean probability that an entry is kept; a number, or one per adapter.
        window: width of the range of probabilities (twice mergekit's epsilon).
        rescale: "prob", "l1" or None.
        normalize: divide by the sum of the weights that agree.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    sparsify = keep_by_rank(density, window, stacks[0].names, rescale)
    yield from merged(stacks, sparsify, _mergekit_vote(normalize), lam)


@method("della_linear", title="DELLA-Merging", url=_DELLA, variant="mergekit", elementwise=True)
def della_linear(
    stacks: Sequence[StackLike],
    *,
    density: Density,
    window: float = 0.3,
    rescale: str = "prob",
    lam: float = 1.0,
) -> Result:
    """DELLA's random dropping, then a plain sum; see `della`.

    Args:
        stacks: the modules.
        density: mean probability that an entry is kept; a number, or one per adapter.
        window: width of the range of probabilities.
        rescale: "prob", "l1" or None.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    sparsify = keep_by_rank(density, window, stacks[0].names, rescale)
    yield from merged(stacks, sparsify, None, lam)


@method(
    "breadcrumbs", title="Model Breadcrumbs", url=_BREADCRUMBS, variant="authors", elementwise=True
)
def breadcrumbs(
    stacks: Sequence[StackLike],
    *,
    density: Density = 0.15,
    outliers: float = 0.006,
    lam: float = 0.2,
) -> Result:
    """Drop each row's largest entries and its many small ones, and add up the rest.

    Source: arXiv 2312.06795, section 3 (beta = density, gamma = outliers, alpha = lam), per row;
    defaults are the start of the authors' search. A row too narrow for `outliers` loses none.

    Args:
        stacks: the modules.
        density: kept share of each row's entries; a number, or one per adapter.
        outliers: share of each row's entries, the largest, that is dropped first.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    yield from merged(stacks, keep_crumbs(density, outliers, stacks[0].names), None, lam)


@method(
    "breadcrumbs_mergekit",
    title="Model Breadcrumbs",
    url=_BREADCRUMBS,
    variant="mergekit",
    elementwise=True,
)
def breadcrumbs_mergekit(
    stacks: Sequence[StackLike],
    *,
    density: Density = 1.0,
    outliers: float = 0.01,
    lam: float = 1.0,
) -> Result:
    """Breadcrumbs per module instead of per row, as mergekit describes it.

    If the share to keep and the outliers overlap, fewer outliers are dropped. Where we differ:
    with less than one outlier nothing is dropped as one (mergekit drops the whole tensor then).

    Args:
        stacks: the modules.
        density: kept share of each module's entries; a number, or one per adapter.
        outliers: share of each module's entries, the largest, that is dropped first.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    yield from merged(stacks, keep_band(stacks, density, outliers), None, lam)


@method(
    "breadcrumbs_ties",
    title="Model Breadcrumbs + TIES",
    url=_BREADCRUMBS,
    variant="mergekit",
    elementwise=True,
)
def breadcrumbs_ties(
    stacks: Sequence[StackLike],
    *,
    density: Density = 1.0,
    outliers: float = 0.01,
    normalize: bool = False,
    lam: float = 1.0,
) -> Result:
    """`breadcrumbs_mergekit` with the vote of `ties_mergekit`.

    Args:
        stacks: the modules.
        density: kept share of each module's entries; a number, or one per adapter.
        outliers: share of each module's entries, the largest, that is dropped first.
        normalize: divide by the sum of the weights that agree.
        lam: factor on the result.
    """
    lam = number("lam", lam)
    yield from merged(stacks, keep_band(stacks, density, outliers), _mergekit_vote(normalize), lam)
