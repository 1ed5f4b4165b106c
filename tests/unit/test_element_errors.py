"""Which element an error is of: its index, and a text of the element that is always short and safe."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest

import shmdist as sd
from shmdist.errors import capture, remote_exception
from shmdist.scheduling.element_errors import name_element, name_in_chunk, note_offset, short_repr


class Bad:
    def __repr__(self):
        raise RuntimeError

    def __len__(self):
        raise OverflowError


class Hostile:
    def __getattribute__(self, name):
        raise ValueError(name)


class Long(list):
    def __repr__(self):
        raise AssertionError("is not asked")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "None"),
        ("a" * 10**7, "'" + "a" * 76 + "..."),
        (b"\x00", "b'\\x00'"),
        ((1,), "(1,)"),
        ((), "()"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        ({"a": [1, {2}], "b": None}, "{'a': [1, {2}], 'b': None}"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        (1 << 10**7, "<int of 10000001 bits>"),
        (np.zeros((3, 4)), "<ndarray of shape (3, 4), dtype float64>"),
        ((np.zeros(2, "i4"), 1), "(<ndarray of shape (2,), dtype int32>, 1)"),
        (np.array(3), "array(3)"),
        (Bad(), "<Bad>"),
        (Hostile(), "<Hostile>"),
        (Long(range(100)), "<Long of length 100>"),
        (range(10**9), "range(0, 1000000000)"),
    ],
    ids=map(str, range(17)),  # not made of the values
)
def test_short_repr(value, text):
    assert short_repr(value) == text and len(text) <= 80


def test_a_list_in_itself():
    me = []
    me.append(me)
    assert short_repr(me) == "[[[[...]]]]"


@dataclass(frozen=True)
class Frozen(Exception):
    index: int


class Refusing(Exception):
    __slots__ = ()

    def __setattr__(self, name, value):
        raise TypeError(name)


@pytest.mark.parametrize("kind", [ValueError, Frozen, Refusing, sd.ShmdistError])
def test_every_error_takes_it(kind):
    original = kind(7)
    error = remote_exception(2, capture(original))
    name_element(error, 3, "x")
    assert error.index == 3 and error.__notes__ == ["element 3: 'x'"]
    assert not hasattr(original, "__notes__") and getattr(original, "index", 7) == 7
    again = pickle.loads(pickle.dumps(error))
    assert again.index == 3 and again.__notes__ == error.__notes__


def test_notes_of_the_user_stay():
    original = ValueError()
    original.add_note("mine")
    error = remote_exception(2, capture(original))
    name_element(error, 0, 1)
    name_element(error, 5, 2)  # as of a map in a map
    assert error.__notes__ == ["mine", "element 0: 1", "element 5: 2"] and error.index == 5
    assert original.__notes__ == ["mine"]


@pytest.mark.parametrize("chunk", [range(5), [1, 2, 3, 4, 5], (1, 2, 3), "abcd", np.zeros((3, 2))], ids=str)
def test_the_offset_in_a_chunk(chunk):
    elements = iter(chunk)
    next(elements), next(elements)
    original = ValueError()
    note_offset(original, chunk, elements)
    error = remote_exception(2, capture(original))
    name_in_chunk(error, [range(10), chunk], 1, vectorized=False)
    assert error.index == 11 and not any("offset" in name for name in [*vars(error), *vars(original)])
    name_in_chunk(error, [range(10), chunk], 1, vectorized=False)
    assert error.index == range(10, 10 + len(chunk))


def test_an_offset_that_nothing_tells():
    error = ValueError()
    note_offset(error, [1, 2], (x for x in [1, 2]))
    name_in_chunk(error, [[1, 2]], 0, vectorized=False)
    assert error.index == range(2) and error.__notes__ == ["elements 0 to 1: [1, 2]"]
