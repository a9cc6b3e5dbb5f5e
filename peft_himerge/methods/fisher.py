"""Fisher merging: every entry of the weight is averaged by how much each expert's output needs it.

    M = sum_i c_i F_i * D_i / sum_i c_i F_i          entry by entry

F_i is the diagonal of expert i's Fisher information in W, the mean over examples of the squared
gradient of log p(y | x), with y from the model's own distribution. Source: arXiv 2111.09832,
METHODS 5.1. Each example is run alone, so that its gradient is squared before any sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch, predictions
from ..combine import new_dense
from ..errors import ConfigError
from ..mixture import Evidence, Mixture, logits_of
from .check import choice, flag, number, whole
from .learning import own_loss
from .registry import Fitted, method
from .regmean import importance
from .stack import Dense, Stack, named_generator

__all__ = ["fisher"]

_LABELS = ("model", "given")


@method(
    "fisher",
    title="Fisher merging",
    url="https://arxiv.org/abs/2111.09832",
    variant="authors, diagonal Fisher of the adapted modules",
    needs="inputs",
)
def fisher(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    labels: str = "model",
    samples: int = 1,
    normalize: bool = True,
    floor: float = 1e-6,
) -> Fitted:
    """Average every entry with the experts' diagonal Fisher information as weights.

    The gradients are exact per example: ``(sum_t g_t x_t^T)^2`` from each module's inputs and
    output gradients (of a convolution: x_t the patch that it reads at place t), for one example
    at a time and for all given examples. What is squared:
    for one prediction per example, every class, weighted by its probability (the exact
    expectation); for a prediction per token, one draw from the model at every token that is no
    padding, summed over the sequence.

    Source: arXiv 2111.09832, equation 4 and the authors' code, in which norms are divided out.
    Where we differ: `floor` is relative to each expert's mean; an adapter without a module counts
    there with its Fisher and a delta of 0. Weights are the paper's coefficients c_i.

    Cost: one forward and backward per example (times the number of classes or `samples`); memory
    three numbers per entry of the adapted weights, however many adapters there are, of which one
    stays as long as the result, and one dense gradient.

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches.
        labels: "model" as above; "given" squares the gradient of the model's own loss on the
            batches' labels (the empirical Fisher).
        samples: draws per token with labels="model"; their squares are averaged.
        normalize: divide each F_i by its norm over the whole model.
        floor: least F_i, as a share of its mean, >= 0.

    Raises:
        ConfigError: an option is out of range, a weight negative, labels are missing, or a
            gradient is NaN.
    """
    choice("labels", labels, _LABELS)
    samples, floor = whole("samples", samples, least=1), number("floor", floor, least=0.0)
    normalize = flag("normalize", normalize)
    weights = importance(stacks[0], "fisher")
    if labels == "given":
        evidence.batches.need_labels("fisher with labels='given'")
    seen = {stack.module: stack for stack in stacks}
    sums = {module: _Sum(_zeros(stack), _zeros(stack)) for module, stack in seen.items()}
    norms = {}
    with evidence.mixture() as mixture:
        for i, name in enumerate(mixture.names):
            f = _information(mixture, evidence, name, seen, labels, samples)
            norms[name] = _norm(f)
            least = floor * _mean(f)
            factor = weights[i] / (norms[name] or 1.0) if normalize else weights[i]
            for module, stack in seen.items():
                sums[module].add(f.pop(module).clamp_(min=least).mul_(factor), stack, i)
    merged = {module: total.quotient(seen[module], weights) for module, total in sums.items()}
    return Fitted(
        lambda again: ((stack.module, Dense(merged[stack.module])) for stack in again),
        {
            "examples": {name: evidence.batches.count(name) for name in stacks[0].names},
            "labels": labels,
            "fisher_norm": norms,
        },
    )


@dataclass(slots=True, eq=False)
class _Sum:
    """One module's sums over adapters.

    Attributes:
        above: (out, in) sum of c_i F_i * D_i.
        below: (out, in) sum of c_i F_i.
    """

    above: Tensor
    below: Tensor

    def add(self, f: Tensor, stack: Stack, i: int) -> None:
        """Add adapter `i` with its c_i F_i, (out, in)."""
        self.below += f
        for rows, blocks in stack.blocks():
            self.above[rows].addcmul_(f[rows], blocks[i])

    def quotient(self, stack: Stack, weights: Sequence[float]) -> Tensor:
        """Return above / below; the weighted average where no adapter has any information."""
        known = self.below > 0.0
        merged = self.above.div_(torch.where(known, self.below, torch.ones_like(self.below)))
        if not bool(known.all()):
            for rows, blocks in stack.blocks():
                plain = sum(w * d for w, d in zip(weights, blocks, strict=True))
                merged[rows] = torch.where(known[rows], merged[rows], plain)
        self.below = self.below[:0]
        return merged


def _information(
    mixture: Mixture,
    evidence: Evidence,
    name: str,
    stacks: Mapping[str, Stack],
    labels: str,
    samples: int,
) -> dict[str, Tensor]:
    """Return module -> diagonal Fisher of one adapter alone, (out, in)."""
    f = {module: _zeros(stack) for module, stack in stacks.items()}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(module: str, x: Tensor, output: Tensor) -> Tensor:
        tap = torch.zeros_like(output, requires_grad=True)
        calls.append((module, x.detach(), tap))
        return output + tap

    mixture.solo(name)
    mixture.watch = watch
    for n, example in enumerate(evidence.batches.singles(name)):
        calls.clear()
        output = mixture.run(example, grad=True)
        generator = named_generator(evidence.seed, "fisher", name, n)
        with torch.enable_grad():
            for share, loss in _losses(mixture, example, output, labels, samples, generator):
                taps = [tap for _, _, tap in calls]
                grads = torch.autograd.grad(loss, taps, retain_graph=True, allow_unused=True)
                _add_squares(f, mixture, calls, grads, share)
    mixture.watch = None
    count = evidence.batches.count(name)
    for module, total in f.items():
        if not bool(torch.isfinite(total.div_(count)).all()):
            raise ConfigError(
                f"the gradient in module {module!r} is NaN or infinite when adapter {name!r} runs "
                f"on its batches."
            )
    return f


def _losses(
    mixture: Mixture,
    example: Batch,
    output: Any,
    labels: str,
    samples: int,
    generator: torch.Generator,
) -> Iterator[tuple[float, Tensor]]:
    """Yield (share, scalar) pairs: F is the sum of the shares times the squared gradients."""
    if labels == "given":
        yield 1.0, own_loss(output)
        return
    logits = logits_of(output)
    if logits.shape[-1] < 2:
        raise ConfigError(
            "fisher needs a model with two or more classes; a regression has no distribution of "
            "labels. Pass labels='given' for the gradient of its loss."
        )
    rows = predictions(example, logits, "all", decoder=mixture.is_encoder_decoder)
    logs = rows.log_softmax(-1)
    p = logs.detach().exp().cpu()
    if logits.dim() == 2:
        yield from ((float(p[0, y]), logs[0, y]) for y in range(p.shape[1]) if p[0, y] != 0)
        return
    for _ in range(samples if len(p) else 0):
        drawn = torch.multinomial(p, 1, generator=generator).to(logs.device)
        yield 1.0 / samples, logs.gather(1, drawn).sum()


def _add_squares(
    f: Mapping[str, Tensor],
    mixture: Mixture,
    calls: Sequence[tuple[str, Tensor, Tensor]],
    grads: Sequence[Tensor | None],
    share: float,
) -> None:
    """Add ``share * (dL/dW)^2`` of one example to every module's sum."""
    # A module that is called more than once has one gradient, the sum over its calls.
    last = {module: place for place, (module, _, _) in enumerate(calls)}
    open_sums: dict[str, Tensor] = {}
    for place, ((module, x, _), g) in enumerate(zip(calls, grads, strict=True)):
        if module in f and g is not None:
            dense = _weight_gradient(mixture, module, x, g, f[module])
            found = open_sums.pop(module, None)
            open_sums[module] = dense if found is None else found.add_(dense)
        if last[module] == place and module in open_sums:
            whole_gradient = open_sums.pop(module)
            f[module].addcmul_(whole_gradient, whole_gradient, value=share)


