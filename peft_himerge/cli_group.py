"""How every command of `himerge` ends when it is told to stop."""

from __future__ import annotations

import signal
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

__all__ = ["Commands"]


class Commands(TyperGroup):
    """The commands; Ctrl-C ends each with exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run one command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut off this text
            text = (
                "stopped by Ctrl-C. What was being written is as it was before; a merge with a "
                "journal, run again, goes on where it stopped."
            )
            Console(stderr=True).print(text, soft_wrap=True, highlight=False)
            raise typer.Exit(130) from None
