"""`HiMergeCallback`: see, while an adapter trains, how well it will merge with its siblings."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

from peft import PeftModel
from transformers.trainer_callback import ExportableState, TrainerCallback

from .config import HiMergeConfig
from .errors import ConfigError, suggest
from .events import Event, Listener, RoundStarted
from .processes import Team, is_main, together
from .result import MergeResult
from .rounds import Analysis, Job, digest, facts, improved, merged, rebuilt, save, tell
from .scoring import EvalFn
from .tracking import Book, Round, TensorBoardListener
from .training import (
    EVENTS,
    blank_memory,
    check_analysis,
    checked_names,
    covers,
    default_listeners,
    evaluation_set,
    kept_state,
    per_event,
    put_state,
    refuse_sharded,
    unwrap,
)

__all__ = ["HiMergeCallback"]

T = TypeVar("T")
Trigger = Literal["evaluate", "save", "train_end", "now"]
Artifact = Literal["off", "last", "best", "all"]

_LOG = logging.getLogger("peft_himerge.callback")
_ARTIFACTS = ("off", "last", "best", "all")
# So that a trainer that rebuilds callbacks from a checkpoint finds the eval functions again.
_LIVE: WeakValueDictionary[str, HiMergeCallback] = WeakValueDictionary()


class HiMergeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Merges the adapter in training with its frozen siblings, scores, analyses and logs.

    Training is bit-identical to a run without the callback: weights, loss curve, random states,
    optimizer. The merged adapter is never in the model during a training step. Works with
    `Trainer`, `Seq2SeqTrainer` and TRL's `SFTTrainer`, on one process or with data parallelism
    (every process takes part, the main one logs); from a loop of your own, call `merge_now`.

    At each evaluation the scores are put into the trainer's metrics, as ``eval_himerge_score``
    (mean over the tasks), ``eval_himerge_merged_<task>``, ``eval_himerge_kept_<adapter>`` and so
    on, so `metric_for_best_model` can name one. List this callback before `EarlyStoppingCallback`.

    Args:
        adapters: the siblings: names of adapters in the model, or name -> folder of adapters that
            are loaded for each round and taken out again. The adapter in training is the model's
            active one and need not be named.
        eval_fns: adapter name (of the siblings and of the one in training) -> eval function, as in
            `merge_adapters_hi`; further names are guard tasks.
        config: the options of the merge.
        on: when: any of "evaluate", "save", "train_end". Several evaluation sets, or a save after
            an evaluation, at one step with the same weights are one round.
        every: only at each n-th evaluation and each n-th save.
        analysis: "full" is the whole method; "scores" merges without search and layer analysis,
            for M(M + 2) scores of M adapters (and what focusing them takes); "off" merges without
            scoring, and so takes the adapters as they are. Or one per event, e.g.
            ``{"evaluate": "scores", "train_end": "full"}``; an event left out gets "full".
        artifact: which merged adapters are saved, under ``<output_dir>/himerge/``: "last" (at
            train end, into "merged"), "best" (also whenever the score is a new best, into "best"),
            "all" (also every round, into "step-<n>"), or "off".
        on_error: "warn" logs the traceback of a failed round and goes on training; "raise" does
            not. What can be checked is checked before the first step, and always raises.
        listeners: called with every event, on the main process. None: the log, a file
            ``himerge/rounds.jsonl``, the W&B run if there is one, and TensorBoard if the trainer
            reports there.
        adapter_name: name of the merged adapter while it is in the model.
        output_dir: folder to save under; None is the trainer's.
        journal: file or folder that keeps scores, so that those of the base model and of the
            siblings alone are computed once for all rounds; see `merge_adapters_hi`.
        restore: for the trainer, which rebuilds callbacks when it resumes.

    Raises:
        ConfigError: an argument has a value that is not allowed.
    """

    def __init__(
        self,
        adapters: Sequence[str] | Mapping[str, str | Path] = (),
        eval_fns: Mapping[str, EvalFn] | None = None,
        *,
        config: HiMergeConfig | None = None,
        on: Sequence[str] = EVENTS,
        every: int = 1,
        analysis: Analysis | Mapping[str, Analysis] = "full",
        artifact: Artifact = "last",
        on_error: Literal["warn", "raise"] = "warn",
        listeners: Sequence[Listener] | None = None,
        adapter_name: str = "merged",
        output_dir: str | Path | None = None,
        journal: str | Path | None = None,
        restore: str | None = None,
    ) -> None:
        if restore is not None:
            self._become(restore)
            return
        folders = dict(adapters) if isinstance(adapters, Mapping) else {}
        names = () if isinstance(adapters, Mapping) else checked_names("adapters", adapters)
        self._job = Job(
            names, folders, dict(eval_fns or {}), config or HiMergeConfig(), adapter_name, journal
        )
        self._on = checked_names("on", on, EVENTS)
        self._every = every
        self._analysis = per_event(analysis)
        self._artifact = artifact
        self._on_error = on_error
        self._given = None if listeners is None else tuple(listeners)
        self._output_dir = output_dir
        self._check()
        self._made: tuple[Listener, ...] | None = None
        self._busy = False
        self._last: MergeResult | None = None
        self.memory = blank_memory()
        self._key = json.dumps([sorted(names), sorted(folders), sorted(self._job.eval_fns)])
        _LIVE[self._key] = self

    def _check(self) -> None:
        if isinstance(self._every, bool) or not isinstance(self._every, int) or self._every < 1:
            raise ConfigError(f"every must be a whole number >= 1, got {self._every!r}.")
        for option, value, allowed in (
            ("artifact", self._artifact, _ARTIFACTS),
            ("on_error", self._on_error, ("warn", "raise")),
        ):
            if value not in allowed:
                raise ConfigError(f"{option} got {value!r}.{suggest(str(value), allowed)}")
        job = self._job
        check_analysis(self._analysis, scored=bool(job.eval_fns))

    def _become(self, key: str) -> None:
        """Take over the callback that the user made in this process, for a resumed run."""
        live = _LIVE.get(key)
        if live is None:
            raise ConfigError(
                f"the checkpoint was made with a HiMergeCallback of [siblings, folders, tasks] = "
                f"{key}, and this run has none like it. Give the same adapters and eval_fns, or "
                f"set restore_callback_states_from_checkpoint=False."
            )
        for name, value in vars(live).items():
            setattr(self, name, value)
        _LIVE[key] = self

    # ------------------------------------------------------------------ the trainer's side

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: rounds so far, best score, history of conflicts."""
        return {"args": {"restore": self._key}, "attributes": {"memory": self.memory}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Refuse what cannot work, before the first step; take up what a checkpoint kept."""
        live = unwrap(model)
        refuse_sharded(live)
        self._job.check(live)
        self._check_metric(args)
        self._last = None
        self.memory = blank_memory()
        name = type(self).__name__
        if state.global_step > 0:
            kept = kept_state(state, name, self._key)
            self.memory |= {} if kept is None else kept["memory"]
        # A checkpoint of a run without this callback has no entry, and saving the next one asks.
        state.stateful_callbacks.setdefault(name, self.state())

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, Any] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Make a round if one is due, and put its scores into the trainer's metrics."""
        if not self._due("evaluate", state.global_step):
            return
        done = self._at_step("evaluate", args, state, model)
        if metrics is None:
            return
        where = evaluation_set(metrics)
        if self.memory["set"] is None:
            self.memory["set"] = where
        # Once per step: a second set's call would use up early stopping's patience twice as fast.
        if self.memory["set"] == where:
            found = self.memory["metrics"] if done else {"score": math.nan}
            prefix = f"{where.split('_')[0]}_himerge_"
            metrics.update({f"{prefix}{key}": value for key, value in found.items()})

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make a round if one is due and none was made at this step."""
        if not self._due("save", state.global_step):
            return
        before = self.memory["round"]
        self._at_step("save", args, state, model)
        if self.memory["round"] != before and state.is_world_process_zero:
            self._rewrite(args, state)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Make the last round, or take the one made with these weights, and save its adapter."""
        if self._due("train_end", state.global_step):
            self._at_step("train_end", args, state, model)
        for listener in self._made or ():
            if isinstance(listener, TensorBoardListener):
                listener.close()
        self._made = None

    def merge_now(
        self,
        model: Any,
        *,
        global_step: int | None = None,
        epoch: float | None = None,
        save_to: str | Path | None = None,
    ) -> Round | None:
        """Make a round from a training loop of your own, and return its record.

        Args:
            model: the model in training, a PeftModel or one wrapped by DistributedDataParallel or
                torch.compile.
            global_step: logged with the round.
            epoch: logged with the round.
            save_to: folder to save the merged adapter to.

        Returns:
            The record; None on other than the main process, or after a failure that
            ``on_error="warn"`` logged.
        """
        live = unwrap(model)
        refuse_sharded(live)
        self._job.check(live)
        started = self._started("now", global_step, epoch)
        folders = [] if save_to is None else [Path(save_to)]
        return self._guarded(
            "now", lambda: self._round(live, started, self._listeners(None), folders)
        )

    # ---------------------------------------------------------------------------- one round

    def _due(self, trigger: str, step: int) -> bool:
        """Count the trainer's events, several evaluation sets at one step once; True if due."""
        if self._busy or trigger not in self._on:
            return False
        if self.memory["seen"].get(trigger) != step:
            self.memory["seen"][trigger] = step
            self.memory["counts"][trigger] = self.memory["counts"].get(trigger, 0) + 1
        return trigger == "train_end" or self.memory["counts"][trigger] % self._every == 0

    def _at_step(self, trigger: Trigger, args: Any, state: Any, model: Any) -> bool:
        """Make a round, or see that one was made here with the same weights; False if it failed."""
        live = unwrap(model)
        at = [state.global_step, digest(live), self._analysis[trigger]]
        again = covers(self.memory["at"], at)
        folders = self._folders(trigger, args, state)
        listeners = self._listeners(args)
        if again and not (trigger == "train_end" and folders):
            return bool(self.memory["metrics"]) or not self._scores(trigger)
        if again and self._last is not None:
            earlier = self._last
            saved = self._guarded(
                trigger, lambda: self._save_again(live, earlier, folders, listeners)
            )
            return saved is not None
        self.memory |= {"at": at, "metrics": {}, "set": None}
        self._last = None
        started = self._started(trigger, state.global_step, state.epoch)
        self._guarded(trigger, lambda: self._round(live, started, listeners, folders))
        return self._last is not None

    def _started(self, trigger: Trigger, step: int | None, epoch: float | None) -> RoundStarted:
        number, best = self.memory["round"] + 1, self.memory["best_score"]
        return RoundStarted(number, trigger, step, epoch, best)

    def _guarded(self, trigger: str, call: Callable[[], T]) -> T | None:
        """Keep an eval function that evaluates or saves from starting a round inside a round."""
        self._busy = True
        try:
            return call()
        except Exception:
            if self._on_error == "raise":
                raise
            _LOG.warning("the merge at %r failed; training goes on.", trigger, exc_info=True)
            return None
        finally:
            self._busy = False

    def _round(
        self,
        model: PeftModel,
        started: RoundStarted,
        listeners: Sequence[Listener],
        folders: Sequence[Path],
    ) -> Round | None:
        """Merge, save, and remember; every process does, the main one tells the listeners."""
        book, found = Book(), list[Round]()

        def note(event: Event) -> None:
            done = book.take(event)
            if done is not None:
                found.append(done)

        told = (note, *listeners) if is_main() else ()
        tell(told, started)
        kind = self._analysis[started.trigger]
        # Whatever the merge itself does ("off"), the processes must agree on what comes of it.
        with together("auto") as team:
            with merged(model, self._job, kind, told, team) as result:
                if team.main:
                    better = improved(found[-1], self.memory["best_score"])
                    wanted = [f for f in folders if f.name != "best" or better]
                    save(result, wanted, listeners)
            self._remember(team, found[-1] if found else None)
        self._last = result
        return found[-1] if found else None

    def _remember(self, team: Team, done: Round | None) -> None:
        """Take over what the main process found, so that all processes decide alike."""
        new = None if done is None else facts(done)
        fact = team.first("what the round found", None, new)
        history = [*self.memory["history"], fact["history"]]
        self.memory |= {**fact, "history": history}

    def _save_again(
        self,
        model: PeftModel,
        earlier: MergeResult,
        folders: Sequence[Path],
        listeners: Sequence[Listener],
    ) -> bool:
        """Save the adapter of the last round, made at this step with these weights."""
        if is_main():
            with rebuilt(model, self._job, earlier) as result:
                save(result, [f for f in folders if f.name == "merged"], listeners)
        return True

    def _folders(self, trigger: str, args: Any, state: Any) -> list[Path]:
        """Return where this round's merged adapter goes; "best" only if it is one."""
        root = self._root(args)
        names = [] if self._artifact == "off" or trigger != "train_end" else ["merged"]
        if self._artifact == "best":
            names.append("best")
        if self._artifact == "all":
            names.append(f"step-{state.global_step}")
        return [root / name for name in names]

    def _root(self, args: Any) -> Path:
        return Path(self._output_dir or args.output_dir) / "himerge"

    def _scores(self, trigger: str) -> bool:
        return self._analysis[trigger] != "off"

    def _listeners(self, args: Any) -> tuple[Listener, ...]:
        """Return the user's listeners, or those that fit the trainer's settings."""
        if not is_main():
            return ()
        if self._given is not None:
            return self._given
        if self._made is None:
            self._made = default_listeners(None if args is None else self._root(args), args)
        return self._made

    def _rewrite(self, args: Any, state: Any) -> None:
        """Bring the checkpoint's copy of this callback's state up to date.

        The trainer writes it before `on_save`, so a round made there would be forgotten.
        """
        put_state(state, type(self).__name__, self.state())
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json"
        if file.is_file():
            state.save_to_json(str(file))

    def _check_metric(self, args: Any) -> None:
        metric = getattr(args, "metric_for_best_model", None) or ""
        fits = "evaluate" in self._on and self._every == 1 and self._scores("evaluate")
        if "himerge_" in metric and not fits:
            raise ConfigError(
                f"metric_for_best_model={metric!r} needs a score at every evaluation: set "
                f"every=1, have 'evaluate' in on, and analysis='scores' or 'full' there."
            )
