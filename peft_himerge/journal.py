"""Scores on disk, so that a killed run goes on where it stopped.

A journal is a text file of JSON lines. Every line holds a record and a checksum over the record
and the line before it; the first record is the header, with the format, what all scores rest on
(`identity`) and the random state they start from. Each score is appended and synced to disk before
the run goes on, so that `kill -9` or a power cut loses at most the score in flight.

What is read back is checked to the last byte:

* a last line without its newline is the score in flight: it is cut off;
* any other damage: the whole file is set aside as ``*.corrupt-<n>``;
* another format or another identity: it is set aside as ``*.foreign-<n>``;
* scores of a model that an eval function wrote to: as ``*.tainted-<n>``.

A file is renamed, never deleted, and a warning is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from .errors import JournalError
from .scoring import Score

if sys.platform != "win32":
    import fcntl

__all__ = ["FORMAT", "Journal", "Kept", "pack_score", "unpack_score"]

FORMAT = "peft_himerge.journal/1"
_LOG = logging.getLogger("peft_himerge.journal")
_HEAD, _MIDDLE, _TAIL = '{"sha256":"', '","record":', "}"
_DIGITS = 16  # of the checksum: 64 bits
# POSIX locks do not keep a process out of a file it has locked itself.
_OPEN: set[tuple[int, int]] = set()


@dataclass(frozen=True, slots=True)
class Kept:
    """A score from the journal, and the seconds it once took."""

    score: Score
    seconds: float


def pack_score(score: Score) -> dict[str, Any]:
    """Return a score as plain JSON values that `unpack_score` turns back bit by bit."""
    examples = None if score.examples is None else score.examples.tolist()
    packed = {"value": score.value, "examples": examples, "metrics": dict(score.metrics)}
    return packed if score.error is None else {**packed, "error": score.error}


def unpack_score(packed: Mapping[str, Any]) -> Score:
    """Return the score that `pack_score` packed."""
    examples = packed["examples"]
    return Score(
        packed["value"],
        None if examples is None else np.asarray(examples, dtype=np.float64),
        MappingProxyType(dict(packed["metrics"])),
        packed.get("error"),
    )


class _DamageError(Exception):
    """The file is no journal, or was changed."""


class _ForeignError(Exception):
    """The file is another run's journal."""


