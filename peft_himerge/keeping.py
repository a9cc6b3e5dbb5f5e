"""What scoring or adding an adapter may disturb: taken before, put back after, whatever happens.

Three nets of rising price, for three kinds of harm:

* `preserved`: flags, modes, active adapters, gradients, random states, settings of the process.
* `Structure`: which modules, weights and hooks there are, around every call of an eval function.
* `watch`: what the weights hold, by checksums of every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .identity import matmul_precision, precision_owners, tensor_digest
from .randomness import put_back, states

__all__ = ["Settings", "Snapshot", "Structure", "preserved", "watch"]

_CLASS_SAYS = object()  # an attribute that the object itself does not have


@dataclass(frozen=True)
class Settings:
    """Settings of torch that hold for the whole process and change what a model computes."""

    dtype: torch.dtype
    threads: int
    precision: tuple[str | None, ...]
    deterministic: tuple[bool, bool]

    @classmethod
    def take(cls) -> Settings:
        """Return the settings as they are."""
        strict = torch.are_deterministic_algorithms_enabled()
        return cls(
            torch.get_default_dtype(),
            torch.get_num_threads(),
            matmul_precision(),
            (strict, torch.is_deterministic_algorithms_warn_only_enabled()),
        )

    def restore(self) -> None:
        """Put them back; nothing is called that has nothing to do."""
        now = Settings.take()
        if now.dtype != self.dtype:
            torch.set_default_dtype(self.dtype)
        if now.threads != self.threads:
            torch.set_num_threads(self.threads)
        if now.precision != self.precision:
            _put_back_precision(self.precision, now.precision)
        if now.deterministic != self.deterministic:
            mode, warn_only = self.deterministic
            torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _put_back_precision(before: tuple[str | None, ...], now: tuple[str | None, ...]) -> None:
    if before[0] is not None and before[0] != now[0]:
        torch.set_float32_matmul_precision(before[0])
    for owner, value in zip(precision_owners(), before[1:], strict=True):
        if owner.fp32_precision != value:
            owner.fp32_precision = value


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that scoring or adding an adapter may disturb, except weights."""

    rng: tuple[Any, ...]
    settings: Settings
    grad_enabled: bool
    training: tuple[tuple[nn.Module, bool], ...]
    parameters: tuple[tuple[nn.Parameter, bool, Tensor | None], ...]
    attributes: tuple[tuple[object, str, Any], ...]

    @classmethod
    def take(cls, model: PeftModel) -> Snapshot:
        """Return the state as it is."""
        attributes: list[tuple[object, str, Any]] = [
            (model, "active_adapter", model.active_adapter),
            (model.base_model, "active_adapter", model.base_model.active_adapter),
        ]
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                active = module._active_adapter
                copied = active if isinstance(active, str) else list(active)
                attributes.append((module, "_active_adapter", copied))
                own = vars(module).get("_disable_adapters", _CLASS_SAYS)
                attributes.append((module, "_disable_adapters", own))
            if "gradient_checkpointing" in vars(module):
                flag = module.gradient_checkpointing
                attributes.append((module, "gradient_checkpointing", flag))
        inner = model.base_model.model
        for owner in (getattr(inner, "config", None), getattr(inner, "generation_config", None)):
            if owner is not None and hasattr(owner, "use_cache"):
                attributes.append((owner, "use_cache", owner.use_cache))
        return cls(
            states(),
            Settings.take(),
            torch.is_grad_enabled(),
            tuple((m, m.training) for m in model.modules()),
            tuple((p, p.requires_grad, p.grad) for p in model.parameters()),
            tuple(attributes),
        )

    def restore(self) -> None:
        """Put everything back."""
        for module, training in self.training:
            module.training = training
        for parameter, flag, grad in self.parameters:
            parameter.requires_grad = flag
            parameter.grad = grad
        for owner, name, value in self.attributes:
            if value is _CLASS_SAYS:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)
        torch.set_grad_enabled(self.grad_enabled)
        self.settings.restore()
        put_back(self.rng)

    def set_gradients_aside(self) -> None:
        """Take gradients off the parameters, so that a backward pass does not add to them."""
        for parameter, _, _ in self.parameters:
            parameter.grad = None


