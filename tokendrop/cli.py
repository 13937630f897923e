"""The command line."""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from tokendrop.analysis.report import Table, render
from tokendrop.errors import TokenDropError

if TYPE_CHECKING:
    from tokendrop.analysis.flop_report import Cost, FlopReport

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Token dropping for training vision-language models."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two; too short to judge quality.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run; with several, noise is their spread.")] = 1,
    out: Annotated[Path, typer.Option(help="Where results.json and report.html go.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
) -> None:
    """Train a small unified model on real digits eight ways, and say what dropping saved and cost."""
    # Imported here: other commands need not wait for transformers.
    from tokendrop.study import summary
    from tokendrop.study.runner import run_study
    from tokendrop.study.study import QUICK, Study

    # No markup: "tokendrop[demo]" in an error is no style.
    screen, notices = Console(markup=False, highlight=False), Console(stderr=True, markup=False, highlight=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with JobProgress(notices) as progress:
            finished = run_study(QUICK if quick else Study(), seeds, watch=progress.show)
    except (TokenDropError, OSError) as error:
        notices.print(_said(error), style="red")
        raise typer.Exit(1) from error
    rows = finished.rows()
    text = json.dumps(rows, indent=1)
    (out / "results.json").write_text(text + "\n")
    (out / "report.html").write_text(render("tokendrop demo", summary.report(finished, quick)))
    if as_json:
        typer.echo(text)
    else:
        print_table(screen, summary.table(rows), summary.notes(rows))
    if quick:
        notices.print(summary.QUICK_NOTE, style="yellow")
    notices.print(f"{out / 'results.json'} and {out / 'report.html'} written")


@app.command()
def inspect(
    config: Annotated[str, typer.Argument(help="config.json of a Hugging Face model, or the folder it is in.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what inspection finds in a model, and what each method can do there; weights are not needed."""
    from tokendrop.analysis.inspection import inspect as inspect_model
    from tokendrop.engine.model.from_config import model_from_config

    try:
        found = inspect_model(model_from_config(config))
    except TokenDropError as error:
        Console(stderr=True, markup=False).print(_said(error), style="red")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    facts = {"layers": found.path, "class": found.layer_class, "depth": str(found.num_layers)}
    shown = RichTable(box=None, padding=(0, 1, 0, 0), show_header=False)
    for name, value in (facts | {"attention": found.attention} | found.support).items():
        shown.add_row(Text(name), Text(value))
    Console(highlight=False).print(shown)


@app.command()
def flops(
    config: Annotated[str, typer.Argument(help="config.json of a Hugging Face model, or the folder it is in.")],
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
    from tokendrop.methods.text import methods_from_text

    try:
        report = count(
            config,
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
    except TokenDropError as error:
        Console(stderr=True, markup=False).print(f"{type(error).__name__}: {error}", style="red")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
        return
    note = f"{'Forward and backward' if backward else 'Forward'} of {text} text and {image} image tokens."
    print_table(Console(), flop_table(report), [note])


@app.command()
def analyze(
    source: Annotated[
        str | None,
        typer.Argument(
            help="package.module:function that returns (model, batches, layout), or with the loss of a batch as a "
            "fourth; without it, the demo's dense model is trained and looked at."
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="FLOPs over dense ones that a plan may cost.")] = 0.5,
    quick: Annotated[bool, typer.Option("--quick", help="The demo's model after a few steps.")] = False,
    out: Annotated[Path, typer.Option(help="Where analysis.json and report.html go.")] = Path("analysis"),
    as_json: Annotated[bool, typer.Option("--json", help="Print analysis.json instead of tables.")] = False,
) -> None:
    """Say where a model's attention goes, and what to drop for a budget, with the evidence and code to paste."""
    from tokendrop.analysis.allocation import attention_allocation
    from tokendrop.analysis.analyze import read_source, sections, share_table

    screen, notices = Console(markup=False, highlight=False), Console(stderr=True, markup=False, highlight=False)
    try:
        if source is None:
            import torch

            from tokendrop.study import study
            from tokendrop.study.analyzed import trained_dense

            torch.set_num_threads(1)  # so small a model is slower on more
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"lightning\.")
            model, batches, layout, loss = trained_dense(study.QUICK if quick else study.Study())
        else:
            model, batches, layout, loss = read_source(source)
        found = attention_allocation(model, batches, layout, blocks=24, loss=loss)
        advice = found.advise(budget)
        out.mkdir(parents=True, exist_ok=True)
    except (TokenDropError, OSError) as error:
        notices.print(_said(error), style="red")
        raise typer.Exit(1) from error
    text = json.dumps({"allocation": found.to_dict(), "advice": advice.to_dict()}, indent=1)
    (out / "analysis.json").write_text(text + "\n")
    (out / "report.html").write_text(render("tokendrop analyze", sections(found, advice)))
    if as_json:
        typer.echo(text)
    else:
        print_table(screen, share_table(found), ["Shares of the dense model's attention, all rows counted."])
        print_table(screen, advice.table(), [advice.evidence()])
        typer.echo(f"\n{advice.code()}\n{advice.yaml()}")
    notices.print(f"{out / 'analysis.json'} and {out / 'report.html'} written")


@app.command()
def synergy(
    quick: Annotated[bool, typer.Option("--quick", help="Minutes; too short to judge quality.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the runs of the paper's Table 3.")] = 5,
    more_seeds: Annotated[int, typer.Option(min=0, help="Seeds of the other configurations.")] = 3,
    out: Annotated[Path, typer.Option(help="Where rows and the report go; a broken study goes on there.")] = Path(
        "synergy"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows instead of tables.")] = False,
) -> None:
    """Train the paper's Table 3 at our scale with the gradients watched, and say whether they foretell synergy."""
    from tokendrop.study import synergy as study_of
    from tokendrop.study import synergy_summary as summary
    from tokendrop.study.runner import made_where
    from tokendrop.synergy.history import read_history

    screen, notices = Console(markup=False, highlight=False), Console(stderr=True, markup=False, highlight=False)
    study = study_of.QUICK if quick else study_of.SynergyStudy()
    try:
        for done, due, row in study_of.run_missing(study, seeds, more_seeds, out, made_where):
            notices.print(f"{done} of {due}: {row['name']}, seed {row['seed']}, {row['seconds']:.0f} s")
    except (TokenDropError, OSError) as error:
        notices.print(_said(error), style="red")
        raise typer.Exit(1) from error
    rows = read_history(out / "rows.jsonl")
    flops = {name: summary.flops_ratio(study, name) for name in dict.fromkeys(row["name"] for row in rows)}
    (out / "report.html").write_text(render("tokendrop synergy", summary.report(rows, study, flops, out)))
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        print_table(screen, summary.table(rows, flops), [summary.note(rows)])
        print_table(screen, summary.configurations(rows, study), ["Means over seeds, 95 % intervals."])
        print_table(screen, summary.correlations(rows, study), ["Spearman's correlation over configurations."])
    notices.print(f"{out / 'rows.jsonl'} and {out / 'report.html'} written")


def _said(error: Exception) -> str:
    # What a file says may be in it: no control sequence of somebody else's reaches the terminal.
    text = f"{type(error).__name__}: {error}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def flop_table(report: "FlopReport") -> Table:
    """Parts, layers that cost the same, and the whole, in 10^9 FLOPs."""
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


class JobProgress(Progress):
    """A bar for each job that has begun.

    Args:
        console: where bars are drawn.
    """

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=console)
        self._bars: dict[str, TaskID] = {}

    def show(self, job: str, done: int, due: int | None) -> None:
        """Say that a job has done `done` of `due` steps."""
        bar = self._bars.get(job)
        if bar is None:
            bar = self._bars[job] = self.add_task(job, total=due)
        self.update(bar, completed=done, total=due)


def print_table(console: Console, table: Table, notes: Sequence[str]) -> None:
    """Print a table, and below it what its figures mean."""
    columns = list(zip(table.header, *table.rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    if sum(widths) + len(widths) > console.width:
        # Each cell breaks between a figure and its noise, and nowhere else.
        widths = [max(map(len, " ".join(cells).split())) for cells in columns]
    shown = RichTable(box=None, padding=(0, 1, 0, 0))
    for index, (name, width) in enumerate(zip(table.header, widths, strict=True)):
        shown.add_column(name, justify="right" if index else "left", width=width)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(note, style="dim")
