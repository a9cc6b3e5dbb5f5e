"""Reports of methods other than Hi-Merging: what is saved, and side by side with Hi-Merging."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import oracle
import plotly.graph_objects as go
import pytest
import reports
import tiny
import torch
from snapshot import run_python
from test_page import rows_of, specs
from typer.testing import CliRunner

from peft_himerge import merge_adapters
from peft_himerge.cli import app
from peft_himerge.errors import ConfigError
from peft_himerge.page import parse_report, read_report, render_comparison, render_page
from peft_himerge.page.charts import charts_of
from peft_himerge.page.comparing import comparison_charts, comparison_tables
from peft_himerge.page.tables import tables_of

PAIR = ["zh", "en"]


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by TIES, saved."""
    folder = tmp_path_factory.mktemp("methods") / "ties"
    return reports.save_by_method(folder, density=0.4, weights=[1.0, 0.5])


@pytest.fixture(scope="module")
def hi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by Hi-Merging of the same adapters, saved, with test scores."""
    folder = tmp_path_factory.mktemp("methods") / "hi"
    return reports.with_test(reports.save_merge(folder, density=0.5, scale=1.0))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_report_is_written_and_nothing_is_said_that_was_not_looked_at(ties: Path) -> None:
    assert {path.name for path in ties.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("report.json", "report.md", "report.html"),
    }
    text = (ties / "report.html").read_text(encoding="utf-8")
    assert {spec["id"] for spec in specs(text)} == {"norms", "cosine", "signs", "errors", "spectra"}
    assert "merged into one LoRA adapter by TIES-Merging." in text
    for absent in ("Plan <code>", "s-layers", "s-scores", "s-search", "s-test", "Hi-Merging"):
        assert absent not in text.split('<script type="application/json"')[0], absent
    story = (ties / "report.md").read_text(encoding="utf-8")
    assert story.startswith("# Merge report: merged\n")
    assert "| density | 0.4 |" in story
    assert "| en | 0.5 |" in story
    rows = rows_of(text)
    assert ["zh", "1"] in rows
    assert ["en", "0.5"] in rows
    assert ["density", "0.4"] in rows
    assert ["space", "full"] in rows


def test_the_numbers_of_the_deltas_are_those_of_dense_float64(ties: Path) -> None:
    facts = read(ties)
    model = tiny.peft_model("llama", 2, torch.float32)
    source = {name: oracle.deltas(model, name) for name in PAIR}
    for layer in facts["geometry"]["layers"]:
        inside = {m for of in source.values() for m in of if oracle.layer_of(m) == layer["layer"]}
        squares = {
            name: sum(float(of[m].square().sum()) for m in inside if m in of)
            for name, of in source.items()
        }
        for name, norm in layer["norms"].items():
            assert norm == pytest.approx(math.sqrt(squares[name]), rel=1e-6)
        both = [m for m in inside if m in source["zh"] and m in source["en"]]
        dot = sum(float((source["zh"][m] * source["en"][m]).sum()) for m in both)
        for pair in layer["pairs"]:
            cosine = dot / math.sqrt(squares["zh"] * squares["en"])
            assert pair["cosine"] == pytest.approx(cosine, abs=1e-6)
    result = merge_adapters(model, PAIR, "ties", density=0.4, weights=[1.0, 0.5], rank=4)
    for told in facts["export"]["modules"]:
        exact = result.delta(told["module"]).double()
        assert told["norm"] == pytest.approx(float(exact.norm()), rel=1e-4)
        # Eckart-Young: what the best approximation of this rank keeps.
        want = torch.linalg.svdvals(exact)[:4]
        found = facts["geometry"]["singular_values"][told["module"]]
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), want[: len(found)], rtol=1e-3, atol=1e-5
        )
    assert facts["cost"]["scores"] == 0
    assert facts["cost"]["seconds"] > 0.0


def test_the_page_can_be_left_out_and_made_later(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    folder = merge_adapters(model, PAIR, "cat").save(tmp_path / "x", page=False)
    assert not (folder / "report.html").exists()
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert {spec["id"] for spec in specs(text)} == {"norms", "cosine", "signs", "spectra"}


def test_hi_by_the_common_door_gives_the_whole_report(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    options = {"density": 0.5, "scale": 1.0, "max_export_drop": None}
    fns = tiny.eval_fns("llama", PAIR)
    merged = merge_adapters(model, PAIR, "hi", eval_fns=fns, **options)
    folder = merged.save(tmp_path)
    assert (folder / "plan.json").is_file()
    assert read(folder) == json.loads(json.dumps(merged.to_dict())) | {
        "geometry": read(folder)["geometry"]
    }
    assert {"contributions", "conflicts"} <= {
        spec["id"] for spec in specs((folder / "report.html").read_text(encoding="utf-8"))
    }


def test_scores_that_chose_the_merge_are_shown_with_what_was_tried(tmp_path: Path) -> None:
    fns = {**tiny.eval_fns("llama", PAIR), "guard": lambda _: 0.25}
    model = tiny.peft_model("llama", 2, torch.float32)
    merged = merge_adapters(model, PAIR, "greedy_soup", eval_fns=fns, rank=4)
    report = read_report(merged.save(tmp_path))
    found = {task: told["value"] for task, told in merged.fitted["scores"].items()}
    assert report.scores == {"merged": found}
    assert report.cost.scores == merged.fitted["scores_computed"]
    tables = tables_of(report)
    (row,) = tables["scores"].rows
    assert row[0].text == "merged, exact"
    for cell, (task, value) in zip(row[1:4], found.items(), strict=True):
        assert cell.text.startswith(f"{value:.3f}"), task
    assert len(tables["tried"].rows) == len(merged.fitted["tried"])
    best = max(told["objective"] for told in merged.fitted["tried"])
    assert tables["tried"].rows[0][1].text == f"{best:.4f}"
    learned = {row[0].text: row[1].text for row in tables["fitted"].rows}
    assert learned["coefficients: zh"] == f"{merged.fitted['coefficients']['zh']:g}"
    assert "scores" not in "".join(learned).replace("scores_computed", "")
    assert "scores" in charts_of(report)
    assert render_page(report)


def test_options_without_a_word_in_json_are_told_as_text(tmp_path: Path) -> None:
    def louder(stacks: Any, *, by: Any = 1.0) -> Any:
        from peft_himerge.methods.linear import products, weighted_sum

        for stack in stacks:
            yield stack.module, weighted_sum(stack, products([2.0, 2.0], stack.weights))

    model = tiny.peft_model("llama", 2, torch.float32)
    for value, want in (
        (float("inf"), "inf"),
        ((1, Path("a")), [1, "a"]),
        ({3: None}, {"3": None}),
    ):
        merged = merge_adapters(model, PAIR, louder, by=value, overwrite=True)
        assert read(merged.save(tmp_path))["options"] == {"by": want}


def test_sources_trained_on_since_leave_the_report_without_geometry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.peft_model("llama", 2, torch.float32)
    merged = merge_adapters(model, PAIR, "cat")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A.zh" in n).add_(1.0)
    with caplog.at_level(logging.WARNING):
        merged.save(tmp_path)
    assert "changed since the merge" in caplog.text
    assert read(tmp_path)["geometry"] is None
    assert "s-deltas" not in (tmp_path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ side by side


def test_test_scores_have_a_chart_and_a_tile(ties: Path, tmp_path: Path) -> None:
    told = read(ties)
    (tmp_path / "report.json").write_text(json.dumps(told), encoding="utf-8")
    folder = reports.with_test(tmp_path, "ties")
    text = (folder / "report.html").read_text(encoding="utf-8")
    (spec,) = [spec for spec in specs(text) if spec["id"] == "test"]
    assert spec["data"][0]["x"] == pytest.approx([0.22, 0.42, 0.52, 0.62])
    assert spec["data"][0]["y"] == ["base model", "zh alone", "en alone", "exported adapter"]
    assert "<dt>mean test score</dt><dd>0.610</dd>" in text
    assert '<dd class="small">base 0.210</dd>' in text


def test_one_hi_merging_and_one_other_side_by_side(hi: Path, ties: Path, tmp_path: Path) -> None:
    other = tmp_path / "ties"
    other.mkdir()
    told = read(ties) | {"adapter_name": "by_ties"}
    (other / "report.json").write_text(json.dumps(told), encoding="utf-8")
    reports.with_test(other, "by_ties")
    args = ["report", "--compare", str(hi), str(other), "--out", str(tmp_path / "both.html")]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert text == render_comparison([hi, other])
    assert {spec["id"] for spec in specs(text)} == {"test", "scores", "gammas", "norms"}
    runs = {"hi": read_report(hi), "ties": read_report(other)}
    for chart in comparison_charts(runs).values():
        go.Figure(data=chart.data, layout=chart.layout)
    tables = comparison_tables(runs)
    cells = {(r[0].text, r[1].text): [c.text for c in r[2:]] for r in tables["test"].rows}
    assert cells["exported adapter", "zh"] == ["0.620 ± 0.020", "0.620 ± 0.020"]
    assert cells["base model", "en"] == ["0.200 ± 0.030", "0.200 ± 0.030"]
    assert all(row[-1].text == "–" for row in tables["scores"].rows)
    assert all(row[-1].text == "–" for row in tables["conflicts"].rows)
    told_apart = {row[0].text: [c.text for c in row[1:]] for row in tables["differences"].rows}
    assert told_apart["method"] == ["Hi-Merging", "TIES-Merging"]
    assert told_apart["option density"] == ["0.5", "0.4"]
    assert told_apart["weight of en"] == ["–", "0.5"]
    assert told_apart["plan"][1] == "–"
    norms = {row[0].text: [c.text for c in row[1:]] for row in tables["norms"].rows}
    for report, place in ((runs["hi"], 0), (runs["ties"], 1)):
        first = report.layers[0]
        squares = [
            (m.norm or 0.0) ** 2 for m in report.export.modules if m.module.startswith(f"{first}.")
        ]
        assert norms[first.rpartition(".")[2]][place] == f"{math.sqrt(sum(squares)):.4g}"


def test_two_methods_without_scores_are_compared_by_what_they_made(ties: Path) -> None:
    report = read_report(ties)
    runs = {"a": report, "b": report.model_copy(update={"weights": {"zh": 1.0, "en": 1.0}})}
    assert set(comparison_charts(runs)) == {"norms"}
    assert set(comparison_tables(runs)) == {"norms", "differences"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": {}}, "the adapters' weights are missing"),
        ({"cost": None}, "damaged: cost"),
        ({"format": "peft_himerge.report/1"}, "the plan is missing"),
    ],
)
def test_a_damaged_report_is_refused(ties: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_report(read(ties) | change)


WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from peft_himerge.cli import app
done = CliRunner().invoke(app, {arguments})
assert done.exit_code == 0, done.output
print(sorted({{"torch", "transformers", "peft", "accelerate"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["merge", "--help"], ["report", "DIR"], ["check", "DIR"]]
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str], ties: Path) -> None:
    given = [str(ties) if word == "DIR" else word for word in arguments]
    out = run_python(WITHOUT_TORCH.format(arguments=given))
    assert out.splitlines()[-1] == "[]"


def test_every_method_is_listed_by_whoever_asks_first() -> None:
    code = "from peft_himerge import list_methods; print([i.name for i in list_methods()])"
    names = run_python(code).splitlines()[-1]
    assert "'hi'" in names
    assert "'regmean'" in names
