"""Recipes: every shipped one is valid and merges, as Python would; every fault is told at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bytewise
import pytest
import torch
import workshop
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, LlamaForCausalLM
from typer.testing import CliRunner

from peft_himerge import (
    HiMergeConfig,
    list_methods,
    merge_adapters,
    merge_adapters_hi,
)
from peft_himerge.cli import app, main
from peft_himerge.cli_recipe import sweep_recipe
from peft_himerge.errors import BudgetError, ConfigError
from peft_himerge.evals import ClassificationRow, load_rows, multiple_choice
from peft_himerge.folders import load_peft_model
from peft_himerge.page import parse_report, read_report, render_page
from peft_himerge.page.charts import state_label
from peft_himerge.page.tables import tables_of
from peft_himerge.recipe import (
    Fault,
    RecipeError,
    examine,
    examine_file,
    read_recipe,
    run_recipe,
)
from peft_himerge.recipe.read import _override
from peft_himerge.recipe.rules import _options
from peft_himerge.recipe.tasks import KINDS, options_of
from peft_himerge.sweep import read_sweep

RECIPES, MERGES = workshop.RECIPES, workshop.MERGES
# What random models with four rows cannot give: a gain to divide by, an export without loss.
EASY = ["options.normalize=none", "options.max_export_drop=null"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that furnishes a working folder for a shipped recipe, once."""
    known: dict[str, Path] = {}

    def furnished(recipe: str) -> Path:
        if recipe not in known:
            known[recipe] = tmp_path_factory.mktemp(recipe.removesuffix(".yaml"))
            workshop.furnish(known[recipe], recipe)
        return known[recipe]

    return furnished


def sets(root: Path, recipe: str, out: Path) -> list[str]:
    told = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    easy = EASY if told.get("method", "hi") == "hi" else []
    found = [*workshop.pointed(root, recipe), f"out={out}", *easy]
    return [*found, f"journal={out}.journal"] if "journal" in told else found


# ------------------------------------------------------------------------------ what is shipped


def test_the_recipes_that_were_promised_are_shipped() -> None:
    assert {name.removesuffix(".yaml") for name in MERGES} == {
        *("two_tasks", "three_tasks", "model_wise_only", "bilingual_multiple_choice"),
        *("multiple_choice_generation", "perplexity_only", "sequence_classification"),
        *("drop_in_ties", "scores_alone"),
    }


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.yaml")))
def test_a_shipped_recipe_is_short_and_says_how_to_run_it(name: str) -> None:
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# ")
    command = "sweep" if "sweep" in name else "merge"
    assert any(f"himerge {command} " in line and name in line for line in lines)


@pytest.mark.parametrize("name", MERGES)
def test_a_shipped_recipe_is_valid(name: str) -> None:
    recipe = read_recipe(RECIPES / name)
    assert recipe.adapters
    assert recipe.out.startswith("merged")


def test_the_sweep_names_a_shipped_recipe_and_varies_its_options() -> None:
    sweep = read_sweep(RECIPES / "local_sweep.yaml")
    assert sweep.recipe == RECIPES / "two_tasks.yaml"
    options = read_recipe(sweep.recipe).options
    whole = sweep.within({**options, "density": 0.25, "accept": "no_regression"})
    assert options == {}
    config = whole.config({"density": 0.5, "scale": 0.75})
    assert (config.density, config.accept) == (0.5, "no_regression")
    assert (config.variant, config.focus) == ("joint", False)  # a sweep of density prunes sources