@contextmanager
def preserved(model: PeftModel) -> Iterator[None]:
    """Put flags, active adapters, modes, RNG states and use_cache back, whatever happens."""
    snapshot = Snapshot.take(model)
    try:
        yield
    finally:
        snapshot.restore()


# Table of a module -> what an error says of a change in it. Buffers are put back without a word:
# some models make theirs anew in every call.
_WEIGHT, _HOOK, _ADAPTERS = "changed the weight", "left a hook on", "changed the adapters of"
_TABLES = (
    ("_parameters", _WEIGHT),
    ("_buffers", ""),
    ("_modules", "changed the modules of"),
    ("_forward_hooks", _HOOK),
    ("_forward_pre_hooks", _HOOK),
    ("_backward_hooks", _HOOK),
    ("_backward_pre_hooks", _HOOK),
)
_NONE: list[Any] = []
_ADAPTED = (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper, nn.ParameterDict)
_OWN = frozenset(vars(nn.Module())) | {"active_adapter", "_active_adapter"}
_SMALL_BUFFER = 1 << 16  # entries; statistics and counters are smaller


class Structure:
    """Which modules, weights, hooks and adapters a model has, and where each weight lies.

    Taken before an eval function is called and put back after it.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        # (module's path, what a change is, the module's attributes, which one, it, its items)
        self._tables: list[tuple[str, str, dict[str, Any], str, Any, list[Any]]] = []
        self._forwards: list[tuple[str, dict[str, Any], Any]] = []
        weights: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            own = vars(module)
            self._forwards.append((path, own, own.get("forward")))
            for key, what in _TABLES:
                table = own[key]
                if table and key in ("_parameters", "_buffers"):
                    values = weights if key == "_parameters" else buffers
                    values.update({f"{path}.{name}": value for name, value in table.items()})
                    if "_hf_hook" in own or not all(map(_plain, table.values())):
                        continue  # offloaded and quantised weights are others after a call
                items = _items(table) if table else _NONE
                self._tables.append((path, what, own, key, table, items))
            if isinstance(module, _ADAPTED):
                for key, value in own.items():
                    if key not in _OWN and isinstance(value, (dict, list, set)):
                        self._tables.append((path, _ADAPTERS, own, key, value, _items(value)))
        self._weights = [
            (name, weight, weight.data, weight.data_ptr(), _version(weight))
            for name, weight in weights.items()
            if weight is not None and not weight.is_meta and _plain(weight)
        ]
        self._buffers = [
            (name, buffer, _copy(buffer), _version(buffer))
            for name, buffer in buffers.items()
            if buffer is not None and not buffer.is_meta
        ]

    def put_back(self, copies: Collection[int] = ()) -> tuple[str | None, bool]:
        """Undo what was changed since, but for what was written into a weight.

        Args:
            copies: ids of weights that stand for the model's own and will be thrown away.

        Returns:
            What was changed first, as the end of "the eval function ...", None for nothing; and
            whether the model is as it was.
        """
        found: list[str] = []
        for path, what, own, name, table, items in self._tables:
            now = own.get(name, _NONE)
            if (now or items) and (key := _difference(now, items)) is not None:
                own[name] = table
                _refill(table, items)
                if what:
                    place = f"{path}.{key}" if what == _WEIGHT else path
                    found.append(f"{what} {place!r}" + (f" ({key!r})" if "of" in what else ""))
        for path, own, forward in self._forwards:
            if own.get("forward") is not forward:
                found.append(f"replaced the forward of {path!r}")
                own.pop("forward", None)
                if forward is not None:
                    own["forward"] = forward
        whole = self._put_back_values(found, copies)
        return (found[0] if found else None), whole

    def _put_back_values(self, found: list[str], copies: Collection[int]) -> bool:
        whole = True
        written = []
        for name, weight, data, place, version in self._weights:
            moved = weight.data_ptr() != place or weight.shape != data.shape
            if moved or weight.dtype != data.dtype:
                weight.data = data
            elif _version(weight) == version:
                continue
            whole = whole and (_version(weight) == version or id(weight) in copies)
            written.append(f"changed the weight {name!r}")
        for name, buffer, copied, version in self._buffers:
            if _version(buffer) != version:
                if copied is None:
                    whole = False
                    written.append(f"changed the buffer {name!r}")
                else:
                    with torch.no_grad():
                        buffer.copy_(copied)
        found[:0] = written
        return whole


def _copy(buffer: Tensor) -> Tensor | None:
    return buffer.detach().clone() if buffer.numel() <= _SMALL_BUFFER else None


def _plain(tensor: Tensor | None) -> bool:
    """Return False for a quantised weight, which its first call may pack anew (bitsandbytes)."""
    if tensor is None or not isinstance(tensor, nn.Parameter):
        return True
    return type(tensor) is nn.Parameter and tensor.is_floating_point()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _items(table: Any) -> list[Any]:
    if isinstance(table, dict):
        return list(table.items())
    return list(enumerate(table)) if isinstance(table, list) else [(key, True) for key in table]


def _difference(table: Any, items: list[Any]) -> Any:
    """Return the first key that differs; hooks of transformers' own are passed over."""
    now = _items(table)
    if len(now) == len(items):
        for (key, value), (other, kept) in zip(now, items, strict=True):
            if value is not kept or key != other:
                break
        else:
            return None
    before, after = dict(items), dict(now)
    for key in [*before, *after]:
        if key not in after:
            return key
        if key not in before or not _same(before[key], after[key]):
            if not _is_library_hook(after[key]):
                return key
    return None


