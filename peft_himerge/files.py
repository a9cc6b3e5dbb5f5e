"""Writing files so that each is either absent, as it was, or whole."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

__all__ = ["SCRATCH", "replacing", "sync", "write_text"]

SCRATCH = ".himerge-tmp"
"""How the name of a file ends that is not whole yet; it begins with a dot."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes the place of `path` at once.

    The file may be read by whoever may read new files here: safetensors 0.8 alone would make it
    readable by its owner only, so that a server of another user could not load it. What a killed
    process of this machine left beside `path` is removed.
    """
    host = platform.node() or "localhost"
    _clear(path, host)
    beside = path.with_name(f".{path.name}.{host}-{os.getpid()}{SCRATCH}")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either absent, as it was, or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk when this returns."""
    if path.is_dir() and sys.platform == "win32":  # which cannot open a folder
        return
    # Windows syncs only what is open for writing.
    mode = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
    opened = os.open(path, mode)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _clear(path: Path, host: str) -> None:
    """Remove what processes that are dead left of this file. Another machine's may be alive."""
    start = f".{path.name}.{host}-"
    for other in path.parent.iterdir():
        if other.name.startswith(start) and other.name.endswith(SCRATCH):
            number = other.name[len(start) : -len(SCRATCH)]
            if number.isdigit() and not psutil.pid_exists(int(number)):
                other.unlink(missing_ok=True)
