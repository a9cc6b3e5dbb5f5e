"""The page in a real headless Chromium. Needs playwright's package and a Chromium of the system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reports

pytestmark = pytest.mark.browser

CHROMIUM = next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of real merges by Hi-Merging and by TIES, hostile names, and comparisons."""
    from peft_himerge.page import parse_report, render_comparison, render_page

    root = tmp_path_factory.mktemp("pages")
    first = reports.save_merge(root / "first")
    second = reports.save_merge(root / "second", density=0.3, scale=0.8)
    names = [reports.EVIL, "数学 & “law”", "a_very_long_adapter_name_without_any_space_in_it"]
    evil = root / "evil.html"
    evil.write_text(render_page(parse_report(reports.facts(*names))), encoding="utf-8")
    compared = root / "compared.html"
    compared.write_text(render_comparison([first, second]), encoding="utf-8")
    tested = reports.with_test(reports.save_merge(root / "tested", density=0.5))
    ties = reports.with_test(reports.save_by_method(root / "ties", density=0.4), "ties")
    mixed = root / "mixed.html"
    mixed.write_text(render_comparison([tested, ties]), encoding="utf-8")
    return {
        "merge": first / "report.html",
        "evil": evil,
        "compared": compared,
        "ties": ties / "report.html",
        "mixed": mixed,
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install the system's chromium package")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install 'peft-himerge[browser]'"
    )
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Opened:
    """A page that was opened from disk, and everything it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light"):
        viewport = {"width": width, "height": 844}
        self.page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("name", ["merge", "evil", "compared", "ties", "mixed"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (390, "light")])
def test_opens_from_disk_without_a_fault_and_draws_every_chart(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened = Opened(browser, pages[name], width=width, scheme=scheme)
    assert opened.faults == []
    assert opened.requests == [pages[name].as_uri()]
    drawn = opened.page.evaluate(
        """[...document.querySelectorAll(".chart")].map((chart) => [
            chart.id,
            chart.querySelectorAll(".trace, .hm, .point").length,
            chart.querySelector("svg.main-svg").getBoundingClientRect().width,
        ])"""
    )
    assert len(drawn) >= 2
    for chart, marks, size in drawn:
        assert marks > 0, chart
        assert 250 < size <= width, chart
    assert opened.overflow() <= 0


def test_a_click_switches_the_heatmap(browser: Any, pages: dict[str, Path]) -> None:
    page = Opened(browser, pages["merge"]).page

    def shown() -> tuple[list[Any], str]:
        values = page.evaluate(
            "document.getElementById('contributions').data.filter((t) => t.visible).map((t) => t.z)"
        )
        cells = "#contributions .heatmap-label text, #contributions .hm text"
        return values, page.locator(cells).first.text_content()

    before = shown()
    page.get_by_role("button", name="alone").click()
    after = shown()
    assert len(before[0]) == len(after[0]) == 1
    assert before[0] != after[0]
    assert before[1] != after[1]
    pressed = page.locator('[data-for="contributions"] button[aria-pressed="true"]')
    assert pressed.all_text_contents() == ["alone"]


def test_another_layer_can_be_chosen_for_the_spectrum(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["merge"])
    names = "document.getElementById('spectra').data.map((t) => t.visible)"
    before = opened.page.evaluate(names)
    choice = opened.page.locator('select[data-for="spectra"], [data-for="spectra"] button')
    if choice.first.evaluate("node => node.tagName") == "SELECT":
        choice.first.select_option(index=1)
    else:
        choice.nth(1).click()
    assert opened.page.evaluate(names) != before
    assert opened.faults == []


def test_dark_follows_the_system_also_in_charts(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["merge"])
    look = """() => [
        getComputedStyle(document.body).backgroundColor,
        document.getElementById("scores").layout.font.color,
        document.getElementById("contributions").data[0].colorscale[2][1],
    ]"""
    light = opened.page.evaluate(look)
    opened.page.emulate_media(color_scheme="dark")
    changed = "was => document.getElementById('scores').layout.font.color !== was"
    opened.page.wait_for_function(changed, arg=light[1], timeout=5000)
    dark = opened.page.evaluate(look)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert light[0] == "rgb(255, 255, 255)"


def test_paper_is_light_and_holds_what_was_folded(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    opened = Opened(browser, pages["merge"], scheme="dark")
    opened.page.emulate_media(media="print", color_scheme="dark")
    opened.page.wait_for_selector("html[data-print]", state="attached", timeout=5000)
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    hidden = opened.page.locator("details .scroll").first
    assert hidden.bounding_box()["height"] > 20
    widths = opened.page.evaluate(
        "[...document.querySelectorAll('.chart')].map((chart) => chart.layout.width)"
    )
    assert set(widths) == {660}
    opened.page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    opened.page.emulate_media(media="screen", color_scheme="dark")
    opened.page.wait_for_selector("html:not([data-print])", state="attached", timeout=5000)
    assert opened.faults == []


def test_a_hostile_name_is_text_in_tables_and_in_charts(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = Opened(browser, pages["evil"]).page
    assert page.locator("#s-scores thead th", has_text=reports.EVIL).count() >= 1
    legend = page.locator("#scores .legendtext").all_text_contents()
    assert legend[:2] == [reports.EVIL, "数学 & “law”"]


def test_a_page_of_another_method_has_its_own_sections_and_links_that_lead_there(
    browser: Any, pages: dict[str, Path]
) -> None:
    opened = Opened(browser, pages["ties"])
    page = opened.page
    assert page.locator("h2").all_text_contents() == [
        *("Test scores", "Method", "The deltas", "Export", "Cost"),
    ]
    for target in page.locator("nav a").evaluate_all("links => links.map((a) => a.hash)"):
        assert page.locator(target).count() == 1, target
    choice = page.locator('[data-for="spectra"] button, select[data-for="spectra"]').first
    assert choice.is_visible()
    assert opened.faults == []
