"""Parts of a layer that image rows have of their own: linears of its attention, its norms, its FFN.

They start as copies of the text's, as plain modules in a set of the layer: "q", "k", "v" and "o" are linears, "norm" a
dict of the layer's norms, "ffn" the whole FFN.
"""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokendrop.engine.model import ffn, norms, projections
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, is_transposed
from tokendrop.engine.model.swap import HUNG
from tokendrop.engine.model.weights import onloaded, weights_of
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Method, Role
from tokendrop.routes import route_of


def refusal(layer: nn.Module, spec: LayerSpec, parts: Iterable[str]) -> str | None:
    """Why image tokens cannot have such parts of their own in a layer, or None."""
    wanted, name = set(parts), spec.layer_class.__name__
    if wanted & set("qkv") and (refused := spec.separate_refusal()):
        return refused
    if "o" in wanted and spec.output is None:
        return f"inspection finds no linear that makes the output of the attention in {name}"
    if "norm" in wanted and not norms.norms_of(layer, spec):
        return f"inspection finds no norm with weights in {name}"
    if "ffn" in wanted and len(names := ffn.ffn_names(layer)) != 1:
        found = " and ".join(map(repr, names)) or "none"
        return f"it takes one child of {name} that is its FFN, and inspection finds {found}"
    return None


def copies(layer: nn.Module, spec: LayerSpec, wanted: set[str]) -> dict[str, nn.Module]:
    """The wanted parts of a layer, with the weights that it multiplies with, adapters included.

    Raises:
        UnsupportedError: weights that do not show what they are.
    """
    made: dict[str, nn.Module] = {}
    for _, letters in spec.owned:
        if wanted.isdisjoint(letters):
            continue
        parts = projections.parts_of(layer, spec, letters)
        weight, bias = weights_of(spec.linear(layer, letters[0]), layer)
        for letter in wanted & set(letters):
            own = parts.piece(weight, letter, 0), None if bias is None else parts.piece(bias, letter)
            made[letter] = _linear(*own).train(layer.training)
    if "norm" in wanted:
        found = norms.norms_of(layer, spec).items()
        made["norm"] = nn.ModuleDict({norms.key_of(path): _copied(norm, layer) for path, norm in found})
    if "ffn" in wanted:
        made["ffn"] = _copied(cast(nn.Module, ffn.ffn_of(layer)), layer)
    return dict(sorted(made.items()))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _copied(module: nn.Module, layer: nn.Module) -> nn.Module:
    # A plain copy: its linears as theirs are copied, without what others hung on it.
    memo: dict[int, Any] = {}
    for one in module.modules():
        if id(one) in memo:
            continue
        if is_linear(one):
            memo |= dict.fromkeys(map(id, one.modules()), _linear(*weights_of(one, layer)))
            continue
        with onloaded(one):
            memo |= {id(p): _parameter(p, one) for p in one.parameters(recurse=False)}
        memo |= {id(vars(one)[name]): None for name in HUNG if vars(one).get(name) is not None}
        memo |= {id(value): OrderedDict() for name, value in vars(one).items() if name.endswith("_hooks")}
    made = copy.deepcopy(module, memo)
    for one in made.modules():
        for name in HUNG:
            if name in vars(one):
                del one.__dict__[name]
    return made.train(layer.training)


def _parameter(p: nn.Parameter, holder: nn.Module) -> nn.Parameter:
    if p.is_meta and "_hf_hook" in vars(holder):
        raise UnsupportedError(
            f"the weights of {type(holder).__name__} are offloaded, so an image-only one cannot be a copy of it; call "
            "apply before accelerate's hooks"
        )
    if not p.is_floating_point() or p.dtype.itemsize == 1:
        raise UnsupportedError(
            f"{type(holder).__name__} holds weights of {p.dtype}, of which an image-only one cannot be a copy; leave "
            "'norm' and 'ffn' out of parts"
        )
    return nn.Parameter(p.detach().clone())


