"""The page of a report: every number of it, any name in it, and what makes it."""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import math
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import reports
import tiny
import torch
from typer.testing import CliRunner

from peft_himerge import HiMergeConfig, apply_plan, merge_adapters_hi, page
from peft_himerge.cli import app
from peft_himerge.errors import ConfigError, MissingExtraError
from peft_himerge.page import parse_report, read_report, render_comparison, render_page
from peft_himerge.page.charts import charts_of
from peft_himerge.page.comparing import comparison_charts, comparison_tables, run_names
from peft_himerge.page.facts import short_names
from peft_himerge.page.tables import tables_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real merge of a tiny model, saved."""
    return reports.save_merge(tmp_path_factory.mktemp("merge") / "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge with other options."""
    folder = tmp_path_factory.mktemp("merge") / "second"
    return reports.save_merge(folder, density=0.3, scale=0.8, accept="no_regression")


class _Reader(HTMLParser):
    """Tags in order, and the text of every table cell, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def specs(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found.group(1))


def rows_of(text: str) -> list[list[str]]:
    return _Reader(text).rows


# ---------------------------------------------------------------------------------- a saved merge


def test_save_writes_a_page_with_every_score_layer_and_module(merged: Path) -> None:
    text = (merged / "report.html").read_text(encoding="utf-8")
    facts = json.loads((merged / "report.json").read_text(encoding="utf-8"))
    rows = rows_of(text)
    for state, scored in facts["scores"].items():
        label = {"base": "base model", "merged": "merged, exact", "en": "en alone"}.get(state)
        if label is not None:
            (row,) = [r for r in rows if r[0] == label and "±" in r[1]]
            for cell, value in zip(row[1:], scored.values(), strict=False):
                assert cell.startswith(f"{value:.3f} ± ")
    for conflict in facts["conflicts"]:
        done = [r for r in rows if conflict["done"] in r and conflict["kind"] in r]
        assert any(f"{conflict['Gamma']:+.3f}" in r for r in done)
    for module in facts["export"]["modules"]:
        (row,) = [r for r in rows if r[0] == module["module"]]
        assert row[1] == f"{module['relative_error']:.2e}"
    drawn = {spec["id"] for spec in specs(text)}
    assert drawn == {
        *("scores", "contributions", "conflicts", "search-0", "search-1"),
        *("norms", "cosine", "signs", "errors", "spectra"),
    }


def test_report_json_holds_the_geometry_of_every_layer_and_module(merged: Path) -> None:
    facts = json.loads((merged / "report.json").read_text(encoding="utf-8"))
    found = facts["geometry"]
    layers = {row["layer"] for row in facts["contributions"]}
    assert {row["layer"] for row in found["layers"]} == layers
    for module in facts["export"]["modules"]:
        values = found["singular_values"][module["module"]]
        # ||delta||^2 is what the export kept and what it lost.
        kept = math.fsum(value**2 for value in values)
        lost = (module["relative_error"] * module["norm"]) ** 2
        assert kept + lost == pytest.approx(module["norm"] ** 2, rel=1e-3)
    assert facts["options"]["rank"] == 4
    assert facts["cost"]["blocks_run"] > facts["cost"]["blocks_skipped"] > 0


def test_the_page_loads_nothing_and_forbids_it(merged: Path) -> None:
    text = (merged / "report.html").read_text(encoding="utf-8")
    tags = _Reader(text).tags
    assert not [tag for tag, attrs in tags if tag in ("link", "img", "iframe") or "src" in attrs]
    policies = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'")
    assert [a["href"] for tag, a in tags if tag == "a" and not str(a["href"]).startswith("#")] == []


def test_a_page_can_be_left_out(tmp_path: Path) -> None:
    model = tiny.peft_model("llama", 1, torch.float32)
    config = HiMergeConfig(density=1.0, scale=1.0)
    fns = tiny.eval_fns("llama", ["zh"])
    result = merge_adapters_hi(model, ["zh"], fns, config=config)
    result.save(tmp_path / "a", page=False)
    assert not (tmp_path / "a" / "report.html").exists()
    # One adapter, and a plan applied without scores: less to show, but a page all the same.
    again = apply_plan(model, result.plan, adapter_name="again").save(tmp_path / "b")
    text = (again / "report.html").read_text(encoding="utf-8")
    assert {spec["id"] for spec in specs(text)} == {"norms", "spectra"}


def test_sources_trained_on_since_the_merge_leave_the_report_without_geometry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["zh", "en"]
    model = tiny.peft_model("llama", 2, torch.float32)
    config = HiMergeConfig(density=1.0, scale=1.0, accept="always")
    result = merge_adapters_hi(model, names, tiny.eval_fns("llama", names), config=config)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A.zh" in n).add_(1.0)
    with caplog.at_level(logging.WARNING):
        result.save(tmp_path)
    assert "changed since the merge" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["geometry"] is None
    assert (tmp_path / "report.html").exists()


def test_without_plotly_everything_else_is_saved_and_one_line_says_how(
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "plotly" else real(name)
    )
    assert not page.available()
    with caplog.at_level(logging.WARNING):
        folder = reports.save_merge(tmp_path / "out", density=1.0, scale=1.0)
    left_out = {"report.html", "focused"}  # no adapter is focused that is pruned by hand
    assert {p.name for p in folder.iterdir()} == {p.name for p in merged.iterdir()} - left_out
    lines = [r.getMessage() for r in caplog.records if "report.html" in r.getMessage()]
    assert len(lines) == 1
    assert "pip install 'peft-himerge[report]'" in lines[0]
    with pytest.raises(MissingExtraError, match=r"peft-himerge\[report\]"):
        render_page(read_report(folder))


# ------------------------------------------------------------------------------- charts and tables


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_chart_is_one_that_plotly_knows(count: int) -> None:
    names = ["en", "zh", "1", "law", "数学"][:count]
    report = parse_report(reports.facts(*names))
    charts = {**charts_of(report), **comparison_charts({"a": report, "b": report})}
    assert len(charts) >= 8
    for chart in charts.values():
        go.Figure(data=chart.data, layout=chart.layout)  # refuses what plotly does not know
        assert chart.height > 100
        shown = [index for view in chart.views for index in view.traces]
        assert shown == (list(range(len(chart.data))) if chart.views else [])


def test_contribution_views_hold_the_values_of_their_name() -> None:
    report = parse_report(reports.facts(layers=12))
    chart = charts_of(report)["contributions"]
    gamma, alone, merged = chart.data
    assert [view.label.split(":")[0] for view in chart.views] == ["gamma", "alone", "merged"]
    assert gamma["z"] == [[row.gamma] * 2 for row in report.contributions[::2]]
    assert alone["z"] == merged["z"] == [[0.25, 0.25]] * 12
    assert gamma["y"] == [str(i) for i in range(12)]  # in the model's order, not 0, 1, 10, 11
    assert (gamma["zmin"], gamma["zmax"]) == (-1.0, 1.0)
    assert (alone["zmin"], merged["zmax"]) == (-0.25, 0.25)


def test_layers_are_ranked_by_size_and_coloured_by_kind() -> None:
    report = parse_report(reports.facts())  # Gamma 0.3, 0.05, -0.2
    chart = charts_of(report)["conflicts"]
    assert chart.layout["yaxis"]["categoryarray"] == ["0", "2", "1"]
    assert [trace["name"] for trace in chart.data] == ["severe (1)", "partial (1)", "mutual (1)"]
    assert len({trace["marker"]["color"] for trace in chart.data}) == 3
    assert len({trace["marker"]["pattern"]["shape"] for trace in chart.data}) == 3
    rows = tables_of(report)["conflicts"].rows
    assert [row[0].text for row in rows] == ["0", "2", "1"]
    assert rows[0][-1].text == "+0.250"


def test_search_is_a_grid_of_cells_or_points_where_there_is_none() -> None:
    facts = reports.facts()
    cells, circle = charts_of(parse_report(facts))["search-0"].data
    assert cells["z"] == [[0.1 + 0.3, 0.1 + 0.9], [0.5 + 0.3, 0.5 + 0.9]]
    assert (cells["y"], cells["x"]) == (["0.1", "0.5"], ["0.3", "0.9"])
    assert (circle["x"], circle["y"]) == (["0.9"], ["0.5"])
    facts["search"] = [
        {"adapter": "en", "density": 0.011 * i, "scale": 0.013 * i, "value": 1.0 * i}
        for i in range(20)
    ]
    (points,) = charts_of(parse_report(facts))["search-0"].data
    assert points["type"] == "scatter"
    assert points["marker"]["color"] == [float(i) for i in range(20)]


def test_many_pairs_become_cells() -> None:
    few = charts_of(parse_report(reports.facts("a", "b", "c")))["cosine"]
    many = charts_of(parse_report(reports.facts("a", "b", "c", "d", "e")))["cosine"]
    assert [trace["type"] for trace in few.data] == ["scatter"] * 3
    assert [trace["type"] for trace in many.data] == ["heatmap"]
    assert len(many.data[0]["y"]) == 10


def test_share_kept_is_of_what_the_adapter_wins_alone() -> None:
    report = parse_report(reports.facts())
    assert report.share_kept("base", "en") == 0.0
    assert report.share_kept("en", "en") == 1.0
    assert report.share_kept("merged", "en") == pytest.approx((0.7 - 0.2) / (1.0 - 0.2))
    facts = reports.facts()
    facts["scores"]["en"]["en"] = 0.1  # worse than the base model
    for row in facts["scores"].values():
        row["general"] = 0.5  # a guard: no adapter of that name
    report = parse_report(facts)
    assert report.share_kept("merged", "en") is None
    assert report.share_kept("merged", "general") is None
    assert render_page(report)


@pytest.mark.parametrize(
    ("exported", "focus", "said"),
    [(0.6, False, True), (0.95, False, False), (0.6, True, False)],
)
def test_a_merge_that_costs_much_says_what_may_help(
    exported: float, focus: bool, said: bool
) -> None:
    facts = reports.facts()
    for state in ("base", *facts["plan"]["adapters"], "exported"):
        for task in facts["scores"][state]:
            alone = {"base": 0.2, task: 1.0, "exported": exported}
            facts["scores"][state][task] = alone.get(state, 0.2)
    facts["options"]["focus"] = focus
    shown = render_page(parse_report(facts))
    assert ("50% of what the adapters win alone is lost by merging" in shown) is said


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (["model.layers.0", "model.layers.10"], ["0", "10"]),
        (["h.0", "outside"], ["0", "outside"]),
        (["encoder.block.0", "decoder.block.0"], ["encoder.block.0", "decoder.block.0"]),
        (["0", "1"], ["0", "1"]),
        (["outside"], ["outside"]),
        ([], []),
    ],
)
def test_short_names_drop_what_all_share(labels: list[str], want: list[str]) -> None:
    assert list(short_names(labels).values()) == want


# ------------------------------------------------------------------------------------- any names


def test_names_are_shown_and_never_run() -> None:
    names = [reports.EVIL, "数学 & “law”", "%{x}<br>"]
    text = render_page(parse_report(reports.facts(*names) | {"adapter_name": reports.EVIL}))
    assert reports.EVIL not in text
    tags = [tag for tag, _ in _Reader(text).tags]
    assert tags.count("script") == 3
    cells = {cell for row in rows_of(text) for cell in row}
    assert set(names) <= cells
    (scores,) = [spec for spec in specs(text) if spec["id"] == "scores"]
    assert [trace["name"] for trace in scores["data"]] == [html.escape(n, False) for n in names]


def test_long_names_are_cut_in_labels_and_stay_apart() -> None:
    names = ["adapter_of_the_first_kind_of_all", "adapter_of_the_other_kind_of_all"]
    charts = charts_of(parse_report(reports.facts(*names)))
    axis = charts["contributions"].layout["xaxis"]
    assert axis["tickvals"] == charts["contributions"].data[0]["x"] == names
    assert axis["ticktext"] == ["adapter_of_t…nd_of_all"] * 2
    assert {trace["name"] for trace in charts["scores"].data} == {"adapter_of_t…nd_of_all"}


def test_charts_say_only_what_is_there() -> None:
    facts = reports.facts()
    old = reports.without(facts, "geometry", "options")  # as earlier versions wrote it
    report = parse_report(old)
    assert {"norms", "cosine", "signs", "spectra"}.isdisjoint(charts_of(report))
    assert {"layers", "pairs", "options"}.isdisjoint(tables_of(report))
    assert "s-deltas" not in render_page(report)


# ------------------------------------------------------------------------------------ comparisons


def test_comparison_shows_scores_differences_kinds_and_settings(merged: Path, other: Path) -> None:
    text = render_comparison([merged, other])
    first, second = (read_report(folder) for folder in (merged, other))
    rows = rows_of(text)
    start, now = first.scores["merged"]["en"], second.scores["merged"]["en"]
    (row,) = [r for r in rows if r[:2] == ["merged, exact", "en"]]
    assert row[2].startswith(f"{start:.3f}")
    assert row[3].startswith(f"{now:.3f}")
    assert row[3].endswith(f"{now - start:+.3f}")
    settings = {r[0]: r[1:] for r in rows}
    assert settings["option accept"] == ["best", "no_regression"]
    assert settings["density of en"] == [f"{first.plan.adapters['en'].density:g}", "0.3"]
    assert "prune_scope" not in settings  # the same in both
    kinds = comparison_tables({"a": first, "b": second})["conflicts"].rows
    assert [cell.kind for cell in kinds[0][1:]] == [
        next(c.kind for c in report.conflicts if c.layer == first.layers[0])
        for report in (first, second)
    ]
    assert {spec["id"] for spec in specs(text)} == {"scores", "gammas", "norms"}


def test_comparison_of_runs_with_other_tasks_leaves_gaps() -> None:
    one, two = (parse_report(reports.facts(*names)) for names in (("en", "zh"), ("en", "law")))
    rows = comparison_tables({"a": one, "b": two})["scores"].rows
    cells = {(r[0].text, r[1].text): [c.text for c in r[2:]] for r in rows}
    assert cells["merged, exact", "zh"] == ["0.710 ± 0.020", "–"]
    assert cells["merged, exact", "law"] == ["–", "0.710 ± 0.020"]


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert run_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert run_names([Path("x/out"), Path("y/out")]) == ["x/out", "y/out"]
    assert len(set(run_names([Path("x"), Path("x")]))) == 2


# --------------------------------------------------------------------------------- bad reports, CLI


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot read the report"),
        ("{", "cannot read the report"),
        ("[]", "cannot read the report.*holds no JSON object"),
        ('{"format": "peft_himerge.sweep/1"}', "is no report of a merge"),
        ('{"format": "peft_himerge.adapter_merge/1"}', "is damaged: adapter_name"),
        ('{"format": "peft_himerge.report/1", "adapter_name": 3}', "is damaged: adapter_name"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=text):
        read_report(tmp_path)


def himerge(*args: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, args)])


def test_report_command_makes_the_same_page_again(merged: Path) -> None:
    before = (merged / "report.html").read_bytes()
    (merged / "report.html").unlink()
    done = himerge(merged)
    assert done.exit_code == 0, done.output
    assert (merged / "report.html").read_bytes() == before


def test_report_command_compares(
    merged: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = himerge("--compare", merged, other)
    assert done.exit_code == 0, done.output
    assert "2 merges side by side" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_report_command_exits_with_2_and_writes_nothing(merged: Path, tmp_path: Path) -> None:
    copy, page = tmp_path / "copy", tmp_path / "x.html"
    copy.mkdir()
    (copy / "report.json").write_bytes((merged / "report.json").read_bytes())
    for args in (
        [copy, tmp_path / "nowhere"],
        ["--compare", copy, "--out", page],
        ["--compare", copy, tmp_path, "--out", page],
    ):
        done = himerge(*args)
        assert done.exit_code == 2, args
        assert "error: " in done.output
    assert [p.name for p in tmp_path.rglob("*.html")] == []


# -------------------------------------------------------------------------------------- packaging


def test_templates_lie_in_the_package_and_the_wheel_takes_all_of_it(tmp_path: Path) -> None:
    here = ROOT / "peft_himerge" / "page" / "templates"
    names = {path.name for path in here.iterdir()}
    assert names == {
        "base.html",
        "compare.html",
        "page.css",
        "page.js",
        "parts.html",
        "report.html",
    }
    builder = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {f"peft_himerge/page/templates/{name}" for name in names} <= held
