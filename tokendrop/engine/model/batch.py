"""The token layout of a batch, read from the keys that processors and data modules write.

Shape letters: B batch, T tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokendrop.engine.model.frames import with_frames
from tokendrop.errors import BatchError
from tokendrop.layout import TokenLayout, packed_samples

IMAGES = ("image_mask", "mm_token_type_ids", "input_ids")
_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def batch_layout(batch: Any, module: nn.Module, image_ids: tuple[int, ...] = ()) -> TokenLayout:
    """The layout of a batch: which tokens are images, and what else it says about them.

    Images come from `image_mask`, else `mm_token_type_ids` (1 an image, 2 a video), else `input_ids` against
    `image_ids` or the image token id of the model's config; the task from `task`, labels and padding from `labels` and
    `attention_mask`; packed samples as `packed_samples` finds them, images and frames as `with_frames` does.

    Args:
        batch: a mapping of (B, T) tensors.
        module: where a config is looked for.
        image_ids: vocabulary ids of image tokens.

    Raises:
        BatchError: none of these keys, or several batches in one.
        LayoutTypeError: tensors of the wrong dtype.
        LayoutError: tensors whose shapes differ.
    """
    if hint := sub_batches(batch):
        raise BatchError(f"batch: expected one batch, found {type(batch).__name__}{hint}")
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch: expected a mapping with 'image_mask', 'mm_token_type_ids' or 'input_ids'; found "
            f"{type(batch).__name__}. Give layout= a function of your own"
        )
    labels, padding = _rows(batch, "labels"), _rows(batch, "attention_mask")
    padding = None if padding is None else padding != 0
    task, segments = batch.get("task"), batch.get("segments")
    task = tuple(task) if isinstance(task, list) else task
    layout = None
    if "image_mask" in batch:
        layout = TokenLayout(batch["image_mask"], task, segments, padding, labels)
    elif "mm_token_type_ids" in batch:
        kinds = batch["mm_token_type_ids"]  # 3 is audio
        layout = TokenLayout((kinds == 1) | (kinds == 2), task, segments, padding, labels)
    elif "input_ids" in batch and (ids := image_ids or _config_ids(module)):
        found = TokenLayout.from_ids(batch["input_ids"], ids)
        layout = TokenLayout(found.image, task, segments, padding, labels, found.image_ids)
    if layout is not None:
        batch_size, tokens = layout.image.shape
        layout = replace(layout, packs=packed_samples(batch, (batch_size, tokens), padding))
        return with_frames(layout, batch, module)
    unknown = (
        ", and neither image_ids= nor the model's config says which ids are images" if "input_ids" in batch else ""
    )
    raise BatchError(
        f"the batch has the keys {sorted(map(str, batch))}{unknown}; it needs 'image_mask' (B, T) bool, or "
        "'mm_token_type_ids', or 'input_ids' with known image ids. Add one, or give a function of your own: "
        "TokenDrop(..., layout=fn(batch)), apply(..., layout=fn(args, kwargs))"
    )


def sub_batches(batch: Any) -> str:
    """What to do with a batch of several batches, as `CombinedLoader` makes; empty where it is one batch.

    Args:
        batch: a mapping, list or tuple of mappings, if it is such a batch.
    """
    several = [] if _is_batch(batch) else list(_within(batch, ""))
    if not several:
        return ""
    names = ", ".join(path.removeprefix("[").removesuffix("]").replace("][", " ") for path in several)
    return (
        f". The batch is {len(several)} batches, {names}, which no one layout describes: in "
        f"the step, enter one for each, `with tokendrop.handle(self).layout(batch_layout(batch{several[0]}, "
        "self)):`, with batch_layout from tokendrop.callbacks.batch"
    )


def _is_batch(given: Any) -> bool:
    return isinstance(given, Mapping) and any(key in given for key in IMAGES)


def _within(given: Any, path: str) -> Iterator[str]:
    # How the batches in it are reached, as Python writes it.
    parts = given if isinstance(given, Mapping) else dict(enumerate(given)) if isinstance(given, list | tuple) else {}
    for name, part in parts.items():
        at = f"{path}[{name!r}]"
        yield from [at] if _is_batch(part) else _within(part, at)


def _rows(batch: Mapping[str, Any], key: str) -> Tensor | None:
    value = batch.get(key)
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _config_ids(module: nn.Module) -> tuple[int, ...]:
    found = list(dict.fromkeys(_said_ids(module)))
    if len(found) > 1:
        raise BatchError(
            f"{type(module).__name__} holds {len(found)} models whose configs name different image ids, "
            f"{' and '.join(map(str, found))}; add 'image_mask' (B, T) bool, or give layout= a function of your own"
        )
    return found[0] if found else ()


def _said_ids(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """The image ids that the outermost configs name; those of parts beneath them are not asked."""
    config = getattr(module, "config", None)
    found = [getattr(config, name, None) for name in _IDS]
    ids = tuple(dict.fromkeys(one for one in found if isinstance(one, int)))
    if ids:
        yield ids
        return
    for child in module.children():
        yield from _said_ids(child)