def source(layer: nn.Module, spec: LayerSpec, key: str) -> tuple[str, str | None]:
    """The key in a layer of what a key in a set, such as "o.weight", is a copy of, and the letter that it is of it."""
    part, _, rest = key.partition(".")
    if part == "ffn":
        return f"{ffn.ffn_names(layer)[0]}.{rest}", None
    if part == "norm":
        name, _, kind = rest.partition(".")
        path = next(path for path in norms.norms_of(layer, spec) if norms.key_of(path) == name)
        return f"{path}.{kind}", None
    name = next(name for name, letters in spec.owned if part in letters)
    return f"{spec.attention}.{name}.{rest}", part


def taken(layer: nn.Module, spec: LayerSpec, key: str, value: Tensor) -> Tensor:
    """The value in a layer of the text, as a key in a set has it."""
    path, letter = source(layer, spec, key)
    if letter is not None:
        letters = next(letters for _, letters in spec.owned if letter in letters)
        parts = projections.parts_of(layer, spec, letters)
        return parts.piece(value.T if parts.transposed and key.endswith("weight") else value, letter, 0)
    held = layer.get_submodule(path.rpartition(".")[0])
    return value.T if key.endswith(".weight") and is_transposed(held) else value


def splits(methods: Collection[Method], count: int) -> bool:
    """Whether rows of a layer's parts go ways of their own under some method, in a decoder of `count` layers."""
    layers = (layer for method in methods for layer in route_of(method, count))
    return any(layer.separate or layer.image is Role.CONTEXT for layer in layers)


def parts_in(sets: nn.ModuleDict) -> set[str]:
    """The parts that some image rows have of their own, of a layer's sets."""
    return {part for one in sets.values() if isinstance(one, nn.ModuleDict) for part in one}


def check(layers: nn.ModuleList, specs: Sequence[LayerSpec], sets: Iterable[nn.Module]) -> None:
    """Refuse norms, FFNs and output linears that a `forward` in their instance would lead past the swapped class.

    Raises:
        UnsupportedError: with its name.
    """
    for index, (layer, spec, one) in enumerate(zip(layers, specs, sets, strict=True)):
        wanted, name = parts_in(cast(nn.ModuleDict, one)), f"decoder layer {index}"
        if "norm" in wanted:
            norms.check(layer, spec, name)
        if "ffn" in wanted:
            ffn.check(layer, name)
        if "o" in wanted:
            projections.check_linear(layer, spec, "o", name)


def settle_all(layers: Iterable[nn.Module], sets: nn.ModuleList) -> None:
    """`settle` each layer of a dropped decoder, which knows its place among the sets."""
    for layer in layers:
        bound = cast(Any, layer)._tokendrop
        settle(layer, bound.spec, sets[bound.index])


def settle(layer: nn.Module, spec: LayerSpec, own: nn.Module) -> None:
    """Swap the class of the parts that rows of image tokens go past, where it is not swapped.

    Raises:
        UnsupportedError: something that cannot be split stands in such a place now.
    """
    wanted = parts_in(cast(nn.ModuleDict, own))
    projections.settle(layer, spec, "qkvo" if "o" in wanted else "qkv")
    if "norm" in wanted:
        norms.inject(layer, spec)
        held = (part["norm"] for part in own.children() if isinstance(part, nn.ModuleDict) and "norm" in part)
        keys = {key for part in held for key in cast(nn.ModuleDict, part)}
        _check_there(keys, {norms.key_of(path) for path in norms.norms_of(layer, spec)}, "norm", spec)
    if "ffn" in wanted:
        ffn.inject(layer)
        _check_there({"ffn"}, {"ffn"} if ffn.ffn_of(layer) is not None else set(), "ffn", spec)


def _check_there(wanted: set[str], found: set[str], part: str, spec: LayerSpec) -> None:
    if lost := sorted(wanted - found):
        raise UnsupportedError(
            f"{', '.join(lost)} of {spec.layer_class.__name__} is not found any more, and image rows have a {part} of "
            "their own; remove() first, and apply afterwards"
        )
