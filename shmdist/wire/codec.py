"""Objects to frames and back: pickle protocol 5, with large buffers out of band.

What is written
---------------
The C pickler does the work.  Two picklers share their rules: the plain one, and
cloudpickle's for what can only go by value (functions and classes of ``__main__``,
lambdas, closures).  The plain one is tried first; meeting such an object it stops, and
the other starts over.  Both stop before the first byte is on its way, so an object that
cannot be sent costs nothing but its error.

Buffers of `INLINE` bytes and more leave the pickle stream and are written to the socket
from where they lie.  Shared memory will hook in at :func:`_keep_out`: what decides there
between the stream and a block is told the buffer and can answer with a token.

References
----------
A reference (Future, RemoteChannel) inside an object is noted in ``Payload.refs`` while it
is pickled, and the whole list goes with the frame: its receiver can then give back the
counts of references that it never came to make, when it cannot read the body.

Arrays that may not be written to (``writeable=False``) arrive writable: what is received
is a copy, and flags that depend on size or road would be a trap.
"""

from __future__ import annotations

import marshal
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from shmdist.errors import SerializationError, reduce_exception
from shmdist.wire.arrays import INLINE, reduce_array
from shmdist.wire.generators import GENERATORS, reduce_generator
from shmdist.wire.messages import HAS_REFS, HEADER, Frame

if TYPE_CHECKING:
    from shmdist.wire.link import Part

#: Frames up to this size, in bytes, are joined into one piece before they are written.
_JOIN = 1 << 14

#: Types with a reducer of ours: type -> callable(object, pickler) -> reduce value.
#: ``refs`` enters its types here.
reducers: dict[type, Callable[[Any, Any], Any]] = {}

_MAIN = frozenset({"__main__", "__mp_main__"})


class Payload:
    """A pickled object: the body's parts, the buffers beside it, the references in it."""

    __slots__ = ("buffers", "parts", "refs", "write")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.write = self.parts.append  # what the pickler calls
        self.buffers: list[Any] = []
        self.refs: list[Any] = []

    def keep_out(self, buffer: pickle.PickleBuffer) -> bool:
        """Take a buffer out of the stream when it is large; true leaves it there."""
        raw = buffer.raw()
        if raw.nbytes < INLINE:
            return True
        self.buffers.append(raw)
        return False

    def nbytes(self) -> int:
        """Return the size of body and buffers in bytes."""
        return sum(map(len, self.parts)) + sum(map(len, self.buffers))


class _ByValue(Exception):
    """The plain pickler met something that must go by value."""


class _Pickler(pickle.Pickler):
    """The plain pickler."""

    payload: Payload

    def reducer_override(self, obj: Any) -> Any:
        """Decide about one object that is not of a built-in type."""
        kind = type(obj)
        if kind is FunctionType or kind is type:
            if obj.__module__ in _MAIN:
                raise _ByValue
            return NotImplemented
        reducer = reducers.get(kind)
        if reducer is not None:
            return reducer(obj, self)
        if kind in _FUNCTIONS:
            return NotImplemented
        return _reduce_rare(obj, kind)


def _environ() -> Any:
    """Return this process's environment."""
    return os.environ


#: The environment goes by name: ``remotecall(os.environ.get, 2, "HOME")`` asks process 2's,
#: and what stands in ours, secrets among it, stays here.
reducers[type(os.environ)] = lambda environ, _pickler: (
    (_environ, ()) if environ is os.environ else environ.__reduce_ex__(5)
)


def _reduce_rare(obj: Any, kind: type) -> Any:
    """Reduce what needs a word of ours but has no entry in `reducers`."""
    # The type itself is asked, for a proxy may give itself out for something else.
    if issubclass(kind, type):
        if obj.__module__ in _MAIN:
            raise _ByValue
        return NotImplemented
    if issubclass(kind, BaseException):
        return reduce_exception(obj)
    if kind.__name__ in GENERATORS:
        return reduce_generator(obj)
    numpy = sys.modules.get("numpy")
    ndarray = getattr(numpy, "ndarray", None)
    if ndarray is not None and issubclass(kind, ndarray):
        if kind is ndarray:
            reducers[ndarray] = reduce_array
        return reduce_array(obj, None)
    return NotImplemented


_cloud_class: Any = None
_cloud_lock = threading.Lock()  # guards the making of `_cloud_class`