def _same(one: Any, other: Any) -> bool:
    plain = isinstance(one, (bool, int, float, str)) and type(one) is type(other)
    return one is other or (plain and one == other)


def _is_library_hook(value: Any) -> bool:
    """Return True for the hooks of transformers 5, which stay for good and rest until asked."""
    while hasattr(value, "func"):
        value = value.func
    hook = callable(value) and not isinstance(value, nn.Module)
    return hook and str(getattr(value, "__module__", "")).startswith("transformers.")


def _refill(table: Any, items: list[Any]) -> None:
    before = dict(items)
    kept = [(k, v) for k, v in _items(table) if k not in before and _is_library_hook(v)]
    table.clear()
    if isinstance(table, dict):
        table.update([*items, *kept])
    elif isinstance(table, list):
        table.extend(value for _, value in items)
    else:
        table.update(key for key, _ in items)


def watch(model: PeftModel) -> Callable[[], str | None]:
    """Note what every weight holds; return what tells which of them holds something else now.

    The checksums cover every byte, so that writes are found that leave no other trace: through
    `.data`, NumPy, or a foreign library. Cost: one pass over the weights now and one per question
    (1.1 GB in about 0.3 s on one core). Left out are weights that are offloaded, or tensors of a
    class of their own (some quantised ones). A quantised weight that lies elsewhere than before was
    packed anew by its own forward, and is known by what it holds from then on.
    """
    before = _digests(model)

    def changed() -> str | None:
        after = _digests(model)
        for name, (digest, place) in list(before.items()):
            now = after.get(name)
            if now is not None and now[0] != digest and now[1] != place:
                before[name] = now
            elif now is None or now[0] != digest:
                return name
        return None

    return changed


def _digests(model: PeftModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> checksum, and where a quantised weight lies and how; () for another one."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (tensor_digest(tensor.data), _place(tensor))
        for name, tensor in held
        if type(tensor.data) is Tensor
        and not tensor.is_meta
        and not tensor.is_quantized
        and tensor.layout == torch.strided
    }


def _place(tensor: Tensor) -> tuple[int, ...]:
    return () if _plain(tensor) else (tensor.data_ptr(), *tensor.shape)
