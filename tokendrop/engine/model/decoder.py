"""Find the decoder of a model, and learn by inspection how its layers are called and made.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from tokendrop.errors import DecoderError, UnsupportedError

# Names that the field's decoders share; whatever else differs is found by inspection.
_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask")
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_FUSED = {"qkv_proj": False, "c_attn": False, "query_key_value": True}  # True: interleaved by head
_OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")


@dataclass(frozen=True)
class LayerSpec:
    """How a decoder layer class is called and where its parts are.

    Args:
        layer_class: the class as its author wrote it.
        parameters: names of its forward's arguments, hidden states (B, T, D) first.
        mask: name of the argument that takes the attention mask, if any.
        cache: name of the argument that takes the key and value cache, if any.
        attention: name of the attention child, if any.
        linears: attention children that make queries, keys and values, with the letters each makes.
        interleaved: whether a fused linear orders its outputs by head, then by letter.
    """

    layer_class: type[nn.Module]
    parameters: tuple[str, ...]
    mask: str | None
    cache: str | None
    attention: str | None
    linears: tuple[tuple[str, str], ...]
    interleaved: bool

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states of a layer call, and its other arguments by name."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        return named.pop(self.parameters[0]), named

    def backend(self, layer: nn.Module) -> str:
        """The attention implementation a layer runs, "sdpa" where its config names none."""
        config = getattr(getattr(layer, self.attention or "", None), "config", None)
        return getattr(config, "_attn_implementation", None) or "sdpa"

    def context_refusal(self, layer: nn.Module) -> str | None:
        """Why image tokens cannot be CONTEXT in such layers, or None."""
        backend = self.backend(layer)
        if backend not in ("sdpa", "eager"):
            return f"the {backend!r} attention takes no rectangular mask; load it with attn_implementation='sdpa'"
        attention = getattr(layer, self.attention or "", None)
        buffers = () if attention is None else attention.buffers(recurse=False)
        if backend == "eager" and any(buffer.dim() == 4 for buffer in buffers):
            return (
                "its eager attention applies a causal mask of its own by index; load it with attn_implementation='sdpa'"
            )
        if self.cache is None or self.mask is None:
            missing = "key and value cache" if self.cache is None else "attention mask"
            return f"{self.layer_class.__name__}.forward takes no {missing}, through which it would see them"
        return None

    def separate_refusal(self) -> str | None:
        """Why image tokens cannot have projections of their own in such layers, or None."""
        if {letter for _, letters in self.linears for letter in letters} != set("qkv"):
            return f"inspection finds no linears for q, k and v in {self.layer_class.__name__}"
        return None

    def linear(self, layer: nn.Module, letter: str) -> nn.Module:
        """The layer's linear that makes "q", "k" or "v", with the adapter on it where it has one."""
        name = next(name for name, letters in self.linears if letter in letters)
        return getattr(getattr(layer, self.attention or ""), name)

    def widths(self, layer: nn.Module) -> dict[str, int]:
        """Output features of q, k and v."""
        if all(len(letters) == 1 for _, letters in self.linears):
            return {letters: linear_shape(self.linear(layer, letters))[0] for _, letters in self.linears}
        attention = getattr(layer, self.attention or "")
        fused = linear_shape(self.linear(layer, "q"))[0]
        queries = next(linear_shape(getattr(attention, name))[1] for name in _OUTPUTS if hasattr(attention, name))
        return {"q": queries, "k": (fused - queries) // 2, "v": (fused - queries) // 2}


def base_linear(linear: nn.Module) -> nn.Module:
    """The linear beneath its adapters, such as PEFT's."""
    while isinstance(beneath := getattr(linear, "base_layer", None), nn.Module):
        linear = beneath
    return linear


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear stores its weight as (in, out), such as GPT-2's Conv1D."""
    return any(base.__name__ == "Conv1D" for base in type(linear).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, with an adapter or without, also of a library that packs its weight."""
    module = base_linear(module)
    leaf = next(module.children(), None) is None and None not in _features(module)
    return isinstance(module, nn.Linear) or is_transposed(module) or leaf


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear, also beneath an adapter."""
    linear = base_linear(linear)
    # A packed weight has another shape, so only a linear that does not say its features is asked for its weight.
    if None not in (features := _features(linear)):
        return features
    rows, columns = cast(Tensor, linear.weight).shape
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def linears(module: nn.Module) -> list[nn.Module]:
    """Each linear in a module, those of adapters among them."""
    return [one for one in module.modules() if base_linear(one) is one and is_linear(one)]


def _features(linear: nn.Module) -> tuple[Any, Any]:
    found = (getattr(linear, name, None) for name in ("out_features", "in_features"))
    rows, columns = (one if isinstance(one, int) else None for one in found)
    return rows, columns


def head_width(layer: nn.Module, spec: LayerSpec) -> int:
    """Features of one attention head."""
    attention = getattr(layer, spec.attention or "")
    return getattr(attention, "head_dim", None) or attention.head_size


def layer_spec(layer: nn.Module, layer_class: type[nn.Module]) -> LayerSpec:
    """Learn a layer's argument names and parts.

    Raises:
        UnsupportedError: its forward takes no hidden states by position.
    """
    parameters = list(inspect.signature(layer_class.forward).parameters.values())[1:]
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise UnsupportedError(
            f"{layer_class.__name__}.forward{inspect.signature(layer_class.forward)} takes no hidden states as its "
            "first argument; write the layer as forward(hidden_states, ...)"
        )
    names = tuple(one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    attention = next((name for name in _ATTENTIONS if isinstance(getattr(layer, name, None), nn.Module)), None)
    children = dict(getattr(layer, attention).named_children()) if attention else {}
    linears = tuple((f"{x}_proj", x) for x in "qkv" if is_linear(children.get(f"{x}_proj", nn.Identity())))
    fused = next((name for name in _FUSED if name in children and any(o in children for o in _OUTPUTS)), None)
    if fused is not None:
        linears = ((fused, "qkv"),)
    cache = next((name for name in _CACHES if name in names), None)
    mask = next((name for name in _MASKS if name in names), None)
    return LayerSpec(layer_class, names, mask, cache, attention, linears, _FUSED.get(fused or "", False))


def find_layers(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder's layer list: the one whose layers hold causal attention, or the one at `path`.

    Args:
        model: any module that holds one decoder.
        path: dotted path of the list, where there are several.

    Returns:
        The dotted path, and the list of L layers of one class.

    Raises:
        DecoderError: none found, several found, or nothing suitable at `path`.
    """
    check_module(model)
    if path is not None:
        try:
            layers = model.get_submodule(path)
        except (AttributeError, TypeError) as error:
            raise DecoderError(f"layers={path!r}: {type(model).__name__} has no such module; {error}") from error
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise DecoderError(f"layers={path!r}: expected a ModuleList with layers; found {type(layers).__name__}")
        if len({type(layer) for layer in layers}) > 1:
            names = sorted({type(layer).__name__ for layer in layers})
            raise DecoderError(f"layers={path!r}: expected layers of one class; found {', '.join(names)}")
        return path, layers
    found = decoders(model)
    if not found:
        raise DecoderError(
            f"{type(model).__name__} has no list of layers with causal self-attention that inspection can find; give "
            "its dotted path as layers='...', or run hand-written layers with DropLayers"
        )
    if len(found) > 1:
        names = " and ".join(repr(name) for name, _ in found)
        raise DecoderError(f"{type(model).__name__} has {len(found)} decoders, {names}; choose one with layers='...'")
    return found[0]


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        DecoderError: with the value.
    """
    if not isinstance(model, nn.Module):
        raise DecoderError(f"model: expected a torch.nn.Module with a decoder; found {model!r}")


def uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile` wrapped, or the module itself; the wrapper passes attributes on, and would lose a handle."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def decoders(model: nn.Module, causal: bool = True) -> list[tuple[str, nn.ModuleList]]:
    """Every list of layers with causal self-attention in a model, or with another one, by dotted path."""
    lists = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList))
    return [(name, one) for name, one in lists if _attends(one, causal)]


def _attends(layers: nn.ModuleList, causal: bool) -> bool:
    if len(layers) == 0 or len({type(layer) for layer in layers}) > 1:
        return False
    return getattr(attention_of(layers[0]), "is_causal", None) is causal


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a layer, if it has one."""
    found = next((getattr(layer, name) for name in _ATTENTIONS if hasattr(layer, name)), None)
    return found if isinstance(found, nn.Module) else None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings of the first Hugging Face model in `model`, if it says."""
    for module in model.modules():
        find = getattr(module, "get_input_embeddings", None)
        if callable(find):
            found = find()
            return found if isinstance(found, nn.Module) else None
    return None


def deepstack_layers(model: nn.Module) -> int:
    """How many first layers a vision-language decoder adds visual features between, at full length."""
    for module in model.modules():
        indexes = getattr(
            getattr(getattr(module, "config", None), "vision_config", None), "deepstack_visual_indexes", None
        )
        if indexes:
            return len(indexes)
    return 0


def reentrant(layer: nn.Module) -> bool:
    """Whether a layer recomputes its forward inside a re-entrant backward."""
    function: Callable[..., Any] | None = getattr(layer, "_gradient_checkpointing_func", None)
    if not getattr(layer, "gradient_checkpointing", False) or not layer.training or function is None:
        return False
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism has already taken a module's parameters."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(isinstance(p, distributed.DTensor) for p in module.parameters())
