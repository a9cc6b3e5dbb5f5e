"""Ctrl-C ends a merge where nothing is half done, and only once.

Python raises KeyboardInterrupt between any two instructions, so also while a weight is being put
back, and for a second Ctrl-C once more, in the midst of cleaning up after the first. So inside
`held` a Ctrl-C waits, until what runs is inside `heard`: eval functions, forward passes, pure
arithmetic. It ends these at once, and a second one cannot disturb what then puts the model back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["heard", "held"]

# Who still presses Ctrl-C after this long wants out, whatever is left behind.
_PATIENCE = 10.0


class _Guard:
    """What to do about a Ctrl-C right now."""

    def __init__(self) -> None:
        self.open = False
        self.waiting = False
        self._first: float | None = None

    def take(self, _number: int, _frame: FrameType | None) -> None:
        """Python's handler of SIGINT."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if self.open or now - self._first > _PATIENCE:
            self.open = self.waiting = False
            raise KeyboardInterrupt
        self.waiting = True


_guards: list[_Guard] = []  # of the main thread, which alone gets signals; none or one


@contextmanager
def held() -> Iterator[None]:
    """Let Ctrl-C wait, but for what is inside `heard`; one that still waits at the end is raised.

    Nothing changes in other threads, inside another `held`, or where the user has a handler of
    SIGINT of their own.
    """
    ours = threading.current_thread() is threading.main_thread() and not _guards
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    guard = _Guard()
    try:
        signal.signal(signal.SIGINT, guard.take)
        _guards.append(guard)
        yield
    finally:
        _guards.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if guard.waiting:
        raise KeyboardInterrupt


@contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C end what is inside at once; where nothing holds it back, it does so anyway."""
    main = threading.current_thread() is threading.main_thread()
    guard = _guards[0] if main and _guards else None
    if guard is None or guard.open:
        yield
        return
    if guard.waiting:
        guard.waiting = False
        raise KeyboardInterrupt
    try:
        guard.open = True
        yield
    finally:
        guard.open = False
