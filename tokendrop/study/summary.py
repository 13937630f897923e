"""The rows of a study as tables and as a report, no figure finer than its noise."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tokendrop.analysis.noise import to_noise
from tokendrop.analysis.report import Grid, Image, Section, Table, lines_png, pixels_png
from tokendrop.analysis.where import foot
from tokendrop.study.runner import Finished
from tokendrop.unified.data import TASKS

Row = Mapping[str, Any]
BEST = "the dropped run of both tasks with the best answers"
BASELINE = {"understanding": "U-only", "generation": "G-only"}
# The metric that synergy is taken on, and the sign that makes more of it better.
QUALITY = {"understanding": ("accuracy", 1), "generation": ("nll", -1)}
MISSING = "-"

HEADER = (
    "run", "FLOPs ratio", "U exact", "U synergy", "G NLL", "G synergy", "s/step", "MiB kept", "U NLL", "G agrees"
)  # fmt: skip

QUALITY_NOTE = (
    "U: how often its answer is exact by greedy decoding, and NLL per word. G: NLL per image code, and how often an "
    "independent classifier sees the digits asked for (it reads {judge:.1%} of real test digits right). Synergy: "
    "quality minus that of the same task trained alone and dense, positive is better; accuracy for U, nats for G. "
    "Runs have equal samples for each task, but for those of U alone, which have twice as many, where U-only is best "
    "on validation, and unified x0.6 and ours, which have so many that they spend 0.6 of the FLOPs of unified. "
    "All on test digits that no run was trained on; ± is {noise}."
)
COST_NOTE = (
    "FLOPs: of the whole training, counted, over those of unified. s/step: median seconds of an optimiser step, "
    "± half the interquartile range of {timed} rounds in which all runs took turns, in one process of one thread. MiB "
    "kept: by one forward for its backward, parameters aside."
)
QUICK_NOTE = "--quick trains too short to judge quality: read the costs, not the scores."


def table(rows: Sequence[Row]) -> Table:
    """For each run: how well it does each task, what training both was worth, and what a step costs."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    best = best_dropped(rows)
    return Table(HEADER, [_cells(rows, name) for name in names], [names.index(best)] if best else [], BEST)


def best_dropped(rows: Sequence[Row]) -> str | None:
    """The run that drops in both tasks and reads best."""
    joint = [row for row in rows if row["understanding"] and row["generation"] and row["config"]["methods"]]
    quality = {
        name: statistics.fmean(row["understanding"]["accuracy"] for row in _of(joint, name))
        for name in dict.fromkeys(row["name"] for row in joint)
    }
    return max(quality, key=lambda name: quality[name]) if quality else None


def foot_of(rows: Sequence[Row]) -> list[str]:
    """What was measured, where and when, of a report on the demo's model."""
    config, seeds = rows[0]["config"], len({row["seed"] for row in rows})
    size = ", ".join(f"{name} {config[name]}" for name in ("layers", "hidden", "steps", "source") if name in config)
    return foot(f"the demo's unified model ({size}), {seeds} {'seeds' if seeds > 1 else 'seed'}", rows[-1])


def _cells(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    row = _of(rows, name)[0]
    return (
        name,
        f"{row['flops_ratio']:.2f}",
        _score(rows, name, "understanding", "accuracy"),
        _synergy(rows, name, "understanding"),
        _score(rows, name, "generation", "nll"),
        _synergy(rows, name, "generation"),
        to_noise(row["step_seconds"], row["step_seconds_spread"]),
        f"{row['peak_bytes'] / 2**20:.0f}",
        _score(rows, name, "understanding", "nll"),
        _score(rows, name, "generation", "agreement"),
    )


def notes(rows: Sequence[Row]) -> tuple[str, str]:
    """What the figures of the table mean: quality, then costs."""
    seeds = len({row["seed"] for row in rows})
    noise = "the standard error over test items, of this one seed"
    if seeds > 1:
        noise = f"the standard deviation over {seeds} seeds, or the standard error over test items where that is more"
    judge = next(row["generation"]["judge_accuracy"] for row in rows if row["generation"])
    return QUALITY_NOTE.format(judge=judge, noise=noise), COST_NOTE.format(timed=rows[0]["timed_steps"])


def report(finished: Finished, quick: bool) -> list[Section]:
    """The sections of the demo's report: the table, learning curves, images asked for and made."""
    rows = finished.rows()
    quality, cost = notes(rows)
    return [
        *([Section("A short run", QUICK_NOTE)] if quick else []),
        Section("Nine runs", quality, table(rows)),
        Section("What a step costs", cost),
        Section("Learning curves", "On validation digits, first seed.", images=_curves(finished)),
        *_gallery(finished),
    ]


def _curves(finished: Finished) -> list[Image]:
    images = []
    for task in TASKS:
        lines = {
            outcome.name: [(batches, nll[task]) for batches, nll in outcome.curve]
            for outcome in finished.outcomes
            if outcome.seed == 0 and task in outcome.scores
        }
        chart = lines_png(lines, f"updates of {task}", "validation NLL")
        images.append(Image(f"Validation NLL of {task}, under each run's own method", chart))
    return images


def _gallery(finished: Finished) -> list[Section]:
    drew = [outcome for outcome in finished.outcomes if outcome.seed == 0 and outcome.pictures]
    if not drew:
        return []
    captions = [picture.caption for picture in drew[0].pictures]  # every run was given the same ones
    made = [[Image(f"{run.name}: {one.caption}", pixels_png(one.pixels)) for one in run.pictures] for run in drew]
    grid = Grid(("asked for", *(run.name for run in drew)), list(zip(captions, zip(*made, strict=True), strict=True)))
    return [Section("Asked for and made", "Images of the first seed, for the first test captions.", grid=grid)]


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])


def _score(rows: Sequence[Row], name: str, task: str, metric: str) -> str:
    scores = [row[task] for row in _of(rows, name)]
    if scores[0] is None:
        return MISSING
    return _estimate([s[metric] for s in scores], [s[f"{metric}_se"] for s in scores])


def _synergy(rows: Sequence[Row], name: str, task: str) -> str:
    scores, alone = ([row[task] for row in _of(rows, run)] for run in (name, BASELINE[task]))
    if scores[0] is None or name == BASELINE[task]:
        return MISSING
    metric, sign = QUALITY[task]
    pairs = list(zip(scores, alone, strict=True))
    gains = [sign * (mine[metric] - base[metric]) for mine, base in pairs]
    # The two runs share test items, so this is an upper bound of the error of their difference.
    errors = [(mine[f"{metric}_se"] ** 2 + base[f"{metric}_se"] ** 2) ** 0.5 for mine, base in pairs]
    return _estimate(gains, errors, signed=True)


def _estimate(values: Sequence[float], errors: Sequence[float], signed: bool = False) -> str:
    noise = statistics.fmean(errors)
    if len(values) > 1:
        noise = max(statistics.stdev(values), noise / len(values) ** 0.5)
    return to_noise(statistics.fmean(values), noise, signed)
