"""How numpy arrays are pickled.

An array that is not contiguous, and a view of a shared array, are not turned into bytes while
they are pickled. A *source* takes the place of their bytes among the payload's buffers, and
the frame's maker decides: it writes a strided array straight into its final block, and sends
of a shared one only where it lies (or its bytes, to who cannot see it).
"""

from __future__ import annotations

import copyreg
import marshal
import pickle
import sys
from collections.abc import Callable
from typing import Any

#: Buffers from this size on, in bytes, leave the pickle stream; a smaller one is cheaper to copy.
INLINE = 1 << 14
#: From this size on they go through blocks: below it, the stream is as fast.
LINE = 1 << 18

#: Finds the lease of the shared array in which an array lies, given its first and last
#: address; None as long as this process has no shared arrays.
find_shared: Callable[[int, int], Any] | None = None
#: Tells how many there are (``memory.leases``), as its `shared`.
registry: Any = None


#: numpy's array type, once an array has been pickled or read.
ndarray: Any = None


def is_small(value: Any) -> bool:
    """Return whether a value of type :data:`ndarray` may stay in the pickle stream as it is."""
    return (
        (find_shared is None or not registry.shared)
        and value.nbytes < INLINE
        and not value.dtype.hasobject
        and bool(value.flags.writeable)
    )


def is_plain(value: Any) -> bool:
    """Return whether a value is an array of numpy's own type, without objects in it."""
    kind = type(value)
    # By name: numpy may be here, and no array pickled yet.
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and not value.dtype.hasobject


