"""Layers of somebody else's cache: made to grow, and to hold only some of the tokens they count.

Shape letters: B batch, K new stored tokens, S stored tokens, D hidden, H heads.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from tokendrop.errors import UnsupportedError

_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_FIXED = ("StaticLayer", "StaticSlidingWindowLayer")


class HoledLayer:
    """Mixin of a cache layer that counts tokens whose keys it does not hold.

    Args:
        length: tokens counted.
        named: (B, S) int64, the positions of stored tokens, and (B, S) bool, False for one that nobody may see. Layers
            that hold the same tokens share both.
        behind: tokens stored after those, the last ones that were counted; everyone may see them.
        full: whether everyone may see all stored tokens, as far as is known without a transfer from the device.
        spare: rows that come next and only fill up, behind those that are stored.
        turns: rotary tables (B or 1, T, width) of the tokens counted, padding first, where rows are numbered anew.
        layers: those of its cache.
        index: its place in them.
    """

    length: int
    named: tuple[Tensor, Tensor]
    behind: int = 0
    full: bool = True
    spare: int = 0
    layers: list[Any]
    index: int
    keys: Tensor
    values: Tensor
    turns: tuple[Tensor, Tensor] | None = None
    is_initialized: bool
    is_croppable = False
    lazy_initialization: Callable[[Tensor, Tensor], None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, K, D / H) of the tokens that `expect` named.

        Raises:
            UnsupportedError: it named none; a dense model would take later tokens for earlier ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        held = self.keys.shape[-2] if self.keys.dim() == 4 else 0
        if held + keys.shape[-2] - self.spare != self.stored:
            raise UnsupportedError(
                f"a cache layer that holds {held} of {self.length} tokens is continued by a model that runs dense; "
                "continue inside the `with drop.layout(...)` that filled it, or start from the whole prompt"
            )
        seen = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        self.keys, self.values = (x[..., : self.stored, :] for x in seen) if self.spare else seen
        self.spare = 0
        return seen

    def expect(self, positions: Tensor, valid: Tensor, counted: int, spare: int = 0, full: bool = False) -> None:
        """Count `counted` more tokens, of which those at `positions` (B, K) are stored next.

        Args:
            positions: of the stored ones.
            valid: (B, K) bool, False for one that nobody may see.
            counted: how many tokens of each sample there are.
            spare: rows given behind the K, which are not stored.
            full: whether all are known to be valid.
        """
        if self.stored:
            positions, valid = torch.cat([self.positions, positions], 1), torch.cat([self.valid, valid], 1)
        self.named, self.behind, self.spare, self.full = (positions, valid), 0, spare, self.full and full
        self._count(counted)

    def follow(self, counted: int) -> None:
        """Count `counted` more tokens, all of which are stored next and seen by everyone behind them."""
        self.behind += counted
        self._count(counted)

    def _count(self, counted: int) -> None:
        self.length += counted
        self.cumulative_length = self.length  # what a sliding layer counts with

    @property
    def stored(self) -> int:
        """S, those that come next among them."""
        return self.named[0].shape[1] + self.behind

    @property
    def positions(self) -> Tensor:
        """(B, S) int64, the position of each stored token."""
        at, _ = self.named
        behind = torch.arange(self.length - self.behind, self.length, device=at.device)
        return torch.cat([at, behind.expand(len(at), -1)], 1) if self.behind else at

    @property
    def valid(self) -> Tensor:
        """(B, S) bool, False for a stored token that nobody may see."""
        _, valid = self.named
        return torch.cat([valid, valid.new_ones(len(valid), self.behind)], 1) if self.behind else valid

    def get_seq_length(self) -> int:
        """Tokens counted, stored or not."""
        return self.length

    def reset(self) -> None:
        """Make room for an empty, ordinary layer."""
        plain: Any = object.__new__(type(self).__mro__[2])
        plain.__dict__.update(self.__dict__ | {"keys": None, "values": None, "is_initialized": False})
        for name in ("length", "named", "behind", "full", "spare", "turns", "layers", "index"):
            plain.__dict__.pop(name, None)
        plain.reset()
        self.layers[self.index] = plain

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *_: Any) -> None:
        """Refused.

        Raises:
            UnsupportedError: always; a token that was not stored cannot be counted back.
        """
        raise UnsupportedError("a cache that skips image tokens cannot be cropped; use no assisted decoding")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.named = change(self.named[0]), change(self.named[1])
        if self.turns is not None and len(self.turns[0]) > 1:
            self.turns = change(self.turns[0]), change(self.turns[1])


@lru_cache
def _holed_class(base: type) -> type:
    return type(base.__name__, (HoledLayer, base), {"__module__": base.__module__})


def growing_layer(cache: Any, index: int) -> Any:
    """Layer `index` of a cache.

    Raises:
        UnsupportedError: a kind of cache that does not grow token by token.
    """
    growing = getattr(cache, "layer_class_to_replicate", None)
    while growing is not None and len(cache.layers) <= index:
        cache.layers.append(growing())
    layer = cache.layers[index] if index < len(getattr(cache, "layers", ())) else cache
    if type(layer).__name__ not in _GROWING:
        raise UnsupportedError(
            f"a cache with {type(layer).__name__} does not grow with the tokens it is given, so none can skip a layer; "
            "generate with the default DynamicCache, or a StaticCache"
        )
    return layer


def grows(cache: Any, index: int) -> bool:
    """Whether layer `index` of a cache gives the keys of the tokens it was given, and no others."""
    layers = getattr(cache, "layers", ())
    return index < len(layers) and type(layers[index]).__name__ in _GROWING


def let_grow(cache: Any) -> None:
    """Make layers of a fixed length in an empty cache grow instead: same answers, and a token can skip one."""
    layers = getattr(cache, "layers", ())
    for index, layer in enumerate(layers):
        if type(layer).__name__ in _FIXED:
            from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

            sliding = type(layer).__name__ == _FIXED[1]
            layers[index] = DynamicSlidingWindowLayer(layer.max_cache_len) if sliding else DynamicLayer()


def holed_layer(cache: Any, index: int, batch: int, device: torch.device) -> HoledLayer:
    """Make layer `index` of a cache one that may skip tokens; it holds all those given before.

    Raises:
        UnsupportedError: a kind of cache that does not grow token by token.
    """
    layer = growing_layer(cache, index)
    if isinstance(layer, HoledLayer):
        return layer
    length = int(layer.get_seq_length())
    held = layer.keys.shape[-2] if length else 0  # a sliding layer holds the last ones
    holed = cast(HoledLayer, object.__new__(_holed_class(type(layer))))
    holed.__dict__.update(layer.__dict__)
    holed.length, holed.layers, holed.index = length, cache.layers, index
    positions = torch.arange(length - held, length, device=device).expand(batch, -1)
    holed.named = positions, torch.ones(batch, held, dtype=torch.bool, device=device)
    cache.layers[index] = holed
    return holed
