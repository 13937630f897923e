"""`tokendrop demo`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tokendrop.cli.screen import console, one_line_errors, print_table


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two; too short to judge quality.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run; with several, noise is their spread.")] = 1,
    out: Annotated[Path, typer.Option(help="Where results.json and report.html go.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
) -> None:
    """Train a small unified model on real digits nine ways, and say what dropping saved and cost."""
    from tokendrop.analysis.report import render
    from tokendrop.study import summary
    from tokendrop.study.runner import run_study
    from tokendrop.study.study import DEMO, QUICK

    notices = console(stderr=True)
    with one_line_errors():
        out.mkdir(parents=True, exist_ok=True)
        with JobProgress(notices) as progress:
            finished = run_study(QUICK if quick else DEMO, seeds, watch=progress.show)
    rows = finished.rows()
    text = json.dumps(rows, indent=1)
    (out / "results.json").write_text(text + "\n")
    (out / "report.html").write_text(render("tokendrop demo", summary.report(finished, quick), summary.foot_of(rows)))
    if as_json:
        typer.echo(text)
    else:
        print_table(console(), summary.table(rows), summary.notes(rows))
    if quick:
        notices.print(summary.QUICK_NOTE, style="yellow")
    notices.print(f"{out / 'results.json'} and {out / 'report.html'} written")


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
