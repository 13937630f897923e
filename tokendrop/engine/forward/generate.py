"""Generation with a cache: layers that hold only some tokens, and the steps that decode new ones.

Shape letters: B batch, T tokens of the prompt, Q new tokens, S stored tokens, D hidden, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from tokendrop.engine.forward.arguments import columns_of, is_bias
from tokendrop.engine.plan.rows import Split, split_rows
from tokendrop.errors import LayoutError, NeededRowError, UnsupportedError
from tokendrop.layout import TokenLayout
from tokendrop.roles import Role, Route

_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


class HoledLayer:
    """Mixin of a cache layer that counts tokens whose keys it does not hold.

    Args:
        length: tokens counted.
        positions: (B, S) int64, the position of each stored token.
        valid: (B, S) bool, False for a stored token that nobody may see.
    """

    length: int
    positions: Tensor
    valid: Tensor
    keys: Tensor
    values: Tensor
    is_initialized: bool
    lazy_initialization: Callable[[Tensor, Tensor], None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, K, D / H) of the tokens that `expect` named."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        return self.keys, self.values

    def expect(self, positions: Tensor, valid: Tensor, counted: int) -> None:
        """Count `counted` more tokens, of which those at `positions` are stored next."""
        self.positions = torch.cat([self.positions, positions], 1)
        self.valid = torch.cat([self.valid, valid], 1)
        self.length += counted
        self.cumulative_length = self.length  # what a sliding layer counts with

    def get_seq_length(self) -> int:
        """Tokens counted, stored or not."""
        return self.length

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
        for name in ("keys", "values", "positions", "valid"):
            setattr(self, name, change(getattr(self, name)))


@lru_cache
def _holed_class(base: type) -> type:
    return type(base.__name__, (HoledLayer, base), {"__module__": base.__module__})


def growing_layer(cache: Any, index: int) -> Any:
    """Layer `index` of an empty cache.

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
            "generate with the default DynamicCache"
        )
    return layer


def holed_layer(cache: Any, index: int, batch: int, device: torch.device) -> HoledLayer:
    """Make layer `index` of an empty cache one that may skip tokens.

    Raises:
        UnsupportedError: a kind of cache that does not grow token by token.
    """
    layer = growing_layer(cache, index)
    holed = cast(HoledLayer, object.__new__(_holed_class(type(layer))))
    holed.__dict__.update(layer.__dict__)
    holed.length = 0
    holed.positions = torch.zeros(batch, 0, dtype=torch.int64, device=device)
    holed.valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
    cache.layers[index] = holed
    return holed


def refuse_routers(routes: Sequence[Route]) -> None:
    """Refuse to generate where a layer has a router.

    Raises:
        UnsupportedError: with the reason.
    """
    if any(layer.select is not None and layer.select.learned for route in routes for layer in route):
        raise UnsupportedError(
            "a router keeps the highest of all image tokens, which a token that is being generated cannot know: how "
            "many compute would then depend on the data. Generate inside drop.disabled(), or pass use_cache=False for "
            "one forward"
        )


def grown(layout: TokenLayout, shape: tuple[int, int], ids: Tensor | None, routes: Sequence[Route]) -> TokenLayout:
    """The layout of a prompt, for rows repeated by a search and for tokens that followed it.

    Args:
        layout: of the (B, T) prompt.
        shape: (n * B, T + Q).
        ids: (n * B, T + Q) or (n * B, Q) vocabulary ids the model embedded, if known.
        routes: of each of the B samples; a selection concerns the prompt only, so new images count as text there.

    Raises:
        LayoutError: a shape that does not come from the prompt's.
        NeededRowError: the last token is an image, and its output would be stale.
    """
    (batch, tokens), (rows, length) = layout.image.shape, shape
    if rows % batch or length < tokens:
        raise LayoutError(
            f"the hidden states are of (B, T) = {shape}, but the layout is for {(batch, tokens)}; enter the layout of "
            "this very prompt"
        )
    times = rows // batch
    image = layout.image.repeat_interleave(times, 0)
    selects = [any(layer.select is not None for layer in route) for route in routes]
    new = image_ids(layout, ids, (rows, length - tokens), image.device)
    new = new & ~torch.tensor(selects, device=image.device).repeat_interleave(times)[:, None]
    image = torch.cat([image, new], 1)
    stale = torch.tensor([route[-1].image in (Role.CONTEXT, Role.GONE) for route in routes], device=image.device)
    if bool((image[:, -1] & stale.repeat_interleave(times)).any()):
        raise NeededRowError(
            "the last token is an image that ends CONTEXT or GONE, but its output is needed for the next; use HMGen to "
            "generate behind images"
        )
    padding = layout.padding
    if padding is not None:
        padding = torch.cat([padding.repeat_interleave(times, 0), torch.ones_like(new)], 1)
    task = layout.task
    if task is not None and not isinstance(task, str):
        task = tuple(name for name in task for _ in range(times))
    return replace(layout, image=image, task=task, padding=padding, segments=None)


