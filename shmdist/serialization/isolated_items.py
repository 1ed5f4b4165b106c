"""Lists whose items are pickled one by one, so that one bad item does not spoil the others.

The elements of a batch are apart from one another as those of calls of their own are, and
so are its results: where they arrive no two of them share an object that can change, and
one that cannot be read costs itself alone.

What is written
---------------
Numbers, texts and their like cannot change, and reading them cannot fail: a list of such,
or of different tuples, lists and dicts of such, goes as it is, for the price of looking at
the types.  In any other list each object that may change is pickled by itself, and the
message holds the bytes of its pickle.

Classes and functions of ``__main__`` have no name that the receiver could look up, and are
pickled by value.  They are definitions and not values, so the objects of a list share
them: they stand in a table, pickled once, to which the objects' pickles refer.

Large buffers are handed on to the pickler of the message, in order, which finds their
place as it does for any other; the references in the objects are entered in its payload.
"""

from __future__ import annotations

import pickle
import sys
import threading
from itertools import chain
from types import FunctionType
from typing import Any

from shmdist.serialization import definitions
from shmdist.serialization.arrays import INLINE
from shmdist.serialization.modules import goes_by_value
from shmdist.serialization.pickler import Payload, PlainPickler, cloud_pickler, reducers
from shmdist.transport import native

#: Types whose objects cannot change.  numpy's scalars are entered as they are met.
_constant: set[type] = {int, float, bool, complex, type(None), str, bytes}
#: Containers into which it is worth looking.
_FLAT = frozenset({tuple, list, dict})


class IsolatedItems:
    """A list as :func:`pack` returns it: when pickled, each of its objects is on its own."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class LoadFailure:
    """Stands in a :class:`PartialList` for an object that could not be read."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class PartialList(list[Any]):
    """A list that arrived in which some objects are :class:`LoadFailure`."""

    __slots__ = ()


def pack(items: list[Any] | range) -> Any:
    """Return what to send in the place of a list, so that its objects arrive apart.

    Parameters
    ----------
    items : list or range
        A range is sent as it is.

    Returns
    -------
    object
        Where it arrives it is an equal list, or a :class:`PartialList`.
    """
    if type(items) is range:
        return items
    rest = _kinds(items) - _constant
    rest = {kind for kind in rest if not _is_scalar(kind)}
    return items if not rest or (rest <= _FLAT and _are_flat(items, rest)) else IsolatedItems(items)


def _kinds_in_python(items: list[Any]) -> set[type]:
    """Return the types of a list's objects."""
    return set(map(type, items))


_kinds = _kinds_in_python if native.module is None else native.module.kinds


def _are_flat(items: list[Any], kinds: set[type]) -> bool:
    """Return whether the containers among `items` are different ones, and hold nothing that can change."""
    inside: set[type] = set()
    for kind in kinds:
        same: list[Any] = [item for item in items if type(item) is kind]
        if kind is not tuple and len(set(map(id, same))) < len(same):
            return False
        if not all(_is_scalar(inner) for inner in set(map(type, chain.from_iterable(same[:1]))) - _constant):
            return False  # looked at first: probably the others are alike
        inside.update(map(type, chain.from_iterable(same)))
        if kind is dict:
            inside.update(map(type, chain.from_iterable(map(dict.values, same))))
    return all(_is_scalar(kind) for kind in inside - _constant)


def _is_scalar(kind: type) -> bool:
    """Return whether a type is one of numpy's scalars, and note it if so."""
    numpy = sys.modules.get("numpy")
    if numpy is None or kind.__module__ != "numpy" or not issubclass(kind, numpy.generic):
        return False
    if issubclass(kind, numpy.void):
        return False  # a record of an array, which can be written to
    _constant.add(kind)
    return True


# ---------------------------------------------------------------------- writing


class _Definitions:
    """The classes and functions of ``__main__`` that objects of one list share."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._index: dict[int, int] = {}  # by id; the list keeps them alive

    def reduce(self, obj: Any, kind: type, payload: Any) -> Any:
        """Return how to pickle `obj` when it is a definition, else None."""
        if kind is FunctionType:
            # One that closes over something has a value of its own.
            if obj.__closure__ is not None or not goes_by_value(obj.__module__):
                return None
        elif not issubclass(kind, type) or not goes_by_value(obj.__module__):
            return None
        reduced = definitions.reference(obj, payload)
        if reduced is not None:
            return reduced
        index = self._index.get(id(obj))
        if index is None:
            index = self._index[id(obj)] = len(self.all)
            self.all.append(obj)
        return _definition, (index,)


class _Pickler(PlainPickler):
    """The plain pickler, for one object after the other."""

    definitions: _Definitions

    def reducer_override(self, obj: Any) -> Any:
        """Decide about one object that is not of a built-in type."""
        kind = type(obj)
        if kind not in reducers:
            reduced = self.definitions.reduce(obj, kind, self.payload)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


_by_value_class: Any = None


def _by_value_pickler() -> Any:
    """Return the class of the pickler for objects with closures, lambdas and the like."""
    global _by_value_class
    if _by_value_class is None:

        class ByValuePickler(cloud_pickler()):  # type: ignore[misc]  # made at run time
            """cloudpickle's pickler, in which definitions are shared as well."""

            definitions: _Definitions

            def reducer_override(self, obj: Any) -> Any:
                """Decide about one object."""
                return self.definitions.reduce(obj, type(obj), self.payload) or super().reducer_override(obj)

        _by_value_class = ByValuePickler
    return _by_value_class


