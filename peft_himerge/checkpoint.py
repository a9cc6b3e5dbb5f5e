"""Base + merged delta as a full checkpoint, streamed: one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .combine import Combiner, add_to_weight
from .errors import ConfigError, PlanError
from .factors import as_matrix
from .outputs import publishing
from .shards import stream_tensors

__all__ = ["Blocks", "save_checkpoint"]


# Gives (rows, delta of those rows) of one module until every row was given.
Blocks = Callable[[str], Iterable[tuple[slice, Tensor]]]


def save_checkpoint(
    base: str | Path, combiner: Combiner, blocks: Blocks, folder: str | Path
) -> Path:
    """Write base + merged delta as a full checkpoint, streamed: one tensor in memory at a time.

    Args:
        base: folder of the base model (safetensors, one file or shards).
        combiner: knows the adapted modules, their kinds and shapes.
        blocks: makes one module's delta, in any order.
        folder: where to write, all files or none (`outputs.publishing`); config, tokenizer and
            other small files are copied along.

    Raises:
        PlanError: a module of the adapters has no weight in the base checkpoint.
        ConfigError: `base` holds no safetensors, the weight is quantised or tied, or `folder` holds
            weights of another checkpoint.
        OutputError: `folder` is in use or cannot be written; it is as it was.
    """
    source, target = Path(base), Path(folder)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"{str(source)!r} holds no *.safetensors file of a base model.")
    keys = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            keys.update(dict.fromkeys(opened.keys(), shard))
    if target.exists() and target.samefile(source):
        raise ConfigError(f"the merged checkpoint would overwrite the base model in {str(base)!r}.")
    _refuse_leftovers(target, shards)
    where = {_find_key(module, keys): module for module in combiner.modules}
    _refuse_tied(source, where, keys, combiner)
    _refuse_misfits(where, keys, combiner)
    with publishing(target) as new:
        for extra in sorted(source.iterdir()):
            small = extra.is_file() and extra.suffix in {".json", ".txt", ".model", ".jinja"}
            if small:
                (new / extra.name).write_bytes(extra.read_bytes())
        for shard in shards:
            _write_shard(shard, new / shard.name, where, combiner, blocks)
    return target


def _write_shard(
    shard: Path, target: Path, where: Mapping[str, str], combiner: Combiner, blocks: Blocks
) -> None:
    with safe_open(shard, "pt") as opened:
        names = list(opened.keys())
        heads = {key: opened.get_slice(key) for key in names}
        metadata = opened.metadata() or {"format": "pt"}

        def tensor(key: str, opened: Any = opened) -> Tensor:
            value: Tensor = opened.get_tensor(key)
            module = where.get(key)
            if module is None:
                return value
            if not value.is_floating_point():
                raise ConfigError(f"{key!r} is quantised ({value.dtype}); use a plain base.")
            return add_to_weight(value, combiner.kind(module), blocks(module))

        layout = {key: (head.get_dtype(), head.get_shape()) for key, head in heads.items()}
        stream_tensors(target, layout, tensor, metadata)


def _refuse_leftovers(target: Path, shards: Sequence[Path]) -> None:
    names = {shard.name for shard in shards}
    other = sorted(p.name for p in target.glob("model*.safetensors") if p.name not in names)
    if other:
        raise ConfigError(
            f"{str(target)!r} holds {other[0]!r} of another checkpoint, which could be loaded in "
            f"place of the new one. Remove it, or choose another folder."
        )


def _find_key(module: str, keys: Mapping[str, Path]) -> str:
    """Return the checkpoint's key of a module's weight; a base-model prefix may differ."""
    exact = f"{module}.weight"
    if exact in keys:
        return exact
    ends = [key for key in keys if exact.endswith(f".{key}") or key.endswith(f".{exact}")]
    if len(ends) != 1:
        raise PlanError(
            f"the base checkpoint has no weight {exact!r}"
            + (f" (it could be any of {ends})." if ends else ".")
            + " Is it the base model of these adapters?"
        )
    return ends[0]


def _refuse_misfits(where: Mapping[str, str], keys: Mapping[str, Path], combiner: Combiner) -> None:
    for key, module in where.items():
        with safe_open(keys[key], "pt") as opened:
            shape = tuple(opened.get_slice(key).get_shape())
        got = as_matrix(torch.empty(shape, device="meta"), combiner.kind(module)).shape
        if tuple(got) != combiner.shape(module):
            raise PlanError(
                f"module {module!r}: the delta is {combiner.shape(module)} but the base "
                f"checkpoint's weight is {tuple(got)} (out, in). Is it the base of these adapters?"
            )


def _refuse_tied(
    source: Path, where: Mapping[str, str], keys: Mapping[str, Path], combiner: Combiner
) -> None:
    config = source / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    # A config says only what differs from its class's default; GPT-2 and T5 tie by default. A
    # checkpoint without a weight for the head ties it in any case.
    kinds = {m: combiner.kind(m) for m in where.values()}
    tied = settings.get("tie_word_embeddings", not any("lm_head" in key for key in keys))
    heads = [m for m, kind in kinds.items() if kind == "embedding" or m.endswith("lm_head")]
    if tied and heads:
        raise ConfigError(
            f"the base ties its embedding and head, and {heads[0]!r} has a delta: a checkpoint "
            f"with tied weights cannot hold it. Export as LoRA, or untie the base first."
        )