class Journal:
    """The scores of one base model in one environment; a context manager that holds a lock.

    Args:
        path: a file, or a folder. A folder (one that exists, or a name without a suffix) gets one
            file per identity, so runs on different models can share it.
        identity: what every score in the file rests on; the values are compared one by one.
        random_state: the random state that scores start from, as plain JSON values. It is written
            to a new journal; an old one keeps its own.

    Attributes:
        file: the file.
        random_state: the random state all scores of this journal start from.
        found: number of scores that were there when it was opened.

    Raises:
        JournalError: another process, or another merge of this one, has the journal open; or the
            file cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, str],
        random_state: Mapping[str, Any],
    ) -> None:
        self._identity = dict(identity)
        self.file = _file(Path(path), self._identity)
        self.random_state: Mapping[str, Any] = random_state
        self.found = 0
        self._kept: dict[str, Kept] = {}
        self._sum = ""
        self._fd = -1
        self._inode = (0, 0)

    def __enter__(self) -> Journal:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except BaseException as exc:
            self._close()
            if isinstance(exc, OSError) and not isinstance(exc, JournalError):
                raise JournalError(f"the journal {self.file} cannot be used: {exc}.") from exc
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def find(self, key: Mapping[str, Any]) -> Kept | None:
        """Return the score under this key, or None.

        Args:
            key: plain JSON values; everything that, beside the identity, decides the score.
        """
        return self._kept.get(_text(key))

    def add(self, key: Mapping[str, Any], score: Score, seconds: float) -> None:
        """Write a score; it is on disk when this returns.

        Raises:
            JournalError: the disk is full or went away; the scores before are safe.
        """
        kept = Kept(score, seconds)
        record = {"key": dict(key), "seconds": seconds, **pack_score(score)}
        try:
            self._append(record)
        except OSError as exc:
            raise JournalError(
                f"the journal {self.file} cannot be written: {exc}. The scores so far are in it: "
                f"make room and run again."
            ) from exc
        self._kept[_text(key)] = kept

    def set_aside(self, kind: str, why: str) -> None:
        """Rename the file so that its scores are not found again.

        Args:
            kind: what the new name says.
            why: for the log.
        """
        number = 1
        while (target := self.file.with_name(f"{self.file.name}.{kind}-{number}")).exists():
            number += 1
        self.file.rename(target)
        _LOG.warning(
            "the journal %s was set aside as %s: %s. All scores are computed anew.",
            self.file,
            target.name,
            why,
        )

    def _open(self) -> None:
        while True:
            self._lock()
            try:
                self._read(os.pread(self._fd, os.fstat(self._fd).st_size, 0))
                return
            except _DamageError as exc:
                self.set_aside("corrupt", str(exc))
            except _ForeignError as exc:
                self.set_aside("foreign", str(exc))
            self._close()

    def _lock(self) -> None:
        """Open the file and lock it; start over if it was renamed in between."""
        while True:
            if _inode(self.file) in _OPEN:  # not even opened: closing it would drop the lock
                raise self._in_use()
            self._fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if sys.platform != "win32":
                try:
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    raise self._in_use() from None
            opened = os.fstat(self._fd)
            self._inode = (opened.st_dev, opened.st_ino)
            if _inode(self.file) == self._inode:
                _OPEN.add(self._inode)
                return
            self._close()

    def _in_use(self) -> JournalError:
        return JournalError(
            f"the journal {self.file} is in use by another merge. Wait for it to end, or give "
            f"every merge a journal of its own."
        )

    def _close(self) -> None:
        if self._fd >= 0:
            _OPEN.discard(self._inode)
            os.close(self._fd)
            self._fd, self._inode = -1, (0, 0)

    def _read(self, raw: bytes) -> None:
        """Take over what the file holds, or begin it."""
        whole = raw.rfind(b"\n") + 1
        self._kept, self._sum = {}, ""
        lines = raw[:whole].split(b"\n")[:-1]
        if not lines and raw and not _is_torn_header(raw):
            raise _DamageError("it holds no complete line")
        records = [self._check(number, line) for number, line in enumerate(lines, 1)]
        if whole < len(raw):
            os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)
        if not records:
            self._begin()
            return
        self._check_header(records[0])
        for number, record in enumerate(records[1:], 2):
            try:
                self._kept[_text(record["key"])] = _kept(record)
            except (KeyError, TypeError, ValueError, AttributeError) as exc:
                raise _DamageError(f"line {number} is not a score") from exc
        self.found = len(self._kept)
        if self.found:
            _LOG.info("%s holds %d scores, which are not computed again", self.file, self.found)

    def _check(self, number: int, line: bytes) -> Any:
        """Return the record of one line if its checksum is right."""
        try:
            text = line.decode("utf-8")
            start = len(_HEAD) + _DIGITS
            record = text[start + len(_MIDDLE) : -len(_TAIL)]
            if text != _line(text[len(_HEAD) : start], record):
                raise ValueError("no checksum")
            found = text[len(_HEAD) : start]
            if found != _checksum(self._sum, record):
                raise ValueError("the checksum is wrong")
            self._sum = found
            return json.loads(record)
        except RecursionError:
            raise _DamageError(f"line {number}: it is nested too deeply") from None
        except ValueError as exc:
            # A file of another format has no checksums of ours: it is foreign, not damaged.
            if number == 1 and not line.startswith(_HEAD.encode()):
                raise _ForeignError(f"it is not a journal of format {FORMAT}") from exc
            raise _DamageError(f"line {number}: {exc}") from exc

    def _check_header(self, header: Any) -> None:
        if not isinstance(header, Mapping) or header.get("format") != FORMAT:
            raise _ForeignError(f"its format is not {FORMAT}")
        identity, state = header.get("identity"), header.get("random_state")
        if not isinstance(identity, Mapping) or not isinstance(state, Mapping):
            raise _DamageError("line 1: no identity")
        for name in sorted({*identity, *self._identity}):
            old, new = identity.get(name), self._identity.get(name)
            if old != new:
                raise _ForeignError(f"its scores rest on {name} {old!r}, this run on {new!r}")
        self.random_state = state

    def _begin(self) -> None:
        self._append(
            {
                "format": FORMAT,
                "identity": self._identity,
                "random_state": dict(self.random_state),
            }
        )
        if sys.platform != "win32":  # so that the file's name survives a power cut too
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        checksum = _checksum(self._sum, text)
        line = (_line(checksum, text) + "\n").encode()
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)
        self._sum = checksum


def _kept(record: Mapping[str, Any]) -> Kept:
    """Return what a record of a score says, if it is one."""
    score, seconds = unpack_score(record), record["seconds"]
    numbers = [score.value, seconds, *score.metrics.values()]
    numbers += [] if score.error is None else [score.error]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise TypeError("a value is no number")
    examples = score.examples
    if examples is not None and not (examples.ndim == 1 and np.isfinite(examples).all()):
        raise TypeError("the examples are no row of numbers")
    return Kept(score, seconds)


def _file(path: Path, identity: Mapping[str, str]) -> Path:
    if path.is_file() or (path.suffix and not path.is_dir()):
        return path
    digest = hashlib.sha256(_text(identity).encode()).hexdigest()
    return path / f"scores-{digest[:12]}.jsonl"


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino)


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, allow_nan=False)


def _checksum(previous: str, record: str) -> str:
    return hashlib.sha256(f"{previous}|{record}".encode()).hexdigest()[:_DIGITS]


def _line(checksum: str, record: str) -> str:
    return f"{_HEAD}{checksum}{_MIDDLE}{record}{_TAIL}"


def _is_torn_header(raw: bytes) -> bool:
    """Return True if the bytes are the beginning of a first line that was being written."""
    return raw[: len(_HEAD)] == _HEAD.encode()[: len(raw)]
