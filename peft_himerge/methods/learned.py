"""Coefficients learned from inputs: AdaMerging, aTLAS, FW-Merging.

Each runs on the engine of `learning`: one number per adapter and module (or layer, or model), an
exact product of the sources' factors as the result. Variants that need a delta per entry
(AdaMerging++, aTLAS with random partitions) are not here: their result would not be low-rank. The
user's weight of an adapter multiplies its delta first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches import Positions
from ..mixture import Evidence
from .check import choice, flag, fraction, number, whole
from .learning import Descent, Table, entropy_loss, fitted, label_loss, rate, slope, story
from .linear import gram
from .registry import Fitted, method
from .stack import Stack

__all__ = ["adamerging", "atlas", "fw_merging"]


@method(
    "adamerging",
    title="AdaMerging",
    url="https://arxiv.org/abs/2310.02575",
    variant="authors",
    needs="gradients",
    low_rank=True,
)
def adamerging(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    per: str = "module",
    steps: int = 500,
    lr: float = 1e-3,
    init: float = 0.3,
    clamp: bool = True,
    positions: Positions = "all",
) -> Fitted:
    """Learn the coefficients that make the merged model surest of its answers on every task.

    Adam on the sum over tasks of the mean entropy of the output distribution, one unlabelled batch
    of every task per step, in the order given and over again. Entropy can also fall by being sure
    of the wrong: look at the scores, and at the losses in the report.

    Source: arXiv 2310.02575, section 3.2 (layer-wise: the authors' "layer" is one weight, so
    per="module"), defaults as in the authors' code. Where we differ: a coefficient that leaves
    [0, 1] is put back to the border after the step, from where it can return (theirs is clamped
    in the forward pass, and gets no more gradient); for language models, which the paper has not,
    the entropy of the next-token distribution at the given tokens. The ++ variant is left out,
    since trimmed deltas have no thin factors.

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches; labels are not needed.
        per: one coefficient per adapter and "module", "layer" or "model" (task-wise).
        steps: number of steps of Adam.
        lr: its step size, > 0.
        init: coefficient to start from.
        clamp: keep coefficients in [0, 1].
        positions: for models with an output per token, "all" tokens that are no padding, or only
            the "last" of each example: what comes after the prompt.

    Raises:
        ConfigError: an option is out of range, or a loss is NaN.
    """
    table = Table.of(stacks, per)
    steps, lr, init = whole("steps", steps), rate(lr), number("init", init)
    loss_of = entropy_loss(positions)
    project = (lambda raw: raw.clamp(0.0, 1.0)) if flag("clamp", clamp) else None
    raw = table.filled(init).requires_grad_(True)
    with evidence.mixture() as mixture:
        way = Descent(mixture, table, raw, torch.optim.Adam([raw], lr=lr), loss_of, project=project)
        for turn in evidence.batches.turns(steps):
            way.step([(task, batch, 1.0) for task, batch in turn])
    return fitted(table, raw.detach(), story(evidence, way.losses))


@method(
    "atlas",
    title="aTLAS",
    url="https://arxiv.org/abs/2407.02880",
    variant="authors, blockwise",
    needs="gradients",
    low_rank=True,
)
def atlas(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    per: str = "module",
    epochs: int = 20,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    penalty: float = 0.0,
    power: int = 1,
) -> Fitted:
    """Learn coefficients from labelled examples, each block's own, starting at the base model.

    AdamW on the mean over tasks of the model's own loss, one batch of every task per step.
    Coefficients may become negative. `penalty` adds ``penalty * mean_k ||c[k]||_power``.

    Source: arXiv 2407.02880 and the authors' code for adding tasks. Where we differ: the last
    coefficients are kept (theirs are the best on validation data, which a merge need not have). The
    variants with random partitions of each weight and with pseudo-labels are left out.

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches, with labels.
        per: one coefficient per adapter and "module", "layer" or "model".
        epochs: passes over the longest task's batches.
        lr: step size, > 0.
        weight_decay: of AdamW, >= 0.
        clip: largest norm of the gradient, > 0.
        penalty: factor on the norms of the coefficients, >= 0; the authors' is 0.5 where they use
            one.
        power: which norm, 1 or 2.

    Raises:
        ConfigError: an option is out of range, labels are missing, or a loss is NaN.
    """
    table = Table.of(stacks, per)
    epochs, lr, clip = whole("epochs", epochs), rate(lr), number("clip", clip, least=1e-12)
    weight_decay = number("weight_decay", weight_decay, least=0.0)
    penalty = number("penalty", penalty, least=0.0)
    choice("power", power, (1, 2))
    loss_of = label_loss(evidence, "atlas")
    raw = table.filled(0.0).requires_grad_(True)

    def norms(c: Tensor) -> Tensor:
        # At 0 the norms have a corner; 0 is in their subgradient, and what autograd takes.
        size: Tensor = torch.linalg.vector_norm(c, ord=power, dim=1)
        return penalty * size.mean()

    with evidence.mixture() as mixture:
        adam = torch.optim.AdamW([raw], lr=lr, weight_decay=weight_decay)
        way = Descent(
            mixture, table, raw, adam, loss_of, penalty=norms if penalty else None, clip=clip
        )
        share = 1.0 / len(table.names)
        for turn in evidence.batches.turns(epochs * evidence.batches.longest):
            way.step([(task, batch, share) for task, batch in turn])
    return fitted(table, raw.detach(), story(evidence, way.losses))


@method(
    "fw_merging",
    title="FW-Merging",
    url="https://arxiv.org/abs/2503.12649",
    variant="authors' LoRA branch, on true deltas",
    needs="gradients",
    low_rank=True,
)
def fw_merging(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    per: str = "module",
    loss: str = "labels",
    steps: int = 5,
    step_size: float = 1.0,
    lam: float = 1.0,
    init: float | None = None,
    cosine: bool = True,
    positions: Positions = "all",
) -> Fitted:
    """Walk by Frank-Wolfe inside the hull of the base and the adapters.

    In each step the loss's gradient at the current merge picks one adapter per module: the one
    whose delta points against it most, or the base if none does. Then ``M <- M + lam g (D_pick -
    M)`` with ``g = 2 step_size / (t + 2)``. The gradient is that of the mean over tasks and all
    their batches.

    Source: arXiv 2503.12649, algorithm 1, and the authors' code for LoRA; defaults as there. Where
    we differ: the gradient is taken with the true deltas (theirs: with A and B apart), and with
    the delta, not with the whole checkpoint; for per="model" the cosine is that of the whole
    delta (theirs: the sum of the cosines of all tensors).

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches; about 100 examples per task are usual.
        per: pick one adapter per "module", "layer" or "model".
        loss: "labels" (the model's own loss on them) or "entropy" as in AdaMerging.
        steps: number of steps.
        step_size: in [0, 1].
        lam: factor on each step, in [0, 1].
        init: coefficient of every adapter to start from, at most 1 / adapters; None is that.
        cosine: divide by the deltas' norms before picking; else large deltas are picked first.
        positions: for loss="entropy", see `adamerging`.

    Raises:
        ConfigError: an option is out of range, labels are missing, or a loss is NaN.
    """
    table = Table.of(stacks, per)
    most = 1.0 / len(table.names)
    steps, stride = whole("steps", steps), fraction("step_size", step_size) * fraction("lam", lam)
    init = most if init is None else number("init", init, least=0.0, most=most)
    choice("loss", loss, ("labels", "entropy"))
    labelled = loss == "labels"
    loss_of = label_loss(evidence, "fw_merging") if labelled else entropy_loss(positions)
    tasks = evidence.batches.of.items()
    terms = [(n, b, most / len(own)) for n, own in tasks for b in own]
    norms = _norms(table) if flag("cosine", cosine) else torch.ones_like(table.filled(0.0))
    c, here = table.filled(init), table.present()
    losses, picks = [], []
    with evidence.mixture() as mixture:
        for t in range(steps):
            value, gradient = slope(mixture, table, c, terms, loss_of)
            score = torch.where(here & (norms > 0.0), gradient / norms, math.inf)
            least, pick = score.min(dim=1)
            target = torch.zeros_like(c)
            down = least < 0.0
            target[down, pick[down]] = 1.0
            c = c + stride * 2.0 / (t + 2) * (target - c)
            losses.append(value)
            chosen = zip(table.keys, down.tolist(), pick.tolist(), strict=True)
            picks.append({k: table.names[i] if d else None for k, d, i in chosen})
    return fitted(table, c, {**story(evidence, losses), "picks": picks})


def _norms(table: Table) -> Tensor:
    """Return the norm of every adapter's delta over the modules of each row, (rows, adapters)."""
    squares = table.filled(0.0)
    for stack in table.stacks:
        squares[table.rows[stack.module][0]] += gram(stack).diagonal()
    return squares.clamp(min=0.0).sqrt()
