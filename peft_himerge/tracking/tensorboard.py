"""TensorBoard: scalars, texts and images of every merge."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import MissingExtraError
from ..events import Event
from . import figures
from .book import Book, Round

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardListener", "scalars"]


def scalars(done: Round) -> dict[str, float]:
    """Return every number of a merge that makes a curve, by name, without a prefix."""
    found: dict[str, float | None] = {"score": done.score, "best_score": done.best_score}
    for task, value in done.final.items():
        found[f"merged/{task}"] = value
        found[f"base/{task}"] = done.scores.get("base", {}).get(task)
        found[f"alone/{task}"] = done.scores.get(task, {}).get(task)
        found[f"kept/{task}"] = done.kept.get(task)
    for task, row in done.metrics.items():
        found |= {f"metrics/{task}/{metric}": value for metric, value in row.items()}
    if done.conflicts:
        found |= {f"conflicts/{kind}": float(count) for kind, count in done.kinds.items()}
    found["scores_computed"] = float(done.scores_computed)
    found["seconds"] = done.seconds
    return {name: value for name, value in found.items() if value is not None}


class TensorBoardListener:
    """Writes `himerge/*` into a TensorBoard folder; a context manager that closes the file.

    The step is the training run's global step, or the number of the merge outside of training.

    Args:
        folder: folder of the event file; inside the run's folder it shows up beside its curves.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise MissingExtraError(
                "TensorBoardListener needs tensorboard: pip install 'peft-himerge[tensorboard]'."
            ) from exc
        self._writer: SummaryWriter = SummaryWriter(os.fspath(folder))
        self._book = Book()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        done = self._book.take(event)
        if done is None:
            return
        step = done.round if done.global_step is None else done.global_step
        for name, value in scalars(done).items():
            self._writer.add_scalar(f"himerge/{name}", value, step)
        self._writer.add_text("himerge/plan", f"```json\n{done.plan.to_json()}```", step)
        if done.contributions and figures.available():
            for name, draw in (
                ("heatmap", figures.heatmap),
                ("conflicts", figures.conflict_chart),
            ):
                image = figures.pixels(draw(done))
                self._writer.add_image(f"himerge/{name}", image, step, dataformats="HWC")
        self._writer.flush()

    def __enter__(self) -> TensorBoardListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
