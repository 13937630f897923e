"""Find the decoder of a model, and learn by inspection how its layers are called and made.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokendrop.engine.model.attention import follows, kind
from tokendrop.engine.model.linears import is_linear, linear_shape
from tokendrop.errors import DecoderError, UnsupportedError

# Names that the field's decoders share; whatever else differs is found by inspection.
_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_MASKS = ("attention_mask", "attn_mask", "mask", "src_mask")
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # "cache" from transformers 5.24 on
_FUSED = ("qkv_proj", "c_attn", "query_key_value")
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
        grouped: whether a fused linear orders its outputs by group of heads, then by letter; each group has one head of
            keys and one of values.
        recurrent: what carries a state from row to row in such layers, if anything.
        output: the attention child that makes its output, if it is a linear.
    """

    layer_class: type[nn.Module]
    parameters: tuple[str, ...]
    mask: str | None
    cache: str | None
    attention: str | None
    linears: tuple[tuple[str, str], ...]
    grouped: bool
    recurrent: str | None = None
    output: str | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states of a layer call, and its other arguments by name."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        return named.pop(self.parameters[0]), named

    def backend(self, layer: nn.Module) -> str:
        """The attention implementation a layer runs, "sdpa" where its config names none."""
        config = getattr(getattr(layer, self.attention or "", None), "config", None)
        return getattr(config, "_attn_implementation", None) or "sdpa"

    def context_refusal(self, layer: nn.Module, looks: bool = False) -> str | None:
        """Why image tokens cannot be CONTEXT in a layer, or, if it `looks`, cannot be scored there; or None."""
        if self.recurrent:
            return f"{self.recurrent} carries a state from row to row there, which keys and values alone do not enter"
        backend, attention = self.backend(layer), attention_of(layer)
        takes = kind(backend)
        if takes not in ("sdpa", "eager") and not (follows(attention) and (looks or takes)):
            return f"the {backend!r} attention takes no rectangular mask; load it with attn_implementation='sdpa'"
        buffers = () if attention is None else attention.buffers(recurse=False)
        if takes == "eager" and any(buffer.dim() == 4 for buffer in buffers):
            return (
                "its eager attention applies a causal mask of its own by index; load it with attn_implementation='sdpa'"
            )
        if isinstance(getattr(attention, "indexer", None), nn.Module):
            return (
                f"{type(attention).__name__} chooses keys by an indexer with a cache of its own, which it lacks there"
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

    @property
    def owned(self) -> tuple[tuple[str, str], ...]:
        """`linears`, and with letter "o" the one that makes the attention's output."""
        return self.linears if self.output is None else (*self.linears, (self.output, "o"))

    def linear(self, layer: nn.Module, letter: str) -> nn.Module:
        """The layer's linear that makes "q", "k", "v" or the output "o", with the adapter on it where it has one."""
        name = next(name for name, letters in self.owned if letter in letters)
        return getattr(getattr(layer, self.attention or ""), name)

    def widths(self, layer: nn.Module) -> dict[str, int]:
        """Output features of q, k and v."""
        if all(len(letters) == 1 for _, letters in self.linears):
            return {letters: linear_shape(self.linear(layer, letters))[0] for _, letters in self.linears}
        attention = getattr(layer, self.attention or "")
        fused = linear_shape(self.linear(layer, "q"))[0]
        queries = next(linear_shape(getattr(attention, name))[1] for name in _OUTPUTS if hasattr(attention, name))
        return {"q": queries, "k": (fused - queries) // 2, "v": (fused - queries) // 2}

    def groups(self, layer: nn.Module) -> int:
        """In how many groups a fused linear orders its outputs, each with all letters."""
        return self.widths(layer)["k"] // head_width(layer, self) if self.grouped else 1


def head_width(layer: nn.Module, spec: LayerSpec) -> int:
    """Features of one attention head."""
    attention = getattr(layer, spec.attention or "")
    return getattr(attention, "head_dim", None) or attention.head_size


def layer_specs(layers: nn.ModuleList) -> list[LayerSpec]:
    """Learn each layer's argument names and parts; layers of one class may hold different attentions.

    Raises:
        UnsupportedError: their forward takes no hidden states by position.
    """
    causal = any(_is_causal(layer) for layer in layers)
    return [layer_spec(layer, type(layer), causal and not _is_causal(layer)) for layer in layers]


def layer_spec(layer: nn.Module, layer_class: type[nn.Module], recurrent: bool = False) -> LayerSpec:
    """Learn a layer's argument names and parts; `recurrent` for one without attention, among others that have it.

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
    fused = next((name for name in _FUSED if is_linear(children.get(name, nn.Identity()))), None)
    if fused is not None and any(name in children for name in _OUTPUTS):
        # The order of a "qkv_proj" is known in attention of transformers' present form; CodeGen's is another.
        linears = ((fused, "qkv"),) if fused != "qkv_proj" or _is_causal(layer) else ()
    # Also GPTBigCode's "c_attn", where each head has keys of its own.
    by_head = fused == "c_attn" and getattr(attention_of(layer), "multi_query", True) is False
    if recurrent or len({id(children[name]) for name, _ in linears}) < len(linears):
        linears = ()
    cache = next((name for name in _CACHES if name in names), None)
    mask = next((name for name in _MASKS if name in names), None)
    mixer = type(attention_of(layer) or layer).__name__ if recurrent else _convolution(layer)
    output = next((name for name in _OUTPUTS if is_linear(children.get(name, nn.Identity()))), None)
    grouped = by_head or fused == "query_key_value"
    return LayerSpec(layer_class, names, mask, cache, attention, linears, grouped, mixer, output)


def _convolution(layer: nn.Module) -> str | None:
    # What holds a short convolution over rows, as state space models do.
    holders = (one for one in layer.modules() for child in one.children() if _mixes(child))
    return next((type(one).__name__ for one in holders), None)


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.kernel_size != (1,)


def has_decoder(model: nn.Module, layers: str | None) -> bool:
    """Whether there is a decoder, or the layer list `layers` where one is named."""
    if layers is None:
        return bool(decoders(model))
    try:
        find_layers(model, layers)
    except DecoderError:
        return False
    return True


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
    found = decoders(model) or _prefixed(model)
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
    return any(getattr(attention_of(layer), "is_causal", None) is causal for layer in layers)


def _is_causal(layer: nn.Module) -> bool:
    return getattr(attention_of(layer), "is_causal", None) is True


def _prefixed(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    # Decoders whose masks let a prefix be seen from both sides, such as PaliGemma's.
    found = decoders(model, causal=False)
    return [(name, one) for name, one in found if getattr(_config(one[0]), "use_bidirectional_attention", False)]


def _config(layer: nn.Module) -> Any:
    return getattr(attention_of(layer), "config", None)


def sees_both_sides(layer: nn.Module) -> bool:
    """Whether the attention of a layer sees every row where it is given no mask."""
    return getattr(attention_of(layer), "is_causal", None) is False


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a layer, if it has one."""
    found = next((getattr(layer, name) for name in _ATTENTIONS if hasattr(layer, name)), None)
    return found if isinstance(found, nn.Module) else None


def reentrant(layer: nn.Module) -> bool:
    """Whether a layer recomputes its forward inside a re-entrant backward."""
    if not layer.training or not getattr(layer, "gradient_checkpointing", False):
        return False
    function: Callable[..., Any] | None = getattr(layer, "_gradient_checkpointing_func", None)
    return function is not None and bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism has already taken a module's parameters."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(isinstance(p, distributed.DTensor) for p in module.parameters())
