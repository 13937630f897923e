"""Figures are rounded to the first digit of their noise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendrop.analysis.noise import to_noise


@pytest.mark.parametrize(
    ("value", "noise", "expected"),
    [
        (0.70512, 0.0163, "0.71 ±0.02"),
        (0.70512, 0.096, "0.7 ±0.1"),
        (0.6, 0.96, "1 ±1"),
        (1.8512, 0.0034, "1.851 ±0.003"),
        (1234.5, 38.0, "1230 ±40"),
        (-0.021, 0.01, "-0.02 ±0.01"),
    ],
)
def test_by_hand(value, noise, expected):
    assert to_noise(value, noise) == expected


def test_sign():
    assert to_noise(0.04, 0.02, signed=True) == "+0.04 ±0.02"
    assert to_noise(-0.04, 0.02, signed=True) == "-0.04 ±0.02"


@given(value=st.floats(-1e3, 1e3), noise=st.floats(1e-6, 1e3))
def test_never_finer_than_the_noise_nor_far_off(value, noise):
    shown, error = (float(part) for part in to_noise(value, noise).split(" ±"))
    digits = f"{error:.15g}".replace(".", "").strip("0").split("e")[0].strip("0")
    assert len(digits) == 1
    assert abs(shown - value) <= 0.5001 * 10 ** math.floor(math.log10(error * 1.0001))
    assert 0.66 <= error / noise <= 1.5001


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_noise_must_be_known(noise):
    with pytest.raises(ValueError, match="a finite number above 0"):
        to_noise(1.0, noise)
