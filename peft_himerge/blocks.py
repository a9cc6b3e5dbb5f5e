"""Transformer blocks are not run again when neither their weights nor their inputs changed.

The states that contribution analysis scores differ from each other in one layer or in all layers
from one on, so they form a prefix tree over layers: states with the same first l layers share the
hidden state that enters layer l. `BlockMemo` walks that tree depth first. It keeps, for every call
of every block in the last run of an eval function, the inputs, the output, and what the block
wrote to the key/value cache. In the next run a block is skipped, and its recorded output returned,
as long as every block before it in the same model call was skipped too, its own weights are in the
same state, and its inputs are equal. The first block that fails one of these is run, and so is
every block after it; what they do takes the place of the record.

Nothing is assumed about the eval function: it may call the model any number of times on any
inputs. Results are bit-identical, because a skipped block returns the very tensors it returned
before. Run in full are: calls with gradients, calls that collect attentions or router logits,
incremental decoding (a filled cache), kinds of cache not known here, and whatever does not fit the
memory budget.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from .layers import OUTSIDE

__all__ = ["BlockMemo", "BlockStates", "find_blocks"]

_LOG = logging.getLogger("peft_himerge.blocks")
_COLLECTS = ("output_attentions", "output_router_logits")

BlockStates = Callable[[str], object]


def find_blocks(model: nn.Module, labels: Sequence[str]) -> dict[str, nn.Module]:
    """Return label -> module of every transformer block, adapted or not, in execution order.

    Args:
        model: the base model.
        labels: labels of the adapted layers; each block's siblings are blocks too.

    Returns:
        {} if a label's parent is no `nn.ModuleList` or `nn.Sequential`: then the structure is not
        understood, and everything is run in full.
    """
    blocks: dict[str, nn.Module] = {}
    for label in labels:
        if label == OUTSIDE or label in blocks:
            continue
        path = label.rpartition(".")[0]
        parent = model.get_submodule(path)
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            _LOG.warning(
                "the blocks of %s are not understood (%r is a %s): every score runs in full.",
                type(model).__name__,
                path,
                type(parent).__name__,
            )
            return {}
        prefix = f"{path}." if path else ""
        blocks.update({f"{prefix}{name}": child for name, child in parent.named_children()})
    return blocks


@dataclass(slots=True, eq=False)
class _Record:
    """One call of one block: what came in, what went out, what it wrote to the cache."""

    state: object
    inputs: tuple[Any, Any]
    output: Any
    versions: list[tuple[Tensor, int]]
    updates: list[tuple[int, tuple[Any, ...], dict[str, Any]]]
    size: int


@dataclass(slots=True, eq=False)
class _Path:
    """The records of the last run of one eval function: a root-to-leaf path of the tree."""

    records: dict[tuple[str, int], _Record] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(record.size for record in self.records.values())


class BlockMemo:
    """Skips shared blocks; a context manager around any number of runs.

    Args:
        model: the base model, inside PEFT's wrappers.
        blocks: label -> block, from `find_blocks`.
        budget: most bytes of recorded tensors over all tasks; what exceeds it is run again.

    Attributes:
        run: block calls that were executed.
        skipped: block calls that were answered from the record.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], budget: int) -> None:
        self._model = model
        self._blocks = blocks
        self._budget = budget
        self._paths: dict[str, _Path] = {}
        self._path: _Path | None = None
        self._states: BlockStates = lambda _: None
        self._calls: dict[str, int] = {}
        self._depth = 0
        self._shared = False
        self._collects = False
        self._equal: dict[tuple[int, int], tuple[bool, Tensor, Tensor]] = {}
        self._undo: list[tuple[nn.Module, Any]] = []
        self.run = 0
        self.skipped = 0

    def __enter__(self) -> BlockMemo:
        for label, block in self._blocks.items():
            self._patch(block, functools.partial(self._block, label))
        if self._blocks:
            tops = [m for m in self._model.modules() if isinstance(m, PreTrainedModel)]
            for top in dict.fromkeys([self._model, *tops]):
                self._patch(top, self._call)
        return self

    def __exit__(self, *_: object) -> None:
        for module, previous in reversed(self._undo):
            if previous is None:
                vars(module).pop("forward", None)
            else:
                module.forward = previous
        self._undo.clear()
        self._paths.clear()

    def _patch(self, module: nn.Module, around: Callable[..., Any]) -> None:
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return around(original, args, kwargs)

        self._undo.append((module, vars(module).get("forward")))
        module.forward = forward

    @contextmanager
    def scoring(self, task: str, states: BlockStates) -> Iterator[None]:
        """Share blocks with the last run of the same task.

        Args:
            task: name of the task; runs of different tasks share nothing.
            states: label -> a value that is equal exactly if the block's weights are.
        """
        self._path = self._paths.setdefault(task, _Path())
        self._states, self._calls = states, {}
        try:
            yield
        except BaseException:
            self._paths.pop(task)
            raise
        finally:
            self._path = None
            self._depth = 0
        self._forget(task)

    def _forget(self, task: str) -> None:
        """Drop records of calls the last run did not make."""
        records = self._paths[task].records
        for key in [key for key in records if key[1] >= self._calls.get(key[0], 0)]:
            del records[key]

    def _call(self, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Around a whole model call: the outermost one starts a new walk from the root."""
        if self._depth == 0:
            self._shared = True
            self._equal = {}
            config = getattr(self._model, "config", None)
            self._collects = any(
                kwargs.get(name) or getattr(config, name, False) for name in _COLLECTS
            )
        self._depth += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._depth -= 1

    def _block(
        self, label: str, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Around one block: answer from the record, or run and record."""
        path = self._path
        if path is None:
            return original(*args, **kwargs)
        number = self._calls.get(label, 0)
        self._calls[label] = number + 1
        key = (label, number)
        caches = _caches(args, kwargs)
        usable = (
            self._depth > 0
            and not self._collects
            and not torch.is_grad_enabled()
            and not self._blocks[label].training  # dropout draws random numbers
            and caches is not None
        )
        if not usable:
            self._shared = False
            path.records.pop(key, None)
            self.run += 1
            return original(*args, **kwargs)
        assert caches is not None
        state = self._states(label)
        known = path.records.get(key)
        if self._shared and known is not None and self._same(known, state, (args, kwargs), caches):
            for part, positional, named in known.updates:
                caches[part].update(*positional, **named)
            _mark_cross(args, kwargs, known.updates)
            self.skipped += 1
            return known.output
        self._shared = False
        path.records.pop(key, None)
        self.run += 1
        with _listening(caches) as heard:
            output = original(*args, **kwargs)
        if heard.fresh:
            self._record(path, key, state, (args, kwargs), output, heard.updates)
        return output

    def _same(
        self, known: _Record, state: object, inputs: tuple[Any, Any], caches: list[DynamicCache]
    ) -> bool:
        return (
            known.state == state
            and all(tensor._version == version for tensor, version in known.versions)
            and all(caches[part].get_seq_length(args[2]) == 0 for part, args, _ in known.updates)
            and self._equals(known.inputs, tuple(map(_without_caches, inputs)))
        )

    def _equals(self, old: Any, new: Any) -> bool:
        if old is new:
            return True
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            pair = (id(old), id(new))
            if pair not in self._equal:
                same = old.shape == new.shape and old.dtype == new.dtype
                same = same and old.device == new.device and torch.equal(old, new)
                self._equal[pair] = (same, old, new)  # held, so that no id is used again
            return self._equal[pair][0]
        if type(old) is not type(new):
            return False
        if isinstance(old, (tuple, list)):
            return len(old) == len(new) and all(map(self._equals, old, new))
        if isinstance(old, Mapping):
            return old.keys() == new.keys() and all(self._equals(old[k], new[k]) for k in old)
        return isinstance(old, (bool, int, float, str, torch.dtype, torch.device)) and old == new

    def _record(
        self,
        path: _Path,
        key: tuple[str, int],
        state: object,
        inputs: tuple[Any, Any],
        output: Any,
        updates: list[tuple[int, tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        inputs = (_without_caches(inputs[0]), _without_caches(inputs[1]))
        tensors = list(_tensors((inputs, output, updates)))
        if any(t.is_inference() for t in tensors) or not _only_tensors(output):
            return  # later changes to inference tensors or other objects could not be seen
        size = sum(t.numel() * t.element_size() for t in _tensors((output, updates)))
        held = sum(p.size for p in self._paths.values())
        if held + size <= self._budget:
            versions = [(t, t._version) for t in tensors]
            path.records[key] = _Record(state, inputs, output, versions, updates, size)


class _EmptyCache:
    """Stands for a key/value cache among recorded inputs; its content is checked apart."""


_EMPTY = _EmptyCache()


def _is_cache(value: object) -> bool:
    return isinstance(value, (DynamicCache, EncoderDecoderCache)) or hasattr(
        value, "get_seq_length"
    )


def _caches(args: Any, kwargs: Mapping[str, Any]) -> list[DynamicCache] | None:
    """Return the caches a block call may write to; None if one is of a kind not known here."""
    found: list[DynamicCache] = []
    for value in (*args, *kwargs.values()):
        if type(value) is DynamicCache:
            found.append(value)
        elif type(value) is EncoderDecoderCache:
            for part in (value.self_attention_cache, value.cross_attention_cache):
                if type(part) is not DynamicCache:
                    return None
                found.append(part)
        elif _is_cache(value):
            return None
    return found


def _without_caches(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {k: _EMPTY if _is_cache(v) else v for k, v in values.items()}
    return tuple(_EMPTY if _is_cache(v) else v for v in values)


def _mark_cross(
    args: Any, kwargs: Mapping[str, Any], updates: list[tuple[int, tuple[Any, ...], Any]]
) -> None:
    for value in (*args, *kwargs.values()):
        if type(value) is EncoderDecoderCache:
            for part, positional, _ in updates:
                if part == 1:
                    value.is_updated[positional[2]] = True


def _only_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_only_tensors, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_only_tensors, value))
    return value is None or isinstance(value, Tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


@dataclass(slots=True)
class _Heard:
    updates: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    fresh: bool = True


@contextmanager
def _listening(caches: list[DynamicCache]) -> Iterator[_Heard]:
    """Note every update of the caches; `fresh` turns False if one was not empty before."""
    heard = _Heard()

    def listen(part: int, cache: DynamicCache) -> None:
        original = cache.update

        def update(
            key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            heard.fresh = heard.fresh and cache.get_seq_length(layer_idx) == 0
            heard.updates.append((part, (key_states, value_states, layer_idx, *args), kwargs))
            return original(key_states, value_states, layer_idx, *args, **kwargs)

        cache.update = update

    for part, cache in enumerate(caches):
        listen(part, cache)
    try:
        yield heard
    finally:
        for cache in caches:
            vars(cache).pop("update", None)
