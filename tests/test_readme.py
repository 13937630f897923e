"""The README's figures are the committed ones, and its examples are Python."""

import ast
import json
import re
import sys
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


def test_the_table_is_that_of_the_committed_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert all({"seed", "versions", "commit", "date", "config"} <= row.keys() for row in rows)
    shown = summary.table(rows)
    lines = [shown.header, *shown.rows]
    assert all("| " + " | ".join(line) + " |" in README for line in lines)


def test_every_table_is_made_of_committed_results():
    for page in table.PAGES:
        text = page.read_text()
        assert table.written(text) == text, page.name
    assert "<!-- table: step -->" in README


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
        assert re.fullmatch(r"[0-9a-f]{7,}", row["commit"])  # of clean code
        assert row["config"]["tested"] == row["split"]
        assert (row["split"] == "test") == (row["seed"] >= 100)  # what is reported has seeds of its own


def test_examples_are_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        ast.parse(block)


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
