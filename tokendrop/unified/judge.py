"""An independent judge of generated images: does the digit that was asked for stand there?

Shape letters: B batch, N images, C cells of the grid, M image tokens, H and W pixels.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendrop.unified.data import Scenes
from tokendrop.unified.images import Source, extra, image_bank


class Judge:
    """A classifier of real digits that knows no language model: a support vector machine on pixels.

    Args:
        source: "digits" or "mnist"; it is fitted on the training images.

    Example:
        >>> Judge("digits").accuracy > 0.9
        True
    """

    def __init__(self, source: Source) -> None:
        splits = image_bank(source).splits
        self._classifier = extra("sklearn.svm").SVC(C=10.0).fit(_flat(splits["train"].pixels), splits["train"].label)
        self.accuracy = float((self(splits["test"].pixels) == splits["test"].label).mean())

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.int64]:
        """The (N,) digits seen in (N, H, W) images."""
        return self._classifier.predict(_flat(pixels))


@lru_cache(maxsize=2)
def judge(source: Source) -> Judge:
    """The judge of a source, fitted once."""
    return Judge(source)


def _flat(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return pixels.reshape(len(pixels), -1)


def agreement(scenes: Scenes, codes: Tensor, captions: Tensor) -> Tensor:
    """The share of each image's cells in which the judge sees the digit that the caption says.

    Args:
        scenes: what codes and captions mean.
        codes: (B, M) int64, of whole images.
        captions: (B, 3 C) int64 token ids.

    Returns:
        (B,) float64.
    """
    said, _ = scenes.vocabulary.read_caption(captions.numpy(force=True))
    seen = judge(scenes.source)(scenes.cell_images(codes.numpy(force=True)))
    return torch.from_numpy((seen.reshape(said.shape) == said).mean(1))
