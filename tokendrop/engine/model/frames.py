"""Which image or video of a batch, and which frame of it, an image token belongs to.

Shape letters: B batch, T tokens, N images or videos.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.plan.parts import image_numbers
from tokendrop.layout import TokenLayout

_GRIDS, _IMAGES, _VIDEOS = ("image_grid_thw", "video_grid_thw"), "pixel_values", "pixel_values_videos"
_MADE = ("inputs_embeds", "mm_encoder_outputs")  # image tokens of which nothing is known here
# Tokens and frames of each of N images or videos.
_Sizes = tuple[Tensor, Tensor]


def with_frames(layout: TokenLayout, batch: Mapping[str, Any], module: nn.Module) -> TokenLayout:
    """The layout with its images and frames, where the batch says which they are.

    Tokens of images and of videos are those of `image_grid_thw` and `video_grid_thw` (N, 3), in their order. Without
    these, those of videos are shared out to the (N, frames, ...) of `pixel_values_videos`, the last frame taking what
    is left over, and each run of tokens of an image is one, of one frame.

    Args:
        layout: of the (B, T) tokens.
        batch: of the same.
        module: where a config is looked for.
    """
    given = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if not given.keys() & {*_GRIDS, _IMAGES, _VIDEOS} or batch.keys() & set(_MADE):
        return layout
    config = next((part.config for part in module.modules() if _sees(getattr(part, "config", None))), None)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if merge is None and any(name in given for name in _GRIDS):
        return layout
    video = _video_tokens(given, config, layout.image)
    of_images, of_videos = (_of_grid(given.get(name), merge or 1, video.device) for name in _GRIDS)
    if of_videos is None and (pixels := given.get(_VIDEOS)) is not None and pixels.dim() > 3:
        each = (video.sum() // len(pixels)).expand(len(pixels))
        of_videos = each, torch.full_like(each, pixels.shape[1])
    images, frames = image_numbers(layout), torch.zeros_like(layout.image, dtype=torch.int64)
    apart = layout.image.numel() + 1  # above every number of an image
    for mask, sizes, first in ((layout.image & ~video, of_images, 0), (video, of_videos, apart)):
        if sizes is not None:
            number, frame = _shared_out(mask, *sizes)
            images, frames = images.where(~mask, number + first), frames.where(~mask, frame)
    return replace(layout, images=images, frames=frames)


def _sees(config: Any) -> bool:
    return getattr(config, "vision_config", None) is not None


def _video_tokens(given: Mapping[str, Tensor], config: Any, image: Tensor) -> Tensor:
    # (B, T) bool, those of videos; all image tokens where the batch has nothing but videos.
    ids = [getattr(config, name, None) for name in ("video_token_id", "video_token_index")]
    if (kinds := given.get("mm_token_type_ids")) is not None and kinds.shape == image.shape:
        return image & (kinds == 2)
    if (tokens := given.get("input_ids")) is not None and tokens.shape == image.shape and any(ids):
        return image & (tokens == next(filter(None, ids)))
    return image if not given.keys() & {_GRIDS[0], _IMAGES} else torch.zeros_like(image)


def _of_grid(grid: Tensor | None, merge: int, device: torch.device) -> _Sizes | None:
    if grid is None:
        return None
    grid = grid.to(device)
    return grid.prod(1) // merge**2, grid[:, 0]


def _shared_out(mask: Tensor, sizes: Tensor, counts: Tensor) -> _Sizes:
    # The number (B, T) of the image or video that each of these tokens belongs to, in their order, and of the frame.
    rank, ends = (mask.flatten().cumsum(0) - 1).clamp(min=0), sizes.cumsum(0)
    number = torch.bucketize(rank, ends, right=True).clamp(max=len(sizes) - 1)
    each = (sizes // counts).clamp(min=1)
    frame = torch.minimum((rank - (ends - sizes)[number]) // each[number], counts[number] - 1)
    return number.view_as(mask), frame.view_as(mask)
