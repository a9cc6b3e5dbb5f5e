"""What may go wrong with the disk and the process, made to happen at a moment of our choice.

Python tells audit hooks of every file that is opened, renamed or removed before it happens; syncs
and writes are patched. A hook cannot be taken out again, so all of this happens in a forked child.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
CALLS = ("fsync", "write")
DIED, RAISED = -signal.SIGKILL, 3


def child(body: Callable[[], Any], meanwhile: Callable[[int], Any] = int) -> int:
    """Run `body` in a fork of this process; return 0, `RAISED`, or minus the signal it died of.

    `meanwhile` gets the fork's number.
    """
    number = os.fork()
    if number:
        meanwhile(number)
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    code = 0
    try:
        body()
    except BaseException:
        traceback.print_exc()
        code = RAISED
    finally:
        os._exit(code)


def killed_after(body: Callable[[], Any], seconds: float) -> int:
    """Run `body` in a fork that gets SIGKILL after so many seconds, if it still runs by then."""
    return child(body, lambda number: (time.sleep(seconds), os.kill(number, signal.SIGKILL)))


def watch(root: Path, at: Callable[[int, str], None]) -> None:
    """Call ``at(number, what)`` before every operation on a file under `root`, from now on."""
    inside = os.fspath(root)
    count = 0

    def step(what: str) -> None:
        nonlocal count
        count += 1
        at(count, what)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments:
            paths = [os.fspath(a) for a in arguments[:2] if isinstance(a, (str, os.PathLike))]
            if any(path.startswith(inside) for path in paths) and not reads(event, arguments):
                step(" ".join([event, *paths]))

    for name in CALLS:
        setattr(os, name, told(name, getattr(os, name), inside, step))
    sys.addaudithook(hook)


def reads(event: str, arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if event == "open" and len(arguments) > 2 else os.O_WRONLY
    return isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def told(
    name: str, real: Callable[..., Any], inside: str, step: Callable[[str], None]
) -> Callable[..., Any]:
    def patched(fd: int, *rest: Any) -> Any:
        path = os.fspath(Path(f"/proc/self/fd/{fd}").readlink())
        if path.startswith(inside):
            step(f"{name} {path}")
        return real(fd, *rest)

    return patched


def steps(root: Path, body: Callable[[], Any], log: Path) -> list[str]:
    """Return every operation that `body` makes on files under `root`, in order."""

    def counted() -> None:
        with log.open("w", encoding="utf-8", buffering=1) as file:
            watch(root, lambda number, what: file.write(f"{number} {what}\n") and None)
            body()

    assert child(counted) == 0
    return log.read_text(encoding="utf-8").splitlines()


def killed_before(root: Path, body: Callable[[], Any], step: int) -> int:
    """Run `body` in a fork that gets SIGKILL before its n-th operation, counted from 1."""

    def deadly(number: int, _what: str) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return child(lambda: (watch(root, deadly), body()))


def failing_at(root: Path, body: Callable[[], Any], step: int, error: OSError) -> int:
    """Run `body` in a fork whose n-th operation, and every later one but removals, fails."""

    def full(number: int, what: str) -> None:
        if number >= step and not what.startswith(("os.remove", "os.rmdir")):
            raise error

    return child(lambda: (watch(root, full), body()))
