"""Arrays in shared memory: every process of this host sees the same elements.

An ordinary array is a value: a worker gets its own. An array made here is a place: it, and
any view of it, goes to a local process without a copy, and what anybody writes all see. To a
process on another host it goes as a value, like any other array.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Literal

from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from shmdist.serialization import arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def _make(shape: Any, dtype: Any, order: Any, zeroed: bool = False) -> NDArray[Any]:
    """Return a new shared array, as :func:`numpy.empty` would, or :func:`numpy.zeros`."""
    import numpy

    # What the parameters mean, numpy knows: of nothing, it makes arrays of any shape.
    item = numpy.empty((), dtype, order)
    kind = item.dtype
    sizes = numpy.empty(shape, "V0").shape + item.shape
    if kind.hasobject:
        raise TypeError(f"an array of dtype {kind} holds Python objects or pointers, which cannot be shared")
    if kind.itemsize * math.prod(filter(None, sizes)) > sys.maxsize:
        raise ValueError(
            f"an array of shape {sizes} and dtype {kind} is larger than the maximum possible size"
        )
    nbytes = max(1, kind.itemsize * math.prod(sizes))  # an empty one has a place as well
    thread_state = current()
    thread_state.enter()  # an interrupt must not come between a block and the hold of it
    try:
        hold, is_zero = current_node().sharing.make_shared(nbytes)
        buffer = hold.array()
    finally:
        thread_state.leave()
    if zeroed and not is_zero:
        buffer.fill(0)  # as bytes: a text of zeros is empty
    strides = numpy.empty(sizes, kind, order).strides if 0 in sizes else None
    return numpy.ndarray(sizes, kind, buffer, 0, strides, order)


def _source(given: NDArray[Any], dtype: Any) -> tuple[NDArray[Any], Any]:
    """Return the elements that :func:`numpy.array` would copy, and the dtype that it would give the copy."""
    import numpy

    bare = numpy.ndarray.view(given, numpy.ndarray)
    if dtype is None:
        return bare, bare.dtype
    # A large array is converted where its elements are to lie, if the dtype is found without them.
    item = numpy.empty((), dtype)
    if bare.ndim and not item.ndim:
        if item.dtype.kind in "biufc":
            return bare, item.dtype
        if bare.dtype.kind in "biufMm":  # the length of their texts, say, is that of all of their dtype
            return bare, numpy.array(bare[:0], dtype).dtype
    source = numpy.array(bare, dtype, copy=numpy._CopyMode.IF_NEEDED)
    return source, source.dtype


def _axes(source: NDArray[Any], order: str) -> list[int]:
    """Return the axes of a copy that :func:`numpy.array` would make, longest stride first."""
    axes = list(range(source.ndim))
    if order == "C" or (order != "F" and source.flags.c_contiguous):
        return axes
    if order == "F" or source.flags.f_contiguous:
        return axes[::-1]
    return axes if order == "A" else sorted(axes, key=lambda axis: -abs(source.strides[axis]))


def empty(shape: Any, dtype: DTypeLike = float, order: Literal["C", "F"] | None = "C") -> NDArray[Any]:
    """Return a new shared array whose elements are not set: :func:`numpy.empty`.

    Parameters
    ----------
    shape : int or sequence of int
        Its shape.
    dtype : dtype
        Of its elements; not ``object``, nor numpy's ``StringDType``.
    order : {"C", "F"}
        Row-major or column-major.

    Returns
    -------
    ndarray
        Its memory lives as long as a view of it, in any process of this host, and comes back
        at once when the processes that hold one are gone.

    Raises
    ------
    MemoryError
        There is not so much memory; nothing is changed.
    TypeError
        The dtype holds Python objects or pointers.
    ValueError, TypeError
        As numpy's: a shape, dtype or order that is none.

    Notes
    -----
    Processes that write the same elements at the same time must agree among themselves: there
    are no locks. The end of a remote call is a point at which all it wrote is seen.

    References
    ----------
    Julia standard library, `SharedArrays`.

    Examples
    --------
    >>> import shmdist as sd
    >>> a = sd.shared.empty((2, 3))
    >>> a.shape, sd.shared.is_shared(a[1])
    ((2, 3), True)
    """
    return _make(shape, dtype, order)


def zeros(shape: Any, dtype: DTypeLike = float, order: Literal["C", "F"] | None = "C") -> NDArray[Any]:
    """Return a new shared array of zeros, as :func:`numpy.zeros`; parameters and errors as of :func:`empty`.

    Examples
    --------
    >>> import shmdist as sd
    >>> with sd.addprocs(1) as pids:
    ...     a = sd.shared.zeros(3)
    ...     sd.remotecall_fetch(a.__setitem__, pids[0], 1, 5.0)
    ...     a
    array([0., 5., 0.])
    """
    return _make(shape, dtype, order, zeroed=True)


def ones(shape: Any, dtype: DTypeLike = float, order: Literal["C", "F"] | None = "C") -> NDArray[Any]:
    """Return a new shared array of ones, as :func:`numpy.ones`; parameters and errors as of :func:`empty`.

    Examples
    --------
    >>> import shmdist as sd
    >>> sd.shared.ones(3, int)
    array([1, 1, 1])
    """
    import numpy

    array = _make(shape, dtype, order)
    numpy.copyto(array, 1, casting="unsafe")
    return array


def full(
    shape: Any, fill_value: Any, dtype: DTypeLike | None = None, order: Literal["C", "F"] | None = "C"
) -> NDArray[Any]:
    """Return a new shared array filled with a value, as :func:`numpy.full`; errors as of :func:`empty`.

    Parameters
    ----------
    shape : int or sequence of int
        Its shape.
    fill_value : scalar or array_like
        What each element is set to; an array is broadcast.
    dtype : dtype, optional
        Default: that of `fill_value`.
    order : {"C", "F"}
        Row-major or column-major.

    Examples
    --------
    >>> import shmdist as sd
    >>> sd.shared.full((2, 2), 7)
    array([[7, 7],
           [7, 7]])
    """
    import numpy

    if dtype is None:
        fill_value = numpy.asarray(fill_value)
        dtype = fill_value.dtype
    array = _make(shape, dtype, order)
    numpy.copyto(array, fill_value, casting="unsafe")
    return array


def array(
    object: ArrayLike,
    dtype: DTypeLike | None = None,
    *,
    copy: bool | None = True,
    order: Literal["K", "A", "C", "F"] | None = "K",
    subok: bool = False,
    ndmin: int = 0,
) -> NDArray[Any]:
    """Return a new shared array with the elements of another array, a list, or the like: :func:`numpy.array`.

    Parameters
    ----------
    object : array_like
        It is copied, into shared memory. What is no array, numpy first makes one of; and arrays are
        converted before they are copied when their dtype, or the one asked for, is no number's.
    dtype : dtype, optional
        Default: that of `object`.
    copy : bool or None
        With None, `object` itself (or a view of it) is returned if its elements lie in shared
        memory already, with this dtype and order. With False, anything else is an error. This is
        what numpy 2 means by it, whatever numpy is installed.
    order : {"K", "A", "C", "F"}
        Memory layout. "K": the axes in the order they have in `object`; "A": column-major if
        `object` is, else row-major (or as "K", where numpy takes it so).
    subok : bool
        Whether the array is of the subclass of ndarray that `object` is of; if not, it is an ndarray.
    ndmin : int
        How many dimensions it has at least; axes of length 1 are put in front.

    Returns
    -------
    ndarray
        As of :func:`empty`.

    Raises
    ------
    MemoryError
        As of :func:`empty`.
    TypeError
        The elements are Python objects or pointers; or `subok`, and the subclass has a way of its own to be
        pickled (masked arrays, for one): it would not go by reference.
    ValueError, TypeError, OverflowError
        As numpy's: what cannot be made an array of this dtype, or cannot be had without a copy.

    Examples
    --------
    >>> import shmdist as sd
    >>> a = sd.shared.array([[1, 2], [3, 4]])
    >>> a
    array([[1, 2],
           [3, 4]])
    >>> sd.shared.array(a, copy=None) is a
    True
    """
    import numpy

    numpy.array((), order=order, ndmin=ndmin)  # raises if there are no such
    if_needed = numpy._CopyMode.IF_NEEDED
    given: Any = object
    wanted: Any = dtype
    if not isinstance(object, numpy.ndarray):
        given, wanted = numpy.array(object, dtype, copy=if_needed, subok=True), None
    source, kind = _source(given, wanted)
    layout = "K" if order is None else str.upper(order)
    as_is = source.dtype == kind and (type(object) is numpy.ndarray or (subok and given is object))
    if layout == "A" and not as_is:
        layout = "K"  # so it is with numpy, whatever its manual says
    if not copy:
        flags = source.flags
        fits = layout in "KA" or (flags.c_contiguous if layout == "C" else flags.f_contiguous)
        if fits and source.dtype == kind and is_shared(source):
            same = numpy.array(given, wanted, copy=if_needed, order=order, subok=subok, ndmin=ndmin)
            return same
        if copy is not None:
            raise ValueError(
                "copy=False, and the elements are not in shared memory with this dtype and order"
            )
    subclass = type(given) if subok else numpy.ndarray
    if subclass is not numpy.ndarray and not arrays.reduces_like_ndarray(subclass):
        raise TypeError(
            f"a {subclass.__qualname__} has a way of its own to be pickled, and would not go by reference; "
            "share the arrays that it consists of, or leave subok=True out"
        )
    # Of `given`, for a conversion keeps the order of its axes, but not what tells it where one has length 1.
    axes = _axes(given if given.ndim == source.ndim else source, layout)
    result = _make([source.shape[axis] for axis in axes], kind, "C")
    if axes != sorted(axes):
        result = result.transpose(numpy.argsort(axes))
    numpy.copyto(result, source, casting="unsafe")
    if subclass is not numpy.ndarray:
        result = numpy.ndarray.__array_wrap__(given, result)
    if ndmin > result.ndim:
        result = numpy.array(result, copy=if_needed, order=order, subok=True, ndmin=ndmin)
    return result


def is_shared(a: Any) -> bool:
    """Return whether all elements of an array lie in a shared one: whether it goes by reference.

    Parameters
    ----------
    a : ndarray
        Anything else is not shared, nor is a subclass that is pickled in its own way.

    Examples
    --------
    >>> import numpy as np
    >>> import shmdist as sd
    >>> a = sd.shared.zeros((10, 10))
    >>> sd.shared.is_shared(a[::2, 3]), sd.shared.is_shared(a.copy()), sd.shared.is_shared(np.zeros(10))
    (True, False, False)
    """
    if arrays.find_shared is None or not hasattr(a, "__array_interface__") or not hasattr(a, "strides"):
        return False
    if arrays.find_shared(*arrays.extent(a)) is None:
        return False
    import numpy

    kind = type(a)
    return issubclass(kind, numpy.ma.MaskedArray) or arrays.reduces_like_ndarray(kind)


__all__ = ["array", "empty", "full", "is_shared", "ones", "zeros"]
