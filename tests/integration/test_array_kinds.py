"""Arrays of every kind arrive as themselves, at every size: dtype with its metadata, class, attributes, values."""

import numpy as np
import pytest

import shmdist as sd


class WithInfo(np.ndarray):
    """As numpy's manual makes one."""

    def __new__(cls, values, info=None):
        made = np.asarray(values).view(cls)
        made.info = info
        return made

    def __array_finalize__(self, other):
        self.info = getattr(other, "info", None)


class Slotted(np.ndarray):
    __slots__ = ("tag",)


def _hard(values):
    masked = np.ma.masked_array(values, values > 0.5, fill_value=7)
    masked.harden_mask()
    masked._optinfo["unit"] = "m"
    return masked


def _kinds(n):
    x = np.linspace(0, 1, n)
    slotted = x.view(Slotted)
    slotted.tag = ["t"]
    read_only = WithInfo(x.copy(), "read only")
    read_only.flags.writeable = False
    dates = np.arange(n).astype("M8[s]")
    return {
        "metadata": np.zeros(n, np.dtype("f8", metadata={"unit": "m"})),
        "metadata of a field": np.zeros(n, [("a", np.dtype("f8", metadata={"unit": "m"})), ("b", "i4")]),
        "matrix": x.reshape(2, -1).view(np.matrix),
        "records": np.rec.array([x, np.arange(n)], names="x,y"),
        "records of dates": np.rec.array([x, dates], names="x,t"),
        "dates": dates,
        "strided dates": np.repeat(dates, 2)[::-2],
        "dates in a class": dates.view(WithInfo),
        "titles": np.zeros(n, {"names": ["a", "b"], "formats": ["f8", "i2"], "titles": ["A", "B"]}),
        "offsets": np.zeros(n, {"names": ["a"], "formats": ["f4"], "offsets": [4], "itemsize": 24}),
        "aligned": np.zeros(n, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        "other byte order": x.astype(">f8"),
        "half": x.astype("f2"),
        "complex": x.astype("c8"),
        "objects": np.array([None, [1]] * (n // 2), object),
        "no dimensions": np.array(3.5),
        "nothing in it": np.zeros((3, 0, 2), "M8[s]"),
        "Fortran": np.asfortranarray(x.reshape(2, -1)),
        "class with attributes": WithInfo(x, {"a": [1]}),
        "strided class with attributes": WithInfo(np.repeat(x, 2), "s")[::2],
        "Fortran class with attributes": WithInfo(np.asfortranarray(x.reshape(2, -1)), "f"),
        "read-only class with attributes": read_only,
        "class with slots": slotted,
        "masked": np.ma.masked_array(x, x > 0.5, fill_value=7),
        "hard mask": _hard(x),
    }


def _identity(*args):
    return args[0]


def _is_same(one, other):
    assert type(one) is type(other) and one.shape == other.shape and one.dtype == other.dtype
    assert repr(one.dtype) == repr(other.dtype) and one.dtype.metadata == other.dtype.metadata
    assert one.dtype.isalignedstruct == other.dtype.isalignedstruct
    for name in one.dtype.names or ():
        assert one.dtype.fields[name][0].metadata == other.dtype.fields[name][0].metadata
    bare, its = (np.asarray(array.data if hasattr(array, "mask") else array) for array in (one, other))
    assert (bare == its).all()
    assert getattr(one, "info", None) == getattr(other, "info", None)
    assert getattr(one, "tag", None) == getattr(other, "tag", None)
    assert other.flags.writeable and one.flags.fnc == other.flags.fnc
    if hasattr(one, "mask"):
        assert (one.mask == other.mask).all() and one.fill_value == other.fill_value
        assert one.hardmask == other.hardmask and one._optinfo == other._optinfo


@pytest.mark.parametrize("n", [8, 400, 4000, 40000])
def test_every_kind_at_every_size(cluster, n):
    target = cluster[0]
    channel = sd.RemoteChannel(lambda: sd.Channel(1), target)
    local = sd.RemoteChannel(lambda: sd.Channel(1))
    other = np.zeros(10)
    for name, array in _kinds(n).items():
        channel.put(array)
        local.put(array)
        ways = {
            "argument": sd.remotecall_fetch(_identity, target, array),
            "two arguments": sd.remotecall_fetch(_identity, target, array, other),
            "container": sd.remotecall_fetch(_identity, target, {"k": (array,)})["k"][0],
            "closure": sd.remotecall_fetch(lambda array=array: array, target),
            "future": sd.remotecall(_identity, target, array).fetch(),
            "map": sd.pmap(_identity, [array])[0],
            "channel": channel.take(),
            "channel here": local.take(),
            "call to oneself": sd.remotecall_fetch(_identity, 1, array),
        }
        for way, got in ways.items():
            try:
                _is_same(array, got)
            except AssertionError as error:
                error.add_note(f"{name}, by {way}")
                raise
