"""Folders that are written: by one process at a time, and seen as a whole or not at all.

New files are made in a folder inside the target. When all are whole and on the disk, that folder
gets another name: from then on they count. Then each moves to its place, those in folders inside
too. The configs, without which nobody takes a folder for an adapter or a model, are removed first
and come last, so a folder with a config holds the files of one writing only. What a killed process
had finished but not moved is moved by the next one that writes there; what it had not finished is
removed.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import HiMergeError, OutputError
from .files import SCRATCH, sync

__all__ = ["LOCK", "owning", "publishing", "told"]

LOCK = ".himerge.lock"
"""Inside a folder while a process writes there; it holds that process's number and machine."""

_NEW, _READY = ".himerge-new", ".himerge-ready"
_CONFIGS = frozenset({"adapter_config.json", "config.json"})
_OWNED: set[tuple[int, Path]] = set()  # (thread, folder): inside, the same thread may own it again


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Make an OSError inside say which folder could not be written, and what to do.

    Raises:
        OutputError: instead of the OSError.
    """
    try:
        yield
    except OSError as exc:
        if isinstance(exc, (HiMergeError, Timeout)):
            raise
        what = f"{str(target)!r} cannot be written: {exc}."
        if (target / _READY).is_dir():
            what += f" The new files are whole, in {str(target / _READY)!r}."
            raise OutputError(f"{what} Writing there again moves them to their places.") from exc
        raise OutputError(f"{what} It is as it was. Make room, or choose another folder.") from exc


@contextmanager
def owning(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep every other process and thread from writing to `folder`, which is made if need be.

    The lock is the operating system's: it falls with the process that holds it, however that ends.
    What a killed process left is finished or removed first.

    Args:
        folder: the folder.
        wait: wait for the owner to end, instead of failing.

    Raises:
        OutputError: another process or thread owns it, or it cannot be written.
    """
    target = Path(folder)
    key = (threading.get_ident(), target.resolve())
    if key in _OWNED:
        yield
        return
    with told(target):
        made = _make(target)
    try:
        with _locked(target, wait):
            _OWNED.add(key)
            with told(target):
                _clear(target)
            yield
    finally:
        _OWNED.discard(key)
        for path in made:
            with suppress(OSError):  # something was written there
                path.rmdir()


@contextmanager
def publishing(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write files to; on success they all take their places in `folder`.

    Until then `folder` is as it was, also if writing fails. Its other files stay, also those in
    folders of the same names. Empty folders are not taken over.

    Raises:
        OutputError: as `owning`; or the disk is full, or went away; or a folder is where a file is
            to go, or a file where a folder.
    """
    target = Path(folder)
    with owning(target), told(target):
        new = target / _NEW
        new.mkdir()
        try:
            yield new
            _check_room(new, target)
            for path in (*sorted(new.rglob("*")), new):
                sync(path)
            new.rename(target / _READY)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _move(target)


def _check_room(new: Path, target: Path) -> None:
    for path in sorted(new.rglob("*")):
        place = target / path.relative_to(new)
        if place.exists() and place.is_dir() != path.is_dir():
            code = errno.EISDIR if place.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code), str(place))


def _move(target: Path) -> None:
    """Move the files that wait to their places; may be begun again after any of its steps."""
    ready = target / _READY
    if not ready.is_dir():
        return
    # Of the configs that of `target` itself, which holds the others, goes first and comes last.
    found = sorted(ready.rglob("*"), reverse=True)
    inside = [path for path in found if path.is_dir()]  # the deepest first
    waiting = [path.relative_to(ready) for path in found if path not in inside]
    waiting.sort(key=lambda name: (-len(name.parts), name))
    configs = [name for name in waiting if name.name in _CONFIGS]
    folders = sorted({target, *(target / up for name in waiting for up in name.parents)})
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for name in reversed(configs):
        (target / name).unlink(missing_ok=True)
    for names in ([], [name for name in waiting if name not in configs], configs):
        for name in names:
            (ready / name).replace(target / name)
        for folder in folders:
            sync(folder)
    for path in (*inside, ready):
        path.rmdir()


def _clear(target: Path) -> None:
    _move(target)
    shutil.rmtree(target / _NEW, ignore_errors=True)
    for path in target.glob(f".*{SCRATCH}"):
        path.unlink(missing_ok=True)


def _make(target: Path) -> list[Path]:
    """Make the folder and those above it; return the new ones, the deepest first."""
    missing = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _locked(target: Path, wait: bool) -> Iterator[None]:
    path = target / LOCK
    lock = FileLock(path)
    try:
        with told(target):
            lock.acquire(blocking=wait)
    except Timeout:
        raise OutputError(_in_use(target)) from None
    try:
        if sys.platform != "win32":  # where nobody else may read or remove a locked file
            with told(target):
                path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever has it open already sees that it is gone, and starts
        # over with a file of his own.
        if sys.platform != "win32":
            path.unlink(missing_ok=True)
        lock.release()


def _in_use(target: Path) -> str:
    try:
        owner = (target / LOCK).read_text(encoding="utf-8")
    except OSError:  # it ended in this moment, or this is Windows
        owner = ""
    return (
        f"{str(target)!r} is being written by {owner or 'another process'}. Wait until it is done, "
        f"stop it, or write to another folder."
    )
