"""Arrays and other values with buffers, of every kind, for tests of how they travel."""

import sys

import numpy as np


class Tagged(np.ndarray):
    """A user's subclass, which says no word about pickling."""


class Weighted(np.ndarray):
    """A user's subclass that pickles an attribute of its own."""

    def __array_finalize__(self, other):
        self.weight = getattr(other, "weight", None)

    def __reduce__(self):
        make, args, state = super().__reduce__()
        return make, args, (*state, self.weight)

    def __setstate__(self, state):
        *inner, self.weight = state
        super().__setstate__(tuple(inner))


def _read_only(array):
    array.flags.writeable = False
    return array


def _weighted(a):
    array = a.view(Weighted)
    array.weight = 2.5
    return array


_FIELDS = [("x", "f4"), ("y", "i8"), ("name", "S3")]
_ALIGNED = np.dtype([("x", "i1"), ("y", "f8")], align=True)

#: Each makes an array out of numbers of 8 bytes, in C order, that are at least 4.
KINDS = {
    "f8": lambda a: a.copy(),
    "big-endian": lambda a: a.astype(">i4"),
    "float16": lambda a: (a % 1000).astype("f2"),
    "complex": lambda a: a + 2j * a,
    "bool": lambda a: a % 3 == 0,
    "datetime": lambda a: a.astype("M8[ms]"),
    "timedelta": lambda a: a.astype("m8[s]"),
    "text": lambda a: a.astype("U7"),
    "void": lambda a: a.astype("i8").view("V8"),
    "structured": lambda a: np.array([(n, n, b"ab") for n in range(len(a) % 100)] * 5, _FIELDS),
    "aligned structure": lambda a: np.ones(len(a), _ALIGNED),
    "field of a structure": lambda a: np.ones(len(a), _FIELDS)["y"],
    "0-d": lambda a: np.array(a[-1]),
    "empty": lambda a: a.reshape(-1, 2)[:, :0],
    "F-order": lambda a: np.asfortranarray(a.reshape(-1, 2)),
    "strided": lambda a: np.repeat(a, 2)[::2],
    "strided in two": lambda a: np.repeat(a, 4).reshape(-1, 4)[:, 1:3],
    "negative": lambda a: a[::-1],
    "negative in two": lambda a: a.reshape(-1, 2)[::-1, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[:4], (len(a) // 4, 4)),
    "broadcast 0-d": lambda a: np.broadcast_to(a[3], (len(a),)),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), "u1")[1:].view("f8"),
    "matrix": lambda a: a.reshape(-1, 2).view(np.matrix),
    "strided matrix": lambda a: np.repeat(a, 2).reshape(-1, 2).view(np.matrix)[:, :1],
    "recarray": lambda a: np.rec.fromarrays([a, a.astype("i2")], names="u,v"),
    "strided recarray": lambda a: np.rec.fromarrays([a, a.astype("i2")], names="u,v")[::2],
    "subclass": lambda a: a.view(Tagged),
    "strided subclass": lambda a: np.repeat(a, 2).view(Tagged)[::2],
    "subclass with state": _weighted,
    "masked": lambda a: np.ma.masked_where(a % 2 == 0, a),
    "masked by nothing": lambda a: np.ma.array(a),
    "masked in two": lambda a: np.ma.masked_where(a.reshape(-1, 2) < 2, a.reshape(-1, 2)).T,
    "masked structure": lambda a: np.ma.array(np.ones(len(a), _FIELDS), mask=(False, True, False)),
    "read-only": lambda a: _read_only(a.copy()),
    "read-only strided": lambda a: _read_only(np.repeat(a, 2))[::2],
    "of bytes": lambda a: np.frombuffer(a.tobytes(), "f8"),
    "objects": lambda a: a[:50].astype(object),
    "structure with objects": lambda a: np.array([(1.0, "one")], [("x", "f8"), ("y", object)]),
}

#: Other values, out of the same numbers.
VALUES = {
    "bytes": lambda a: a.tobytes(),
    "bytearray": lambda a: bytearray(a.tobytes()),
    "str": lambda a: "é" * len(a),
    "array.array": lambda a: __import__("array").array("d", a.tolist()),
    "nested": lambda a: {
        "list": a.tolist(),
        "set": set(a.tolist()),
        "deep": [{"n": (int(n),)} for n in a[:999]],
    },
    "arrays in a dict": lambda a: {"a": a, "again": a, "part": a[1:], "flat": [a.copy(), a[::2]]},
}


def same(one, other):
    """Assert that two values are of one type and equal."""
    assert type(one) is type(other), (type(one), type(other))
    if isinstance(one, np.ma.MaskedArray):
        assert np.array_equal(np.ma.getmaskarray(one), np.ma.getmaskarray(other))
        same(one.filled(), other.filled())
        assert one.fill_value == other.fill_value
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(one, other) if one.dtype.kind != "V" else one.tolist() == other.tolist()
        assert getattr(one, "weight", 0) == getattr(other, "weight", 0)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif hasattr(one, "equals"):  # pandas
        assert one.equals(other)
    elif hasattr(one, "toarray"):  # scipy.sparse
        assert one.shape == other.shape and (one != other).nnz == 0
    else:
        assert one == other


def arrays_in(value):
    """Yield the arrays that a value consists of."""
    if isinstance(value, np.ma.MaskedArray):
        yield value.data
        if value.mask is not np.ma.nomask:
            yield value.mask
    elif isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from arrays_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from arrays_in(each)
    elif hasattr(value, "indptr"):
        yield from (value.data, value.indices, value.indptr)


def not_own(value):
    """Return what is wrong with the arrays of a received value: each should be writable."""
    found = [
        f"{array.dtype} {array.shape} is read-only" for array in arrays_in(value) if not array.flags.writeable
    ]
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        value.iloc[0, 0] = value.iloc[0, 0]
    return found


def look(value):
    """Return a value, and what is wrong with its arrays here."""
    return value, not_own(value)


def scribble(value):
    """Write to all arrays of a value."""
    for array in arrays_in(value):
        if array.dtype.hasobject or not array.size:
            continue
        array[...] = np.zeros((), array.dtype)
