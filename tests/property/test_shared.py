"""Any part of any array, made a shared one and made a copy by numpy."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from tests.likeness import agree

KINDS = ["i1", ">i4", "u8", "f2", "f8", "c8", "?", "M8[s]", "m8[D]", "U3", "S2", "V3", "f4,U2", "i2,3u1"]
BYTES = np.random.default_rng(1).integers(32, 100, 4000, "u1")


@st.composite
def views(draw):
    """A part of an array, with its axes in any order."""
    shape = draw(some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    kind = np.dtype(draw(st.sampled_from(KINDS)))
    # Not any bytes are text, or the number of a date with a year that fits.
    whole = np.zeros(shape, kind) if kind.kind in "UMmV" else np.ndarray(shape, kind, BYTES)
    index = draw(some.basic_indices(shape, max_dims=5, allow_newaxis=True, allow_ellipsis=False))
    part = whole[(*index, ...) if isinstance(index, tuple) else (index, ...)]
    return part.transpose(draw(st.permutations(range(part.ndim))))


@settings(max_examples=100, deadline=None)
@given(views(), st.none() | st.sampled_from(KINDS), st.sampled_from("KACF"), st.integers(0, 6))
def test_any_part_of_any_array(source, dtype, order, ndmin):
    agree("array", source, dtype, order=order, ndmin=ndmin)
