"""Items of channels of this process: values from the moment they are put.

What goes to a channel of another process is pickled at once. An item that stays here is pickled at the
same moment, and its large buffers are copied into the blocks by which they will travel. So who puts
it may change what he has, and:

- another process that takes it is sent this pickle, and given the blocks: no second copy;
- a thread of this process that takes it makes its object of both: no second copy either;
- who fetches it leaves it here, and gets copies of the buffers. From then on the item is `seen`: a frame that
  is being written may still read the blocks, so who takes it afterwards gets copies as well.

What the plain pickler cannot write without ado (functions and classes by value, references, shared arrays,
locks) is copied by :mod:`shmdist.serialization.local_copy`, and pickled when another process takes it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from shmdist.serialization import arrays, codec
from shmdist.serialization.arrays import SharedSource, contiguous
from shmdist.serialization.local_copy import is_constant, local_copy
from shmdist.serialization.pickler import Payload


class Item:
    """An item as its process keeps it.

    Attributes
    ----------
    payload : Payload
        Nobody else changes what is in it.
    seen : bool
        It was fetched: others may still read its buffers. Set under the channel's lock.
    """

    __slots__ = ("payload", "seen")

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.seen = False

    def __repr__(self) -> str:
        return f"<Item of {self.payload.nbytes()} bytes{', seen' * self.seen}>"

    def to_send(self) -> Payload:
        """Return what to send: the blocks themselves, unless somebody has seen the item before."""
        if not self.seen:
            return self.payload
        payload = Payload()
        payload.parts = self.payload.parts
        payload.buffers = [contiguous(each) for each in self.payload.buffers]
        return payload


def make_item(keep: Callable[[Any], Any], value: Any) -> Any:
    """Return what a channel keeps of a value; it shares nothing with it that can be changed.

    Parameters
    ----------
    keep : callable
        Copies a buffer (``SharedMemory.keep``).
    value : object
        Anything.
    """
    if is_constant(value):
        return value
    if arrays.is_plain(value) and value.nbytes < arrays.LINE:
        return local_copy(value)
    payload = codec.dumps_plainly(value)
    if payload is None or payload.refs or any(type(each) is SharedSource for each in payload.buffers):
        return local_copy(value)
    # The pickler writes large bytes and bytearrays as they are: the latter are the caller's still.
    payload.parts = [part if type(part) is bytes else bytes(part) for part in payload.parts]
    payload.buffers = [keep(source) for source in payload.buffers]
    return Item(payload)


def open_item(kept: Any, verb: str) -> Any:
    """Return the value of what :func:`make_item` returned, or of an object that came from another process.

    Parameters
    ----------
    kept : object
        The item.
    verb : str
        ``"take"``: it is the caller's now; else it stays in the channel.

    Raises
    ------
    SerializationError
        Its classes cannot read what they have written.
    """
    if type(kept) is not Item:
        return kept if verb == "take" else local_copy(kept)
    payload = kept.payload
    body = payload.parts[0] if len(payload.parts) == 1 else b"".join(payload.parts)
    buffers = [contiguous(each) for each in payload.buffers]
    try:
        return pickle.loads(body, buffers=map(bytearray, buffers) if kept.seen else buffers)
    except MemoryError:
        raise
    except Exception as error:
        raise codec.unreadable(error, "the item") from error


__all__ = ["Item", "make_item", "open_item"]
