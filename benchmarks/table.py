"""Tables of the README and the docs, made from the committed results.

    python -m benchmarks.table            # writes what lies between the markers of each page
    <!-- table: step --> ... <!-- end -->

Shape letters: B batch, T tokens, L layers.
"""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks import methods as compared
from tokendrop.analysis.report import Table
from tokendrop.study import frontier_summary, synergy_summary
from tokendrop.study import summary as demo_summary
from tokendrop.study.frontier import SCALES
from tokendrop.study.frontier_early import early_table
from tokendrop.study.frontier_ranks import ranks_table
from tokendrop.study.intervals import interval
from tokendrop.study.plans import ALONE, JOINT
from tokendrop.study.synergy import SynergyStudy
from tokendrop.unified.data import TASKS

MEMORY = 80e9  # of a GPU, as in benchmarks/scale.py
RESULTS = Path(__file__).parent / "results"
PAGES = (Path(__file__).parents[1] / "README.md", *sorted((Path(__file__).parents[1] / "docs").rglob("*.md")))
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of one file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def figure(row: Row | None, digits: int = 2) -> str:
    """Median, and 20th to 80th percentile where they differ from it."""
    if row is None:
        return "-"
    median, low, high = (f"{row[key]:.{digits}f}" for key in ("median", "p20", "p80"))
    return median if low == median == high else f"{median} ({low} to {high})"


def pivot(rows: list[Row], line: Callable[[Row], tuple[str, ...]], head: list[str], metrics: list[str]) -> str:
    """A Markdown table: a line for each value of `line`, a column for each metric."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cell = found.setdefault(line(row), {})
        if row["metric"] in cell:  # one of them would be lost
            raise ValueError(f"two rows for {line(row)}, {row['metric']}; let the line say what tells them apart")
        cell[row["metric"]] = row
    cells = [[*key, *(figure(by.get(metric)) for metric in metrics)] for key, by in found.items()]
    lines = [[*head, *metrics], ["---"] * (len(head) + len(metrics)), *cells]
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def step(vocabulary: int = 2048) -> str:
    """A training step under each method."""
    rows = [row for row in rows_of("step") if row["config"]["vocabulary"] == vocabulary]
    metrics = ["FLOPs ratio", "time ratio", "capture", *_computed(rows), "kept ratio", "memory ratio"]
    return pivot(rows, lambda row: (row["provider"],), ["method"], metrics)


def _computed(rows: list[Row]) -> list[str]:
    # Rows from before it was measured have none.
    return ["computed capture"] if any(row["metric"] == "computed capture" for row in rows) else []


def growth() -> str:
    """How time and memory grow with tokens and layers."""

    def line(row: Row) -> tuple[str, ...]:
        return str(row["config"]["layers"]), str(row["config"]["tokens"]), row["provider"]

    rows = [row for row in rows_of("growth") if row["provider"] != "dense"]
    metrics = ["FLOPs ratio", "time ratio", "capture", *_computed(rows), "memory ratio"]
    return pivot(rows, line, ["L", "T", "method"], metrics)


def idle() -> str:
    """The callback, and a model's own layouts, where nothing is dropped."""

    def line(row: Row) -> tuple[str, ...]:
        config = row["config"]
        model = f"{config['layers']} layers, D {config['width']}, T {config['tokens']}"
        return row["case"].removeprefix("idle "), model, str(row["n"])

    return pivot(rows_of("idle"), line, ["what", "model", "steps"], ["time ratio"])


def random_ltd() -> str:
    """Ours and DeepSpeed's formulas."""
    metrics = ["FLOPs ratio", "time ratio", "capture", "memory ratio"]
    return pivot(rows_of("random-ltd"), lambda row: (row["provider"],), [""], metrics)


def attention() -> str:
    """Three forms of HiMix's attention."""
    rows = rows_of("attention")
    metric = rows[0]["metric"]
    return pivot(rows, lambda row: (str(row["config"]["tokens"]), row["provider"]), ["T", "form"], [metric])


def static() -> str:
    """What the compiled kernels use."""
    rows = [
        row for row in rows_of("kernels-static") if row["config"]["dtype"] == "bfloat16" and row["config"]["D"] == 4096
    ]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    return pivot(rows, lambda row: (row["case"], row["config"]["target"]), ["kernel", "target"], metrics)


def monitor() -> str:
    """The monitor at its default interval."""
    return pivot(
        rows_of("monitor"),
        lambda row: (str(row["config"]["updates"]), str(row["n"])),
        ["updates", "fits"],
        ["time ratio", "events"],
    )


