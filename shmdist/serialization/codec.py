"""Objects to frames and back: pickle protocol 5, with large buffers out of band.

What is written
---------------
The C pickler does the work.  Two picklers share their rules: the plain one, and
cloudpickle's for what can only go by value (functions and classes of ``__main__``,
lambdas, closures).  The plain one is tried first; meeting such an object it stops, and
the other starts over.  Both stop before the first byte is on its way, so an object that
cannot be sent costs nothing but its error.  The function of a call is seldom pickled:
``serialization.function_names`` and ``serialization.pickled_functions`` know those that were called before.

Buffers of `INLINE` bytes and more leave the pickle stream.  What becomes of them is decided
when a frame is made of the payload (:func:`frame`), for a payload may go to several receivers:
large ones go through a block of shared memory to a process of this host, all others are
written to the socket from where they lie.  So does a large body.

References
----------
A reference (Future, RemoteChannel) inside an object is noted in ``Payload.refs`` while it
is pickled, and the whole list goes with the frame: its receiver can then give back the
counts of references that it never came to make, when it cannot read the body.

Arrays that may not be written to (``writeable=False``) arrive writable: what is received
is a copy, and flags that depend on size or path would be a trap.
"""

from __future__ import annotations

import marshal
import pickle
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shmdist._firmly import firmly
from shmdist._signals import is_interruption
from shmdist.errors import SerializationError
from shmdist.memory.leases import LeaseHandle
from shmdist.serialization import arrays, atoms, function_names, pickled_functions
from shmdist.serialization.arrays import INLINE, contiguous
from shmdist.serialization.atoms import ATOMS, FORMAT
from shmdist.serialization.pickler import (
    FUNCTIONS,
    InlinePayload,
    Named,
    Payload,
    PlainPickler,
    Trial,
    Valued,
    cloud_pickler,
    reducers,
)
from shmdist.transport.messages import (
    BODY_LAST,
    HAS_REFS,
    HEADER,
    IN_BLOCK,
    Arrived,
    BlockRef,
    Frame,
    OutgoingFrames,
)

if TYPE_CHECKING:
    from shmdist.transport.link import Link

#: Frames up to this size, in bytes, are joined into one piece before they are written.
_JOIN = 1 << 14
_BLOCK_BODY_BYTES = 1 << 18  # of a body from which on a block is worth asking for

_SMALL_ATOM_BYTES = 1 << 12  # of an atom that go this way


def dumps_call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
    """Pickle a call; errors as those of :func:`dumps`."""
    if not kwargs and len(args) < 8 and f.__class__ in FUNCTIONS:
        apart: list[Any] | None = None  # what `arrays.rebuild_arguments` is told; only atoms so far
        for index, value in enumerate(args):
            kind = type(value)
            if kind not in ATOMS:
                # One array at most: two may be the same, and are one where they arrive as well.
                if kind is not arrays.ndarray or apart is not None:
                    break
                letters = arrays.small_array_dtype(value)
                if letters is None:
                    break
                apart = [(*args[:index], *args[index + 1 :]), index, value.shape, letters, value.nbytes]
            elif kind in _SIZED and len(value) > _SMALL_ATOM_BYTES:
                break
        else:
            made: type[InlinePayload] = Named
            head = function_names.head(f)
            if head is None:
                value = pickled_functions.kept(f)
                if value is None:
                    return dumps((f, args, kwargs), "the call")
                head, made = value.head, Valued
            if apart is None:
                return made(head + marshal.dumps(args, FORMAT))
            return made(b"".join((head, marshal.dumps(apart, FORMAT), args[apart[1]])))
    value = pickled_functions.kept(f)
    # What goes by value in the arguments may be the function, or be used by it: then all goes as one.
    payload = None if value is None else dumps_plainly((value, args, kwargs))
    return dumps((f, args, kwargs), "the call") if payload is None else payload


_SIZED = frozenset({str, bytes})


def dumps_arguments(arguments: Any, value: Any) -> Payload:
    """Pickle `arguments`, in which only `value` may be no plain number or short text."""
    kind = type(value)
    if kind in ATOMS and (kind not in _SIZED or len(value) < _SMALL_ATOM_BYTES):
        return InlinePayload(pickle.dumps(arguments, 5))
    return dumps(arguments, "the element")


def dumps_value(value: Any, function: Any) -> Payload:
    """Pickle the result of a function; errors as those of :func:`dumps`."""
    kind = type(value)
    if kind in ATOMS and (kind not in _SIZED or len(value) < _SMALL_ATOM_BYTES):
        return InlinePayload(marshal.dumps(value, FORMAT))
    if kind is arrays.ndarray and arrays.small_array_dtype(value) is not None:
        return InlinePayload(pickle.dumps(arrays.SmallArray(value), 5))
    payload = dumps(value, getattr(function, "__qualname__", "the function"))
    parts = payload.parts
    if len(parts) == 1 and len(parts[0]) <= _JOIN and not (payload.buffers or payload.refs or payload.flags):
        return InlinePayload(parts[0])  # which is sent with less ado
    return payload


