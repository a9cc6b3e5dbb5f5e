"""The benchmark on what the project ships: the demo's base, two adapters and two tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..demo import adapter_dirs, load_base, load_tasks
from ..folders import hold_adapters
from .run import Options, run_loaded
from .tasks import choice_task

__all__ = ["run_own"]


def run_own(
    out: str | Path,
    *,
    contenders: Sequence[str] = (),
    options: Options | None = None,
    base: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run every contender on the demo's tasks; see `run.run_bench`.

    Args:
        out: folder for the cells.
        contenders: names of `LINEUP`; all by default.
        options: sizes and budget.
        base: folder of the base model; None is Gemma-3-270M from the package registry.
        say: gets a line per cell.

    Raises:
        HiMergeError: the base model cannot be had.
    """
    chosen = options or Options()
    model, tokenizer = load_base(base)
    tasks = {
        name: choice_task(
            name,
            splits.validation[: chosen.rows],
            splits.test[: chosen.test_rows],
            tokenizer,
            guide=chosen.guide,
            batch_size=chosen.batch_size,
        )
        for name, splits in load_tasks().items()
    }
    loaded = hold_adapters(model.to(chosen.torch_dtype()), adapter_dirs())
    return run_loaded(
        loaded,
        tasks,
        out,
        settings=[sorted(tasks)],
        contenders=contenders,
        options=chosen,
        say=say,
    )
