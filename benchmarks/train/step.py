"""One training step under each method beside the dense one: FLOPs, seconds and memory, in one run.

    python benchmarks/train/step.py                              # the table of the README
    python benchmarks/train/step.py --tokens 4096 --layers 4     # other sizes
    python benchmarks/train/step.py --only HiMix "HMGen middle"  # some methods

capture = (FLOPs ratio) / (time ratio), both against dense: 1 where every saved FLOP saved its time.
computed capture = the same by FLOPs as computed: causal attention by half.
saved-time share = (1 - time ratio) / (1 - FLOPs ratio).
Shape letters: B batch, T tokens, D hidden, L layers.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tokendrop as td
from benchmarks.results import append, environment
from benchmarks.train.cases import Sizes, decoder, inputs, methods

IDLE = "nothing dropped"
CASE = "train step"
Figure = dict[str, float]


def measure(
    base: nn.Module, sizes: Sizes, only: list[str] | None, device: str, rounds: int, unchecked: bool = False
) -> list[dict[str, Any]]:
    """Result rows of forward and backward under each method, and of the dense model beside the first."""
    ids, layout = inputs(sizes, device)
    chosen = {IDLE: ({"any": None}, {})} | methods(sizes)
    found: dict[str, dict[str, Any]] = {}
    for options in ({}, {"labelled_logits": True}):
        asked = {name: one for name, (one, own) in chosen.items() if own == options and (not only or name in only)}
        if asked:
            batch = {"input_ids": ids, "labels": layout.labels, "use_cache": False}
            more = {"rounds": rounds, "optimizer": None, "unchecked": unchecked, **options}
            said = td.benchmark(base, [batch], lambda _: layout, list(asked.values()), **more)
            steps = [row for row in said.rows if row["part"] == "step"]
            found |= dict(zip(asked, steps, strict=True))
    order = [name for name in chosen if name in found]
    first = found[order[0]]
    dense = {name: first[f"dense_{name}"] for name in ("seconds", "memory", "flops", "computed_flops")}
    one = {"median": 1.0, "p20": 1.0, "p80": 1.0, "n": first["seconds"]["n"]}
    same = {"flops_ratio": 1.0, "kept_ratio": 1.0, "memory_ratio": 1.0, "time_ratio": one, "capture": one}
    same |= {"computed_flops_ratio": 1.0, "computed_capture": one}
    shared, config = environment(), sizes.config | {"threads": torch.get_num_threads(), "checked": not unchecked}
    rows = _rows("dense", dense | same, config, shared)
    return rows + [each for name in order for each in _rows(name, found[name], config, shared)]


def _rows(name: str, found: dict[str, Any], config: dict[str, Any], shared: dict[str, Any]) -> list[dict[str, Any]]:
    flops = found["flops_ratio"]
    figures: dict[tuple[str, str], Figure] = {
        ("seconds", "s"): found["seconds"],
        ("time ratio", "1"): found["time_ratio"],
        ("FLOPs ratio", "1"): _once(flops),
        ("kept ratio", "1"): _once(found["kept_ratio"]),
        ("memory", "B"): _once(found["memory"]),
        ("memory ratio", "1"): _once(found["memory_ratio"]),
        ("capture", "1"): found["capture"],
        ("computed FLOPs ratio", "1"): _once(found["computed_flops_ratio"]),
        ("computed capture", "1"): found["computed_capture"],
    }
    rate = {key: value if key == "n" else 1 / value for key, value in found["seconds"].items()}
    rate["p20"], rate["p80"] = rate["p80"], rate["p20"]
    figures["tokens per second", "tokens/s"] = _times(rate, config["batch"] * config["tokens"])
    peak = available_flops(config["dtype"])
    for metric, key in {"MFU": "flops", "computed MFU": "computed_flops"}.items() if peak else ():
        figures[metric, "1"] = _times(rate, found[key] / peak)
    if flops < 1:
        figures["saved-time share", "1"] = _saved(found["time_ratio"], flops)
    return [
        {"case": CASE, "provider": name, "metric": metric, "unit": unit, **figure, "config": config, **shared}
        for (metric, unit), figure in figures.items()
    ]


def available_flops(dtype: str) -> float | None:
    """FLOPs per second that the maker promises of this device, or None where nobody knows."""
    if not torch.cuda.is_available():
        return None
    return get_available_flops(torch.device("cuda", torch.cuda.current_device()), getattr(torch, dtype))


def _times(figure: Figure, factor: float) -> Figure:
    return {key: value if key == "n" else value * factor for key, value in figure.items()}


def _once(value: float) -> Figure:
    return {"median": value, "p20": value, "p80": value, "n": 1}


def _saved(ratio: Figure, flops: float) -> Figure:
    # It falls as the time ratio rises, in a straight line, so that percentiles change places.
    share = {key: (1 - value) / (1 - flops) for key, value in ratio.items()}
    return {"median": share["median"], "p20": share["p80"], "p80": share["p20"], "n": ratio["n"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a line for each step."""
    metrics = ("seconds", "FLOPs ratio", "time ratio", "capture", "computed capture", "kept ratio", "memory ratio")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in rows:
        found.setdefault(one["provider"], {})[one["metric"]] = one
    lines = [f"{'':20}" + "".join(f"{name:>22}" for name in metrics)]
    for name, by in found.items():
        cells = [f"{by[m]['median']:.3f} [{by[m]['p20']:.3f} {by[m]['p80']:.3f}]" for m in metrics]
        lines.append(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    given = vars(parser.parse_args())
    rounds, only, out = given.pop("rounds"), given.pop("only"), given.pop("out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    sizes = Sizes(**given)
    rows = measure(decoder(sizes, device), sizes, only, device, rounds)
    print(table(rows))
    if out:
        append(out, rows)


if __name__ == "__main__":
    main()
