"""Reports in a real browser: nothing fails, every image is there, and nothing is wider than the screen."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from tokendrop.analysis.report import Image, Section, Table, lines_png, pixels_png, render
from tokendrop.study import synergy_summary
from tokendrop.study.synergy import SynergyStudy

CHROMIUM = shutil.which("chromium")
ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "synergy-study.json"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI has no Chromium; .ci/run installs it"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def report():
    found = json.loads(ROWS.read_text())
    chart = lines_png({"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, 2.5)]}, "steps", "NLL")
    small = [Image(f"zero {n}", pixels_png(np.eye(8, dtype=np.float32)), small=True) for n in range(8)]
    table = synergy_summary.table(found["rows"], found["flops"])
    others = synergy_summary.configurations(found["rows"], SynergyStudy())
    evil = Table(("<script>console.error(1)</script>",), [("<img src=x onerror=alert(1)>",)])
    sections = [Section("Runs", "Means. " * 60, table, (Image("curve", chart), *small)), Section("More", "", others)]
    return render("a <b>report</b>", [*sections, Section("Escaped", "<script>alert(2)</script>", evil)])


def faults(browser, html, folder, size):
    """What a person would see go wrong."""
    file = folder / "report.html"
    file.write_text(html)
    page = browser.new_page(viewport=size)
    found = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: (found.append(dialog.message), dialog.dismiss()))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_load_state()
    outside = [url for url in asked if url != file.as_uri() and not url.startswith("data:")]
    images = page.evaluate("[...document.images].map(one => one.complete && one.naturalWidth > 0)")
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    page.close()
    return found, outside, images.count(False), wide


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_a_report_shows_as_it_should(browser, tmp_path, size):
    assert faults(browser, report(), tmp_path, size) == ([], [], 0, False)


def test_faults_are_seen(browser, tmp_path):
    html = report().replace("iVBORw0KGgo", "iVBORw0KGgx", 1).replace("max-width: 100%", "")
    html = html.replace(
        "</body>", '<script>console.error("x"); alert("y")</script><p style="width: 900px">z</p></body>'
    )
    messages, _, missing, wide = faults(browser, html, tmp_path, PHONE)
    assert messages[:2] == ["x", "y"]
    assert missing == 1
    assert wide
