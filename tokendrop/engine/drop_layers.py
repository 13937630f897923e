"""Decoders that nobody can find by inspection: a list of layers run under a method."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tokendrop.engine.inject import apply
from tokendrop.engine.support import Methods
from tokendrop.errors import DecoderError


class DropLayers(nn.Module):
    """Run a hand-written list of layers one after another, under a method.

    A layer is called as layer(hidden (B, T, D), *args, **kwargs) and returns hidden states, or a tuple that begins with
    them. Without a mask it must be causal; masks are (1 or B, 1 or H, T, T), bool (True = attend) or additive, or one
    causal (T, T); other tensors with a row for each token have a batch dimension.

    Args:
        layers: modules of one class.
        methods: as for `apply`.
        multiple: as for `apply`.

    Raises:
        DecoderError: no layers, or of several classes.
        UnsupportedError: a role that such layers cannot have.

    Example:
        >>> import torch
        >>> import tokendrop as td
        >>> one = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layers = td.DropLayers([one], td.Drop(":", keep=0.5))
        >>> causal = torch.nn.Transformer.generate_square_subsequent_mask(4)
        >>> with layers.tokendrop.layout(td.TokenLayout(torch.tensor([[False, True, True, False]]))):
        ...     layers(torch.ones(1, 4, 8), src_mask=causal, is_causal=True).shape
        torch.Size([1, 4, 8])

    Source: ours.
    """

    def __init__(self, layers: Iterable[nn.Module], methods: Methods, multiple: int = 64) -> None:
        super().__init__()
        listed = list(layers) if isinstance(layers, Iterable) else [layers]
        if not listed or not all(isinstance(layer, nn.Module) for layer in listed):
            raise DecoderError(f"layers: expected modules, the layers of a decoder; found {layers!r}")
        self.layers = nn.ModuleList(listed)
        apply(self, methods, layers="layers", multiple=multiple)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (B, T, D) after the last layer."""
        for layer in self.layers:
            out = layer(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden
