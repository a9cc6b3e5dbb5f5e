"""Writing files so that each is either absent, as it was, or whole."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["replacing", "stream_tensors", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes the place of `path` at once.

    The file may be read by whoever may read new files here: safetensors 0.8 alone would make it
    readable by its owner only, so that a server of another user could not load it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.touch()
    mode = beside.stat().st_mode
    try:
        yield beside
        beside.chmod(mode)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either absent, as it was, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[str, list[int]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor: header length, JSON header, raw bytes."""
    import torch  # here, since who writes a text need not wait for it

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (dtype, shape) in layout.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for key in layout:
            flat = tensor(key).contiguous().flatten().view(torch.uint8)
            out.write(flat.numpy().data)
