"""The token layout of a batch, read from the keys that processors and data modules write.

Shape letters: B batch, T tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokendrop.errors import BatchError
from tokendrop.layout import TokenLayout, packed_samples

OURS = ("image_mask", "segments", "task")


def batch_layout(batch: Any, module: nn.Module, image_ids: tuple[int, ...] = ()) -> TokenLayout:
    """The layout of a batch: which tokens are images, and what else it says about them.

    Images come from `image_mask`, else `mm_token_type_ids` (nonzero), else `input_ids` against `image_ids` or the
    image token id of the model's config; the task from `task`, labels and padding from `labels` and `attention_mask`;
    packed samples as `packed_samples` finds them.

    Args:
        batch: a mapping of (B, T) tensors.
        module: where a config is looked for.
        image_ids: vocabulary ids of image tokens.

    Raises:
        BatchError: none of these keys.
        LayoutTypeError: tensors of the wrong dtype.
        LayoutError: tensors whose shapes differ.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch: expected a mapping with 'image_mask', 'mm_token_type_ids' or 'input_ids'; found "
            f"{type(batch).__name__}. Give TokenDrop a layout=fn(batch) of your own"
        )
    labels, padding = _rows(batch, "labels"), _rows(batch, "attention_mask")
    padding = None if padding is None else padding != 0
    task, segments = batch.get("task"), batch.get("segments")
    task = tuple(task) if isinstance(task, list) else task
    layout = None
    ids = image_ids or _config_ids(module)
    if "image_mask" in batch:
        layout = TokenLayout(batch["image_mask"], task, segments, padding, labels)
    elif "mm_token_type_ids" in batch:
        layout = TokenLayout(batch["mm_token_type_ids"] != 0, task, segments, padding, labels)
    elif "input_ids" in batch and ids:
        found = TokenLayout.from_ids(batch["input_ids"], ids)
        layout = TokenLayout(found.image, task, segments, padding, labels, found.image_ids)
    if layout is not None:
        batch_size, tokens = layout.image.shape
        return replace(layout, packs=packed_samples(batch, (batch_size, tokens), padding))
    unknown = (
        ", and neither image_ids= nor the model's config says which ids are images" if "input_ids" in batch else ""
    )
    raise BatchError(
        f"the batch has the keys {sorted(map(str, batch))}{unknown}; it needs 'image_mask' (B, T) bool, or "
        "'mm_token_type_ids', or 'input_ids' with known image ids. Add one, or give TokenDrop a layout=fn(batch)"
    )


def _rows(batch: Mapping[str, Any], key: str) -> Tensor | None:
    value = batch.get(key)
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _config_ids(module: nn.Module) -> tuple[int, ...]:
    for part in module.modules():
        config = getattr(part, "config", None)
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        found = tuple(getattr(config, name) for name in names if isinstance(getattr(config, name, None), int))
        if found:
            return tuple(dict.fromkeys(found))
    return ()
