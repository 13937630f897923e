"""The study of quality against FLOPs: its runs, what they spend, that it is resumed, and its tables by hand."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import tokendrop as td
from tokendrop.study import frontier, runner
from tokendrop.study.costs import Steps
from tokendrop.study.frontier import SCALES, missing, one_run, run_missing
from tokendrop.study.frontier_early import PREDICTORS, early_table
from tokendrop.study.frontier_ranks import ranks_table
from tokendrop.study.frontier_summary import (
    best_alone,
    dense_at,
    differences_table,
    flops,
    frontier_png,
    names,
    quality,
    quality_table,
    synergy,
)  # fmt: skip
from tokendrop.study.plans import FrontierError, plans

# Lightning 2.6 calls a function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

U, G = "understanding", "generation"
SIZES = {"codes": 16, "hidden": 16, "heads": 2, "batch_size": 4, "val_scenes": 4, "test_scenes": 8, "curve_points": 1}
TINY = replace(SCALES["digits"], steps=5, drawn=4, **SIZES)


def row(plan, seed, u=None, g=None, updates=1.0, spent=100.0, split="val"):
    told = {"accuracy": u, "nll": 1 - u} if u is not None else None
    made = {"nll": g, "agreement": 0.5} if g is not None else None
    where = {"scale": "digits", "split": split, "plan": plan, "updates": updates, "seed": seed}
    return {**where, U: told, G: made, "flops": spent}


ROWS = [
    *(row("U alone", seed, u=0.25 + seed / 8, spent=50.0) for seed in range(3)),
    *(row("U alone", seed, u=0.375 + seed / 8, updates=2.0) for seed in range(3)),
    *(row("G alone", seed, g=2.0, spent=50.0) for seed in range(3)),
    *(row("plan", seed, 0.5 + seed / 8 - (seed == 1) / 32, 1.875, spent=60.0) for seed in range(3)),
    *(row("dense", seed, 0.5 + seed / 8, 1.75) for seed in range(3)),
    *(row("dense", seed, 0.375 + seed / 8, 2.0, updates=0.5, spent=50.0) for seed in range(3)),
]


@pytest.mark.parametrize("layers", [6, 12])
def test_every_plan_can_be_trained(layers):
    found = plans(layers)
    assert {"U alone", "G alone", "dense", "placebo G", "Share All"} <= found.keys()
    for plan in found.values():
        for method in plan.methods.values():
            assert len(method.route(layers)) == layers
    assert found["U 2:, G 1:5:2 skipped"].methods[U] == td.HiMix("2:" if layers == 6 else "4:")
    skipped = [one.image is td.Role.BYPASS for one in found["U 2:, G 2:5 skipped"].methods[G].route(layers)]
    assert skipped == [False] * (layers // 3) + [True] * (layers // 2) + [False] * (layers // 6)


def test_depths_and_names_that_are_not_there():
    with pytest.raises(FrontierError, match="layers: found 8"):
        plans(8)
    with pytest.raises(FrontierError, match="found the plan 'Share Most'; use one of U alone"):
        TINY.of("Share Most x0.5")
    with pytest.raises(FrontierError, match="found the scale 'letters'; use one of digits"):
        next(run_missing("letters", "val", ["dense"], [0], frontier.Path("rows"), dict))


def test_updates_of_a_run_and_its_placebo():
    assert [TINY.of(name).steps for name in ("dense", "dense x0.6", "U alone x2")] == [5, 3, 10]
    assert [TINY.of(name).scenes.placebo for name in ("dense", "placebo G")] == [False, True]
    assert TINY.scenes.few == 300
    assert TINY.of("quarter rejoins, dense end x2").schedule("quarter rejoins, dense end") == td.Schedule(dense_tail=4)


def test_flops_of_a_run_are_those_that_are_counted():
    u, g = (5 * Steps(TINY, name).flops() for name in ("U alone", "G alone"))
    dense, half, placebo = (one_run(TINY, name, 0) for name in ("dense", "dense x0.4", "placebo G"))
    assert dense["flops"] == placebo["flops"] == u + g == 2.5 * half["flops"]
    assert (dense["optimiser_steps"], half["optimiser_steps"]) == (10, 4)
    late = "U 2:, G 2:5 skipped"
    dropped, mixed = one_run(TINY, late, 0), one_run(TINY, f"{late}, each 5th dense", 0)
    step = Steps(TINY, late).flops()
    assert dropped["flops"] == 5 * step
    # Updates 4 and 9 of 10 are dense; tasks take turns.
    assert mixed["flops"] == 4 * step + (u + g) / 5


def test_a_row_says_what_was_run():
    made = one_run(replace(TINY, tested="test"), "Share All x0.4", 3)
    assert (made["plan"], made["updates"], made["seed"], made["split"]) == ("Share All", 0.4, 3, "test")
    assert made["config"]["methods"] == {
        U: "HiMix(layers=':', separate='none')",
        G: "HMGen(shallow='1:5:2', separate='none')",
    }
    assert (made["config"]["few"], made["config"]["steps"]) == (300, 2)
    assert {"accuracy", "nll"} <= made[U].keys()
    assert {"agreement", "nll"} <= made[G].keys()
    assert [set(nll) for _, nll in made["curve"]] == [{U, G}]
    assert made["events"] == []  # two batches of each task do not fit into a fifth of four updates
    json.dumps(made)


def test_the_monitor_looks_at_the_first_fifth_and_changes_nothing(monkeypatch):
    study = replace(TINY, steps=10)
    watched = one_run(study, "Share All", 0)
    assert [one["step"] for one in watched["events"]] == [4]
    assert {"alignment", "fidelity"} <= watched["events"][-1].keys()
    monkeypatch.setattr(frontier.FirstFifth, "on_train_batch_end", lambda *_: None)
    always = one_run(study, "Share All", 0)
    assert len(always["events"]) > 10
    assert [watched[task] for task in (U, G)] == [always[task] for task in (U, G)]
    assert one_run(study, "U alone x0.2", 0)["events"] == []


def test_a_broken_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("dense", 0, 0.5, 1.0)) + '\n{"scale": "dig')
    asked = "digits", "val", ["dense", "dense x0.5"], [0, 1], path
    assert missing(*asked) == [("dense x0.5", 0), ("dense", 1), ("dense x0.5", 1)]
    assert len(missing("digits", "test", *asked[2:])) == len(missing("mnist", "val", *asked[2:])) == 4
    monkeypatch.setitem(SCALES, "digits", TINY)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    wanted = "digits", "val", ["dense", "U alone x0.2"], [0], path, lambda: {"commit": "abc"}
    assert [(done, due) for done, due, _ in run_missing(*wanted)] == [(1, 1)]
    assert [json.loads(line)["plan"] for line in path.read_text().splitlines()[::2]] == ["dense", "U alone"]
    assert list(run_missing(*wanted)) == []


def test_synergy_is_against_the_best_number_of_updates_on_validation():
    assert best_alone(ROWS, "U exact") == "U alone x2"
    assert best_alone(ROWS, "G NLL") == "G alone"
    assert synergy(ROWS, ROWS, "U exact") == pytest.approx([0.125] * 3)
    assert synergy(ROWS, ROWS, "G NLL") == pytest.approx([0.25] * 3)
    chosen = [one for one in ROWS if one["updates"] != 2]
    assert synergy(ROWS, chosen, "U exact") == pytest.approx([0.25] * 3)


def test_dense_training_of_equal_flops_lies_between_two_runs():
    assert flops(ROWS, "plan") == 0.6
    assert list(dense_at(ROWS, 0.6, "U exact").values()) == pytest.approx([0.4, 0.525, 0.65])
    assert list(dense_at(ROWS, 0.6, "G NLL").values()) == pytest.approx([-1.95] * 3)
    assert dense_at(ROWS, 0.4, "U exact") == {}
    assert dense_at(ROWS, 0.495, "U exact") == quality(ROWS, "dense x0.5", "U exact")
    assert quality(ROWS, "dense x0.5", "G NLL") == {0: -2.0, 1: -2.0, 2: -2.0}


def test_the_tables():
    assert names(ROWS) == ["U alone", "U alone x2", "G alone", "dense", "dense x0.5", "plan"]
    shown = {line[0]: line for line in quality_table(ROWS).rows}
    assert shown["dense"] == ("dense", "3", "1.00", "0.6 ±0.3", "0.4 ±0.3", "1.750", "0.500")
    assert shown["U alone x2"][5:] == ("-", "-")
    by_name = {line[0]: line for line in differences_table(ROWS, ROWS).rows}
    assert list(by_name) == ["synergy of dense", "dense x0.5", "plan"]
    assert by_name["synergy of dense"][3:6] == ("+0.125 to U alone x2", "+0.125 to U alone x2", "+0.250 to G alone")
    # -0.0104 +- 4.303 * 0.0180 / sqrt 3 = 0.0448, and a fifth of the synergy is 0.025.
    assert by_name["plan"][2:4] == ("0.60", "-0.01 ±0.04 open")
    assert by_name["plan"][5] == "-0.125 worse"
    assert by_name["plan"][8] == "+0.075"
    assert frontier_png(ROWS, "a picture").startswith(b"\x89PNG")


def test_a_cell_on_fewer_seeds_than_its_line_says_how_many():
    def line(rows, name="plan"):
        return {one[0]: one for one in differences_table(rows, rows).rows}[name]

    more = [*ROWS, *(row("dense", seed, 0.5 + seed / 8, 1.75) for seed in (3, 4)),
            *(row("plan", seed, 0.5 + seed / 8, 1.875, spent=60.0) for seed in (3, 4))]  # fmt: skip
    found = line(more)
    assert found[1] == "5"
    assert found[5] == "-0.125 worse"
    assert found[8] == "+0.075 (3)"  # dense training of half of the updates has the first three
    less = [one for one in more if (one["plan"], one["updates"], one["seed"]) != ("dense", 1.0, 4)]
    assert line(less)[5] == "-0.125 worse (4)"
    gains = line([one for one in ROWS if (one["plan"], one["seed"]) != ("G alone", 0)], "synergy of dense")
    assert (gains[1], gains[4], gains[5]) == ("3", "+0.125 to U alone x2", "+0.250 to G alone (2)")
    assert all("(" not in cell for one in differences_table(ROWS, ROWS).rows for cell in one)


def test_a_task_without_synergy_has_none_to_lose_a_share_of():
    rows = [one if one["plan"] != "G alone" else row("G alone", one["seed"], g=1.5) for one in ROWS]
    by_name = {line[0]: line for line in differences_table(rows, rows).rows}
    assert by_name["synergy of dense"][5] == "-0.250 to G alone"
    assert by_name["plan"][5] == "-0.125 worse"
    kept = [*rows, *(row("kept", seed, 0.5 + seed / 8, 1.7501) for seed in range(3))]
    assert {line[0]: line for line in differences_table(kept, kept).rows}["kept"][5].endswith("worse")


def test_whether_two_scales_rank_plans_alike():
    """Plans of the large scale come in the order of the small one in U, and the other way round in G."""

    def runs(sign):
        return [row(f"plan {at}", seed, 0.5 + at / 16, 2 - sign * at / 8) for at in range(5) for seed in range(2)]

    dense = [one for one in ROWS if one["plan"] == "dense"]
    # Of a plan's updates, those nearest to .6 of the FLOPs; and what only one scale has is left out.
    other = [row("plan 0", seed, 0.0, 9.0, updates=2.0, spent=200.0) for seed in range(2)]
    (line,) = ranks_table([*dense, *runs(1), row("only here", 0, 0.9, 1.0)], [*dense, *runs(-1), *other]).rows
    assert line[0] == "5"
    assert line[1].startswith("+1.00")
    assert line[3].startswith("-1.00")


def test_what_the_first_fifth_foretells():
    pair = f"{U}/{G}"

    def watched(one, at):
        event = {"alignment": {pair: {"value": -at}}, "magnitude": {pair: {"value": None if at == 1 else 0.5}}}
        return {
            **one,
            "events": [event | {"fidelity": {U: {"value": 0.5 + at / 8}}}],
            "curve": [[1, {U: 2.0, G: 3.0 - at}]],
        }

    runs = [watched(row(f"plan {at}", seed, 0.5 + at / 16, 2 - at / 8), at) for at in range(5) for seed in range(2)]
    found = {line[0]: line[1:] for line in early_table([*ROWS, *runs]).rows}
    assert list(found) == list(PREDICTORS)
    assert all(cell.startswith("+1.00") for cell in found["G NLL on validation"] + found["fidelity of U"])
    assert all(cell.startswith("-1.00") for cell in found["alignment"])
    assert set(found["magnitude"] + found["fidelity of G"] + found["U NLL on validation"]) == {"-"}
