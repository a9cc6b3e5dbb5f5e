"""One trial: a merge with given options, and the same as a run that W&B's agent started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft import PeftModel

from ..config import HiMergeConfig
from ..errors import MissingExtraError
from ..events import Event, Listener, MergeStarted, StateScored
from ..hi import merge_adapters_hi
from ..probe import preserved
from ..result import MergeResult
from ..scoring import EvalFn
from ..tracking import WandbListener
from .recipe import METRIC, PREFIX, Sweep

__all__ = ["Merge", "merger", "run_agent"]

# Does one merge with these options; the listeners hear it.
Merge = Callable[[HiMergeConfig, Sequence[Listener]], MergeResult]


def merger(
    model: PeftModel,
    adapters: Sequence[str],
    eval_fns: Mapping[str, EvalFn],
    *,
    journal: str | Path | None = None,
) -> Merge:
    """Return a function that merges with given options and leaves the model as it was.

    Args:
        model: holds the adapters.
        adapters: their names.
        eval_fns: as in `merge_adapters_hi`.
        journal: keeps every score, so that a state that two trials share is scored once: options
            that act late, as `layer_density`, cost only what comes after them.
    """

    def merge(config: HiMergeConfig, listeners: Sequence[Listener] = ()) -> MergeResult:
        name, tuner = "himerge_sweep", model.base_model
        active = tuner.active_adapter
        with preserved(model):
            result = merge_adapters_hi(
                model,
                adapters,
                eval_fns,
                adapter_name=name,
                config=config,
                callbacks=listeners,
                journal=journal,
            )
            model.delete_adapter(name)
        tuner.active_adapter = active
        return result

    return merge


def run_agent(sweep: Sweep, merge: Merge) -> MergeResult:
    """Run one trial of a W&B sweep: the options are those W&B's agent chose for this run.

    Call it in a process that `wandb agent` started. A value is logged also if the merge fails after
    its first scores, since a Bayesian sweep waits for one from every run.

    Raises:
        HiMergeError: the merge failed; the run is marked as failed.
    """
    try:
        import wandb
    except ImportError as exc:
        raise MissingExtraError("W&B sweeps need: pip install 'peft-himerge[wandb]'.") from exc
    run = wandb.init()
    chosen = {
        key.removeprefix(PREFIX): value
        for key, value in dict(run.config).items()
        if key.startswith(PREFIX) and key.removeprefix(PREFIX) in sweep.space
    }
    book = _Floor()
    try:
        result = merge(sweep.config(chosen), (book, WandbListener()))
    except BaseException:
        if book.floor is not None:
            run.log({METRIC: book.floor})
            run.summary[METRIC] = book.floor
        run.finish(exit_code=1)
        raise
    run.finish()
    return result


class _Floor:
    """Remembers the base model's mean score: what a merge that fails is worth."""

    def __init__(self) -> None:
        self._scores: dict[str, float] = {}
        self._tasks: tuple[str, ...] = ()

    def __call__(self, event: Event) -> None:
        if isinstance(event, MergeStarted):
            self._tasks = event.tasks
        elif isinstance(event, StateScored) and event.plan is not None:
            if not list(event.plan.live()):
                self._scores[event.task] = event.score.value

    @property
    def floor(self) -> float | None:
        known = [self._scores[task] for task in self._tasks if task in self._scores]
        return sum(known) / len(known) if known and len(known) == len(self._tasks) else None
