"""Everything a merge must leave as it was, as one flat dict, so that a test can name what moved."""

from __future__ import annotations

import hashlib
import pickle
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def bits(tensor: torch.Tensor) -> str:
    """Return a digest of shape, dtype and bytes: equal digests, equal bits."""
    if hasattr(tensor, "__tensor_flatten__"):  # made of several tensors, as torchao's
        return " ".join(bits(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    state = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    state.update(raw.tobytes())
    return state.hexdigest()


def rng_states() -> dict[str, Any]:
    return {
        "rng python": random.getstate(),
        "rng numpy": hashlib.sha256(pickle.dumps(np.random.get_state())).hexdigest(),
        "rng torch": bits(torch.get_rng_state()),
    }


def snapshot(model: nn.Module, *, but: str | None = None) -> dict[str, Any]:
    """Return every fact about ``model`` and the process; ``but`` leaves one adapter's parts out."""

    def counts(path: str) -> bool:
        return but is None or but not in path.split(".")

    facts: dict[str, Any] = rng_states()
    facts["grad mode"] = torch.is_grad_enabled()
    facts["threads"] = torch.get_num_threads()
    facts["active adapter"] = repr(model.active_adapter)
    facts["active adapter of the tuner"] = repr(getattr(model.base_model, "active_adapter", None))
    facts["adapters"] = [name for name in model.peft_config if name != but]
    for name, config in model.peft_config.items():
        if name != but:
            facts[f"config {name}"] = repr(sorted(config.to_dict().items(), key=lambda kv: kv[0]))
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if counts(path) and parameter.is_meta:
            facts[f"parameter {path}"] = "offloaded: a new object after every call"
        elif counts(path):
            facts[f"parameter {path}"] = bits(parameter)
            facts[f"object {path}"] = id(parameter)
            facts[f"storage {path}"] = parameter.data_ptr()
            facts[f"requires_grad {path}"] = parameter.requires_grad
            facts[f"grad {path}"] = None if parameter.grad is None else bits(parameter.grad)
    for path, buffer in model.named_buffers(remove_duplicate=False):
        if counts(path):
            facts[f"buffer {path}"] = bits(buffer)
    for path, module in model.named_modules(remove_duplicate=False):
        if not counts(path):
            continue
        facts[f"training {path}"] = module.training
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        facts[f"hooks {path}"] = [list(table) for table in hooks]
        facts[f"forward {path}"] = "forward" in vars(module)
        for flag in ("_disable_adapters", "_active_adapter", "gradient_checkpointing"):
            if flag in vars(module):
                facts[f"{flag} {path}"] = repr(vars(module)[flag])
        if isinstance(getattr(module, "merged_adapters", None), list):
            facts[f"merged {path}"] = list(module.merged_adapters)
    inner = model.base_model.model
    for owner in ("config", "generation_config"):
        held = getattr(inner, owner, None)
        if held is not None:
            facts[f"{owner}.use_cache"] = getattr(held, "use_cache", "absent")
    return facts


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of the facts that differ; [] if nothing moved."""
    missing = object()
    keys = {*before, *after}
    return sorted(k for k in keys if before.get(k, missing) != after.get(k, missing))


def run_python(code: str, *arguments: str | Path, **environment: str) -> str:
    """Run code in a fresh process without network and return what it printed."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
