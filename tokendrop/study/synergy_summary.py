"""What a study of synergy found: the paper's Table 3 beside ours, and what gradients say early about the end."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokendrop.analysis.report import Image, Section, Table, lines_png
from tokendrop.study.costs import Steps
from tokendrop.study.intervals import interval
from tokendrop.study.summary import BASELINE, BEST, MISSING, QUALITY, best_dropped
from tokendrop.study.synergy import TABLE_3, TWICE, SynergyStudy
from tokendrop.synergy.history import heat_map, read_history
from tokendrop.unified.data import TASKS

Row = Mapping[str, Any]
PAIR = "/".join(TASKS)
# arXiv 2606.01503, Table 3: FLOPs, GQA, FID on MJHQ-30K (lower is better).
PAPER = {
    "U-only": ("1x", "52.86", "-"),
    "G-only": ("1x", "-", "17.45"),
    "unified": ("1x", "56.00", "15.78"),
    "HiMix-U": ("0.24x", "49.92", "-"),
    "HMGen-G": ("0.85x", "-", "12.16"),
    "share-all": ("0.56x", "33.00", "12.53"),
    "share-partial": ("0.55x", "47.05", "14.54"),
}
HEADER = (
    "run", "FLOPs", "U exact", "U synergy", "G NLL", "G synergy", "CPU s", "paper FLOPs", "paper GQA", "paper FID"
)  # fmt: skip
PREDICTORS = ("alignment", "fidelity", "affinity U to G", "affinity G to U")
NOTE = (
    "Means over {seeds} seeds with 95 % intervals (Student's t). U: exact captions by greedy decoding of test digits; "
    "G: NLL per image code. Synergy: quality minus that of the same task trained alone and dense, positive is better; "
    "paired by seed. Equal samples for each task; '"
    + TWICE
    + "' has the updates of a run of two tasks. CPU s: of training and testing on one thread, the monitor left out."
)


def flops_ratio(study: SynergyStudy, name: str) -> float:
    """Counted FLOPs of a run's steps over those of the same steps run dense."""
    return Steps(study, name).flops() / Steps(study, name, dense=True).flops()


def table(rows: Sequence[Row], flops: Mapping[str, float]) -> Table:
    """The paper's Table 3 beside ours."""
    names = [name for name in (*TABLE_3, "late", TWICE) if any(row["name"] == name for row in rows)]
    return Table(HEADER, [_line(rows, name, flops[name]) for name in names], *_marked(rows, names))


def _marked(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[int], str]:
    best = best_dropped([row for row in rows if row["name"] in names])
    return ([names.index(best)] if best else []), BEST


def _line(rows: Sequence[Row], name: str, flops: float) -> tuple[str, ...]:
    own = _of(rows, name)
    seconds = [row["seconds"] - row["monitor_seconds"] for row in own]
    cells = [name, f"{flops:.2f}x"]
    for task in TASKS:
        metric, _ = QUALITY[task]
        cells.append(interval([row[task][metric] for row in own]) if own[0][task] else MISSING)
        gains = synergies(rows, name, task)
        cells.append(interval(gains, signed=True) if gains and name != BASELINE[task] else MISSING)
    return (*cells, interval(seconds), *PAPER.get(name, (MISSING,) * 3))


def synergies(rows: Sequence[Row], name: str, task: str) -> list[float]:
    """The synergy of a task in a run, for each seed."""
    metric, sign = QUALITY[task]
    alone = {row["seed"]: row[task][metric] for row in _of(rows, BASELINE[task])}
    own = [row for row in _of(rows, name) if row[task] and row["seed"] in alone]
    return [sign * (row[task][metric] - alone[row["seed"]]) for row in own]


def early(row: Row, predictor: str, share: float = 0.2) -> float:
    """What a predictor says at the end of the first `share` of a run's training; NaN where it says nothing.

    Fidelity is the mean of both tasks, and 1 for a dense run.
    """
    events = [
        event for event in row["events"] if event["step"] <= share * 2 * row["config"]["steps"] and "gap" not in event
    ]
    if not events:
        return math.nan
    last, (u, g) = events[-1], TASKS
    if predictor == "alignment":
        found = last["alignment"][PAIR]["value"] if last["alignment"][PAIR].get("known", True) else None
    elif predictor == "fidelity":
        values = [one["value"] for one in last.get("fidelity", {}).values()]
        found = None if None in values else statistics.fmean(values) if values else 1.0
    else:
        found = last["affinity"][f"{u}/{g}" if predictor.endswith("U to G") else f"{g}/{u}"]["value"]
    return math.nan if found is None else found


