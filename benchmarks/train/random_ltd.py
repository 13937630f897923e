"""DeepSpeed's random-LTD beside ours: the same model, data and counts in one run.

    python benchmarks/train/random_ltd.py --out benchmarks/results/random-ltd.jsonl

DeepSpeed's kernels have no CPU form, so its formulas are written out in torch: sampling per layer and sample without
replacement, a gather that keeps the whole activations for its backward, a scatter in place whose gradient passes
whole. Its layers get the first K rows of the rotary tables, since nothing gathers them (DeepSpeed 0.16,
data_routing/basic_layer.py and ops/random_ltd/dropping_utils.py, as described in docs/random-ltd.md).
Shape letters: B batch, T tokens, K kept, D hidden, L layers.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tokendrop as td
from benchmarks.results import append, environment, row
from benchmarks.train.cases import Sizes, Step, decoder, inputs
from benchmarks.train.measure import seconds
from tokendrop.analysis.memory import saved_bytes
from tokendrop.analysis.spent import task_costs


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(full, idx)
        return full, full.gather(1, idx)

    @staticmethod
    def backward(ctx: Any, full: Tensor, kept: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        _, idx = ctx.saved_tensors
        return full.scatter(1, idx, kept), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, kept: Tensor, idx: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(idx)
        return full.data.scatter_(1, idx, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (idx,) = ctx.saved_tensors
        return grad, grad.gather(1, idx), None


class _Layer(nn.Module):
    """A layer of DeepSpeed's: K random rows of its input go through it, and back.

    Args:
        layer: the decoder's.
        kept: K.
    """

    def __init__(self, layer: nn.Module, kept: int) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def forward(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Tensor:
        noise = torch.rand(hidden.shape[:2], device=hidden.device)
        idx = noise.argsort(dim=1)[:, : self.kept].sort(dim=1).values[:, :, None].expand(-1, -1, hidden.shape[2])
        full, kept = _Gather.apply(hidden, idx)
        cos, sin = (part[:, : self.kept] for part in position_embeddings)
        out = self.layer(kept, position_embeddings=(cos, sin), **rest | {"position_ids": None})
        return _Scatter.apply(full, out, idx)


def theirs(step: Step, kept: int) -> Step:
    """A step of the untouched model with DeepSpeed's layers between the first and the last."""
    layers = step.model.model.layers
    for index in range(1, len(layers) - 1):
        layers[index] = _Layer(layers[index], kept)
    return step


def main() -> None:
    """Measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes()
    base, (ids, layout) = decoder(sizes), inputs(sizes, "cpu")
    method = td.RandomLTD(keep=given.keep)
    ours = Step(base, ids, layout, method)
    with ours.handle.layout(layout) as plan:
        kept = plan.spans[1].groups[0].size
        (cost,) = task_costs(ours.handle, plan, layout.tasks).values()
    steps = {"dense": Step(base, ids, layout), "tokendrop": ours}
    steps["DeepSpeed's formulas"] = theirs(Step(base, ids, layout), kept)
    times = seconds(steps, given.rounds)
    bytes_of = {name: saved_bytes(step.forward, list(step.model.parameters())) for name, step in steps.items()}
    flops, config = cost.flops_ratio, sizes.config | {"kept": kept, "threads": 1}
    rows, shared = [], environment()
    for name in steps:
        ratios = [one / dense for one, dense in zip(times[name], times["dense"], strict=True)]
        ratio = 1.0 if name == "dense" else flops
        for metric, unit, values in (
            ("time ratio", "1", ratios),
            ("FLOPs ratio", "1", [ratio]),
            ("capture", "1", [ratio / one for one in ratios]),
            ("memory ratio", "1", [bytes_of[name] / bytes_of["dense"]]),
        ):
            rows.append(row("random-LTD", name, metric, unit, values, config, **shared))
            print(f"{name:24}{metric:16}{rows[-1]['median']:.3f} [{rows[-1]['p20']:.3f} {rows[-1]['p80']:.3f}]")
    if given.out:
        append(given.out, rows)


if __name__ == "__main__":
    main()
