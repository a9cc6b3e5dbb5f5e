"""One merge as it goes: what was found so far, and the steps that find it, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import conflict as conflicts
from .combine import Combiner
from .config import HiMergeConfig
from .conflict import Resolution
from .contribution import Contributions, measure, states
from .cost import Cost, estimate
from .engine import Engine
from .errors import ConfigError, ExportError
from .events import ContributionsMeasured, Event, LayerResolved, Listener, MergeStarted
from .interrupts import heard
from .plan import DROP, Edit, MergePlan
from .scoring import Score, Task, difference
from .search import GRID, Trial, best, search_edit, together

__all__ = ["Run"]


@dataclass
class Run:
    """What one merge has found so far; the steps fill it from top to bottom.

    Attributes:
        combiner: makes the deltas.
        tasks: the adapters' own tasks, then the guards.
        config: the options.
        listeners: get every event.
        plan: the decision so far; the final one after `merge`.
        model_wise: the plan after the model-wise step (DESIGN 1.2).
        trials: every density and scale that was tried.
        contributions: what each layer contributes to each task.
        resolutions: what was done about each layer, in that order.
        states: state name -> task -> score.
    """

    combiner: Combiner
    tasks: dict[str, Task]
    config: HiMergeConfig
    listeners: tuple[Listener, ...]
    plan: MergePlan = field(default_factory=MergePlan.base)
    model_wise: MergePlan = field(default_factory=MergePlan.base)
    trials: list[Trial] = field(default_factory=list)
    contributions: Contributions = field(default_factory=Contributions)
    resolutions: list[Resolution] = field(default_factory=list)
    states: dict[str, dict[str, Score]] = field(default_factory=dict)

    @property
    def own(self) -> list[str]:
        """Names of the adapters that change something; each has its task."""
        return [name for name, task in self.tasks.items() if not task.guard]

    @property
    def layers(self) -> list[str]:
        """Labels of the layers."""
        return [layer.label for layer in self.combiner.layers]

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self.listeners:
            with heard():
                listener(event)

    def cost(self) -> Cost:
        """Return what the run costs at most."""
        guards = [name for name, task in self.tasks.items() if task.guard]
        order = [layer.label for layer in self.combiner.in_order()]
        return estimate(self.combiner.table(), self.own, guards, self.config, order=order)

    def merge(self, engine: Engine) -> None:
        """Take every step up to the final plan (DESIGN 1.1 to 1.4)."""
        edits = {
            name: self.config.model_wise_edit(name) if name in self.own else DROP
            for name in self.combiner.adapters
        }
        with heard():
            self.plan = self.combiner.plan(edits, prune_scope=self.config.prune_scope)
        self.emit(
            MergeStarted(
                tuple(self.combiner.adapters),
                tuple(self.tasks),
                tuple(self.layers),
                engine.total,
                self.plan.sources,
                self.config.model_dump(),
            )
        )
        engine.begin("base")
        self.states["base"] = self._scores(engine, MergePlan.base())
        if self.config.searches():
            engine.begin("search")
            self._search(engine)
        self.model_wise = self.plan
        self._score_alone(engine)
        gains = self._gains()
        self.states["model_wise"] = self._scores(engine, self.plan)
        if len(self.own) > 1:
            engine.begin("analysis")
            self._analyse(engine)
            engine.begin("repair")
            self._repair(engine, gains)
        engine.begin("merged")
        self.states["merged"] = self._scores(engine, self.plan)

    def _scores(self, engine: Engine, state: MergePlan | str) -> dict[str, Score]:
        found = engine.score_many([(task, state) for task in self.tasks])
        return dict(zip(self.tasks, found, strict=True))

    def _score_alone(self, engine: Engine) -> None:
        """Score each adapter alone: the user's own where a part of it is merged (`focus`)."""
        alone: dict[str, MergePlan | str] = {
            name: name if adapter.focused else self.plan.solo(name)
            for name, adapter in self.combiner.adapters.items()
        }
        sources = [state for state in alone.values() if isinstance(state, str)]
        if sources:
            engine.begin("sources")
            self._ask(engine, self.tasks, *sources)
        engine.begin("alone")
        self._ask(engine, self.tasks, *alone.values(), self.plan)
        for name, state in alone.items():
            self.states[name] = self._scores(engine, state)

    @staticmethod
    def _ask(engine: Engine, tasks: Iterable[str], *states: MergePlan | str) -> None:
        """Have all these scores computed in one go, which shares more than one by one."""
        engine.score_many([(task, state) for state in states for task in tasks])

    def _search(self, engine: Engine) -> None:
        """Choose each adapter's density and scale (DESIGN 1.1)."""
        own_only = self.config.search_target == "own"
        self._scale_together(engine)
        if self.config.search == "together":
            return
        for name in self.own:
            if self.config.search == "optuna" and self.config.density == "search":
                # It asks for few densities at a time; one pass over the deltas cuts for all.
                with heard():
                    self.combiner.prepare(name, GRID, self.config.prune_scope)

            def value(edits: Sequence[Edit], name: str = name) -> list[float]:
                densities = [edit.density for edit in edits]
                with heard():
                    self.combiner.prepare(name, densities, self.config.prune_scope)
                plans = [self.plan.with_adapter(name, edit) for edit in edits]
                if own_only:
                    scored = engine.score_many([(name, plan.solo(name)) for plan in plans])
                    return [score.value for score in scored]
                return [_mean(self._scores(engine, plan)) for plan in plans]

            trials = search_edit(name, self.config, value, self.plan.adapters[name])
            self.trials.extend(trials)
            self.plan = self.plan.with_adapter(name, best(trials).edit)

    def _scale_together(self, engine: Engine) -> None:
        """Give all adapters the one scale that suits the merged model best, if any is searched.

        Where that is the whole search, it is the one nearest to 1 of those that are as good as the
        best, within the tolerance: which of several like ones is best on few examples is luck
        (Breiman et al. 1984, the one standard error rule).
        """
        tried: dict[float, MergePlan] = {}
        for scale in together(self.config, len(self.own)):
            plan = self.plan
            for name in self.own:
                plan = plan.with_adapter(name, Edit(plan.adapters[name].density, scale))
            tried[scale] = plan
            value = _mean(self._scores(engine, plan))
            self.trials += [Trial(n, plan.adapters[n], value) for n in self.own]
        if not tried:
            return
        scored = {scale: self._scores(engine, plan) for scale, plan in tried.items()}
        best = max(scored, key=lambda scale: (_mean(scored[scale]), -scale))
        if self.config.search == "together":
            top = scored[best]
            like = [
                s for s, own in scored.items() if _mean(top) - _mean(own) <= self._noise(top, own)
            ]
            best = min(like, key=lambda scale: (abs(math.log(scale)), scale))
        self.plan = tried[best]

    def _noise(self, one: Mapping[str, Score], other: Mapping[str, Score], tries: int = 1) -> float:
        """Return the difference of two mean scores up to which it counts as none."""
        return self.config.tolerance_of(_paired_error(one, other), tries)

    def _gains(self) -> dict[str, float]:
        gains = {
            name: abs(self.states[name][name].value - self.states["base"][name].value)
            for name in self.own
        }
        dead = [name for name, gain in gains.items() if gain == 0.0]
        if self.config.normalize == "gain" and dead:
            raise ConfigError(
                f"normalize='gain' divides by what adapter {dead[0]!r} wins on its own task, "
                f"which is 0. Use normalize='none', or check the adapter and its eval function."
            )
        return gains

    def _analyse(self, engine: Engine) -> None:
        """Measure every layer's contribution to every task (DESIGN 1.3)."""
        engine.score_many(
            [request for task in self.own for request in states(task, self.plan, self.layers)]
        )
        self.contributions = Contributions(
            tuple(
                measure(engine.score, task, layer, self.plan)
                for layer in self.layers
                for task in self.own
            )
        )
        self.emit(ContributionsMeasured(self.contributions))

    def _repair(self, engine: Engine, gains: Mapping[str, float]) -> None:
        """Treat the layers, worst first (DESIGN 1.4)."""
        found = [
            conflicts.find(self.contributions.of(layer), self.config, gains, self.plan.edits[layer])
            for layer in self.layers
        ]
        tries = conflicts.tries(self.plan) if self.config.accept == "best" else None
        for conflict in conflicts.rank(found):
            if self.config.reanalyze == "each":
                self._ask(engine, self.own, self.plan, self.plan.without(conflict.layer))
                rows = [
                    measure(engine.score, task, conflict.layer, self.model_wise, edited=self.plan)
                    for task in self.own
                ]
                holders = self.plan.edits[conflict.layer]
                conflict = conflicts.find(rows, self.config, gains, holders)
            resolution = self._treat(engine, conflict, tries)
            self.resolutions.append(resolution)
            self.emit(LayerResolved(resolution, self.plan))

    def _treat(self, engine: Engine, conflict: conflicts.Conflict, tries: int | None) -> Resolution:
        """Edit one layer, or leave it, as config.accept says; `tries` as for `_beats`."""
        layer, start = conflict.layer, self.plan
        proposed = conflicts.resolve(conflict, start, self.config)
        paper = start.with_edits(layer, proposed)
        if self.config.accept in ("always", "never"):
            self.plan = paper if self.config.accept == "always" else start
            return Resolution(conflict, proposed, accepted=bool(proposed) and self.plan is paper)
        measured = self._try(engine, [paper], tries)
        if self.config.accept == "best":
            for name in start.edits[layer]:
                steps = conflicts.grades(self.plan, layer, name)
                plans = [self.plan.with_edit(layer, name, edit) for edit in steps]
                self._try(engine, plans, tries, rise=True)
        if self.plan is start and measured is None:
            return Resolution(conflict, proposed, accepted=bool(proposed))
        before = _values(self._scores(engine, start))
        if self.plan is start:
            return Resolution(conflict, proposed, False, before, measured or {})
        after = _values(self._scores(engine, self.plan))
        if self.plan == paper:
            return Resolution(conflict, proposed, True, before, after)
        was = start.edits[layer]
        edits = {n: edit for n, edit in self.plan.edits[layer].items() if edit != was[n]}
        return Resolution(conflict, edits, True, before, after)

    def _beats(
        self, engine: Engine, other: MergePlan, tries: int | None, *, rise: bool = False
    ) -> bool:
        """True if another plan's mean score beats the plan's: by more than the tolerance.

        Of many small gains on few examples most are luck, and the best of several is picked for
        its luck too. Without tolerance an equal score is enough.

        Args:
            engine: gives the scores.
            other: the plan that is tried.
            tries: of how many plans it may be the best; None asks for no more than an equal score.
            rise: True if an equal score is not enough.
        """
        before, after = self._scores(engine, self.plan), self._scores(engine, other)
        won = _mean(after) - _mean(before)
        noise = 0.0 if tries is None else self._noise(after, before, tries)
        return won > noise or (won == noise == 0.0 and not rise)

    def _try(
        self,
        engine: Engine,
        plans: Sequence[MergePlan],
        tries: int | None,
        *,
        rise: bool = False,
    ) -> dict[str, float] | None:
        """Make the best of these the plan if it beats it; arguments as for `_beats`.

        Returns:
            The scores of the best one; None if all are the plan itself.
        """
        plans = [plan for plan in plans if plan.fingerprint != self.plan.fingerprint]
        if not plans:
            return None
        self._ask(engine, self.tasks, *plans)
        after = [self._scores(engine, plan) for plan in plans]
        best_at = max(range(len(plans)), key=lambda i: (_mean(after[i]), -i))
        if self._beats(engine, plans[best_at], tries, rise=rise):
            self.plan = plans[best_at]
        return _values(after[best_at])

    def score_export(self, engine: Engine, name: str) -> None:
        """Score the exported adapter and refuse it if it lost too much (DESIGN 4.4)."""
        engine.begin("exported")
        found = self._scores(engine, name)
        self.states["exported"] = found
        limit = self.config.max_export_drop
        base, merged = _mean(self.states["base"]), _mean(self.states["merged"])
        if limit is None or merged <= base:
            return
        drop = (merged - _mean(found)) / (merged - base)
        if drop > limit:
            raise ExportError(
                f"the exported adapter loses {drop:.0%} of what the merge had won (mean score "
                f"{merged:.4f} merged, {_mean(found):.4f} exported, {base:.4f} base); allowed: "
                f"{limit:.0%} (max_export_drop). Nothing was added to the model. Use a higher "
                f"rank: apply_plan(model, error.plan, rank=...), rank='exact' loses nothing.",
                self.plan,
            )


def _mean(scores: Mapping[str, Score]) -> float:
    return sum(score.value for score in scores.values()) / len(scores)


def _paired_error(one: Mapping[str, Score], other: Mapping[str, Score]) -> float | None:
    """Return the standard error of the difference of two means over the tasks, if it is known."""
    found = [difference([one[task]], [other[task]]).se for task in one]
    errors = [error for error in found if error is not None]
    return math.hypot(*errors) / len(errors) if errors == found else None


def _values(scores: Mapping[str, Score]) -> dict[str, float]:
    return {task: score.value for task, score in scores.items()}
