"""A progress bar with an ETA, as a listener of the merge's events."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .events import (
    Event,
    FocusStarted,
    LayerResolved,
    MergeFinished,
    MergeStarted,
    StateScored,
)

__all__ = ["ProgressBar"]

_STAGES = {
    "states": "scoring base, adapters and merge",
    "search": "searching density and scale",
    "analysis": "measuring layers",
    "repair": "repairing layers",
    "export": "scoring the exported adapter",
    "test": "scoring test data",
}


class ProgressBar:
    """Shows how many scores are done and how long the rest will take; a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar = self._progress.add_task("starting", total=None)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, FocusStarted):
            text = f"focusing {', '.join(event.adapters)}"
            self._progress.update(self._bar, description=text)
        elif isinstance(event, MergeStarted):
            self._progress.update(self._bar, total=event.scores)
        elif isinstance(event, StateScored):
            text = f"{_STAGES[event.stage]}: {event.task}"
            self._progress.update(
                self._bar, completed=event.done, total=event.total, description=text
            )
        elif isinstance(event, LayerResolved):
            text = f"{event.resolution.conflict.kind.value}: {event.resolution.conflict.layer}"
            self._progress.update(self._bar, description=text)
        elif isinstance(event, MergeFinished):
            done = self._progress.tasks[0].completed
            self._progress.update(self._bar, total=done, description="merged")
