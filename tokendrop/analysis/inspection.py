"""What can be done in a model: its decoder as inspection finds it, and what each method can do there.

Shape letters: L layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tokendrop import methods as of
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import prepared
from tokendrop.engine.model.decoder import LayerSpec, find_layers, layer_specs
from tokendrop.engine.support import check_shared, check_support
from tokendrop.errors import AppliedError, TokenDropError
from tokendrop.roles import Method
from tokendrop.synergy.evaluate import preserved

# Every method, with settings that fit a decoder and an encoder of few layers.
_IN_THE_DECODER: dict[str, Method] = {
    "HiMix": of.HiMix(),
    "HMGen": of.HMGen("0:1"),
    "SkipVision": of.SkipVision(),
    "FastV": of.FastV(1),
    "PyramidDrop": of.PyramidDrop((1,), (0.5,)),
    "PyramidDrop, renumbered": of.PyramidDrop((1,), (0.5,), positions="renumber"),
    "HiDrop": of.HiDrop(0, (0,), (0.5,), 1),
    "DuetVLM": of.DuetVLM((1,), (0.5,)),
    "SVDPrune": of.SVDPrune(),
    "DivPrune": of.DivPrune(),
    "CDPruner": of.CDPruner(),
    "DART": of.DART(1),
    "RandomLTD": of.RandomLTD(":"),
    "MixtureOfDepths": of.MixtureOfDepths(":"),
    "PMoD": of.PMoD(),
    "Sprint": of.Sprint("0:1"),
    "Drop, rejoin": of.Drop(":", keep=0.5),
    "Drop, gone": of.Drop(":", keep=0.5, then="gone"),
    "Drop, attend": of.Drop(":", keep=0.5, then="attend"),
    "Drop, context": of.Drop(":", keep=0.5, then="context"),
    "Drop, merge": of.Drop(":", keep=0.5, then="merge"),
    "Drop by attention": of.Drop(":", keep=0.5, score="attention"),
}
# What looks at the vision encoder, or gives image tokens parts of their own.
_BESIDE_IT: dict[str, Method] = {
    "DuetVLM, vision stage": of.DuetVLM((1,), (0.5,), dominant=4, vision_layer=-1),
    "VisionZip": of.VisionZip(vision_layer=-1),
    "VScan": of.VScan(text_layers=(1,), local_layer=-1, global_layer=-1),
    "MixtureOfTransformers": of.MixtureOfTransformers("0:1"),
    "image-only projections": of.HMGen("1:", separate="shared"),  # copies those of one layer
}
CASES = _IN_THE_DECODER | _BESIDE_IT


@dataclass(frozen=True)
class Inspection:
    """A decoder as inspection finds it.

    Args:
        path: dotted path of its layer list.
        layer_class: name of its layers' class.
        num_layers: L.
        attention: the attention implementation, such as "sdpa".
        support: for each method, and what some can do besides, "yes", or the reason why not.
    """

    path: str
    layer_class: str
    num_layers: int
    attention: str
    support: dict[str, str]

    def __str__(self) -> str:
        """Lines of two columns."""
        facts = {"layers": self.path, "class": self.layer_class, "depth": str(self.num_layers)}
        shown = facts | {"attention": self.attention} | self.support
        width = max(map(len, shown))
        return "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())


def inspect(model: nn.Module, layers: str | None = None) -> Inspection:
    """Find a model's decoder, and ask of each method what `apply` would say; nothing is changed.

    Methods have settings for a decoder of few layers here: what they say of depth, others of theirs may not.

    Args:
        model: any module with one decoder; its parameters may be on the meta device.
        layers: dotted path of the layer list, where inspection finds several.

    Raises:
        AppliedError: a dropped model.
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
    if any(isinstance(one, Handle) for one in model.modules()):
        raise AppliedError(
            f"{type(model).__name__} is dropped already; inspect it before, or call remove() on its handle"
        )
    specs = layer_specs(found)

    def check(method: Method) -> None:
        prepared(model, path, found, specs, {None: method})

    with preserved(model):  # routers are drawn, and thrown away
        support = dict.fromkeys(CASES, "yes") | _refused(CASES, found, path, check)
    backend = next((spec.backend(one) for spec, one in zip(specs, found, strict=True) if spec.attention), "sdpa")
    return Inspection(path, type(found[0]).__name__, len(found), backend, support)


def refusals(model: nn.Module, layers: nn.ModuleList, path: str, specs: Sequence[LayerSpec]) -> dict[str, str]:
    """What a decoder cannot have of the methods that need it alone, without parts of its own -> why.

    Args:
        model: any module with one decoder, dropped or not.
        layers: of it.
        path: dotted path of these.
        specs: how each is made.
    """
    return _refused(_IN_THE_DECODER, layers, path, lambda method: check_support(model, layers, specs, {None: method}))


def _refused(
    cases: Mapping[str, Method], layers: nn.ModuleList, path: str, check: Callable[[Method], None]
) -> dict[str, str]:
    refused = {}
    for name, method in cases.items():
        try:
            check_shared(layers, path)
            check(method)
        except TokenDropError as error:
            refused[name] = str(error)
    return refused
