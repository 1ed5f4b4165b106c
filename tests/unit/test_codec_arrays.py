"""Arrays arrive equal, writable and their receiver's own; large ones leave the pickle stream."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmdist.serialization import codec
from shmdist.serialization.codec import INLINE
from tests.unit.test_codec import no_references, receive, ship

Array = np.ndarray[Any, Any]

LARGE = INLINE // 8 + 10  # items of a float64 array that leaves the stream
PADDED = np.dtype({"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8], "itemsize": 24})
OVERLAPPING = np.dtype({"names": ["whole", "low"], "formats": ["u8", "u4"], "offsets": [0, 0], "itemsize": 8})


class Sub(np.ndarray[Any, Any]):
    """A subclass with an attribute that it takes care of itself."""

    unit = ""

    def __array_finalize__(self, obj: Any) -> None:
        self.unit = getattr(obj, "unit", "")

    def __reduce__(self) -> Any:
        inherited: Any = super().__reduce__()
        make, arguments, state = inherited
        return make, arguments, (self.unit, state)

    def __setstate__(self, state: Any) -> None:
        self.unit, inner = state
        super().__setstate__(inner)


def numbers(n: int) -> Array:
    return np.arange(n * 6, dtype="f8").reshape(n, 3, 2)


def sub(n: int) -> Array:
    array = numbers(n).view(Sub)
    array.unit = "m"
    return array


MAKERS: dict[str, Callable[[int], Array]] = {
    "C": numbers,
    "F": lambda n: np.asfortranarray(numbers(n)),
    "transposed": lambda n: numbers(n).T,
    "strided": lambda n: numbers(2 * n)[::2],
    "backwards": lambda n: numbers(n)[::-1, :, ::-1],
    "axes swapped": lambda n: numbers(n).transpose(1, 0, 2),
    "column": lambda n: numbers(n)[:, 1, 1],
    "broadcast": lambda n: np.broadcast_to(np.float64(3), (n, 6)),
    "empty": lambda n: np.empty((n, 0, 3)),
    "structured": lambda n: np.zeros(n, [("a", "i4"), ("b", "f8", (2,)), ("c", "S3")]),
    "padded": lambda n: np.ones(n, PADDED),
    "overlapping": lambda n: np.arange(n).astype("u8").view(OVERLAPPING),
    "big-endian": lambda n: np.arange(n, dtype=">i8"),
    "dates": lambda n: np.arange(n).astype("M8[us]"),
    "bools": lambda n: np.arange(8 * n) % 3 == 0,
    "text": lambda n: np.array([f"ü{i}" for i in range(n)]),
    "void": lambda n: np.zeros(n, "V16"),
    "complex": lambda n: np.arange(n) * 1j,
    "objects": lambda n: np.array([{i: "x"} for i in range(n)], dtype=object),
    "subclass": sub,
    "subclass strided": lambda n: sub(2 * n)[::2],
    "recarray": lambda n: np.rec.array(np.zeros(n, [("a", "i4"), ("b", "f8")])),
    "masked": lambda n: np.ma.masked_array(np.arange(n * 1.0), mask=np.arange(n) % 2 == 0),
    "masked strided": lambda n: np.ma.masked_array(np.arange(n * 2.0), mask=np.arange(n * 2) % 3 == 0)[::2],
}


def same(a: Array, b: Array) -> bool:
    if a.dtype.hasobject:
        return a.shape == b.shape and bool(a.tolist() == b.tolist())
    if isinstance(a, np.ma.MaskedArray) and not np.array_equal(np.ma.getmaskarray(a), np.ma.getmaskarray(b)):
        return False
    if a.shape != b.shape or a.dtype.newbyteorder("=") != b.dtype.newbyteorder("="):
        return False  # of arrays that are not contiguous, numpy's own pickle swaps the bytes
    return bool(np.all(a == b))


@pytest.mark.parametrize("readonly", [False, True], ids=["", "readonly"])
@pytest.mark.parametrize("n", [3, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", MAKERS)
def test_equal_writable_and_its_own(name: str, n: int, readonly: bool) -> None:
    array = MAKERS[name](n)
    if readonly:
        array.flags.writeable = False
    flags = array.flags.writeable
    again = ship(array)
    assert type(again) is type(array)
    assert same(again, array)
    assert again.flags.writeable
    assert getattr(again, "unit", "") == getattr(array, "unit", "")
    assert array.flags.writeable is flags  # the sender's is as it was
    if array.size and name != "objects":
        assert not np.shares_memory(again, array)
        before = array.tobytes()
        again[...] = again[::-1].copy() if name == "text" else np.zeros((), again.dtype)
        assert array.tobytes() == before


@pytest.mark.parametrize("n", [3, LARGE])
@pytest.mark.parametrize("readonly", [False, True])
def test_order_is_kept(n: int, readonly: bool) -> None:
    for name, flag in (("C", "C_CONTIGUOUS"), ("F", "F_CONTIGUOUS"), ("transposed", "F_CONTIGUOUS")):
        array = MAKERS[name](n)
        array.flags.writeable = not readonly
        assert ship(array).flags[flag]


@pytest.mark.parametrize("kind", [np.float64, np.complex128, np.str_])
def test_scalars_and_no_dimensions(kind: Any) -> None:
    assert ship(kind(3)) == kind(3)
    array = np.array(kind(3))
    array.flags.writeable = False
    again = ship(array)
    assert (again.shape, again[()], again.flags.writeable) == ((), kind(3), True)


@pytest.mark.parametrize("name", ["C", "F", "transposed", "padded", "text", "void"])
@pytest.mark.parametrize("readonly", [False, True])
def test_large_ones_are_written_from_where_they_lie(name: str, readonly: bool) -> None:
    array = MAKERS[name](LARGE)
    array.flags.writeable = not readonly
    payload = codec.dumps([array])
    [buffer] = payload.buffers
    assert buffer.nbytes == array.nbytes
    assert np.shares_memory(np.frombuffer(buffer, "u1"), array.reshape(-1, order="A").view("u1"))
    assert sum(map(len, payload.parts)) < 1000


@pytest.mark.parametrize("name", ["strided", "backwards", "column", "broadcast", "axes swapped"])
def test_large_strided_ones_are_copied_once(name: str) -> None:
    payload = codec.dumps([MAKERS[name](8 * LARGE)])
    assert len(payload.buffers) == 1
    assert sum(map(len, payload.parts)) < 1000


def test_the_threshold() -> None:
    assert not codec.dumps(np.zeros(INLINE - 1, "u1")).buffers
    assert len(codec.dumps(np.zeros(INLINE, "u1")).buffers) == 1


def test_several_and_the_same_twice() -> None:
    array, other = numbers(LARGE), numbers(LARGE) + 1
    payload = codec.dumps({"a": array, "b": other, "c": array, "view": array[1:]})
    assert len(payload.buffers) == 3
    again = codec.loads(receive(codec.frame(1, 0, 0, 0, payload)), no_references)
    assert again["a"] is again["c"]
    assert same(again["b"], other)
    assert same(again["view"], array[1:])


def test_the_payload_keeps_the_memory_alive() -> None:
    array = numbers(LARGE)
    array.flags.writeable = False
    expected = array.tobytes()
    payload = codec.dumps(array)
    del array
    numbers(LARGE)  # would take the memory
    assert bytes(payload.buffers[0]) == expected


def test_beside_what_goes_by_value() -> None:
    scale = numbers(LARGE)
    scale.flags.writeable = False
    payload = codec.dumps(lambda: scale)
    assert len(payload.buffers) == 1
    function = codec.loads(receive(codec.frame(1, 0, 0, 0, payload)), no_references)
    assert same(function(), scale)


def test_objects_hold_arrays() -> None:
    inner = numbers(LARGE)
    inner.flags.writeable = False
    outer = np.array([None, {"inner": inner}], dtype=object)
    again = ship(outer)
    assert same(again[1]["inner"], inner)
    assert again[1]["inner"].flags.writeable


def test_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, numbers(LARGE))
    for mode in ("r", "c"):
        array = np.load(path, mmap_mode=mode)
        again = ship(array)
        assert same(again, array)
        assert again.flags.writeable
        again[0] = -1


def test_dtypes_and_ufuncs() -> None:
    assert ship(PADDED) == PADDED
    assert ship(np.add) is np.add
    assert ship(np.random.default_rng(3)).integers(100) == np.random.default_rng(3).integers(100)


@pytest.mark.parametrize("name", ["C", "F", "strided", "structured", "masked"])
@pytest.mark.parametrize("readonly", [False, True])
def test_in_one_piece(name: str, readonly: bool) -> None:
    array = MAKERS[name](20 * LARGE)
    array.flags.writeable = not readonly
    again = pickle.loads(codec.pickle_whole([array, lambda: 0]))[0]
    assert same(again, array)
    assert again.flags.writeable


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    steps=st.lists(st.sampled_from([1, 2, -1, -3]), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from(["u1", "<i4", ">f8", "c16"]),
    readonly=st.booleans(),
)
def test_any_layout(shape: list[int], steps: list[int], order: list[int], dtype: str, readonly: bool) -> None:
    array = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    array = array.transpose([axis for axis in order if axis < array.ndim])
    array = array[tuple(slice(None, None, step) for step in steps[: array.ndim])]
    array = np.asarray(array)
    array.flags.writeable = not readonly
    again = ship(array)
    assert same(again, array)
    assert again.flags.writeable
