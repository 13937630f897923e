"""The README's figures are the committed ones, and what it names is there."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tokendrop import methods
from tokendrop.study import summary
from tokendrop.study.frontier import key

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import table  # noqa: E402
from benchmarks.results import SCHEMA  # noqa: E402

README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_the_tables_are_those_of_the_committed_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert all({"seed", "versions", "commit", "date", "config"} <= row.keys() for row in rows)
    shown = summary.table(rows)
    lines = ["| " + " | ".join(line) + " |" for line in (shown.header, *shown.rows)]
    page = (ROOT / "docs" / "demo.md").read_text()
    assert all(line in page for line in lines)
    assert sum(line in README for line in lines) == 4  # the header and three rows


def test_every_table_is_made_of_committed_results():
    for page in table.PAGES:
        text = page.read_text()
        assert table.written(text) == text, page.name
    assert "<!-- table: demo-short -->" in README


def test_two_rows_in_one_cell_are_refused():
    rows = [{"metric": "time ratio", "case": case, "median": 1.0, "p20": 1.0, "p80": 1.0, "n": 1} for case in "ab"]
    assert len(table.pivot(rows, lambda row: (row["case"],), ["case"], ["time ratio"]).splitlines()) == 4
    with pytest.raises(ValueError, match=r"two rows for \(\), time ratio"):
        table.pivot(rows, lambda row: (), [], ["time ratio"])


def test_rows_follow_the_schema():
    for file in sorted(table.RESULTS.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            assert list(row) == list(SCHEMA), file.name
            assert all(isinstance(row[key], kind) for key, kind in SCHEMA.items()), file.name
            assert not row["commit"].endswith("-dirty"), file.name


def test_rows_of_the_frontier_say_where_they_were_made():
    rows = table.rows_of("frontier/rows")
    assert len({key(row) for row in rows}) == len(rows) > 0
    for row in rows:
        assert {"seed", "versions", "commit", "date", "device", "flops", "config"} <= row.keys()
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", row["commit"])
        assert row["split"] == "val" or not row["commit"].endswith("-dirty")  # what is reported is of clean code
        assert row["config"]["tested"] == row["split"]
        assert (row["split"] == "test") == (row["seed"] >= 100)  # what is reported has seeds of its own


def test_it_is_short():
    # A screen and a half: of text 120 wide, tables not counted.
    assert sum(1 + len(line) // 120 for line in README.splitlines() if line and not line.startswith("|")) < 90


def test_links_are_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    missing = {
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in LINK.findall(page.read_text())
        if not link.startswith(("https://", "mailto:")) and not (page.parent / link).exists()
    }
    assert not missing


def test_no_link_of_the_readme_is_dead_on_a_package_index():
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    (rule,) = hook["fancy-pypi-readme"]["substitutions"]
    shown = re.sub(rule["pattern"], rule["replacement"], README)
    assert len(LINK.findall(README)) > 20
    assert all(link.startswith("https://") for link in LINK.findall(shown))
    assert "card (`docs/methods/himix.md`)" in shown


def test_every_method_has_a_card_that_the_readme_links():
    lines = [line for line in README.splitlines() if line.startswith("| `td.")]
    for name in methods.__all__:
        (line,) = [line for line in lines if line.startswith(f"| `td.{name}(")]
        (card,) = re.findall(r"\[card\]\((docs/methods/\w+\.md)\)", line)
        text = (ROOT / card).read_text()
        assert text.startswith(f"# {name}\n")
        for part in ("What it does", "When to use it", "Defaults", "Limits", "Cost"):
            named = f"**{part}.**" in text or (part in ("Limits", "Cost") and "**Limits and cost.**" in text)
            assert named, f"{card}: {part}"
