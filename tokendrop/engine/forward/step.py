"""The steps that decode new tokens behind a prompt, in layers whose cache may hold only some tokens.

Shape letters: R rows, Q new tokens, S stored tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokendrop.engine.forward.arguments import columns_of, is_bias
from tokendrop.engine.model.block_masks import compact_block, is_block_mask
from tokendrop.engine.model.sight import Sight
from tokendrop.engine.plan.rows import Rows, Split, split_rows
from tokendrop.errors import LayoutError, NeededRowError, UnsupportedError
from tokendrop.roles import Role, Route


@dataclass(eq=False)
class Step:
    """The decoding of Q new tokens.

    Args:
        image: (R, Q) bool, the new tokens that are images.
        any_image: whether one is.
        all_images: whether all are.
        routes: of each of the R rows.
        names: the projection set of each row's image tokens, or None.
    """

    image: Tensor
    any_image: bool
    all_images: bool
    routes: Sequence[Route]
    names: Sequence[str | None]

    @classmethod
    def of(cls, image: Tensor, order: Sequence[int], routes: Sequence[Route], names: Sequence[str | None]) -> "Step":
        """A step, with the one transfer from the device that it needs.

        Args:
            image: (R, Q) bool.
            order: the sample of the layout that each row of the cache came from, when it was filled.
            routes: of each sample.
            names: likewise.

        Raises:
            LayoutError: rows that are no multiple of those, of samples that differ.
        """
        served = [(routes[sample], names[sample]) for sample in order]
        times, left = divmod(len(image), len(served))
        if left and any(one != served[0] for one in served):
            raise LayoutError(
                f"a cache filled by {len(served)} rows of several tasks is continued by {len(image)}, and nothing says "
                "by which; generate the tasks in batches of their own"
            )
        rows = served[:1] * len(image) if left else [one for one in served for _ in range(times)]
        count = int(image.sum())
        return cls(image, count > 0, count == image.numel(), [one for one, _ in rows], [name for _, name in rows])

    def split(self, index: int) -> Split | None:
        """Which projections the new tokens use in layer `index`."""
        pairs = zip(self.names, self.routes, strict=True)
        owns = ((name, route[index].separate) for name, route in pairs)
        names = tuple((name, own) if own and name is not None else None for name, own in owns)
        return split_rows(self.image, names) if self.any_image and any(names) else None

    def text_rows(self) -> Rows:
        """The new tokens that are no images, of each row; none where all are."""
        at = torch.arange(self.image.shape[1], device=self.image.device).expand(self.image.shape)
        rows = Rows(at, ~self.image)
        return Rows(rows.index[:, :0], rows.valid[:, :0]) if self.all_images else rows

    def role(self, index: int) -> Role:
        """The role of new image tokens in layer `index`; a selection concerns the prompt only.

        Raises:
            UnsupportedError: samples with different roles.
            NeededRowError: a new image token whose output would be stale.
        """
        if not self.any_image:
            return Role.ACTIVE
        roles = {self._role(route, index) for route in self.routes}
        if len(roles) > 1:
            names = " and ".join(sorted(role.name for role in roles))
            raise UnsupportedError(
                f"image tokens are {names} in layer {index} of one batch; generate the tasks in batches of their own"
            )
        stale = [role for role in (self._role(route, -1) for route in self.routes) if role in (Role.CONTEXT, Role.GONE)]
        if stale:
            raise NeededRowError(
                f"a new image token is {stale[0].name} in the last layer, but its output is needed for the next; use "
                "HMGen to generate images"
            )
        return roles.pop()

    @staticmethod
    def _role(route: Route, index: int) -> Role:
        return route[index].image if route[index].select is None else Role.ACTIVE


def decode(
    store: Any, step: Step, skips: bool, hidden: Tensor, named: dict[str, Any], mask: str, sight: bool
) -> dict[str, Any] | None:
    """The arguments of a layer whose cache has holes, for Q new tokens; None where all of them skip it.

    Args:
        store: its holed cache layer.
        step: the new tokens.
        skips: whether image tokens skip the layer.
        hidden: (R, Q, D).
        named: the layer's arguments.
        mask: name of the one that takes the attention mask.
        sight: whether that is to be a `Sight`.
    """
    batch, new = step.image.shape
    at = torch.arange(store.length, store.length + new, device=hidden.device).expand(batch, -1)
    if skips and step.all_images:
        store.expect(at[:, :0], step.image[:, :0], new)
        return None
    store.expect(at, ~step.image if skips else torch.ones_like(step.image), new)
    biased = {name: columns_of(x, store.positions) for name, x in named.items() if is_bias(x, store.length)}
    return named | biased | {mask: _mask(named.get(mask), store, at, sight)}


def _mask(mask: Any, store: Any, rows: Tensor, sight: bool) -> Any:
    columns, new = store.positions, rows.shape[1]
    own = torch.arange(columns.shape[1] - new, columns.shape[1], device=rows.device).expand_as(rows)
    seen = Sight(rows, columns, own, store.valid, None, store.length)
    if mask is None:
        return seen if sight else seen.mask(None)
    # A sliding layer's mask covers the last positions only.
    offset = store.length - mask.shape[-1]
    index, seen.valid = (columns - offset).clamp(min=0), store.valid & (columns >= offset)
    if sight:
        seen.valid = seen.valid & mask.bool().expand(len(rows), -1).gather(1, index)
        return seen
    if is_block_mask(mask):
        every = torch.arange(len(rows), device=rows.device)
        return compact_block(mask, every, replace(seen, columns=index), (rows - rows[:, :1]))
    index = index[:, None, None].expand(-1, mask.shape[1], new, -1)
    return seen.among(mask.expand(len(rows), -1, -1, -1).gather(-1, index))
