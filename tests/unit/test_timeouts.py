"""What a time limit may be."""

import datetime
import decimal
import fractions
import math

import numpy as np
import pytest

from shmdist._timeouts import FOREVER, seconds


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (None, None),
        (0, 0.0),
        (2, 2.0),
        (0.25, 0.25),
        (-1, 0.0),
        (-math.inf, 0.0),
        (3_000_000, 3e6),
        (FOREVER, None),
        (1e18, None),
        (10**400, None),
        (-(10**400), 0.0),
        (math.inf, None),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.float64("inf"), None),
        (fractions.Fraction(1, 4), 0.25),
        (decimal.Decimal("0.5"), 0.5),
    ],
)
def test_limits(given, limit):
    got = seconds(given)
    assert got == limit
    assert got is None or type(got) is float


@pytest.mark.parametrize("nan", [math.nan, np.nan, np.float32("nan"), decimal.Decimal("nan")])
def test_nan(nan):
    with pytest.raises(ValueError, match="waitfor must be a number"):
        seconds(nan, "waitfor")


@pytest.mark.parametrize("wrong", ["1", b"1", True, datetime.timedelta(seconds=1), [1], object(), 1j])
def test_no_numbers(wrong):
    with pytest.raises(TypeError, match="timeout must be a number of seconds or None"):
        seconds(wrong)
