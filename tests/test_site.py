"""The site: every page is in its menu, every public name in its reference; the files of a release say one version."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import tokendrop as td
from tokendrop import public

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav):
    for one in nav:
        found = next(iter(one.values())) if isinstance(one, dict) else one
        yield from leaves(found) if isinstance(found, list) else [found]


def test_every_page_is_in_the_menu_once(hooks):
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(leaves(CONFIG["nav"])) == sorted([*pages, *hooks.PAGES.values(), *hooks.SHOWN.values()])


def test_every_public_name_is_in_the_reference_once():
    named = re.findall(r"^::: tokendrop\.public\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(public.__all__)


def test_links_out_of_the_docs_lead_to_pages(hooks):
    def led(text, source):
        return hooks._relinked(text, ROOT / source)

    assert led("[a](docs/methods/himix.md#b)", "README.md") == "[a](methods/himix.md#b)"
    assert led("[a](../../examples/fsdp2.py)", "docs/trainers/fsdp2.md") == "[a](../examples/fsdp2.md)"
    assert (
        led("[a](../../examples/lightning_cli.yaml)", "docs/trainers/cli.md")
        == "[a](../examples/lightning_cli_yaml.md)"
    )
    for text in ("[a](https://arxiv.org/abs/1)", "[a](#here)", "[a](nowhere.md)"):
        assert led(text, "docs/start.md") == text


def test_published_settings_are_methods():
    page = (ROOT / "docs" / "methods" / "index.md").read_text()
    rows = [line.split("|")[3] for line in page.splitlines() if line.startswith("|") and "`td." in line]
    settings = [text for row in rows for text in re.findall(r"`td\.(\w+\(.*?\))`(?= |,|$)", row)]
    assert len(settings) >= len(td.methods.__all__)
    kinds = (td.Schedule, *(getattr(td, name) for name in td.methods.__all__))
    assert all(isinstance(eval(f"td.{text}", {"td": td}), kinds) for text in settings)  # noqa: S307


def test_the_files_of_a_release_say_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == td.__version__
    sections = re.findall(r"^## (\d\S+)(?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if sections:
        assert sections[0] == (td.__version__, str(citation["date-released"]))


def test_no_address_is_promised_that_does_not_exist():
    assert "readthedocs" not in (ROOT / "pyproject.toml").read_text()
    assert "site_url" not in CONFIG
    assert "repo_url" not in CONFIG


def test_what_an_extra_asks_for_is_pinned():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.match(r"[\w-]+", one)[0].lower() for asked in extras.values() for one in asked}
    assert names <= pins | {one.replace("-", "_") for one in names if one.replace("-", "_") in pins}
