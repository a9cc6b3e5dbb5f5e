"""A task's own head, worn by the model while that task is scored.

An adapter trained for classification has a head of its own: PEFT saves the whole module
(`modules_to_save=["classifier"]` or `["score"]`) beside the low-rank factors. Heads of different
tasks have different outputs and cannot be merged; each task keeps its own, and only the bodies
are merged. So an eval function puts its head in by exchanging parameter objects, and puts the
model's own objects back afterwards: exact, and free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, suggest
from ..json_file import read_object
from .forward import inner_model

__all__ = ["Head", "head_digest", "read_head", "wearing"]

Head = str | Path | Mapping[str, Tensor]
"""Folder of an adapter with saved modules, or parameters by name, e.g. {"classifier.weight": w}."""

_PREFIX = "base_model.model."


def read_head(head: Head | None) -> dict[str, Tensor]:
    """Return a head's parameters by their name in the base model; {} for no head.

    Args:
        head: an adapter's folder (adapter_config.json names the saved modules, they lie in
            adapter_model.safetensors), a state dict with PEFT's names or plain ones, or None.

    Raises:
        ConfigError: there is no such folder, or it or the state dict holds no head.
        AdapterError: the adapter file is damaged, or a tensor holds NaN or infinity.
    """
    if head is None:
        return {}
    named = _read_folder(Path(head)) if isinstance(head, (str, Path)) else dict(head)
    found = {_plain_name(name): tensor for name, tensor in named.items()}
    if not found:
        raise ConfigError(f"head={head!r:.80} holds no parameters of a head.")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ConfigError(f"head: {name!r} must be a tensor of floats, got {tensor!r:.80}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"head: {name!r} holds NaN or infinity.")
    return {name: found[name].detach() for name in sorted(found)}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise ConfigError(f"head: {str(folder)!r} has no {file.name}.")
    saved = read_object(config).get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise ConfigError(f"head: {str(config)!r}: modules_to_save is {saved!r:.80}, no names.")
    try:
        with safe_open(weights, "pt") as opened:
            names = [
                name
                for name in opened.keys()
                if "lora_" not in name and set(name.split(".")) & set(saved)
            ]
            found = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as exc:
        raise AdapterError(
            f"head: {str(weights)!r} is damaged or no safetensors file ({exc}). Copy or save it "
            f"again."
        ) from exc
    if not found:
        raise ConfigError(
            f"head: the adapter in {str(folder)!r} has no saved modules (its modules_to_save is "
            f"{saved!r}). Leave head= out to score with the model's own head."
        )
    return found


def _plain_name(name: str) -> str:
    """Return a parameter's name in the base model: no wrapper of PEFT's in it."""
    parts = name.removeprefix(_PREFIX).split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]  # and the adapter's name
    return ".".join(part for part in parts if part != "original_module")


def head_digest(head: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return a head as plain values, for a fingerprint."""
    return {name: [str(t.dtype), t.double().tolist()] for name, t in head.items()}


@contextmanager
def wearing(model: nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange the model's own head for `head` inside the block.

    A module that PEFT wraps has several copies (its own and one per adapter); all of them wear
    the head, so it does not matter which one is switched on. Inputs must fit, the number of
    outputs may differ. The head takes dtype and device of what it replaces.

    Raises:
        ConfigError: the model has no such parameter, it does not fit, the head leaves out a
            parameter of a module, or the module also carries LoRA. Nothing was exchanged then.
    """
    swaps = [
        (owner, name.rpartition(".")[2], _fitted(name, tensor, owner))
        for name, tensor in head.items()
        for owner in _owners(inner_model(model), name)
    ]
    _check_whole(inner_model(model), head)
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for owner, part, parameter in swaps:
            before.append((owner, part, owner._parameters[part]))
            owner._parameters[part] = parameter
        yield
    finally:
        for owner, part, original in reversed(before):
            owner._parameters[part] = original


def _owners(inner: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules whose parameter `name` is to be exchanged: one, or PEFT's copies."""
    path, _, part = name.rpartition(".")
    found = [inner]
    for step in path.split(".") if path else []:
        found = [child for module in found for child in _children(module, step)]
    if not found or any(module._parameters.get(part) is None for module in found):
        known = [_plain_name(key) for key, _ in inner.named_parameters() if "lora_" not in key]
        raise ConfigError(f"head: the model has no parameter {name!r}.{suggest(name, known[-4:])}")
    return found


def _check_whole(inner: Any, head: Mapping[str, Tensor]) -> None:
    """Refuse half a head: the other half would be the model's, and no one would see it."""
    for name in head:
        top, _, _ = name.partition(".")
        # A module inside the body, e.g. an embedding, is whole by itself.
        path = name.rpartition(".")[0] if top == inner.base_model_prefix else top
        parts = [_plain_name(key) for key, _ in inner.named_parameters() if "lora_" not in key]
        missing = [part for part in parts if part.startswith(f"{path}.") and part not in head]
        if missing:
            raise ConfigError(
                f"head: {name!r} comes without {missing[0]!r}, which the model's {path!r} has; a "
                f"head must be whole."
            )


def _children(module: nn.Module, step: str) -> list[nn.Module]:
    child = module._modules.get(step)
    if isinstance(child, BaseTunerLayer):
        raise ConfigError(
            f"head: the module {step!r} also carries LoRA; a head that is exchanged whole cannot."
        )
    if isinstance(child, ModulesToSaveWrapper):
        return [child.original_module, *child.modules_to_save.values()]
    return [] if child is None else [child]


def _fitted(name: str, tensor: Tensor, owner: nn.Module) -> nn.Parameter:
    old = owner._parameters[name.rpartition(".")[2]]
    assert old is not None
    if old.is_meta:
        raise ConfigError(f"head: {name!r} is offloaded in the model; keep the head on a device.")
    if old.shape[1:] != tensor.shape[1:] or old.ndim != tensor.ndim:
        raise ConfigError(
            f"head: {name!r} is {tuple(tensor.shape)}, the model's is {tuple(old.shape)}; all but "
            f"the first axis must be the same. The head belongs to another base model."
        )
    return nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
