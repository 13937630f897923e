"""What may import what, read from the source; and how large things may be."""

import ast
import graphlib
import io
import sys
import tokenize
from pathlib import Path

import pytest

import tokendrop

PACKAGE = Path(tokendrop.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BELOW = {
    "errors": set(),
    "kernels": {"kernels", "errors"},
    "scores": {"scores", "errors"},
    "ranges": {"errors"},
    "scoring": {"errors"},
    "roles": {"ranges", "scoring", "errors"},
    "routes": {"roles", "errors"},
    "schedule": {"errors"},
    "config": {"engine", "methods", "roles", "schedule", "errors"},
    "places": set(),
    "layout": {"places", "errors"},
    "methods": {"methods", "roles", "scoring", "scores", "layout", "errors"},
    "engine": {"engine", "roles", "routes", "layout", "kernels", "errors"},
    "synergy": {"synergy", "errors"},
}
# From the bottom up: a room imports itself and those before it; what is in no room stands on top.
ROOMS = ("plan", "model", "forward")
TRANSFORMERS = {"unified", "engine/model"}


def where(file):
    return file.relative_to(PACKAGE).as_posix()


def part_of(name):
    return name.split("/")[0].removesuffix(".py")


def module_of(file):
    return ".".join(("tokendrop", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def imports(file):
    """Every module that a file imports, wherever in it: relative ones resolved, "from package import module" too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ("tokendrop", *file.relative_to(PACKAGE).parent.parts)
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES or base == "tokendrop" else base


def test_there_is_something_to_check():
    assert {"errors", "kernels", "roles", "layout", "methods", "engine"} <= {part_of(where(file)) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=where)
def test_direction(file):
    part = part_of(where(file))
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("tokendrop.")}
    assert part == "cli" or "cli" not in ours
    if part in BELOW:
        assert ours <= BELOW[part], f"{where(file)} imports {ours - BELOW[part]}"


@pytest.mark.parametrize("file", [file for file in FILES if where(file).startswith("engine/")], ids=where)
def test_rooms_of_the_engine(file):
    room = file.relative_to(PACKAGE / "engine").parts[0]
    if room in ROOMS:
        inside = {name.split(".")[2] for name in imports(file) if name.startswith("tokendrop.engine.")}
        assert inside <= set(ROOMS[: ROOMS.index(room) + 1]), f"{where(file)} imports {inside}"


def test_no_circle():
    """Also none through types, or through an import inside a function."""
    below = {name: set(imports(file)) & MODULES.keys() - {name} for name, file in MODULES.items()}
    assert below["tokendrop"] == {"tokendrop.public"}  # what names are asked for later is seen, too
    assert "tokendrop.analysis.allocation_plot" in below["tokendrop.analysis.allocation"]
    assert "tokendrop.study.study" in below["tokendrop.cli.analyze"]
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("file", [file for file in FILES if part_of(where(file)) in ("kernels", "scores")], ids=where)
def test_kernels_and_scores_know_torch_only(file):
    others = {name.split(".")[0] for name in imports(file)} - {"tokendrop", "torch", "triton"}
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=where)
def test_transformers_is_imported_where_it_may_be(file):
    if not where(file).startswith(tuple(f"{room}/" for room in TRANSFORMERS)):
        assert not any(name.split(".")[0] == "transformers" for name in imports(file))


def lines(files):
    return sum(len(file.read_text().splitlines()) for file in files)


@pytest.mark.parametrize("file", FILES, ids=where)
def test_files_are_short(file):
    assert lines([file]) < 300


def test_functions_are_short():
    for node in (node for file in FILES for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            text = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
            assert node.end_lineno - node.lineno + 1 - text <= 40, node.name


def code_lines(file):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    text = file.read_text()
    texts = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - texts)


def test_the_package_is_small():
    # What the demo and the study train is no part of what a user's training runs.
    assert sum(code_lines(file) for file in FILES if part_of(where(file)) not in ("unified", "study")) < 12300
    engine = [file for file in FILES if part_of(where(file)) == "engine"]
    assert sum(map(code_lines, engine)) < 5550
