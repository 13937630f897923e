"""The report is one file: escaped, with nothing outside it."""

import base64
import io
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from figures import faults
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from tokendrop.analysis.allocation_plot import plot
from tokendrop.analysis.labels import spread
from tokendrop.analysis.report import Grid, Image, Section, Table, lines_png, pixels_png, render
from tokendrop.analysis.segments import SEGMENTS, HeatMap
from tokendrop.analysis.where import foot, made_where
from tokendrop.synergy import heat_map

EVIL = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def page():
    chart = lines_png({"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, 2.5)]}, "steps", "NLL")
    picture = pixels_png(np.eye(4, dtype=np.float32))
    grid = Grid(("asked for", EVIL), [(EVIL, [Image("left bold three", picture)])])
    table = Table(("run", EVIL), [(EVIL, "0.71 ±0.02"), ("b", "w " * 30)], [0], EVIL)
    made = Section(EVIL, EVIL, table, [Image(EVIL, chart)], EVIL, grid)
    return render(EVIL, [made, Section("bare")], [EVIL])


def test_every_text_is_escaped(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 13


def test_nothing_outside_the_file_is_named(page):
    assert re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,)""", page) == []
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", page)
    assert page.count('src="data:image/png;base64,') == 2


def test_it_fits_a_phone(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "overflow-x: auto" in page


def test_table_and_headings(page):
    assert '<td class="text">0.71 ±0.02</td>' in page
    assert "<h2>bare</h2>" in page


def test_a_row_that_decides_is_marked_and_words_stand_on_the_left(page):
    assert page.count('<tr class="marked">') == 1
    assert page.count('<td class="text">') == 2  # the column that has words
    assert "<footer>" in page
    assert "<footer>" not in render("a", [])


@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_lines_are_named_where_they_end_and_no_name_is_over_another(count, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **_: drawn.append(figure))
    ends = {f"method {at}": [(0, 1.0), (5 + at % 3, 0.2 + 0.001 * at)] for at in range(count)}
    lines_png(ends, "updates", "NLL")
    assert faults(drawn[0]) == ([], [])
    assert {one.get_text() for one in drawn[0].axes[0].texts} == set(ends)
    assert drawn[0].axes[0].get_legend() is None


def test_faults_of_a_figure_are_seen():
    figure = Figure()
    FigureCanvasAgg(figure)
    for at, text in ((0.5, "one"), (0.51, "two"), (0.98, "beyond the edge")):
        figure.text(at, 0.5, text)
    assert faults(figure) == ([("one", "two")], ["beyond the edge"])


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_spread_keeps_order_distance_and_bounds(wanted, gap):
    places = spread(wanted, gap)
    ordered = [places[at] for at in sorted(range(len(wanted)), key=lambda at: wanted[at])]
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(b - a >= gap - 1e-5 for a, b in pairwise(ordered))
    assert all(-1e-5 <= place <= 1 + 1e-5 for place in places)
    apart = all(abs(a - b) >= gap for a, b in combinations(wanted, 2))
    assert not apart or places == pytest.approx(wanted, abs=1e-5)  # nothing moves that need not


@pytest.mark.parametrize("depth", [1, 6, 32])
def test_no_label_of_an_allocation_is_over_another(depth):
    share = torch.full((2, depth, 4), 0.25)
    share[1, -1] = torch.tensor([0.01, 0.0, 0.01, 0.98])
    heat = HeatMap(torch.rand(depth, 24, 24), ((0, "system"), (0.4, "image"), (22.9, "instruction"), (23.3, "output")))
    maps = {"understanding": heat, "generation": heat}
    for given_maps in ({}, maps):
        assert faults(plot(share, tuple(maps), SEGMENTS, given_maps, ("generation",))) == ([], [])


@pytest.mark.parametrize("count", [1, 7, 15, 40, 300])
def test_no_label_of_alignment_by_layer_is_over_another(count):
    names = [f"model.model.layers.{layer}/{kind}" for layer in range(8) for kind in ("attention", "mlp", "norm")]
    groups = {"names": names, "alignment": {"u/g": [0.1] * len(names)}}
    events = [{"step": 10_000 + 25 * at, "groups": groups} for at in range(count)]
    figure = heat_map(events, "u/g")
    FigureCanvasAgg(figure)
    assert faults(figure) == ([], [])


def test_pixels_come_back_with_ink_black():
    pixels = np.array([[0.0, 0.25], [0.75, 1.0]], dtype=np.float32)
    read = imread(io.BytesIO(pixels_png(pixels)))[..., 0]
    np.testing.assert_allclose(read, 1 - pixels, atol=0.01)


def test_image_uri_is_the_png():
    image = Image("x", b"\x89PNG")
    assert base64.b64decode(image.uri.removeprefix("data:image/png;base64,")) == image.png


def test_a_package_that_is_not_installed_has_no_version():
    made = made_where(("torch", "a-package-that-nobody-has"))
    assert made["versions"].keys() == {"torch", "python"}
    assert foot("m", made | {"device": "GPU", "commit": "abc"})[1].startswith("Where and when: GPU, 20")
    assert foot("m", made | {"commit": "abc"})[1].endswith(", commit abc.")