def _cloud_pickler() -> Any:
    """Return the by-value pickler's class; cloudpickle is imported on first need."""
    global _cloud_class
    with _cloud_lock:
        if _cloud_class is None:
            import cloudpickle

            class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped base
                """cloudpickle's pickler with our reducers in front."""

                payload: Payload

                def reducer_override(self, obj: Any) -> Any:
                    """Decide about one object: ours first, cloudpickle's then."""
                    kind = type(obj)
                    reducer = reducers.get(kind)
                    if reducer is not None:
                        return reducer(obj, self)
                    if kind is CodeType:
                        return _reduce_code(obj)
                    if kind is FunctionType:
                        return _with_receivers_globals(obj, super().reducer_override(obj))
                    if isinstance(obj, type):
                        return super().reducer_override(obj)
                    value = _reduce_rare(obj, kind)
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
    if not isinstance(reduced, tuple) or len(reduced) != 6 or function.__module__ not in _MAIN:
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


#: Types that no rule of ours concerns: the fastest pickler will do for them.
_ATOMS = frozenset({int, float, str, type(None), bool, bytes, complex})
_SMALL = 1 << 12  # characters or bytes of an atom that go this way
#: Functions seen to be importable by name. A function that is not any more (its module was
#: reloaded, say) makes the pickler fail, and then the ordinary way is gone.
#: No others are noted: a closure would be kept alive here, and what it captures.
_by_name: set[Any] = set()
_NOTHING = pickle.dumps(None, 5)


def dumps_call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
    """Pickle a call; errors as those of :func:`dumps`."""
    if not kwargs and len(args) < 8 and f.__class__ in _FUNCTIONS:
        for value in args:
            if type(value) not in _ATOMS or (type(value) in _SIZED and len(value) > _SMALL):
                break
        else:
            if f in _by_name or _note_function(f):
                try:
                    payload = Payload()
                    payload.parts.append(pickle.dumps((f, args, kwargs), 5))
                    return payload
                except Exception:
                    _by_name.discard(f)
    return dumps((f, args, kwargs), "the call")


_FUNCTIONS = frozenset({FunctionType, type(len)})
_SIZED = frozenset({str, bytes})


def _note_function(f: Any) -> bool:
    """Tell whether `f` can be sent by name, and note it if so."""
    module = sys.modules.get(f.__module__ or "")
    known = f.__module__ not in _MAIN and getattr(module, f.__qualname__, None) is f
    if known:
        if len(_by_name) > 1000:
            _by_name.clear()  # it keeps the functions alive, so it is kept short
        _by_name.add(f)
    return known


def dumps_arguments(arguments: Any, value: Any) -> Payload:
    """Pickle `arguments`, in which only `value` may be no plain number or short text."""
    kind = type(value)
    if kind in _ATOMS and (kind not in _SIZED or len(value) < _SMALL):
        payload = Payload()
        payload.parts.append(pickle.dumps(arguments, 5))
        return payload
    return dumps(arguments, "the element")


def dumps_value(value: Any, what: str) -> Payload:
    """Pickle a result; errors as those of :func:`dumps`."""
    kind = type(value)
    if kind in _ATOMS and (kind not in _SIZED or len(value) < _SMALL):
        payload = Payload()
        payload.parts.append(_NOTHING if value is None else pickle.dumps(value, 5))
        return payload
    return dumps(value, what)


