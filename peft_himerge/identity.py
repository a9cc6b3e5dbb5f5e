"""What a score depends on, as short strings: base model, adapters, eval functions, environment.

Two scores with equal digests may stand for each other; that is all a journal needs to know. A
digest of weights covers every byte, with a checksum that runs at the speed of memory: it finds
every accidental change, but it is no protection against one made to deceive.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import platform
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import lora_layers

__all__ = [
    "NUMERICS",
    "EvalDigest",
    "adapter_digest",
    "base_digest",
    "environment",
    "eval_digest",
    "matmul_precision",
    "precision_owners",
    "tensor_digest",
]

# To be raised when a release gives other bits for the same plan: old journals are then foreign.
NUMERICS = "1"
# Words (8 bytes) that are summed at once: too few for torch to start a second thread, which on
# shared cores waits longer than it works; on a GPU, many such pieces are summed side by side.
_PIECE = 1 << 15
_PIECES_ON_GPU = 1 << 10
# Settings of a model that do not change what it computes.
_NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version", "use_cache")
_PLAIN = (
    *(type(None), type(...), bool, int, float, complex, str, bytes),
    *(PurePath, enum.Enum, range),
)


def environment(model: PeftModel) -> dict[str, str]:
    """Return what, beside weights and eval functions, can change the bits of a score."""
    devices = {p.device.type for p in model.parameters()} - {"meta"}
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": "+".join(sorted(devices)),
        "matmul precision": _told(matmul_precision()),
    }


def matmul_precision() -> tuple[str | None, ...]:
    """Return how float32 products are rounded: torch's old setting, then its newer ones.

    The old one is None where the newer ones say what it cannot; torch then refuses to tell it
    (``TrainingArguments(tf32=True)`` does that). Before torch 2.9 there are no newer ones.
    """
    try:
        old: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    return old, *(owner.fp32_precision for owner in precision_owners())


def precision_owners() -> list[Any]:
    """Return what holds the newer settings; the later ones follow the first unless set."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    return [backends, backends.cuda.matmul, backends.mkldnn.matmul]


def _told(precision: tuple[str | None, ...]) -> str:
    return precision[0] or "+".join(str(part) for part in precision[1:])


def base_digest(model: PeftModel) -> str:
    """Return a digest of the base model: its settings and every weight and buffer.

    Adapters do not count, nor does which modules they wrap. Offloaded weights are read from where
    they lie. Cost: one pass over the weights (1.1 GB in about 0.3 s on one core).
    """
    inner = model.base_model.model
    state = hashlib.sha256(_settings(inner).encode())
    rows = {name: tensor_digest(tensor) for name, tensor in _base_tensors(inner)}
    state.update(json.dumps(rows, sort_keys=True).encode())
    return state.hexdigest()


