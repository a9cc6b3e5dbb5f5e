"""The benchmark: its cells are what a user would get by hand, and are computed once."""

from __future__ import annotations

import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bytewise
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_himerge.bench.run as run_room
from peft_himerge import HiMergeConfig, focus_adapters, merge_adapters_hi
from peft_himerge.bench import own, run_bench
from peft_himerge.bench.lineup import ABLATIONS, LINEUP, choose
from peft_himerge.bench.run import Options
from peft_himerge.bench.studies import studies
from peft_himerge.bench.table import (
    Line,
    overview,
    read_settings,
    render,
    repeats,
    summarise,
)
from peft_himerge.bench.tasks import load_tasks
from peft_himerge.bench.train import train_tasks
from peft_himerge.cli import app
from peft_himerge.demo.loop import TrainSettings
from peft_himerge.demo.questions import Splits
from peft_himerge.errors import ConfigError
from peft_himerge.evals import MultipleChoiceRow, likelihood, load_rows, multiple_choice
from peft_himerge.methods.registry import get_method

ROWS, TEST = 6, 10
SIZES = Options(rows=ROWS, test_rows=TEST, budget=8, batch_size=8, max_new_tokens=4)
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
METRICS = ("accuracy", "calibrated_probability", "probability", "log_likelihood")
NAMES = ("plain_sum", "ties", "knots_ties", "hi_paper", "hi_focused")


def _choices(seed: int, count: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 100, (count,), generator=draw).tolist()
    return [{"prompt": f"{n} is", "choices": [" a", " b", " c"], "answer": n % 3} for n in numbers]


def _texts(seed: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i + seed}:", "references": ["ab", f"{i} a"]} for i in range(count)]


def _training_texts(seed: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i + seed}:", "target": f" {i} a"} for i in range(count)]


def vars_of(options: Options) -> list[str]:
    return [n for n in options.__slots__ if n != "guide" and getattr(options, n) is not None]


