"""RegMean: the merged module whose outputs are nearest to every expert's, on the expert's inputs.

    M = (sum_i D_i G_i) (sum_j G_j)^-1          G_i = X_i^T X_i / rows, shrunk off the diagonal

The base cancels, and each D_i G_i = B_i (A_i G_i) keeps its thin factor, so the result is exact in
factor space. Source: arXiv 2212.09849, METHODS 5.2; rounds after RegMean++, arXiv 2508.03121. Gram
matrices are summed up while the live model runs: two of (in, in) per group of modules that read the
same tensor (q, k and v; gate and up), however many adapters there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mixture import Evidence, Mixture
from .check import flag, fraction, number, whole
from .registry import Fitted, method
from .stack import Delta, Factored, Result, Stack

__all__ = ["importance", "regmean", "shared_inputs"]

_GIB = float(1 << 30)


@dataclass(slots=True, eq=False)
class _Group:
    """Modules that read the same tensor, and what is known about it.

    Attributes:
        stacks: the modules; the first one is looked at.
        gram: (in, in) sum over one adapter's rows, not yet divided by their number; (in,), its
            diagonal, of an embedding, whose inputs are one-hot.
        total: weighted sum over the adapters seen so far of their shrunk Gram matrices, likewise.
        rows: number of the adapter's rows.
        parts: module -> per adapter A_i G_i, (rank, in).
        shares: per adapter what its error counts.
    """

    stacks: list[Stack]
    gram: Tensor
    total: Tensor
    rows: int = 0
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    @property
    def one_hot(self) -> bool:
        """True for an embedding."""
        return self.gram.dim() == 1

    @property
    def diagonal(self) -> Tensor:
        """(in,) diagonal of `total`."""
        return self.total if self.one_hot else self.total.diagonal()

    def take(self, x: Tensor) -> None:
        """Add rows, (rows, in), or (rows, 1) with the places of one-hot ones."""
        x = x.to(self.gram.device)
        self.rows += x.shape[0]
        if self.one_hot:
            self.gram += torch.bincount(x.flatten(), minlength=len(self.gram)).to(self.gram)
        else:
            x = x.to(self.gram.dtype)
            self.gram.addmm_(x.t(), x)

    def finish(self, index: int, share: float, off_diagonal: float) -> None:
        """Turn the sum over the rows of adapter `index` into its share of the result."""
        gram = self.gram / max(1, self.rows)
        if not self.one_hot:
            diagonal = gram.diagonal().clone()
            gram *= off_diagonal
            gram.diagonal().copy_(diagonal)
        self.shares.append(share)
        self.total.add_(gram, alpha=share)
        for stack in self.stacks:
            a = stack.scaled(index)[1].to(gram.dtype)
            self.parts.setdefault(stack.module, []).append(a * gram if self.one_hot else a @ gram)
        self.gram.zero_()
        self.rows = 0

    def effects(self) -> list[float]:
        """Return per adapter the mean square of what its deltas give, summed over the modules."""
        sums = [0.0] * len(self.shares)
        for stack in self.stacks:
            for i, part in enumerate(self.parts[stack.module]):
                b, a = (x.to(part.dtype) for x in stack.scaled(i))
                sums[i] += float(((b.t() @ b) * (part @ a.t())).double().sum())
        return sums


@method(
    "regmean",
    title="RegMean",
    url="https://arxiv.org/abs/2212.09849",
    variant="authors, ridge in place of their solver's failure",
    needs="inputs",
    low_rank=True,
)
def regmean(
    stacks: Sequence[Stack],
    evidence: Evidence,
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    gram_gib: float = 4.0,
    rounds: int = 1,
    relative: bool = False,
) -> Fitted:
    """Merge so that every module's output is nearest to each expert's on that expert's inputs.

    ``M = (sum_i w_i D_i (G_i + e I)) (sum_i w_i (G_i + e I))^-1``, with each expert run alone on
    its own task's tokens, padding left out. Weights say how much an expert's error counts; they do
    not scale its delta. Directions in which no expert had an input get the weighted average.

    Source: arXiv 2212.09849, equation 3 and the authors' code. Where we differ: the ridge e, which
    a singular sum needs, is added to each Gram matrix, so that it pulls towards the average instead
    of 0. Embeddings are solved too, by how often each task has each token (their inputs are
    one-hot), and convolutions, by the patches that they read, padding too; the authors average what
    is not linear. An adapter without a module counts there with a delta of 0.

    Args:
        stacks: the modules.
        evidence: the live model and each task's batches; labels are not needed.
        off_diagonal: factor on the Gram matrices off their diagonal, in [0, 1]. 0.9 is the
            authors' usual one; 1 changes nothing, 0 weighs inputs one by one.
        ridge: e as a share of the mean diagonal entry, >= 0, raised tenfold as long as rounding
            outweighs it; 0 takes the pseudo-inverse, with singular values below in * eps of the
            largest as 0, and gives 0 where no input was.
        gram_gib: most GiB of Gram matrices at once (two per group); where it does not suffice the
            batches are run again for the modules left over.
        rounds: 1 is RegMean. Each further round takes as an expert's inputs what the merged model
            of the round before gives the modules there, as RegMean++ does (arXiv 2508.03121): the
            merge is then nearest to the experts on what will reach it. Its authors go through the
            layers one by one, with the expert's own modules within a layer; we take all at once.
        relative: from the second round on divide an expert's error by its effect, the mean square
            of what its delta gives on its own inputs, so that an expert whose effects are small
            keeps as much of them as the others (ours). Modules that read the same tensor count
            together; an effect below half of the experts' mean counts as that half.

    Raises:
        ConfigError: an option is out of range, a weight negative, or `relative` has one round.
    """
    relative = flag("relative", relative)
    off_diagonal, rounds = fraction("off_diagonal", off_diagonal), whole("rounds", rounds, least=1)
    ridge, limit = number("ridge", ridge, least=0.0), number("gram_gib", gram_gib, least=0.0)
    weights = importance(stacks[0], "regmean")
    if relative and rounds == 1:
        raise ConfigError(
            "relative=True needs rounds=2 or more, since the first measures the effects. Give that "
            "or relative=False."
        )
    kinds = {s.module: evidence.combiner.kind(s.module) for s in stacks}
    plain = [s for s in stacks if kinds[s.module] in ("linear", "conv1d")]
    right: dict[str, list[Tensor]] = {}
    with evidence.mixture() as mixture:
        alike = shared_inputs(mixture, evidence, plain)
        alike += [[s] for s in stacks if kinds[s.module] in ("embedding", "conv")]
        passes, show, shares = 0, mixture.solo, {s.module: weights for s in stacks}
        for n in range(rounds):
            if n:
                show = partial(_show, mixture, dict(_run(stacks, right)))
            todo, unreached = list(alike), []
            while todo:
                passes += 1
                now = _measured(mixture, show, evidence, todo, limit * _GIB, shares, off_diagonal)
                for group in now:
                    if not bool(group.diagonal.any()):
                        unreached += [s.module for s in group.stacks]
                    right.update(_solved(group, ridge))
                    if relative and n == 0:
                        shares[group.stacks[0].module] = _shares(weights, group.effects())
    return Fitted(
        lambda again: _run(again, right),
        {
            "examples": {name: evidence.batches.count(name) for name in stacks[0].names},
            "passes": passes,
            "without_input": sorted(unreached),
        },
    )


def importance(stack: Stack, name: str) -> list[float]:
    """Return the user's weights divided by their sum.

    Raises:
        ConfigError: one is negative, or all are 0.
    """
    total = sum(stack.weights)
    if min(stack.weights) < 0.0 or total == 0.0:
        raise ConfigError(
            f"{name} needs weights >= 0 that are not all 0, since they say how much an expert "
            f"counts; got {dict(zip(stack.names, stack.weights, strict=True))}."
        )
    return [w / total for w in stack.weights]


def _shares(weights: Sequence[float], effects: Sequence[float]) -> list[float]:
    """Return what each expert counts when its error is divided by its effect; the sum is 1."""
    least = 0.5 * sum(effects) / len(effects)
    if least <= 0.0:  # the module is never reached, or nobody changes anything there
        return list(weights)
    raw = [w / max(e, least) for w, e in zip(weights, effects, strict=True)]
    return [share / sum(raw) for share in raw]


def shared_inputs(
    mixture: Mixture, evidence: Evidence, stacks: Sequence[Stack]
) -> list[list[Stack]]:
    """Group modules that are given the very same tensors, from a look at one example."""
    seen: dict[str, list[Tensor]] = {}

    def look(module: str, x: Tensor, output: Tensor) -> Tensor:
        seen.setdefault(module, []).append(x)
        return output

    mixture.solo(mixture.names[0])
    mixture.watch = look
    mixture.run(next(evidence.batches.singles(mixture.names[0])), logits=False)
    mixture.watch = None
    groups: dict[object, list[Stack]] = {}
    for stack in stacks:
        same = tuple(id(x) for x in seen.get(stack.module, ()))
        groups.setdefault((same, stack.dtype) if same else stack.module, []).append(stack)
    return list(groups.values())


def _show(mixture: Mixture, merged: Mapping[str, Delta], _name: str) -> None:
    mixture.lend({m: (d.b, d.a) for m, d in merged.items() if isinstance(d, Factored)})


def _measured(
    mixture: Mixture,
    show: Callable[[str], None],
    evidence: Evidence,
    todo: list[list[Stack]],
    limit: float,
    shares: Mapping[str, Sequence[float]],
    off_diagonal: float,
) -> list[_Group]:
    """Take as many groups off `todo` as `limit` bytes hold, and measure all adapters there.

    `show` puts the state into the model in which an adapter's batches are run.
    """
    groups: dict[str, _Group] = {}
    held = 0
    while todo:
        first = todo[0][0]
        one_hot = mixture.kind(first.module) == "embedding"
        shape = (first.shape[1],) * (1 if one_hot else 2)
        held += 2 * math.prod(shape) * first.dtype.itemsize
        if groups and held > limit:
            break
        gram = torch.zeros(shape, dtype=first.dtype, device=first.device)
        groups[first.module] = _Group(todo.pop(0), gram, torch.zeros_like(gram))
    for index, name in enumerate(mixture.names):
        show(name)
        for batch in evidence.batches.of[name]:
            mixture.watch = _taking(mixture, groups, batch)
            mixture.run(batch, logits=False)
        mixture.watch = None
        for module, group in groups.items():
            if not bool(torch.isfinite(group.gram).all()):
                raise ConfigError(
                    f"the inputs of module {module!r} hold NaN or infinity on the batches of "
                    f"adapter {name!r}."
                )
            group.finish(index, shares[module][index], off_diagonal)
    return list(groups.values())


def _taking(
    mixture: Mixture, groups: Mapping[str, _Group], batch: Mapping[str, Tensor]
) -> Callable[[str, Tensor, Tensor], Tensor]:
    def take(module: str, x: Tensor, output: Tensor) -> Tensor:
        group = groups.get(module)
        if group is None:
            return output
        if mixture.kind(module) == "conv":
            for patches in mixture.patches(module, x):
                group.take(patches)
        else:
            group.take(mixture.tokens(module, batch, x.unsqueeze(-1) if group.one_hot else x))
        return output

    return take


def _solved(group: _Group, ridge: float) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield (module, per adapter the right factor H_i (rank, in) with D_i's share ``B_i H_i``)."""
    mean = float(group.diagonal.double().mean())
    solve, extra = _solver(group.total, ridge * mean)
    nothing = not bool(group.diagonal.any())
    for stack in group.stacks:
        own = []
        for i, share in enumerate(group.shares):
            a = stack.scaled(i)[1]
            if nothing:  # no input ever came here: nothing tells the experts apart
                own.append(share * a)
                continue
            rows = group.parts[stack.module][i].double() + extra * a.double()
            own.append((share * solve(rows)).to(stack.dtype))
        yield stack.module, own