class SmallArray:
    """Stands for a small array of numbers in a result: pickled in half the time that numpy takes."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        array = self.array
        return ndarray, (array.shape, array.dtype.str, pickle.PickleBuffer(array))


_kinds: dict[Any, str] = {}  # by dtype, of arrays that are plain otherwise
_dtypes: dict[str, Any] = {}  # and back


def small_array_dtype(value: Any) -> str | None:
    """Return the dtype of a small array of numbers in C order as text; None for any other :data:`ndarray`.

    Those may be taken apart, or :class:`SmallArray` may stand for them.
    """
    dtype = value.dtype
    kind = _kinds.get(dtype)
    if kind is None:
        if dtype.kind not in "biufc":
            return None
        kind = _kinds[dtype] = dtype.str
    # The text says nothing of metadata, nor does the dict: dtypes that differ in it alone are equal.
    if dtype.metadata is not None:
        return None
    if value.nbytes < INLINE and value.flags.carray and (find_shared is None or not registry.shared):
        return kind
    return None


def rebuild_arguments(body: bytes | bytearray, start: int) -> tuple[Any, ...]:
    """Return the arguments of a call one of which is an array that came apart.

    From `start` on there is a list, by marshal: the other arguments, the array's place among them, its
    shape, its dtype and how many bytes it has; and those are the last of `body`.  A pickle of
    it takes three times as long, and more copies.
    """
    global ndarray
    view = memoryview(body)
    args, index, shape, kind, nbytes = marshal.loads(view[start:])
    dtype = _dtypes.get(kind)
    if dtype is None:
        import numpy  # the whole, as in `codec.prepare`

        ndarray = numpy.ndarray
        dtype = _dtypes[kind] = numpy.dtype(kind)
    array = ndarray(shape, dtype, bytearray(view[len(body) - nbytes :]))
    return (*args[:index], array, *args[index:])


class StridedSource:
    """An array that is not contiguous, in the place of its bytes in C order.

    Attributes
    ----------
    array : ndarray
        Any shape and strides.
    nbytes : int
        Of its elements.
    """

    __slots__ = ("array", "nbytes")

    def __init__(self, array: Any) -> None:
        self.array = array
        self.nbytes: int = array.nbytes

    def __len__(self) -> int:
        return self.nbytes

    def bytes(self) -> Any:
        """Return the elements as contiguous bytes: a copy."""
        # Not as what it is: a matrix, say, would keep its two dimensions.
        bare = sys.modules["numpy"].ndarray.view(self.array, sys.modules["numpy"].ndarray)
        return memoryview(bare.copy("C").reshape(-1).view("B"))

    def write_to(self, target: Any) -> None:
        """Copy the elements into an array of as many bytes."""
        numpy = sys.modules["numpy"]
        array = self.array
        numpy.copyto(numpy.ndarray(array.shape, array.dtype, target), array)


class SharedSource(StridedSource):
    """A view of a shared array, in the place of its bytes.

    Attributes
    ----------
    lease : Lease
        Of the whole shared array.
    """

    __slots__ = ("lease",)

    def __init__(self, array: Any, lease: Any) -> None:
        super().__init__(array)
        self.lease = lease


def contiguous(source: Any) -> Any:
    """Return the bytes of a buffer, or of what is in the place of one."""
    return source.bytes() if isinstance(source, StridedSource) else source


def reduce_array(array: Any, pickler: Any) -> Any:
    """Let arrays arrive writable and in one copy, and shared ones without any."""
    if array.dtype.hasobject:
        return NotImplemented
    global ndarray
    kind = type(array)
    if kind is ndarray and is_small(array):
        return NotImplemented
    payload = payload_of(pickler)
    plain = kind.__module__ == "numpy" and kind.__name__ == "ndarray"
    if plain:
        ndarray = kind
    if not plain and not reduces_like_ndarray(kind):
        return NotImplemented  # a subclass knows how to pickle itself, at the price of copies
    if not plain and kind.__module__.partition(".")[0] != "numpy":
        attributes = _attributes(array, kind)
        if attributes:  # numpy's own way leaves them behind
            bare = array.view(sys.modules["numpy"].ndarray)
            return _view_as, (bare, kind), attributes, None, None, _set_attributes
    if find_shared is not None and payload is not None and array.size:
        reduced = _reduce_shared(array, None if plain else kind, payload)
        if reduced is not None:
            return reduced
    flags = array.flags
    if array.nbytes < INLINE or payload is None:
        if flags.writeable or not plain:
            return NotImplemented
        return array.copy("A").__reduce_ex__(5)
    if plain and flags.forc:
        return NotImplemented if flags.writeable else _writable_face(array).__reduce_ex__(5)
    order = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    if not flags.forc:
        buffer = _stand_in(payload, StridedSource(array))
    else:
        bare = array.view(sys.modules["numpy"].ndarray)
        # As bytes: numpy offers none of some dtypes (of dates, say) as a buffer.
        bare = (bare if flags.writeable else _writable_face(bare)).ravel("K").view("B")
        buffer = pickle.PickleBuffer(bare)
    return _rebuild, (buffer, array.dtype, array.shape, order, None if plain else kind)


def _attributes(array: Any, kind: Any) -> dict[str, Any]:
    """Return the attributes of an array of a user's class, in slots too."""
    if issubclass(kind, sys.modules["numpy"].memmap):
        return {}  # those of a file
    found = {name: getattr(array, name) for name in copyreg._slotnames(kind) if hasattr(array, name)}  # type: ignore[attr-defined]  # as pickle does
    found.update(getattr(array, "__dict__", ()))
    return found


def _view_as(bare: Any, kind: Any) -> Any:
    return bare.view(kind)


