"""`tokendrop inspect`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tokendrop.cli.screen import console, one_line_errors

MODEL = (
    "config.json of a Hugging Face model, the folder it is in, the name of a config that comes with tokendrop, or "
    "package.module:function that returns a model or a config."
)


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what inspection finds in a model, and what each method can do there; weights are not needed."""
    from tokendrop.analysis.inspection import inspect as inspect_model
    from tokendrop.cli.source import read_model

    with one_line_errors():
        found = inspect_model(read_model(model))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    facts = {"layers": found.path, "class": found.layer_class, "depth": str(found.num_layers)}
    shown = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    for name, value in (facts | {"attention": found.attention} | found.support).items():
        shown.add_row(Text(name), Text(value))
    console().print(shown)
