"""What the callback, and a model's own layouts, cost where nothing is dropped: steps with and without, in turns.

    python benchmarks/train/idle.py --out benchmarks/results/idle.jsonl

Each batch's time runs from before the callback's first hook to behind its last; of a model with `layout="auto"`, over
forward, backward and step of a loop. The last steps of a schedule's dense tail, and batches without images, are such.
Shape letters: B batch, T tokens, D hidden, L layers.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tokendrop as td
from benchmarks.results import append, environment, row
from benchmarks.train.cases import Sizes, decoder, inputs
from tokendrop.analysis.timing import now


class Timed(L.LightningModule):
    """The decoder, its batch, and the time of each step."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        super().__init__()
        self.model = decoder(sizes, device)
        ids, layout = inputs(sizes, device)
        self.batch = {"input_ids": ids, "labels": layout.labels, "image_mask": layout.image}

    def training_step(self, batch: dict[str, Any], index: int) -> Any:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Iterable[dict[str, Any]]:
        return Repeated(self.batch, 5)


class Repeated:
    """One batch several times; a list would be several loaders to Lightning."""

    def __init__(self, batch: dict[str, Any], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.times)


class First(L.Callback):
    """Notes when a batch starts; the first of the callbacks."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = now()


class Last(L.Callback):
    """Notes how long a batch took; the last of the callbacks."""

    def __init__(self, first: First) -> None:
        self.first, self.seconds = first, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(now() - self.first.start)


def fit(module: Timed, *callbacks: L.Callback) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    first = First()
    last = Last(first)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "auto", "devices": 1}
    L.Trainer(callbacks=[first, *callbacks, last], **quiet, **rest).fit(module)
    return last.seconds[1:]


def loop(module: Timed, own: bool) -> list[float]:
    """Seconds of each step of a written-out loop but the first; the model is given the mask only where it takes it."""
    batch, optimizer, seconds = dict(module.batch), torch.optim.SGD(module.model.parameters(), lr=1e-4), []
    image = batch.pop("image_mask")
    module.model.to(image.device)  # a Trainer leaves it on the CPU
    given = batch | {"use_cache": False} | ({"image_mask": torch.zeros_like(image)} if own else {})
    for _ in range(5):
        start = now()
        module.model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - start)
    return seconds[1:]


def report(case: str, ratios: list[float], sizes: Sizes, shared: dict[str, Any]) -> dict[str, Any]:
    """A row of the results, printed."""
    made = row(case, "tokendrop", "time ratio", "1", ratios, sizes.config, **shared)
    print(f"{case}, {sizes}: {made['median']:.4f} [{made['p20']:.4f} {made['p80']:.4f}] n={made['n']}")
    return made


def main() -> None:
    """Measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=3, action="append", help="layers, width and tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    rows, shared = [], environment()
    for layers, width, tokens in given.sizes or [(4, 256, 256), (12, 512, 256)]:
        sizes = Sizes(layers=layers, width=width, tokens=tokens, dtype=given.dtype)
        with_it, without, own = (Timed(sizes, device) for _ in range(3))
        drop, ratios, own_ratios = td.TokenDrop(td.HiMix(), schedule=td.Schedule(start=10**9)), [], []
        td.apply(own.model, td.HiMix(), layout="auto")
        for turn in range(given.rounds):
            pairs = zip(fit(with_it, drop), fit(without), strict=True)
            ratios += [one / other for one, other in pairs]
            turns = [(own, True), (without, False)]  # who comes first changes, or the order is measured with it
            first, second = (loop(*one) for one in (turns if turn % 2 else turns[::-1]))
            one, other = (first, second) if turn % 2 else (second, first)
            own_ratios += [mine / plain for mine, plain in zip(one, other, strict=True)]
        rows.append(report("idle callback", ratios, sizes, shared))
        rows.append(report("idle layout=auto", own_ratios, sizes, shared))
    if given.out:
        append(given.out, rows)


if __name__ == "__main__":
    main()
