"""Copies of values that stay in this process: as close as possible to what another process would get.

A value that goes to another process is pickled, so it is a copy. One that stays here, as an item of
a channel of this process or as an argument of a call to itself, is copied here at the same moment,
or who sent it could still change it.

Copied is what can be changed: containers, arrays, objects. What has an identity of its own stays
what it is: functions, classes, modules, shared arrays, references (Future, RemoteChannel) and whatever
else this package defines, errors (with their tracebacks), and what cannot be pickled (locks, files,
generators). So a copy never fails: what could be used here before it was copied can be used after.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
import threading
from types import FunctionType, ModuleType
from typing import Any

from shmdist._signals import is_interruption
from shmdist.serialization import arrays
from shmdist.serialization.atoms import ATOMS
from shmdist.serialization.pickler import Payload, PlainPickler, reducers

_LEAVES = frozenset({FunctionType, ModuleType, type})


class _Loading(threading.local):
    """What the load that this thread is in finds under the numbers in its pickle."""

    kept: list[Any] | None = None


_loading = _Loading()


def _recall(number: int) -> Any:
    kept = _loading.kept
    assert kept is not None
    return kept[number]


class _LocalPickler(PlainPickler):
    """Pickles for a load in this process: what keeps its identity is a number in the stream."""

    kept: list[Any]
    share = True  # a shared array stays one

    def reducer_override(self, obj: Any) -> Any:
        """Keep what has an identity; the plain pickler's rules for the rest."""
        kind = type(obj)
        if kind in _LEAVES or issubclass(kind, (type, BaseException)):
            return NotImplemented if obj is _recall else self._keep(obj)
        if _is_array(kind):
            if _is_shared(obj):
                return self._keep(obj) if self.share else obj.copy("A").__reduce_ex__(5)
        elif kind in reducers or kind.__module__.partition(".")[0] == "shmdist":
            return self._keep(obj)
        return super().reducer_override(obj)

    def _keep(self, obj: Any) -> Any:
        self.kept.append(obj)
        return _recall, (len(self.kept) - 1,)


class _CarefulPickler(_LocalPickler):
    """The same, and it keeps what cannot be pickled; it asks each object, so it is slower."""

    def reducer_override(self, obj: Any) -> Any:
        """Keep what cannot be pickled as well."""
        try:
            reduced = super().reducer_override(obj)
            if reduced is NotImplemented and obj is not _recall:
                known = copyreg.dispatch_table.get(type(obj))
                reduced = known(obj) if known is not None else obj.__reduce_ex__(5)
            return reduced
        except (KeyboardInterrupt, SystemExit, MemoryError, RecursionError):
            raise
        except BaseException as error:
            if is_interruption(error):
                raise
            return self._keep(obj)


def _is_array(kind: type) -> bool:
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    return ndarray is not None and issubclass(kind, ndarray)


def _is_shared(array: Any) -> bool:
    return (
        arrays.find_shared is not None
        and not array.dtype.hasobject
        and arrays.find_shared(*arrays.extent(array)) is not None
    )


def is_constant(value: Any) -> bool:
    """Return whether a value needs no copy: a number or text, or a tuple of such."""
    kind = type(value)
    return kind in ATOMS or (kind is tuple and all(type(part) in ATOMS for part in value))


def local_copy(value: Any, *, share: bool = True) -> Any:
    """Return a copy of `value` for use in this process.

    Parameters
    ----------
    value : object
        Anything.
    share : bool
        A shared array stays the same memory. False: it is copied as any other.

    Examples
    --------
    >>> rows = [[1], [2]]
    >>> copy = local_copy(rows)
    >>> copy == rows, copy[0] is rows[0]
    (True, False)
    """
    if is_constant(value):
        return value
    if arrays.is_plain(value) and not (share and _is_shared(value)):
        return value.copy("A")
    for pickler in (_LocalPickler, _CarefulPickler):
        try:
            return _copy_by(pickler, value, share)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            if is_interruption(error):
                raise
    return value


def unshared(value: Any) -> Any:
    """Return a copy of a shared array, or of a view of one; of anything else, the thing itself."""
    return value.copy("A") if _is_array(type(value)) and _is_shared(value) else value


def _copy_by(kind: type[_LocalPickler], value: Any, share: bool) -> Any:
    payload = Payload()
    pickler = kind(payload, 5, buffer_callback=payload.keep_out)
    pickler.payload, pickler.kept, pickler.share = payload, [], share
    pickler.dump(value)
    body = payload.parts[0] if len(payload.parts) == 1 else b"".join(payload.parts)
    outer, _loading.kept = _loading.kept, pickler.kept
    try:
        return pickle.loads(body, buffers=[bytearray(arrays.contiguous(each)) for each in payload.buffers])
    finally:
        _loading.kept = outer


__all__ = ["is_constant", "local_copy", "unshared"]
