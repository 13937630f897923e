"""From patches of the vision encoder to the tokens that the decoder gets.

Where a model rearranges its image features (squares of patches made one token, crops joined to an image, pooling), its
own code does the same to what was seen of the encoder: all of this is linear in the features.

Shape letters: N images, crops or frames, P patches of each, C numbers of each patch, V image tokens, U patches of one.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.errors import UnsupportedError
from tokendrop.layout import places

ARRANGED = "arranged"  # among what is seen of an encoder, what the model does to its features
_NEWLINE = "image_newline"


class Grid(NamedTuple):
    """What was seen of images of one size.

    Args:
        maps: (N, P, C).
        rows: of patches in each.
        columns: likewise.
        tokens: how many image tokens there may be.
    """

    maps: Tensor
    rows: int
    columns: int
    tokens: Sequence[int]

    def place(self, shrink: int = 1) -> Tensor:
        """Image, row and column of each patch, (N * P, 3) int64, or of squares of `shrink` by `shrink`."""
        size = (1, -(-self.rows // shrink), -(-self.columns // shrink))
        return places([size] * len(self.maps), self.maps.device)


# What was seen, of tokens: (V, C), and (V, 3) int64, image, row and column, all -1 where a token comes of no patch.
Arranged = tuple[Tensor, Tensor]


def plain(grid: Grid) -> Arranged:
    """Each patch is a token."""
    return grid.maps.flatten(0, 1), grid.place()


def _squares(base: Callable[..., Any], shape: Any, given: dict[str, Any], grid: Grid) -> Arranged:
    # A pixel shuffle puts the features of a square of patches behind each other; the token has their mean.
    number, width = len(grid.maps), grid.maps.shape[-1] + 2
    if grid.rows != grid.columns or math.prod(shape[:-1]) != number * grid.rows * grid.columns:
        raise UnsupportedError(
            f"a pixel shuffle of {tuple(shape[:-1])} patches, of {number} images with {grid.rows} rows and "
            f"{grid.columns} columns of them; expected square images, and every patch of each"
        )
    marked = torch.cat([grid.maps, grid.place()[:, 1:].view(number, -1, 2)], -1)
    parts = base(marked.view(*shape[:-1], width), **given)
    parts = parts.reshape(-1, parts.shape[-1] // width, width)
    side, (low, high) = math.isqrt(parts.shape[1]), parts[..., -2:].aminmax(dim=1)
    if side * side != parts.shape[1] or not (high - low == side - 1).all():
        raise UnsupportedError(
            f"a pixel shuffle makes a token of {parts.shape[1]} patches that are no square of the image; the methods "
            "that look at the vision encoder expect squares"
        )
    images = torch.arange(len(parts), device=low.device) * number // len(parts)
    return parts[..., :-2].mean(1), torch.cat([images[:, None], low.long() // side], 1)


def _crops(base: Callable[..., Any], shapes: Any, given: dict[str, Any], grid: Grid) -> Arranged:
    # The whole image, then its crops joined to one image, cut and scaled, with a token behind each of its rows.
    crops, patches = [shape[0] for shape in shapes], grid.maps.shape[1]
    marker = F.one_hot(torch.tensor(grid.maps.shape[-1]), grid.maps.shape[-1] + 1).to(grid.maps)
    packed, _ = base([*F.pad(grid.maps, (0, 1)).split(crops)], **given | {_NEWLINE: marker})
    found, number = [], 0
    for one, count in zip(packed, crops, strict=True):
        ends = one[:, -1] > 0.5
        place, at = one.new_zeros(len(one), 3, dtype=torch.int64), torch.arange(len(one) - patches, device=one.device)
        place[:patches] = grid.place()[:patches]
        place[:, 0] = number
        if count > 1:
            wide = ends.int().argmax() - patches + 1
            place[patches:] = torch.stack([torch.full_like(at, number + 1), at // wide, at % wide], 1)
        number += min(count, 2)
        place[ends] = -1
        stays = slice(None) if given.get(_NEWLINE) is not None else ~ends
        found.append((one[stays, :-1], place[stays]))
    values, places_ = zip(*found, strict=True)
    return torch.cat(values), torch.cat(places_)


def _pooled(base: Callable[..., Any], _: Any, given: dict[str, Any], grid: Grid) -> Arranged:
    # The frames of a video, each shrunk to half its sides, with one token behind them all.
    pooled, place = base(grid.maps, **given), grid.place(2)
    number, tokens = len(pooled), len(place)
    more = [count - tokens for count in grid.tokens]
    videos = next((count for count in more if count > 0 and number % count == 0), 0)
    if not videos or pooled[..., 0].numel() != tokens:
        return pooled.flatten(0, 1), place
    values = F.pad(pooled.reshape(videos, -1, pooled.shape[-1]), (0, 0, 0, 1))
    return values.flatten(0, 1), F.pad(place.view(videos, -1, 3), (0, 0, 0, 1), value=-1).flatten(0, 1)


class _Shuffles(Swapped):
    """Mixin of a module with a pixel shuffle."""

    def pixel_shuffle(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _noted(self, cast(Any, super()).pixel_shuffle, _squares, features, args, kwargs)


class _Packs(Swapped):
    """Mixin of a module that joins the crops of an image."""

    def pack_image_features(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        return _noted(self, cast(Any, super()).pack_image_features, _crops, features, args, kwargs)


class _Pools(Swapped):
    """Mixin of a module that shrinks the frames of a video."""

    def apply_pooling(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _noted(self, cast(Any, super()).apply_pooling, _pooled, features, args, kwargs)


_MIXINS = {"pixel_shuffle": _Shuffles, "pack_image_features": _Packs, "apply_pooling": _Pools}


def _noted(
    module: nn.Module,
    base: Callable[..., Any],
    arrange: Callable[..., Arranged],
    features: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    seen = module.__dict__["_tokendrop_seen"]()
    if seen is not None:
        # Of the features their shapes, so that none of them is held.
        given = inspect.signature(base).bind(features, *args, **kwargs).arguments
        rest = {name: value for name, value in given.items() if value is not features}
        shapes = features.shape if isinstance(features, Tensor) else [one.shape for one in features]
        seen[ARRANGED] = partial(arrange, base, shapes, rest)
    return base(features, *args, **kwargs)


def arranging(model: nn.Module) -> Iterator[tuple[nn.Module, type[Swapped]]]:
    """The modules of a model that rearrange image features, each with the mixin that watches it."""
    for module in model.modules():
        for name, mixin in _MIXINS.items():
            # Of a module that hands the call on to a child, the child.
            if hasattr(type(module), name) and not any(hasattr(type(child), name) for child in module.children()):
                yield module, mixin


def watch(found: Sequence[tuple[nn.Module, type[Swapped]]], find: Callable[[], dict[Any, Any] | None]) -> None:
    """Write what is done to features into what `find` returns."""
    for module, mixin in found:
        module.__dict__["_tokendrop_seen"] = find
        swap(module, mixin)