def _demo_rows(seed: int) -> list[MultipleChoiceRow]:
    rows = _choices(seed, 12)
    return [MultipleChoiceRow(r["prompt"], tuple(r["choices"]), r["answer"]) for r in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters and three tasks in folders."""
    root = tmp_path_factory.mktemp("bench")
    base = bytewise.llama()
    base.save_pretrained(root / "base")
    bytewise.tokenizer().save_pretrained(root / "base")
    names = ("one", "two", "text")
    specs = {
        name: {"r": 2, "seed": i, "init_scale": 0.4, "target_modules": LINEAR}
        for i, name in enumerate(names)
    }
    model = tiny.add_adapters(base, specs)
    for name in names:
        model.save_pretrained(root / "saved", selected_adapters=[name])
        shutil.copytree(root / "saved" / name, root / "adapters" / name)
    for i, name in enumerate(names):
        make = _texts if name == "text" else _choices
        for j, (split, count) in enumerate((("validation", 20), ("test", 30))):
            path = root / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) for row in make(10 * i + j, count)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def bench(root: Path, out: Path, settings: list[list[str]], **more: Any) -> tuple[Path, list[str]]:
    said: list[str] = []
    cells = run_bench(
        root / "base",
        root / "adapters",
        root / "data",
        out,
        settings=settings,
        say=said.append,
        **{"contenders": NAMES, "options": SIZES, **more},
    )
    return cells, said


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    cells, _ = bench(root, root / "out", [["one", "two"], ["two", "text"]])
    return cells


def _drawn(root: Path, task: str, kind: str, seed: int = 0) -> list[Any]:
    every = load_rows(root / "data" / task, kind, split="validation")
    return random.Random(seed).sample(every, ROWS)


def _accuracy(model: Any, task: str, root: Path) -> float:
    rows = load_rows(root / "data" / task, "multiple_choice", split="test", limit=TEST)
    scored = multiple_choice(rows, bytewise.tokenizer(), batch_size=4)
    with torch.no_grad():
        return float(scored(model)["accuracy"].mean())


def test_states_are_what_plain_peft_scores(root: Path, done: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    lines = {line.name: line for line in read_settings(done)["one+two"]}
    for task in ("one", "two"):
        assert lines["base"].values[task][0] == pytest.approx(_accuracy(base, task, root))
    model = PeftModel.from_pretrained(base, str(root / "adapters" / "two"))
    assert lines["two"].values["one"][0] == pytest.approx(_accuracy(model.eval(), "one", root))


def test_text_is_chosen_by_likelihood_and_judged_by_what_is_written(root: Path) -> None:
    tokenizer, model = bytewise.tokenizer(), bytewise.llama()
    sizes = {"rows": ROWS, "test_rows": TEST, "max_new_tokens": 4}
    smooth = load_tasks(root / "data", ["text"], tokenizer, **sizes)["text"]
    rows = _drawn(root, "text", "likelihood")
    by_hand = likelihood(rows, tokenizer, max_references=1, with_end=True)(model)
    chosen_by = smooth.validation(model)[smooth.guide]
    torch.testing.assert_close(chosen_by, by_hand["probability"])
    measured = load_tasks(root / "data", ["text"], tokenizer, guide="measure", **sizes)["text"]
    assert (measured.guide, smooth.measure) == ("text_match", "text_match")
    assert len(measured.validation(model)["text_match"]) == ROWS
    assert smooth.test(model)["text_match"] == measured.test(model)["text_match"]


def test_the_seed_draws_validation_rows_and_test_rows_stay(root: Path) -> None:
    tokenizer, model = bytewise.tokenizer(), bytewise.llama()
    sizes = {"rows": ROWS, "test_rows": TEST}
    task, same, other, whole = (
        load_tasks(root / "data", ["one"], tokenizer, **{**sizes, **more})["one"]
        for more in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "rows": 1000})
    )
    by_hand = multiple_choice(_drawn(root, "one", "multiple_choice", seed=1), tokenizer)(model)
    torch.testing.assert_close(task.validation(model)["probability"], by_hand["probability"])
    assert task.validation.fingerprint == same.validation.fingerprint
    assert task.validation.fingerprint != other.validation.fingerprint
    assert task.test.fingerprint == other.test.fingerprint
    assert len(whole.validation(model)["accuracy"]) == 20  # all there are


def test_a_contender_is_what_its_merge_by_hand_scores(root: Path, done: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(base, str(root / "adapters" / "one"), adapter_name="one")
    model.load_adapter(str(root / "adapters" / "two"), adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    summed = {task: _accuracy(model.eval(), task, root) for task in ("one", "two")}
    lines = {line.name: line for line in read_settings(done)["one+two"]}
    assert {t: v for t, (v, _) in lines["plain_sum"].values.items()} == pytest.approx(summed)
    tokenizer = bytewise.tokenizer()
    validation = {
        task: multiple_choice(_drawn(root, task, "multiple_choice"), tokenizer, batch_size=8)
        for task in ("one", "two")
    }
    found = merge_adapters_hi(
        model,
        ["one", "two"],
        validation,
        config=HiMergeConfig(
            variant="paper", metric="calibrated_probability", max_export_drop=None
        ),
    )
    cell = json.loads((done / "merges" / "one+two" / "hi_paper.json").read_text())
    assert cell["chosen"]["plan"] == found.plan.to_dict()
    assert cell["scores_computed"] == found.scores_computed
    model.set_adapter("merged")
    exported = {t: row["value"] for t, row in cell["test_exported"].items()}
    assert exported == pytest.approx({t: _accuracy(model, t, root) for t in ("one", "two")})


def test_tasks_that_generate_may_have_fewer_test_rows(root: Path) -> None:
    names = ["one", "text"]

    def prints(**sizes: int) -> list[str]:
        tasks = load_tasks(root / "data", names, bytewise.tokenizer(), rows=4, **sizes)
        return [tasks[name].test.fingerprint for name in names]  # type: ignore[attr-defined]

    nine, three = prints(test_rows=9), prints(test_rows=3)
    assert prints(test_rows=9, text_rows=3) == [nine[0], three[1]]
    assert nine[0] != three[0]
    assert nine[1] != three[1]


def test_what_is_chosen_is_the_best_that_was_tried_on_validation(done: Path) -> None:
    cell = json.loads((done / "merges" / "one+two" / "ties.json").read_text())
    assert cell["scores_computed"] <= SIZES.budget
    assert set(cell["chosen"]["options"]) == {"density"}
    assert cell["options"]["budget"] == 8


def test_a_task_of_texts_is_judged_by_the_mean_of_four_measures(done: Path) -> None:
    cell = json.loads((done / "states" / "two" / "text.json").read_text())
    metrics = cell["test"]["text"]["metrics"]
    four = [metrics[name] for name in ("bleu", "rouge1", "rouge2", "rougeL")]
    assert cell["test"]["text"]["value"] == pytest.approx(sum(four) / 4)


def test_a_second_run_computes_nothing_and_another_adapter_only_its_own(
    root: Path, done: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    before = {p: p.read_bytes() for p in (copy / "out" / "cells").rglob("*.json")}
    _, said = bench(copy, copy / "out", [["one", "two"], ["two", "text"]])
    assert said
    assert all(line.startswith("kept ") for line in said)
    assert {p: p.read_bytes() for p in (copy / "out" / "cells").rglob("*.json")} == before
    shutil.rmtree(copy / "adapters" / "one")
    shutil.copytree(copy / "adapters" / "text", copy / "adapters" / "one")
    _, said = bench(copy, copy / "out", [["one", "two"], ["two", "text"]])
    again = [line for line in said if not line.startswith("kept ")]
    assert len(again) == 2 + len(NAMES)  # its two states, and the merges of its setting
    assert all(line.startswith(("states/one/", "merges/one+two/")) for line in again)


def test_tables_hold_ranks_shares_and_all_settings(done: Path) -> None:
    settings = read_settings(done)
    assert list(settings) == ["one+two", "two+text"]
    for lines in settings.values():
        ranked = [line for line in lines if line.rank is not None]
        assert [line.name for line in ranked] == list(NAMES)
        ordered = sorted(ranked, key=lambda line: -line.mean)
        assert [x.rank for x in ordered] == sorted(x.rank or 0 for x in ranked)
        assert sum(x.rank or 0 for x in ranked) == 15  # ties share: 1 + 2 + 3 + 4 + 5 whatever
        base = lines[0]
        assert base.name == "base"
        assert math.isnan(base.kept) or base.kept == 0.0
    best = summarise(settings)[0]
    assert best.settings == 2
    assert best.rank == min(s.rank for s in summarise(settings))
    text = render(done)
    assert text.startswith("**All 2 settings**")
    first, second = (x.mean for n in settings for x in settings[n] if x.title == best.title)
    up = (first + second) / 2 - sum(lines[0].mean for lines in settings.values()) / 2
    kept = "" if math.isnan(best.kept) else f"{best.kept:.0%}"
    places = f"{up:+.3f} | {kept} | {best.rank:.1f}"
    row = f"| {best.title} | {first:.3f} | {second:.3f} | {places} |"
    assert row in text
    own = [line.values[line.name][0] for line in settings["one+two"] if line.name in ("one", "two")]
    assert f"| each adapter alone, on its own task | {sum(own) / 2:.3f} |" in text
    assert "Hi-Merging, as published, LoRA of rank" in text


def test_share_kept_is_relative_to_each_adapter_alone(tmp_path: Path) -> None:
    def cell(place: str, **values: float) -> None:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        test = {task: {"value": v, "se": 0.01} for task, v in values.items()}
        path.write_text(json.dumps({"test": test, "scores_computed": 4}))

    for state, a, b in (("base", 0.2, 0.0), ("a", 0.8, 0.1), ("b", 0.1, 0.5), ("a+b", 0.7, 0.5)):
        cell(f"states/{state}/a.json", a=a)
        cell(f"states/{state}/b.json", b=b)
    cell("merges/a+b/ties.json", a=0.5, b=0.5)
    lines = {line.name: line for line in read_settings(tmp_path)["a+b"]}
    assert lines["ties"].kept == pytest.approx((0.5 + 1.0) / 2)
    assert lines["a"].kept == pytest.approx((1.0 + 0.2) / 2)
    assert lines["a+b"].title == "trained on the mixed data"
    assert lines["ties"].rank == 1.0
    assert overview(tmp_path) == ""
    cell("merges/b+a/average.json", a=0.4, b=0.4)
    table = overview(tmp_path).splitlines()
    assert "| trained on the mixed data | 0.600 |  |  |  |  |" in table
    assert "| TIES | 0.500 |  |  |  |  |" in table
    assert "| average |  | 0.400 |  |  |  |" in table


def test_average_ranks_are_among_those_of_every_setting() -> None:
    def line(name: str, mean: float) -> Line:
        return Line(name, name, {"t": (mean, None)}, mean, 1.0, rank=9.0)

    first = [line("ties", 0.5), line("average", 0.6), line("wudi", 0.7), line("widen", 0.55)]
    found = summarise({"a": first, "b": [line("ties", 0.5), line("average", 0.4)]})
    assert {s.title: s.rank for s in found} == {"ties": 1.5, "average": 1.5}
    assert {s.title: s.mean for s in found} == pytest.approx({"ties": 0.5, "average": 0.5})


def test_command_line_makes_the_same_cells_and_a_table(root: Path, done: Path) -> None:
    out = root / "by_command"
    shutil.copytree(root / "out", out)
    folders = [f"--{name}={root / name}" for name in ("base", "adapters", "data")]
    sizes = [f"--{n.replace('_', '-')}={getattr(SIZES, n)}" for n in vars_of(SIZES)]
    chosen = [f"--method={name}" for name in NAMES]
    settings = ["--setting=one+two", "--setting=two+text"]
    ran = CliRunner().invoke(app, ["bench", f"--out={out}", *folders, *settings, *chosen, *sizes])
    assert ran.exit_code == 0, ran.output
    assert "states/base/one.json" in ran.output
    assert (out / "bench.md").read_text() == render(done)
    assert "kept merges/one+two/ties.json" in ran.output


def test_command_line_wants_all_folders_or_none(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["bench", f"--out={tmp_path}", "--setting=a+b"])
    assert isinstance(ran.exception, ConfigError)
    assert "need all of --base, --adapters, --data and --setting" in str(ran.exception)


def test_without_folders_the_bench_is_of_the_demo(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's tasks, cut to a tiny base that reads bytes and adapters made for it."""
    tasks = {
        name: Splits(*(_demo_rows(seed + i) for i in range(3)))
        for seed, name in enumerate(("en", "zh"))
    }
    folders = {"en": root / "adapters" / "one", "zh": root / "adapters" / "two"}
    monkeypatch.setattr(own, "load_tasks", lambda: tasks)
    monkeypatch.setattr(own, "adapter_dirs", lambda: folders)
    said: list[str] = []
    cells = own.run_own(
        tmp_path, base=root / "base", contenders=["ties"], options=SIZES, say=said.append
    )
    lines = {line.name: line for line in read_settings(cells)["en+zh"]}
    assert set(lines) == {"base", "en", "zh", "ties"}
    assert len(said) == 7
    sizes = [f"--{n.replace('_', '-')}={getattr(SIZES, n)}" for n in vars_of(SIZES)]
    command = ["bench", f"--out={tmp_path}", f"--base={root / 'base'}", "--method=ties", *sizes]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert ran.output.count("kept states/") == 6  # the same cells, none computed again
    assert ran.output.count("kept merges/") == 1
    assert (tmp_path / "bench.md").read_text() == render(cells)


@pytest.mark.parametrize(
    ("settings", "more", "text"),
    [
        ([["one"]], {}, "two or more different tasks"),
        ([["one", "one"]], {}, "two or more different tasks"),
        ([], {}, "at least one setting"),
        ([["one", "nine"]], {}, "no adapter of task 'nine'"),
        ([["one", "two"]], {"contenders": ["tie"]}, "no contender 'tie'. Did you mean 'ties'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    root: Path, tmp_path: Path, settings: Any, more: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        bench(root, tmp_path / "out", settings, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "guide", "text"),
    [
        (
            "one",
            "smoothly",
            r"guide must be one of \['measure', 'probability', 'smooth'\], got 'smoothly'",
        ),
        ("nowhere", "smooth", "there is no task 'nowhere'.*validation.jsonl and test.jsonl"),
        ("odd", "smooth", "rows with 'choices' .* the first row has neither"),
        ("empty", "smooth", "the first row has neither"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(
    root: Path, tmp_path: Path, task: str, guide: str, text: str
) -> None:
    for name, content in (("odd", '{"text": "a"}\n'), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "validation.jsonl").write_text(content)
    data = root / "data" if task == "one" else tmp_path
    with pytest.raises(ConfigError, match=text):
        load_tasks(data, [task], bytewise.tokenizer(), rows=2, test_rows=2, guide=guide)


def test_no_cells_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cells of a benchmark"):
        render(tmp_path)


def test_every_contender_can_merge_at_any_point_it_may_choose(root: Path, tmp_path: Path) -> None:
    names = [contender.name for contender in LINEUP if contender.hi is None]
    more = {"contenders": names, "options": replace(SIZES, rows=2, test_rows=2, budget=60)}
    cells, _ = bench(root, tmp_path, [["one", "two"]], **more)
    ranked = [line.name for line in read_settings(cells)["one+two"] if line.rank is not None]
    assert ranked == names


def test_every_contender_of_the_lineup_is_there_once_and_its_options_exist() -> None:
    names = [contender.name for contender in LINEUP]
    assert len(set(names)) == len(names)
    layers = [f"model.layers.{i}" for i in range(4)]
    for contender in LINEUP:
        if contender.hi is None:
            get_method(contender.method).check(contender.options(["one", "two"], layers))
    assert "slerp" not in [c.name for c in choose((), 3)]
    assert [c.name for c in choose(("ties", "average"), 2)] == ["average", "ties"]
    with pytest.raises(ConfigError, match=r"'hi_model_wize'.*Did you mean 'hi_model_wise'"):
        choose(("hi_model_wize",), 2)


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [
        (1, ["X.", ".X"]),
        (3, ["X.X.", ".X.X"]),
        (5, ["Xh.hX.", ".hXh.X", "XXhhX.", "..hh.X"]),
        (
            18,
            [
                *("XXXh............hX.", "...hXXXXXXXXXXXXh.X"),
                *("XXXXXXh........hXX.", "......hXXXXXXXXh..X"),
            ],
        ),
    ],
)
def test_layer_swapping_may_choose_either_way_round_and_two_widths(
    blocks: int, shown: list[str]
) -> None:
    """X is whole, h half, a point nothing of adapter "a"; what is outside the blocks comes last."""
    swapping = next(contender for contender in LINEUP if contender.swaps)
    layers = [*(f"model.layers.{i}" for i in range(blocks)), "outside"]
    made = swapping.options(["a", "b"], layers)["assignment"]
    letters = {0.0: ".", 0.5: "h", 1.0: "X"}
    assert ["".join(letters[one[label]["a"]] for label in layers) for one in made] == shown
    for one in made:
        assert all(share["a"] + share["b"] == 1.0 for share in one.values())


def test_layer_swapping_takes_its_shares_of_every_kind_of_block() -> None:
    swapping = next(contender for contender in LINEUP if contender.swaps)
    encoder, decoder = ([f"{kind}.block.{i}" for i in range(3)] for kind in ("encoder", "decoder"))
    both = swapping.options(["a", "b"], [*encoder, "outside", *decoder])["assignment"]
    for kind in (encoder, decoder):
        alone = swapping.options(["a", "b"], [*kind, "outside"])["assignment"]
        assert [{x: one[x] for x in (*kind, "outside")} for one in both] == alone


def test_ablations_change_options_of_one_variant_and_are_run_when_named() -> None:
    assert choose(("ablations",), 2) == ABLATIONS
    assert [c.name for c in choose(("hi_two_se", "ties"), 2)] == ["ties", "hi_two_se"]
    assert choose((), 2) == LINEUP
    whole = {c.hi.model_dump_json() for c in LINEUP if c.hi}
    made = [c.hi.model_dump_json() for c in ABLATIONS if c.hi]
    assert len({*made, *whole}) == len(ABLATIONS) + len(whole)


def test_ablations_have_a_table_of_their_own_and_no_rank(root: Path, tmp_path: Path) -> None:
    names = ("plain_sum", "hi_paper", "hi_model_wise", "hi_layer_wise")
    cells, _ = bench(root, tmp_path, [["one", "two"]], contenders=names)
    lines = {line.name: line for line in read_settings(cells)["one+two"]}
    assert {n for n, line in lines.items() if line.rank is not None} == {"plain_sum", "hi_paper"}
    place = cells / "merges" / "one+two"
    found = {n: json.loads((place / f"{n}.json").read_text())["chosen"] for n in names[2:]}
    assert found["hi_model_wise"]["layers_edited"] == 0
    whole = {"density": 1.0, "scale": 1.0}
    assert found["hi_layer_wise"]["adapters"] == {"one": whole, "two": whole}
    first, second = render(cells).split("**one+two: one option changed**")
    assert "model-wise only" in second
    assert "| Hi-Merging, as published |" in second
    assert "model-wise only" not in first
    assert "plain sum" not in second


def test_quick_is_a_small_run_of_everybody(root: Path, tmp_path: Path) -> None:
    folders = [f"--{name}={root / name}" for name in ("base", "adapters", "data")]
    command = ["bench", f"--out={tmp_path}", *folders, "--setting=one+two", "--quick"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    ranked = [x.name for x in read_settings(tmp_path / "cells")["one+two"] if x.rank is not None]
    assert ranked == [contender.name for contender in LINEUP]
    for path in (tmp_path / "cells" / "merges").rglob("*.json"):
        cell = json.loads(path.read_text())
        sizes = {name: cell["options"][name] for name in ("rows", "test_rows", "budget")}
        assert sizes == {"rows": 16, "test_rows": 32, "budget": 8}
        assert cell["scores_computed"] <= 8 or path.stem.startswith("hi_")


def test_script_says_how_stable_the_analysis_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [f"--{n}={root / n}" for n in ("base", "adapters", "data")]
    out = tmp_path / "found.json"
    sizes = ["--rows=16", "--draws=2", f"--out={out}"]
    _run_script("stability.py", ["one", "two", *folders, *sizes], monkeypatch)
    told = json.loads(out.read_text())
    assert (told["setting"], told["rows"], set(told["stability"])) == (
        "one+two",
        16,
        {"0.0", "2se"},
    )
    for rows in told["stability"].values():
        assert [(r["metric"], r["rows"]) for r in rows] == [(metric, 8) for metric in METRICS]
        assert all(0 <= r["kinds"] <= 1 and -1 <= r["order"] <= 1 for r in rows)


def _run_script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "examples" / "bench" / name
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def test_script_draws_the_surface_of_single_adapters(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [f"--{n}={root / n}" for n in ("base", "adapters", "data")]
    out = tmp_path / "found.json"
    _run_script("surface.py", ["one", *folders, "--rows=1000", f"--out={out}"], monkeypatch)
    (points,) = json.loads(out.read_text())["surfaces"].values()
    assert len({(p["density"], p["scale"]) for p in points}) == len(points) == 70
    # The point that changes nothing is the adapter itself, as plain PEFT has it.
    (whole,) = (p for p in points if (p["density"], p["scale"]) == (1.0, 1.0))
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(base, str(root / "adapters" / "one")).eval()
    rows = load_rows(root / "data" / "one", "multiple_choice", split="validation")
    alone = multiple_choice(rows, bytewise.tokenizer())(model)["accuracy"].mean()
    assert whole["score"] == pytest.approx(float(alone))


def test_script_exports_a_cells_plan_at_every_rank(
    root: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [f"--{n}={root / n}" for n in ("base", "adapters", "data")]
    out = tmp_path / "found.json"
    more = [f"--cells={done}", "--contender=hi_paper", f"--test-rows={TEST}", f"--out={out}"]
    _run_script("ranks.py", ["one+two", *folders, *more], monkeypatch)
    rows = json.loads(out.read_text())["settings"]["one+two"]
    cell = json.loads((done / "merges" / "one+two" / "hi_paper.json").read_text())
    assert [row["asked"] for row in rows] == [4, 8, 16, 32, 64, "exact"]
    errors = [row["export_error"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0.0, abs=1e-5)
    exact = {task: row["value"] for task, row in rows[-1]["test"].items()}
    assert exact == pytest.approx({task: row["value"] for task, row in cell["test"].items()})


def _train(root: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run the script as a user would, in a process of its own; returns name -> training.json."""
    script = Path(__file__).parents[1] / "examples" / "bench" / "train.py"
    folders = [f"--{n}={p}" for n, p in (("base", root / "base"), ("data", root / "data"))]
    command = [sys.executable, str(script), *folders, f"--out={out}", "--steps=2", *more]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ})
    told = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/training.json")}
    assert all((out / name / "adapter_model.safetensors").is_file() for name in told)
    return told


def test_training_script_makes_adapters_and_mixes_that_the_bench_takes(
    root: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    for name, make in (("one", _choices), ("text", _training_texts)):
        lines = [json.dumps(row) for row in make(50, 40)]
        (data / name / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = tmp_path / "root"
    place.mkdir()
    (place / "base").symlink_to(root / "base")
    (place / "data").symlink_to(data)
    told = _train(place, place / "adapters", "one", "text", "one+text")
    assert {name: t["settings"]["steps"] for name, t in told.items()} == {
        "one": 2,
        "text": 2,
        "one+text": 4,
    }
    assert told["one+text"]["rows"] == 64
    before = (place / "adapters" / "one" / "adapter_model.safetensors").stat().st_mtime_ns
    _train(place, place / "adapters", "one")
    assert (place / "adapters" / "one" / "adapter_model.safetensors").stat().st_mtime_ns == before
    cells, _ = bench(place, place / "out", [["one", "text"]], contenders=["average"])
    lines = [line.name for line in read_settings(cells)["one+text"]]
    assert lines == ["base", "one", "text", "one+text", "average"]


def test_training_minimises_the_answers_loss(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "one" / "train.jsonl"
    path.parent.mkdir(parents=True)
    row = json.dumps({"prompt": "say", "target": " it"})
    path.write_text("\n".join([row] * 64) + "\n", encoding="utf-8")
    losses = {}
    for steps in (1, 8):
        setting = TrainSettings(steps=steps, batch_size=8, learning_rate=3e-2, rank=4, alpha=8)
        out = tmp_path / str(steps)
        folder = train_tasks(
            root / "base", tmp_path / "data", ["one"], out, settings=setting, progress=False
        )
        losses[steps] = json.loads((folder / "training.json").read_text())["last_loss"]
    assert losses[8] < 0.9 * losses[1]


@pytest.mark.parametrize(
    ("row", "text"),
    [(None, "is no file"), ({"prompt": "a"}, "a row needs 'target'"), ({}, "give fewer steps")],
)
def test_rows_that_cannot_be_trained_on_are_refused(
    root: Path, tmp_path: Path, row: Any, text: str
) -> None:
    path = tmp_path / "one" / "train.jsonl"
    path.parent.mkdir(parents=True)
    if row is not None:
        path.write_text((json.dumps(row) + "\n") * (32 if row else 3), encoding="utf-8")
    setting = TrainSettings(steps=2, batch_size=16)
    with pytest.raises(ConfigError, match=text):
        train_tasks(root / "base", tmp_path, ["one"], tmp_path / "out", settings=setting)
    assert not (tmp_path / "out").exists()


def test_a_base_in_bfloat16_scores_what_transformers_scores_in_it(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="got 'float16'"):
        bench(root, tmp_path, [["one", "two"]], options=replace(SIZES, dtype="float16"))
    half = replace(SIZES, dtype="bfloat16")
    cells, _ = bench(root, tmp_path, [["one", "two"]], contenders=["average"], options=half)
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    lines = {line.name: line for line in read_settings(cells)["one+two"]}
    for task in ("one", "two"):
        assert lines["base"].values[task][0] == pytest.approx(_accuracy(base, task, root))


def test_repeats_are_the_mean_of_the_runs_and_their_spread(root: Path, tmp_path: Path) -> None:
    names = ("plain_sum", "average", "ties")
    runs = [
        bench(
            root,
            tmp_path / str(seed),
            [["one", "two"], ["two", "text"]][: 2 - seed],
            contenders=names[: 3 - seed],
            options=replace(SIZES, seed=seed),
        )[0]
        for seed in (0, 1)
    ]
    lines = [{x.title: x.mean for x in read_settings(run)["one+two"]} for run in runs]
    header, _, *rows = repeats(runs).splitlines()
    assert header == "| mean of 2 runs | one+two | all |"  # what both have
    assert {row.split(" | ")[0][2:] for row in rows} == {"plain sum", "average"}
    for row in rows:
        title, told, whole = row.strip("| ").split(" | ")
        both = [found[title] for found in lines]
        mean = sum(both) / 2
        spread = abs(both[0] - both[1]) / math.sqrt(2)  # of two, with n - 1
        assert told == f"{mean:.3f} ± {spread:.3f}"
        assert whole == f"{mean:.3f}"
    for wrong in (runs[:1], []):
        with pytest.raises(ConfigError, match="two or more runs of the same settings"):
            repeats(wrong)


def test_rounds_and_relative_errors_reach_the_focus(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def heard(*given: Any, **options: Any) -> dict[str, str]:
        told.append(options)
        return focus_adapters(*given, **options)

    monkeypatch.setattr(run_room, "focus_adapters", heard)
    names = ("plain_sum", "regmean", "regmean_pp", "regmean_relative")
    cells, _ = bench(root, tmp_path, [["one", "two"]], contenders=names)
    assert told == [
        {"rounds": 1, "relative": False},
        {"rounds": 2, "relative": False},
        {"rounds": 2, "relative": True},
    ]
    made = [json.loads(p.read_text()) for p in (cells / "merges" / "one+two").glob("*.json")]
    assert len({cell["key"] for cell in made}) == len(names)


def test_a_cell_is_run_again_if_adapters_are_focused_otherwise(
    root: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "cells")
    monkeypatch.setattr(run_room, "USUAL", {"rounds": 1, "relative": False})
    _, said = bench(root, tmp_path, [["one", "two"]], contenders=("hi_paper", "hi_focused"))
    new = [line for line in said if not line.startswith("kept ")]
    assert len(new) == 1
    assert "merges/one+two/hi_focused" in new[0]


def test_studies_say_what_the_scripts_found(
    root: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert studies(tmp_path) == ""
    folders = [f"--{n}={root / n}" for n in ("base", "adapters", "data")]
    sizes = [*folders, "--rows=16"]
    made = ("stability", "surface", "ranks", "overlap")
    out = {name: f"--out={tmp_path / name}.json" for name in made}
    _run_script("stability.py", ["one", "two", *sizes, "--draws=2", out["stability"]], monkeypatch)
    _run_script("surface.py", ["one", *sizes, out["surface"]], monkeypatch)
    more = [f"--cells={done}", "--contender=hi_paper", out["ranks"]]
    _run_script("ranks.py", ["one+two", *folders, *more], monkeypatch)
    _run_script("overlap.py", ["one", "two", folders[1], out["overlap"]], monkeypatch)
    shutil.copytree(done, tmp_path / "guides" / "measure")
    shutil.copytree(done, tmp_path / "several")
    shutil.copytree(done, tmp_path / "other_seed")
    shutil.copytree(done, tmp_path / "ablations")
    text = studies(tmp_path)
    assert render(done).strip() in text
    assert f"With {ROWS} validation and {TEST} test rows per task." in text
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in out}
    first = found["stability"]["stability"]["0.0"][0]
    assert f"| {first['metric']} | 8 | {first['kinds']:.0%} | {first['chance']:.0%} |" in text
    points = found["surface"]["surfaces"]["one"]
    whole = [p for p in points if p["density"] == 0.5]
    scores = " | ".join(f"{p['score']:.3f}" for p in whole)
    assert f"| 0.5 | {scores} |" in text
    exact = found["ranks"]["settings"]["one+two"][-1]
    assert f"| exact | {exact['rank']} | {exact['export_error']:.3f} |" in text
    pair = found["overlap"]["pairs"]["one+two"]
    assert f"| one+two | {pair['modules']} | {pair['mean']:.3f} | {pair['least']:.3f} |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## More than two adapters at once",
        "## One option of Hi-Merging changed",
        "## Chosen by another score: measure",
        "## How many examples the analysis needs",
        "## Density and scale of a single adapter",
        "## Rank of the exported adapter",
        "## Do the adapters read the same directions?",
        "## With an adapter of another seed",
    ]


def test_overlap_is_that_of_the_directions_whatever_their_size_and_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = torch.eye(8)[:2]
    turned = torch.tensor([[3.0, 4.0], [-8.0, 6.0]]) @ a  # the same two directions
    half = torch.stack([torch.eye(8)[0], (torch.eye(8)[1] + torch.eye(8)[2]) * 0.1])  # 45 degrees
    for name, factor in (("one", a), ("two", turned), ("three", half), ("four", torch.eye(8)[4:6])):
        (tmp_path / name).mkdir()
        weights = {"x.lora_A.weight": factor.contiguous(), "x.lora_B.weight": torch.ones(3, 2)}
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
    out = tmp_path / "found.json"
    names = ["one", "two", "three", "four"]
    _run_script("overlap.py", [*names, f"--adapters={tmp_path}", f"--out={out}"], monkeypatch)
    found = {pair: row["mean"] for pair, row in json.loads(out.read_text())["pairs"].items()}
    between = (1 + math.sqrt(0.5)) / 2
    want = {"one+two": 1.0, "one+three": between, "two+three": between, "one+four": 0.0}
    assert found == pytest.approx({**want, "two+four": 0.0, "three+four": 0.0}, abs=1e-6)


def test_states_are_kept_when_other_rows_are_drawn(root: Path, tmp_path: Path) -> None:
    setting = [["one", "two"]]
    for seed in (0, 1):
        more = {"contenders": ("ties",), "options": replace(SIZES, rows=3, seed=seed)}
        _, said = bench(root, tmp_path, setting, **more)
    kept = [line for line in said if line.startswith("kept")]
    assert len(kept) == 6
    assert all(line.startswith("kept states/") for line in kept)
    assert said[-1].startswith("merges/one+two/ties.json: ")
