"""Memory views: they arrive as views with the same format and shape of memory of their own.

cloudpickle makes bytes of them, in which an index counts bytes and not items.
"""

from __future__ import annotations

import pickle
from typing import Any


def reduce_memoryview(view: memoryview, _pickler: Any) -> Any:
    """Reduce a memory view; its memory goes as that of an array does, without a copy where that can be.

    Raises
    ------
    TypeError
        Its items are of a kind of which no view can be made without what it is a view of.
    """
    try:
        memoryview(bytes(max(view.itemsize, 1))).cast(view.format)  # type: ignore[call-overload]  # any text
    except ValueError:
        raise TypeError(
            f"a memoryview with items of format {view.format!r} cannot be sent; send what it is a view of,"
            " or numpy.asarray of it"
        ) from None
    data = pickle.PickleBuffer(view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes())
    return _view, (data, view.format, view.shape, view.readonly)


def _view(data: Any, form: str, shape: tuple[int, ...], readonly: bool) -> memoryview:
    view = memoryview(data)
    if view.format != "B" or view.ndim != 1:
        view = view.cast("B")
    if view.readonly and not readonly:
        view = memoryview(bytearray(view))
    if form != "B" or shape != view.shape:
        # There is no view with a length of 0 in several dimensions.
        view = view.cast(form, shape) if 0 not in shape else view.cast(form)  # type: ignore[call-overload]
    return view.toreadonly() if readonly else view


__all__ = ["reduce_memoryview"]
