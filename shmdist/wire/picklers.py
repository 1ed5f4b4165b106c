"""The picklers: which object is sent how, and where large buffers go.

The C pickler does the work.  Two picklers share their rules: the plain one, and cloudpickle's
for what can only go by value (functions and classes of ``__main__``, lambdas, closures).  The
plain one stops when it meets such an object.
"""

from __future__ import annotations

import marshal
import os
import pickle
import sys
import threading
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from shmdist.errors import reduce_exception
from shmdist.wire import decorated
from shmdist.wire.arrays import INLINE, reduce_array, reduce_masked
from shmdist.wire.generators import GENERATORS, reduce_generator
from shmdist.wire.messages import BY_NAME, BY_VALUE

#: Types with a reducer of ours: type -> callable(object, pickler) -> reduce value.
#: ``refs`` enters its types here.
reducers: dict[type, Callable[[Any, Any], Any]] = {}

MAIN = decorated.MAIN
FUNCTIONS = frozenset({FunctionType, type(len)})


class Payload:
    """A pickled object: the body's parts, the buffers beside it, the references in it.

    Attributes
    ----------
    buffers : list
        Contiguous bytes where they lie, and sources (``wire.arrays``) in the place of such.
    spread : dict or None
        A dict when the payload goes to several receivers: then a buffer is copied into a
        block once, whose hold is kept here by the buffer's number; and so are its copies on
        other hosts (``runtime.copies``).
    known : object or None
        Finds a block that has the bytes of a buffer already (``repeats.Repeated``).
    """

    __slots__ = ("buffers", "known", "parts", "refs", "sources", "spread", "write")
    flags = 0  # of its frame, besides those that its sender sets
    is_short = False

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.write = self.parts.append  # what the pickler calls
        self.buffers: list[Any] = []
        self.refs: list[Any] = []
        self.sources: dict[int, Any] = {}  # on their way to `buffers`; by id of what stands in for them
        self.spread: dict[Any, Any] | None = None
        self.known: Any = None

    def keep_out(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of the stream when it is large; true leaves it there."""
        raw = buffer.raw()
        if self.sources:
            source = self.sources.pop(id(raw.obj), None)
            if source is not None:
                self.buffers.append(source[0])
                return False
        if raw.nbytes < INLINE:
            return True
        self.buffers.append(raw)
        return False

    def nbytes(self) -> int:
        """Return the size of body and buffers in bytes."""
        return sum(map(len, self.parts)) + sum(map(len, self.buffers))


class Short(Payload):
    """A payload that is a body in one piece, without buffers and references: made in no time."""

    __slots__ = ()
    buffers: Any = ()
    refs: Any = ()
    spread = None
    known = None
    is_short = True

    def __init__(self, body: bytes) -> None:
        self.parts = [body]


class Named(Short):
    """The payload of a call by name (``wire.names``)."""

    __slots__ = ()
    flags = BY_NAME


class Valued(Short):
    """The payload of a call of a function by value (``wire.values``)."""

    __slots__ = ()
    flags = BY_VALUE


class _ByValue(Exception):
    """The plain pickler met something that must go by value."""


class PlainPickler(pickle.Pickler):
    """The plain pickler."""

    payload: Payload
    in_band = False  # it has no callback for buffers

    def reducer_override(self, obj: Any) -> Any:
        """Decide about one object that is not of a built-in type."""
        kind = type(obj)
        if kind is FunctionType or kind is type:
            if obj.__module__ in MAIN:
                raise _ByValue
            return NotImplemented
        reducer = reducers.get(kind)
        if reducer is not None:
            return reducer(obj, self)
        if kind in _ordinary or kind in FUNCTIONS:
            return NotImplemented
        return _reduce_rare(obj, kind, self)


def _environ() -> Any:
    """Return this process's environment."""
    return os.environ


#: The environment goes by name: ``remotecall(os.environ.get, 2, "HOME")`` asks process 2's,
#: and what stands in ours, secrets among it, stays here.
reducers[type(os.environ)] = lambda environ, _pickler: (
    (_environ, ()) if environ is os.environ else environ.__reduce_ex__(5)
)
reducers[decorated.CACHED] = decorated.reduce_cached
reducers[decorated.cached_property] = decorated.reduce_property


#: Types seen about which we have nothing to say; kept short, for it keeps them alive.
_ordinary: set[type] = set()


def _reduce_rare(obj: Any, kind: type, pickler: Any) -> Any:
    """Reduce what needs a word of ours but has no entry in `reducers`."""
    # The type itself is asked, for a proxy may give itself out for something else.
    if issubclass(kind, type):
        if obj.__module__ in MAIN:
            raise _ByValue
        return NotImplemented
    if issubclass(kind, BaseException):
        return reduce_exception(obj)
    if kind.__name__ in GENERATORS:
        return reduce_generator(obj)
    if issubclass(kind, decorated.cached_property):
        return decorated.reduce_property(obj)
    numpy = sys.modules.get("numpy")
    ndarray = getattr(numpy, "ndarray", None)
    if ndarray is not None and issubclass(kind, ndarray):
        if kind is ndarray:
            reducers[ndarray] = reduce_array
        elif kind.__name__ == "MaskedArray" and kind.__module__.startswith("numpy."):
            return reduce_masked(obj, pickler)
        return reduce_array(obj, pickler)
    if len(_ordinary) > 1000:
        _ordinary.clear()
    _ordinary.add(kind)
    return NotImplemented


_cloud_class: Any = None
_cloud_lock = threading.Lock()  # guards the making of `_cloud_class`


def cloud_pickler() -> Any:
    """Return the by-value pickler's class; cloudpickle is imported on first need."""
    global _cloud_class
    with _cloud_lock:
        if _cloud_class is None:
            import cloudpickle

            class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped base
                """cloudpickle's pickler with our reducers in front."""

                payload: Payload
                in_band = False

                def reducer_override(self, obj: Any) -> Any:
                    """Decide about one object: ours first, cloudpickle's then."""
                    kind = type(obj)
                    reducer = reducers.get(kind)
                    if reducer is not None:
                        return reducer(obj, self)
                    if kind is CodeType:
                        return _reduce_code(obj)
                    if kind is FunctionType:
                        reduced = decorated.reduce_dispatcher(obj, super().reducer_override(obj))
                        return _with_receivers_globals(obj, reduced)
                    if isinstance(obj, type):
                        return super().reducer_override(obj)
                    value = _reduce_rare(obj, kind, self)
                    if value is NotImplemented:
                        return super().reducer_override(obj)
                    return value

            _cloud_class = CloudPickler
    return _cloud_class


def _reduce_code(code: CodeType) -> Any:
    """Reduce the code of a function that goes by value.

    cloudpickle puts another file name in from 3.1.3 on, and then a traceback made where the code
    runs shows neither file nor line. Python's own way of storing code keeps both, for the
    functions inside it as well; both sides run the same Python, as cloudpickle needs it too.
    """
    try:
        return marshal.loads, (marshal.dumps(code),)
    except ValueError:  # somebody put a constant in that no compiler makes
        return NotImplemented


def _with_receivers_globals(function: Any, reduced: Any) -> Any:
    """Let a function by value find names that only the receiver's ``__main__`` has.

    cloudpickle takes the globals along that exist here.  The others are bound where the
    function arrives, as a name set there by ``everywhere`` or ``remotecall_eval``.
    """
    if not isinstance(reduced, tuple) or len(reduced) != 6 or function.__module__ not in MAIN:
        return reduced
    here = function.__globals__
    missing = tuple(name for name in _global_names(function.__code__) if name not in here)
    if not missing:
        return reduced
    return (*reduced[:2], (reduced[2], reduced[5], missing), *reduced[3:5], _bind_globals)


def _global_names(code: Any) -> set[str]:
    """Return the names that `code`, and the functions inside it, may look up as globals."""
    import builtins

    names = {name for name in code.co_names if not hasattr(builtins, name)}
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _global_names(constant)
    return names


def _bind_globals(function: Any, state: Any) -> None:
    """Set the state of an arriving function, then bind what only this process has."""
    inner, setter, missing = state
    setter(function, inner)
    main = sys.modules["__main__"].__dict__
    for name in missing:
        if name in main:
            function.__globals__.setdefault(name, main[name])
