"""How numpy arrays are pickled, where numpy's own way would be a trap."""

from __future__ import annotations

import sys
from typing import Any

#: Buffers from this size on, in bytes, leave the pickle stream.
INLINE = 1 << 13


def reduce_array(array: Any, _pickler: Any) -> Any:
    """Let arrays arrive writable, and large strided ones in one copy."""
    if array.dtype.hasobject:
        return NotImplemented
    flags = array.flags
    if flags.writeable and (flags.forc or array.nbytes < INLINE):
        return NotImplemented
    kind = type(array)
    if flags.forc and kind.__module__ == "numpy" and kind.__name__ == "ndarray" and array.nbytes >= INLINE:
        return _writable_face(array).__reduce_ex__(5)
    if not flags.forc and kind.__name__ != "ndarray":
        return NotImplemented  # a subclass knows how to pickle itself, at the price of a copy
    return array.copy("A").__reduce_ex__(5)


class _Face:
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
    return numpy.ndarray(array.shape, array.dtype, numpy.asarray(_Face(array)), 0, None, order)