def _set_attributes(array: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(array, name, value)


def payload_of(pickler: Any) -> Any:
    """Return the payload that takes the large buffers of a pickler; None when they stay in the stream."""
    return None if getattr(pickler, "in_band", True) else pickler.payload


def _stand_in(payload: Any, source: StridedSource) -> pickle.PickleBuffer:
    """Return the buffer that the pickler sees in the place of a source; it is never sent."""
    stand_in = bytearray(1)
    payload.sources[id(stand_in)] = source, stand_in
    return pickle.PickleBuffer(stand_in)


def extent(array: Any) -> tuple[int, int]:
    """Return the addresses of an array's first byte, and of the one after its last."""
    low = high = array.__array_interface__["data"][0]
    if not array.size:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    return low, high + array.itemsize


def reduces_like_ndarray(kind: Any) -> bool:
    """Return whether a subclass of ndarray is pickled as its elements and its type, and no more."""
    ndarray = sys.modules["numpy"].ndarray
    known: bool = (
        kind.__reduce__ is ndarray.__reduce__
        and kind.__reduce_ex__ is ndarray.__reduce_ex__
        and kind.__setstate__ is ndarray.__setstate__
    )
    return known


def _rebuild(buffer: Any, dtype: Any, shape: Any, order: Any, kind: Any) -> Any:
    """Make an array over a buffer that holds its elements; the buffer is its memory."""
    import numpy

    array = numpy.ndarray(shape, dtype, buffer, 0, None, order)
    return array if kind is None else array.view(kind)


def _reduce_shared(array: Any, kind: Any, payload: Any) -> Any:
    """Reduce a view of a shared array to where it lies; None when it is no such view."""
    assert find_shared is not None
    lease = find_shared(*extent(array))
    if lease is None:
        return None
    place = (array.__array_interface__["data"][0] - lease.start, array.strides, array.flags.writeable)
    return _rebuild_shared, (
        _stand_in(payload, SharedSource(array, lease)),
        array.dtype,
        array.shape,
        place,
        kind,
    )


def _rebuild_shared(buffer: Any, dtype: Any, shape: Any, place: Any, kind: Any) -> Any:
    """Make a view of a shared array; or an array of its own, when only the elements came."""
    import numpy

    offset, strides, writeable = place
    memory = buffer.obj if isinstance(buffer, memoryview) else None
    if hasattr(getattr(memory, "base", None), "lease"):
        array = numpy.ndarray(shape, dtype, buffer, offset, strides)
        array.flags.writeable = writeable
    else:
        array = numpy.ndarray(shape, dtype, buffer)
    return array if kind is None else array.view(kind)


class _WritableView:
    """Offers the bytes of an array under the array interface, as if they were writable."""

    def __init__(self, array: Any) -> None:
        self.array = array  # keeps the memory alive
        address = array.__array_interface__["data"][0]
        # Bytes, for the interface cannot tell of every dtype.
        self.__array_interface__ = {
            "version": 3,
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }


def _writable_face(array: Any) -> Any:
    """Return a writable view of a read-only contiguous array; nobody writes to it.

    The pickle stream marks read-only buffers, and its reader would give a read-only
    array back, though the memory that it received is its own.
    """
    numpy = sys.modules["numpy"]
    order = "C" if array.flags.c_contiguous else "F"
    return numpy.ndarray(array.shape, array.dtype, numpy.asarray(_WritableView(array)), 0, None, order)


def reduce_masked(array: Any, pickler: Any) -> Any:
    """Let the data and the mask of a masked array leave the pickle stream."""
    if payload_of(pickler) is None:
        return NotImplemented
    numpy = sys.modules["numpy"]
    more = (array._hardmask, array._optinfo)  # which numpy's own way leaves behind
    if (
        not any(more)
        and array.nbytes < INLINE
        and (find_shared is None or find_shared(*extent(array.data)) is None)
    ):
        return NotImplemented
    mask = array.mask
    if mask is not numpy.ma.nomask:
        mask = mask.view(numpy.ndarray)
    mask = None if mask is numpy.ma.nomask else mask
    return _rebuild_masked, (array.data, mask, array._fill_value, *more)


def _rebuild_masked(data: Any, mask: Any, fill_value: Any, hard: bool, info: Any) -> Any:
    import numpy

    array: Any = numpy.ma.MaskedArray(data, numpy.ma.nomask if mask is None else mask, copy=False)
    array._fill_value = fill_value
    array._hardmask = hard
    array._optinfo.update(info)
    return array
