"""Inputs of maps and loops: sequences and others, and their elements as they are now.

A *sequence* here is an object of a type whose length is its number of elements, whose slices are parts
of it, and whose reading runs no code but Python's and numpy's own: it never blocks, and what it gave
does not change by reading on.  Of everything else ``len()`` is a hint at most: that of a channel is the
number of items it has just now, and that of a class of the user's may be anything.

To read a set, dict or deque runs no other code either.  All other inputs are *live*
(``shmdist.scheduling.input_reader``).
"""

from __future__ import annotations

import array
import copyreg
import sys
from collections import deque
from typing import Any

from shmdist.references.channel import Channel
from shmdist.references.remote_channel import RemoteChannel
from shmdist.serialization import arrays
from shmdist.serialization.atoms import ATOMS
from shmdist.serialization.local_copy import local_copy

_CONTAINERS = frozenset({list, dict, set, bytearray, array.array, deque})
_SEQUENCES = (range, list, tuple, str, bytes, bytearray, array.array)
#: Types besides sequences whose reading runs no code of the user's.
_PASSIVE: frozenset[Any] = frozenset(
    {set, frozenset, dict, deque}
    | set(map(type, ({}.keys(), {}.values(), {}.items())))
    | set(map(type, map(iter, ([], (), range(0), "", {}, set(), deque()))))
)


# ---------------------------------------------------------------------- kinds of inputs


def is_sequence(iterable: Any) -> bool:
    """Return whether an input has as many elements as ``len()`` says, and can be sliced."""
    kind = type(iterable)
    if kind in _SEQUENCES:
        return True
    numpy = sys.modules.get("numpy")
    ndarray = getattr(numpy, "ndarray", None)
    for base in _SEQUENCES if ndarray is None else (*_SEQUENCES, ndarray):
        if issubclass(kind, base):
            same = all(
                getattr(kind, name) is getattr(base, name) for name in ("__len__", "__iter__", "__getitem__")
            )
            return same and (base is not ndarray or iterable.ndim > 0)
    return False


def is_array(iterable: Any) -> bool:
    """Return whether an input is an array of another library: its first axis can be sliced."""
    shape = getattr(iterable, "shape", None)
    if type(shape) is not tuple or not shape or not hasattr(iterable, "dtype") or hasattr(iterable, "keys"):
        return False
    # nditer has a shape as well, and indexes its operands; a sparse matrix has no length.
    return hasattr(iterable, "__getitem__") and known_length(iterable) == shape[0]


def known_length(iterable: Any) -> int | None:
    """Return what ``len()`` says of an input; None when it says nothing of use."""
    try:
        return len(iterable)
    except Exception:
        return None


def is_live(iterable: Any) -> bool:
    """Return whether to read an input may block, or change what was read before."""
    return type(iterable) not in _PASSIVE and not is_sequence(iterable)


def is_channel(iterable: Any) -> bool:
    """Return whether an input is a channel."""
    return isinstance(iterable, (Channel, RemoteChannel))


# ---------------------------------------------------------------------- elements


def _references(element: Any) -> int:
    return sys.getrefcount(element)


def _references_of_one() -> int:
    """Return what :func:`_references` says of an object that the caller alone has."""
    source = iter(object, None)
    element = next(source)
    return _references(element)


_ALONE = _references_of_one() + 1  # one more, for `as_of_now` has it from its caller


#: Types whose objects cannot change. numpy's scalars are entered as they are met.
constants: set[Any] = set(ATOMS)


