"""The two tasks on one scene: a grid of digits, its caption, and batches of token sequences.

Shape letters: B batch, T tokens, C cells of the grid, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict, get_args

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from tokendrop.layout import IGNORED, Segment, TokenLayout
from tokendrop.unified.images import DataError, ImageBank, Source, Split, image_bank
from tokendrop.unified.vocabulary import WORDS_PER_CELL, Vocabulary

TASKS = ("understanding", "generation")
Question = Literal["caption", "digit"]
Part = tuple[Segment, NDArray[np.int64]]


class Batch(TypedDict):
    """Sequences of one task, or of one task a row.

    Args:
        input_ids: (B, T) int64.
        labels: (B, T) int64, unshifted, -100 for none.
        attention_mask: (B, T) int64, 1 for real tokens.
        segments: (B, T) int64 of `Segment`.
        image_mask: (B, T) bool, True for image codes.
        task: of the batch, or of each row.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    segments: Tensor
    image_mask: Tensor
    task: str | list[str]


@dataclass(frozen=True)
class Scenes:
    """Scenes of several real digits in a grid, as sequences for both tasks.

    understanding: system, image, instruction, output (the caption)
    generation:    system, instruction (with the caption), output (the image codes)

    Args:
        source: "digits" or "mnist".
        grid: rows and columns of digits in an image.
        codes: K, the size of the codebook.
        few: understanding trains on the first so many training images, generation on all others; 0 for all in both.
        question: understanding answers with the whole "caption", or with the "digit" in one place, which its
            instruction names: that of cell (sum of the scene's indices) mod C.
        placebo: in training, generation is given the captions of other scenes of its batch.
        others: with `few`, generation trains on the next so many training images; 0 for all that are left.

    Raises:
        DataError: an unknown source or question, a grid without names for its cells, no image left for one task, or
            more asked for than there are.

    Example:
        >>> scenes = Scenes("digits", (1, 2), codes=16)
        >>> batch = scenes.batch("generation", scenes.draw("val", 4, seed=(0,)))
        >>> batch["input_ids"].shape, int(batch["image_mask"].sum())
        (torch.Size([4, 42]), 128)
    """

    source: Source = "digits"
    grid: tuple[int, int] = (1, 2)
    codes: int = 64
    few: int = 0
    question: Question = "caption"
    placebo: bool = False
    others: int = 0

    def __post_init__(self) -> None:
        _ = self.vocabulary
        if self.question not in get_args(Question):
            raise DataError(f"question: found {self.question!r}; use one of {get_args(Question)}")
        most = len(self.bank.splits["train"]) - 1
        if not isinstance(self.few, int) or not 0 <= self.few <= most:
            raise DataError(f"few: found {self.few!r}; give a number of training images from 0 to {most}")
        most = most + 1 - self.few if self.few else 0
        if not isinstance(self.others, int) or not 0 <= self.others <= most:
            raise DataError(f"others: found {self.others!r}; beside few={self.few}, give a number from 0 to {most}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words and codes of these scenes."""
        return Vocabulary(self.codes, self.grid)

    @property
    def bank(self) -> ImageBank:
        """The digits that scenes are made of."""
        return image_bank(self.source, self.codes)

    @property
    def cells(self) -> int:
        """C."""
        return self.grid[0] * self.grid[1]

    @property
    def codes_per_image(self) -> int:
        """The number of image tokens of a scene."""
        return self.cells * self.bank.splits["train"].codes[0].size

    def draw(self, split: Split, count: int, seed: Sequence[int], task: str | None = None) -> NDArray[np.int64]:
        """The (count, C) digits of random scenes, as indices into a split: the same for the same seed.

        Args:
            split: where the indices point.
            count: how many scenes.
            seed: of the choice.
            task: whose training images; None for all.
        """
        start, stop = 0, len(self.bank.splits[split])
        if self.few and split == "train" and task is not None:
            last = self.few + self.others if self.others else stop
            start, stop = (0, self.few) if task == TASKS[0] else (self.few, last)
        return np.random.default_rng(list(seed)).integers(start, stop, (count, self.cells))

    def batch(self, task: str, scenes: NDArray[np.int64], split: Split = "train") -> Batch:
        """The sequences of one task.

        Args:
            task: "understanding" or "generation".
            scenes: (B, C) int64, indices into the split, as `draw` gives them.
            split: where the indices point.

        Raises:
            DataError: an unknown task.
        """
        if task not in TASKS:
            raise DataError(f"the task {task!r} is unknown; use one of {TASKS}")
        digits = self.bank.splits[split]
        image = rearrange(digits.codes[scenes], "b c h w -> b (c h w)")
        told = np.roll(scenes, 1, axis=0) if self.placebo and split == "train" and task == TASKS[1] else scenes
        caption = self.vocabulary.caption(digits.label[told], digits.bold[told])
        return _sequences(task, self._parts(task, image, caption, scenes.sum(1) % self.cells), self.codes)

    def captions_in(self, batch: Batch) -> Tensor:
        """The (B, 3 C) token ids of the captions that stand in a batch of either task.

        Raises:
            DataError: understanding that asks for one digit, which holds none.
        """
        if self.question != "caption" and TASKS[0] in row_tasks(batch):
            raise DataError(f"question={self.question!r}: batches of understanding hold no captions")
        ids = batch["input_ids"]
        first = torch.isin(ids, torch.tensor(self.vocabulary.encode(self.vocabulary.places[0]), device=ids.device))
        start = first.int().argmax(1)
        length = WORDS_PER_CELL * self.cells
        return ids.gather(1, start[:, None] + torch.arange(length, device=ids.device))

    def cell_images(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The (B * C, H, W) float32 digits that (B, M) codes of whole images stand for."""
        h, w = self.bank.splits["train"].codes.shape[1:]
        return self.bank.decode(rearrange(codes, "b (c h w) -> (b c) h w", h=h, w=w))

    def pictures(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The (B, rows * H, columns * W) float32 images that (B, M) codes stand for."""
        rows, columns = self.grid
        return rearrange(self.cell_images(codes), "(b r c) h w -> b (r h) (c w)", r=rows, c=columns)

    def _parts(
        self, task: str, image: NDArray[np.int64], caption: NDArray[np.int64], asked: NDArray[np.int64]
    ) -> list[Part]:
        def words(*text: str) -> NDArray[np.int64]:
            return np.tile(np.array(self.vocabulary.encode(*text)), (len(caption), 1))

        if task == "understanding":
            question, answer = words("describe"), caption
            if self.question == "digit":
                place = WORDS_PER_CELL * asked[:, None]
                question = np.concatenate([question, np.take_along_axis(caption, place, 1)], axis=1)
                answer = np.take_along_axis(caption, place + WORDS_PER_CELL - 1, 1)
            return [
                (Segment.SYSTEM, words("<bos>", "digits", "<image>")),
                (Segment.IMAGE, image),
                (Segment.INSTRUCTION, question),
                (Segment.OUTPUT, answer),
            ]
        instruction = np.concatenate([words("draw"), caption, words("<image>")], axis=1)
        return [
            (Segment.SYSTEM, words("<bos>", "digits")),
            (Segment.INSTRUCTION, instruction),
            (Segment.OUTPUT, image),
        ]


def _sequences(task: str, parts: list[Part], codes: int) -> Batch:
    ids = torch.from_numpy(np.concatenate([part for _, part in parts], axis=1))
    kinds = torch.cat([torch.full((part.shape[1],), int(segment)) for segment, part in parts])
    segments = kinds.expand_as(ids).contiguous()
    return {
        "input_ids": ids,
        "labels": torch.where(segments == Segment.OUTPUT, ids, IGNORED),
        "attention_mask": torch.ones_like(ids),
        "task": task,
        "segments": segments,
        "image_mask": ids < codes,
    }


def mix(batches: Sequence[Batch]) -> Batch:
    """One batch of several tasks: the rows of all, padded on the right to one length, with one task name per row.

    Example:
        >>> scenes = Scenes("digits", (1, 2), codes=16)
        >>> rows = scenes.draw("val", 2, seed=(0,))
        >>> mix([scenes.batch(task, rows) for task in TASKS])["task"]
        ['understanding', 'understanding', 'generation', 'generation']
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(rows: Sequence[Tensor], filler: int = 0) -> Tensor:
        return torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=filler) for row in rows])

    return {
        "input_ids": joined([batch["input_ids"] for batch in batches]),
        "labels": joined([batch["labels"] for batch in batches], IGNORED),
        "attention_mask": joined([batch["attention_mask"] for batch in batches]),
        "segments": joined([batch["segments"] for batch in batches], int(Segment.OUTPUT)),
        "image_mask": joined([batch["image_mask"] for batch in batches]),
        "task": [task for batch in batches for task in row_tasks(batch)],
    }


def row_tasks(batch: Batch) -> list[str]:
    """The task of each of the B rows."""
    task = batch["task"]
    return [task] * len(batch["input_ids"]) if isinstance(task, str) else task


def layout_of(batch: Batch) -> TokenLayout:
    """What the tokens of a batch are, in tokendrop's terms."""
    return TokenLayout(
        batch["image_mask"], batch["task"], batch["segments"], batch["attention_mask"] == 1, batch["labels"]
    )
