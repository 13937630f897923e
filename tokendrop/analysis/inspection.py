"""What can be done in a model: its decoder as inspection finds it, and what each method can do there.

Shape letters: L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tokendrop.engine.model.decoder import LayerSpec, find_layers, layer_specs
from tokendrop.engine.support import check_shared, check_support
from tokendrop.errors import TokenDropError
from tokendrop.methods import Drop, HiMix, HMGen
from tokendrop.roles import Method

_CASES: dict[str, Method] = {
    "HiMix": HiMix(),
    "HMGen": HMGen("0:1"),
    "Drop, rejoin": Drop(":", keep=0.5),
    "Drop, gone": Drop(":", keep=0.5, then="gone"),
    "Drop, attend": Drop(":", keep=0.5, then="attend"),
    "Drop by attention": Drop(":", keep=0.5, score="attention"),
    "image-only projections": HMGen("0:1", separate="shared"),
}


@dataclass(frozen=True)
class Inspection:
    """A decoder as inspection finds it.

    Args:
        path: dotted path of its layer list.
        layer_class: name of its layers' class.
        num_layers: L.
        attention: the attention implementation, such as "sdpa".
        support: what -> "yes", or the reason why not.
    """

    path: str
    layer_class: str
    num_layers: int
    attention: str
    support: dict[str, str]


def inspect(model: nn.Module, layers: str | None = None) -> Inspection:
    """Find a model's decoder, and try each method on it; nothing is changed.

    Args:
        model: any module with one decoder; its parameters may be on the meta device.
        layers: dotted path of the layer list, where inspection finds several.

    Raises:
        DecoderError: no decoder, or several.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> found = inspect(LlamaForCausalLM(config))
        >>> found.path, found.layer_class, found.num_layers, found.support["HiMix"]
        ('model.layers', 'LlamaDecoderLayer', 2, 'yes')

    Source: ours.
    """
    path, found = find_layers(model, layers)
    specs = layer_specs(found)
    support = dict.fromkeys(_CASES, "yes") | refusals(model, found, path, specs)
    backend = next((spec.backend(one) for spec, one in zip(specs, found, strict=True) if spec.attention), "sdpa")
    return Inspection(path, type(found[0]).__name__, len(found), backend, support)


def refusals(model: nn.Module, layers: nn.ModuleList, path: str, specs: Sequence[LayerSpec]) -> dict[str, str]:
    """What of `Inspection.support` a model cannot have -> why.

    Args:
        model: any module with one decoder.
        layers: of it.
        path: dotted path of these.
        specs: how each is made.
    """
    refused = {}
    for name, method in _CASES.items():
        try:
            check_shared(layers, path)
            check_support(model, layers, specs, {None: method})
        except TokenDropError as error:
            refused[name] = str(error)
    return refused
