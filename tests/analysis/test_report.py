"""The report is one file: escaped, with nothing outside it."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from tokendrop.analysis.report import Image, Section, Table, lines_png, pixels_png, render

EVIL = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def page():
    chart = lines_png({"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, 2.5)]}, "steps", "NLL")
    picture = pixels_png(np.eye(4, dtype=np.float32))
    images = (Image(EVIL, chart), Image("left bold three", picture, small=True))
    return render(EVIL, [Section(EVIL, EVIL, Table(("run", EVIL), [(EVIL, "0.71 ±0.02")]), images), Section("bare")])


def test_every_text_is_escaped(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 8


def test_nothing_outside_the_file_is_named(page):
    assert re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,)""", page) == []
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", page)
    assert page.count('src="data:image/png;base64,') == 2


def test_it_fits_a_phone(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "overflow-x: auto" in page


def test_table_and_headings(page):
    assert "<td>0.71 ±0.02</td>" in page
    assert "<h2>bare</h2>" in page


def test_pixels_come_back_with_ink_black():
    pixels = np.array([[0.0, 0.25], [0.75, 1.0]], dtype=np.float32)
    read = imread(io.BytesIO(pixels_png(pixels)))[..., 0]
    np.testing.assert_allclose(read, 1 - pixels, atol=0.01)


def test_image_uri_is_the_png():
    image = Image("x", b"\x89PNG")
    assert base64.b64decode(image.uri.removeprefix("data:image/png;base64,")) == image.png
