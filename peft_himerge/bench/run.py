"""The loop of a benchmark: setting by setting, row by row; every cell is kept once it is known."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapters import read_adapters
from ..combine import Combiner
from ..config import HiMergeConfig
from ..errors import ConfigError
from ..files import write_text
from ..focus import USUAL, focus_adapters
from ..folders import load_peft_model
from ..hi import merge_adapters_hi, score_plans
from ..identity import adapter_digest, base_digest
from ..json_file import read_object
from ..methods.registry import get_method
from ..outputs import owning
from ..plan import IDENTITY, MergePlan
from ..probe import Probe, preserved
from ..request import prepare
from ..result import versions
from ..scoring import Score, Task
from ..trials import Trials
from .lineup import Contender, choose
from .tasks import BenchTask, load_tasks

__all__ = ["Options", "run_bench", "run_loaded"]

_EXPORTED = "bench_exported"


@dataclass(frozen=True, slots=True)
class Options:
    """What every cell depends on beside its setting and its contender.

    Attributes:
        rows: validation rows per task that methods choose by.
        test_rows: test rows per task.
        text_rows: test rows of a task that generates text; None is `test_rows`.
        budget: most scores on validation rows that a method of the registry may spend; Hi-Merging
            spends what its analysis takes, which is reported.
        guide: "smooth", "probability" or "measure"; see `tasks.load_tasks`.
        batch_size: sequences per forward pass.
        max_new_tokens: most tokens to generate per prompt.
        dtype: of the base model, "float32" or "bfloat16"; adapters and merging keep float32.
        seed: of the draw of validation rows, of random masks and of the points that are tried.
    """

    rows: int = 48
    test_rows: int = 200
    budget: int = 24
    guide: str = "smooth"
    batch_size: int = 32
    max_new_tokens: int = 64
    dtype: str = "float32"
    seed: int = 0
    text_rows: int | None = None

    def torch_dtype(self) -> torch.dtype:
        """Return the dtype.

        Raises:
            ConfigError: it is none of the two.
        """
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.")
        return torch.float32 if self.dtype == "float32" else torch.bfloat16


def run_bench(
    base: str | Path,
    adapters: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: Sequence[Sequence[str]],
    contenders: Sequence[str] = (),
    options: Options | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Score every contender in every setting, and keep the cells in `out`.

    Args:
        base: folder of the base model, a causal LM with its tokenizer.
        adapters: folder with one adapter folder per task, named like it; `a+b` is an adapter that
            was trained on the mixed data of the tasks a and b, if there is one.
        data: folder with one folder per task; see `tasks.load_tasks`.
        out: folder for the cells; cells that are there and still hold are not computed again.
        settings: the tasks that are merged, two or more per setting.
        contenders: names of `LINEUP`; all by default.
        options: sizes and budget.
        say: gets a line per cell.

    Returns:
        The folder of the cells, `out/cells`.

    Raises:
        ConfigError, AdapterError: something does not fit; nothing was computed.
    """
    chosen = options or Options()
    names = _check(settings, Path(adapters))
    mixed = ["+".join(tasks) for tasks in settings if (Path(adapters) / "+".join(tasks)).is_dir()]
    for setting in settings:
        choose(contenders, len(setting))
    folders = {name: Path(adapters) / name for name in (*names, *mixed)}
    model, tokenizer = load_peft_model(base, folders, dtype=chosen.torch_dtype())
    tasks = load_tasks(
        Path(data),
        names,
        tokenizer,
        rows=chosen.rows,
        test_rows=chosen.test_rows,
        text_rows=chosen.text_rows,
        guide=chosen.guide,
        batch_size=chosen.batch_size,
        max_new_tokens=chosen.max_new_tokens,
        seed=chosen.seed,
    )
    return run_loaded(
        model, tasks, out, settings=settings, contenders=contenders, options=chosen, say=say
    )