class _Writer:
    """Pickles one object after the other for a payload; it is its own picklers' file."""

    def __init__(self, payload: Any) -> None:
        self.payload = payload
        self.definitions = _Definitions()
        self.parts: list[Any] = []
        self.buffers: list[pickle.PickleBuffer] = []
        self.write = self.parts.append

    def _pickler(self, kind: Any) -> Any:
        pickler = kind(self, 5, buffer_callback=self._keep_out)
        pickler.payload = self.payload
        pickler.definitions = self.definitions
        return pickler

    def _keep_out(self, buffer: pickle.PickleBuffer) -> bool:
        """Leave a large buffer to the message's pickler; true leaves it in the stream."""
        raw = buffer.raw()
        if raw.nbytes < INLINE and id(raw.obj) not in self.payload.sources:
            return True
        self.buffers.append(buffer)
        return False

    def dump_each(self, items: list[Any]) -> tuple[list[int], list[Any], dict[int, list[Any]]]:
        """Pickle those of `items` that may change, and put None in their places.

        Returns
        -------
        places, blobs, buffers
            Where they stood; the pickle of each; and large buffers of some, by place.
        """
        places: list[int] = []
        buffers: dict[int, list[Any]] = {}
        blobs = self.parts
        refs = self.payload.refs
        plain = self._pickler(_Pickler)
        dump, clear = plain.dump, plain.clear_memo
        for place, item in enumerate(items):
            if type(item) in _constant:
                continue
            done, held = len(blobs), len(refs)
            try:
                clear()
                dump(item)
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException:
                # What the attempt has left is taken back.
                del blobs[done:], refs[held:]
                self.buffers.clear()
                self._pickler(_by_value_pickler()).dump(item)
            if len(blobs) > done + 1:
                blobs[done:] = [b"".join(blobs[done:])]
            if self.buffers:
                buffers[place] = self.buffers[:]
                self.buffers.clear()
            items[place] = None
            places.append(place)
        return places, blobs, buffers

    def dump_definitions(self) -> Any:
        """Return the pickle of the definitions that the objects share, if there are any."""
        if not self.definitions.all:
            return None
        parts = Payload()
        pickler = cloud_pickler()(parts, 5)
        pickler.payload, pickler.in_band = self.payload, True
        pickler.dump(self.definitions.all)
        return b"".join(parts.parts)


def _reduce(apart: IsolatedItems, pickler: Any) -> Any:
    """Pickle a list, each of its objects on its own."""
    writer = _Writer(pickler.payload)
    items = list(apart.items)
    places, blobs, buffers = writer.dump_each(items)
    return _read, (items, places, blobs, buffers, writer.dump_definitions())


reducers[IsolatedItems] = _reduce


# ---------------------------------------------------------------------- reading


class _Reading(threading.local):
    """The definitions of the list that this thread reads; or why they cannot be read."""

    definitions: Any = None


_reading = _Reading()


def _definition(index: int) -> Any:
    """Return a definition that the objects of a list share; called by their pickles."""
    definitions = _reading.definitions
    if isinstance(definitions, Exception):
        raise definitions
    return definitions[index]


def _read(
    items: list[Any], places: list[int], blobs: list[Any], buffers: dict[int, list[Any]], definitions: Any
) -> list[Any]:
    """Make the list again; called by its pickle."""
    outer = _reading.definitions
    failed = False
    try:
        if definitions is not None:
            try:
                _reading.definitions = pickle.loads(definitions)
            except Exception as error:
                _reading.definitions = error
        for place, blob in zip(places, blobs, strict=True):
            try:
                items[place] = pickle.loads(blob, buffers=buffers.get(place, ()))
            except Exception as error:
                failed = True
                items[place] = LoadFailure(error)
    finally:
        _reading.definitions = outer
    return PartialList(items) if failed else items


__all__ = ["IsolatedItems", "LoadFailure", "PartialList", "pack"]
