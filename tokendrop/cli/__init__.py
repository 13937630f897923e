"""The command line: one file for each command, which imports what it runs when it runs it."""

from typing import Annotated

import typer

from tokendrop import __version__
from tokendrop.cli import analyze, bench, demo, flops, inspect, synergy

app = typer.Typer(add_completion=False, no_args_is_help=True)
for command in (demo.demo, inspect.inspect, flops.flops, bench.bench, analyze.analyze, synergy.synergy):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Token dropping for training vision-language models."""
