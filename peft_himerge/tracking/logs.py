"""Merges as lines: JSON lines in a file, and one readable line per merge in the log."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from ..events import AdapterSaved, Event, MergeTested
from .book import Book

__all__ = ["JsonlListener", "LogListener"]

_LOG = logging.getLogger("peft_himerge.tracking")


class LogListener:
    """Writes one line per finished merge to the logger `peft_himerge.tracking`, level INFO."""

    def __init__(self) -> None:
        self._book = Book()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        done = self._book.take(event)
        if done is None:
            return
        where = "" if done.global_step is None else f" at step {done.global_step}"
        score = "not scored" if done.score is None else f"score {done.score:.4f}"
        kept = ", ".join(f"{n} {s:.0%}" for n, s in done.kept.items() if s is not None)
        layers = ", ".join(f"{count} {kind}" for kind, count in done.kinds.items() if count)
        _LOG.info(
            "merge %d%s: %s%s%s (%d scores in %.1f s)",
            done.round,
            where,
            score,
            f"; kept: {kept}" if kept else "",
            f"; layers: {layers}" if layers else "",
            done.scores_computed,
            done.seconds,
        )


class JsonlListener:
    """Appends one line of JSON per finished merge to a file, one per test and per saved adapter.

    Every line has the key "event": "round", "tested" or "saved". A round holds everything: scores,
    shares kept, contributions, conflicts and the plan.

    Args:
        path: the file; folders are made, lines are appended.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._book = Book()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        done = self._book.take(event)
        if done is not None:
            self._write({"event": "round", **done.to_dict()})
        elif isinstance(event, MergeTested):
            scores = {s: {t: x.value for t, x in row.items()} for s, row in event.scores.items()}
            self._write({"event": "tested", "scores": scores, "kept": event.kept})
        elif isinstance(event, AdapterSaved):
            self._write({"event": "saved", "folder": str(event.folder)})

    def _write(self, record: dict[str, object]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
