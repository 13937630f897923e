"""Reports in a real browser: nothing fails, images are there, no text is clipped, what is wide scrolls inside."""

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

from tokendrop.analysis import allocation_report, bench_report, where
from tokendrop.analysis.advice import Advice, Plan
from tokendrop.analysis.allocation import Allocation
from tokendrop.analysis.report import Grid, Image, Section, Table, lines_png, pixels_png, render
from tokendrop.analysis.segments import HeatMap
from tokendrop.methods import Drop, HiMix, PyramidDrop
from tokendrop.study import own_summary, summary, synergy_summary
from tokendrop.study.synergy import SynergyStudy

CHROMIUM = shutil.which("chromium")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
MADE = {"versions": {"torch": "2.13", "python": "3.11"}, "date": "2026-11-26T12:00:00+00:00"}

# Every text that is not wholly in view, nor in something that scrolls and shows that it does; what scrolls; and words
# broken over two lines.
LOOK = """() => {
  const clipped = [], scrolls = [], broken = [];
  const edge = one => {
    const style = getComputedStyle(one);
    return style.backgroundImage.includes("gradient") || parseFloat(style.borderRightWidth) >= 1;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode, range = document.createRange();
    if (!node.data.trim()) continue;
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      let inside = false;
      for (let one = node.parentElement; one && one !== document.body; one = one.parentElement) {
        const style = getComputedStyle(one), frame = one.getBoundingClientRect();
        if (style.overflowX === "visible") continue;
        const out = box.right > frame.left + one.clientLeft + one.clientWidth + 1 || box.left < frame.left - 1;
        inside = ["auto", "scroll"].includes(style.overflowX) && edge(one);
        if (out && !inside) clipped.push(node.data.trim());
        break;
      }
      if (!inside && (box.right > innerWidth + 1 || box.left < -1)) clipped.push(node.data.trim());
    }
    for (const word of node.data.matchAll(/(?<!\\S)[A-Za-z]{2,18}(?!\\S)/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(word[0]);
    }
    const cell = node.parentElement.closest("th, td");
    if (cell && cell.scrollWidth > cell.clientWidth + 1) clipped.push(node.data.trim());
  }
  for (const one of document.querySelectorAll("*")) {
    if (one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX === "auto") {
      const first = one.querySelector("tbody th");
      const share = first ? first.getBoundingClientRect().width / one.clientWidth : 0;
      scrolls.push([(one.querySelector("th") || one).textContent.slice(0, 40) || "image", share]);
    }
  }
  return {clipped: [...new Set(clipped)], scrolls, broken, wide: document.documentElement.scrollWidth > innerWidth};
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI has no Chromium; .ci/run installs it"
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def picture(name):
    return Image(name, pixels_png(np.eye(8, dtype=np.float32)))


@cache
def synergy():
    """The study of synergy from its committed rows, and a table of somebody who means harm."""
    found = json.loads((RESULTS / "synergy-study.json").read_text())
    rows, study = found["rows"], SynergyStudy()
    evil = Table(("<script>console.error(1)</script>",), [("<img src=x onerror=alert(1)>",)])
    grid = Grid(("asked for", "G-only", "late"), [(f"zero {n}", [picture("a"), picture("b")]) for n in range(3)])
    curve = Image("alignment", synergy_summary.curves(rows, ["unified", "late"], "alignment", synergy_summary.PAIR))
    sections = [
        Section("Table 3", synergy_summary.note(rows), synergy_summary.table(rows, found["flops"]), [curve]),
        Section("Configurations", table=synergy_summary.configurations(rows, study)),
    ]
    more = [Section("Asked for and made", grid=grid), Section("Escaped", "<script>alert(2)</script>", evil)]
    return render("a <b>report</b>", [*sections, *more], summary.foot_of(rows))


@cache
def demo():
    rows = json.loads((RESULTS / "demo.json").read_text())
    chart = lines_png({"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, 2.5)]}, "updates of generation", "NLL")
    sections = [Section("Runs", summary.notes(rows)[0], summary.table(rows), [Image("Learning curves", chart)])]
    return render("tokendrop demo", sections, summary.foot_of(rows))


@cache
def analyze():
    share = torch.full((2, 6, 4), 0.25, dtype=torch.float64)
    heat = HeatMap(torch.rand(6, 24, 24), ((0, "system"), (1, "image"), (22, "instruction"), (23, "output")))
    found = Allocation(share, ("understanding", "generation"), maps={"understanding": heat}, own_images=("generation",))
    methods = [
        HiMix("3:"),
        PyramidDrop((1, 3, 5), (0.6, 0.3, 0.15)),
        Drop("0:", keep=0.55, score="leverage", then="gone"),
    ]
    plans = tuple(Plan(one, 0.5, 0.1, 0.2, 0.9, 0.8) for one in methods)
    advice = Advice(
        0.5, {"understanding": plans, "generation": plans[:1]}, {"understanding": (0.5,), "generation": (0.5,)}
    )
    return render("tokendrop analyze", allocation_report.sections(found, advice), where.foot("a model", MADE))


@cache
def bench():
    spread = {"median": 0.87654, "p20": 0.8123, "p80": 0.9123, "n": 7}
    setup = {"batches": [1], "threads": 1, "optimizer": "AdamW", "checked": True}
    ratios = ("flops_ratio", "kept_ratio", "memory_ratio", "computed_flops_ratio")
    row = dict.fromkeys(ratios, 0.5) | {"gradient_gap": 1e-6, "clock": "cpu", "setup": setup, "device": "cpu x86_64"}
    row |= dict.fromkeys(("time_ratio", "capture", "computed_capture", "seconds", "samples_per_second"), spread)
    row |= {"dense_seconds": spread, "dense_samples_per_second": spread}
    names = [
        "HiMix(layers=':', separate='none')",
        "HiDrop(entry=8, layers=(10, 14, 16, 18), keep=(215, 10, 5, 1), exit=24)",
    ]
    rows = [row | {"method": name, "part": part} for name in names for part in ("forward", "backward", "step")]
    return render("tokendrop bench", bench_report.sections(rows), where.foot("a model", MADE))


@cache
def own():
    figure = {"values": [0.71234, 0.69], "mean": 0.7}
    one = {"run": "joint, {'understanding': HiMix(layers='2:')}", "task": "understanding", "better": "higher"}
    one |= {"metric": "test/understanding/exact_match", "quality": figure, "synergy": figure}
    one |= {"flops_ratio": {"mean": 0.5}, "flops": {"mean": 1e12}}
    metrics = {f"test/understanding/a_long_name_of_a_metric_{n}": 0.123456 for n in range(6)}
    row = {"name": one["run"], "seed": 0, "steps": 100, "seconds": 12.0, "metrics": metrics}
    return render(
        "tokendrop synergy", own_summary.report([row], [one] * 3, ["Means."]), where.foot("my.runs:made", MADE)
    )


REPORTS = [synergy, demo, analyze, bench, own]


def looked_at(browser, html, folder, size):
    """What a person would see go wrong: messages, requests, missing images, and the result of LOOK."""
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
    seen = page.evaluate(LOOK)
    page.close()
    return found, outside, images.count(False), seen


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("report", REPORTS, ids=lambda one: one.__name__)
def test_a_report_shows_as_it_should(browser, tmp_path, report, size):
    *wrong, seen = looked_at(browser, report(), tmp_path, size)
    assert wrong == [[], [], 0]
    assert not seen["clipped"]
    assert not seen["wide"]
    assert not seen["broken"]
    if size is DESK:  # all of it is in view
        assert not seen["scrolls"]
    assert all(share < 0.5 for _, share in seen["scrolls"])  # names on the left leave room for figures


def test_decisive_rows_are_marked_and_the_foot_says_where():
    for report in REPORTS[:4]:
        html = report()
        assert html.count('class="marked"') >= 1
        assert "Marked: " in html
    for report in REPORTS:
        assert re.search(
            r"<p>Measured: .+</p>\s*<p>Where and when: (cpu|CPU).+20\d\d-\d\d-\d\d.+</p>\s*<p>With: .*torch \d",
            report(),
        )


def test_faults_are_seen(browser, tmp_path):
    html = demo().replace("iVBORw0KGgo", "iVBORw0KGgx", 1)
    cut = '<p style="overflow: hidden; white-space: nowrap; width: 100px">cut off in the middle of it</p>'
    bare = (
        '<div style="overflow: auto; width: 100px"><p style="width: 300px">no edge shows that there is more</p></div>'
    )
    thin = '<p style="width: 40px; overflow-wrap: anywhere">understanding</p>'
    loud = '<script>console.error("x"); alert("y")</script><p style="width: 900px; max-width: none">z</p>'
    messages, _, missing, seen = looked_at(
        browser, html.replace("</body>", f"{loud}{cut}{bare}{thin}</body>"), tmp_path, PHONE
    )
    assert messages[:2] == ["x", "y"]
    assert missing == 1
    assert seen["wide"]
    assert "understanding" in seen["broken"]
    assert {"cut off in the middle of it", "no edge shows that there is more"} <= set(seen["clipped"])
