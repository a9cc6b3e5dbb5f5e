"""One merge of the adapter in training with its siblings; afterwards the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel

from .adapters import read_adapters
from .combine import Combiner
from .config import HiMergeConfig
from .errors import ConfigError, suggest
from .events import AdapterSaved, Event, Listener, MergeFinished, MergeStarted
from .guests import check_folder, guests
from .hi import apply_plan, merge_adapters_hi, read_sources, score_plans
from .plan import MergePlan
from .probe import preserved
from .processes import Team, is_main
from .result import MergeResult
from .scoring import EvalFn, Score
from .tracking import Round

__all__ = [
    "ANALYSES",
    "Analysis",
    "Job",
    "digest",
    "facts",
    "improved",
    "merged",
    "rebuilt",
    "save",
    "tell",
]

Analysis = Literal["full", "scores", "off"]
ANALYSES: tuple[Analysis, ...] = get_args(Analysis)


@dataclass(frozen=True)
class Job:
    """What is merged with the adapter in training, and how; the same in every round.

    Attributes:
        siblings: names of adapters in the model.
        folders: name -> folder of adapters that are loaded for each round.
        eval_fns: task -> eval function.
        config: the options of the merge.
        adapter_name: name of the merged adapter while it is in the model, and in its report.
        journal: see `merge_adapters_hi`.
    """

    siblings: tuple[str, ...]
    folders: Mapping[str, str | Path]
    eval_fns: Mapping[str, EvalFn]
    config: HiMergeConfig = field(default_factory=HiMergeConfig)
    adapter_name: str = "merged"
    journal: str | Path | None = None

    def names(self, model: PeftModel) -> list[str]:
        """Return the names of all adapters of the merge, the one in training first.

        Raises:
            ConfigError: the model is no PeftModel, trains not exactly one adapter, lacks a
                sibling, or holds a name that a guest or the merged adapter needs; or an adapter
                has no eval function.
        """
        trained = _trained(model)
        for name in self.siblings:
            if name not in model.peft_config:
                raise ConfigError(
                    f"the model has no adapter {name!r}.{suggest(name, model.peft_config)} Load it "
                    f"before training, or give its folder: adapters={{{name!r}: folder}}."
                )
        for name in (*self.folders, self.adapter_name):
            if name in model.peft_config:
                raise ConfigError(
                    f"the model has an adapter {name!r} already; choose another name for the "
                    + ("merged adapter." if name == self.adapter_name else "one in the folder.")
                )
        names = [trained, *(n for n in self.siblings if n != trained), *self.folders]
        for name in names if self.eval_fns else ():
            if name not in self.eval_fns:
                what = "the adapter in training" if name == trained else "the sibling"
                raise ConfigError(
                    f"eval_fns has no function for {what}, {name!r}.{suggest(name, self.eval_fns)}"
                )
        return names

    def check(self, model: PeftModel) -> None:
        """Refuse what no round could do, before the first step.

        Raises:
            ConfigError, AdapterError: see `names`, `check_folder`, `HiMergeConfig.check_names`.
        """
        names = self.names(model)
        for name, folder in self.folders.items():
            check_folder(name, folder)
        self.config.check_names(names, list(self.eval_fns))


def digest(model: PeftModel) -> str:
    """Return a digest of the weights of the adapter in training."""
    return read_adapters(model, [_trained(model)])[0].digest()


@contextmanager
def merged(
    model: PeftModel,
    job: Job,
    analysis: Analysis,
    listeners: Sequence[Listener] = (),
    team: Team | None = None,
) -> Iterator[MergeResult]:
    """Merge, and keep the merged adapter in the model for as long as the context lasts.

    Afterwards the model is bit-identical to before: no new adapter, the same parameter objects,
    flags, modules and random states. With several processes, all call this.
    """
    with _visiting(model, job) as names:
        # A process that could not load a folder must say so before the others wait in the merge.
        (team or Team()).exchange("the adapters of this round", None)
        if analysis == "full":
            result = merge_adapters_hi(
                model,
                names,
                job.eval_fns,
                adapter_name=job.adapter_name,
                config=job.config,
                callbacks=listeners,
                journal=job.journal,
            )
        else:
            result = _model_wise(model, names, job, analysis, listeners, team or Team())
        with _one_round(model, job.adapter_name):
            yield result


@contextmanager
def rebuilt(model: PeftModel, job: Job, earlier: MergeResult) -> Iterator[MergeResult]:
    """Put the merged adapter of an earlier round back for a while, with its whole story.

    The adapter in training must not have changed since; a plan then rebuilds the same bits.
    """
    with _visiting(model, job):
        again = apply_plan(model, earlier.plan, adapter_name=job.adapter_name, rank=job.config.rank)
        with _one_round(model, job.adapter_name):
            # All of the earlier story, on the weights that are in the model now.
            yield replace(earlier, _combiner=again._combiner, _versions=again._versions)


def _trained(model: Any) -> str:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"the model in training must be a peft.PeftModel, got {type(model).__name__}. Wrap it "
            f"with get_peft_model(model, LoraConfig(...)) before it goes to the trainer."
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ConfigError(
            f"exactly one adapter must be in training, active are {active}. Call "
            f"model.set_adapter(name)."
        )
    return str(active[0])


@contextmanager
def _visiting(model: PeftModel, job: Job) -> Iterator[list[str]]:
    names = job.names(model)
    with preserved(model), guests(model, job.folders):
        yield names


@contextmanager
def _one_round(model: PeftModel, name: str) -> Iterator[None]:
    try:
        yield
    finally:
        model.delete_adapter(name)


def _model_wise(
    model: PeftModel,
    names: Sequence[str],
    job: Job,
    analysis: Analysis,
    listeners: Sequence[Listener],
    team: Team,
) -> MergeResult:
    """Merge without search and layer analysis: M(M + 2) scores, or none with "off".

    A density or scale that is left to the search counts as 1.
    """
    shown = job.eval_fns if job.config.focus and analysis == "scores" else None
    combiner = Combiner(read_sources(model, names, shown, team, job.config.strategy, listeners))
    edits = {name: job.config.model_wise_edit(name) for name in names}
    plan = combiner.plan(edits, prune_scope=job.config.prune_scope)
    plans: dict[str, MergePlan | str] = {"base": MergePlan.base()}
    plans |= {n: n if a.focused else plan.solo(n) for n, a in combiner.adapters.items()}
    plans["merged"] = plan
    tasks = tuple(job.eval_fns) if analysis == "scores" else ()

    def emit(event: Event) -> None:
        tell(listeners if is_main() else (), event)

    layers = tuple(layer.label for layer in combiner.layers)
    total = len(plans) * len(tasks)
    emit(MergeStarted(tuple(names), tasks, layers, total, plan.sources))
    states: dict[str, dict[str, Score]] = {}
    if tasks:
        states = score_plans(
            model, names, plans, job.eval_fns, config=job.config, callbacks=listeners
        )
    result = apply_plan(model, plan, adapter_name=job.adapter_name, rank=job.config.rank)
    result = replace(result, states=states, scores_computed=total)
    emit(MergeFinished(plan, result.scores))
    return result


def tell(listeners: Sequence[Listener], event: Event) -> None:
    """Hand one event to every listener, in order."""
    for listener in listeners:
        listener(event)


def save(result: MergeResult, folders: Sequence[Path], listeners: Sequence[Listener]) -> None:
    """Save a merged adapter that is in the model to each folder, and say so."""
    for folder in folders:
        result.save(folder, page=False)  # 5 MB a checkpoint; `himerge report` makes it
        tell(listeners, AdapterSaved(folder, result.plan))


def improved(done: Round, best: float | None) -> bool:
    """Return True if the round's score is better than the best one before it."""
    return done.score is not None and (best is None or done.score > best)


def facts(done: Round) -> dict[str, Any]:
    """Return what is remembered of a round over a resume, as plain JSON values."""
    numbers: dict[str, float | None] = {"score": done.score, "best_score": done.best_score}
    for task, value in done.final.items():
        numbers[f"merged_{task}"] = value
        numbers[f"base_{task}"] = done.scores["base"][task]
        numbers[f"alone_{task}"] = done.scores.get(task, {}).get(task)
        numbers[f"kept_{task}"] = done.kept.get(task)
    return {
        "round": done.round,
        "best_score": done.best_score,
        "metrics": {k: v for k, v in numbers.items() if v is not None} if done.final else {},
        "history": {
            "round": done.round,
            "trigger": done.trigger,
            "global_step": done.global_step,
            "score": done.score,
            "kept": dict(done.kept),
            "fingerprint": done.plan.fingerprint,
            "conflicts": [
                [r.conflict.layer, r.conflict.kind.value, r.conflict.Gamma] for r in done.conflicts
            ],
        },
    }
