"""Arrays in shared memory: every process of this host sees the same elements.

An ordinary array is a value: a worker gets its own. An array made here is a place: it, and
any view of it, goes to a local process without a copy, and what anybody writes all see. To a
process on another host it goes as a value, like any other array.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from shmdist.runtime.node import current_node
from shmdist.runtime.strand import current
from shmdist.wire import arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def _make(shape: Any, dtype: DTypeLike, order: str) -> tuple[NDArray[Any], bool]:
    """Return a new shared array, and whether its elements are known to be zero."""
    import numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"an array of dtype {kind} holds Python objects, which cannot be shared")
    if order not in ("C", "F"):
        raise ValueError(f"order must be 'C' or 'F', not {order!r}")
    sizes = tuple(map(operator.index, (shape,) if hasattr(shape, "__index__") else shape))
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative dimensions are not allowed: {shape!r}")
    nbytes = max(1, kind.itemsize * math.prod(sizes))  # an empty one has a place as well
    strand = current()
    strand.enter()  # an interrupt must not come between a block and the hold of it
    try:
        hold, is_zero = current_node().sharing.make_shared(nbytes)
        buffer = hold.array()
    finally:
        strand.leave()
    return numpy.ndarray(sizes, kind, buffer, 0, None, order), is_zero  # type: ignore[arg-type]  # C or F


def empty(shape: Any, dtype: DTypeLike = float, order: str = "C") -> NDArray[Any]:
    """Return a new shared array whose elements are not set.

    Parameters
    ----------
    shape : int or tuple of int
        Its shape.
    dtype : dtype
        Of its elements; not ``object``.
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
        The dtype holds Python objects.

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
    return _make(shape, dtype, order)[0]


def zeros(shape: Any, dtype: DTypeLike = float, order: str = "C") -> NDArray[Any]:
    """Return a new shared array of zeros; parameters and errors as of :func:`empty`.

    Examples
    --------
    >>> import shmdist as sd
    >>> with sd.addprocs(1) as pids:
    ...     a = sd.shared.zeros(3)
    ...     sd.remotecall_fetch(a.__setitem__, pids[0], 1, 5.0)
    ...     a
    array([0., 5., 0.])
    """
    array, is_zero = _make(shape, dtype, order)
    if not is_zero:
        array.fill(0)
    return array


def ones(shape: Any, dtype: DTypeLike = float, order: str = "C") -> NDArray[Any]:
    """Return a new shared array of ones; parameters and errors as of :func:`empty`.

    Examples
    --------
    >>> import shmdist as sd
    >>> sd.shared.ones(3, int)
    array([1, 1, 1])
    """
    array = _make(shape, dtype, order)[0]
    array.fill(1)
    return array


def full(shape: Any, fill_value: Any, dtype: DTypeLike | None = None, order: str = "C") -> NDArray[Any]:
    """Return a new shared array filled with a value; errors as of :func:`empty`.

    Parameters
    ----------
    shape : int or tuple of int
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

    array = _make(shape, numpy.asarray(fill_value).dtype if dtype is None else dtype, order)[0]
    numpy.copyto(array, fill_value, casting="unsafe")
    return array


def array(object: ArrayLike, dtype: DTypeLike | None = None, order: str = "K") -> NDArray[Any]:
    """Return a new shared array with the elements of another array, a list, or the like.

    Parameters
    ----------
    object : array_like
        It is copied, once.
    dtype : dtype, optional
        Default: that of `object`.
    order : {"K", "A", "C", "F"}
        Memory layout. "K" and "A": column-major if `object` is, else row-major.

    Raises
    ------
    MemoryError, TypeError
        As of :func:`empty`.

    Examples
    --------
    >>> import shmdist as sd
    >>> sd.shared.array([[1, 2], [3, 4]])
    array([[1, 2],
           [3, 4]])
    """
    import numpy

    source = numpy.asarray(object)
    if order in ("K", "A"):
        order = "F" if source.flags.f_contiguous and not source.flags.c_contiguous else "C"
    result = _make(source.shape, source.dtype if dtype is None else dtype, order)[0]
    numpy.copyto(result, source, casting="unsafe")
    return result


def is_shared(a: Any) -> bool:
    """Tell whether all elements of an array lie in a shared one: whether it goes by reference.

    Parameters
    ----------
    a : ndarray
        Anything else is not shared.

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
    return arrays.find_shared(*arrays.extent(a)) is not None


__all__ = ["array", "empty", "full", "is_shared", "ones", "zeros"]
