"""Plain values, as they are written without a pickle."""

import marshal
import math
import pickle
import struct
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.serialization import atoms


def dumps(value: Any) -> bytes:
    return marshal.dumps(value, atoms.FORMAT)


ATOM = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.binary(max_size=20)
    | st.text(st.characters(exclude_categories=()), max_size=20)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ATOM, max_size=7).map(tuple) | ATOM)
def test_what_is_written_is_read(value: Any) -> None:
    body = dumps(value)
    assert body[0] != atoms.PICKLE
    again = atoms.loads(body)
    assert again == value
    assert type(again) is type(value)
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        10**4000,
        -(1 << 64),
        -0.0,
        math.inf,
        5e-324,
        "",
        "\ud800",
        sys.intern("a_name"),
        b"",
        True,
        None,
        (),
        1j,
    ],
)
def test_the_odd_ones(value: Any) -> None:
    again = atoms.loads(dumps(value))
    assert repr(again) == repr(value)
    assert type(again) is type(value)


def test_no_bit_of_a_nan_is_lost() -> None:
    [nan] = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_BEEF))
    assert struct.pack("<d", atoms.loads(dumps(nan))) == struct.pack("<d", nan)


@pytest.mark.parametrize("value", [5, "text", [1, {2}], Exception, range(3)])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_read_too(value: Any, protocol: int) -> None:
    assert atoms.loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("body", [b"", b"\x80", b"(", b"i\0\0", b"?", bytes(9)[:0]])
def test_what_makes_no_sense_is_an_error(body: bytes) -> None:
    with pytest.raises((IndexError, EOFError, ValueError, pickle.UnpicklingError)):
        atoms.loads(body)


def test_numbers_other_than_pythons_own_are_no_atoms() -> None:
    np = pytest.importorskip("numpy")
    assert not {np.float64, np.int64, np.bool_, np.complex128, np.str_} & atoms.ATOMS
