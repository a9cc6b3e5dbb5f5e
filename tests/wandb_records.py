"""Read a W&B run's own record file back, so that tests see what really was logged.

A ``.wandb`` file is LevelDB's log format: a header of 7 bytes, then blocks of 32 KiB with chunks of
(crc32, length, type), type 1 whole, 2 first, 3 middle, 4 last; each record is a protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768


def _chunks(raw: bytes) -> Iterator[tuple[int, bytes]]:
    assert raw[:4] == b":W&B", "not a W&B record file"
    place = 7
    while place < len(raw):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _crc, length, kind = struct.unpack("<IHB", raw[place : place + 7])
        yield kind, raw[place + 7 : place + 7 + length]
        place += 7 + length


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    parts: list[bytes] = []
    for kind, chunk in _chunks(file.read_bytes()):
        parts.append(chunk)
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


@dataclass
class RunFile:
    """What one run recorded."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def exits(self) -> int:
        return len(self.exit_codes)

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]


def _update(held: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(held.get(key), dict):
            _update(held[key], value)
        else:
            held[key] = value


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        inner = found
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return found


def read_run(folder: Path) -> RunFile:
    """Return what the only run under `folder` recorded."""
    (file,) = [p for p in folder.rglob("run-*.wandb") if "latest-run" not in p.parts]
    found = RunFile()
    for record in _records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.rows.append(_items(record.history.item))
            found.steps.append(record.history.step.num)
        elif kind == "summary":
            _update(found.summary, _items(record.summary.update))
        elif kind == "config":
            _update(found.config, _items(record.config.update))
        elif kind == "run":
            _update(found.config, _items(record.run.config.update))
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "exit":
            found.exit_codes.append(record.exit.exit_code)
    return found


def table(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of a logged table, from the run's media folder."""
    (file,) = folder.rglob(Path(entry["path"]).name)
    content: dict[str, Any] = json.loads(file.read_text())
    return content
