"""Learning coefficients of deltas by gradients: the one engine under `learned` and `franks`.

    y = W0 x + sum_i c[k, i] w_i D_i x          k: the module's place in a `Table`

The model runs with low-rank branches (`mixture`); the only leaf of the graph is the table of
coefficients, so that ``dL/dc[k, i] = sum over the modules of k of <dL/dW, w_i D_i>`` costs one
backward pass and no dense delta or gradient. Coefficients are float64 whatever the model's dtype.
Nothing is drawn at random, and neither modules nor adapters have an order that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..batches import Batch, Positions, predictions
from ..errors import ConfigError
from ..mixture import Evidence, Mixture, chunk_of_row, logits_of
from .check import choice, number
from .registry import Fitted
from .stack import Factored, Result, Stack

__all__ = [
    "Descent",
    "LossFn",
    "Per",
    "Table",
    "cross_entropy",
    "entropy",
    "entropy_loss",
    "fitted",
    "label_loss",
    "own_loss",
    "rate",
    "slope",
    "story",
]

Per = Literal["module", "layer", "model"]
# (mixture, task, batch) -> scalar loss in the state that is shown.
LossFn = Callable[[Mixture, str, Batch], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Which coefficients a module has, and which of them it shares with others.

    Attributes:
        stacks: the modules.
        keys: names of the rows of coefficients: modules, their chunks, layers, or "model".
        rows: module -> its rows; more than one where the rows of its deltas are cut into chunks.
    """

    stacks: tuple[Stack, ...]
    keys: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(
        cls, stacks: Sequence[Stack], per: str, chunks: Mapping[str, int] = MappingProxyType({})
    ) -> Table:
        """Return the table with one row per module, layer or model.

        Args:
            stacks: the modules.
            per: "module", "layer" or "model".
            chunks: module -> into how many chunks to cut it, with "module".

        Raises:
            ConfigError: `per` is something else.
        """
        choice("per", per, get_args(Per))
        keys: dict[str, int] = {}
        rows = {}
        for stack in stacks:
            name = {"module": stack.module, "layer": stack.layer}.get(per, per)
            count = max(1, chunks.get(stack.module, 1))
            own = [name] if count == 1 else [f"{name}[{k}]" for k in range(count)]
            rows[stack.module] = tuple(keys.setdefault(key, len(keys)) for key in own)
        return cls(tuple(stacks), tuple(keys), rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Adapter names, sorted: the columns."""
        return self.stacks[0].names

    def filled(self, value: float) -> Tensor:
        """Return a (rows, adapters) float64 table of one value."""
        return torch.full((len(self.keys), len(self.names)), value, dtype=torch.float64)

    def present(self) -> Tensor:
        """Return which adapters have a module in each row, (rows, adapters) bool."""
        here = torch.zeros(len(self.keys), len(self.names), dtype=torch.bool)
        for stack in self.stacks:
            for row in self.rows[stack.module]:
                here[row, list(stack.present)] = True
        return here

    def multiples(self, c: Tensor) -> dict[str, Tensor]:
        """Return module -> what `Mixture.show` takes, the user's weights applied.

        Args:
            c: (rows, adapters); the result is differentiable in it.
        """
        weighted = c * torch.tensor(self.stacks[0].weights, dtype=c.dtype)
        return {
            module: weighted[own[0]] if len(own) == 1 else weighted[list(own)].t()
            for module, own in self.rows.items()
        }

    def report(self, c: Tensor) -> dict[str, dict[str, float]]:
        """Return row -> adapter -> coefficient, where the adapter has a module there."""
        here = self.present()
        return {
            key: {n: float(c[k, i]) for i, n in enumerate(self.names) if here[k, i]}
            for k, key in enumerate(self.keys)
        }


def fitted(table: Table, c: Tensor, report: Mapping[str, Any]) -> Fitted:
    """Return the sum of deltas with these coefficients, an exact product of stacked factors.

    Args:
        table: the rows.
        c: (rows, adapters).
        report: what else was learned; the coefficients are added.
    """
    of = table.multiples(c.detach())

    def run(stacks: Sequence[Stack]) -> Result:
        for stack in stacks:
            pairs = [(*stack.scaled(i), own) for i, own in enumerate(of[stack.module])]
            b = torch.cat([b * _by_row(own, b) for b, _, own in pairs], dim=1)
            yield stack.module, Factored(b, torch.cat([a for _, a, _ in pairs]))

    return Fitted(run, {"coefficients": table.report(c), **report})


def _by_row(own: Tensor, b: Tensor) -> Tensor:
    own = own.to(b)
    return own if own.dim() == 0 else own[chunk_of_row(len(b), len(own)).to(own.device)][:, None]


def slope(
    mixture: Mixture,
    table: Table,
    c: Tensor,
    terms: Sequence[tuple[str, Batch, float]],
    loss_of: LossFn,
) -> tuple[float, Tensor]:
    """Return the weighted sum of losses at c and its gradient in c.

    Args:
        mixture: the live model.
        table: the rows.
        c: (rows, adapters); not changed.
        terms: (task, batch, weight of its loss); one graph exists at a time.
        loss_of: the loss.

    Raises:
        ConfigError: a loss or its gradient is NaN or infinite.
    """
    c = c.detach()
    total, gradient = 0.0, torch.zeros_like(c)
    for task, batch, weight in terms:
        with torch.enable_grad():
            leaf = c.clone().requires_grad_(True)
            mixture.show(table.multiples(leaf))
            loss = weight * loss_of(mixture, task, batch)
            # A loss that no adapted module reaches (an unused expert) has no gradient.
            (own,) = (
                torch.autograd.grad(loss, [leaf], allow_unused=True)
                if loss.requires_grad
                else (None,)
            )
        value = float(loss.detach())
        if not math.isfinite(value) or (own is not None and not bool(torch.isfinite(own).all())):
            raise ConfigError(
                f"the loss of task {task!r} is {value}, or its gradient is not finite, at "
                f"coefficients between {float(c.min()):.3g} and {float(c.max()):.3g}. Check that "
                f"task's batches, or lower lr."
            )
        total += value
        gradient += 0.0 if own is None else own
    return total, gradient


@dataclass(slots=True, eq=False)
class Descent:
    """Coefficients on their way down, and the losses on it.

    Attributes:
        mixture: the live model.
        table: the rows.
        raw: what the optimiser moves; a leaf.
        optimiser: moves it.
        loss_of: the loss of one task's batch.
        value: raw -> coefficients; None if they are the same.
        penalty: coefficients -> a loss of their own, or None.
        project: puts `raw` back where it is allowed after each step, or None.
        clip: largest norm of the gradient, or None.
        losses: one value per step, penalty included, before the step.
    """

    mixture: Mixture
    table: Table
    raw: Tensor
    optimiser: torch.optim.Optimizer
    loss_of: LossFn
    value: Callable[[Tensor], Tensor] | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    project: Callable[[Tensor], Tensor] | None = None
    clip: float | None = None
    losses: list[float] = field(default_factory=list)

    def coefficients(self) -> Tensor:
        """Return what `raw` stands for."""
        return self.raw if self.value is None else self.value(self.raw)

    def step(self, terms: Sequence[tuple[str, Batch, float]]) -> None:
        """Take one step down the weighted sum of the terms' losses."""
        with torch.enable_grad():
            c = self.coefficients()
            loss, gradient = slope(self.mixture, self.table, c, terms, self.loss_of)
            if self.penalty is not None:
                leaf = c.detach().requires_grad_(True)
                extra = self.penalty(leaf)
                loss += float(extra.detach())
                gradient = gradient + torch.autograd.grad(extra, [leaf])[0]
            (self.raw.grad,) = torch.autograd.grad(c, [self.raw], grad_outputs=gradient)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([self.raw], self.clip)
        self.optimiser.step()
        if self.project is not None:
            with torch.no_grad():
                self.raw.copy_(self.project(self.raw))
        self.losses.append(loss)


def entropy(rows: Tensor) -> Tensor:
    """Return the mean entropy, in nats, of softmaxed rows (rows, classes)."""
    return cross_entropy(rows.softmax(-1), rows)


def cross_entropy(p: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of ``-sum p log softmax(rows)`` over rows; p and rows are (rows, classes)."""
    logs = rows.log_softmax(-1)
    # A class of logit -inf (a padded vocabulary) has p = 0, and 0 * -inf would be NaN.
    return -(p * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1).mean()


def entropy_loss(positions: Positions) -> LossFn:
    """Return the mean entropy of the output distributions at all tokens, or at the last ones."""
    choice("positions", positions, get_args(Positions))

    def loss(mixture: Mixture, task: str, batch: Batch) -> Tensor:
        logits = logits_of(mixture.run(batch, grad=True))
        return entropy(predictions(batch, logits, positions, decoder=mixture.is_encoder_decoder))

    return loss


def label_loss(evidence: Evidence, method: str) -> LossFn:
    """Return the model's own loss on the batches' labels.

    Raises:
        ConfigError: a batch has no labels.
    """
    evidence.batches.need_labels(method)
    return lambda mixture, task, batch: own_loss(mixture.run(batch, grad=True))


def own_loss(output: Any) -> Tensor:
    """Return the loss that the model computed from the batch's labels.

    Raises:
        ConfigError: it computed none.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"the model got labels but returned no loss ({type(output).__name__}). Merge adapters "
            f"of a model with a head that computes one."
        )
    return loss


def rate(lr: object) -> float:
    """Return a step size.

    Raises:
        ConfigError: it is not a positive number.
    """
    value = number("lr", lr)
    if value <= 0.0:
        raise ConfigError(f"lr must be positive, got {lr!r}.")
    return value


def story(evidence: Evidence, losses: list[float]) -> dict[str, Any]:
    """Return the part of a report that every learned method has."""
    names = evidence.batches.of
    return {"loss": losses, "examples": {n: evidence.batches.count(n) for n in names}}
