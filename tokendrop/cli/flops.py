"""`tokendrop flops`."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tokendrop.cli.inspect import MODEL
from tokendrop.cli.screen import console, one_line_errors, print_table

if TYPE_CHECKING:
    from tokendrop.analysis.flop_report import Cost, FlopReport
    from tokendrop.analysis.report import Table


def flops(
    model: Annotated[str, typer.Argument(help=MODEL)],
    method: Annotated[list[str], typer.Option(help="HiMix, 'HMGen(shallow=\"8:24:2\")'; for tasks, TASK=METHOD each.")],
    text: Annotated[int, typer.Option(help="Text tokens: system, instruction and output.")],
    image: Annotated[int, typer.Option(help="Image tokens.")],
    task: Annotated[str | None, typer.Option(help="Which task's method.")] = None,
    layers: Annotated[str | None, typer.Option(help="The method's layers, where it names none: 2:, 8:24:2.")] = None,
    before: Annotated[int, typer.Option(help="Text tokens before the image.")] = 0,
    labelled: Annotated[int | None, typer.Option(help="Rows of the head, as with labelled_logits.")] = None,
    multiple: Annotated[int, typer.Option(help="Row counts are rounded up to it; 64 in training.")] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Add the backward.")] = False,
    counted: Annotated[bool, typer.Option("--counted", help="Count a run without weights, not by formula.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a method saves in a real model, per layer and per part; weights are not needed."""
    from tokendrop.analysis.flop_report import flops as count
    from tokendrop.cli.source import read_model
    from tokendrop.methods.text import methods_from_text

    with one_line_errors():
        report = count(
            read_model(model),
            methods_from_text(method, layers),
            text,
            image,
            task,
            before=before,
            labelled=labelled,
            multiple=multiple,
            backward=backward,
            counted=counted,
        )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
        return
    print_table(console(), flop_table(report), flop_notes(report, text, image, backward))


def flop_notes(report: "FlopReport", text: int, image: int, backward: bool) -> list[str]:
    """What the figures of a table are of, and what is computed of them."""
    dense, dropped = (f"{one / 1e9:,.2f}" for one in (report.computed_dense, report.computed_dropped))
    return [
        f"{'Forward and backward' if backward else 'Forward'} of {text} text and {image} image tokens.",
        f"Computed where pairs that no query sees are skipped, causal attention by half: {dense} dense, "
        f"{dropped} dropped, ratio {report.computed_ratio:.3f}.",
    ]


def flop_table(report: "FlopReport") -> "Table":
    """Parts, layers that cost the same, and the whole, in 10^9 FLOPs."""
    from tokendrop.analysis.report import Table

    equal: dict[Cost, list[int]] = {}
    for index, cost in enumerate(report.per_layer):
        equal.setdefault(cost, []).append(index)
    names = {
        f"each of {len(one)} layers, {one[0]} to {one[-1]}" if len(one) > 1 else f"layer {one[0]}": cost
        for cost, one in equal.items()
    }
    rows = [
        (name, f"{cost.dense / 1e9:,.2f}", f"{cost.dropped / 1e9:,.2f}", f"{cost.ratio:.3f}" if cost.dense else "-")
        for name, cost in (report.per_part | names | {"all": report}).items()
        if cost.dense or cost.dropped
    ]
    return Table(("", "dense GFLOPs", "dropped GFLOPs", "ratio"), rows)
