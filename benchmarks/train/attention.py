"""Three exact forms of HiMix's attention: one mask, split queries, and two parts merged by their log-sum-exps.

    python benchmarks/train/attention.py --out benchmarks/results/attention.jsonl

The image lies between two texts, the first a quarter of it. All three are compared with one another to 1e-5 first.
Shape letters: B batch, H heads, T tokens, K text rows, M image rows, P text rows before the image, D head width.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.results import append, environment, row
from benchmarks.train.measure import seconds

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def masked(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, before: int) -> Tensor:
    """What the engine does: text keys and then image keys, under one mask."""
    rows, images = q.shape[2], image_k.shape[2]
    mask = torch.ones(rows, rows + images, dtype=torch.bool).tril()
    mask[:before, rows:] = False
    mask[before:, rows:] = True
    return F.scaled_dot_product_attention(q, torch.cat([k, image_k], 2), torch.cat([v, image_v], 2), mask)


def split(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, before: int) -> Tensor:
    """Text before the image on its own; text behind it under a mask that is causal among text only."""
    rows, images = q.shape[2], image_k.shape[2]
    first = F.scaled_dot_product_attention(q[:, :, :before], k[:, :, :before], v[:, :, :before], is_causal=True)
    mask = torch.ones(rows - before, rows + images, dtype=torch.bool).tril(before)
    mask[:, rows:] = True
    keys, values = torch.cat([k, image_k], 2), torch.cat([v, image_v], 2)
    return torch.cat([first, F.scaled_dot_product_attention(q[:, :, before:], keys, values, mask)], 2)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, before: int) -> Tensor:  # type: ignore[override]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        text, text_lse = attend(q, k, v, 0.0, True)
        behind = q[:, :, before:]
        image, image_lse = attend(behind, image_k, image_v, 0.0, False)
        lse = text_lse.clone()
        lse[:, :, before:] = torch.logaddexp(text_lse[:, :, before:], image_lse)
        out = text * (text_lse - lse).exp()[..., None]
        out[:, :, before:] += image * (image_lse - lse[:, :, before:]).exp()[..., None]
        ctx.save_for_backward(q, k, v, image_k, image_v, out, lse)
        ctx.before = before
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, image_k, image_v, out, lse = ctx.saved_tensors
        at, attend = ctx.before, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = attend(grad, q, k, v, out, lse, 0.0, True)
        rest = (x[:, :, at:].contiguous() for x in (grad, q, out, lse))
        image_grad, image_q, image_out, image_lse = rest
        di, dik, div = attend(image_grad, image_q, image_k, image_v, image_out, image_lse, 0.0, False)
        dq = torch.cat([dq[:, :, :at], dq[:, :, at:] + di], 2)
        return dq, dk, dv, dik, div, None


def merged(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor, before: int) -> Tensor:
    """Causal attention among text, full attention on the image, merged; no mask."""
    return _Merge.apply(q, k, v, image_k, image_v, before)


FORMS: dict[str, Form] = {"one mask": masked, "split queries": split, "log-sum-exp merge": merged}


def case(tokens: int, heads: int = 8, width: int = 64) -> dict[str, Callable[[], list[Tensor]]]:
    """A forward and backward of each form, on the same tensors; it returns the gradients."""
    text = tokens // 4
    lengths = (text, text, text, tokens - text, tokens - text)
    made = [torch.randn(1, heads, length, width, requires_grad=True) for length in lengths]
    away = torch.randn(1, heads, text, width)

    def run(form: Form) -> list[Tensor]:
        return list(torch.autograd.grad((form(*made, text // 4) * away).sum(), made))

    return {name: lambda form=form: run(form) for name, form in FORMS.items()}


def main() -> None:
    """Compare, measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, shared = [], environment()
    for tokens in given.tokens:
        steps = case(tokens)
        expected = steps["one mask"]()
        for step in steps.values():
            for found, wanted in zip(step(), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        times = seconds(steps, given.rounds, warmup=2)
        for name, found in times.items():
            ratios = [one / base for one, base in zip(found, times["one mask"], strict=True)]
            config = {"tokens": tokens, "image": 0.75, "heads": 8, "width": 64, "threads": 1}
            rows.append(row("HiMix attention", name, "time ratio to one mask", "1", ratios, config, **shared))
            print(f"T {tokens:5}  {name:20}{rows[-1]['median']:.3f} [{rows[-1]['p20']:.3f} {rows[-1]['p80']:.3f}]")
    if given.out:
        append(given.out, rows)


if __name__ == "__main__":
    main()