# -------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("name", MERGES)
def test_a_shipped_recipe_merges_on_tiny_models(
    name: str, shop: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    recipe = read_recipe(RECIPES / name, sets(shop(name), name, out))
    found = examine(recipe)
    assert not found.faults
    assert not found.warnings
    events: list[Any] = []
    done = run_recipe(found, [events.append])
    if recipe.is_scored:
        for task, spec in recipe.tasks.items():  # what the rules know is what a kind gives
            given = set(done.result.states["base"][task].metrics)
            assert given == set(KINDS[spec.kind].metrics)
    tested = {name for name, task in recipe.tasks.items() if task.test}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    written = (out / "recipe.yaml").read_bytes()
    assert report["recipe"] == {
        "file": "recipe.yaml",
        "digest": hashlib.sha256(written).hexdigest(),
    }
    if not tested:
        assert done.test is None
        assert "test" not in report
    else:
        states = ["base", *recipe.adapters, "merged"]
        assert list(report["test"]["scores"]) == states
        assert all(set(row) == tested for row in report["test"]["scores"].values())
        assert all(None not in row.values() for row in report["test"]["standard_errors"].values())
        assert "## Test scores" in (out / "README.md").read_text(encoding="utf-8")
        assert "## Test scores" in (out / "report.md").read_text(encoding="utf-8")
        page = out / "report.html"
        assert "<h2>Test scores</h2>" in page.read_text(encoding="utf-8")
        last = [e for e in events if getattr(e, "stage", "") == "test"][-1]
        assert last.done == last.total == len(states) * len(tested)
    if name != "sequence_classification.yaml":
        base = LlamaForCausalLM.from_pretrained(shop(name) / "models" / "base")
        merged = PeftModel.from_pretrained(base, str(out))
        assert any(p.abs().sum() > 0 for n, p in merged.named_parameters() if "lora_B" in n)
    # What was written beside the result is a recipe for the same result.
    again = read_recipe(out / "recipe.yaml", [f"out={tmp_path / 'again'}"])
    assert again.folders.keys() == recipe.folders.keys()
    for adapter, folder in again.folders.items():
        assert folder.resolve() == recipe.folders[adapter].resolve()
    rerun = run_recipe(examine(again))
    same = "adapter_model.safetensors"
    assert (rerun.folder / same).read_bytes() == (out / same).read_bytes()


def test_a_recipe_is_what_python_would_do(shop: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    recipe = read_recipe(RECIPES / name, [*sets(root, name, tmp_path / "out"), "rank=3"])
    done = run_recipe(examine(recipe))
    folders = {task: root / "adapters" / task for task in ("en", "zh")}
    model, tokenizer = load_peft_model(root / "models" / "base", folders)

    def rows(task: str, split: str) -> list[Any]:
        return load_rows(root / "data" / f"{task}.{split}.jsonl", "multiple_choice")

    evals = {t: multiple_choice(rows(t, "validation"), tokenizer) for t in folders}
    config = HiMergeConfig(
        variant="focused", metric="calibrated_probability", rank=3, max_export_drop=None
    )
    wanted = merge_adapters_hi(model, ["en", "zh"], evals, config=config)
    assert done.result.plan == wanted.plan
    assert done.result.scores == wanted.scores
    assert done.test is not None
    loaded, _ = load_peft_model(root / "models" / "base", {"done": tmp_path / "out"})
    for task in folders:
        fn = multiple_choice(rows(task, "test"), tokenizer)
        merged = fn(loaded)["accuracy"].double().mean()
        with loaded.disable_adapter():
            base = fn(loaded)["accuracy"].double().mean()
        model.set_adapter(task)
        alone = fn(model)["accuracy"].double().mean()
        assert done.test.states["merged"][task].value == pytest.approx(float(merged), abs=1e-12)
        assert done.test.states["base"][task].value == pytest.approx(float(base), abs=1e-12)
        assert done.test.states[task][task].value == pytest.approx(float(alone), abs=1e-12)


def test_a_focused_recipe_is_what_python_would_do_and_can_be_replayed(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name, out = shop("two_tasks.yaml"), "two_tasks.yaml", tmp_path / "out"
    own = ["options.scale={en: 0.5, zh: 0.75}", "options.density={en: 1.0, zh: 0.5}"]
    given = [*sets(root, name, out), "options.variant=focused", *own, "rank=3"]
    found = examine(read_recipe(RECIPES / name, given))
    done = run_recipe(found)
    folders = {task: root / "adapters" / task for task in ("en", "zh")}
    model, tokenizer = load_peft_model(root / "models" / "base", folders)
    rows = {
        task: load_rows(root / "data" / f"{task}.validation.jsonl", "multiple_choice")
        for task in folders
    }
    fns = {task: multiple_choice(some, tokenizer) for task, some in rows.items()}
    config = HiMergeConfig(
        variant="focused",
        density={"en": 1.0, "zh": 0.5},
        scale={"en": 0.5, "zh": 0.75},
        metric="calibrated_probability",
        rank=3,
        max_export_drop=None,
    )
    wanted = merge_adapters_hi(model, ["en", "zh"], fns, config=config)
    for state, scores in wanted.scores.items():
        assert done.result.scores[state] == pytest.approx(scores, abs=1e-4)
    assert list(done.result.plan.adapters) == ["en", "zh"]
    again = tmp_path / "again"
    parts = [f"--adapter={n}={out / 'focused' / n}" for n in ("en", "zh")]
    command = ["apply", str(out / "plan.json"), *parts, f"--out={again}", "--rank=3"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    first, second = (load_file(f / "adapter_model.safetensors") for f in (out, again))
    for key in [key for key in first if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        torch.testing.assert_close(
            first[other] @ first[key], second[other] @ second[key], atol=1e-5, rtol=1e-4
        )
    flags = [part for change in given for part in ("--set", change)]
    shown = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert "focus: it runs the model on each adapter's rows 3 times before" in shown.output


def test_a_method_of_the_registry_is_what_python_would_do(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("drop_in_ties.yaml"), "drop_in_ties.yaml"
    more = ["options.density=0.4", "options.weights.zh=-0.5", "rank=exact", "tasks={}"]
    recipe = read_recipe(RECIPES / name, [*sets(root, name, tmp_path / "out"), *more])
    done = run_recipe(examine(recipe))
    folders = {task: root / "adapters" / task for task in ("en", "zh")}
    model, _ = load_peft_model(root / "models" / "base", folders)
    wanted = merge_adapters(
        model, ["en", "zh"], "ties", density=0.4, weights=[1.0, -0.5], rank="exact"
    )
    assert [m.module for m in done.result.modules] == [m.module for m in wanted.modules]
    for record in wanted.modules:
        assert torch.equal(done.result.delta(record.module), wanted.delta(record.module))


def test_a_method_that_looks_at_scores_is_what_python_would_do(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    more = ["method=greedy_soup", "options={}", "rank=exact"]
    given = [*workshop.pointed(root, name), f"out={tmp_path / 'out'}", *more]
    done = run_recipe(examine(read_recipe(RECIPES / name, given)))
    folders = {task: root / "adapters" / task for task in ("en", "zh")}
    model, tokenizer = load_peft_model(root / "models" / "base", folders)
    evals = {
        task: multiple_choice(
            load_rows(root / "data" / f"{task}.validation.jsonl", "multiple_choice"), tokenizer
        )
        for task in folders
    }
    wanted = merge_adapters(
        model,
        ["en", "zh"],
        "greedy_soup",
        eval_fns=evals,
        metric="calibrated_probability",
        rank="exact",
    )
    assert done.result.fitted == wanted.fitted
    for record in wanted.modules:
        assert torch.equal(done.result.delta(record.module), wanted.delta(record.module))
    flags = [part for change in given for part in ("--set", change)]
    shown = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert "scores decide this merge; its own options" in shown.output


def test_the_share_kept_is_a_mean_over_tasks_that_an_adapter_wins(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("perplexity_only.yaml"), "perplexity_only.yaml"
    done = run_recipe(examine(read_recipe(RECIPES / name, sets(root, name, tmp_path / "out"))))
    assert done.test is not None
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["test"]["scores"]
    shares = [
        (scores["merged"][t] - scores["base"][t]) / (scores[t][t] - scores["base"][t])
        for t in ("law", "medicine")
        if scores[t][t] > scores["base"][t]
    ]
    wanted = sum(shares) / len(shares) if shares else None
    assert done.test.kept("merged") == pytest.approx(wanted)
    assert done.test.kept("base") == (0.0 if shares else None)


@pytest.mark.parametrize("rows", ["none", "test"])
def test_a_merge_without_scores_can_be_tested(
    rows: str, shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out = shop("two_tasks.yaml"), tmp_path / "out"
    given = [*workshop.pointed(root, "model_wise_only.yaml"), f"out={out}", "rank=exact"]
    if rows == "test":
        task = f"{{kind: multiple_choice, test: {root}/data/en.test.jsonl}}"
        given += [f"base={root}/models/base", f"tasks.en={task}"]
    found = examine(read_recipe(RECIPES / "model_wise_only.yaml", given))
    assert found.cost is None
    done = run_recipe(found)
    assert (done.test is not None) == (rows == "test")
    if done.test is None:
        return
    loaded, tokenizer = load_peft_model(root / "models" / "base", {"merged": out})
    fn = multiple_choice(load_rows(root / "data" / "en.test.jsonl", "multiple_choice"), tokenizer)
    wanted = fn(loaded)["accuracy"].tolist()
    found_examples = done.test.states["merged"]["en"].examples
    assert found_examples is not None
    assert found_examples.tolist() == wanted


@pytest.mark.parametrize("recipe", ["two_tasks.yaml", "drop_in_ties.yaml"])
def test_a_full_checkpoint_is_the_merged_model(
    recipe: str, shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, out, full = shop(recipe), tmp_path / "out", tmp_path / "full"
    more = ["options.density=1.0", "rank=exact", f"merged={full}"]
    more += ["options.scale=1.0", "options.layer_density=1.0"] if recipe == "two_tasks.yaml" else []
    run_recipe(examine(read_recipe(RECIPES / recipe, [*sets(root, recipe, out), *more])))
    ids = torch.arange(3, 27).reshape(2, 12)
    base = LlamaForCausalLM.from_pretrained(root / "models" / "base")
    whole = LlamaForCausalLM.from_pretrained(full)
    loaded = PeftModel.from_pretrained(base, str(out))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_the_page_shows_the_test_table(shop: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    done = run_recipe(examine(read_recipe(RECIPES / name, sets(root, name, tmp_path / "out"))))
    assert done.test is not None
    report = read_report(tmp_path / "out")
    shown = tables_of(report)["test"]
    header, rows = done.test.rows()
    assert list(shown.header[:-1]) == header[:-1]
    assert [row[-1].text.replace("–", "") for row in shown.rows] == [row[-1] for row in rows]
    for cells, row in zip(shown.rows, rows, strict=True):
        assert [c.text for c in cells[1:-1]] == [text.replace(" ± 0.000", "") for text in row[1:-1]]
    assert shown.rows[-1][0].text == state_label(report, "exported")
    kept = done.test.kept("merged")
    assert kept is not None
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<dd>{100 * kept:.0f}%</dd>" in page
    assert "wins alone, on test data" in page
    assert "Of the validation data that decided" in page
    bare = parse_report(json.loads((tmp_path / "out" / "report.json").read_text()) | {"test": None})
    assert "test" not in tables_of(bare)
    assert "Of the validation data" not in render_page(bare)


def test_heads_stay_with_their_tasks(shop: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = shop("sequence_classification.yaml"), "sequence_classification.yaml"
    more = ["tasks.mood.test_metric=log_likelihood", "tasks.topic.test_metric=log_likelihood"]
    found = examine(read_recipe(RECIPES / name, [*sets(root, name, tmp_path / "out"), *more]))
    told = {look.key: look.found for look in found.looks}
    assert "its head (classifier, score) stays with its task" in told["adapters.mood"]
    done = run_recipe(found)
    assert done.test is not None
    # Oracle: PEFT's own model of each adapter, whole, one row at a time.
    tokenizer = bytewise.tokenizer()
    for task, labels in {"mood": ["bad", "good"], "topic": ["news", "sport", "science"]}.items():
        encoder = BertForSequenceClassification.from_pretrained(
            root / "models" / "encoder", num_labels=len(labels)
        )
        whole = PeftModel.from_pretrained(encoder, str(root / "adapters" / task)).eval()
        rows = load_rows(root / "data" / f"{task}.test.csv", "sequence_classification")
        values = []
        for row in rows:
            assert isinstance(row, ClassificationRow)
            with torch.no_grad():
                logits = whole(**tokenizer(row.text, return_tensors="pt")).logits[0].double()
            values.append(float(logits.log_softmax(-1)[labels.index(str(row.label))]))
        wanted = sum(values) / len(values)
        assert done.test.states[task][task].value == pytest.approx(wanted, abs=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


EVALS = """
from pathlib import Path
Path(__file__).with_name("executed").write_text("yes")
def eval_fns(tokenizer):
    def mean(model):
        return next(p for n, p in model.named_parameters() if "embed" in n).double().mean().item()
    def slow(model):
        return float("nan")
    return {"mean": mean, "nan": slow}
"""


def own(root: Path, function: str = "mean") -> list[str]:
    """Return --set values for a recipe whose tasks are functions of the user's."""
    (root / "mine.py").write_text(EVALS, encoding="utf-8")
    task = f"{{kind: function, validation: {function}}}"
    return [f"tasks={{en: {task}, zh: {task}}}", "options.density=1.0", "options.scale=1.0"]


def test_functions_of_the_user_come_from_the_file_on_the_command_line_alone(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    more = [*sets(root, name, tmp_path / "out"), *own(tmp_path)]
    recipe = read_recipe(RECIPES / name, more)
    without = examine(recipe)
    assert [fault.key for fault in without.faults] == ["tasks.en.validation", "tasks.zh.validation"]
    assert "--eval my_evals.py" in str(without.faults[0])
    assert not (tmp_path / "executed").exists()
    with pytest.raises(RecipeError, match="2 faults"):
        run_recipe(without)
    found = examine(recipe, tmp_path / "mine.py")
    assert (tmp_path / "executed").exists()
    assert not found.faults
    scores = run_recipe(found).result.scores
    assert set(scores["merged"]) == {"en", "zh"}
    unknown = read_recipe(RECIPES / name, [*more, "tasks.en.validation=meen"])
    (fault,) = examine(unknown, tmp_path / "mine.py").faults
    assert "Did you mean 'mean'" in str(fault)


def test_tracking_hears_the_whole_merge(
    shop: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Fake:
        def __init__(self, start: dict[str, Any]) -> None:
            heard.append(f"{start}")

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            heard.append("closed")

        def __call__(self, event: object) -> None:
            heard.append(type(event).__name__)

    monkeypatch.setattr("peft_himerge.recipe.run.WandbListener", Fake)
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    more = ["tracking={to: wandb, project: p, run: r}", "options.density=1", "options.scale=1"]
    run_recipe(examine(read_recipe(RECIPES / name, [*sets(root, name, tmp_path / "o"), *more])))
    assert heard[0].startswith("{'project': 'p', 'name': 'r', 'config': {'recipe': {'base': ")
    assert heard[1] == "MergeStarted"
    after = heard[heard.index("MergeFinished") + 1 :]
    assert after == ["StateScored"] * 8 + ["MergeTested", "AdapterSaved", "closed"]
    short = read_recipe(RECIPES / name, ["tracking=wandb"])
    assert short.tracking.to == "wandb"


# ------------------------------------------------------------------------------- what it costs


def test_a_budget_in_scores_refuses_before_anything_is_paid(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    given = sets(root, name, tmp_path / "out")
    found = examine(read_recipe(RECIPES / name, given))
    assert found.cost is not None
    most = found.cost.cost.scores
    tight = examine(read_recipe(RECIPES / name, [*given, f"budget.scores={most - 1}"]))
    assert f"may need {most} scores" in str(tight.faults[0])
    enough = examine(read_recipe(RECIPES / name, [*given, f"budget.scores={most}"]))
    assert not enough.faults
    done = run_recipe(enough)
    assert done.result.scores_computed <= most


def test_a_budget_in_seconds_stops_and_the_journal_goes_on(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    given = [*sets(root, name, tmp_path / "out"), f"journal={tmp_path / 'scores.jsonl'}"]
    short = examine(read_recipe(RECIPES / name, [*given, "budget.seconds=1e-9"]))
    with pytest.raises(BudgetError, match=r"budget\.seconds is 1e-09\. The journal has all"):
        run_recipe(short)
    assert not (tmp_path / "out").exists()
    whole = run_recipe(examine(read_recipe(RECIPES / name, given)))
    fresh = [*given, f"journal={tmp_path / 'other.jsonl'}", f"out={tmp_path / 'other'}"]
    again = run_recipe(examine(read_recipe(RECIPES / name, fresh)))
    assert whole.result.scores_computed < again.result.scores_computed
    assert whole.result.plan == again.result.plan
    bare = [*sets(root, name, tmp_path / "out"), "budget.seconds=1e-9"]
    with pytest.raises(BudgetError, match="Name a journal"):
        run_recipe(examine(read_recipe(RECIPES / name, bare)))


# ------------------------------------------------------------------------------------- faults


def test_all_faults_are_told_at_once() -> None:
    changes = [
        "adapter={en: x}", "adapters.en=7", "tasks.en.kind=mutiple_choice",
        "tasks.zh.batchsize=4", "tasks.zh.batch_size=many", "options.densty=0.5",
        "options.scale=-1", "rank=0", "budget.score=3", "tracking=wndb", "dtype=float8",
        "out=null",
    ]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        read_recipe(RECIPES / "two_tasks.yaml", changes)
    told = {fault.key: fault.what for fault in caught.value.faults}
    assert "Did you mean 'adapters'" in told["adapter"]
    assert "got 7" in told["adapters.en"]
    assert "Did you mean 'multiple_choice'" in told["tasks.en.kind"]
    assert "Did you mean 'batch_size'" in told["tasks.zh.batchsize"]
    assert told["tasks.zh.batch_size"] == "expected int, got 'many'."
    assert "Did you mean 'density'" in told["options.densty"]
    assert "greater than or equal to 0" in told["options.scale"]
    assert "whole number >= 1" in told["rank"]
    assert "Did you mean 'scores'" in told["budget.score"]
    assert "Did you mean 'wandb'" in told["tracking.to"]
    assert "Allowed: float32, bfloat16, float16" in told["dtype"]
    assert "out" in told
    text = str(caught.value)
    assert text.startswith(repr(str(RECIPES / "two_tasks.yaml")))
    assert all(f"\n  {key}: " in text for key in told)


@pytest.mark.parametrize(
    ("recipe", "change", "key", "text"),
    [
        ("two_tasks", "tasks.en={kind: perplexity}", "tasks.en", "give validation, test"),
        ("two_tasks", "tasks.en.validation=null", "tasks.en", "every adapter, or for none"),
        ("two_tasks", "tasks.en.metric=acuracy", "tasks.en.metric", "Did you mean 'accuracy'"),
        ("two_tasks", "tasks.en.normalize=token", "tasks.en.normalize", "Did you mean 'tokens'"),
        ("two_tasks", "tasks.en.batch_size=true", "tasks.en.batch_size", "expected int, got True"),
        ("two_tasks", "tasks.en.max_rows=0", "tasks.en.max_rows", "greater than or equal to 1"),
        ("two_tasks", "tasks={}", "options", "nothing can be focused or searched"),
        ("two_tasks", "base=null", "base", "missing: tasks are scored"),
        ("two_tasks", "options.rank=4", "options.rank", "at the top of the recipe"),
        ("two_tasks", "options.metric=x", "options.metric", "tasks.NAME.metric"),
        ("two_tasks", "options.density={en: 0.5}", "options", "give both per adapter"),
        ("two_tasks", "method=tie", "method", "Did you mean 'ties'"),
        ("two_tasks", "method=ties", "tasks.en.validation", "looks at no score"),
        ("drop_in_ties", "method=regmean", "tasks.en", "data for every adapter."),
        ("scores_alone", "method=regmean", "options.variant", "'regmean' has no such option"),
        ("three_tasks", "method=regmean", "tasks.general.validation", "give it as test"),
        ("sequence_classification", "method=regmean", "tasks.mood.kind",
         "Allowed: multiple_choice, perplexity, generation, likelihood; or call merge_adapters"),
        ("multiple_choice_generation", "method=atlas", "tasks.writer.kind",
         "Allowed: multiple_choice, perplexity; or call"),
        ("multiple_choice_generation", "method=regmean", "tasks.writer.metric", "give test_metric"),
        ("drop_in_ties", "method=greedy_soup", "tasks.en", "data for every adapter."),
        ("two_tasks", "options.focus=1", "options.focus", "valid boolean"),
        ("two_tasks", "focus=true", "focus", ""),
        ("model_wise_only", "options.variant=focused", "options", "nothing can be focused"),
        ("two_tasks", "name=en", "name", "has an adapter 'en' already"),
        ("two_tasks", "name=base", "name", "means the base model"),
        ("two_tasks", "adapters.exported=x", "adapters", "means a state of the merge"),
        ("two_tasks", "adapters={}", "adapters", "at least 1 item"),
        ("two_tasks", "adapters={no: x}", "adapters", "put it in quotes"),
        ("two_tasks", "out=adapters/en", "out", "the folder of adapters.en"),
        ("two_tasks", "out=./models/../models/base", "out", "the folder of base"),
        ("two_tasks", "merged=merged", "merged", "the folder of out"),
        ("two_tasks", "tracking.mode=of", "tracking.mode", "Allowed: online, offline, disabled"),
        ("two_tasks", "tasks.en.kind=lm_eval_task", "tasks.en.metric", "missing: acc"),
        ("two_tasks", "tasks.en={kind: lm_eval_task, validation: x.yaml, metric: acc}",
         "tasks.en.validation", "may hold code"),
        ("two_tasks", "tasks.en={kind: lm_eval_task, test: x, metric: acc, unsafe_code: true}",
         "tasks.en.unsafe_code", "cannot name code"),
        ("two_tasks", "tasks.en={kind: embedding_similarity, validation: x, metric: rho}",
         "tasks.en.metric", "has one score"),
        ("two_tasks", "tasks.en={kind: function, validation: f, max_rows: 3}",
         "tasks.en.max_rows", "of kind function has no such key"),
        ("two_tasks", "tasks.en={kind: lm_eval_task, test: x, metric: acc, include_path: y}",
         "tasks.en.include_path", "cannot name code to run; name the folder"),
        ("two_tasks", "tasks.en=3", "tasks.en", "valid dictionary"),
        ("two_tasks", "tasks.en={kind: function, validation: 'hub:squad'}",
         "tasks.en.validation", "a task of kind function takes no rows, got 'hub:squad'"),
        ("drop_in_ties", "options.rank=4", "options.rank", "at the top of the recipe"),
        ("model_wise_only", "journal=x", "journal", "only Hi-Merging with validation data"),
        ("model_wise_only", "budget.seconds=3", "budget", "only Hi-Merging with validation data"),
        ("model_wise_only", "tracking=wandb", "tracking", "give tasks test data, or leave it out"),
        ("model_wise_only", "merged=full", "merged", "merge_and_unload"),
        ("model_wise_only", "options.scale=null", "options.scale", "got None"),
        ("drop_in_ties", "options.densty=0.2", "options.densty", "Did you mean 'density'"),
        ("drop_in_ties", "options.density=high", "options.density", "expected float"),
        ("drop_in_ties", "options.space=nots", "options.space", "Did you mean 'knots'"),
        ("drop_in_ties", "options.weights={en: 1}", "options.weights", "no value for adapter 'zh'"),
        ("drop_in_ties", "options.weights=[1, 1]", "options.weights", "by name"),
        ("drop_in_ties", "options.pad_rank=0", "options.pad_rank", "whole number >= 1"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_place_and_its_remedy(
    recipe: str, change: str, key: str, text: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(RECIPES / f"{recipe}.yaml", [change])
    told = [f"{f.what}" for f in caught.value.faults if f.key == key]
    assert any(text in what for what in told), str(caught.value)


def test_faults_of_a_recipe_go_from_one_process_to_another() -> None:
    error = RecipeError(Path("r.yaml"), [Fault("a", "is wrong"), Fault("b", "is missing")])
    again = pickle.loads(pickle.dumps(error))
    assert (again.file, again.faults, str(again)) == (error.file, error.faults, str(error))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("density", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("options..density=3", "expected KEY=VALUE"),
        ("options.density=[1", "no valid YAML"),
        ("out.x=1", "'out' is 'merged', which has no keys"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str, text: str) -> None:
    with pytest.raises(RecipeError, match="1 fault") as caught:
        read_recipe(RECIPES / "two_tasks.yaml", [change])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "expected a table of keys"),
        ("- a\n- b\n", "expected a table of keys"),
        ("a: [1", "no valid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", "no valid YAML"),
        ("adapters: {en: x, en: y}\n", "the key 'en' is there twice"),
        ("out: a\nout: b\n", "the key 'out' is there twice"),
        ("? [1, 2]\n: 3\n", "no valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert text in str(caught.value)
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "other.yaml")


def test_faults_of_keys_and_of_files_are_told_together(
    shop: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shop("two_tasks.yaml")
    wrong = [
        "adapters.zh=nowhere", "options.densty=0.5", "tracking=wndb", "rank=0",
        "tasks.en.kind=mutiple_choice", "tasks.zh.batchsize=4", "tasks.zh.validation=no.jsonl",
        f"tasks.more={{kind: perplexity, test: {root}/none.jsonl, max_rows: many}}",
        f"tasks.last={{kind: multiple_choice, test: {root}/data/en.test.jsonl, max_rows: 0}}",
    ]  # fmt: skip
    given = [*sets(root, "two_tasks.yaml", tmp_path / "out"), *wrong]
    found = examine_file(RECIPES / "two_tasks.yaml", given)
    told = {look.key: look for look in found.looks}
    faults = {key: look.found for key, look in told.items() if look.state == "fault"}
    assert set(faults) == {
        *("adapters.zh", "options.densty", "tracking.to", "rank", "tasks.en.kind"),
        *("tasks.zh.batchsize", "tasks.zh.validation", "tasks.more.test"),
        *("tasks.more.max_rows", "tasks.last.max_rows"),
    }
    assert "Did you mean 'density'" in faults["options.densty"]
    assert "Did you mean 'multiple_choice'" in faults["tasks.en.kind"]
    assert "Did you mean 'batch_size'" in faults["tasks.zh.batchsize"]
    assert "no.jsonl" in faults["tasks.zh.validation"]
    assert "nowhere" in faults["adapters.zh"]
    # What is sound was looked at, and is told too.
    assert told["base"].state == told["adapters.en"].state == "ok"
    assert told["tasks.zh.test"].state == told["tasks.last.test"].state == "ok"
    flags = [part for change in given for part in ("--set", change)]
    shown = CliRunner().invoke(app, ["validate", str(RECIPES / "two_tasks.yaml"), *flags])
    assert shown.exit_code == 2
    assert "10 faults" in shown.output
    refused = CliRunner().invoke(app, ["merge", str(RECIPES / "two_tasks.yaml"), *flags])
    assert isinstance(refused.exception, RecipeError)
    assert {fault.key for fault in refused.exception.faults} == set(faults)
    with pytest.raises(RecipeError, match="10 faults"):
        run_recipe(found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        (["out=null", "adapters=3"], ["adapters", "out", "base"]),
        (["tasks=3", "base=null"], ["tasks", "options", "adapters.en", "adapters.zh"]),
        (["adapters.en=7"], ["adapters.en", "base", "adapters.zh"]),
        (["method=tie"], ["method", "base", "adapters.en", "adapters.zh"]),
        (["method=[1]", "budget={scores: x}"], ["method", "budget.scores", "base", "adapters.en"]),
        (["method=atlas", "options={}", "tasks.en.kind=generation"],
         ["tasks.en.kind", "base", "adapters.en", "adapters.zh"]),
        (["tasks.a.b=3"], ["tasks.a", "base", "adapters.en", "adapters.zh"]),
    ],
)  # fmt: skip
def test_whatever_is_wrong_the_rest_is_looked_at(changes: list[str], keys: list[str]) -> None:
    told = [fault.key for fault in examine_file(RECIPES / "two_tasks.yaml", changes).faults]
    assert all(any(key == k or k.startswith(f"{key}.") for k in told) for key in keys), told
    assert len(told) == len({*told})


WORDS = st.sampled_from(
    ["adapters", "tasks", "en", "kind", "multiple_choice", "validation", "options", "density",
     "method", "hi", "ties", "out", "base", "weights", "budget", "tracking", "rank", "search"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-1, 2) | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_table_is_a_recipe_or_a_list_of_faults(data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        faults: tuple[Fault, ...] = ()
        recipe = None
        try:
            recipe = read_recipe(file)
        except RecipeError as exc:
            faults = exc.faults
            with contextlib.suppress(RecipeError):  # nothing of it can be read
                assert set(examine_file(file).faults) >= set(faults)
    assert (recipe is None) == bool(faults)
    assert all(fault.what for fault in faults)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3), VALUES)
def test_a_change_lands_where_its_key_says(path: list[str], value: Any) -> None:
    data: dict[str, Any] = {}
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    assert _override(data, f"options.{'.'.join(path)}={text}") is None
    for part in ["options", *path]:
        data = data[part]
    assert data == value


def test_every_kind_and_method_says_its_options_with_types() -> None:
    for kind in KINDS:
        assert ("batch_size" in options_of(kind)) == (kind != "function")
        assert not {"max_rows", "include_path", "unsafe_code"} & set(options_of(kind))
    for info in list_methods():
        given = {name: d for name, d in info.options.items() if repr(d) != "required"}
        told = [fault.key for fault in _options(info, given, ["en", "zh"])]
        missing = [n for n, d in info.options.items() if repr(d) == "required"]
        assert told == [f"options.{name}" for name in missing], info.name


# -------------------------------------------------------------------- what is on the machine


def test_everything_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    found = examine(read_recipe(RECIPES / "two_tasks.yaml"))
    keys = [fault.key for fault in found.faults]
    splits = [f"tasks.{task}.{split}" for task in ("en", "zh") for split in ("validation", "test")]
    assert keys == ["base", "adapters.en", "adapters.zh", *splits]
    file = tmp_path / "r.yaml"
    file.write_text((RECIPES / "two_tasks.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    workshop.furnish(tmp_path, "two_tasks.yaml")
    assert not examine(read_recipe(file)).faults  # copied, as its first lines say
    (tmp_path / "data" / "en.validation.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "data" / "zh.test.jsonl").unlink()
    (tmp_path / "adapters" / "zh" / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "merged").write_text("a file")
    told = {fault.key: fault.what for fault in examine(read_recipe(file)).faults}
    assert set(told) == {"adapters.zh", "tasks.en.validation", "tasks.zh.test", "out"}
    assert "damaged" in told["adapters.zh"]
    assert "there is no column 'choices'" in told["tasks.en.validation"]
    assert "there is no file" in told["tasks.zh.test"]


@pytest.mark.parametrize(
    ("change", "key", "text"),
    [
        ("base=models/bsae", "base", "Did you mean 'models/base'?"),
        ("base=model/base", "base", "Did you mean 'models'?"),
        ("adapters.zh=adapters/hz", "adapters.zh", "Did you mean 'adapters/zh'?"),
        ("tasks.en.test=data/en.tets.jsonl", "tasks.en.test", "Did you mean 'data/en.test.jsonl'?"),
        ("tasks.en.test=qqqq/xxx", "tasks.en.test", "there is no file or folder 'qqqq/xxx'."),
        ("tasks.en.test=data", "tasks.en.test", "data"),
    ],
)
def test_a_path_that_leads_nowhere_gets_the_nearest_one(
    change: str, key: str, text: str, shop: Callable[[str], Path]
) -> None:
    file = shop("two_tasks.yaml") / "r.yaml"
    file.write_text((RECIPES / "two_tasks.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    told = {fault.key: fault.what for fault in examine_file(file, [change]).faults}
    assert told[key].replace(str(file.parent) + "/", "").endswith(text) or text == "data"
    assert ("Did you mean" in told[key]) == ("Did you mean" in text)


def test_a_base_without_weights_or_tokenizer_is_told(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    given = [*sets(root, name, tmp_path / "out"), f"base={tmp_path / 'base'}"]
    shutil.copytree(root / "models" / "base", tmp_path / "base")

    def told() -> str:
        (fault,) = examine(read_recipe(RECIPES / name, given)).faults
        assert fault.key == "base"
        return fault.what

    saved = [path for path in (tmp_path / "base").iterdir() if "token" in path.name]
    content = {path: path.read_bytes() for path in saved}
    for path in saved:
        path.write_text("{", encoding="utf-8")
    assert "the tokenizer in" in told()
    assert "cannot be read" in told()
    for path in saved:
        path.unlink()
    assert "holds no tokenizer, which tasks need" in told()
    for path, raw in content.items():
        path.write_bytes(raw)
    assert not examine(read_recipe(RECIPES / name, given)).faults
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "holds no weights (*.safetensors)" in told()


def test_a_function_that_decides_and_tests_gets_a_warning_and_a_broken_file_a_fault(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    more = [*sets(root, name, tmp_path / "out"), *own(tmp_path), "tasks.en.test=mean"]
    found = examine(read_recipe(RECIPES / name, more), tmp_path / "mine.py")
    (look,) = found.warnings
    assert look.key == "tasks.en.test"
    assert look.found.startswith("validation and test are the same")
    (tmp_path / "mine.py").write_text("eval_fns = 3\n", encoding="utf-8")
    found = examine(read_recipe(RECIPES / name, more), tmp_path / "mine.py")
    (fault,) = found.faults
    assert fault.key == "tasks"
    assert "eval_fns" in fault.what


def test_adapters_that_do_not_fit_the_base_are_told(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "perplexity_only.yaml"
    given = sets(shop(name), name, tmp_path / "out")
    encoder = shop("sequence_classification.yaml") / "models" / "encoder"
    (fault,) = examine(read_recipe(RECIPES / name, [*given, f"base={encoder}"])).faults
    assert fault.key == "adapters"
    assert "trained on another base model" in fault.what


def test_a_mistyped_path_never_asks_the_network(
    shop: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[str] = []
    real = datasets.load_dataset

    def load(*args: Any, **options: Any) -> Any:
        asked.append(str(args))
        return real(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    name = "two_tasks.yaml"
    given = [*sets(shop(name), name, tmp_path / "out"), "tasks.en={kind: perplexity, test: a/b}"]
    found = examine(read_recipe(RECIPES / name, [*given, "tasks.en.validation=a/b"]))
    assert "there is no file or folder" in str(found.faults[0])
    assert asked == []  # files, those of the other task, are read without it


@pytest.mark.parametrize(
    ("rows", "text"), [("validation", "4 of 4 test rows are also validation rows"), ("test", "")]
)
def test_the_same_rows_for_both_get_a_warning(
    rows: str, text: str, shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    given = [*sets(root, name, tmp_path / "o"), f"tasks.en.test={root}/data/en.{rows}.jsonl"]
    warnings = examine(read_recipe(RECIPES / name, given)).warnings
    assert [look.key for look in warnings] == (["tasks.en.test"] if text else [])
    assert all(text in look.found for look in warnings)


# ------------------------------------------------------------------------------- command line


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["himerge", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_exit_codes_are_for_scripts(
    shop: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    changes = sets(root, name, tmp_path / "unused")
    flags = [part for change in changes for part in ("--set", change)]
    out, file = tmp_path / "out", RECIPES / name
    assert call(monkeypatch, "validate", file, *flags) == 0
    assert call(monkeypatch, "plan", file, *flags) == 0
    assert call(monkeypatch, "merge", file, *flags, "--out", out) == 0
    told = capsys.readouterr().out
    assert "Test scores" in told
    assert "gain kept" in told
    assert "±" in told
    assert (out / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "unused").exists()
    # Bad input: nothing is merged.
    assert call(monkeypatch, "merge", file, *flags, "--set", "options.densty=1") == 2
    assert "Did you mean 'density'" in capsys.readouterr().err
    assert call(monkeypatch, "merge", file, "--base", "x") == 2
    assert "--base does not go with a recipe" in capsys.readouterr().err
    assert call(monkeypatch, "merge", tmp_path / "none.yaml") == 2
    assert call(monkeypatch, "validate", file, RECIPES / "drop_in_ties.yaml") == 2
    assert call(monkeypatch, "plan", file) == 2
    assert call(monkeypatch, "plan") == 2
    # A merge that fails.
    own_flags = [part for change in own(tmp_path, "nan") for part in ("--set", change)]
    evals = ["--evals", tmp_path / "mine.py", "--out", tmp_path / "failed"]
    assert call(monkeypatch, "merge", file, *flags, *own_flags, *evals) == 1
    assert "nan" in capsys.readouterr().err.lower()
    assert not (tmp_path / "failed").exists()


def test_plan_says_what_a_merge_that_was_there_took(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    flags = [p for c in sets(root, name, tmp_path / "out") for p in ("--set", c)]
    before = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert before.exit_code == 0
    assert "s per score" not in before.output
    cost = examine(read_recipe(RECIPES / name, sets(root, name, tmp_path / "out"))).cost
    assert cost is not None
    (tmp_path / "out").mkdir()
    report = {"cost": {"scores": 10, "seconds": 25.0}}
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    after = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert f"2.50 s per score: at most {2.5 * cost.cost.scores:.0f} s" in after.output
    assert str(cost.cost.scores) in after.output
    assert "4 states x 2 tasks = 8 scores of test data" in after.output


@pytest.mark.parametrize(
    "report",
    [
        "{",
        "[]",
        '{"cost": 3}',
        '{"cost": {"scores": 10}}',
        '{"cost": {"scores": 0, "seconds": 25.0}}',
        '{"cost": {"scores": true, "seconds": 25.0}}',
    ],
)
def test_plan_says_nothing_of_a_report_that_tells_no_time(
    report: str, shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    flags = [p for c in sets(root, name, tmp_path / "out") for p in ("--set", c)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text(report)
    shown = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert shown.exit_code == 0, shown.output
    assert "scores of test data" in shown.output
    assert "s per score" not in shown.output


def test_a_merge_without_test_data_says_so(shop: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    task = "{{kind: multiple_choice, metric: probability, validation: {}/data/{}.validation.jsonl}}"
    tasks = ", ".join(f"{each}: {task.format(root, each)}" for each in ("en", "zh"))
    given = [*sets(root, name, tmp_path / "out"), "options.density=1.0", "options.scale=1.0"]
    flags = [p for c in [*given, f"tasks={{{tasks}}}"] for p in ("--set", c)]
    shown = CliRunner().invoke(app, ["merge", str(RECIPES / name), *flags])
    assert shown.exit_code == 0, shown.output
    assert "no test data: these scores are of the rows that decided the merge" in shown.output
    assert "Test scores" not in shown.output
    assert "gain kept" not in shown.output


def test_a_merge_that_looks_at_no_score_says_so_and_helpers_are_silent(
    shop: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, name = shop("two_tasks.yaml"), "model_wise_only.yaml"
    given = [*workshop.pointed(root, name), "rank=exact"]
    flags = [p for c in given for p in ("--set", c)]

    def merged(out: Path) -> str:
        shown = CliRunner().invoke(app, ["merge", str(RECIPES / name), *flags, "--out", str(out)])
        assert shown.exit_code == 0, shown.output
        return shown.output

    told = " ".join(merged(tmp_path / "one").split())
    assert "nothing was scored" in told
    assert "relative error of the export" in told
    assert f"merged adapter, report and recipe: {tmp_path / 'one'}" in told
    # A process of several that only helps.
    monkeypatch.setattr("peft_himerge.processes.is_main", lambda: False)
    assert "nothing was scored" not in merged(tmp_path / "two")


def test_a_merge_that_looks_at_no_score_has_a_plan_and_no_sweep(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("drop_in_ties.yaml"), "drop_in_ties.yaml"
    given = sets(root, name, tmp_path / "out")
    flags = [p for c in given for p in ("--set", c)]
    shown = CliRunner().invoke(app, ["plan", str(RECIPES / name), *flags])
    assert shown.exit_code == 0, shown.output
    assert "ties: no score decides this merge; its cost is its arithmetic" in shown.output
    assert "4 states x 2 tasks = 8 scores of test data" in shown.output
    told = read_recipe(RECIPES / name, workshop.pointed(root, name))
    own_file = tmp_path / name
    own_file.write_text(yaml.safe_dump(told.model_dump(exclude_defaults=True)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a sweep needs scores, but .*drop_in_ties\.yaml"):
        sweep_recipe(own_file, None, None)


def test_validate_tells_the_faults_of_a_file_that_cannot_be_read_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "broken.yaml").write_text("adapters: [", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes("out: gemischt für".encode("latin-1"))
    shown = CliRunner().invoke(app, ["validate", "broken.yaml", "latin.yaml"])
    assert shown.exit_code == 2, shown.output
    assert "broken.yaml" in shown.output
    assert "this is no text in UTF-8" in shown.output
    assert shown.output.split("\n")[-2] == "2 faults"


def test_warnings_are_shown_and_markup_in_names_does_no_harm(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    given = [*sets(root, name, tmp_path / "o"), f"tasks.en.test={root}/data/en.validation.jsonl"]
    flags = [p for c in [*given, "tasks.[red]={kind: x}"] for p in ("--set", c)]
    shown = CliRunner().invoke(app, ["validate", str(RECIPES / name), *flags])
    assert shown.exit_code == 2
    assert "tasks.[red]" in shown.output
    shown = CliRunner().invoke(app, ["validate", str(RECIPES / name), *flags[:-2]])
    assert shown.exit_code == 0
    assert "warning" in shown.output


def test_a_sweep_starts_from_what_a_recipe_says_and_nothing_else(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    root, name = shop("scores_alone.yaml"), "scores_alone.yaml"
    more = ["options={variant: joint, search_target: own, scale: {en: 0.5, zh: 1.0}, "]
    more[0] += "density: {en: 1.0, zh: 0.5}}"
    told = read_recipe(RECIPES / name, [*workshop.pointed(root, name), *more])
    (tmp_path / name).write_text(
        yaml.safe_dump(told.model_dump(exclude_defaults=True)), encoding="utf-8"
    )
    options, model, folders, eval_fns = sweep_recipe(tmp_path / name, None, None)
    assert options == {
        "variant": "joint",
        "search_target": "own",
        "scale": {"en": 0.5, "zh": 1.0},
        "density": {"en": 1.0, "zh": 0.5},
        "rank": "auto",
        "metric": {"en": "calibrated_probability", "zh": "calibrated_probability"},
    }
    assert set(eval_fns) == set(folders) == set(model.peft_config) == {"en", "zh"}


def test_a_sweep_varies_the_options_of_a_recipe(
    shop: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    root, name = shop("two_tasks.yaml"), "two_tasks.yaml"
    told = read_recipe(RECIPES / name, sets(root, name, tmp_path / "out"))
    given = told.model_dump(exclude_defaults=True)
    (tmp_path / name).write_text(yaml.safe_dump(given), encoding="utf-8")
    sweep = (RECIPES / "local_sweep.yaml").read_text(encoding="utf-8")
    (tmp_path / "local_sweep.yaml").write_text(sweep, encoding="utf-8")
    args = ["--study", tmp_path / "s.db", "--trials", "2", "--out", tmp_path / "best"]
    shown = CliRunner().invoke(app, ["sweep", str(tmp_path / "local_sweep.yaml"), *map(str, args)])
    assert shown.exit_code == 0, shown.output
    assert "Best score" in shown.output
    report = json.loads((tmp_path / "best" / "report.json").read_text(encoding="utf-8"))
    assert set(report["scores"]["merged"]) == {"en", "zh"}
    both = sweep.replace("  himerge.density:", "  himerge.base: {value: x}\n  himerge.density:")
    (tmp_path / "both.yaml").write_text(both, encoding="utf-8")
    refused = CliRunner().invoke(app, ["sweep", str(tmp_path / "both.yaml"), *map(str, args)])
    assert isinstance(refused.exception, ConfigError)
    assert "which says base and adapters" in str(refused.exception)
