"""The picklers: which object is sent how, and where large buffers go.

The C pickler does the work.  Two picklers share their rules: the plain one, and cloudpickle's
for what can only go by value (functions and classes of ``__main__``, lambdas, closures).  The
plain one stops when it meets such an object.
"""

from __future__ import annotations

import builtins
import marshal
import os
import pickle
import sys
import threading
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from shmdist.errors import reduce_exception
from shmdist.serialization import definitions, stdlib_reducers
from shmdist.serialization.arrays import INLINE, reduce_array, reduce_masked
from shmdist.serialization.by_value import with_slots, with_submodules
from shmdist.serialization.global_names import global_names
from shmdist.serialization.memoryviews import reduce_memoryview
from shmdist.serialization.modules import MAIN, goes_by_value
from shmdist.serialization.random_generators import GENERATORS, reduce_generator
from shmdist.serialization.unsendable import refuse
from shmdist.transport.messages import BY_NAME, BY_VALUE

#: Types with a reducer of ours: type -> callable(object, pickler) -> reduce value.
#: ``references.remote_channel`` enters its types here.
reducers: dict[type, Callable[[Any, Any], Any]] = {}

FUNCTIONS = frozenset({FunctionType, type(len)})


class Payload:
    """A pickled object: the body's parts, the buffers beside it, the references in it.

    Attributes
    ----------
    buffers : list
        Contiguous bytes where they lie, and sources (``serialization.arrays``) in the place of such.
    spread : dict or None
        A dict when the payload goes to several receivers: then a buffer is copied into a
        block once, whose hold is kept here by the buffer's number; and so are its copies on
        other hosts (``runtime.host_copies``).
    known : object or None
        Finds a block that has the bytes of a buffer already (``repeats.RepeatedArrays``).
    holders : frozenset of int or None
        The processes that can read it, where it has names that others lack (``serialization.definitions``).
    """

    __slots__ = ("buffers", "holders", "known", "parts", "refs", "sources", "spread", "write")
    flags = 0  # of its frame, besides those that its sender sets
    is_short = False
    is_trial = False

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.write = self.parts.append  # what the pickler calls
        self.buffers: list[Any] = []
        self.refs: list[Any] = []
        self.sources: dict[int, Any] = {}  # on their way to `buffers`; by id of what stands in for them
        self.spread: dict[Any, Any] | None = None
        self.known: Any = None
        self.holders: frozenset[int] | None = None

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


class Trial(Payload):
    """A payload that is made only to see whether it can be."""

    __slots__ = ()
    is_trial = True


class InlinePayload(Payload):
    """A payload that is a body in one piece, without buffers and references: made in no time."""

    __slots__ = ()
    buffers: Any = ()
    refs: Any = ()
    spread = None
    known = None
    holders = None
    is_short = True

    def __init__(self, body: bytes) -> None:
        self.parts = [body]


class Named(InlinePayload):
    """The payload of a call by name (``serialization.function_names``)."""

    __slots__ = ()
    flags = BY_NAME


class Valued(InlinePayload):
    """The payload of a call of a function by value (``serialization.pickled_functions``)."""

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
            return _by_name(obj, self) if goes_by_value(obj.__module__) else NotImplemented
        reducer = reducers.get(kind)
        if reducer is not None:
            return reducer(obj, self)
        if kind in _ordinary or kind in FUNCTIONS:
            return NotImplemented
        return _reduce_rare(obj, kind, self)


def _by_name(obj: Any, pickler: Any) -> Any:
    reduced = definitions.reference(obj, pickler.payload)
    if reduced is None:
        raise _ByValue
    return reduced


def _environ() -> Any:
    """Return this process's environment."""
    return os.environ


#: The environment goes by name: ``remotecall(os.environ.get, 2, "HOME")`` asks process 2's,
#: and what stands in ours, secrets among it, stays here.
reducers[type(os.environ)] = lambda environ, _pickler: (
    (_environ, ()) if environ is os.environ else environ.__reduce_ex__(5)
)
reducers[stdlib_reducers.CACHED] = lambda cached, pickler: (
    definitions.reference(cached, pickler.payload) or stdlib_reducers.reduce_cached(cached, pickler)
)
reducers[memoryview] = reduce_memoryview
reducers[stdlib_reducers.cached_property] = stdlib_reducers.reduce_property
reducers[stdlib_reducers.singledispatchmethod] = stdlib_reducers.reduce_method


#: Types seen about which we have nothing to say; kept short, for it keeps them alive.
_ordinary: set[type] = set()


def _reduce_rare(obj: Any, kind: type, pickler: Any) -> Any:
    """Reduce what needs a word of ours but has no entry in `reducers`."""
    # The type itself is asked, for a proxy may give itself out for something else.
    if issubclass(kind, type):
        return _by_name(obj, pickler) if goes_by_value(obj.__module__) else NotImplemented
    if issubclass(kind, BaseException):
        return reduce_exception(obj)
    if kind.__name__ in GENERATORS:
        return reduce_generator(obj)
    if issubclass(kind, stdlib_reducers.cached_property):
        return stdlib_reducers.reduce_property(obj)
    if issubclass(kind, stdlib_reducers.singledispatchmethod):
        return stdlib_reducers.reduce_method(obj)
    numpy = sys.modules.get("numpy")
    ndarray = getattr(numpy, "ndarray", None)
    if ndarray is not None and issubclass(kind, ndarray):
        if kind is ndarray:
            reducers[ndarray] = reduce_array
        elif kind.__name__ == "MaskedArray" and kind.__module__.startswith("numpy."):
            return reduce_masked(obj, pickler)
        return reduce_array(obj, pickler)
    refuse(kind)
    if len(_ordinary) > 1000:
        _ordinary.clear()
    _ordinary.add(kind)
    return NotImplemented


