"""The report in Chromium, on a phone and a desktop, light and dark, and printed: `pytest -m soak` of this file.

It needs the Python package playwright and Debian's chromium. SHOTS names a folder that gets screenshots to look at.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.report.contents import contents_of
from launchers.report.page import write_report
from tests.conftest import TABLES
from tests.launchers.planted_run import PlantedRun, failed, finished, in_progress, large
from tests.launchers.test_report import EVIL

pytestmark = pytest.mark.soak
CHROMIUM = shutil.which("chromium") or ""
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--no-first-run"]  # fmt: skip
MOST_BYTES = 15 << 20
SHAPES = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


def without_grpo(path: Path) -> PlantedRun:
    """Plant a finished run of a training alone."""
    planted = PlantedRun(path, {"sft": "sft"})
    planted.life("sft", 1, 5)
    planted.metrics("sft", [{"step": n, "loss": 1 / n} for n in range(1, 30)])
    planted.seal("sft", 5)
    return planted


def evil(path: Path) -> PlantedRun:
    """Plant a finished run with markup in it wherever a run may hold text."""
    return finished(path, EVIL)


RUNS = {"finished": finished, "in_progress": in_progress, "failed": failed, "without_grpo": without_grpo, "evil": evil}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a screen."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


def opened(browser: Any, file: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Return a page that shows a report, and the list in which all that it complains of or asks for is noted."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    noted: list[str] = []
    page.on("console", lambda message: noted.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: noted.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (noted.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda asked: asked.url == file.as_uri() or noted.append(f"request: {asked.url}"))
    page.goto(file.as_uri())
    return page, noted


def scrolled(page: Any) -> None:
    """Bring every part of a page into view."""
    for top in range(0, page.evaluate("document.documentElement.scrollHeight"), 600):
        page.evaluate(f"scrollTo({{top: {top}, behavior: 'instant'}})")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")


INK = """(canvas) => {
  const at = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let inked = 0;
  for (let i = 3; i < at.length; i += 4) inked += at[i] > 0;
  return inked;
}"""


@pytest.mark.parametrize("width, scheme", SHAPES)
@pytest.mark.parametrize("state", RUNS)
def test_a_report_is_drawn_without_a_complaint_or_a_request(browser, tmp_path, state, width, scheme):
    write_report(contents_of(RUNS[state](tmp_path / "run").run), tmp_path / "report.html")
    page, noted = opened(browser, tmp_path / "report.html", width, scheme)
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    scrolled(page)
    charts, canvases = page.query_selector_all(".chart"), page.query_selector_all(".chart canvas")
    assert len(canvases) == len(charts) == (0 if state == "failed" else len(charts)) and not noted
    assert all(canvas.evaluate(INK) > 500 for canvas in canvases)
    assert page.evaluate("document.documentElement.scrollWidth") == width  # what is wide scrolls in its own box
    for row in page.query_selector_all(".timeline path"):
        assert row.bounding_box()["width"] >= 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.pdf()) > 10_000 and not noted
    page.emulate_media(media="screen")
    if folder := os.environ.get("SHOTS"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=f"{folder}/{state}_{width}_{scheme}.png", full_page=True)
    page.context.close()


def test_a_curve_tells_its_values_where_it_is_pointed_at(browser, tmp_path):
    write_report(contents_of(without_grpo(tmp_path / "run").run), tmp_path / "report.html")
    page, noted = opened(browser, tmp_path / "report.html", 1440, "light")
    scrolled(page)
    page.hover(".chart .u-over")
    said = page.inner_text(".chart .u-legend")
    assert re.search(r"step\D*1\d", said) and re.search(r"sft\D*0\.0\d", said) and not noted


def test_what_was_open_is_open_when_the_page_is_loaded_again(browser, tmp_path):
    write_report(contents_of(finished(tmp_path / "run").run), tmp_path / "report.html")
    page, noted = opened(browser, tmp_path / "report.html", 390, "dark")
    page.click("#groups-grpo-0-1 > summary")
    page.reload()
    assert page.evaluate("document.getElementById('groups-grpo-0-1').open") and not noted


def test_a_large_run_is_written_and_drawn(browser, tmp_path, request):
    """Ten phases of 2,000 elements: how long it takes is printed, since a machine decides it."""
    planted = large(tmp_path / "run")
    began = time.perf_counter()
    contents = contents_of(planted.run)
    size = write_report(contents, tmp_path / "report.html")
    wrote = time.perf_counter() - began
    assert size < MOST_BYTES
    began = time.perf_counter()
    page, noted = opened(browser, tmp_path / "report.html", 1440, "light")
    shown = time.perf_counter() - began
    assert not noted and page.query_selector_all(".timeline path")
    scrolled(page)
    assert not noted and page.query_selector_all(".chart canvas")
    told = f"report of 10 phases x 2,000 elements: written in {wrote:.1f} s, {size:,} bytes, loaded in {shown:.1f} s"
    request.config.stash.setdefault(TABLES, []).append(told)
