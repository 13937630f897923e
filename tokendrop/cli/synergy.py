"""`tokendrop synergy`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tokendrop.cli.screen import console, one_line_errors, print_table


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
    from tokendrop.analysis.report import render
    from tokendrop.study import synergy as study_of
    from tokendrop.study import synergy_summary as summary
    from tokendrop.study.runner import made_where
    from tokendrop.synergy.history import read_history

    screen, notices = console(), console(stderr=True)
    study = study_of.QUICK if quick else study_of.SynergyStudy()
    with one_line_errors():
        for done, due, row in study_of.run_missing(study, seeds, more_seeds, out, made_where):
            notices.print(f"{done} of {due}: {row['name']}, seed {row['seed']}, {row['seconds']:.0f} s")
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