_cloud_class: Any = None
#: Guards the making of `_cloud_class`; a finalizer may come to it once more, and makes the class first.
_cloud_lock = threading.RLock()


def cloud_pickler() -> Any:
    """Return the by-value pickler's class; cloudpickle is imported on first need."""
    global _cloud_class
    with _cloud_lock:
        if _cloud_class is None:
            import cloudpickle

            main = sys.modules["__main__"]
            if main.__name__ == "__mp_main__":  # multiprocessing has started this process
                cloudpickle.register_pickle_by_value(main)

            class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped base
                """cloudpickle's pickler with our reducers in front."""

                payload: Payload
                in_band = False
                by_name = True  # what `everywhere` has defined
                took_along = False  # some of that by value as well
                is_inner = False  # writes what is taken along

                def reducer_override(self, obj: Any) -> Any:
                    """Decide about one object: ours first, cloudpickle's then."""
                    kind = type(obj)
                    if self.by_name and definitions.is_definition(obj):
                        found = definitions.find(obj)
                        if found is not None and (found[0].is_held_by_all() or not self.is_inner):
                            return _reduce_definition(obj, found, self)
                    reducer = reducers.get(kind)
                    if reducer is not None:
                        return reducer(obj, self)
                    if kind is CodeType:
                        return _reduce_code(obj)
                    if kind is FunctionType:
                        reduced = super().reducer_override(obj)
                        if type(reduced) is not tuple or len(reduced) != 6:
                            return reduced
                        names = _choose_globals(obj, reduced[2][1]["__globals__"], self)
                        with_submodules(obj, reduced[2][1])
                        return _with_receivers_globals(stdlib_reducers.reduce_dispatcher(obj, reduced), names)
                    if isinstance(obj, type):
                        return with_slots(obj, super().reducer_override(obj))
                    value = _reduce_rare(obj, kind, self)
                    if value is NotImplemented:
                        return super().reducer_override(obj)
                    return value

                def _function_getnewargs(self, function: Any) -> Any:
                    """Begin a function; those of `__main__` share their globals, as they do here."""
                    if definitions.state_names and self.by_name and function.__module__ in MAIN:
                        live = definitions.LiveGlobals()
                        self.globals_ref.setdefault(id(function.__globals__), live)
                    return super()._function_getnewargs(function)

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


def _reduce_definition(thing: Any, found: tuple[definitions.Definition, str], pickler: Any) -> Any:
    """Reduce what `everywhere` has defined: the name, and the thing where some process lacks it."""
    definition, path = found
    if definition.is_held_by_all():
        definitions.restrict(pickler.payload, definition.holders)
        return definitions.look_up, (definition.name, definition.token, path)
    pickler.took_along = True
    parts = Payload()
    inner = cloud_pickler()(parts, 5)
    inner.payload, inner.in_band, inner.is_inner = pickler.payload, True, True
    inner.dump(thing)
    return definitions.look_up, (definition.name, definition.token, path, b"".join(parts.parts))


def _choose_globals(function: Any, taken: dict[str, Any], pickler: Any) -> tuple[tuple[str, ...], ...]:
    """Choose the globals that a function by value takes along in `taken`.

    cloudpickle takes those that exist here and that the function names, but for the bodies of
    classes in it. Those that `everywhere` has set stay where all processes have their own.

    Returns
    -------
    missing, own : tuple of str
        Names that the receiver may have; and names for which its own goes before what came along.
    """
    here, missing, own = function.__globals__, [], []
    is_of_main = function.__module__ in MAIN
    for name in global_names(function.__code__):
        if name in here:
            value = taken.setdefault(name, here[name])
            definition = definitions.own(name, value) if is_of_main and pickler.by_name else None
            if definition is not None:
                own.append(name)
                if definition.is_held_by_all():
                    definitions.restrict(pickler.payload, definition.holders)
                    del taken[name]
                else:
                    pickler.took_along = True
        elif is_of_main and not hasattr(builtins, name):
            missing.append(name)
    return tuple(missing), tuple(own)


def _with_receivers_globals(reduced: Any, names: tuple[tuple[str, ...], ...]) -> Any:
    """Let a function by value find what the receiver's ``__main__`` has: see `_choose_globals`."""
    if not any(names) or len(reduced) != 6:
        return reduced
    return (*reduced[:2], (reduced[2], reduced[5], *names), *reduced[3:5], _bind_globals)


def _bind_globals(function: Any, state: Any) -> None:
    """Set the state of an arriving function, then bind what this process has."""
    inner, setter, missing, own = state
    setter(function, inner)
    main, there = sys.modules["__main__"].__dict__, function.__globals__
    is_live = type(there) is definitions.LiveGlobals
    for name in own:
        if definitions.is_set(name):
            if is_live:
                there.pop(name, None)
            else:
                there[name] = main[name]
    for name in missing:
        if name in main and not is_live:
            there.setdefault(name, main[name])
