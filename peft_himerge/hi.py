"""`merge_adapters_hi`: the one loop. It asks the rooms below and holds no maths of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from . import export
from .adapters import common_base, read_adapters
from .combine import Combiner
from .config import HiMergeConfig
from .cost import Cost
from .engine import Engine
from .errors import ConfigError, HiMergeError, JournalError
from .events import FocusStarted, Listener, MergeFinished
from .factors import Adapter
from .focus import focused_parts, recalled, refocused, remember
from .identity import base_digest
from .interrupts import heard, held
from .ledger import Ledger, open_ledger
from .lowrank import LowRank
from .names import check_adapter_names, check_new_name
from .plan import MergePlan
from .probe import Probe, Strategy, preserved
from .processes import Team, together
from .randomness import capture, install
from .reached import Reached
from .request import check_present
from .result import MergeResult, ModuleError
from .run import Run
from .scoring import EvalFn, Score, Task, check_eval_fns
from .search import check_search

__all__ = ["apply_plan", "merge_adapters_hi", "read_sources", "score_plans"]


@held()
def merge_adapters_hi(
    model: PeftModel,
    adapters: Sequence[str],
    eval_fns: Mapping[str, EvalFn],
    *,
    adapter_name: str = "merged",
    config: HiMergeConfig | None = None,
    callbacks: Sequence[Listener] = (),
    journal: str | os.PathLike[str] | None = None,
) -> MergeResult:
    """Merge LoRA adapters of `model` into one adapter that is good at all their tasks.

    Hi-Merging: prune and scale each adapter's delta, measure what each layer contributes to each
    task alone and after merging, and repair the layers where merging hurts. No training, no
    training data; only the eval functions.

    Source: Hi-Merging (ACL 2025, arXiv 2506.12379). Where we differ from the paper's text, unless
    the options say ``variant="paper"``: each adapter is first focused on what its own eval function
    gives the model, and is not pruned; the mean score of the merged model decides the scale and
    every repair. With one adapter nothing is focused or analysed (nothing can conflict).

    Args:
        model: a PeftModel with the adapters loaded; comes back bit-identical but for the new
            adapter, which is frozen and not active (``model.set_adapter(adapter_name)``).
        adapters: names of the adapters, at least one, each once. Their order does not matter.
        eval_fns: adapter name -> function of the model that returns the score of its task, higher
            is better: a number, or better a 1-D array of per-example scores. Further names are
            guard tasks: scored and reported, but not part of any conflict.
        adapter_name: name of the new adapter; must be free.
        config: the options; see `HiMergeConfig`.
        callbacks: called with every event, in order; an exception in one ends the merge, as that
            of a `budget.Budget(scores=..., seconds=...)` does. With
            several processes (`HiMergeConfig.processes`), only the main one calls them.
        journal: a file or folder that keeps every score as soon as it is known, so that a killed
            merge, run again, goes on where it stopped and ends with the same result. Scores are
            found by base model, adapter weights, state, and a fingerprint of the eval function's
            code and data (`identity.eval_digest` says what it cannot see). The journal also keeps
            the random state that scores start from. None keeps nothing.

    Returns:
        A `MergeResult`: plan, contributions, conflicts, scores of all states; `save(dir)`.

    Ctrl-C ends the eval function that runs, once (`interrupts.held`): the model is put back, the
    journal keeps the scores before it, and KeyboardInterrupt is raised. A second one changes
    nothing.

    Raises:
        ConfigError: an argument is not allowed; nothing was touched.
        AdapterError: an adapter cannot be merged exactly; nothing was touched.
        EvalError: an eval function returned no score; the model was put back.
        ExportError: the exported adapter lost more than `config.max_export_drop`; the text holds
            the way out, the error's `plan` attribute the decision.
        JournalError: another merge uses the journal, or it cannot be written.
        ProcessError: another process of this merge failed; the text holds its reason.
    """
    start = time.perf_counter()
    config = config or HiMergeConfig()
    with together(config.processes) as team:
        _check_free(model, adapter_name)
        names = _check_names(adapters, eval_fns)
        config.check_names(names, list(eval_fns))
        check_search(config)
        listeners = tuple(callbacks) if team.main else ()
        shown = eval_fns if config.focus else None
        read = read_sources(model, names, shown, team, config.strategy, listeners)
        run = Run(Combiner(read), _tasks(read, eval_fns, config), config, listeners)
        probe = _probe(model, run.combiner, config)
        with (
            preserved(model),
            open_ledger(
                journal if team.main else None, model, run.combiner.adapters, run.tasks
            ) as ledger,
        ):
            _start_alike(team, model, run.combiner, ledger)
            try:
                with probe, Reached(model, run.combiner.modules) as reached:
                    cost = run.cost()
                    engine = Engine(probe, run.tasks, run.emit, cost, ledger=ledger, team=team)
                    run.merge(engine)
                    with heard():
                        parts = export.approximate(run.combiner, run.plan, config.rank)
                    probe.show(MergePlan.base())
                    rank = export.add_adapter(model, adapter_name, run.combiner, parts)
                    run.score_export(engine, adapter_name)
            except BaseException as exc:
                export.remove_adapter(model, adapter_name)
                if probe.tainted and ledger is not None:
                    ledger.journal.set_aside("tainted", str(exc))
                raise
        if ledger is None and team.size == 1:  # otherwise, not all scores were computed here
            reached.warn()
        blocks = (probe.blocks.run, probe.blocks.skipped)
        result = _result(model, adapter_name, run, parts, rank, engine.done, start, blocks)
        run.emit(MergeFinished(result.plan, result.scores))
    return result


def read_sources(
    model: PeftModel,
    names: Sequence[str],
    shown: Mapping[str, EvalFn] | None,
    team: Team,
    strategy: Strategy,
    listeners: Sequence[Listener] = (),
) -> list[Adapter]:
    """Return the adapters that a merge starts from, alike on every process.

    Args:
        model: holds the adapters; comes back as it was.
        names: the adapters.
        shown: adapter -> eval function whose inputs it is focused on; None takes all as they are.
            An adapter that is zero everywhere makes nobody focus, and one alone is left as it is.
        team: the processes that all call this.
        strategy: how states will be put into the model; one that it cannot have is refused before
            an eval function runs.
        listeners: hear of the start.
    """
    read = read_adapters(model, names)
    common_base(read)
    named = {adapter.name: adapter for adapter in read if not adapter.is_zero}
    alive = list(named)
    if shown is None or len(alive) < 2:
        return read
    Probe(model, Combiner(read), strategy)
    parts = None
    if team.main:
        for listener in listeners:
            with heard():
                listener(FocusStarted(tuple(alive)))
        parts = focused_parts(model, alive, {name: shown[name] for name in alive})
    parts = team.first("the focused adapters", None, parts)
    assert parts is not None
    found = {name: refocused(adapter, parts[name]) for name, adapter in named.items()}
    remember(model, list(found.values()))
    return [found.get(adapter.name, adapter) for adapter in read]


def _probe(model: PeftModel, combiner: Combiner, config: HiMergeConfig) -> Probe:
    cache = int(config.prefix_cache_gb * 1e9)
    return Probe(model, combiner, config.strategy, cache, verify=config.verify)


def _start_alike(team: Team, model: PeftModel, combiner: Combiner, ledger: Ledger | None) -> None:
    """Give all processes, and a resumed run, the random state of the first one."""
    if team.size == 1 and ledger is None:
        return
    team.refuse_sharded(model)
    same: list[str] = []
    if team.size > 1:
        same = [base_digest(model), *(a.digest() for a in combiner.adapters.values())]
    state = ledger.journal.random_state if ledger is not None else capture()
    try:
        install(team.first("weights of the model and the adapters", same, state))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as exc:
        if ledger is None or isinstance(exc, HiMergeError):
            raise
        raise JournalError(
            f"the random state in the journal {ledger.journal.file} cannot be put in place: "
            f"{exc!r:.200}. Move the file away to begin a new one."
        ) from exc


@held()
def apply_plan(
    model: PeftModel,
    plan: MergePlan,
    *,
    adapter_name: str = "merged",
    rank: int | float | str = "auto",
) -> MergeResult:
    """Rebuild the adapter a plan describes, without eval functions.

    Args:
        model: a PeftModel that holds the adapters the plan names, with the same weights.
        plan: from `MergeResult.plan`, `MergePlan.from_json`, or made by hand. One of focused
            adapters needs those: of the latest such merge of this very model they are at hand,
            later load them from the folder `focused` that was saved with it.
        adapter_name: name of the new adapter; must be free.
        rank: see `HiMergeConfig.rank`.

    Returns:
        A `MergeResult` without contributions, conflicts and scores.

    Raises:
        ConfigError, AdapterError: as `merge_adapters_hi`.
        PlanError: the plan was made for other adapters or other weights.
    """
    start = time.perf_counter()
    config = HiMergeConfig(rank=rank)
    if not plan.adapters:
        raise ConfigError("the plan merges no adapter: it is the base model's.")
    _check_free(model, adapter_name)
    names = _check_names(list(plan.adapters), None)
    read = recalled(model, read_adapters(model, names), plan.sources)
    run = Run(Combiner(read), {}, config, ())
    run.combiner.check(plan)
    run.plan = plan
    with preserved(model):
        Probe(model, run.combiner)
        with heard():
            parts = export.approximate(run.combiner, plan, config.rank)
        new_rank = export.add_adapter(model, adapter_name, run.combiner, parts)
    return _result(model, adapter_name, run, parts, new_rank, 0, start)


@held()
def score_plans(
    model: PeftModel,
    adapters: Sequence[str],
    plans: Mapping[str, MergePlan | str],
    eval_fns: Mapping[str, EvalFn],
    *,
    config: HiMergeConfig | None = None,
    callbacks: Sequence[Listener] = (),
) -> dict[str, dict[str, Score]]:
    """Score several plans or adapters, each on every task, and leave the model as it was.

    Args:
        model: a PeftModel that holds the adapters.
        adapters: names of all adapters that the plans merge; for focused ones see `apply_plan`.
        plans: any name -> plan, or the name of an adapter in the model, which PEFT itself runs.
        eval_fns: task -> function of the model; tasks need not be adapters here.
        config: metric, strategy and prefix_cache_gb are read.
        callbacks: called with a `StateScored` per score.

    Returns:
        plan name -> task -> `Score`.

    Raises:
        ConfigError, AdapterError, PlanError: nothing was touched.
        EvalError: an eval function returned no score; the model was put back.
    """
    config = config or HiMergeConfig()
    names = _check_names(adapters, None)
    config.check_names(names, list(eval_fns))
    check_present(model, [state for state in plans.values() if isinstance(state, str)])
    merges = [plan for plan in plans.values() if isinstance(plan, MergePlan)]
    sources = {name: digest for plan in merges for name, digest in plan.sources.items()}
    combiner = Combiner(recalled(model, read_adapters(model, names), sources))
    for plan in merges:
        combiner.check(plan)
    tasks = {name: Task(name, fn, config.metric_of(name)) for name, fn in eval_fns.items()}
    probe = _probe(model, combiner, config)
    with together(config.processes) as team, preserved(model):
        run = Run(combiner, tasks, config, tuple(callbacks))
        _start_alike(team, model, combiner, None)
        with probe:
            cost = Cost.flat(len(plans) * len(tasks))
            engine = Engine(probe, tasks, run.emit, cost, team=team)
            requests = [(task, state) for state in plans.values() for task in tasks]
            scores = iter(engine.score_many(requests))
        return {name: {task: next(scores) for task in tasks} for name in plans}


def _result(
    model: PeftModel,
    adapter_name: str,
    run: Run,
    parts: Mapping[str, LowRank],
    rank: int,
    scores: int,
    start: float,
    blocks: tuple[int, int] = (0, 0),
) -> MergeResult:
    options = run.config.model_dump() if run.tasks else {"rank": run.config.rank}
    focused = any(adapter.focused for adapter in run.combiner.adapters.values())
    return MergeResult(
        adapter_name=adapter_name,
        model=model,
        plan=run.plan,
        contributions=run.contributions,
        conflicts=tuple(run.resolutions),
        states=run.states,
        search=tuple(run.trials),
        modules=tuple(ModuleError(m, p.rank, p.error, p.norm) for m, p in parts.items()),
        rank=rank,
        scores_computed=scores,
        seconds=time.perf_counter() - start,
        options=options | {"focus": focused},  # of one adapter nothing is taken, whoever asks
        blocks_run=blocks[0],
        blocks_skipped=blocks[1],
        _combiner=run.combiner,
        _versions={name: a.version() for name, a in run.combiner.adapters.items()},
    )


def _check_names(adapters: Sequence[str], eval_fns: Mapping[str, EvalFn] | None) -> list[str]:
    names = check_adapter_names(adapters)
    if eval_fns is None:
        return names
    check_eval_fns(
        names,
        eval_fns,
        " Without eval functions, build a plan with MergePlan.model_wise and use apply_plan.",
    )
    return names


def _check_free(model: Any, adapter_name: str) -> None:
    taken = model.peft_config if isinstance(model, PeftModel) else ()
    check_new_name(adapter_name, taken, f"call model.delete_adapter({adapter_name!r}) first")


def _tasks(
    adapters: Sequence[Adapter], eval_fns: Mapping[str, EvalFn], config: HiMergeConfig
) -> dict[str, Task]:
    """Return the adapters' own tasks by name, then the guard tasks in the user's order.

    An adapter whose delta is zero everywhere has nothing to merge; its task is a guard.
    """
    own = sorted(adapter.name for adapter in adapters if not adapter.is_zero)
    order = own + [name for name in eval_fns if name not in own]
    return {n: Task(n, eval_fns[n], config.metric_of(n), guard=n not in own) for n in order}
