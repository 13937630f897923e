"""One vocabulary of words and image codes, and the captions written in it.

Shape letters: N images, C cells of the grid, K codes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokendrop.unified.images import DataError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "bold")
CONTROL = ("<bos>", "digits", "<image>", "describe", "draw")
ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "center", "right")}
WORDS_PER_CELL = 3


@dataclass(frozen=True)
class Vocabulary:
    """Image codes, then words, as one range of token ids.

    Args:
        codes: K; the ids 0 to K - 1 are image codes.
        grid: rows and columns of digits in an image, from 1 to 3 each.

    Raises:
        DataError: a grid outside that range.

    Example:
        >>> vocabulary = Vocabulary(64, (1, 2))
        >>> ids = vocabulary.caption(np.array([[3, 7]]), np.array([[True, False]]))
        >>> vocabulary.text(ids[0])
        'left bold three right thin seven'
    """

    codes: int
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows not in ROWS or columns not in COLUMNS:
            raise DataError(f"the grid {self.grid} has no names for its cells; use 1 to 3 rows and 1 to 3 columns")

    def __len__(self) -> int:
        return self.codes + len(self.words)

    @property
    def places(self) -> tuple[str, ...]:
        """The C names of the cells of the grid, row by row."""
        rows, columns = self.grid
        names = (f"{row}-{column}".strip("-") for row in ROWS[rows] for column in COLUMNS[columns])
        return tuple(name or "center" for name in names)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word, in the order of its id."""
        return (*CONTROL, *self.places, *WEIGHTS, *DIGITS)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: self.codes + index for index, word in enumerate(self.words)}

    def encode(self, *words: str) -> list[int]:
        """The token ids of words.

        Raises:
            DataError: a word that is not in the vocabulary.
        """
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise DataError(f"the words {unknown} are not in the vocabulary; use some of {self.words}")
        return [self._ids[word] for word in words]

    def text(self, ids: NDArray[np.int64]) -> str:
        """The words that token ids stand for; an image code k reads as <k>."""
        return " ".join(f"<{i}>" if i < self.codes else self.words[i - self.codes] for i in map(int, ids))

    def caption(self, label: NDArray[np.int64], bold: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The captions of images: for each cell where it is, thin or bold, and which digit.

        Args:
            label: (N, C) int64, the digit of each cell.
            bold: (N, C) bool.

        Returns:
            (N, 3 C) int64 token ids.
        """
        place = np.broadcast_to(self.encode(*self.places), label.shape)
        weight = np.array(self.encode(*WEIGHTS))[bold.astype(np.int64)]
        digit = np.array(self.encode(*DIGITS))[label]
        return np.stack([place, weight, digit], axis=-1).reshape(len(label), -1)

    def read_caption(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The (N, C) digits and weights that (N, 3 C) token ids of captions say: the inverse of `caption`."""
        cells = ids.reshape(len(ids), -1, WORDS_PER_CELL)
        return cells[..., 2] - self.encode(DIGITS[0])[0], cells[..., 1] == self.encode("bold")[0]
