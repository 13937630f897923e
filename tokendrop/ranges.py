"""Ranges of a decoder's layers, as methods are given them."""

import re
from collections.abc import Sequence

from tokendrop.errors import LayerRangeError

Layers = str | Sequence[int]


def check_layers(layers: Layers | slice) -> Layers:
    """Normalise a layer range to text or a tuple of indices.

    Args:
        layers: half-open slice as text ("2:24:2") or `slice`, or a sequence of layer indices.

    Raises:
        LayerRangeError: neither of these.

    Example:
        >>> check_layers(slice(2, 24, 2)), check_layers([0, 3])
        ('2:24:2', (0, 3))
    """
    if isinstance(layers, slice):
        step = 1 if layers.step is None else layers.step
        layers = ":".join("" if part is None else str(part) for part in (layers.start, layers.stop, step))
    if isinstance(layers, str):
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", layers):
            raise LayerRangeError(f"the layer range {layers!r} is no slice; write it as 'start:stop' or 'start:stop:2'")
        return layers
    if isinstance(layers, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        return tuple(layers)
    raise LayerRangeError(
        f"a layer range is a slice as text such as '2:24:2', a slice, or a list of layer indices; found {layers!r}"
    )


def layer_indices(layers: Layers, num_layers: int) -> tuple[int, ...]:
    """The layers a range names, ascending.

    Args:
        layers: half-open slice as text, or layer indices; negative bounds count from the end.
        num_layers: L.

    Raises:
        LayerRangeError: a bound or an index outside the model, an index twice, or a range without a layer.

    Example:
        >>> layer_indices("2:-1:2", 8)
        (2, 4, 6)
    """

    def inside(value: int, last: int) -> int:
        if not -num_layers <= value <= last:
            raise LayerRangeError(
                f"the layer range {layers!r} reaches layer {value}, but the decoder has {num_layers} layers; "
                f"use bounds from {-num_layers} to {last}"
            )
        return value + num_layers if value < 0 else value

    if isinstance(layers, str):
        start, stop, step = ([int(part) if part else None for part in layers.split(":")] + [None])[:3]
        first = inside(start, num_layers) if start is not None else 0
        end = inside(stop, num_layers) if stop is not None else num_layers
        chosen = list(range(first, end, step or 1))
    else:
        chosen = sorted(inside(index, num_layers - 1) for index in layers)
    if not chosen:
        raise LayerRangeError(f"the layer range {layers!r} names none of the decoder's {num_layers} layers; name one")
    if len(set(chosen)) < len(chosen):
        raise LayerRangeError(f"the layer range {layers!r} names a layer twice; name each layer once")
    return tuple(chosen)


def deepest(layers: tuple[int, ...], strength: float) -> frozenset[int]:
    """The share `strength` of ascending `layers` that a schedule has switched on, from the deep end.

    Example:
        >>> sorted(deepest((2, 4, 6, 8), 0.5))
        [6, 8]
    """
    count = int(strength * len(layers) + 1e-9)
    return frozenset(layers[len(layers) - count :])
