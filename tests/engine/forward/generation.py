"""Prompts, methods and runs for the tests of generation with a cache.

Shape letters: B batch, T tokens of the prompt, S stored tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from helpers import VOCABULARY, llama, perturbed
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import tokendrop as td

LAYERS, NEW = 5, 10
IMAGE_IDS = torch.arange(30, VOCABULARY)
TEXT_ONLY, IMAGE_ONLY = list(range(30, VOCABULARY)), list(range(30))
METHODS: dict[str, Any] = {
    "himix": td.HiMix(),
    "himix_range": td.HiMix("1:3"),
    "himix_shared": td.HiMix("1:", separate="shared"),
    "hmgen": td.HMGen("1:4:2"),
    "hmgen_first": td.HMGen("0:4:2"),
    "hmgen_shared": td.HMGen("1:4:2", separate="shared"),
    "hmgen_parts": td.HMGen("1:4:2", "shared", "k+o+norm+ffn"),
    "transformers": td.MixtureOfTransformers("2:4"),
    "rejoin": td.Drop("0:3", 0.5),
    "gone": td.Drop("1:", 0.5, then="gone"),
    "merge": td.Drop("1:3", 0.5, "norm", "merge"),
    "context": td.Drop("1:3", 0.5, then="context"),
    "context_last": td.Drop("2:", 2, "norm", "context"),
    "attend": td.Drop("1:", 0, then="attend"),
    "attend_kept": td.SkipVision("0:3", 2, "norm"),
    "fastv": td.FastV(2, 0.5),
    "pyramid_drop": td.PyramidDrop((1, 2, 4), (0.8, 0.5, 0.2)),
    "renumbered": td.PyramidDrop((1, 2, 4), (0.8, 0.5, 0.2), "renumber"),
    "hidrop": td.HiDrop(1, (2, 3), (0.6, 2), 4),
    "duet_vlm": td.DuetVLM((1, 3), (0.5, 0)),
    "pmod": td.PMoD(0.2),
    "sprint": td.Sprint("1:3"),
    "dart": td.DART(2, 0.6, 1, 2),
    "cd_pruner": td.CDPruner(0.5),
    "div_prune": td.DivPrune(0.5),
    "svd_prune": td.SVDPrune(0.5, rank=2),
}
# Under the others a new image token would end with a stale state.
MAKES_IMAGES = (
    "attend",
    "attend_kept",
    "himix_range",
    "hmgen",
    "hmgen_first",
    "hmgen_parts",
    "hmgen_shared",
    "transformers",
)
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam_sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@dataclass
class Prompt:
    """A prompt of (B, T) tokens.

    Args:
        ids: vocabulary ids.
        real: 1 for real tokens.
        task: of the batch, or one for each sample.
    """

    ids: Tensor
    real: Tensor
    task: Any = None

    @property
    def layout(self) -> td.TokenLayout:
        return td.TokenLayout.from_ids(self.ids, IMAGE_IDS, self.task, attention_mask=self.real)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.real}


def prompt(samples: list[str], task: Any = None) -> Prompt:
    """A prompt written as text: "t" is a text token, "i" an image token, " " padding."""
    generator = torch.Generator().manual_seed(3)
    shape = len(samples), len(samples[0])
    text, image = torch.randint(3, 30, shape, generator=generator), torch.randint(30, 50, shape, generator=generator)
    kind = torch.tensor([["ti ".index(letter) for letter in sample] for sample in samples])
    return Prompt(text.where(kind == 0, image).masked_fill(kind == 2, 0), (kind != 2).long(), task)


RAGGED = prompt(["tttiiiiitttt", "ttttiiiiiitt", "tttttttttttt"])
PADDED = prompt([" ttiiiiitttt", "ttttiiiiiitt", "    tttttttt"])
EVEN = prompt(["ttiiiiiitttt", "ttttiiiiiitt"])


def dropped(method: Any, attention: str = "sdpa", multiple: int = 4) -> tuple[LlamaForCausalLM, td.Handle]:
    """A tiny Llama under a method, and its handle."""
    model = llama(attention, layers=LAYERS, eos_token_id=None)
    return model, perturbed(td.apply(model, method, multiple=multiple))


def generated(model: Any, drop: td.Handle, given: Prompt, cached: bool, **more: Any) -> Any:
    """What `generate` makes of a prompt, with the same random numbers each time."""
    torch.manual_seed(1)
    # On an accelerator transformers compiles each model that has a cache of a fixed length.
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    options |= more
    with drop.layout(given.layout, step=(0, 0)):
        return model.generate(**given.inputs, use_cache=cached, **options)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest of the second."""
    return ((one - other).abs().max() / other.abs().max()).item()


def elements(cache: DynamicCache) -> int:
    """Numbers that the keys and values of a cache hold."""
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def stored(cache: DynamicCache) -> list[int]:
    """S of each layer."""
    return [layer.keys.shape[2] for layer in cache.layers]
