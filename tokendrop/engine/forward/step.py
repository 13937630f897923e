"""The steps that decode new tokens behind a prompt, in layers whose cache may hold only some tokens.

Shape letters: R rows, Q new tokens, S stored tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.arguments import columns_of, is_bias
from tokendrop.engine.forward.packing import attends
from tokendrop.engine.model.block_masks import compact_block, is_block_mask
from tokendrop.engine.model.decoder import LayerSpec
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
    def of(
        cls,
        image: Tensor,
        same: bool | None,
        order: Sequence[int],
        routes: Sequence[Route],
        names: Sequence[str | None],
    ) -> "Step":
        """A step, with one transfer from the device where ids of new tokens change what is computed.

        Args:
            image: (R, Q) bool.
            same: whether all of these are images, or none is; None where nobody knows.
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
        if same is None:
            count = int(image.sum()) if any(_differs(*one) for one in served) else 0
        else:
            count = image.numel() if same else 0
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


def _differs(route: Route, name: str | None) -> bool:
    # Whether a new image token is another thing than text; most selections concern the prompt only.
    for layer in route:
        chosen, own = layer.select, name is not None and layer.separate
        if own or (layer.image is not Role.ACTIVE if chosen is None else chosen.adds and not chosen.gate):
            return True
    return False


def told(layer: nn.Module, spec: LayerSpec, index: int) -> bool:
    """Whether the attention of layer `index` is told by a `Sight` which tokens its cache holds; else by a mask tensor.

    Raises:
        UnsupportedError: it cannot be told.
    """
    backend = spec.backend(layer)
    of, sight = attends(layer, spec, backend)
    if of is None or (of == "flash" and not sight):
        raise UnsupportedError(
            f"layer {index} generates behind tokens that its cache does not hold, and the {backend!r} attention takes "
            "no mask that says which; load it with attn_implementation='sdpa'"
        )
    return sight


def decode(
    store: Any, step: Step, skips: bool, named: dict[str, Any], mask: str, sight: bool, made: list[Any]
) -> dict[str, Any] | None:
    """The arguments of a layer whose cache has holes, for Q new tokens; None where all of them skip it.

    One token that may see all that is stored needs no mask, so the layer is called as it would be without holes.

    Args:
        store: its holed cache layer.
        step: the new tokens.
        skips: whether image tokens skip the layer.
        named: the layer's arguments.
        mask: name of the one that takes the attention mask.
        sight: whether that is to be a `Sight`.
        made: masks of layers before it, with what they were made of.
    """
    (batch, new), device = step.image.shape, step.image.device
    if skips and step.any_image:
        at = torch.arange(store.length, store.length + new, device=device).expand(batch, -1)
        rows, valid = (at[:, :0], step.image[:, :0]) if step.all_images else (at, ~step.image)
        store.expect(rows, valid, new, full=step.all_images)
        if step.all_images:
            return None
    else:
        store.follow(new)
    given, others = named.get(mask), {name: x for name, x in named.items() if name != mask}
    changed = {name: columns_of(x, store.positions) for name, x in others.items() if is_bias(x, store.length)}
    if new > 1 or given is not None or sight or not store.full:
        changed[mask] = _once(given, store, new, sight, made)
    return named | changed


def _once(mask: Any, store: Any, new: int, sight: bool, made: list[Any]) -> Any:
    # Layers that hold the same tokens, and are given the same mask, share what is made of it.
    sizes = store.length, store.behind, sight
    for given, named, of, found in made:
        if given is mask and of == sizes and all(one is other for one, other in zip(named, store.named, strict=True)):
            return found
    found = _mask(mask, store, new, sight)
    made.append((mask, store.named, sizes, found))
    return found


def _mask(mask: Any, store: Any, new: int, sight: bool) -> Any:
    columns, valid = store.positions, None if store.full else store.valid
    (batch, stored), device, follows = columns.shape, columns.device, store.behind >= new
    if mask is None and new == 1 and follows and valid is not None and not sight:
        return valid[:, None, None]
    rows = torch.arange(store.length - new, store.length, device=device).expand(batch, -1)
    # New tokens of which all are stored see their own keys without being told to.
    own = torch.arange(stored - new, stored, device=device).expand_as(rows) if sight or not follows else None
    seen = Sight(rows, columns, own, valid, None, store.length, causal=mask is None and new == 1 and valid is None)
    if mask is None:
        return seen if sight else seen.mask(None)
    index, offset = columns, store.length - mask.shape[-1]
    if offset:  # a sliding layer's mask covers the last positions only
        index, within = (columns - offset).clamp(min=0), columns >= offset
        seen.valid = within if valid is None else valid & within
    if sight:
        real = mask.bool().expand(len(rows), -1).gather(1, index)
        seen.valid = real if seen.valid is None else seen.valid & real
        return seen
    if is_block_mask(mask):
        every = torch.arange(len(rows), device=rows.device)
        return compact_block(mask, every, replace(seen, columns=index), (rows - rows[:, :1]))
    index = index[:, None, None].expand(-1, mask.shape[1], new, -1)
    return seen.among(mask.expand(len(rows), -1, -1, -1).gather(-1, index))
