"""The local driver: Optuna, with the study in a SQLite file; it resumes, and workers share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, HiMergeError
from ..events import Event, Listener, MergeStarted, StateScored
from ..sampler import import_optuna
from ..tracking.book import overall
from .agent import Merge
from .recipe import Sweep

__all__ = ["Outcome", "run_local"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a local sweep has found so far.

    Attributes:
        score: the best score.
        values: option -> value of the best trial.
        plan: the best trial's plan, as JSON text.
        trials: number of trials by state: "complete", "pruned", "fail".
        importances: option -> share of the scores' variation it explains (PED-ANOVA); empty with
            too few trials.
    """

    score: float
    values: Mapping[str, Any]
    plan: str
    trials: Mapping[str, int]
    importances: Mapping[str, float]


def run_local(
    sweep: Sweep,
    merge: Merge,
    *,
    study: str | Path | None = None,
    trials: int | None = None,
    seed: int = 0,
    listeners: Sequence[Listener] = (),
    on_trial: Callable[[int, float | None], None] | None = None,
) -> Outcome:
    """Run trials until the study holds as many as wanted; Optuna, no server.

    A trial is pruned when the merged model's score on the first task (by name) is below the median
    of the trials before it: layer analysis and repair, most of the cost, are then saved.

    Args:
        sweep: what to vary.
        merge: does one merge; see `merger`.
        study: SQLite file; an existing study is resumed, and several processes may share it. None
            keeps it in memory.
        trials: number of trials of the study, those already done included; None is `run_cap`, or
            20.
        seed: of the sampler.
        listeners: hear every merge.
        on_trial: called with number and score (None: pruned or failed) of every trial done here.

    Raises:
        ConfigError: the study was made for another space, or no trial succeeded.
        MissingExtraError: Optuna is not installed.
    """
    optuna = import_optuna("a local sweep")
    wanted = trials or sweep.trials or 20
    opened = _open(sweep, study, seed)
    states = (
        optuna.trial.TrialState.COMPLETE,
        optuna.trial.TrialState.PRUNED,
        optuna.trial.TrialState.FAIL,
    )
    done = opened.get_trials(deepcopy=False, states=states)

    def objective(trial: Any) -> float:
        config = sweep.config(_suggest(sweep, trial))
        result = merge(config, (_FirstTask(trial), *listeners))
        score = overall(result.scores)
        assert score is not None
        trial.set_user_attr("plan", result.plan.to_json())
        return score

    def tell(_: Any, trial: Any) -> None:
        if on_trial is not None:
            complete = trial.state == optuna.trial.TrialState.COMPLETE
            on_trial(trial.number, trial.value if complete else None)

    if len(done) < wanted:
        opened.optimize(
            objective,
            callbacks=[tell, optuna.study.MaxTrialsCallback(wanted, states=states)],
            catch=(HiMergeError,),
        )
    return _outcome(opened)


def _open(sweep: Sweep, file: str | Path | None, seed: int) -> Any:
    optuna = import_optuna("a local sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    pruner: Any = optuna.pruners.MedianPruner(n_startup_trials=5)
    if sweep.method == "grid":
        sampler: Any = optuna.samplers.GridSampler(_grid(sweep), seed=seed)
        pruner = optuna.pruners.NopPruner()
    elif sweep.method == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        study_name="himerge",
        storage=None if file is None else f"sqlite:///{Path(file).absolute()}",
        load_if_exists=True,
        direction="maximize",
        sampler=sampler,
        pruner=pruner,
    )
    held = study.user_attrs.get("space", sweep.digest)
    if held != sweep.digest:
        raise ConfigError(
            f"the study in {str(file)!r} was made for another space or other fixed options. Give "
            f"another study file, or the sweep file it was made with."
        )
    study.set_user_attr("space", sweep.digest)
    return study


def _grid(sweep: Sweep) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for name, parameter in sweep.space.items():
        if parameter.values:
            grid[name] = list(parameter.values)
            continue
        step = 1.0 if parameter.whole else parameter.step
        if step is None:
            raise ConfigError(f"method grid needs values, or q_uniform with q, for {name!r}.")
        count = math.floor((parameter.high - parameter.low) / step + 1e-9) + 1
        found = [round(parameter.low + i * step, 12) for i in range(count)]
        grid[name] = [int(v) for v in found] if parameter.whole else found
    return grid


def _suggest(sweep: Sweep, trial: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    grid = _grid(sweep) if sweep.method == "grid" else {}
    for name, p in sweep.space.items():
        values = grid.get(name, p.values)
        if values:
            found[name] = trial.suggest_categorical(name, values)
        elif p.whole:
            found[name] = trial.suggest_int(name, int(p.low), int(p.high))
        else:
            found[name] = trial.suggest_float(name, p.low, p.high, step=p.step, log=p.log)
    return found


class _FirstTask:
    """Reports the merged model's score on the first task to the trial, which may end there."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial
        self._first: str | None = None
        self._done = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, MergeStarted):
            self._first = min(event.adapters)
        elif isinstance(event, StateScored) and event.plan is not None and not self._done:
            together = len({adapter for _, adapter, _ in event.plan.live()}) > 1
            if together and event.stage == "states" and event.task == self._first:
                self._done = True
                self._trial.report(event.score.value, 0)
                if self._trial.should_prune():
                    raise import_optuna("a local sweep").TrialPruned


def _outcome(study: Any) -> Outcome:
    optuna = import_optuna("a local sweep")
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        raise ConfigError("no trial of the sweep succeeded; see the log for the reasons.")
    best = study.best_trial
    counts = {
        state.name.lower(): sum(t.state == state for t in study.trials)
        for state in optuna.trial.TrialState
    }
    varied = {n for n in best.params if len({repr(t.params.get(n)) for t in complete}) > 1}
    importances: dict[str, float] = {}
    if varied and len({t.value for t in complete}) > 1 and len(complete) >= 4:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        importances = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(varied)
        )
    return Outcome(
        score=float(best.value or 0.0),
        values=dict(best.params),
        plan=best.user_attrs["plan"],
        trials={state: count for state, count in counts.items() if count},
        importances=importances,
    )
