"""The command line as a test calls it: in this process, or as a user does, in one of its own.

A process of its own imports everything anew, five seconds or more of a core: for what a command
prints or refuses the call within this process says the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from peft_himerge import cli

WIDE = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@dataclass(frozen=True)
class Done:
    """A call of the command line that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def told(self) -> str:
        """All that it printed, in one line."""
        return " ".join((self.stdout + self.stderr).split())


def himerge(*args: object) -> Done:
    """Call the command line in this process, with what it does about errors."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["himerge", *map(str, args)]),
        mock.patch.dict(os.environ, WIDE),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # stated warnings have tests of their own
        try:
            cli.main()
        except SystemExit as exc:
            code = int(exc.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def himerge_process(*args: object, cwd: Path | None = None, **environment: str) -> Done:
    """Call the command line as a user does, with further environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "peft_himerge", *map(str, args)],
        env={**os.environ, **WIDE, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)
