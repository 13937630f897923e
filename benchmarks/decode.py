"""Generation under each method beside the dense model, in turns in one process: tokens per second, cache bytes.

    python benchmarks/decode.py --out benchmarks/results/decode.jsonl        # goes on where it was broken off

The first new token ends the prefill; the others are decoding. Greedy, text behind an image.
Shape letters: B batch, T tokens of the prompt, N new tokens, D hidden, L layers.
"""

import argparse
import copy
import json
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokendrop as td
from benchmarks.results import append, environment, row
from benchmarks.train.cases import Sizes, decoder, inputs, methods
from tokendrop.analysis.timing import now

CASE, DENSE = "decode", "dense"
# What has an effect on a prompt; RandomLTD and MixtureOfDepths are for training.
NAMES = (
    "HiMix", "HiMix 2:", "HMGen middle", "Drop rejoin 25%", "Drop gone 25%", "SVDPrune 25%", "FastV 50%", "PyramidDrop",
    "HiDrop", "DuetVLM",
)  # fmt: skip
Row = dict[str, Any]


class _Clock(StoppingCriteria):
    """Notes when each new token is there; stops nothing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.seconds.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Run:
    """One generation.

    Args:
        prefill: seconds to the first new token.
        decode: seconds of the N - 1 others.
        cache: bytes that the cache holds at the end.
    """

    prefill: float
    decode: float
    cache: int


def generate(model: LlamaForCausalLM, drop: Any, ids: Tensor, layout: td.TokenLayout, new: int) -> Run:
    """Generate N tokens behind a prompt (B, T), under its handle or dense."""
    clock, options = _Clock(), {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    more = {"return_dict_in_generate": True, "stopping_criteria": StoppingCriteriaList([clock])}
    entered, start = nullcontext() if drop is None else drop.layout(layout), now()
    with entered, torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)
    if len(clock.seconds) != new:
        raise RuntimeError(f"{len(clock.seconds)} new tokens; expected {new}")
    values = [value for layer in out.past_key_values.layers for value in vars(layer).values()]
    noted = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    held = {id(one): one for one in noted if isinstance(one, Tensor)}.values()  # layers share what is noted of a prompt
    first, last = clock.seconds[0], clock.seconds[-1]
    return Run(first - start, last - first, sum(one.numel() * one.element_size() for one in held))


def measure(
    base: LlamaForCausalLM, sizes: Sizes, method: Any, new: int, rounds: int, device: str
) -> dict[bool, list[Run]]:
    """Runs of the dense model (False) and under a method (True), in changing order, after one that warms up."""
    ids, labelled = inputs(sizes, device)
    layout, model = td.TokenLayout(labelled.image), copy.deepcopy(base)
    drops = {False: None, True: td.apply(model, method)}
    found: dict[bool, list[Run]] = {False: [], True: []}
    order, shuffle = [False, True], random.Random(0)
    for turn in range(1 + rounds):
        shuffle.shuffle(order)
        for dropped in order:
            run = generate(model if dropped else base, drops[dropped], ids, layout, new)
            found[dropped] += [run] if turn else []
    return found


def rows_of(found: dict[bool, list[Run]], name: str, sizes: Sizes, new: int, shared: Row) -> list[Row]:
    """Result rows of a method, and of the dense model beside it."""
    config, rows = sizes.config | {"new": new, "threads": torch.get_num_threads()}, []
    for provider, runs in ((name, found[True]), (f"{DENSE} beside {name}", found[False])):
        pairs = list(zip(runs, found[False], strict=True))
        figures = {
            ("tokens per second", "tokens/s"): [sizes.batch * (new - 1) / one.decode for one in runs],
            ("decode time ratio", "1"): [one.decode / dense.decode for one, dense in pairs],
            ("prefill time ratio", "1"): [one.prefill / dense.prefill for one, dense in pairs],
            ("cache bytes", "B"): [one.cache for one in runs[:1]],
            ("cache ratio", "1"): [one.cache / dense.cache for one, dense in pairs[:1]],
        }
        rows += [row(CASE, provider, metric, unit, each, config, **shared) for (metric, unit), each in figures.items()]
    return rows


def known(out: Path | None) -> set[tuple[str, str]]:
    """Methods and configurations whose rows a file holds."""
    if out is None or not out.exists():
        return set()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {(row["provider"], json.dumps(row["config"])) for row in rows}


def main() -> None:
    """Measure, print, and append to the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = Sizes(layers=8, width=256)
    for name in ("layers", "width", "head", "vocabulary", "dtype", "attention"):
        parser.add_argument(f"--{name}", type=type(getattr(sizes, name)), default=getattr(sizes, name))
    for name, default in {"tokens": [128, 512], "batches": [1, 16]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    given = vars(parser.parse_args())
    if given["device"] == "cpu":
        torch.set_num_threads(1)
    own = {name: given[name] for name in ("layers", "width", "head", "vocabulary", "dtype", "attention")}
    sizes, shared = replace(sizes, **own, tokens=max(given["tokens"]) + given["new"]), environment()
    base, held = decoder(sizes, given["device"]).eval(), known(given["out"])
    for tokens, batch in ((tokens, batch) for tokens in given["tokens"] for batch in given["batches"]):
        one = replace(sizes, tokens=tokens, batch=batch)
        key = json.dumps(one.config | {"new": given["new"], "threads": torch.get_num_threads()})
        for name in (name for name in given["only"] if (name, key) not in held):
            found = measure(base, one, methods(one)[name][0], given["new"], given["rounds"], given["device"])
            rows = rows_of(found, name, one, given["new"], shared)
            said = "   ".join(f"{row['metric']} {row['median']:.3f}" for row in rows[:5])
            print(f"T {tokens}, B {batch}, {name:18} {said}", flush=True)
            if given["out"]:
                append(given["out"], rows)


if __name__ == "__main__":
    main()
