"""docs/guarantees.md: every promise names a test, and every named test exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "stage 3" not in line and "stage 1" not in line]


def functions(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file, name):
    assert name.startswith("test_")
    assert name in functions(file)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row not in ("| promise | held by |", "| ZeRO | what it does | here |")]
)
def test_every_promise_names_a_test(row):
    assert re.search(r"`tests/[\w/]+\.py::\w+`", row)


def test_what_is_slow_is_called_so():
    for file, name in NAMED:
        if "mark.slow" in functions(file)[name]:
            assert "slow" in next(row for row in ROWS if name in row)
