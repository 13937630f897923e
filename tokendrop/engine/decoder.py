"""Find the decoder of a model, and learn by inspection how its layers are called and made.

Shape letters: B batch, T tokens, D hidden, H heads, L layers.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from tokendrop.errors import DecoderError, UnsupportedError

_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class LayerSpec:
    """How a decoder layer class is called and where its parts are.

    Args:
        layer_class: the class as its author wrote it.
        hidden: name of the argument that takes hidden states (B, T, D).
        cache: name of the argument that takes the key and value cache, if any.
        attention: name of the attention child, if any.
        norm: name of the norm in front of attention, if any.
        linears: attention children that make "q", "k" and "v", by letter; empty where they are not split.
    """

    layer_class: type[nn.Module]
    hidden: str
    cache: str | None
    attention: str | None
    norm: str | None
    linears: tuple[tuple[str, str], ...]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states of a layer call, and its other arguments by name."""
        named: dict[str, Any] = {}
        bound = _signature(self.layer_class).bind(None, *args, **kwargs)
        for name, value in list(bound.arguments.items())[1:]:
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named.pop(self.hidden), named

    def backend(self, layer: nn.Module) -> str:
        """The attention implementation a layer runs, "sdpa" where its config names none."""
        config = getattr(getattr(layer, self.attention or "", None), "config", None)
        return getattr(config, "_attn_implementation", None) or "sdpa"

    def context_refusal(self) -> str | None:
        """Why image tokens cannot be CONTEXT in such layers, or None."""
        if self.cache is None:
            return f"{self.layer_class.__name__}.forward takes no key and value cache"
        if len(self.linears) < 3 or self.norm is None:
            return f"{self.layer_class.__name__} has no separate q, k and v projections behind a norm"
        return None

    def keys_values(self, layer: nn.Module, states: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, D / H) of rows that compute nothing else.

        k = rotary(k_norm(W_K norm(x))), v = W_V norm(x)

        Args:
            layer: the decoder layer.
            states: (B, M, D) hidden states at the layer's input.
            arguments: the layer's arguments for these rows.

        Source: ours.
        """
        attention, names = getattr(layer, self.attention or ""), dict(self.linears)
        x = getattr(layer, self.norm or "")(states)
        heads = (*x.shape[:-1], -1, attention.head_dim)
        k, v = getattr(attention, names["k"])(x).view(heads), getattr(attention, names["v"])(x).view(heads)
        k_norm = getattr(attention, "k_norm", None)
        k = (k if k_norm is None else k_norm(k)).transpose(1, 2)
        rotary = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if rotary is not None:
            k = rotary(k[:, :0], k, *arguments["position_embeddings"])[1]
        return k, v.transpose(1, 2)


@lru_cache
def _signature(layer_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(layer_class.forward)


def layer_spec(layer: nn.Module, layer_class: type[nn.Module]) -> LayerSpec:
    """Learn a layer's argument names and parts.

    Raises:
        UnsupportedError: its forward takes no hidden states by position.
    """
    parameters = list(_signature(layer_class).parameters.values())[1:]
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise UnsupportedError(
            f"{layer_class.__name__}.forward{_signature(layer_class)} takes no hidden states as its first argument; "
            "write the layer as forward(hidden_states, ...)"
        )
    names = {parameter.name for parameter in parameters}
    attention = next((name for name in _ATTENTIONS if isinstance(getattr(layer, name, None), nn.Module)), None)
    norm = next((name for name, child in layer.named_children() if "Norm" in type(child).__name__), None)
    holder = getattr(layer, attention) if attention else None
    linears = tuple(
        (letter, f"{letter}_proj")
        for letter in "qkv"
        if holder is not None and isinstance(getattr(holder, f"{letter}_proj", None), nn.Linear)
    )
    cache = next((name for name in _CACHES if name in names), None)
    return LayerSpec(layer_class, parameters[0].name, cache, attention, norm, linears)


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
    if path is not None:
        try:
            layers = model.get_submodule(path)
        except AttributeError as error:
            raise DecoderError(f"layers={path!r}: {type(model).__name__} has no such module; {error}") from error
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise DecoderError(f"layers={path!r}: expected a ModuleList with layers; found {type(layers).__name__}")
        return path, layers
    found = decoders(model)
    if not found:
        raise DecoderError(
            f"{type(model).__name__} has no list of layers with causal self-attention that inspection can find; give "
            "its dotted path as layers='...'"
        )
    if len(found) > 1:
        names = " and ".join(repr(name) for name, _ in found)
        raise DecoderError(f"{type(model).__name__} has {len(found)} decoders, {names}; choose one with layers='...'")
    return found[0]


def decoders(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Every list of layers with causal self-attention in a model, by dotted path."""
    return [(name, module) for name, module in model.named_modules() if _is_decoder(module)]


def _is_decoder(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0 or len({type(layer) for layer in module}) > 1:
        return False
    attention = next((getattr(module[0], name) for name in _ATTENTIONS if hasattr(module[0], name)), None)
    return isinstance(attention, nn.Module) and getattr(attention, "is_causal", False) is True


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
