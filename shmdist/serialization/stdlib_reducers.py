"""Reducers for what the decorators of `functools` make of functions that travel by value.

Pickle finds a cached function by its name, which a worker's ``__main__`` has not; a cached property
holds a lock, and functions and methods with ``singledispatch`` hold weak references. So they are made anew
where they arrive, of what they were made of. Their caches begin empty there.

Each is made before its function's globals are, for those may lead back to it, as in a cached
function that calls itself. What it has of its function (name, text) is therefore set afterwards.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from functools import cached_property, singledispatchmethod
from types import CellType, FunctionType
from typing import Any

from shmdist.serialization.modules import goes_by_value

CACHED: Any = functools._lru_cache_wrapper
_make: Any = functools.singledispatch
_DISPATCHER = _make(len).__code__  # of all that it makes
_METHOD = getattr(singledispatchmethod(len).__get__(None), "__code__", None)  # of all that it binds
_CACHE = "_method_cache"  # of the methods that it has bound, by object: Python 3.13 has one
#: Their attributes that lead to their insides; ``functools.wraps`` hands them on.
_INSIDES = ("register", "dispatch", "registry", "_clear_cache")


def is_importable(thing: Any, otherwise: str = "") -> bool:
    """Return whether a thing is found under its name, in a module that other processes can import.

    The module is `otherwise` for things that do not say in which they are.
    """
    module = getattr(thing, "__module__", None) or otherwise
    found = None if goes_by_value(module) else sys.modules.get(module)
    for step in (getattr(thing, "__qualname__", None) or thing.__name__).split("."):
        found = getattr(found, step, None)
    return found is thing


def reduce_cached(cached: Any, _pickler: Any) -> Any:
    """Reduce what ``lru_cache`` or ``cache`` has made."""
    state = dict(cached.__dict__)
    function = state.get("__wrapped__")
    if function is None or is_importable(cached):
        return NotImplemented
    state.pop("cache_parameters", None)  # a function, which is made with it
    parameters = cached.cache_parameters()
    return _cached, (function, parameters["maxsize"], parameters["typed"]), state, None, None, _set_attributes


def _cached(function: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _set_attributes(thing: Any, state: dict[str, Any]) -> None:
    thing.__dict__.update(state)


def reduce_property(made: Any, _pickler: Any = None) -> Any:
    """Reduce a ``cached_property``, also of a class derived from it."""
    state = made.__dict__
    if "lock" not in state:  # Python has none from 3.12 on
        return NotImplemented
    return _property, (type(made),), {name: state[name] for name in state if name != "lock"}


def _property(kind: Any) -> Any:
    made = kind.__new__(kind)
    made.lock = threading.RLock()
    return made


def reduce_method(made: Any, _pickler: Any = None) -> Any:
    """Reduce a ``singledispatchmethod``, also of a class derived from it."""
    state = made.__dict__
    if state.get(_CACHE) is None:
        return NotImplemented
    return _method, (type(made),), {name: state[name] for name in state if name != _CACHE}


def _method(kind: Any) -> Any:
    made = kind.__new__(kind)
    setattr(made, _CACHE, weakref.WeakKeyDictionary())
    return made


class _Dispatch:
    """How a bound ``singledispatchmethod`` finds functions by type, looked up when it is called."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __call__(self, kind: type) -> Any:
        return self.method.dispatcher.dispatch(kind)


def cells(function: Any) -> tuple[Any, ...]:
    """Return the cells of what a function captures, as they are sent."""
    found = function.__closure__ or ()
    if function.__code__ is not _METHOD:
        return found
    # Python 3.13 captures a function within the dispatcher; it captured the method itself before.
    return tuple(
        CellType(_Dispatch(function.register.__self__)) if name == "dispatch" else cell
        for name, cell in zip(_METHOD.co_freevars, found, strict=True)
    )


def reduce_dispatcher(function: Any, reduced: Any) -> Any:
    """Reduce a function or a bound method with ``singledispatch``, or what wraps such a function.

    Parameters
    ----------
    function : function
        Any.
    reduced : tuple or NotImplemented
        What cloudpickle makes of it.
    """
    if type(reduced) is not tuple or len(reduced) != 6:
        return reduced
    if function.__code__ is _METHOD:
        reduced[2][1]["__closure__"] = cells(function)
        return reduced
    if "_clear_cache" not in function.__dict__:
        return reduced
    inner = _dispatcher_in(function)
    if inner is None:
        return reduced
    own = {name: value for name, value in function.__dict__.items() if name not in _INSIDES}
    if inner is function:
        names = {name: getattr(function, name, None) for name in functools.WRAPPER_ASSIGNMENTS}
        state = dict(function.registry), names, own
        return _dispatcher, (function.__name__,), state, None, None, _fill_dispatcher
    make, arguments, (_, slots), _, _, setter = reduced
    return make, arguments, ((own, slots), setter, inner), None, None, _fill_wrapper


def _dispatcher_in(function: Any) -> Any:
    """Return what ``singledispatch`` has made that a function wraps, or is; None when there is none."""
    seen = set()
    while type(function) is FunctionType and id(function) not in seen:
        if function.__code__ is _DISPATCHER:
            return function
        seen.add(id(function))
        function = function.__dict__.get("__wrapped__")
    return None


def _dispatcher(name: str) -> Any:
    def nothing(_: Any) -> None:
        pass

    nothing.__name__ = name  # for the text of its error
    return _make(nothing)


def _fill_dispatcher(function: Any, state: Any) -> None:
    registry, names, own = state
    for kind, implementation in registry.items():
        function.register(kind, implementation)
    for name, value in names.items():
        setattr(function, name, value)
    function.__dict__.update(own)


def _fill_wrapper(function: Any, state: Any) -> None:
    reduced, setter, inner = state
    setter(function, reduced)
    function.__dict__.update({name: getattr(inner, name) for name in _INSIDES if hasattr(inner, name)})


def implementations(function: Any) -> dict[Any, Any]:
    """Return the functions by type behind a function that ``singledispatch`` has made; none for others."""
    return dict(function.registry) if function.__code__ is _DISPATCHER else {}


__all__ = [
    "CACHED",
    "cached_property",
    "cells",
    "implementations",
    "is_importable",
    "reduce_cached",
    "reduce_dispatcher",
    "reduce_method",
    "reduce_property",
    "singledispatchmethod",
]