def dumps(obj: Any, what: str = "the object") -> Payload:
    """Pickle `obj` whole.

    Parameters
    ----------
    obj : object
        Anything.  Its buffers are not copied: they must not change until the payload
        is written.
    what : str
        What it is, for the error's text.

    Raises
    ------
    SerializationError
        It holds something that cannot be sent; the text names the path to it.
    """
    payload = Payload()
    try:
        pickler = _Pickler(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
        return payload
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        # By value, then: a function of __main__, a lambda (whose lookup by name fails), or
        # something that cannot be pickled at all, which the second pickler will find as well.
        pass
    return _dumps_by_value(obj, what)


def _dumps_by_value(obj: Any, what: str) -> Payload:
    payload = Payload()
    try:
        pickler = _cloud_pickler()(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        from shmdist.wire.culprit import explain

        raise explain(obj, what, error, _can_pickle) from error
    return payload


def pickle_whole(obj: Any) -> bytes:
    """Pickle `obj` by value into one piece, buffers in it; references in it come out inert.

    Raises
    ------
    Exception
        Whatever pickling raises.
    """
    payload = Payload()
    pickler = _cloud_pickler()(payload, 5)
    pickler.payload = None
    pickler.dump(obj)
    return b"".join(payload.parts)


def _can_pickle(obj: Any) -> BaseException | None:
    """Return the error of pickling `obj`, None when it can be sent."""
    payload = Payload()
    try:
        pickler = _cloud_pickler()(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error
    return None


def frame(kind: int, flags: int, lane: int, call_id: int, payload: Payload | None) -> list[Part]:
    """Return the parts of a frame, ready to be written in order."""
    if payload is None:
        return [HEADER.pack(kind, flags, 0, lane, 0, call_id, 0)]
    parts = payload.parts
    buffers = payload.buffers
    if not buffers and not payload.refs:
        if len(parts) == 1:
            body = parts[0]
            size = len(body)
            header = HEADER.pack(kind, flags, 0, lane, 0, call_id, size)
            return [header + body] if size <= _JOIN else [header, body]
        size = sum(map(len, parts))
        header = HEADER.pack(kind, flags, 0, lane, 0, call_id, size)
        return [header, *parts]
    if payload.refs:
        flags |= HAS_REFS
        buffers = [pickle.dumps(tuple(payload.refs), 5), *buffers]
    sizes = [len(buffer) for buffer in buffers]
    header = HEADER.pack(kind, flags, 0, lane, len(sizes), call_id, sum(map(len, parts)))
    table = b"".join(size.to_bytes(8, "little") for size in sizes)
    return [header, table, *parts, *buffers]


class _Loading(threading.local):
    """The references made by the load that this thread is in, when it keeps count."""

    made: Counter[Any] | None = None


_loading = _Loading()


def note_made(key: Any) -> None:
    """Note that a reference came to be out of the pickle that this thread reads."""
    if _loading.made is not None:
        _loading.made[key] += 1


_numpy_ready = False


def prepare(body: bytes | bytearray) -> None:
    """Import numpy before a body is read that names it.

    Two threads that come to different parts of numpy first, each through a pickle, can see
    it half imported. Importing the whole first makes one wait for the other.
    """
    global _numpy_ready
    if not _numpy_ready and (b"numpy._core" in body or b"numpy.core" in body):
        try:
            import numpy  # noqa: F401 - for its being there
        except ImportError:
            return  # the body's own error will say so
        _numpy_ready = True


def loads(frame: Frame, give_back: Callable[[list[Any]], None]) -> Any:
    """Read the body of `frame`.

    Parameters
    ----------
    frame : Frame
        Its buffers become part of what is returned.
    give_back : callable
        Called with the references of the frame that were not made out of it, because
        the body could not be read to its end.

    Raises
    ------
    Exception
        Whatever reading the body raises: it runs the code of the objects' classes.
    """
    prepare(frame.body)
    if not frame.flags & HAS_REFS:
        if frame.buffers:
            return pickle.loads(frame.body, buffers=frame.buffers)
        return pickle.loads(frame.body)
    refs = references(frame)
    outer, _loading.made = _loading.made, Counter()
    try:
        return pickle.loads(frame.body, buffers=frame.buffers[1:])
    finally:
        made, _loading.made = _loading.made, outer
        lost = []
        for ref in refs:
            if made[ref]:
                made[ref] -= 1
            else:
                lost.append(ref)
        if lost:
            give_back(lost)


def references(frame: Frame) -> tuple[Any, ...]:
    """Return the references that travel in `frame`, without reading its body."""
    if not frame.flags & HAS_REFS:
        return ()
    refs: tuple[Any, ...] = pickle.loads(frame.buffers[0])
    return refs


def unreadable(error: BaseException, what: str) -> SerializationError:
    """Return the error that says that a body cannot be read here, and what helps."""
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = (
            f"; module {error.name!r} cannot be imported by {sys.executable}: install it there, "
            f"or check sys.path with remotecall_fetch"
        )
    return SerializationError(f"{what} could not be unpickled: {type(error).__name__}: {error}{hint}")


__all__ = [
    "INLINE",
    "Payload",
    "dumps",
    "dumps_arguments",
    "dumps_call",
    "dumps_value",
    "frame",
    "loads",
    "note_made",
    "pickle_whole",
    "reducers",
    "references",
    "unreadable",
]