def run_loaded(
    model: PeftModel,
    tasks: Mapping[str, BenchTask],
    out: str | Path,
    *,
    settings: Sequence[Sequence[str]],
    contenders: Sequence[str] = (),
    options: Options | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run a benchmark on a model that holds the adapters; see `run_bench`.

    Args:
        model: holds one adapter per task, named like it, and may hold some named `a+b`.
        tasks: name -> task.
        out: folder for the cells.
        settings: the tasks that are merged, two or more per setting.
        contenders: names of `LINEUP`; all by default.
        options: sizes and budget.
        say: gets a line per cell.

    Raises:
        OutputError: `out` is in use by another process, or cannot be written.
    """
    bench = _Bench(model, tasks, Path(out) / "cells", options or Options(), say)
    with owning(out):
        for setting in settings:
            bench.references(tuple(setting), "+".join(setting) in model.peft_config)
            for contender in choose(contenders, len(setting)):
                bench.contest(tuple(setting), contender)
    return bench.cells


def _check(settings: Sequence[Sequence[str]], adapters: Path) -> list[str]:
    names: list[str] = []
    for tasks in settings:
        if len(tasks) < 2 or len(set(tasks)) < len(tasks):
            raise ConfigError(
                f"a setting merges two or more different tasks, got {'+'.join(tasks) or 'none'}."
            )
        names += [name for name in tasks if name not in names]
    if not names:
        raise ConfigError("give at least one setting, e.g. --setting trec+thucnews.")
    for name in names:
        if not (adapters / name / "adapter_config.json").is_file():
            raise ConfigError(f"there is no adapter of task {name!r} in {str(adapters)!r}.")
    return names


class _Bench:
    """One loaded model, its tasks, and the folder of cells."""

    def __init__(
        self,
        model: PeftModel,
        tasks: Mapping[str, BenchTask],
        cells: Path,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.tasks, self.cells = model, tasks, cells
        self.options, self._say = options, say
        self._base = base_digest(model)

    def references(self, names: tuple[str, ...], mixed: bool) -> None:
        """Score the base, each adapter alone, and the adapter trained on the mixed data."""
        states = {"base": MergePlan.base()}
        whole = ("+".join(names),) if mixed else ()
        for name in (*names, *whole):
            combiner = Combiner(read_adapters(self.model, [name]))
            states[name] = combiner.plan({name: IDENTITY})
        for state, plan in states.items():
            read = [] if state == "base" else [state]
            for task in names:
                self._cell(
                    Path("states") / state / f"{task}.json",
                    [state, task, self._digests(read), self._told([task], "test")],
                    partial(self._state, plan, read, task),
                )

    def _state(self, plan: MergePlan, read: list[str], task: str) -> dict[str, Any]:
        some = read or [task]  # the base is the same around any adapter
        found = score_plans(
            self.model,
            some,
            {"state": plan},
            {task: self.tasks[task].test},
            config=self._measured([task]),
        )
        return {"test": _rows(found["state"])}

    def contest(self, names: tuple[str, ...], contender: Contender) -> None:
        """Merge the adapters of a setting in one way and score the result on the test rows."""
        facts = [
            *(contender.name, contender.method, contender.weights, dict(contender.choices)),
            *(contender.space, contender.hi.model_dump() if contender.hi else None),
            *(["focused"] if contender.rounds else []),
            *([contender.rounds] if contender.rounds > 1 else []),
            *(["relative"] if contender.relative else []),
            *([contender.swaps] if contender.swaps else []),
            *([dict(USUAL)] if contender.hi and contender.hi.focus else []),
        ]
        own = [self.options.budget, [self.tasks[n].guide for n in names], self.options.seed]
        self._cell(
            Path("merges") / "+".join(names) / f"{contender.name}.json",
            [facts, own, self._digests(names), self._told(names, "validation", "test")],
            partial(self._hi if contender.hi else self._method, names, contender),
        )

    def _method(self, names: tuple[str, ...], contender: Contender) -> dict[str, Any]:
        """Let a method choose its weights and options within the budget."""
        if not contender.rounds:
            return self._searched({name: name for name in names}, contender)
        inputs = {name: self.tasks[name].validation for name in names}
        how: dict[str, Any] = {"rounds": contender.rounds, "relative": contender.relative}
        made = focus_adapters(self.model, names, inputs, **how)
        try:
            return self._searched(made, contender)
        finally:
            with preserved(self.model):
                for name in made.values():
                    self.model.delete_adapter(name)

    def _searched(self, adapters: Mapping[str, str], contender: Contender) -> dict[str, Any]:
        layers = Combiner(read_adapters(self.model, list(adapters.values()))).table()
        request = prepare(
            self.model,
            get_method("coefficient_search"),
            dict.fromkeys(adapters.values(), 1.0),
            options={
                "base": contender.method,
                "values": contender.weights,
                "choices": contender.options(list(adapters.values()), list(layers)),
                "base_space": contender.space,
                "budget": self.options.budget,
            },
            policy="error",
            seed=self.options.seed,
        )
        probe = Probe(self.model, Combiner(request.adapters))
        with preserved(self.model), torch.no_grad():
            fitted = request.fit(Trials(probe, self._tasks(adapters, "validation")))
            judged = Trials(probe, self._tasks(adapters, "test")).scores(fitted.deltas())
        assert fitted.fitted is not None
        report = dict(fitted.fitted.report)
        chosen = {"weights": report["weights"], "options": report["options"]}
        return {
            "test": _rows({task: judged[name] for task, name in adapters.items()}),
            "validation": report["scores"],
            "chosen": chosen,
            "scores_computed": report["scores_computed"],
        }

    def _hi(self, names: tuple[str, ...], contender: Contender) -> dict[str, Any]:
        """Run a variant of Hi-Merging; the exact result is judged, and the exported adapter."""
        assert contender.hi is not None
        guides = {name: self.tasks[name].guide for name in names}
        config = contender.hi.model_copy(update={"metric": guides, "max_export_drop": None})
        found = merge_adapters_hi(
            self.model,
            list(names),
            {name: self.tasks[name].validation for name in names},
            adapter_name=_EXPORTED,
            config=config,
            journal=self.cells.parent / "journal",
        )
        exact, exported = self._judged(names, found.plan)
        merged = found.states["merged"]
        edits = [c for c in found.conflicts if c.edits and c.accepted]
        return {
            "test": _rows(exact),
            "test_exported": _rows(exported),
            "validation": _rows({name: merged[name] for name in names}),
            "chosen": {
                "adapters": {name: asdict(found.plan.adapters[name]) for name in names},
                "layers_edited": len(edits),
                "plan": found.plan.to_dict(),
            },
            "rank": found.rank,
            "export_error": found.export_error,
            "scores_computed": found.scores_computed,
        }

    def _judged(
        self, names: tuple[str, ...], plan: MergePlan
    ) -> tuple[Mapping[str, Score], Mapping[str, Score]]:
        """Return test scores of the exact merge and of the exported adapter, which goes."""
        tests, measured = {name: self.tasks[name].test for name in names}, self._measured(names)
        try:
            exact = score_plans(self.model, names, {"exact": plan}, tests, config=measured)
            whole = Combiner(read_adapters(self.model, [_EXPORTED])).plan({_EXPORTED: IDENTITY})
            exported = score_plans(
                self.model, [_EXPORTED], {"exported": whole}, tests, config=measured
            )
        finally:
            with preserved(self.model):
                self.model.delete_adapter(_EXPORTED)
        return exact["exact"], exported["exported"]

    def _measured(self, names: Sequence[str]) -> HiMergeConfig:
        return HiMergeConfig(metric={name: self.tasks[name].measure for name in names})

    def _tasks(self, adapters: Mapping[str, str], split: str) -> dict[str, Task]:
        """Return adapter -> its task, by which methods and scores know it."""
        of = {new: self.tasks[name] for name, new in sorted(adapters.items())}
        if split == "test":
            return {n: Task(n, t.test, t.measure) for n, t in of.items()}
        return {n: Task(n, t.validation, t.guide) for n, t in of.items()}

    def _digests(self, names: Sequence[str]) -> list[str]:
        return [self._base, *(adapter_digest(self.model, name) for name in sorted(names))]

    def _told(self, names: Sequence[str], *splits: str) -> list[list[str]]:
        return [
            [name, *(getattr(self.tasks[name], split).fingerprint for split in splits)]
            for name in sorted(names)
        ]

    def _cell(self, place: Path, facts: Any, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute a cell unless its file says it rests on the same facts."""
        key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        path = self.cells / place
        if path.is_file() and _key_of(path) == key:
            self._say(f"kept {place}")
            return
        start = time.perf_counter()
        cell = compute()
        seconds = time.perf_counter() - start
        ran = {"seconds": round(seconds, 1), **_machine(self.model.device)}
        told = {"key": key, **cell, **ran, "options": asdict(self.options), "versions": versions()}
        write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        means = ", ".join(f"{t} {row['value']:.3f}" for t, row in cell["test"].items())
        self._say(f"{place}: {means} ({seconds:.0f} s)")


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": "CPU", "threads": torch.get_num_threads()}


def _key_of(cell: Path) -> Any:
    try:
        return read_object(cell).get("key")
    except ConfigError:  # damaged: it is computed again
        return None


def _rows(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    return {
        task: {"value": score.value, "se": score.se, "metrics": dict(score.metrics)}
        for task, score in scores.items()
    }