def demo(*names: str) -> str:
    """The demo's runs, all or those named."""
    made = demo_summary.table(json.loads((RESULTS / "demo.json").read_text()))
    return markdown(replace(made, rows=[row for row in made.rows if not names or row[0] in names]))


PAPERS = {  # as the comparison at equal FLOPs names a method -> as the step benchmark does
    "HiMix, layers 2:": "HiMix",
    "HMGen, layers 3:": "HMGen alternating",
    "FastV, layer 1": "FastV 50%",
    "PyramidDrop, layers 1 3 5": "PyramidDrop",
    "HiDrop, entry 1, layers 2 3, exit 5": "HiDrop",
    "DuetVLM text stages, layers 2 4": "DuetVLM",
    "SVDPrune, layer 0": "SVDPrune 25%",
    "RandomLTD": "RandomLTD 25%",
    "MixtureOfDepths": "MixtureOfDepths",
    "Drop random, layer 1, gone": "Drop gone 25%",
}


def methods() -> str:
    """Every method beside dense training of equal FLOPs."""
    return markdown(compared.table(rows_of("frontier/methods")))


def papers() -> str:
    """What each method does to quality at equal FLOPs, and to the time of a step."""
    found = rows_of("frontier/methods")
    steps = [row for row in rows_of("step") if row["config"]["vocabulary"] == 2048 and row["metric"] == "time ratio"]
    times = {row["provider"]: row for row in steps}
    lines = [["method", "U exact", "of a step:", "time ratio"], ["---"] * 4]
    for name, step in {**dict.fromkeys(compared.DENSE[:2], "dense"), **PAPERS}.items():
        exact = interval(list(frontier_summary.quality(found, name, "U exact").values()))
        lines.append([name, exact, step, figure(times[step])])
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def _synergy(make: Callable[[list[Row], dict[str, float]], Table]) -> str:
    found = json.loads((RESULTS / "synergy-study.json").read_text())
    return markdown(make(found["rows"], found["flops"]))


def markdown(made: Table) -> str:
    """A table in Markdown."""
    lines = [made.header, ["---"] * len(made.header), *made.rows]
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def frontier_rows(scale: str, split: str) -> list[Row]:
    """The rows of the study of the frontier at one scale and split."""
    return [row for row in rows_of("frontier/rows") if (row["scale"], row["split"]) == (scale, split)]


def frontier_name(scale: str, split: str) -> str:
    """How a table or picture of the frontier is called.

    Example:
        >>> frontier_name("mnist, 12 layers", "val")
        'frontier-mnist-12-layers-val'
    """
    return f"frontier-{scale.replace(', ', '-').replace(' ', '-')}-{split}"


def frontier(scale: str, split: str) -> str:
    """Every run at one scale."""
    return markdown(frontier_summary.quality_table(frontier_rows(scale, split)))


def frontier_differences(scale: str, split: str) -> str:
    """Each joint run beside dense joint training; what is chosen is chosen on validation."""
    chosen = frontier_rows(scale, "val")
    return markdown(frontier_summary.differences_table(frontier_rows(scale, split), chosen))


def frontier_early(scale: str) -> str:
    """What the first fifth of training foretells, on validation."""
    return markdown(early_table(frontier_rows(scale, "val")))


def frontier_ranks() -> str:
    """Whether digits rank plans as MNIST pairs do, on validation."""
    return markdown(ranks_table(frontier_rows("digits", "val"), frontier_rows("mnist", "val")))


