"""The README's figures are the committed ones, and its examples are Python."""

import ast
import json
import re
from pathlib import Path

from tokendrop.unified import summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_committed_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert all({"seed", "versions", "commit", "date", "config"} <= row.keys() for row in rows)
    table = summary.table(rows)
    lines = [table.header, *table.rows]
    assert all("| " + " | ".join(line) + " |" in README for line in lines)


def test_examples_are_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
