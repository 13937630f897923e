"""`tokendrop synergy`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tokendrop.cli.screen import check_folder, console, one_line_errors, print_table
from tokendrop.errors import MethodError

Source = Annotated[
    str | None,
    typer.Argument(
        help="package.module:function(tasks, methods, seed) that returns (module, datamodule, trainer arguments); "
        "without it, the paper's Table 3 on the demo's model."
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Of your own module, TASK=METHOD each: together one joint dropped run, until a task comes again; a "
        "method without a task is for all. By default HiMix, and HMGen in every second layer but the last."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="Its tasks; by default those of the methods, or understanding and generation."),
]
Higher = Annotated[list[str] | None, typer.Option(help="A logged metric of which more is better.")]
Lower = Annotated[list[str] | None, typer.Option(help="A logged metric of which less is better.")]
Quick = Annotated[bool, typer.Option("--quick", help="The demo's, minutes; too short to judge quality.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of the runs; the demo's: of the paper's Table 3.")]
MoreSeeds = Annotated[
    int | None, typer.Option(min=0, help="The demo's: seeds of the other configurations.", show_default="3")
]
Out = Annotated[Path, typer.Option(help="Where rows and the report go; a broken study goes on there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows instead of tables.")]


def synergy(
    source: Source = None,
    method: Methods = None,
    task: Tasks = None,
    higher: Higher = None,
    lower: Lower = None,
    quick: Quick = False,
    seeds: Seeds = 5,
    more_seeds: MoreSeeds = None,
    out: Out = Path("synergy"),
    as_json: AsJson = False,
) -> None:
    """Train tasks alone, jointly and dropped, over seeds, and print qualities, synergy and FLOPs."""
    own = {"--method": method, "--task": task, "--higher": higher, "--lower": lower}
    demo = {"--quick": quick, "--more-seeds": more_seeds is not None}
    with one_line_errors():
        wrong = [name for name, given in (own if source is None else demo).items() if given]
        if wrong:
            of = "a function of your own, and none is named" if source is None else "the demo's study, not for your own"
            raise MethodError(f"{', '.join(wrong)}: for {of}")
        check_folder(out)
        if source is None:
            _demo(quick, seeds, 3 if more_seeds is None else more_seeds, out, as_json)
        else:
            _own(source, method or [], task or [], (higher or [], lower or []), seeds, out, as_json)


def _demo(quick: bool, seeds: int, more_seeds: int, out: Path, as_json: bool) -> None:
    from tokendrop.analysis.report import render
    from tokendrop.study import synergy as study_of
    from tokendrop.study import synergy_summary as summary
    from tokendrop.study.runner import made_where
    from tokendrop.study.summary import foot_of
    from tokendrop.synergy.history import read_history

    screen, notices = console(), console(stderr=True)
    study = study_of.QUICK if quick else study_of.SynergyStudy()
    for done, due, row in study_of.run_missing(study, seeds, more_seeds, out, made_where):
        notices.print(f"{done} of {due}: {row['name']}, seed {row['seed']}, {row['seconds']:.0f} s")
    rows = read_history(out / "rows.jsonl")
    flops = {name: summary.flops_ratio(study, name) for name in dict.fromkeys(row["name"] for row in rows)}
    page = render("tokendrop synergy", summary.report(rows, study, flops, out), foot_of(rows))
    (out / "report.html").write_text(page)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        print_table(screen, summary.table(rows, flops), [summary.note(rows)])
        print_table(screen, summary.configurations(rows, study), ["Means over seeds, 95 % intervals."])
        print_table(screen, summary.correlations(rows, study), ["Spearman's correlation over configurations."])
    notices.print(f"{out / 'rows.jsonl'} and {out / 'report.html'} written")


def _own(
    source: str,
    method: list[str],
    task: list[str],
    directions: tuple[list[str], list[str]],
    seeds: int,
    out: Path,
    as_json: bool,
) -> None:
    from tokendrop.analysis.report import render
    from tokendrop.analysis.where import foot
    from tokendrop.cli.source import blamed, read_run
    from tokendrop.study import own, own_summary
    from tokendrop.study.runner import made_where

    notices, (tasks, methods) = console(stderr=True), _asked(method, task)
    study = own.OwnStudy(source, partial(read_run, source), tasks, methods)
    with blamed(source):
        for done, due, row in own.run_missing(study, seeds, out, made_where):
            notices.print(f"{done} of {due}: {row['name']}, seed {row['seed']}, {row['seconds']:.0f} s")
    rows = [row for row in own.rows_of(study, out) if row["seed"] < seeds]
    found, silent = own_summary.qualities(study, rows, *directions)
    said = own_summary.summarised(study, rows, found)
    lines = own_summary.notes(study, rows, silent)
    page = render("tokendrop synergy", own_summary.report(rows, said, lines), foot(source, rows[-1]))
    (out / "report.html").write_text(page)
    if as_json:
        typer.echo(json.dumps({"results": said, "notes": lines, "runs": rows}, indent=1))
    else:
        print_table(console(), own_summary.table(said), lines)
    notices.print(f"{out / own.ROWS} and {out / 'report.html'} written")


def _asked(method: list[str], task: list[str]) -> tuple[tuple[str, ...], list[Any]]:
    """Tasks and methods of the options; the paper's where they do not say."""
    from tokendrop.methods import HiMix, HMGen
    from tokendrop.methods.text import each_from_text
    from tokendrop.unified.data import TASKS

    methods: list[Any] = list(each_from_text(method))
    of_methods = dict.fromkeys(name for one in methods if isinstance(one, dict) for name in one)
    tasks = tuple(task or of_methods or TASKS)
    if not methods and tasks == TASKS:
        methods = [dict(zip(TASKS, (HiMix(), HMGen("1:-1:2")), strict=True))]
    return tasks, methods
