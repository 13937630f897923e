"""The demo from the command line: its files and what it prints, at the smallest size that runs."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_study import NAMES, TINY
from typer.testing import CliRunner

from tokendrop.analysis.report import Table
from tokendrop.cli import app
from tokendrop.cli.screen import print_table
from tokendrop.errors import LayerRangeError
from tokendrop.study import runner, study, summary, train
from tokendrop.unified.images import DemoDependencyError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "QUICK", TINY)
        result = CliRunner().invoke(app, ["demo", "--quick", "--seeds", "2", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    return result, out


@pytest.fixture(scope="module")
def rows(demo):
    return json.loads((demo[1] / "results.json").read_text())


def test_one_row_for_each_run_and_seed(rows):
    assert [(row["name"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in NAMES]


def test_rows_hold_what_they_promise(rows):
    for row in rows:
        for task in ("understanding", "generation"):
            assert (row[task] is not None) == (task in row["config"]["tasks"])
            assert row[task] is None or all(math.isfinite(value) for value in row[task].values())
        assert 0 < row["flops_ratio"] <= 1
        assert row["step_seconds"] > 0
        assert row["steps"] == TINY.batches(TINY.runs()[row["name"]]) * len(row["config"]["tasks"])
        assert row["config"]["hidden"] == 16
        assert {"tokendrop", "torch", "lightning", "transformers", "python"} <= set(row["versions"])
    assert set(rows[0]["understanding"]) == {"accuracy", "accuracy_se", "nll", "nll_se"}
    assert set(rows[1]["generation"]) == {"agreement", "agreement_se", "nll", "nll_se", "judge_accuracy"}
    assert rows[NAMES.index("HiMix-U")]["config"]["methods"] == {"understanding": "HiMix(layers=':', separate='none')"}


def test_json_goes_to_stdout_alone(demo, rows):
    assert json.loads(demo[0].stdout) == rows


def test_quick_says_so(demo):
    assert "too short to judge quality" in demo[0].stderr
    assert "too short to judge quality" in (demo[1] / "report.html").read_text()


def test_report_holds_everything_itself(demo):
    page = (demo[1] / "report.html").read_text()
    assert all(f">{name}<" in page for name in NAMES)
    assert not re.search(r"""https?://|(?:src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png") == 2 + 4 * 7
    assert "left bold" in page or "left thin" in page


def test_table_rounds_to_the_spread_between_seeds():
    def row(name, seed, accuracy, nll):
        understanding = {"accuracy": accuracy, "accuracy_se": 0.01, "nll": nll, "nll_se": 0.001}
        costs = {"flops_ratio": 0.3621, "step_seconds": 0.0377, "step_seconds_spread": 0.0006, "peak_bytes": 2**24}
        return {"name": name, "seed": seed, "understanding": understanding, "generation": None, **costs}

    rows = [row("U-only", 0, 0.70, 0.30), row("U-only", 1, 0.74, 0.34)]
    rows += [row("HiMix-U", 0, 0.60, 0.40), row("HiMix-U", 1, 0.70, 0.44)]
    table = summary.table(rows)
    assert [len(cells) for cells in table.rows] == [len(table.header)] * 2
    shown = [dict(zip(table.header, cells, strict=True)) for cells in table.rows]
    assert list(shown[0])[:3] == ["run", "FLOPs ratio", "U exact"]  # what decides comes first
    one, two = ([row[name] for name in ("run", "U exact", "U NLL", "U synergy")] for row in shown)
    assert one == ["U-only", "0.72 ±0.03", "0.32 ±0.03", "-"]
    assert two == ["HiMix-U", "0.65 ±0.07", "0.42 ±0.03", "-0.07 ±0.04"]
    others = ("G NLL", "G agrees", "G synergy", "FLOPs ratio", "s/step", "MiB kept")
    assert [shown[1][name] for name in others] == ["-", "-", "-", "0.36", "0.0377 ±0.0006", "16"]
    alone = summary.table(rows[:1])
    cells = dict(zip(alone.header, *alone.rows, strict=True))
    assert (cells["U exact"], cells["U NLL"]) == ("0.70 ±0.01", "0.300 ±0.001")
    assert not table.marked  # no run of both tasks drops


def test_the_dropped_run_of_both_tasks_that_reads_best_is_marked():
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "demo.json").read_text())
    table = summary.table(rows)
    reads = {cells[0]: float(cells[2].split()[0]) for cells in table.rows if cells[0].startswith(("share", "ours"))}
    (at,) = table.marked
    assert table.rows[at][0] == max(reads, key=reads.get) == "ours"


def test_what_was_asked_for_and_made_is_one_grid():
    pictures = [train.Picture(caption, np.eye(4, dtype=np.float32)) for caption in ("one two", "three")]
    runs = [
        train.Outcome(name, 0, {}, [], pictures if name != "U-only" else []) for name in ("U-only", "G-only", "ours")
    ]
    (section,) = summary._gallery(runner.Finished(None, runs, {}))
    assert list(section.grid.header) == ["asked for", "G-only", "ours"]
    rows = [(name, [one.caption for one in images]) for name, images in section.grid.rows]
    assert rows == [(name, [f"G-only: {name}", f"ours: {name}"]) for name in ("one two", "three")]
    assert summary._gallery(runner.Finished(None, runs[:1], {})) == []


def test_a_missing_package_is_one_sentence_with_its_cure(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise DemoDependencyError("run `pip install '.[demo]'`")

    monkeypatch.setattr(runner, "run_study", missing)
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.strip() == "DemoDependencyError: run `pip install '.[demo]'`"


def test_an_error_in_a_worker_ends_the_study():
    with pytest.raises(LayerRangeError, match="9:12"):
        runner.run_study(replace(TINY, shallow="9:12"), workers=1)


def test_a_bad_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "FileExistsError" in result.stderr
    assert "Traceback" not in result.output


def test_table_fits_80_columns_and_breaks_only_before_the_noise():
    cells = ("1.036 ±0.009", "+0.05 ±0.03", "0.0377 ±0.0006", *["0.71 ±0.02"] * 5, "123")
    table = Table(summary.HEADER, [("share-partial", *cells)])
    for width, lines in ((80, 2), (140, 1)):
        console = Console(width=width, file=io.StringIO())
        print_table(console, table, ["a note"])
        printed = console.file.getvalue().splitlines()
        assert max(map(len, printed)) <= width
        assert len(printed) == 2 * lines + 1
        assert printed[lines].split()[:2] == ["share-partial", "1.036"]
        assert "…" not in "".join(printed)
