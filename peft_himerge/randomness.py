"""The random states of this process: put back as they were, or kept and sent as JSON values."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["capture", "install", "put_back", "states"]


def states() -> tuple[Any, ...]:
    """Return the states of Python's, NumPy's and torch's generators (CPU, all GPUs) as they are."""
    cuda = torch.cuda.get_rng_state_all() if _has_gpu() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def put_back(state: tuple[Any, ...]) -> None:
    """Put the states of `states` in place."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


def capture() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators (CPU, current GPU)."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _pack(torch.get_rng_state()),
        "cuda": _pack(torch.cuda.get_rng_state()) if _has_gpu() else None,
    }


def install(state: Mapping[str, Any]) -> None:
    """Put a captured state in place."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unpack(state["torch"]))
    if state["cuda"] is not None and _has_gpu():
        torch.cuda.set_rng_state(_unpack(state["cuda"]))


def _has_gpu() -> bool:
    # In a process forked after its parent used a GPU nothing can be drawn there, nor even asked.
    return torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()


def _pack(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