def _solver(total: Tensor, extra: float) -> tuple[Callable[[Tensor], Tensor], float]:
    """Return what multiplies rows (any, in), float64, by the inverse of ``total + extra I``.

    And `extra`, which is raised tenfold as long as the rounding of the sums outweighs it: with
    fewer rows than inputs, and off_diagonal near 1, it is all that keeps the matrix from being
    singular. A `total` of one axis is a diagonal.
    """
    wide = total.double()
    if wide.dim() == 1:
        below = wide + extra
        return (lambda rows: torch.where(below > 0.0, rows / below, 0.0)), extra
    if extra > 0.0:
        eye = torch.eye(len(wide)).to(wide)
        lower, failed = torch.linalg.cholesky_ex(wide + extra * eye)
        while failed:
            extra *= 10.0
            lower, failed = torch.linalg.cholesky_ex(wide + extra * eye)
        return (lambda rows: torch.cholesky_solve(rows.t(), lower).t()), extra
    values, vectors = torch.linalg.eigh(wide)
    fine = values > len(values) * torch.finfo(total.dtype).eps * values[-1].clamp(min=0.0)
    basis = vectors[:, fine]
    inverse = (basis / values[fine]) @ basis.t()
    return (lambda rows: rows @ inverse), 0.0


def _run(stacks: Sequence[Stack], right: Mapping[str, list[Tensor]]) -> Result:
    for stack in stacks:
        left = [stack.scaled(i)[0] for i in range(len(stack.names))]
        yield stack.module, Factored(torch.cat(left, dim=1), torch.cat(right[stack.module]))
