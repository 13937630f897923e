"""Scale on paper: memory, communication and FLOPs of 7B and 70B decoders under each method and FSDP2 or ZeRO-3.

    python -m benchmarks.scale --out benchmarks/results/scale.jsonl      # some minutes; nothing is trained

Nothing is timed. FLOPs are `td.flops`, forward and backward, as computed. Activations are the bytes that a forward of
one sample keeps for its backward, read from a run on tensors that have a shape and no memory. The rest follows from P
parameters, of which a layer has p and embeddings and head together e, on N GPUs:

    states        = 16 P / N                    float32 weights, gradients and two moments of Adam, 4 bytes each
    gathered      = 2 (2 p + e)                 bfloat16 weights of a layer and the next, embeddings and head
    samples       = (80e9 - states - gathered) / activations                      of a GPU of 80 GB, at most
    communication = 6 P (N - 1) / N bytes       of a GPU in a step: weights gathered twice, gradients scattered once
    transfers     = max(6 P (N - 1) / N / 450e9,  6 P (N - 8) / N / 400e9) seconds
    hidden from   = transfers / (FLOPs of a sample / peak)                        samples of a GPU in a step, at least
    MFU           <= min(1, samples / hidden from)                                by computed FLOPs

A GPU has 450 GB/s in one direction among the 8 of its node (NVLink 4); a node has 8 links of 400 Gbit/s, and takes each
byte in once; peak is 989 TFLOP/s (H100, bfloat16): what the makers promise. Activations without recomputation; the
loss's logits are in them. No share of anything is assumed: real runs reach less.
Shape letters: B batch, T tokens, D hidden, L layers, N GPUs, P parameters.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tokendrop as td
from benchmarks.results import append, environment, row

TEXT, IMAGE, BEFORE = 512, 1536, 128
MEMORY, PEAK, NEAR, FAR, NODE = 80e9, 989e12, 450e9, 8 * 50e9, 8
GPUS = 8, 64, 512
SHAPES = {  # Llama-2-7B and Llama-3-70B
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
METHODS: dict[str, Callable[[int], Any]] = {
    "dense": lambda _: td.HMGen([0]),  # any: its dense side is read
    "HiMix": lambda _: td.HiMix(),
    "HiMix 2:": lambda _: td.HiMix("2:"),
    "HMGen, middle half": lambda n: td.HMGen(f"{n // 4}:{3 * n // 4}"),
    "Drop gone 25%, 2:": lambda _: td.Drop("2:", keep=0.25, then="gone"),
    "RandomLTD 25%": lambda _: td.RandomLTD("1:-1", keep=0.25),
    "MixtureOfDepths": lambda _: td.MixtureOfDepths(),
    "SVDPrune 25%": lambda _: td.SVDPrune(keep=0.25),
    "FastV 50%": lambda _: td.FastV(),
    "PyramidDrop": lambda n: td.PyramidDrop((n // 4, n // 2, 3 * n // 4)),
    "HiDrop": lambda n: td.HiDrop(n // 4, (n // 3, n // 2), (0.4, 0.02), n - 1),
    "DuetVLM": lambda n: td.DuetVLM((n // 2, 3 * n // 4)),
}


def config(shape: str, **changes: Any) -> LlamaConfig:
    """A published shape."""
    return LlamaConfig(**SHAPES[shape] | {"head_dim": 128, "max_position_embeddings": TEXT + IMAGE} | changes)


def activations(sizes: LlamaConfig, method: Any) -> int:
    """Bytes that a forward of one sample keeps for its backward, in bfloat16; None leaves the model untouched."""
    at, saved = torch.arange(TEXT + IMAGE), dict[int, int]()
    image = ((at >= BEFORE) & (at < BEFORE + IMAGE))[None]
    labels = torch.ones(1, len(at), dtype=torch.int64)
    labels[:, : BEFORE + IMAGE + 1] = -100
    layout = td.TokenLayout(image, labels=labels)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).train()
        drop = td.apply(model, method or td.HMGen([0]))
        own = {one.untyped_storage()._cdata for one in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor.detach()

        ids, targets = torch.ones(1, len(at), dtype=torch.int64), fake.from_tensor(labels)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with drop.layout(layout) if method else drop.disabled(), fake, hooks:
        # With a cache, which training is not given, transformers looks for no borders of packed sequences.
        loss = model(input_ids=ids, labels=targets, use_cache=True).loss
    total = sum(saved.values())
    del loss
    return total


def parameters(sizes: LlamaConfig) -> tuple[int, int, int]:
    """P of the model, of a layer, and of embeddings and head."""
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes)
    layer = sum(one.numel() for one in model.model.layers[0].parameters())
    ends = sum(one.numel() for module in (model.model.embed_tokens, model.lm_head) for one in module.parameters())
    return sum(one.numel() for one in model.parameters()), layer, ends


def paper(counts: tuple[int, int, int], kept: float, flops: float, gpus: int) -> dict[str, float]:
    """What follows for N GPUs from parameters, activations and computed FLOPs of a sample: bytes, and samples."""
    whole, layer, ends = counts
    states, gathered = 16 * whole / gpus, 2 * (2 * layer + ends)
    samples = max(0, int((MEMORY - states - gathered) // kept))
    communication = 6 * whole * (gpus - 1) / gpus
    transfers = max(communication / NEAR, 6 * whole * max(0, gpus - NODE) / gpus / FAR)
    hidden = transfers / (flops / PEAK)
    return {
        "states": states,
        "gathered": gathered,
        "samples": samples,
        "communication": communication,
        "hidden from": hidden,
        "MFU bound": min(1.0, samples / hidden),
    }


def rows_of(shape: str, name: str, shared: dict[str, Any], sizes: LlamaConfig | None = None) -> list[dict[str, Any]]:
    """Result rows of a model under a method."""
    sizes = config(shape) if sizes is None else sizes
    method, dense = METHODS[name](sizes.num_hidden_layers), name == "dense"
    report = td.flops(sizes, method, TEXT, IMAGE, before=BEFORE, multiple=64, backward=True)
    flops = report.computed_dense if dense else report.computed_dropped
    kept, counts = activations(sizes, None if dense else method), parameters(sizes)
    said = {"model": shape, "text": TEXT, "image": IMAGE, "before": BEFORE, "parameters": counts[0]}
    figures: list[tuple[str, str, float, int]] = [("computed FLOPs", "FLOP", flops, 0), ("activations", "B", kept, 0)]
    figures += [
        (metric, "B" if metric in ("states", "gathered", "communication") else "1", value, gpus)
        for gpus in GPUS
        for metric, value in paper(counts, kept, flops, gpus).items()
    ]
    return [
        row("scale", name, metric, unit, [value], said | {"gpus": gpus}, **shared)
        for metric, unit, value, gpus in figures
    ]


def main() -> None:
    """Count, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, written anew")
    given, shared = parser.parse_args(), environment("none: on paper")
    rows = []
    for shape in SHAPES:
        for name in METHODS:
            rows += rows_of(shape, name, shared)
            print(shape, name, *(f"{one['metric']} {one['median']:.4g}" for one in rows[-20:]), flush=True)
    if given.out:
        given.out.unlink(missing_ok=True)
        append(given.out, rows)


if __name__ == "__main__":
    main()
