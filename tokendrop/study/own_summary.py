"""What a study of a user's own module found: qualities, synergy and FLOPs over seeds, with intervals."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokendrop.analysis.report import Section, Table
from tokendrop.errors import BatchError
from tokendrop.study.intervals import half_width, interval
from tokendrop.study.own import JOINT, OwnStudy
from tokendrop.study.summary import MISSING

Row = Mapping[str, Any]
HIGHER = (
    "accuracy", "acc", "exact", "em", "match", "f1", "f1score", "precision", "recall", "sensitivity", "specificity",
    "auc", "auroc", "auprc", "ap", "map", "miou", "iou", "dice", "bleu", "rouge", "meteor", "cider", "spice", "psnr",
    "ssim", "r2", "agreement", "reward", "top1", "top5",
)  # fmt: skip
LOWER = (
    "loss", "nll", "ce", "bce", "entropy", "crossentropy", "perplexity", "ppl", "bpb", "error", "err", "mse", "rmse",
    "mae", "mape", "wer", "cer", "fid", "kid", "kl", "distance", "divergence",
)  # fmt: skip
# Figures about a quality, not a quality.
NOISE = ("se", "std", "stderr", "stdev", "var", "variance", "ci", "low", "high", "count", "num", "n", "total")
# Where a word of a metric's name may begin in CamelCase.
BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
HEADER = ("run", "task", "metric", "quality", "synergy", "FLOPs", "GFLOPs a batch")


@dataclass(frozen=True)
class Quality:
    """A logged figure that a task is judged by.

    Args:
        task: whose.
        metric: its name as it is logged.
        sign: 1 where more of it is better, -1 where less is.
    """

    task: str
    metric: str
    sign: int


def task_of(metric: str, tasks: Sequence[str]) -> tuple[str | None, list[str]]:
    """The one task that a metric's name holds as a word of its own, or None; and its other words, as they are spelt.

    Example:
        >>> task_of("test/vqa/exact_match", ["vqa", "draw"])
        ('vqa', ['test', 'exact', 'match'])
    """
    rest, owners = metric, []
    for task in sorted(tasks, key=len, reverse=True):
        pattern = rf"(?<![A-Za-z0-9]){re.escape(task)}(?![A-Za-z0-9])"
        if re.search(pattern, rest):
            owners.append(task)
            rest = re.sub(pattern, " ", rest)
    return (owners[0] if len(owners) == 1 else None), re.findall(r"[A-Za-z0-9]+", rest)


def direction(words: Sequence[str]) -> int:
    """1 where the words of a metric's name say that more is better, -1 where less is, 0 where they do not say.

    Args:
        words: as they are spelt; one in CamelCase is what it ends with.

    Example:
        >>> direction(["test", "MulticlassAccuracy"]), direction(["val", "loss"]), direction(["margin"])
        (1, -1, 0)
        >>> direction(["inaccuracy"]), direction(["exact", "mismatch"])
        (0, 0)
    """
    if any(word.lower() in NOISE or _runs_into(word) for word in words):
        return 0
    more, less = (any(_ends(word) & set(known) for word in words) for known in (HIGHER, LOWER))
    return int(more) - int(less)


def _ends(word: str) -> set[str]:
    """A word, and what it ends with from each of its borders on, in lower case."""
    return {word[at:].lower() for at in (0, *(border.start() for border in BORDER.finditer(word)))}


def _runs_into(word: str) -> bool:
    # "inaccuracy" and "mismatch" say the opposite of what they end with, "topaccuracy" the same: nobody knows.
    ends = _ends(word)
    known = (*HIGHER, *LOWER)
    return not ends & set(known) and any(word.lower().endswith(one) for one in known if len(one) > 4)


def qualities(
    study: OwnStudy, rows: Sequence[Row], higher: Sequence[str] = (), lower: Sequence[str] = ()
) -> tuple[list[Quality], list[str]]:
    """What the tasks are judged by, and the metrics of a task whose direction nothing says.

    Where `higher` or `lower` name metrics, these; else every metric that holds one task's name as a word, and a word
    that says its direction.

    Raises:
        BatchError: a named metric that was not logged; a task without one; a metric that a run did not log.
    """
    logged = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    stated = {name: sign for sign, names in ((1, higher), (-1, lower)) for name in names}
    if unknown := [name for name in stated if name not in logged or task_of(name, study.tasks)[0] is None]:
        raise BatchError(f"found no metric {unknown} of a task; {study.source!r} logs {logged}")
    found, silent = [], []
    for name in stated or logged:
        task, words = task_of(name, study.tasks)
        sign = stated.get(name) or direction(words)
        if task is not None and sign:
            found.append(Quality(task, name, sign))
        elif task is not None:
            silent.append(name)
    for task in study.tasks:
        if not any(one.task == task for one in found):
            raise BatchError(
                f"task {task!r}: found no quality among the logged {logged}; log one whose name holds the task and "
                "says what it is, such as 'test/<task>/accuracy', or state it by --higher or --lower"
            )
    for row in rows:
        lost = [one.metric for one in found if one.task in row["tasks"] and one.metric not in row["metrics"]]
        if lost:
            raise BatchError(
                f"{row['name']}, seed {row['seed']}: expected {lost}, which other runs log; found "
                f"{list(row['metrics'])}"
            )
    return found, silent


def summarised(study: OwnStudy, rows: Sequence[Row], found: Sequence[Quality]) -> list[dict[str, Any]]:
    """For each run and quality: values by seed, synergy paired by seed, and FLOPs over the same run dense."""
    by = {(row["name"], row["seed"]): row for row in rows}
    said = []
    for name, (tasks, _) in study.runs().items():
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        joint = len(tasks) > 1
        dense = JOINT if joint else name
        ratios = [row["flops"] / by[dense, row["seed"]]["flops"] for row in own if (dense, row["seed"]) in by]
        for one in found if own else ():
            if one.task not in tasks:
                continue
            alone = f"{one.task} alone"
            pairs = [(row, by[alone, row["seed"]]) for row in own if (alone, row["seed"]) in by]
            gains = [one.sign * (a["metrics"][one.metric] - b["metrics"][one.metric]) for a, b in pairs]
            said.append(
                {
                    "run": name,
                    "task": one.task,
                    "metric": one.metric,
                    "better": "higher" if one.sign > 0 else "lower",
                    "quality": _figure([row["metrics"][one.metric] for row in own]),
                    "synergy": _figure(gains) if joint else None,
                    "flops_ratio": _figure(ratios),
                    "flops": _figure([row["flops"] for row in own]),
                }
            )
    return said


def _figure(values: Sequence[float]) -> dict[str, Any]:
    mean, half = statistics.fmean(values) if values else math.nan, half_width(values)
    ends = {"low": mean - half, "high": mean + half} if math.isfinite(half) else {"low": None, "high": None}
    return {"values": list(values), "mean": mean, **ends, "n": len(values)}


def table(said: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each run and quality."""
    lines = [
        (
            one["run"],
            one["task"],
            f"{one['metric']} ({one['better']} is better)",
            interval(one["quality"]["values"]),
            MISSING if one["synergy"] is None else interval(one["synergy"]["values"], signed=True),
            f"{one['flops_ratio']['mean']:.2f}x",
            f"{one['flops']['mean'] / 1e9:.3g}",
        )
        for one in said
    ]
    return Table(HEADER, lines)