def _weight_gradient(mixture: Mixture, module: str, x: Tensor, g: Tensor, like: Tensor) -> Tensor:
    """Return dL/dW, (out, in), of one call, given dL/dy."""
    g, x, kind = g.to(like.device, like.dtype), x.to(like.device), mixture.kind(module)
    if kind == "conv":
        patches = list(mixture.patches(module, x.to(like.dtype)))
        of_examples = g.reshape(len(patches), like.shape[0], -1)
        return of_examples.transpose(0, 1).flatten(1) @ torch.cat(patches)
    g = g.flatten(0, -2)
    if kind != "embedding":
        return g.t() @ x.to(like.dtype).flatten(0, -2)
    scale = getattr(mixture.bases[module], "embed_scale", None)
    g = g if scale is None else g * scale.to(g)
    dense = new_dense((like.shape[0], like.shape[1]), like.dtype, like.device)
    return dense.index_add_(1, x.flatten(), g.t())


def _zeros(stack: Stack) -> Tensor:
    return new_dense(stack.shape, stack.dtype, stack.device)


def _norm(f: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(x).double().square()) for x in f.values()))


def _mean(f: Mapping[str, Tensor]) -> float:
    entries = sum(x.numel() for x in f.values())
    return sum(float(x.sum(dtype=torch.float64)) for x in f.values()) / max(1, entries)
