"""A reversible bank: several adapters in less room, each rebuilt when it is wanted.

The output is not one merged adapter. Every row of B and every column of A (a "position", a vector
of length r) is stored as a mean over the adapters and a few directions along which they differ:

    x_i  ~  mean + codes_i @ basis          mean (r), basis (p, r), codes_i (p)

Source: the storage and reconstruction rule follow the description of RMM, reversible merging for
low-rank weights (arXiv 2510.14163), which we know from secondary sources only, hence our own name.
Ours: different ranks (padded with zeros), missing modules, and a position's basis never has more
directions than the adapters can differ in, so `directions >= T - 1` is lossless.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError, ConfigError, suggest
from ..factors import Adapter, Kind, LoraFactors
from ..files import replacing
from .check import whole
from .stack import Stack

__all__ = ["BankModule", "Positions", "ReversibleBank", "reversible_bank"]

_FORMAT = "peft_himerge.reversible_bank.1"


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """All positions of one side of one module.

    Attributes:
        mean: (positions, rank).
        basis: (positions, directions, rank), orthogonal rows.
        codes: (positions, adapters, directions), orthonormal columns.
    """

    mean: Tensor
    basis: Tensor
    codes: Tensor

    def rebuild(self, i: int) -> Tensor:
        """Return the (positions, rank) vectors of the i-th adapter."""
        return self.mean + torch.einsum("nd,ndr->nr", self.codes[:, i], self.basis)

    @property
    def numel(self) -> int:
        """Count of stored numbers."""
        return self.mean.numel() + self.basis.numel() + self.codes.numel()


@dataclass(frozen=True, slots=True, eq=False)
class BankModule:
    """One module of the bank.

    Attributes:
        b: positions are the outputs.
        a: positions are the inputs.
        names: the adapters that have this module, in the order of the codes.
        ranks: their ranks.
        kind: see `LoraFactors`.
        kernel: see `LoraFactors`.
    """

    b: Positions
    a: Positions
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()

    def rebuild(self, name: str) -> LoraFactors:
        """Return the factors of one adapter, scaling folded in."""
        i = self.names.index(name)
        rank = self.ranks[i]
        return LoraFactors(
            a=self.a.rebuild(i)[:, :rank].t().contiguous(),
            b=self.b.rebuild(i)[:, :rank].contiguous(),
            scaling=1.0,
            kind=self.kind,
            kernel=self.kernel,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ReversibleBank:
    """Several adapters in one store; `rebuild` gives each of them back.

    Attributes:
        names: the adapters.
        modules: module path -> what is stored of it.
    """

    names: tuple[str, ...]
    modules: Mapping[str, BankModule] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Numbers stored, as a share of those of the adapters."""
        stored = sum(m.b.numel + m.a.numel for m in self.modules.values())
        given = sum(
            (m.b.mean.shape[0] + m.a.mean.shape[0]) * sum(m.ranks) for m in self.modules.values()
        )
        return stored / given

    def rebuild(self, name: str) -> Adapter:
        """Return one adapter as the bank remembers it; its scaling is folded into B.

        Raises:
            ConfigError: there is no such adapter in the bank.
        """
        if name not in self.names:
            raise ConfigError(f"the bank has no adapter {name!r}.{suggest(name, self.names)}")
        held = sorted(path for path, module in self.modules.items() if name in module.names)
        return Adapter(name, {path: self.modules[path].rebuild(name) for path in held})

    def save(self, path: str | Path) -> None:
        """Write the bank to one safetensors file, which is absent, as it was, or whole."""
        tensors, layout = {}, {}
        for module, held in self.modules.items():
            for side in ("b", "a"):
                positions: Positions = getattr(held, side)
                for part in ("mean", "basis", "codes"):
                    tensors[f"{module}|{side}|{part}"] = getattr(positions, part).contiguous()
            layout[module] = {k: v for k, v in asdict(_bare(held)).items() if k not in ("b", "a")}
        head = {"format": _FORMAT, "names": json.dumps(self.names), "modules": json.dumps(layout)}
        with replacing(Path(path)) as beside:
            save_file(tensors, str(beside), metadata=head)

    @classmethod
    def load(cls, path: str | Path) -> ReversibleBank:
        """Read a bank that `save` wrote.

        Raises:
            AdapterError: the file is something else.
        """
        with safe_open(str(path), framework="pt") as file:
            head: dict[str, str] = file.metadata() or {}
            if head.get("format") != _FORMAT:
                raise AdapterError(f"{str(path)!r} is not a reversible bank of this version.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        layout: dict[str, dict[str, Any]] = json.loads(head["modules"])
        modules = {
            module: BankModule(
                b=_read(tensors, module, "b"),
                a=_read(tensors, module, "a"),
                names=tuple(known["names"]),
                ranks=tuple(known["ranks"]),
                kind=known["kind"],
                kernel=tuple(known["kernel"]),
            )
            for module, known in layout.items()
        }
        return cls(tuple(json.loads(head["names"])), MappingProxyType(modules))


def _bare(held: BankModule) -> BankModule:
    nothing = Positions(*(torch.empty(0) for _ in range(3)))
    return BankModule(nothing, nothing, held.names, held.ranks, held.kind, held.kernel)


def _read(tensors: Mapping[str, Tensor], module: str, side: str) -> Positions:
    return Positions(*(tensors[f"{module}|{side}|{part}"] for part in ("mean", "basis", "codes")))


def reversible_bank(stacks: Sequence[Stack], *, directions: int = 1) -> ReversibleBank:
    """Store several adapters as means and a few directions per position.

    Args:
        stacks: all modules; the users' weights play no part.
        directions: p, kept per position; 0 keeps only the mean. Lossless from T - 1 on, or from the
            rank on. Numbers per position: ``p (rank + T) + rank`` instead of ``rank T``.

    Returns:
        The bank, in the modules' working dtype.

    Raises:
        ConfigError: `directions` is not a whole number >= 0, or there are no modules.
    """
    whole("directions", directions)
    if not stacks:
        raise ConfigError("a bank needs at least one module.")
    modules = {stack.module: _module(stack, directions) for stack in stacks}
    return ReversibleBank(stacks[0].names, MappingProxyType(modules))


def _module(stack: Stack, directions: int) -> BankModule:
    pairs = [stack.scaled(i) for i in stack.present]
    ranks = tuple(a.shape[0] for _, a in pairs)
    first = next(f for f in stack.factors if f is not None)
    return BankModule(
        b=_positions((b for b, _ in pairs), max(ranks), directions),
        a=_positions((a.t() for _, a in pairs), max(ranks), directions),
        names=tuple(stack.names[i] for i in stack.present),
        ranks=ranks,
        kind=first.kind,
        kernel=first.kernel,
    )


def _positions(sides: Iterable[Tensor], rank: int, directions: int) -> Positions:
    padded = [torch.nn.functional.pad(x, (0, rank - x.shape[1])) for x in sides]
    x = torch.stack(padded, dim=1)  # (positions, adapters, rank)
    dtype, x = x.dtype, x.double()
    mean = x.mean(dim=1)
    x = x - mean[:, None]
    # (T, T) per position: the leading eigenvectors are the codes, and project x onto its basis.
    _, vectors = torch.linalg.eigh(x @ x.transpose(1, 2))
    kept = min(directions, x.shape[1] - 1, rank)
    codes = vectors.flip(2)[:, :, :kept]
    basis = codes.transpose(1, 2) @ x
    return Positions(mean.to(dtype), basis.to(dtype), codes.to(dtype))
