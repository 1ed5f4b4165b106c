"""Copies within one process: what can be changed is copied, what has an identity stays what it is."""

import threading
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest

from shmdist.serialization.channel_items import Item, make_item, open_item
from shmdist.serialization.local_copy import is_constant, local_copy


def keep(source):
    return bytearray(source.bytes() if hasattr(source, "bytes") else source)


class Slots:
    __slots__ = ("a", "lock")

    def __init__(self):
        self.a = [1]
        self.lock = threading.Lock()


def test_constants_are_themselves():
    for value in (1, 2.5, "text", b"bytes", None, True, 1j, (1, "a", None), ()):
        assert is_constant(value) and local_copy(value) is value and make_item(keep, value) is value
    assert not is_constant((1, [2])) and not is_constant([])


@pytest.mark.parametrize(
    "value",
    [[1, [2]], {"a": [1]}, {1, 2}, bytearray(b"x"), deque([[1]]), OrderedDict(a=[1]), Counter("aab"), ([1],)],
)
def test_containers_are_copied(value):
    copy = local_copy(value)
    assert copy == value and copy is not value and type(copy) is type(value)


@pytest.mark.parametrize("size", [10, 1 << 13, 1 << 17])
def test_arrays_are_copied(size):
    plain = np.arange(size, dtype="f4")
    read_only = plain.copy()
    read_only.flags.writeable = False
    masked = np.ma.masked_array(plain, plain > 3)
    for array in (
        plain,
        plain[::2],
        plain[::-1],
        plain.reshape(2, -1).T,
        read_only,
        masked,
        plain.view(np.matrix),
    ):
        for value in (array, [array, array]):
            for copy in (local_copy(value), open_item(make_item(keep, value), "take")):
                got = copy[1] if type(value) is list else copy
                assert type(got) is type(array) and got.dtype == array.dtype and (got == array).all()
                assert got.flags.writeable and not np.shares_memory(got, array)
                assert type(value) is not list or copy[0] is copy[1]


def test_identities_stay():
    class Local:
        pass

    inner = Local()
    inner.cell = [1]
    generator = (i for i in ())
    error = ValueError("with its traceback")
    value = [Local, inner, threading, generator, error, test_identities_stay, len, lambda: 0]
    copy = local_copy(value)
    assert copy[1] is not inner and copy[1].cell == [1] and copy[1].cell is not inner.cell
    assert all(one is other for one, other in zip(copy, value, strict=True) if one is not copy[1])


def test_what_cannot_be_pickled_stays_alone():
    slots = Slots()
    copy = local_copy({"key": [slots, np.zeros(3)]})["key"]
    assert copy[0].lock is slots.lock and copy[0].a == [1] and copy[0].a is not slots.a


def test_what_cannot_be_copied_at_all():
    class Stubborn:
        def __reduce__(self):
            return int, ("no number",)

    stubborn = Stubborn()
    assert local_copy(stubborn) is stubborn


def test_circles():
    circle = [1]
    circle.append(circle)
    copy = local_copy(circle)
    assert copy[1] is copy and copy is not circle


def test_a_seen_item_is_copied_each_time():
    item = make_item(keep, [np.zeros(1 << 14)])
    assert type(item) is Item and item.to_send() is item.payload
    item.seen = True
    first, second = open_item(item, "fetch"), open_item(item, "take")
    first[0][0] = 1
    assert second[0][0] == 0 and not np.shares_memory(first[0], second[0])
    assert item.to_send() is not item.payload and "seen" in repr(item)
