"""Several processes make one merge together: who is there, and one way to talk.

All processes run the same steps on the same model and differ only in which scores they compute.
They talk by `Team.exchange` alone, which everyone calls the same number of times. A process that
fails takes part in one more exchange, to tell the others, who then fail too with its reason: so
none waits for one that is gone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from .errors import ConfigError, ProcessError

__all__ = ["Mode", "Team", "is_main", "own_device", "together"]

Mode = Literal["auto", "off"]

# The longest that one process may compute between two exchanges; one that dies is noticed at once.
_PATIENCE = timedelta(hours=12)
# The last merge's group, which ends when the next one does: the destructor of a group holds the GIL
# and waits for its threads, one of which may still need the GIL to let go of the last exchange
# (seen with torch 2.6). By the next merge they rest.
_retired: list[Any] = []
atexit.register(_retired.clear)


def is_main() -> bool:
    """Return True in the process that writes files and talks to the user; True if alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _launched() or os.environ.get("RANK", "0") == "0"


def own_device() -> torch.device:
    """Return the device for a model that this process loads by itself.

    The first CUDA device, of several processes each its own; the CPU if there is none.
    `CUDA_VISIBLE_DEVICES` chooses among them, and left empty asks for the CPU. Apple's MPS is left
    alone: it has no float64, in which deltas are cut exactly.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def together(mode: Mode) -> Iterator[Team]:
    """Meet the other processes of this merge.

    With "auto", the processes are those of torch.distributed's default group, or, if there is none
    yet but a launcher (`accelerate launch`, torchrun) started several, those that
    `accelerate.PartialState` finds; that group stays when the merge ends. "off", or a single
    process: a team of one.

    Raises:
        ProcessError: on every other process, if one raises an exception inside the context, or
            does not come.
    """
    if mode == "auto" and not (dist.is_available() and dist.is_initialized()) and _launched():
        # torch 2.6 raises where there is none to ask for
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        PartialState(cpu=not found or found.type == "mps")
    alone = mode == "off" or not dist.is_available() or not dist.is_initialized()
    if alone or dist.get_world_size() == 1:
        yield Team()
        return
    try:
        dist.barrier()
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as exc:
        raise ProcessError(
            f"not all of the {dist.get_world_size()} processes take part in this merge: {exc}. "
            f"Call it on every process, or set processes='off' to merge on one."
        ) from exc
    team = Team(dist.get_rank(), dist.get_world_size(), group)
    try:
        yield team
        team.exchange("the end", None)
    except Exception as exc:
        team.tell(exc)
        raise
    finally:
        dist.destroy_process_group(group)
        _retired[:] = [group]


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


class Team:
    """The processes of one merge; without arguments, this one alone.

    Attributes:
        rank: number of this process, 0 is the main one.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._over = False

    @property
    def main(self) -> bool:
        """True in the one process that writes the journal and calls listeners."""
        return self.rank == 0

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Give a value and return everyone's, by rank.

        Args:
            what: what is exchanged, in words; must be the same everywhere.
            value: anything that pickles.

        Raises:
            ProcessError: another process failed, ended, or is at another point.
        """
        if self._group is None:
            return [value]
        heard = self._gather(("value", what, value))
        for rank, (kind, text, _) in enumerate(heard):
            if kind == "error":
                self._over = True
                raise ProcessError(f"process {rank} of {self.size} failed: {text}")
        for rank, (_, text, _) in enumerate(heard):
            if text != what:
                self._over = True
                raise ProcessError(
                    f"the processes went different ways: process {self.rank} is at {what}, "
                    f"process {rank} at {text}. Give every process the same model, adapters, "
                    f"options and eval functions."
                )
        return [found for _, _, found in heard]

    def first(self, what: str, same: object, value: Any = None) -> Any:
        """Return the main process's value, and make sure that all hold the same `same`.

        Raises:
            ProcessError: one holds another; on every process.
        """
        heard = self.exchange(what, (same, value))
        for rank, (found, _) in enumerate(heard):
            if found != same:
                raise ProcessError(
                    f"{what}: process {rank} has others than process {self.rank}. Give every "
                    f"process the same model, adapters, options and eval functions."
                )
        return heard[0][1]

    def tell(self, failure: Exception) -> None:
        """Tell the others why this process ends, unless they know."""
        if self._group is None or self._over:
            return
        self._over = True
        if hasattr(failure, "add_note"):  # Python >= 3.11
            failure.add_note(f"on process {self.rank} of {self.size}")
        self._gather(("error", f"{type(failure).__name__}: {failure}", None))

    def _gather(self, message: tuple[str, str, Any]) -> list[tuple[str, str, Any]]:
        heard: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(heard, message, group=self._group)
        except RuntimeError as exc:
            self._over = True
            raise ProcessError(
                f"another process of this merge ended without a word: {exc}"
            ) from exc
        return heard

    def refuse_sharded(self, model: nn.Module) -> None:
        """Refuse a model of which no process holds the whole.

        Raises:
            ConfigError: weights are spread over processes (FSDP, DeepSpeed ZeRO-3, DTensor).
        """
        for name, weight in model.named_parameters() if self.size > 1 else ():
            if hasattr(weight, "ds_id") or hasattr(weight, "device_mesh"):
                raise ConfigError(
                    f"weight {name!r} is spread over processes (FSDP, ZeRO-3 or tensor parallel), "
                    f"so no process can score alone. Load the model on one process with "
                    f"device_map='auto'."
                )
