"""Every example in a docstring of the package is true."""

import doctest
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import tokendrop

MODULES = ["tokendrop", *(module.name for module in pkgutil.walk_packages(tokendrop.__path__, "tokendrop."))]
EXAMPLES = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=EXAMPLES)
    assert result.failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 10


@pytest.mark.parametrize("name", tokendrop.__all__)
def test_public_names_say_what_they_are(name):
    public = getattr(tokendrop, name)
    assert inspect.getdoc(public)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    root = Path(__file__).parents[1]
    places = [root, root / "tokendrop", root / "tokendrop/engine", *(root / "tokendrop/engine").iterdir()]
    named = re.findall(r"`([\w/]+\.(?:py|md))`", (root / page).read_text())
    assert named
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_every_picture_is_shown_on_a_page():
    root = Path(__file__).parents[1]
    text = "".join(page.read_text() for page in (root / "README.md", *root.glob("docs/**/*.md")))
    assert [one.name for one in sorted(root.glob("docs/images/*")) if f"images/{one.name})" not in text] == []


def test_the_architecture_names_every_file_of_the_engine():
    root = Path(__file__).parents[1]
    engine = root / "tokendrop/engine"
    page = (root / "docs/architecture.md").read_text()
    files = [one.relative_to(engine).as_posix() for one in engine.rglob("*.py") if one.name != "__init__.py"]
    assert len(files) > 20
    assert not [name for name in files if f"`engine/{name}`" not in page and ("/" in name or f"`{name}`" not in page)]


def test_links_are_packed_with_what_they_lead_to():
    """hatch takes what two paths lead to once only, so that one of them would be missing from the sdist."""
    root = Path(__file__).parents[1]
    packed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    links = [one for folder in packed["include"] for one in (root / folder).rglob("*") if one.is_symlink()]
    assert {one.resolve().relative_to(root).as_posix() for one in links} <= set(packed["force-include"])
    assert len(list((root / "tokendrop" / "configs").glob("*.json"))) >= 5
