"""The study of synergy: resumable, and its tables by hand."""

import json
import math

import pytest
from typer.testing import CliRunner

from tokendrop.cli import app
from tokendrop.study import synergy
from tokendrop.study.synergy import TABLE_3, TWICE, SynergyStudy, missing, one_run, run_missing
from tokendrop.study.synergy_summary import configurations, correlations, early, synergies, table

TINY = SynergyStudy(codes=16, hidden=16, steps=4, batch_size=8, val_scenes=4, test_scenes=8, curve_points=1)
U, G = "understanding", "generation"


def row(name, seed, u=None, g=None, events=(), steps=10):
    scores = {U: None if u is None else {"accuracy": u}, G: None if g is None else {"nll": g}}
    config = {"steps": steps, "methods": {} if name == "unified" else {U: "HiMix"}}
    made = {"versions": {"torch": "2.6"}, "date": "2026-11-26T12:00:00+00:00"}
    base = {"name": name, "seed": seed, "seconds": 10.0 + seed, "monitor_seconds": 1.0, "config": config, **made}
    return base | scores | {"events": list(events)}


def event(step, alignment, fidelity=None, affinity=0.0):
    found = {"step": step, "alignment": {f"{U}/{G}": {"value": alignment}}}
    found["affinity"] = {f"{a}/{b}": {"value": affinity} for a in (U, G) for b in (U, G)}
    return found | ({"fidelity": {U: {"value": fidelity}, G: {"value": fidelity}}} if fidelity is not None else {})


ROWS = [
    *(row("U-only", seed, u=0.5 + 0.1 * seed) for seed in range(3)),
    *(row("G-only", seed, g=2.0) for seed in range(3)),
    *(row("unified", seed, 0.8 + 0.1 * seed, 1.5, [event(2, 0.5), event(4, 0.3), event(5, -1.0)]) for seed in range(3)),
    *(row("share-all", seed, 0.4 + 0.1 * seed, 2.25, [event(4, -0.2, 0.6)]) for seed in range(3)),
]


def test_the_runs():
    assert set(TABLE_3) <= set(SynergyStudy().runs())
    assert len(SynergyStudy().joint) == 12
    assert SynergyStudy().of(TWICE).steps == 2 * SynergyStudy().steps
    assert SynergyStudy().of("unified") == SynergyStudy()
    assert [SynergyStudy().schedule(name) is None for name in ("share-all", "share-all, scheduled")] == [True, False]


def test_synergy_is_paired_by_seed():
    assert synergies(ROWS, "unified", U) == pytest.approx([0.3] * 3)
    assert synergies(ROWS, "share-all", G) == pytest.approx([-0.25] * 3)
    assert synergies(ROWS, "share-all", U) == pytest.approx([-0.1] * 3)


def test_early_is_the_last_event_of_the_first_fifth():
    # 20 updates of two tasks: the first fifth ends with step 4.
    unified, dropped = ROWS[6], ROWS[9]
    assert early(unified, "alignment") == 0.3
    assert early(unified, "fidelity") == 1.0
    assert early(dropped, "fidelity") == 0.6
    assert early(dropped, "affinity U to G") == 0.0
    assert math.isnan(early(row("late", 0, events=[event(9, 1.0)]), "alignment"))
    assert math.isnan(early(row("late", 0, events=[{"step": 1, "gap": "nan"}]), "alignment"))


def test_the_table_beside_the_papers():
    shown = table(ROWS, {"U-only": 1.0, "G-only": 1.0, "unified": 1.0, "share-all": 0.55})
    by_name = {line[0]: dict(zip(shown.header, line, strict=True)) for line in shown.rows}
    assert list(by_name) == ["U-only", "G-only", "unified", "share-all"]
    assert [by_name["unified"][f"paper {one}"] for one in ("GQA", "FID", "FLOPs")] == ["56.00", "15.78", "1x"]
    assert by_name["share-all"]["FLOPs"] == "0.55x"
    assert [shown.rows[at][0] for at in shown.marked] == ["share-all"]  # the only one that drops in both tasks
    # 0.9 with a 95 % interval of 4.303 * 0.1 / sqrt 3.
    assert by_name["unified"]["U exact"] == "0.9 ±0.2"
    assert by_name["U-only"]["U synergy"] == by_name["G-only"]["U exact"] == "-"
    assert by_name["unified"]["G synergy"] == "+0.500"


def test_correlation_by_hand():
    names = SynergyStudy().joint[:6]
    made = [one for one in ROWS if one["name"] in ("U-only", "G-only")]
    for rank, name in enumerate(names):
        # Alignment orders the synergy of U, and reverses that of G.
        made += [row(name, seed, 0.5 + rank / 10, 1.0 + rank / 10, [event(1, rank / 10, 0.5)]) for seed in range(3)]
    shown = correlations(made, SynergyStudy(), draws=200)
    alignment = shown.rows[0]
    assert alignment[1].startswith("+1.00 (")
    assert alignment[2].startswith("-1.00 (")
    assert len(configurations(made, SynergyStudy()).rows) == 6


def test_a_broken_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("U-only", 0, u=0.5)) + '\n{"name": "unif')
    todo = missing(TINY, 1, 1, path)
    assert ("U-only", 0) not in todo
    assert ("unified", 0) in todo
    assert len(todo) == len(TINY.runs()) - 1
    # A line that a killed run left unfinished does not spoil the next.
    monkeypatch.setattr(synergy, "missing", lambda *_: [("HiMix-U", 0)])
    assert [(done, due) for done, due, _ in run_missing(TINY, 1, 0, tmp_path, dict, workers=1)] == [(1, 1)]
    held = [one["name"] for one in synergy.read_history(path)]
    assert held == ["U-only", "HiMix-U"]


def test_a_run_with_its_gradients_watched(tmp_path):
    made = one_run(TINY, "share-all", 0, str(tmp_path))
    assert [one["step"] for one in made["events"]] == list(range(4, 9))
    assert {"accuracy", "nll"} <= made[U].keys()
    assert min(made["seconds"], made["monitor_seconds"]) > 0  # of the CPU, and by the clock
    assert one_run(TINY, "U-only", 0, str(tmp_path))["events"] == []


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(synergy, "QUICK", TINY)
    monkeypatch.setattr(synergy, "run_missing", lambda *_: iter([(1, 1, ROWS[0])]))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    found = CliRunner().invoke(app, ["synergy", "--quick", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert "share-all" in found.output
    assert (tmp_path / "report.html").stat().st_size > 5000
    assert json.loads(CliRunner().invoke(app, ["synergy", "--quick", "--json", "--out", str(tmp_path)]).stdout) == ROWS
