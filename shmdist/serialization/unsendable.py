"""Objects that pickle accepts although they mean nothing in another process.

A `Connection` of multiprocessing is pickled as the bare number of its descriptor. Where it arrives
that number is another file, perhaps a link of the runtime, and the end of the object closes it. A
loaded C library is the address at which it lies here. Those are refused, and so are the locks and queues
of multiprocessing, whose own error speaks of inheritance and of parts that the user has never seen.
"""

from __future__ import annotations

import copyreg

_INHERITED = (
    "multiprocessing shares it with child processes only; use {}, or one of a multiprocessing Manager"
)
_QUEUE = _INHERITED.format("a RemoteChannel")
_LOCK = _INHERITED.format("a RemoteChannel(lambda: Channel(1)) as lock")
_ARRAY = _INHERITED.format("a shared array (shmdist.shared)")

#: By module and name of a type, also of those derived from it: what to do instead.
_REFUSED = {
    ("multiprocessing.connection", "_ConnectionBase"): (
        "it is a descriptor of this process; use a RemoteChannel, or open it on the worker"
    ),
    ("multiprocessing.connection", "Listener"): "it is a socket of this process; open it on the worker",
    ("multiprocessing.queues", "Queue"): _QUEUE,
    ("multiprocessing.queues", "SimpleQueue"): _QUEUE,
    ("multiprocessing.synchronize", "SemLock"): _LOCK,
    ("multiprocessing.synchronize", "Condition"): _LOCK,
    ("multiprocessing.synchronize", "Event"): _LOCK,
    ("multiprocessing.synchronize", "Barrier"): _LOCK,
    ("multiprocessing.sharedctypes", "SynchronizedBase"): _ARRAY,
    ("shmdist", "Channel"): (
        "it is for the threads of one process; use RemoteChannel(lambda: Channel(n)), which all can use"
    ),
    ("ctypes", "CDLL"): "it is a library loaded into this process; load it on the worker",
}


class Unsendable(TypeError):
    """An object of a type that means nothing in another process."""


def refusal(kind: type) -> str | None:
    """Return why the objects of a type cannot be sent, and what to do; None for most types."""
    for base in kind.__mro__:
        hint = _REFUSED.get((base.__module__, base.__qualname__))
        if hint is not None:
            # Unless it says itself how to pickle them.
            own = kind in copyreg.dispatch_table or _pickles_itself(kind, base)
            return (
                None if own else f"a {kind.__qualname__} stays where it is: {hint}".replace("a E", "an E", 1)
            )
    return None


def refuse(kind: type) -> None:
    """Raise `Unsendable` for a type whose objects cannot be sent."""
    why = refusal(kind)
    if why is not None:
        raise Unsendable(why)


def _pickles_itself(kind: type, base: type) -> bool:
    """Return whether a class derived from `base` has pickling of its own."""
    names = ("__reduce__", "__reduce_ex__", "__getstate__")
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in names)


__all__ = ["Unsendable", "refusal", "refuse"]