#: Others whose objects cannot change, by the names of their modules: nobody need import them.
_IMMUTABLE = {
    "fractions": {"Fraction"},
    "decimal": {"Decimal"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # Python 3.13
    "uuid": {"UUID"},
}
_plain_classes: dict[type, bool] = {}  # of classes met, whether an object is its `__dict__` and no more


def _is_constant(kind: type) -> bool:
    """Return whether the objects of a type cannot change, and note it if so."""
    numpy = sys.modules.get("numpy")
    if kind.__module__ == "numpy":
        # A record of an array can be written to.
        constant = numpy is not None and issubclass(kind, numpy.generic) and not issubclass(kind, numpy.void)
    else:
        constant = kind.__qualname__ in _IMMUTABLE.get(kind.__module__, ())
    if constant:
        constants.add(kind)
    return constant


def as_of_now(element: Any) -> Any:
    """Return an element as it is now, whatever its source does to it later.

    An array to which nothing else refers is not copied.
    """
    kind = type(element)
    if kind in constants or (kind is tuple and constants.issuperset(map(type, element))):
        return element
    if _is_plain_array(element):
        alone = _references(element) <= _ALONE and element.flags.owndata
        return element if alone else element.copy("A")
    if _is_constant(kind):
        return element
    copy = _copy_parts(element, kind)
    return local_copy(element) if copy is None else copy


def _copy_parts(element: Any, kind: type) -> Any:
    """Return a copy of a container or object that holds nothing but constants and flat parts; else None."""
    if kind is dict:
        if not constants.issuperset(map(type, element)):
            return None
        parts = list(element.values())
    elif kind is list or kind is tuple:
        parts = element
    elif _is_plain_class(kind):
        state = _copy_parts(element.__dict__, dict)
        if state is None:
            return None
        copy: Any = object.__new__(kind)
        copy.__dict__.update(state)
        return copy
    else:
        return None
    copies = [part if type(part) in constants else _flat_copy(part) for part in parts]
    changing = [id(part) for part, copy in zip(parts, copies, strict=True) if copy is not part]
    # No two may be the same: where they arrive they would be two.
    if len(set(changing)) < len(changing) or any(
        copy is None and part is not None for part, copy in zip(parts, copies, strict=True)
    ):
        return None
    return dict(zip(element, copies, strict=True)) if kind is dict else kind(copies)


def _flat_copy(part: Any) -> Any:
    """Return a copy of an array, or of a container of constants; None of anything else."""
    kind = type(part)
    if kind is list or kind is dict or kind is set or kind is tuple:
        values = [*part, *part.values()] if kind is dict else part
        if constants.issuperset(map(type, values)):
            return part if kind is tuple else part.copy()
    elif _is_plain_array(part):
        return part.copy("A")
    elif _is_constant(kind):
        return part
    return None


class _Bare:
    """What a class statement makes."""


def _is_plain_class(kind: type) -> bool:
    """Return whether an object of a class is its ``__dict__`` and no more, and is pickled as such."""
    plain = _plain_classes.get(kind)
    if plain is None:
        if len(_plain_classes) > 1000:
            _plain_classes.clear()  # it keeps classes alive
        same = ("__reduce__", "__reduce_ex__", "__getstate__", "__new__", "__getattribute__")
        plain = _plain_classes[kind] = (
            type(kind) is type
            and kind.__base__ is object
            and kind.__basicsize__ == _Bare.__basicsize__  # nothing of C in it
            and "__dict__" in vars(kind)
            and all(getattr(kind, name) is getattr(object, name) for name in same)
            and not any(hasattr(kind, name) for name in _SPECIAL)
            and kind not in copyreg.dispatch_table
            and kind.__module__.partition(".")[0] != "shmdist"
        )
    return plain


_SPECIAL = ("__setstate__", "__getnewargs__", "__getnewargs_ex__", "__slots__", "__getattr__", "__del__")


def _is_plain_array(value: Any) -> bool:
    """Return whether to copy a value is to copy the memory of an array, which is not a shared one."""
    kind = type(value)
    if kind.__module__ != "numpy" or kind.__name__ != "ndarray" or value.dtype.hasobject:
        return False
    return arrays.find_shared is None or arrays.find_shared(*arrays.extent(value)) is None


def as_of_now_here(element: Any) -> Any:
    """Return an element for a thread of this process: containers and arrays as they are now.

    Any other object stays what it is, for threads may be there to work on the program's own objects.
    """
    kind = type(element)
    if kind is tuple:
        return tuple(map(as_of_now_here, element))
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    if kind in _CONTAINERS or (ndarray is not None and issubclass(kind, ndarray)):
        return as_of_now(element)
    return element


__all__ = [
    "as_of_now",
    "as_of_now_here",
    "is_array",
    "is_channel",
    "is_live",
    "is_sequence",
    "known_length",
]
