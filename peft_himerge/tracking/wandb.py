"""Weights & Biases: scalars, one contribution table, charts, plan and adapter as artifacts.

What W&B does to those who log into a run that is not theirs decides the form of this room:

* `step=` is never passed: transformers' callback logs without one, so the run's own step has run
  ahead and a row for an earlier step is dropped. Rounds have their own axis (`define_metric`), and
  during training every row carries `train/global_step`.
* The run is looked up at every merge and never kept: a hyper-parameter search ends one run and
  starts the next behind our back.
* A failing call is logged once, and the merge goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..events import AdapterSaved, Event, MergeStarted, MergeTested
from ..report import describe_edit
from . import figures
from .book import Book, Round
from .tensorboard import scalars

__all__ = ["WandbListener"]

_LOG = logging.getLogger("peft_himerge.tracking")
_COLUMNS = (
    "round",
    "layer",
    "task",
    "c_alone",
    "c_merged",
    "gamma",
    "gamma_se",
    "alpha_alone",
    "beta_alone",
    "alpha_merged",
    "beta_merged",
    "conflict",
    "Gamma",
    "done",
)
_ROUND = "himerge/round"


class WandbListener:
    """Logs merges under `himerge/` to the W&B run that is there; a context manager.

    It joins the run that exists (`wandb.run`) when an event comes, and does nothing if there is
    none. It finishes a run only if it started it itself. Offline and disabled modes, and a W&B that
    is not installed, are all fine; no failure of W&B ever stops a merge.

    Args:
        start: arguments of `wandb.init` to start a run with if there is none, e.g.
            ``{"project": "merging"}``; None never starts one. Leave the context, or call `close`,
            to finish a run that was started.
        artifacts: upload the plan, and the merged adapter once it is saved, as artifacts.
        images: draw the charts as images too (needs matplotlib).

    Example:
        >>> listener = WandbListener()
        >>> # merge_adapters_hi(model, names, eval_fns, callbacks=[listener])
    """

    def __init__(
        self,
        *,
        start: Mapping[str, Any] | None = None,
        artifacts: bool = True,
        images: bool = True,
    ) -> None:
        self._start = None if start is None else MappingProxyType(dict(start))
        self._artifacts = artifacts
        self._images = images
        self._book = Book()
        self._rows: list[tuple[Any, ...]] = []
        self._told: set[str] = set()
        self._defined: str | None = None
        self._own: Any = None

    def __call__(self, event: Event) -> None:
        """Take one event."""
        done = self._book.take(event)
        if isinstance(event, MergeStarted):
            self._try("start", lambda: self._begin(event))
        elif done is not None:
            self._try("log", lambda: self._log(done))
        elif isinstance(event, MergeTested):
            self._try("log of the test scores", lambda: self._log_test(event))
        elif isinstance(event, AdapterSaved) and self._artifacts:
            self._try("upload", lambda: self._upload(event))

    def __enter__(self) -> WandbListener:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run if this listener started it.

        Args:
            failed: True if W&B is to show it as failed.
        """
        own, self._own = self._own, None
        if own is not None:
            self._try("finish", lambda: own.finish(exit_code=int(failed)))

    def _try(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            # The merge is the user's work of hours; its log is not worth it.
            if what not in self._told:
                self._told.add(what)
                _LOG.warning("W&B: %s failed; the merge goes on without it.", what, exc_info=True)

    def _run(self) -> Any:
        """Return the current run, or None."""
        # A run that exists was started by code that had imported wandb.
        wandb = sys.modules.get("wandb")
        return None if wandb is None else wandb.run

    def _joined(self) -> Any:
        """Return the current run with its axis defined, started if that was asked for; or None."""
        if self._start is not None and self._run() is None:
            import wandb

            self._own = wandb.init(**self._start)
        run = self._run()
        if run is not None and self._defined != run.id:
            run.define_metric(_ROUND, hidden=True)
            run.define_metric("himerge/*", step_metric=_ROUND)
            run.define_metric("himerge/best_score", step_metric=_ROUND, summary="max")
            self._defined, self._rows = run.id, []
        return run

    def _begin(self, event: MergeStarted) -> None:
        run = self._joined()
        if run is None:
            return
        facts = {
            "adapters": dict(event.digests),
            "tasks": list(event.tasks),
            "layers": list(event.layers),
            "options": dict(event.options),
        }
        run.config.update({"himerge": facts}, allow_val_change=True)

    def _log(self, done: Round) -> None:
        run = self._run()
        if run is None:
            return
        payload: dict[str, Any] = {_ROUND: done.round}
        if done.global_step is not None:
            payload["train/global_step"] = done.global_step
        payload |= {f"himerge/{name}": value for name, value in scalars(done).items()}
        # Scalars first, on their own: they arrive even if a chart cannot be made.
        run.log(payload)
        self._summarise(run, done)
        if done.contributions:
            self._try("charts", lambda: self._chart(run, done))
        if self._artifacts:
            self._try("upload of the plan", lambda: self._upload_plan(run, done))

    def _log_test(self, event: MergeTested) -> None:
        """Log the scores of test data: as scalars of the merge's own row, and as a table.

        Of a method of the registry it is the first that is heard.
        """
        run = self._joined()
        if run is None:
            return
        import wandb

        *_, merged = event.scores
        final = [score.value for score in event.scores[merged].values()]
        payload: dict[str, Any] = {_ROUND: self._book.round}
        payload["himerge/test/score"] = sum(final) / len(final)
        for task, score in event.scores[merged].items():
            payload[f"himerge/test/merged/{task}"] = score.value
            payload[f"himerge/test/base/{task}"] = event.scores["base"][task].value
            if task in event.scores:
                payload[f"himerge/test/alone/{task}"] = event.scores[task][task].value
        if event.kept is not None:
            payload["himerge/test/kept"] = event.kept
        rows = [
            (state, task, score.value, score.se)
            for state, row in event.scores.items()
            for task, score in row.items()
        ]
        table = wandb.Table(columns=["state", "task", "score", "standard error"], data=rows)
        run.log({**payload, "himerge/test_scores": table})

    def _summarise(self, run: Any, done: Round) -> None:
        """Write what sweeps and the runs table read; a sweep takes the last value it is given."""
        values: dict[str, Any] = {
            "himerge/score": done.score,
            "himerge/best_score": done.best_score,
            "himerge/plan": done.plan.fingerprint,
        }
        run.summary.update({name: value for name, value in values.items() if value is not None})

    def _chart(self, run: Any, done: Round) -> None:
        """Log the table of all rounds so far, and this round's charts."""
        import wandb

        self._rows += _table_rows(done)
        heat = wandb.Table(
            columns=["Actual", "Predicted", "nPredictions"],
            data=[[row.layer, row.task, row.gamma] for row in done.contributions],
        )
        bars = wandb.Table(
            columns=["layer", "Gamma"],
            data=[[r.conflict.layer, r.conflict.Gamma] for r in done.conflicts],
        )
        title = f"round {done.round}"
        charts: dict[str, Any] = {
            _ROUND: done.round,
            # A new table under one key: one that is logged again with more rows is not seen.
            "himerge/contributions": wandb.Table(columns=list(_COLUMNS), data=self._rows),
            # W&B's own grid of coloured cells; its field names are fixed.
            "himerge/heatmap": wandb.plot_table(
                vega_spec_name="wandb/confusion_matrix/v1",
                data_table=heat,
                fields={c: c for c in ("Actual", "Predicted", "nPredictions")},
                string_fields={"title": f"gamma by layer and task, {title}"},
            ),
            "himerge/conflict_chart": wandb.plot.bar(
                bars, "layer", "Gamma", title=f"Gamma by layer, {title}"
            ),
        }
        if done.global_step is not None:
            charts["train/global_step"] = done.global_step
        if self._images and figures.available():
            charts["himerge/heatmap_image"] = wandb.Image(figures.pixels(figures.heatmap(done)))
            charts["himerge/conflict_image"] = wandb.Image(
                figures.pixels(figures.conflict_chart(done))
            )
        run.log(charts)

    def _upload_plan(self, run: Any, done: Round) -> None:
        import wandb

        meta = {"round": done.round, "score": done.score, "fingerprint": done.plan.fingerprint}
        artifact = wandb.Artifact(f"himerge-plan-{run.id}", type="himerge-plan", metadata=meta)
        with artifact.new_file("plan.json", mode="w") as file:
            file.write(done.plan.to_json())
        run.log_artifact(artifact)

    def _upload(self, event: AdapterSaved) -> None:
        run = self._run()
        if run is None:
            return
        import wandb

        meta = {} if event.plan is None else {"fingerprint": event.plan.fingerprint}
        artifact = wandb.Artifact(f"himerge-adapter-{run.id}", type="model", metadata=meta)
        artifact.add_dir(str(Path(event.folder)))
        run.log_artifact(artifact)


def _table_rows(done: Round) -> list[tuple[Any, ...]]:
    """Return the rows of the contribution table that one round adds."""
    found = {r.conflict.layer: r for r in done.conflicts}
    rows = []
    for row in done.contributions:
        resolution = found.get(row.layer)
        judged: tuple[str, float | None, str] = ("", None, "")
        if resolution is not None:
            conflict = resolution.conflict
            judged = (conflict.kind.value, conflict.Gamma, describe_edit(resolution))
        numbers = [getattr(row, name) for name in _COLUMNS[3:11]]
        rows.append((done.round, row.layer, row.task, *numbers, *judged))
    return rows