def adapter_digest(model: PeftModel, name: str) -> str:
    """Return a digest of one LoRA adapter as it lies in the model."""
    rows = {}
    for path, layer in lora_layers(model).items():
        if name in layer.scaling:
            rows[path] = [repr(float(layer.scaling[name]))] + [
                f"{part} {key} {tensor_digest(tensor)}"
                for part in layer.adapter_layer_names
                for key, tensor in _parts(getattr(layer, part), name)
            ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _parts(holder: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one adapter in a module list or parameter list of PEFT's."""
    if name not in holder:
        return
    held = holder[name]
    yield from [("", held)] if isinstance(held, Tensor) else held.named_parameters()


def _settings(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if config is None:
        return type(model).__name__
    values = {k: v for k, v in config.to_dict().items() if k not in _NO_MATTER}
    values["attention"] = getattr(config, "_attn_implementation", None)
    return type(model).__name__ + json.dumps(values, sort_keys=True, default=_type_name)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name without PEFT's wrappers, tensor) of all weights and buffers of the base."""
    skipped: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            skipped += [f"{path}.{part}." for part in _tuner_parts(module)]
        if f"{path}.".startswith(tuple(skipped)) or ".modules_to_save." in f".{path}.":
            continue
        with _loaded(module):
            own = [*module._parameters.items(), *module._buffers.items()]
            for name, tensor in own:
                if tensor is not None:
                    parts = f"{path}.{name}".split(".")
                    plain = [p for p in parts if p not in ("base_layer", "original_module")]
                    yield ".".join(plain), tensor
                    for key, beside in _beside(tensor):
                        yield ".".join([*plain, key]), beside


def _beside(weight: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what bitsandbytes keeps beside a weight's codes, without which they mean nothing."""
    state = getattr(weight, "quant_state", None)
    found = {"SCB": getattr(weight, "SCB", None)}
    if state is not None:
        found |= state.as_dict(packed=True)
    yield from ((key, tensor) for key, tensor in found.items() if isinstance(tensor, Tensor))


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Have the module's own weights in place, as in its forward call, if they are offloaded."""
    offloaded = any(p.is_meta for p in module._parameters.values() if p is not None)
    hook: Any = getattr(module, "_hf_hook", None) if offloaded else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _tuner_parts(layer: BaseTunerLayer) -> list[str]:
    return [part for part in layer.adapter_layer_names if hasattr(layer, part)] + ["lora_dropout"]


def tensor_digest(tensor: Tensor) -> str:
    """Return shape, dtype and a checksum of all bytes; the same on every device."""
    data = tensor.detach()
    head = f"{tuple(data.shape)}|{data.dtype}"
    if data.is_meta:
        return f"{head}|meta"  # no values to look at
    raw = data.contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # words must be aligned
    whole = raw.numel() // 8 * 8
    tail = bytes(raw[whole:].tolist()).hex()
    words = raw[:whole].view(torch.int64)
    total, place = 0, 0
    if words.numel():
        total, place = _checksum(words)
    return f"{head}|{total}|{place}|{tail}"


def _checksum(words: Tensor) -> tuple[int, int]:
    """Return two sums modulo 2^64: of the words, and of the words times odd numbers.

    The first changes with any single word, the second also with their order.
    """
    full = words.numel() // _PIECE
    at_once = 1 if words.device.type == "cpu" else _PIECES_ON_GPU
    odd = torch.arange(1, 2 * _PIECE, 2, device=words.device)
    rows = words[: full * _PIECE].view(full, _PIECE)
    blocks = [rows[start : start + at_once] for start in range(0, full, at_once)]
    blocks.append(words[full * _PIECE :].view(1, -1))
    sums = [
        torch.stack([block.sum(1), (block * odd[: block.shape[1]]).sum(1)], 1) for block in blocks
    ]
    total = place = 0
    for first, second in torch.cat(sums).tolist():
        total = (total + first) % 2**64
        place = (place * 1000003 + second) % 2**64
    return total, place


@dataclasses.dataclass(frozen=True, slots=True)
class EvalDigest:
    """The fingerprint of an eval function.

    Attributes:
        digest: changes with the function's code and all the data that could be seen.
        unseen: what could not be seen into, as "name (type)"; sorted.
    """

    digest: str
    unseen: tuple[str, ...] = ()


def eval_digest(fn: Callable[..., Any]) -> EvalDigest:
    """Return the fingerprint of an eval function.

    It covers the compiled code of the function, of the functions of the same module that it calls,
    and the plain data it holds: defaults, closures, globals it names, the fields of a callable
    object; numbers, texts, arrays, tensors, dataclasses, and lists, tuples, sets and dicts of
    those. What it cannot see into it takes by type alone and lists as `unseen`: other objects
    (tokenizers, models, datasets without a fingerprint), other modules, and files that are read
    while scoring. A text attribute `fingerprint` of the function or of such an object, set by its
    owner, is believed instead of all that.
    """
    inner: Any = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    reader = _Reader(getattr(inner, "__module__", None) or type(inner).__module__)
    told = json.dumps(reader.read(fn, "function"), sort_keys=True)
    return EvalDigest(hashlib.sha256(told.encode()).hexdigest(), tuple(sorted(set(reader.unseen))))


class _Reader:
    """Turns an eval function and the data it holds into nested lists of text."""

    def __init__(self, home: str) -> None:
        self._home = home
        # Digests, so that what is held twice reads like two equal things; None while it is read.
        self._known: dict[int, tuple[str | None, object]] = {}
        self.unseen: list[str] = []

    def read(self, value: Any, name: str) -> Any:
        """Return plain JSON values that differ where `value` differs, as far as can be seen."""
        if isinstance(value, _PLAIN):
            return [_type_name(value), repr(value)]
        if isinstance(value, torch.device):
            return ["device", value.type]  # which of several equal devices does not matter
        if isinstance(value, (torch.dtype, torch.Size)):
            return ["torch", str(value)]
        if isinstance(value, Tensor):
            return ["tensor", tensor_digest(value)]
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            data = np.ascontiguousarray(value)
            digest = hashlib.sha256(data.tobytes()).hexdigest()
            return ["array", str(data.dtype), list(np.shape(value)), digest]
        if id(value) in self._known:
            return self._known[id(value)][0] or "itself"
        self._known[id(value)] = (None, value)  # held, so that no id is used again
        told = self._told(value) or self._inside(value, name)
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self._known[id(value)] = (digest, value)
        return digest

    @staticmethod
    def _told(value: Any) -> Any:
        """Return the fingerprint the value's owner gave it, if any."""
        for attribute in ("fingerprint", "_fingerprint"):
            told = getattr(value, attribute, None)
            if isinstance(told, str):
                return ["told", _type_name(value), told]
        return None

    def _inside(self, value: Any, name: str) -> Any:
        kind = _type_name(value)
        if isinstance(value, Mapping):
            items = [(self.read(k, name), self.read(v, name)) for k, v in value.items()]
            return [kind, items]
        if isinstance(value, (list, tuple)):
            return [kind, [self.read(item, name) for item in value]]
        if isinstance(value, (set, frozenset)):
            return [kind, sorted(json.dumps(self.read(item, name)) for item in value)]
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return [kind, [self.read(part, name) for part in parts]]
        if isinstance(value, types.MethodType):
            return [kind, self.read(value.__func__, name), self.read(value.__self__, name)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            return [kind, getattr(value, "__qualname__", value.__name__)]
        if dataclasses.is_dataclass(value) or (
            self._ours(type(value)) and hasattr(value, "__dict__")
        ):
            return [kind, self._call_of(value), self._fields(value)]
        if type(value).__module__ != "torch.autograd.grad_mode":  # of @torch.no_grad()
            self.unseen.append(f"{name} ({kind})")
        return [kind]

    def _ours(self, owner: Any) -> bool:
        return getattr(owner, "__module__", None) == self._home

    def _call_of(self, value: object) -> Any:
        """Return the code of a callable object's own methods."""
        methods = {
            key: held
            for owner in type(value).__mro__
            if self._ours(owner)
            for key, held in vars(owner).items()
            if isinstance(held, types.FunctionType) and not _is_generated(key)
        }
        return {key: self.read(method, key) for key, method in sorted(methods.items())}

    def _fields(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            names = [f.name for f in dataclasses.fields(value)]
        else:
            names = sorted(vars(value))
        return {name: self.read(getattr(value, name, None), name) for name in names}

    def _function(self, fn: types.FunctionType) -> Any:
        if fn.__module__ != self._home:
            return ["function", fn.__module__, fn.__qualname__]
        held = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        closure = {key: self._cell(cell, key) for key, cell in sorted(held.items())}
        named = sorted(_global_names(fn.__code__) & fn.__globals__.keys())
        return [
            "function",
            fn.__qualname__,
            self._code(fn.__code__),
            self.read(fn.__defaults__, "defaults"),
            self.read(fn.__kwdefaults__, "defaults"),
            closure,
            {key: self.read(fn.__globals__[key], key) for key in named},
        ]

    def _cell(self, cell: types.CellType, name: str) -> Any:
        try:
            held = cell.cell_contents
        except ValueError:
            return "empty"
        return self.read(held, name)

    def _code(self, code: types.CodeType) -> Any:
        constants = [
            self._code(c) if isinstance(c, types.CodeType) else self.read(c, "constant")
            for c in code.co_consts
        ]
        return [code.co_name, code.co_code.hex(), list(code.co_names), constants]


def _global_names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _global_names(constant)
    return found


def _is_generated(name: str) -> bool:
    return name.startswith("__") and name not in ("__call__", "__init__")


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