def frontier_sizes() -> str:
    """Joint training beside each task alone, of as many batches, for the sizes among which some were chosen."""
    scales = ("digits, one digit", "mnist, one digit", "mnist 2x2, one digit")
    rows = [*rows_of("frontier/sizes"), *(row for scale in scales for row in frontier_rows(scale, "val"))]
    groups: dict[tuple[str, int, int, int], list[Row]] = {}
    for row in rows:
        made = row["config"]
        at = row["scale"].removesuffix(", one digit"), made["few"], made.get("others", 0)
        groups.setdefault((*at, round(made["steps"] / row["updates"])), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (images, few, others, batches), found in sorted(groups.items(), key=lambda one: one[0]):
        cells = [_joint_and_alone(found, metric) for metric in frontier_summary.METRICS]
        if set(cells) != {"-"}:
            lines.append((images, str(few), str(others) if others else "all others", str(batches), *cells))
    return markdown(Table(("images", "for U", "for G", "batches", *frontier_summary.METRICS), lines))


def _joint_and_alone(rows: list[Row], metric: str) -> str:
    task, _, sign = frontier_summary.METRICS[metric]
    joint, alone = (frontier_summary.quality(rows, name, metric) for name in (JOINT, ALONE[TASKS.index(task)]))
    seeds = joint.keys() & alone.keys()
    means = [f"{sign * statistics.fmean(one[seed] for seed in seeds):.2f}" for one in (joint, alone) if seeds]
    return f"{means[0]} / {means[1]} ({len(seeds)})" if seeds else "-"


FLOPS = {  # of tokendrop/configs: image tokens of an image
    "vila-u-like": 256,
    "llava-1.5-7b": 576,
    "janus-pro-7b": 576,
    "qwen2.5-vl-7b": 1024,
    "emu3": 4096,
}
FLOPS_METHODS = (
    "HiMix",
    'HMGen("8:24:2")',
    "FastV",
    "PyramidDrop",
    "HiDrop",
    "DuetVLM",
    "RandomLTD",
    'Drop(":", keep=0.25, score="norm")',
)


def flops() -> str:
    """The forward of real models under each method, by formula."""
    from tokendrop import flops
    from tokendrop.engine.model.from_config import model_from_config
    from tokendrop.methods.text import method_from_text

    lines = ["| model | image tokens | method | dense TFLOPs | dropped TFLOPs | ratio |", "|---|---|---|---|---|---|"]
    for name, image in FLOPS.items():
        model = model_from_config(PAGES[0].parent / "tokendrop" / "configs" / f"{name}.json")
        for text in FLOPS_METHODS:
            found = flops(model, method_from_text(text), text=64, image=image, before=32)
            cells = name, image, f"`{text}`", *(f"{one / 1e12:.2f}" for one in (found.dense, found.dropped))
            lines.append(f"| {' | '.join(map(str, cells))} | {found.ratio:.3f} |")
    return "\n".join(lines) + "\n"


def advisor() -> str:
    """The plans of the advisor's sweep, the best first."""
    rows = rows_of("advisor")
    best = {row["provider"]: row["median"] for row in rows if row["metric"] == "NLL"}
    rows.sort(key=lambda row: best[row["provider"]])
    kinds = {True: "proposed", False: ""}

    def line(row: Row) -> tuple[str, ...]:
        return f"`{row['provider']}`", kinds[row["config"]["proposed"]] or ("candidate" * row["config"]["candidate"])

    return pivot(rows, line, ["plan", ""], ["NLL", "exact", "FLOPs ratio", "loss gap", "fidelity"])


def allocation() -> str:
    """Where a dense model's attention goes."""
    rows = [row for row in rows_of("allocation") if row["config"]["rows"] == "all"]

    def line(row: Row) -> tuple[str, ...]:
        return row["case"], str(row["config"]["layer"])

    return pivot(rows, line, ["task", "layer"], list(dict.fromkeys(row["metric"] for row in rows)))


def on_paper() -> dict[tuple[str, str], dict[tuple[str, int], float]]:
    """(model, method) -> (metric, GPUs or 0) -> value."""
    found: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for row in rows_of("scale"):
        config = row["config"]
        cell = found.setdefault((config["model"], row["provider"]), {("parameters", 0): config["parameters"]})
        cell[row["metric"], config["gpus"]] = row["median"]
    return found


def scale() -> str:
    """What each method does to one GPU of many."""
    at = "8 / 64 / 512 GPUs"
    head = ["model", "method", "TFLOPs of a sample", "activations of a sample, GB", "fewest GPUs"]
    head += [f"samples that fit, {at}", f"samples that hide communication, {at}", f"MFU at most, {at}"]
    lines = [head, ["---"] * len(head)]
    for (model, method), of in on_paper().items():
        kept = of["activations", 0]
        fewest = ceil(16 * of["parameters", 0] / (MEMORY - of["gathered", 8] - kept))
        parts = [
            " / ".join(form.format(of[metric, gpus]) if of["samples", gpus] else "-" for gpus in (8, 64, 512))
            for metric, form in {"samples": "{:.0f}", "hidden from": "{:.1f}", "MFU bound": "{:.2f}"}.items()
        ]
        first = [model, f"`{method}`", f"{of['computed FLOPs', 0] / 1e12:.0f}", f"{kept / 1e9:.1f}", str(fewest)]
        lines.append([*first, *parts])
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def scale_states() -> str:
    """What no method changes."""
    head = ["model", "GPUs", "states, GB", "gathered weights, GB", "communication of a step, GB"]
    lines = [head, ["---"] * len(head)]
    for (model, method), of in on_paper().items():
        for gpus in (8, 64, 512) if method == "dense" else ():
            figures = (of[metric, gpus] / 1e9 for metric in ("states", "gathered", "communication"))
            lines.append([model, str(gpus), *(f"{figure:.1f}" for figure in figures)])
    return "".join(f"| {' | '.join(one)} |\n" for one in lines)


def gpu_kernels() -> str:
    """Bytes per second of the kernels on a GPU over those of a copy there, in one run."""
    rows = [row for row in rows_of("gpu") if row["metric"] == "bandwidth"]
    found = {(row["config"]["dtype"], row["case"], row["provider"]): row["median"] for row in rows}
    lines = ["| kernel | dtype | Triton, of a copy | torch, of a copy |", "| --- | --- | --- | --- |"]
    for dtype, case, provider in found:
        if provider == "triton":
            copy = found[dtype, "copy", "torch"]
            parts = (f"{found[dtype, case, by] / copy:.2f}" for by in ("triton", "torch"))
            lines.append(f"| {' | '.join((case, dtype, *parts))} |")
    return "\n".join(lines) + "\n"


def gpu_step() -> str:
    """A training step at real widths on a GPU, beside the dense one in the same run."""
    rows = [row for row in rows_of("gpu") if row["case"] == "train step" and row["config"]["width"] == 4096]
    metrics = ["time ratio", "FLOPs ratio", "capture", "computed capture", "memory ratio", "MFU"]

    def line(row: Row) -> tuple[str, ...]:
        return row["config"]["attention"], str(row["config"]["tokens"]), row["provider"]

    order = sorted(rows, key=lambda row: (row["config"]["attention"] == "eager", row["config"]["tokens"]))
    return pivot(order, line, ["attention", "T", "method"], metrics)


def gpu_compiled() -> str:
    """A compiled training step on a GPU beside the same step as it is."""
    rows = [row for row in rows_of("gpu") if row["case"] == "compiled step"]
    metrics = ["time ratio to uncompiled", "first call"]
    return pivot(rows, lambda row: (row["provider"],), ["method"], metrics)


def decode(name: str) -> str:
    """Generation under each method beside the dense model."""

    def line(row: Row) -> tuple[str, ...]:
        return str(row["config"]["tokens"]), str(row["config"]["batch"]), row["provider"]

    rows = [row for row in rows_of(name) if row["case"] == "decode" and not row["provider"].startswith("dense")]
    metrics = ["tokens per second", "decode time ratio", "prefill time ratio", "cache ratio"]
    return pivot(rows, line, ["T", "B", "method"], metrics)


TABLES: dict[str, Callable[[], str]] = {
    "step": step,
    "step-32000": lambda: step(32000),
    "growth": growth,
    "idle": idle,
    "random-ltd": random_ltd,
    "attention": attention,
    "static": static,
    "monitor": monitor,
    "methods": methods,
    "advisor": advisor,
    "allocation": allocation,
    "synergy-table3": lambda: _synergy(synergy_summary.table),
    "synergy-configurations": lambda: _synergy(lambda rows, _: synergy_summary.configurations(rows, SynergyStudy())),
    "synergy-correlations": lambda: _synergy(lambda rows, _: synergy_summary.correlations(rows, SynergyStudy())),
    "flops": flops,
    "demo": demo,
    "demo-short": lambda: demo("unified", "unified x0.6", "ours"),
    "papers": papers,
    "scale": scale,
    "scale-states": scale_states,
    "gpu-kernels": gpu_kernels,
    "gpu-step": gpu_step,
    "gpu-compiled": gpu_compiled,
    "gpu-decode": partial(decode, "gpu"),
    "decode": partial(decode, "decode"),
}
TABLES |= {frontier_name(*at): partial(frontier, *at) for at in product(SCALES, ("val", "test"))}
TABLES |= {
    f"{frontier_name(*at)}-differences": partial(frontier_differences, *at) for at in product(SCALES, ("val", "test"))
}
TABLES["frontier-sizes"] = frontier_sizes
TABLES["frontier-ranks"] = frontier_ranks
TABLES |= {f"{frontier_name(scale, 'val')}-early": partial(frontier_early, scale) for scale in SCALES}


def written(page: str) -> str:
    """A page with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