def image_ids(layout: TokenLayout, ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Which of the last Q tokens are images, (B, Q) bool: by `layout.image_ids`, else none."""
    if layout.image_ids is None or ids is None or shape[1] == 0:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    return torch.isin(ids[:, -shape[1] :], layout.image_ids.to(ids.device)).to(device)


@dataclass(eq=False)
class Step:
    """The decoding of Q new tokens.

    Args:
        image: (B, Q) bool, the new tokens that are images.
        any_image: whether one is.
        all_images: whether all are.
        routes: of each sample of the layout, whose rows a search repeats.
        names: the projection set of each sample's image tokens, or None.
    """

    image: Tensor
    any_image: bool
    all_images: bool
    routes: Sequence[Route]
    names: Sequence[str | None]

    @classmethod
    def of(cls, image: Tensor, routes: Sequence[Route], names: Sequence[str | None]) -> "Step":
        """A step, with the one transfer from the device that it needs."""
        count = int(image.sum())
        return cls(image, count > 0, count == image.numel(), routes, names)

    def split(self, index: int) -> Split | None:
        """Which projections the new tokens use in layer `index`."""
        times = len(self.image) // len(self.routes)
        pairs = zip(self.names, self.routes, strict=True)
        names = tuple(name if route[index].separate else None for name, route in pairs for _ in range(times))
        return split_rows(self.image, names) if self.any_image and any(names) else None

    def role(self, index: int) -> Role:
        """The role of new image tokens in layer `index`; a selection concerns the prompt only.

        Raises:
            UnsupportedError: samples with different roles.
            NeededRowError: a new image token whose output would be stale.
        """
        roles = {self._role(route, index) for route in self.routes}
        if len(roles) > 1:
            names = " and ".join(sorted(role.name for role in roles))
            raise UnsupportedError(
                f"image tokens are {names} in layer {index} of one batch; generate the tasks in batches of their own"
            )
        stale = [role for role in (self._role(route, -1) for route in self.routes) if role in (Role.CONTEXT, Role.GONE)]
        if self.any_image and stale:
            raise NeededRowError(
                f"a new image token is {stale[0].name} in the last layer, but its output is needed for the next; use "
                "HMGen to generate images"
            )
        return roles.pop()

    @staticmethod
    def _role(route: Route, index: int) -> Role:
        return route[index].image if route[index].select is None else Role.ACTIVE


def decode(
    store: Any, step: Step, skips: bool, hidden: Tensor, named: dict[str, Any], mask: str
) -> dict[str, Any] | None:
    """The arguments of a layer whose cache has holes, for Q new tokens; None where all of them skip it.

    Args:
        store: its holed cache layer.
        step: the new tokens.
        skips: whether image tokens skip the layer.
        hidden: (B, Q, D).
        named: the layer's arguments.
        mask: name of the one that takes the attention mask.
    """
    batch, new = step.image.shape
    at = torch.arange(store.length, store.length + new, device=hidden.device).expand(batch, -1)
    if skips and step.all_images:
        store.expect(at[:, :0], step.image[:, :0], new)
        return None
    store.expect(at, ~step.image if skips else torch.ones_like(step.image), new)
    biased = {name: columns_of(x, store.positions) for name, x in named.items() if is_bias(x, store.length)}
    return named | biased | {mask: _mask(named.get(mask), store, at)}


def _mask(mask: Tensor | None, store: Any, rows: Tensor) -> Tensor:
    columns = store.positions
    own = columns[:, None] == rows[:, :, None]
    allowed = ((store.valid[:, None] & (columns[:, None] <= rows[:, :, None])) | own)[:, None]
    if mask is None:
        return allowed
    # A sliding layer's mask covers the last positions only.
    offset = store.length - mask.shape[-1]
    index = (columns - offset).clamp(min=0)[:, None, None].expand(-1, mask.shape[1], rows.shape[1], -1)
    seen = mask.expand(len(rows), -1, -1, -1).gather(-1, index)
    allowed = allowed & (columns >= offset)[:, None, None]
    return seen & allowed if mask.dtype == torch.bool else seen.masked_fill(~allowed, torch.finfo(mask.dtype).min)
