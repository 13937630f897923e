"""A Llama-shaped decoder under each method, one training step at a time.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokendrop as td


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        layers: L.
        width: D; the MLP is 2.75 D.
        tokens: T; one eighth text, then the image tokens, then text.
        image: share of image tokens.
        vocabulary: rows of the output head.
        batch: B.
        head: D / H.
        attention: the model's backend, by transformers' name.
        dtype: of its weights, by torch's name.
    """

    layers: int = 12
    width: int = 512
    tokens: int = 1024
    image: float = 0.75
    vocabulary: int = 2048
    batch: int = 1
    head: int = 64
    attention: str = "sdpa"
    dtype: str = "float32"

    @property
    def config(self) -> dict[str, Any]:
        return asdict(self)


def methods(sizes: Sizes) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What is measured: name -> method, and options of `apply`."""
    last = sizes.layers - 1
    found = {
        "HiMix": (td.HiMix(), {}),
        "HiMix 2:": (td.HiMix("2:"), {}),
        "HiMix separate": (td.HiMix(separate="shared"), {}),
        "HiMix labelled": (td.HiMix(), {"labelled_logits": True}),
        "HMGen alternating": (td.HMGen(f"1:{last}:2"), {}),
        "HMGen middle": (td.HMGen(f"2:{max(3, last - 1)}"), {}),
        "HMGen first half": (td.HMGen(f":{sizes.layers // 2}"), {}),
        "Drop rejoin 25%": (td.Drop(f"1:{last}", keep=0.25), {}),
        "Drop gone 25%": (td.Drop("2:", keep=0.25, then="gone"), {}),
        "Drop merge 25%": (td.Drop(f"1:{last}", keep=0.25, score="norm", then="merge"), {}),
        "RandomLTD 25%": (td.RandomLTD(f"1:{last}", keep=0.25), {}),
        "Sprint 25%": (td.Sprint(f"1:{last}", keep=0.25), {}),
        "SkipVision 25%": (td.SkipVision(keep=0.25), {}),
        "MixtureOfTransformers": (td.MixtureOfTransformers(), {}),
        "MixtureOfDepths": (td.MixtureOfDepths(), {}),
        "PMoD": (td.PMoD(), {}),
    }
    if sizes.layers < 4:  # too few for stages
        return found
    stages = (sizes.layers // 4, (sizes.layers // 3, sizes.layers // 2), (0.4, 0.02), last)
    return found | {
        "CDPruner 25%": (td.CDPruner(keep=0.25), {}),
        "DivPrune 25%": (td.DivPrune(keep=0.25), {}),
        "DART 25%": (td.DART(2, keep=0.25), {}),
        "SVDPrune 25%": (td.SVDPrune(keep=0.25), {}),
        "FastV 50%": (td.FastV(), {}),
        "PyramidDrop": (td.PyramidDrop(tuple(sizes.layers * quarter // 4 for quarter in (1, 2, 3))), {}),
        "HiDrop": (td.HiDrop(*stages) if sizes.layers >= 8 else td.HiDrop(1, (2,), (0.02,), last), {}),
        "DuetVLM": (td.DuetVLM((sizes.layers // 2, sizes.layers * 3 // 4)), {}),
    }


def decoder(sizes: Sizes, device: str = "cpu") -> LlamaForCausalLM:
    """The untouched model, in training mode, random weights, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=int(2.75 * sizes.width),
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // sizes.head,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.tokens,
        attn_implementation=sizes.attention,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, sizes.dtype)).train()


def inputs(sizes: Sizes, device: str) -> tuple[Tensor, td.TokenLayout]:
    """Ids (B, T), and a layout whose labels are on the text behind the image."""
    images = round(sizes.image * sizes.tokens)
    start = (sizes.tokens - images) // 4
    ids = torch.randint(sizes.vocabulary, (sizes.batch, sizes.tokens), device=device)
    image = torch.zeros_like(ids, dtype=torch.bool)
    image[:, start : start + images] = True
    labels = ids.clone()
    labels[:, : start + images + 1] = -100
    return ids, td.TokenLayout(image, labels=labels)


class Step:
    """One training step: forward and backward.

    Args:
        base: the untouched model, copied.
        ids: (B, T).
        layout: what the tokens are.
        method: on the model; None leaves it untouched.
        options: of `apply`.
    """

    def __init__(
        self,
        base: LlamaForCausalLM,
        ids: Tensor,
        layout: td.TokenLayout,
        method: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.ids, self.layout = copy.deepcopy(base), ids, layout
        self.handle = None if method is None else td.apply(self.model, method, **options)

    def forward(self) -> Tensor:
        """The loss."""
        entered = nullcontext() if self.handle is None else self.handle.layout(self.layout)
        with entered:
            return self.model(input_ids=self.ids, labels=self.layout.labels, use_cache=False).loss

    def __call__(self) -> None:
        self.forward().backward()
        self.model.zero_grad(set_to_none=False)
