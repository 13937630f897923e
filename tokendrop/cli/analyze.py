"""`tokendrop analyze`."""

import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tokendrop.cli.screen import check_folder, console, one_line_errors, print_table


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
    from tokendrop.analysis.advisor import check_budget
    from tokendrop.analysis.allocation import attention_allocation
    from tokendrop.analysis.allocation_report import sections, share_table
    from tokendrop.analysis.report import render
    from tokendrop.analysis.where import foot, made_where, subject_of
    from tokendrop.cli.source import blamed, read_source

    with one_line_errors():
        check_budget(budget)
        check_folder(out)
        model, batches, layout, loss = _demo_model(quick) if source is None else read_source(source)
        with nullcontext() if source is None else blamed(source):
            found = attention_allocation(model, batches, layout, blocks=24, loss=loss)
            advice = found.advise(budget)
        out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"allocation": found.to_dict(), "advice": advice.to_dict()}, indent=1)
    (out / "analysis.json").write_text(text + "\n")
    page = render("tokendrop analyze", sections(found, advice), foot(subject_of(model), made_where()))
    (out / "report.html").write_text(page)
    if as_json:
        typer.echo(text)
    else:
        screen = console()
        print_table(screen, share_table(found), ["Shares of the dense model's attention, all rows counted."])
        print_table(screen, advice.table(), [advice.evidence()])
        typer.echo(f"\n{advice.code()}\n{advice.yaml()}")
    console(stderr=True).print(f"{out / 'analysis.json'} and {out / 'report.html'} written")


def _demo_model(quick: bool) -> tuple[Any, ...]:
    import torch

    from tokendrop.study import study
    from tokendrop.study.analyzed import trained_dense

    torch.set_num_threads(1)  # so small a model is slower on more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    return trained_dense(study.QUICK if quick else study.DEMO)