def notes(study: OwnStudy, rows: Sequence[Row], silent: Sequence[str]) -> list[str]:
    """What the figures mean, and what makes them doubtful."""
    seeds = len({row["seed"] for row in rows})
    spread = "one seed, so that nothing says how sure they are" if seeds == 1 else "95 % intervals (Student's t)"
    counted = max(row["batches_counted"] for row in rows)
    lines = [
        f"Means over {seeds} seeds, {spread}. Quality: what {rows[0]['stage']} logs. Synergy: quality of the joint run "
        "minus that of the same task trained alone and dense, paired by seed; positive is better, whatever the metric. "
        f"FLOPs: counted in the first {counted} training batches, over the same run dense."
    ]
    if silent:
        named = ", ".join(silent)
        lines.append(f"Nothing says which way is better, so left out: {named}; state it by --higher, --lower.")
    if _ignored(rows):
        lines.append(
            f"Careful: each task alone logged the very figures, steps and FLOPs of '{JOINT}'; does {study.source} "
            "train only the tasks that it is given?"
        )
    return lines


def _ignored(rows: Sequence[Row]) -> bool:
    joint = {row["seed"]: row for row in rows if row["name"] == JOINT}
    pairs = [(row, joint[row["seed"]]) for row in rows if len(row["tasks"]) == 1 and row["seed"] in joint]
    same = ("flops", "steps")
    return bool(pairs) and all(
        all(a[key] == b[key] for key in same) and a["metrics"].items() <= b["metrics"].items() for a, b in pairs
    )


def report(rows: Sequence[Row], said: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> list[Section]:
    """The sections of the report."""
    each = [
        (row["name"], str(row["seed"]), str(row["steps"]), f"{row['seconds']:.0f}",
         ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items()))
        for row in rows
    ]  # fmt: skip
    return [
        Section("Synergy", " ".join(lines), table(said)),
        Section("Every run", table=Table(("run", "seed", "steps", "seconds", "logged"), each)),
    ]
