"""`tokendrop bench`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tokendrop.cli.screen import check_folder, console, one_line_errors, print_table

Source = Annotated[
    str,
    typer.Argument(
        help="package.module:function that returns (model, batches, layout), or with the loss of a batch as a fourth."
    ),
]
Methods = Annotated[
    list[str],
    typer.Option(
        help="HiMix, 'HMGen(shallow=\"8:24:2\")', each beside the dense model; TASK=METHOD ones belong together, "
        "until a task comes again."
    ),
]
LayerRange = Annotated[str | None, typer.Option(help="A method's layers, where it names none: 2:, 8:24:2.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often dense and dropped take turns.")]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Report also without a look at whether the dropped model is right.")
]
Out = Annotated[
    Path,
    typer.Option(help="Where rows.jsonl and report.html go; a method that has its rows there is not run again."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def bench(
    source: Source,
    method: Methods,
    layers: LayerRange = None,
    rounds: Rounds = 7,
    unchecked: Unchecked = False,
    out: Out = Path("bench"),
    as_json: AsJson = False,
) -> None:
    """Measure FLOPs, seconds, memory and capture of a step of your own model under methods, dense beside each."""
    from tokendrop.analysis.bench import benchmark
    from tokendrop.analysis.report import render
    from tokendrop.analysis.where import foot, subject_of
    from tokendrop.cli.source import blamed, read_source
    from tokendrop.methods.text import each_from_text

    notices, ran = console(stderr=True), 0

    def progress(done: int, due: int, name: str) -> None:
        nonlocal ran
        ran = done
        notices.print(f"{done} of {due}: {name}")

    with one_line_errors():
        check_folder(out)
        methods = each_from_text(method, layers)
        model, batches, layout, loss = read_source(source)
        with blamed(source):
            found = benchmark(
                model, batches, layout, methods, loss, rounds=rounds, unchecked=unchecked, out=out, progress=progress
            )
        page = render("tokendrop bench", found.sections(), foot(subject_of(model), found.rows[0]))
        (out / "report.html").write_text(page)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_table(console(), found.table(), found.notes())
    held = len({row["method"] for row in found.rows}) - ran
    again = f"; {held} of the methods had rows there and were not run again" if held else ""
    notices.print(f"{out / 'rows.jsonl'} and {out / 'report.html'} written{again}")