def correlations(rows: Sequence[Row], study: SynergyStudy, draws: int = 2000) -> Table:
    """Spearman's correlation of each early predictor with the final synergy of each task, over configurations.

    Each configuration is one point, its seeds averaged; the interval resamples configurations.
    """
    names = [name for name in study.joint if any(row["name"] == name for row in rows)]
    lines = []
    for predictor in PREDICTORS:
        said = [statistics.fmean([early(row, predictor) for row in _of(rows, name)]) for name in names]
        cells = [predictor]
        for task in TASKS:
            came = [statistics.fmean(synergies(rows, name, task)) for name in names]
            cells.append(spearman(np.array(said), np.array(came), draws))
        lines.append(tuple(cells))
    return Table(("first fifth", f"U synergy, {len(names)} configurations", "G synergy"), lines)


def spearman(x: np.ndarray, y: np.ndarray, draws: int) -> str:
    """Spearman's rank correlation with its 95 % interval over resampled pairs; a dash where there is none."""
    from scipy.stats import rankdata

    def rho(index: np.ndarray) -> np.ndarray:
        a, b = (rankdata(one[index], axis=1) for one in (x, y))
        a, b = (one - one.mean(1, keepdims=True) for one in (a, b))
        norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        return np.divide((a * b).sum(1), norms, out=np.full(len(index), math.nan), where=norms > 0)

    found = math.nan if np.isnan(x).any() or len(x) < 4 else float(rho(np.arange(len(x))[None])[0])
    if math.isnan(found):
        return MISSING
    resampled = rho(np.random.default_rng(0).integers(len(x), size=(draws, len(x))))
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f})"


def configurations(rows: Sequence[Row], study: SynergyStudy) -> Table:
    """Every run of both tasks: what its gradients said in the first fifth, and what came of it."""
    lines, names = [], [name for name in study.joint if _of(rows, name)]
    for name in names:
        own = _of(rows, name)
        said = [interval([early(row, predictor) for row in own], signed=True) for predictor in PREDICTORS]
        came = [interval(synergies(rows, name, task), signed=True) for task in TASKS]
        lines.append((name, str(len(own)), *came, *said))
    return Table(("run", "seeds", "U synergy", "G synergy", *PREDICTORS), lines, *_marked(rows, names))


def curves(rows: Sequence[Row], names: Sequence[str], kind: str, key: str) -> bytes:
    """A monitored figure over training, a line for each run, its seeds averaged."""
    lines = {}
    for name in names:
        points: dict[int, list[float]] = {}
        for row in _of(rows, name):
            for event in row["events"]:
                value = event.get(kind, {}).get(key, {}).get("value")
                if value is not None:
                    points.setdefault(event["step"], []).append(value)
        if points:
            lines[name] = [(step, statistics.fmean(values)) for step, values in sorted(points.items())]
    return lines_png(lines, "optimiser step", kind)


def report(rows: Sequence[Row], study: SynergyStudy, flops: Mapping[str, float], folder: Path) -> list[Section]:
    """The sections of the study's report."""
    joint = [name for name in ("unified", "share-all", "share-partial", "late") if _of(rows, name)]
    dropped = [name for name in joint if name != "unified"]
    u, g = TASKS
    pictures = [Image(f"Alignment of {PAIR}", curves(rows, joint, "alignment", PAIR))] if joint else []
    if dropped:
        pictures += [Image(f"Fidelity of {task}", curves(rows, dropped, "fidelity", task)) for task in TASKS]
        pictures += [
            Image(f"Affinity of {a} to {b}", curves(rows, joint, "affinity", f"{a}/{b}")) for a, b in ((u, g), (g, u))
        ]
    return [
        Section("The paper's Table 3, and ours", note(rows), table(rows, flops)),
        Section("Gradients over training", images=pictures),
        Section("Alignment by layer", images=_maps(joint, folder)),
        Section("What the first fifth said, and what came of it", table=configurations(rows, study)),
        Section("Does it predict? Spearman's correlation, 95 % interval", table=correlations(rows, study)),
    ]


def note(rows: Sequence[Row]) -> str:
    """What the figures of the table mean."""
    return NOTE.format(seeds=len({row["seed"] for row in _of(rows, "unified")}))


def _maps(names: Sequence[str], folder: Path) -> list[Image]:
    images = []
    for name in names:
        history = folder / f"{name}-0.jsonl"
        if history.exists():
            out = io.BytesIO()
            heat_map(read_history(history), PAIR).savefig(out, format="png", dpi=110)
            images.append(Image(f"{name}, seed 0", out.getvalue()))
    return images


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
