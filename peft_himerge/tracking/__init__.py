"""Where merges are told: W&B, TensorBoard, JSON lines, the log.

A listener is any callable that takes the frozen records of `peft_himerge.events`; pass several as
`callbacks=` of `merge_adapters_hi` or `listeners=` of `HiMergeCallback`. Those in here wait for
`MergeFinished` and then show the whole merge, as one `Round`.
"""

from .book import Book as Book
from .book import Round as Round
from .logs import JsonlListener as JsonlListener
from .logs import LogListener as LogListener
from .tensorboard import TensorBoardListener as TensorBoardListener
from .wandb import WandbListener as WandbListener

__all__ = [
    "Book",
    "JsonlListener",
    "LogListener",
    "Round",
    "TensorBoardListener",
    "WandbListener",
]
