"""Code blocks of a Markdown page, and how its Python is run.

A block runs in the namespace of its section (`#` or `##`), which begins empty but for what `prelude.py` makes of a name
that a block reads and nothing bound. `<!-- not run: REASON -->` above a block leaves it out.
"""

import ast
import builtins
import re
from dataclasses import dataclass
from pathlib import Path

import prelude

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```(\w*)")
MARK = re.compile(r"^ *<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block: language, code, first line, the section it is in, and why it is not run."""

    language: str
    code: str
    line: int
    section: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page."""
    found, section, mark, opened, code = [], "", None, None, []
    for line, said in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(said)
        if opened is not None and fence:
            language, start = opened
            found.append(Block(language, "\n".join(code), start, section, mark))
            opened, mark, code = None, None, []
        elif opened is not None:
            code.append(said)
        elif fence:
            opened = fence[1], line + 1
        elif said.strip():
            section = said if re.match("##? ", said) else section
            mark = found_mark[1] if (found_mark := MARK.match(said)) else None
    assert opened is None, f"the block of line {opened} has no end"
    return found


def read_first(tree: ast.Module) -> list[str]:
    """Names that the code reads and has not bound before, in order."""
    bound, found = set(dir(builtins)), []
    for statement in tree.body:
        parts = list(ast.walk(statement))
        names = [one for one in parts if isinstance(one, ast.Name)]
        loads = [one.id for one in names if isinstance(one.ctx, ast.Load)]
        stores = {one.id for one in names if not isinstance(one.ctx, ast.Load)}
        stores |= {one.arg for one in parts if isinstance(one, ast.arg)}
        stores |= {one.asname or one.name.split(".")[0] for one in parts if isinstance(one, ast.alias)}
        stores |= {one.name for one in parts if isinstance(one, ast.FunctionDef | ast.ClassDef)}
        here = set() if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign) else stores
        found += [name for name in dict.fromkeys(loads) if name not in bound | here | set(found)]
        bound |= stores
    return found


def run(text: str, page: str = "page") -> int:
    """Run the Python of a page; the number of blocks that ran."""
    names: dict[str, object] = {}
    section, count = None, 0
    found = [one for one in blocks(text) if one.language == "python" and not one.not_run]
    for block in found:
        if block.section != section:
            section, names = block.section, {}
            deep = any("8:24" in one.code for one in found if one.section == section)
            prelude.DEPTH = 32 if deep else 4
        tree = ast.parse("\n" * (block.line - 1) + block.code, page)
        for name in read_first(tree):
            if name not in names and name in prelude.MADE:
                prelude.make(name, names)
        exec(compile(tree, page, "exec"), names)  # noqa: S102
        count += 1
    return count
