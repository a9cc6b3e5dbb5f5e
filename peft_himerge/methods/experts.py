"""Expert Merging: coefficients with which the merged model does as each expert does on its task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import Batch, predictions
from ..errors import ConfigError, suggest
from ..layers import OUTSIDE
from ..mixture import Evidence, Mixture, logits_of
from .check import number, whole
from .learning import Descent, LossFn, Table, cross_entropy, fitted, rate, story
from .registry import Fitted, method
from .stack import Stack

__all__ = ["expert_merging"]


@method(
    "expert_merging",
    title="Expert Merging",
    url="https://arxiv.org/abs/2509.25712",
    variant="authors' loss and parametrisation",
    needs="gradients",
    low_rank=True,
)
def expert_merging(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    per: str = "module",
    epochs: int = 1,
    lr: float = 0.5,
    init: float = 0.1,
    accumulate: int = 8,
    temperature: float = 1.0,
    hidden: float = 1.0,
    layers: Sequence[str] | None = None,
    shrink: float = 5.0,
    importance: Mapping[str, float] | None = None,
    chunks: Mapping[str, int] | None = None,
) -> Fitted:
    """Learn coefficients with which the merged model speaks like each expert on its own task.

    Per batch of task i, at all tokens that are no padding: ``a_i (T^2 CE(softmax(z_i / T), z / T) +
    hidden * mean_layers MSE(h, h_i)) + shrink * adapters * mean |c - init|``, z_i and h_i from
    expert i alone. ``c = sigmoid(raw)``; AdamW without decay, its step size falling to 0 over the
    run by a cosine. Good batches hold a few prompts per task, each with the expert's own answer.

    Source: arXiv 2509.25712, the authors' code, its defaults. Where we differ: one fall of the step
    size for their warm restarts, whose period is not given. With `chunks` (Expert Merging++) the
    rows of a delta are cut into equal chunks with coefficients of their own; their cuts run
    through rows, which no pair of factors could hold. How many chunks a module deserves is left
    to you: the paper's rule is not in its code.

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches; labels are not needed.
        per: one coefficient per adapter and "module", "layer" or "model".
        epochs: passes over all batches, task after task in turn.
        lr: step size, > 0.
        init: coefficient to start from and to be pulled to, in (0, 1).
        accumulate: batches per step.
        temperature: T, > 0.
        hidden: weight of the hidden states' error, >= 0. It is not relative: where hidden states
            have huge entries (Gemma's have) it drowns the outputs' error unless it is small.
        layers: which blocks' outputs count ("model.layers.3"); None is every block in which an
            adapter has a module.
        shrink: weight of the pull to `init`, >= 0.
        importance: adapter -> a_i; 1 by default.
        chunks: module -> number of chunks; 0 keeps its coefficients at `init`, 1 is the default.
            Only with per="module".

    Raises:
        ConfigError: an option is out of range, or a loss is NaN.
    """
    epochs, lr = whole("epochs", epochs), rate(lr)
    accumulate = whole("accumulate", accumulate, least=1)
    init = number("init", init, least=1e-6, most=1.0 - 1e-6)
    shrink = number("shrink", shrink, least=0.0)
    shares = _importance(stacks[0].names, importance)
    blocks = _blocks(stacks, layers) if number("hidden", hidden, least=0.0) else ()
    loss_of = _alignment(temperature, hidden, blocks)
    table, free = _cut(stacks, per, chunks)
    count = max(1, int(free.sum()))
    pull = shrink * len(table.names) / count

    def value(raw: Tensor) -> Tensor:
        return torch.where(free, raw.sigmoid(), init)

    raw = table.filled(math.log(init / (1.0 - init))).requires_grad_(True)
    todo = _in_turn(evidence, epochs, accumulate)
    with evidence.mixture() as mixture:
        adam = torch.optim.AdamW([raw], lr=lr, weight_decay=0.0)
        way = Descent(
            mixture,
            table,
            raw,
            adam,
            loss_of,
            value=value,
            penalty=lambda c: pull * (c - init).abs().sum(),
        )
        for step, terms in enumerate(todo):
            adam.param_groups[0]["lr"] = lr * (1.0 + math.cos(math.pi * step / len(todo))) / 2.0
            way.step([(name, batch, shares[name] / len(terms)) for name, batch in terms])
    report = {**story(evidence, way.losses), "aligned_layers": list(blocks)}
    return fitted(table, value(raw.detach()), report)


def _in_turn(evidence: Evidence, epochs: int, accumulate: int) -> list[list[tuple[str, Batch]]]:
    """Return the batches of every step: each one once per epoch, the tasks taking turns."""
    batches = evidence.batches
    places = range(batches.longest)
    once = [(n, own[k]) for k in places for n, own in batches.of.items() if k < len(own)]
    every = [once[k : k + accumulate] for k in range(0, len(once), accumulate)]
    return every * epochs


def _importance(names: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    for name in given or {}:
        if name not in names:
            raise ConfigError(f"importance names the adapter {name!r}.{suggest(name, names)}")
    pairs = [(name, (given or {}).get(name, 1.0)) for name in names]
    return {name: number(f"importance[{name!r}]", a, least=0.0) for name, a in pairs}


def _cut(
    stacks: Sequence[Stack], per: str, chunks: Mapping[str, int] | None
) -> tuple[Table, Tensor]:
    """Return the table, and which of its coefficients are free, (rows, adapters)."""
    sizes = dict(chunks or {})
    shapes = {s.module: s.shape for s in stacks}
    if sizes and per != "module":
        raise ConfigError(f"chunks cut modules, so they need per='module', got per={per!r}.")
    for module, size in sizes.items():
        if module not in shapes:
            raise ConfigError(f"chunks names {module!r}.{suggest(str(module), shapes)}")
        if whole(f"chunks[{module!r}]", size) > shapes[module][0]:
            raise ConfigError(
                f"chunks[{module!r}] is {size}, but its delta has {shapes[module][0]} rows to cut."
            )
    table = Table.of(stacks, per, sizes)
    free = table.present()
    for module in (m for m, size in sizes.items() if size == 0):
        free[list(table.rows[module])] = False
    return table, free


def _blocks(stacks: Sequence[Stack], layers: Sequence[str] | None) -> tuple[str, ...]:
    known = [s.layer for s in stacks if s.layer != OUTSIDE]
    if isinstance(layers, str):
        raise ConfigError(f"layers must be a list of names, got {layers!r}.")
    for layer in layers or ():
        if layer not in known:
            raise ConfigError(f"layers has {layer!r}.{suggest(str(layer), dict.fromkeys(known))}")
    return tuple(dict.fromkeys(known if layers is None else layers))


def _alignment(temperature: float, hidden: float, blocks: Sequence[str]) -> LossFn:
    """Return the distance of the merged model from one expert on a batch."""
    hot = number("temperature", temperature, least=1e-6)

    def loss(mixture: Mixture, task: str, batch: Batch) -> Tensor:
        def rows(output: Any) -> Tensor:
            logits = logits_of(output)
            return predictions(batch, logits, "all", decoder=mixture.is_encoder_decoder) / hot

        with mixture.reading(blocks) as aims:
            aim = rows(mixture.alone(task, batch)).softmax(-1)
        with mixture.reading(blocks) as states:
            total = hot * hot * cross_entropy(aim, rows(mixture.run(batch, grad=True)))
        errors = [
            F.mse_loss(mixture.tokens(block, batch, h), mixture.tokens(block, batch, e))
            for (block, h), (_, e) in zip(states, aims, strict=True)
        ]
        return total + hidden * torch.stack(errors).mean() if errors else total

    return loss