def dumps(obj: Any, what: str = "the object", at: str = "") -> Payload:
    """Pickle `obj` whole.

    Parameters
    ----------
    obj : object
        Anything.  Its buffers are not copied: they must not change until the payload
        is written.
    what : str
        What it is, for the error's text.
    at : str
        How the path to a part of it begins.

    Raises
    ------
    SerializationError
        It holds something that cannot be sent; the text names the path to it.
    """
    payload = dumps_plainly(obj)
    return _dumps_by_value(obj, what, at) if payload is None else payload


def dumps_plainly(obj: Any) -> Payload | None:
    """Pickle `obj`; None when that cannot be."""
    payload = Payload()
    try:
        pickler = PlainPickler(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
        return payload
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        # By value, then: a function of __main__, a lambda (whose lookup by name fails), or
        # something that cannot be pickled at all, which the second pickler will find as well.
        return None


def is_simple(value: Any) -> bool:
    """Return whether it goes without saying that `value` can be pickled."""
    return type(value) in ATOMS or arrays.is_plain(value)


def can_send(obj: Any) -> bool:
    """Return whether `obj` can be pickled, by doing it; what is written is kept by nobody."""
    payload = Trial()
    payload.write = _forget
    try:
        pickler = PlainPickler(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
        return True
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        return _can_pickle(obj) is None


def _forget(piece: Any) -> None:
    """Stand in for writing."""


def pickled(what: Any) -> Payload:
    """Pickle what the runtime itself sends: plain tuples and numbers."""
    payload = Payload()
    payload.parts.append(pickle.dumps(what, 5))
    return payload


def _dumps_by_value(obj: Any, what: str, at: str) -> Payload:
    payload = Payload()
    try:
        pickler = cloud_pickler()(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if is_interruption(error):
            raise
        from shmdist.serialization.diagnosis import explain

        raise explain(obj, what, error, _can_pickle, at) from error
    return payload


def pickle_whole(obj: Any, *, by_name: bool = True) -> bytes:
    """Pickle `obj` by value into one piece, buffers in it; references in it come out inert.

    What ``everywhere`` has defined goes by value as well, unless `by_name`.

    Raises
    ------
    Exception
        Whatever pickling raises.
    """
    payload = Payload()
    pickler = cloud_pickler()(payload, 5)
    pickler.payload = None
    pickler.by_name = by_name
    pickler.dump(obj)
    return b"".join(payload.parts)


def _can_pickle(obj: Any) -> BaseException | None:
    """Return the error of pickling `obj`, None when it can be sent."""
    payload = Trial()
    try:
        pickler = cloud_pickler()(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(obj)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error
    return None


def frame(
    kind: int,
    flags: int,
    lane: int,
    call_id: int,
    payload: Payload | None,
    link: Link | None = None,
    done: OutgoingFrames | None = None,
) -> OutgoingFrames:
    """Return the parts of a frame, ready to be written in order.

    Parameters
    ----------
    kind, flags, lane, call_id : int
        As in the header.
    payload : Payload or None
        The body, and what is beside it.
    link : Link, optional
        By which it will go: then large buffers may go through blocks. Who does not write the
        frame must take back what was granted for it (``BlockCounts.take_back``).
    done : OutgoingFrames, optional
        Of earlier frames to the same receiver, which this one is appended to. Of no use after an error:
        nothing is granted for them any more.
    """
    if done is None:
        done = OutgoingFrames()
    if payload is None:
        done.append(HEADER.pack(kind, flags, 0, lane, 0, call_id, 0))
        return done
    parts = payload.parts
    flags |= payload.flags
    if payload.is_short and len(parts[0]) <= _JOIN:
        done.append(HEADER.pack(kind, flags, 0, lane, 0, call_id, len(parts[0])) + parts[0])
        return done
    buffers = payload.buffers
    size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
    if buffers or size >= _BLOCK_BODY_BYTES:
        if link is not None and link.sharing is not None:
            sharing = link.sharing
            try:
                buffers, in_block = sharing.place(payload, size, link.pid, done)
                if in_block:
                    flags |= BODY_LAST
                    parts, size = [], 0
                return _assemble(kind, flags, lane, call_id, payload, parts, size, buffers, done)
            except BaseException:
                sharing.revoke(done, payload, link.pid)
                raise
        if buffers:
            buffers = [contiguous(buffer) for buffer in buffers]
    return _assemble(kind, flags, lane, call_id, payload, parts, size, buffers, done)


def _assemble(
    kind: int,
    flags: int,
    lane: int,
    call_id: int,
    payload: Payload,
    parts: list[Any],
    size: int,
    buffers: list[Any],
    done: OutgoingFrames,
) -> OutgoingFrames:
    """Put the parts of a frame into `done`, and return it."""
    if payload.refs:
        flags |= HAS_REFS
        buffers = [pickle.dumps(tuple(map(tuple, payload.refs)), 5), *buffers]
    header = HEADER.pack(kind, flags, 0, lane, len(buffers), call_id, size)
    if not buffers:
        if len(parts) == 1 and size <= _JOIN:
            done.append(header + parts[0])
        else:
            done.append(header)
            done += parts
        return done
    table = b"".join(
        [(len(part) | (IN_BLOCK * (type(part) is BlockRef))).to_bytes(8, "little") for part in buffers]
    )
    done.append(header + table)
    done += parts
    done += buffers
    return done


class _Loading(threading.local):
    """The references made by the load that this thread is in, when it keeps count."""

    made: Counter[Any] | None = None


_loading = _Loading()


def note_created_reference(key: Any) -> None:
    """Note that a reference came to be out of the pickle that this thread reads."""
    if _loading.made is not None:
        _loading.made[key] += 1


_numpy_ready = False
_NUMPY = re.compile(rb"numpy\._?core|" + re.escape(arrays.__name__).encode())
_SHORT_BODY_BYTES = 256  # that are looked through in less time than the question takes whether numpy is there
_SEARCH_BYTES = 1 << 16  # that are looked through at a time
_MAX_NAME_BYTES = 32  # of the names looked for, at most


def prepare(body: bytes | bytearray | memoryview) -> None:
    """Import numpy before a body is read that names it.

    Two threads that come to different parts of numpy first, each through a pickle, can see
    it half imported. Importing the whole first makes one wait for the other.
    """
    global _numpy_ready
    if _numpy_ready:
        return
    short = type(body) is bytes and len(body) < _SHORT_BODY_BYTES
    if short and b"numpy" not in body and b"shmdist" not in body:
        return
    there = sys.modules.get("numpy")
    if there is not None and not getattr(there.__spec__, "_initializing", True):
        _numpy_ready = True  # somebody has imported it, to its end
    elif type(body) is bytes and b"numpy" not in body and b"shmdist" not in body:
        pass
    elif any(map(_NUMPY.search, _pieces_that_may(body))):
        try:
            import numpy  # noqa: F401 - for its being there
        except ImportError:
            return  # the body's own error will say so
        _numpy_ready = True


def _pieces_that_may(body: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """Yield the pieces of a body that may name numpy: to look for either name takes a tenth of the time."""
    view = memoryview(body)
    for start in range(0, len(view), _SEARCH_BYTES):
        piece = bytes(view[start : start + _SEARCH_BYTES + _MAX_NAME_BYTES])
        if b"numpy" in piece or b"shmdist" in piece:
            yield piece


def _open_buffers(frame: Frame) -> tuple[Any, list[Any], LeaseHandle | None]:
    """Return the body of a frame, its buffers, and the hold that the body lies in, if it does."""
    buffers = frame.buffers[1:] if frame.flags & HAS_REFS else frame.buffers
    body, last = frame.body, None
    if frame.flags & BODY_LAST:
        last, buffers = buffers[-1], buffers[:-1]
        body = last if not isinstance(last, LeaseHandle) else last.lease.view()
    prepare(body)
    return body, [memoryview(part.array()) if type(part) is LeaseHandle else part for part in buffers], last


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
    if not frame.flags & HAS_REFS:
        if frame.buffers:
            # The hold of the body lives until the body is read.
            body, buffers, _hold = _open_buffers(frame)
            return pickle.loads(body, buffers=buffers)
        prepare(frame.body)
        return atoms.loads(frame.body)
    refs = references(frame)
    made: Counter[Any] = Counter()
    if type(frame.buffers[0]) is Arrived:
        frame.buffers[0].take()
    outer, _loading.made = _loading.made, made
    try:
        body, buffers, _hold = _open_buffers(frame)
        return pickle.loads(body, buffers=buffers)
    finally:
        _loading.made = outer
        firmly(_give_unmade, refs, made, give_back)


def _give_unmade(refs: tuple[Any, ...], made: Counter[Any], give_back: Callable[[list[Any]], None]) -> None:
    """Give the references of a frame back that were not made out of it."""
    left, lost = dict(made), []
    for ref in refs:
        if left.get(ref):
            left[ref] -= 1
        else:
            lost.append(ref)
    if lost:
        give_back(lost)


def references(frame: Frame) -> tuple[Any, ...]:
    """Return the references that travel in `frame`, without reading its body."""
    if not frame.flags & HAS_REFS:
        return ()
    refs: Any = frame.buffers[0]
    found: tuple[Any, ...] = refs.refs if type(refs) is Arrived else pickle.loads(refs)
    return found


def unreadable(error: BaseException, what: str) -> SerializationError:
    """Return the error that says that a body cannot be read here, and what helps."""
    if is_interruption(error):
        raise error
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
    "can_send",
    "dumps",
    "dumps_arguments",
    "dumps_call",
    "dumps_plainly",
    "dumps_value",
    "frame",
    "is_simple",
    "loads",
    "note_created_reference",
    "pickle_whole",
    "pickled",
    "reducers",
    "references",
    "unreadable",
]
