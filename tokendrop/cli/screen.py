"""What commands print: tables, notices and errors of one line."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table as RichTable

from tokendrop.errors import TokenDropError

if TYPE_CHECKING:
    from tokendrop.analysis.report import Table

FIGURE = 7  # characters


def console(stderr: bool = False) -> Console:
    """Where text is printed as it is: "tokendrop[demo]" is no style, and "a:b:c" no emoji."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


@contextmanager
def one_line_errors() -> Generator[None]:
    """End the command with one line where an error says what to do."""
    try:
        yield
    except (TokenDropError, OSError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        # What a file says may be in it: no control sequence of somebody else's reaches the terminal.
        shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
        console(stderr=True).print(shown, style="red", soft_wrap=True)
        raise typer.Exit(1) from error


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made, before anything runs; it is not made.

    Raises:
        NotADirectoryError: something else is there.
    """
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out {out}: {there} is a file; give a folder")


def print_table(console: Console, table: "Table", notes: Sequence[str]) -> None:
    """Print a table, and below it what its figures mean."""
    columns = list(zip(table.header, *table.rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    if sum(widths) + len(widths) > console.width:
        # Each cell breaks between a figure and its noise, and nowhere else.
        widths = [max(map(len, " ".join(cells).split())) for cells in columns]
    shown = RichTable(box=None, padding=(0, 1, 0, 0))
    for index, (name, width) in enumerate(zip(table.header, widths, strict=True)):
        # Where there is no room for that either, long words go on in the next line; no figure breaks, none is cut off.
        side = "right" if index else "left"
        shown.add_column(name, justify=side, min_width=min(width, FIGURE), max_width=width, overflow="fold")
    for index, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if index in table.marked else None)
    console.print(shown)
    why = [f"Bold: {table.why}."] if table.marked else []
    for note in [*why, *notes]:
        console.print(note, style="dim")
