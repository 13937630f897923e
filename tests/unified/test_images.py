"""Real digits: splits, codes, and the scenes and captions made of them."""

import pickle
import sys

import numpy as np
import pytest

from tokendrop.unified import images
from tokendrop.unified.images import DataError, DemoDependencyError, image_bank
from tokendrop.unified.judge import judge

SIZES = {"digits": (1797, 8, 4), "mnist": (5000, 28, 7)}


@pytest.mark.parametrize("source", ["digits", "mnist"])
def test_splits_are_disjoint_and_whole(source):
    bank = image_bank(source, codes=16)
    count, side, patches = SIZES[source]
    seen = [{pixels.tobytes() for pixels in digits.pixels} for digits in bank.splits.values()]
    assert sum(len(digits) for digits in bank.splits.values()) == count
    assert not any(a & b for i, a in enumerate(seen) for b in seen[i + 1 :])
    train = bank.splits["train"]
    assert train.pixels.shape[1:] == (side, side)
    assert train.codes.shape[1:] == (patches, patches)
    assert train.pixels.min() == 0
    assert train.pixels.max() == 1
    assert all(set(digits.label) == set(range(10)) for digits in bank.splits.values())


def test_codebook_and_ink_know_the_training_split_only(monkeypatch):
    known = image_bank("digits", codes=16)
    pixels, label = images._load("digits")
    held_out = np.concatenate([images._split(len(label))[name] for name in ("val", "test")])
    changed = pixels.copy()
    changed[held_out] = 1 - changed[held_out]
    monkeypatch.setattr(images, "_load", lambda source: (changed, label))
    other = image_bank.__wrapped__("digits", codes=16)
    np.testing.assert_array_equal(other.codebook, known.codebook)
    np.testing.assert_array_equal(other.median_ink, known.median_ink)


def test_each_patch_has_its_nearest_code():
    bank = image_bank("digits", codes=16)
    digits = bank.splits["test"]
    patch = digits.pixels[5, 2:4, 6:8].reshape(-1)
    nearest = np.square(bank.codebook - patch).sum(1).argmin()
    assert digits.codes[5, 1, 3] == nearest
    np.testing.assert_array_equal(bank.decode(digits.codes)[5, 2:4, 6:8].reshape(-1), bank.codebook[nearest])


def test_more_codes_decode_better():
    def error(codes):
        bank = image_bank("digits", codes)
        test = bank.splits["test"]
        return np.square(bank.decode(test.codes) - test.pixels).mean()

    assert error(64) < error(16) < image_bank("digits", 16).splits["test"].pixels.var()


def test_bold_is_more_ink_than_the_training_median_of_that_digit():
    bank = image_bank("digits", codes=16)
    train, test = bank.splits["train"], bank.splits["test"]
    for digit in range(10):
        assert abs(train.bold[train.label == digit].mean() - 0.5) < 0.02
        assert test.pixels[(test.label == digit) & test.bold].sum((1, 2)).min() > bank.median_ink[digit]
        assert test.pixels[(test.label == digit) & ~test.bold].sum((1, 2)).max() <= bank.median_ink[digit]


def test_judge_reads_real_digits_and_coded_ones():
    bank = image_bank("digits", codes=64)
    test = bank.splits["test"]
    assert judge("digits").accuracy > 0.97
    assert (judge("digits")(bank.decode(test.codes)) == test.label).mean() > 0.95


def test_unknown_source():
    with pytest.raises(DataError, match="'letters' is unknown; use one of"):
        image_bank("letters")


@pytest.mark.parametrize("module", ["sklearn.datasets", "sklearn.cluster"])
def test_missing_package_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DemoDependencyError, match=r"pip install '\.\[demo\]'") as caught:
        image_bank.__wrapped__("digits")
    # Workers hand it to the command line.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
