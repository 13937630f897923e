"""What each token of a batch is: image or text, its segment, its task, its label.

Shape letters: B batch, T tokens.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Literal, Self

import torch
from torch import Tensor

from tokendrop.errors import LayoutError, LayoutTypeError
from tokendrop.places import places as places
from tokendrop.places import window_by_window as window_by_window

IGNORED = -100
# Keys of a batch that are for us and not for the model.
OURS = ("image_mask", "segments", "task")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unnamed(function: Callable[..., Any]) -> frozenset[str]:
    """The keys of a batch that are for us, and that a function such as a model's forward does not name itself."""
    return frozenset(OURS) - inspect.signature(function).parameters.keys()


def without(batch: Any, keys: frozenset[str]) -> Any:
    """A batch without some of its keys, where it has keys."""
    return {key: value for key, value in batch.items() if key not in keys} if isinstance(batch, Mapping) else batch


class Segment(IntEnum):
    """The part of a sample that a token belongs to."""

    SYSTEM = 0
    IMAGE = 1
    INSTRUCTION = 2
    OUTPUT = 3


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """What the tokens of a batch are.

    Args:
        image: (B, T) bool, True for image tokens.
        task: the task of the batch, or one per sample; None where there is only one.
        segments: (B, T) integers of `Segment`.
        padding: (B, T) bool, True for real tokens.
        labels: (B, T) int64, unshifted: row t is trained on labels[t + 1]; -100 for none.
        image_ids: (V,) int64, the vocabulary ids of image tokens.
        packs: (B, T) int64, the packed sample of its row that a token belongs to, any numbers; None where each row is
            one sample. What a method keeps of a sample's image tokens is kept of each packed sample.
        images: (B, T) int64, which of its images and videos an image token belongs to, any numbers; None where each run
            of image tokens is one.
        frames: (B, T) int64, which frame of its video an image token belongs to, ascending; 0 for one of an image. None
            where nobody knows.
        new: what generated tokens are where no ids say it, "text" or "image"; None for text, and for images where
            tokens come one by one as embeddings behind a prompt that came as ids.

    Raises:
        LayoutTypeError: a tensor of the wrong dtype, or a task that is no string.
        LayoutError: shapes that differ, a number of tasks other than B, or another `new`.

    Example:
        >>> layout = TokenLayout(torch.tensor([[True, True, False]]), task="understanding")
        >>> layout.tasks
        ('understanding',)
    """

    image: Tensor
    task: str | Sequence[str] | None = None
    segments: Tensor | None = None
    padding: Tensor | None = None
    labels: Tensor | None = None
    image_ids: Tensor | None = None
    packs: Tensor | None = None
    new: Literal["text", "image"] | None = None
    images: Tensor | None = None
    frames: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image, Tensor) or self.image.dtype != torch.bool or self.image.dim() != 2:
            found = _describe(self.image)
            raise LayoutTypeError(f"image: expected a (B, T) bool tensor, True for image tokens; found {found}")
        if self.image.numel() == 0:
            raise LayoutError(f"image: expected at least one sample and one token; found {_describe(self.image)}")
        self._check("segments", self.segments, _INTEGERS, "integer")
        self._check("padding", self.padding, (torch.bool,), "bool")
        self._check("labels", self.labels, (torch.int64,), "int64")
        for name in ("packs", "images", "frames"):
            self._check(name, getattr(self, name), (torch.int64,), "int64")
        self._check_values()
        self._check_task()

    def _check_values(self) -> None:
        ids, segments = self.image_ids, self.segments
        if ids is not None and (not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS or ids.numel() == 0):
            raise LayoutTypeError(f"image_ids: expected a (V,) integer tensor; found {_describe(ids)}")
        # Elsewhere the values cost a synchronisation to look at.
        if segments is not None and segments.device.type == "cpu":
            low, high = map(int, segments.aminmax())
            if low < 0 or high > max(Segment):
                raise LayoutError(f"segments: expected values of Segment, 0 to {max(Segment):d}; found {low} to {high}")
        if self.new is not None and (not isinstance(self.new, str) or self.new not in ("text", "image")):
            raise LayoutError(f"new={self.new!r}: expected 'text' or 'image', what generated tokens are, or None")

    def _check(self, name: str, value: Tensor | None, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            raise LayoutTypeError(f"{name}: expected a (B, T) {kind} tensor; found {_describe(value)}")
        if value.shape != self.image.shape:
            shape = tuple(self.image.shape)
            raise LayoutError(
                f"{name}: expected the shape of image, {shape}; found {tuple(value.shape)}; all are of the tokens that "
                "the decoder sees, image features included"
            )
        if value.device != self.image.device:
            raise LayoutError(f"{name}: expected the device of image, {self.image.device}; found {value.device}")

    def _check_task(self) -> None:
        if self.task is None or isinstance(self.task, str):
            return
        if not isinstance(self.task, Sequence) or not all(isinstance(name, str) for name in self.task):
            raise LayoutTypeError(f"task: expected a string, or one string for each sample; found {self.task!r}")
        if len(self.task) != len(self.image):
            raise LayoutError(
                f"task: found {len(self.task)} names for {len(self.image)} samples; give one string for the batch, "
                "or one for each sample"
            )

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The task of each of the B samples."""
        if self.task is None or isinstance(self.task, str):
            return (self.task,) * len(self.image)
        return tuple(self.task)

    def to(self, device: torch.device) -> Self:
        """The same layout on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        image_ids: Tensor | Iterable[int] | int,
        task: str | Sequence[str] | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Self:
        """The layout of a batch of vocabulary ids.

        image[b, t] = input_ids[b, t] in image_ids

        Args:
            input_ids: (B, T) integers.
            image_ids: the vocabulary ids of image tokens: one, a range, or a (V,) tensor.
            task: as in `TokenLayout`.
            labels: (B, T) int64.
            attention_mask: (B, T), nonzero for real tokens.

        Raises:
            LayoutTypeError: ids that are not integers.

        Example:
            >>> TokenLayout.from_ids(torch.tensor([[1, 7, 8, 2]]), range(7, 9)).image.tolist()
            [[False, True, True, False]]
        """
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in _INTEGERS or input_ids.dim() != 2:
            raise LayoutTypeError(f"input_ids: expected a (B, T) integer tensor; found {_describe(input_ids)}")
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise LayoutTypeError(f"attention_mask: expected a (B, T) tensor; found {attention_mask!r}")
        values = id_tensor(image_ids).to(input_ids.device)
        padding = None if attention_mask is None else attention_mask != 0
        return cls(torch.isin(input_ids, values), task, None, padding, labels, values)


def scoring_mask(layout: TokenLayout, kind: str) -> Tensor:
    """The rows whose attention scores image tokens; the last real one in samples that have no other.

    Args:
        layout: of (B, T) tokens.
        kind: "answer" or "prompt", see `Queries`.

    Returns:
        (B, T) bool.

    Example:
        >>> labels = torch.tensor([[-100, -100, -100, 5, 6, -100, -100, 7]])
        >>> layout = TokenLayout(torch.arange(8)[None] == 1, labels=labels)
        >>> [scoring_mask(layout, kind).nonzero()[:, 1].tolist() for kind in ("answer", "prompt")]
        [[2, 6], [2, 5, 6]]
    """
    tokens = torch.arange(layout.image.shape[1], device=layout.image.device)
    real = torch.ones_like(layout.image) if layout.padding is None else layout.padding
    last = tokens == torch.where(real, tokens, -1).amax(1, keepdim=True)
    labelled = torch.zeros_like(real) if layout.labels is None else layout.labels != IGNORED
    if kind == "answer":
        # The row before the first label of a run of labels.
        chosen = torch.zeros_like(real)
        chosen[:, :-1] = labelled[:, 1:] & ~labelled[:, :-1]
    else:
        behind = layout.image.flip(1).cumsum(1).flip(1) == 0
        chosen = behind & real & ~labelled
    return chosen | (last & ~chosen.any(1, keepdim=True))


def prompt_text(layout: TokenLayout, tokens: int) -> Tensor:
    """(B, T) bool, real tokens that are no image and have no label, among the first `tokens`: the prompt's text."""
    text = ~layout.image & (torch.arange(layout.image.shape[1], device=layout.image.device) < tokens)
    if layout.padding is not None:
        text = text & layout.padding
    return text if layout.labels is None else text & (layout.labels == IGNORED)


def packed_samples(given: Mapping[str, Any], shape: tuple[int, int], padding: Tensor | None = None) -> Tensor | None:
    """The packed sample of its row that each token belongs to, as a batch or the arguments of a model say it.

    A sample begins where `cu_seq_lens_q` says, in a batch of one row; else where `seq_idx` changes, or where
    `position_ids` begin again: behind a higher one, or at 0.

    Args:
        given: `cu_seq_lens_q`, N + 1 integers; `seq_idx` (B, T); `position_ids` (B or 1, T), or (3 or 4, B, T).
        shape: (B, T).
        padding: (B, T) bool, True for real tokens.

    Returns:
        (B, T) int64, from 0 up in each row; None where each row is one sample, or nothing is said.

    Example:
        >>> packed_samples({"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}, (1, 6)).tolist()
        [[0, 0, 0, 1, 2, 2]]
    """
    lengths = next((given[name] for name in _LENGTHS if isinstance(given.get(name), Tensor | list | tuple)), None)
    if isinstance(lengths, list | tuple):
        device = next((x.device for x in (padding, *given.values()) if isinstance(x, Tensor)), None)
        lengths = torch.tensor(lengths, device=device)
    if lengths is not None and lengths.dim() == 1 and shape[0] == 1:
        tokens = torch.arange(shape[1], device=lengths.device)
        return torch.bucketize(tokens, lengths[1:].long(), right=True)[None] if len(lengths) > 2 else None
    begins = _begins(given, shape)
    if begins is None:
        return None
    if padding is not None:
        begins = begins & padding[:, 1:] & padding[:, :-1]
    if len(begins) not in (1, shape[0]) or not begins.any():
        return None
    return torch.cat([torch.zeros_like(begins[:, :1]), begins], 1).cumsum(1).expand(shape)


def _begins(given: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    # (B or 1, T - 1) bool, the tokens behind the first with which a packed sample begins.
    numbers, at = given.get("seq_idx"), given.get("position_ids")
    if isinstance(numbers, Tensor) and numbers.shape == shape:
        return numbers.diff(dim=1) != 0
    if not isinstance(at, Tensor) or at.dim() not in (2, 3) or at.shape[-1] != shape[1]:
        return None
    text = at.dim() == 2 or len(at) == 4  # of three, the first is time, which stands still within an image
    at = at if at.dim() == 2 else at[0]
    begins = at.diff(dim=1) < 0
    return begins | (at[:, 1:] == 0) if text else begins


def id_tensor(image_ids: object) -> Tensor:
    """Vocabulary ids as a (V,) tensor.

    Raises:
        LayoutTypeError: no ids, or other things.
    """
    ids = image_ids
    if not isinstance(ids, Tensor):
        listed = list(ids) if isinstance(ids, Iterable) else [ids]
        if listed and all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
            ids = torch.tensor(listed)
    if not isinstance(ids, Tensor) or ids.numel() == 0 or ids.dtype not in _INTEGERS:
        raise LayoutTypeError(f"image_ids: expected one vocabulary id, or several; found {image_ids!r}")
    return ids.flatten()


def _describe(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
