"""What generation runs on: the prompt's layout, for rows repeated by a search or guidance, and for tokens behind it.

Shape letters: B batch of the layout, R rows of the model, T tokens of the prompt, Q new tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokendrop.errors import LayoutError, NeededRowError, UnsupportedError
from tokendrop.layout import TokenLayout
from tokendrop.roles import Role, Route, selections


class Ids(NamedTuple):
    """The vocabulary ids that were seen.

    Args:
        now: (R, T + Q) or (R, Q) vocabulary ids of this forward; None where it was given embeddings.
        before: whether those of any forward were.
    """

    now: Tensor | None
    before: bool


def check_length(layout: TokenLayout, ids: Ids, length: int, follows: bool) -> None:
    """Refuse tokens that the model put among those of its ids, as soft prompts do: what is an image would be shifted.

    Args:
        layout: of the (B, T) prompt.
        ids: of this forward.
        length: T + Q, of the hidden states.
        follows: whether this forward goes one token further than one before it; a model that makes many tokens of one
            id of an image has fewer ids than tokens there.

    Raises:
        LayoutError: with both lengths.
    """
    tokens = layout.image.shape[1]
    if ids.now is None or length <= tokens or ids.now.shape[1] >= length or follows:
        return
    raise LayoutError(
        f"the model was given ids of {tuple(ids.now.shape)} and runs rows of {length} tokens under a layout of "
        f"{tokens}, so it puts tokens of its own among them, as soft prompts do (PEFT's PromptTuning); enter a layout "
        f"of all {length}"
    )


def refuse_routers(routes: Sequence[Route]) -> None:
    """Refuse to generate where a layer has a router that ranks generated tokens too.

    Raises:
        UnsupportedError: with the reason.
    """
    learned = [select for select in selections(routes) if select.learned and not select.gate]
    if learned:
        raise UnsupportedError(
            "a router keeps the highest of all image tokens, which a token that is being generated cannot know: how "
            "many compute would then depend on the data. Generate inside drop.disabled(), or pass use_cache=False for "
            "one forward"
        )


def refuse_new_images(routes: Sequence[Route], image: Tensor) -> None:
    """Refuse to generate image tokens where those of a prompt are fused: a new one would not be.

    Args:
        routes: of the samples.
        image: bool, the new tokens that are images.

    Raises:
        UnsupportedError: with what to use.
    """
    if any(select.fuse for select in selections(routes)) and bool(image.any()):
        raise UnsupportedError(
            f"{int(image.sum())} generated tokens are images, and image tokens are fused where a range of layers ends, "
            "which is done for those of a prompt only; use HMGen to generate images"
        )


def may_skip(routes: Sequence[Route]) -> bool:
    """Whether a token behind the prompt may skip a layer, if it is an image."""
    return any(layer.image is Role.BYPASS and layer.select is None for route in routes for layer in route)


def by_ids(layout: TokenLayout, routes: Sequence[Route], ids: Ids, shape: tuple[int, int]) -> TokenLayout:
    """The layout of the first token, for a prompt shorter than T without an image, where ids say what the others are.

    So runs a prompt without images in chunks, or a second one beside it, as under guidance by a negative prompt.

    Args:
        layout: of the (B, T) prompt.
        routes: of each sample.
        ids: of this forward.
        shape: (R, Q) of this forward.

    Returns:
        The layout itself where that is not so.
    """
    if shape[1] >= layout.image.shape[1] or ids.now is None or ids.now.shape != shape:
        return layout
    if layout.image_ids is None and layout.new == "image":
        return layout
    images = new_images(layout, ids, *shape, False)
    if bool(layout.image.any() | images[:, 0].any()) or (_selects(routes) and bool(images.any())):
        return layout
    return replace(layout, image=layout.image[:, :1], padding=None, segments=None, images=None, frames=None)


def row_order(layout: TokenLayout, routes: Sequence[Route], ids: Ids, hidden: Tensor) -> list[int]:
    """The sample of the layout that each row of the model comes from.

    A search repeats each sample n times in place; guidance repeats the batch as a whole, behind itself.

    Args:
        layout: of the B prompts.
        routes: of each.
        ids: of this forward.
        hidden: (R, T + Q, D), as embedded.

    Returns:
        R numbers.

    Raises:
        LayoutError: rows that do not come from the layout's, or that nobody can tell apart.
    """
    (batch, tokens), (rows, length) = layout.image.shape, hidden.shape[:2]
    if rows % batch or length < tokens:
        raise LayoutError(
            f"the hidden states are of (B, T) = {(rows, length)}, but the layout is for {(batch, tokens)}; enter the "
            "layout of this very prompt, and pass it whole: with images, neither can a prompt come in chunks "
            "(prefill_chunk_size), nor a second one run beside it (guidance by a negative prompt)"
        )
    times = rows // batch
    sizes = [n for n in range(times, 0, -1) if times % n == 0]
    orders = [[row for _ in range(times // n) for row in range(batch) for _ in range(n)] for n in sizes]
    if times == 1 or batch == 1:
        return orders[0]
    selects, one_task = _selects(routes), len(set(layout.tasks)) == 1
    if one_task and not selects and bool((layout.image == layout.image[:1]).all()):
        return orders[0]
    whole = ids.now is not None and ids.now.shape == (rows, length)
    given = ids.now if whole and ids.now is not None else hidden
    image = None
    if whole and layout.image_ids is not None:
        image = torch.isin(given[:, :tokens], layout.image_ids.to(given.device)).to(layout.image.device)
    for n, order in zip(sizes, orders, strict=True):
        # A search is known by its copies; guidance, whose halves differ, by its images. A selection is the sample's.
        described = image is not None and one_task and not selects and torch.equal(image, layout.image[order])
        if (n == times or described) and _copied(given[:, :tokens], layout, order, n):
            return order
    raise LayoutError(
        f"the model runs {rows} rows under a layout of {batch} samples that differ; they are no copies of each, and "
        "their ids do not show which is which. Enter a layout with all the rows, in the order in which the model runs "
        "them: under guidance the conditional ones, then the others"
    )


def _selects(routes: Sequence[Route]) -> bool:
    return any(layer.select is not None for route in routes for layer in route)


def _copied(given: Tensor, layout: TokenLayout, order: Sequence[int], n: int) -> bool:
    # The vision encoder may round copies of an image differently, so embeddings are compared where there is text.
    blocks = given.unflatten(0, (-1, n))
    same = blocks == blocks[:, :1]
    same = same.flatten(3).all(-1) if same.dim() > 3 else same
    return bool((same.flatten(0, 1) | layout.image[list(order)].to(same.device)).all())


def same_kind(layout: TokenLayout, ids: Ids, rows: int, new: int, one_by_one: bool) -> bool | None:
    """Whether tokens behind a prompt are images, all or none, as `new_images` finds; None where their ids say it."""
    seen = ids.now is not None and len(ids.now) == rows and ids.now.shape[1] >= new
    if new == 0 or (seen and layout.image_ids is None):
        return layout.new == "image"
    if seen:
        return None
    if layout.new is None and not (ids.before and one_by_one):
        raise LayoutError(
            f"{new} tokens behind the prompt came as embeddings, so their ids do not say what they are; say it by "
            "TokenLayout(..., new='image') or new='text'"
        )
    # What was not embedded as vocabulary, by a model that embeds its vocabulary in plain sight, is an image.
    return layout.new != "text"


def new_images(layout: TokenLayout, ids: Ids, rows: int, new: int, one_by_one: bool) -> Tensor:
    """Which of the tokens behind a prompt are images: by their ids, by what the layout says, or by how they came.

    Args:
        layout: of the prompt.
        ids: of this forward.
        rows: R.
        new: Q.
        one_by_one: whether at most one of them was in no forward before.

    Returns:
        (R, Q) bool.

    Raises:
        LayoutError: nothing says what they are.
    """
    device, same = layout.image.device, same_kind(layout, ids, rows, new, one_by_one)
    if same is None and ids.now is not None and layout.image_ids is not None:
        return torch.isin(ids.now[:, -new:], layout.image_ids.to(ids.now.device)).to(device)
    return torch.full((rows, new), bool(same), device=device)


def grown(layout: TokenLayout, routes: Sequence[Route], order: Sequence[int], new: Tensor) -> TokenLayout:
    """The layout of a prompt, for rows repeated by a search and for tokens that followed it.

    Args:
        layout: of the (B, T) prompt.
        routes: of each of the B samples; a selection concerns the prompt only, so new images count as text there.
        order: the sample that each of the R rows comes from.
        new: (R, Q) bool, the tokens behind it that are images.

    Raises:
        NeededRowError: the last token is an image, and its output would be stale.
    """
    rows = list(order)
    device = layout.image.device
    selects = [any(layer.select is not None for layer in routes[row]) for row in rows]
    new = new & ~torch.tensor(selects, device=device)[:, None]
    image = torch.cat([layout.image[rows], new], 1)
    stale = torch.tensor([routes[row][-1].image in (Role.CONTEXT, Role.GONE) for row in rows], device=device)
    if bool((image[:, -1] & stale).any()):
        raise NeededRowError(
            "the last token is an image that ends CONTEXT or GONE, but its output is needed for the next; use HMGen to "
            "generate behind images"
        )
    padding = layout.padding
    if padding is not None:
        padding = torch.cat([padding[rows], torch.ones_like(new)], 1)
    task = layout.task
    if task is not None and not isinstance(task, str):
        task = tuple(task[row] for row in rows)
    behind = torch.full(new.shape, -1, device=device)  # new images are no part of a selection
    images, frames = (None if x is None else torch.cat([x[rows], behind], 1) for x in (layout.images, layout.frames))
    more = {"images": images, "frames": frames, "segments": None}
    return replace(layout, image=image, task=task, padding=padding, **more)
