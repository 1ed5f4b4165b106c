"""The slots of a ring in Python: writing frames into one, and taking them out.

``transport._native`` is the same in C, a microsecond faster at each of a call's four steps here; where
it could not be built, or ``SHMDIST_PURE`` is set, this serves. The two may meet in one ring segment.
The protocol stands in ``transport.ring``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from shmdist.memory.mapping import PAGE
from shmdist.transport.messages import HEADER, Frame

if TYPE_CHECKING:

    class Memory(Protocol):
        """A ring segment, mapped: a segment or a window."""

        @property
        def view(self) -> memoryview:
            """Its bytes."""


SLOTS = 64  # processes that can leave messages
SLOT_BYTES = 1 << 16  # of a slot
MAX_MESSAGE_BYTES = SLOT_BYTES // 4  # of a message
_MASK = SLOT_BYTES - 1
_AWAKE, _HEADS, _TAILS, _SEEN = 0, 8, 8 + SLOTS, 8 + 2 * SLOTS  # indices of words
_WEAK = os.uname().machine.lower() not in ("x86_64", "amd64", "i386", "i686")

_TIMES = (None,) * 6  # looks of `watch`

#: What became of a message: it must go by the socket, it is left, the receiver must be woken for it.
REFUSED, LEFT, UNSEEN = 0, 1, 2


def make_fence() -> Callable[[], None]:
    """Return a function after which no memory access happens that stands before it.

    It is for one thread at a time.
    """
    lock = threading.Lock()
    release, acquire = lock.release, lock.acquire
    acquire()

    def fence() -> None:
        release()
        acquire()

    return fence


def any_fence() -> None:
    """Do the same for any thread, and for one that is interrupted here by a finalizer which does so too."""
    make_fence()()


class RingWriter:
    """One slot of another process's ring segment; used by one thread at a time.

    Parameters
    ----------
    memory : Window or Segment
        The ring segment, mapped.
    slot : int
        Which slot.

    Attributes
    ----------
    fence : callable
        What is called between two steps whose order others must see; tests put theirs here.
    """

    def __init__(self, memory: Memory, slot: int) -> None:
        self._memory = memory  # a window must live
        self._words = memory.view[:PAGE].cast("Q")
        self._ring = memory.view[PAGE + slot * SLOT_BYTES : PAGE + (slot + 1) * SLOT_BYTES]
        self._lengths = self._ring.cast("Q")
        self._head_at, self._tail_at, self._seen_at = _HEADS + slot, _TAILS + slot, _SEEN + slot
        self._head = self._words[self._head_at]
        self._tail = self._words[self._tail_at]
        self.fence: Callable[[], None] | None = make_fence()

    def put(self, data: bytes | bytearray | memoryview, sent: int) -> int:
        """Leave a message.

        Parameters
        ----------
        data : bytes-like
            One or more whole frames.
        sent : int
            Bytes that were written to the socket so far.

        Returns
        -------
        int
            `REFUSED`, `LEFT` or `UNSEEN`.
        """
        words, fence = self._words, self.fence
        assert fence is not None
        if words[self._seen_at] != sent:
            return REFUSED
        size = len(data)
        if size > MAX_MESSAGE_BYTES:
            return REFUSED
        head = self._head
        at = head & _MASK
        new = head + (size + 15 & -8)
        over = at + size + 8 > SLOT_BYTES
        if over:
            new += SLOT_BYTES - at
        if new - self._tail > SLOT_BYTES:
            self._tail = words[self._tail_at]
            if new - self._tail > SLOT_BYTES:
                return REFUSED
        if over:
            self._lengths[at >> 3] = 0
            at = 0
        self._ring[at + 8 : at + 8 + size] = data
        self._lengths[at >> 3] = size
        if _WEAK:
            fence()
        words[self._head_at] = self._head = new
        fence()
        return LEFT if words[_AWAKE] else UNSEEN


class RingReader:
    """One slot of this process's own ring segment; used by the thread that reads.

    Parameters
    ----------
    memory : Segment
        The ring segment.
    slot : int
        Which slot.
    link : Link
        Whose frames lie there.
    """

    def __init__(self, memory: Memory, slot: int, link: Any) -> None:
        self.slot, self.link = slot, link
        self._words = memory.view[:PAGE].cast("Q")
        self._ring = memory.view[PAGE + slot * SLOT_BYTES : PAGE + (slot + 1) * SLOT_BYTES]
        self._lengths = self._ring.cast("Q")
        self._head_at, self._tail_at, self._seen_at = _HEADS + slot, _TAILS + slot, _SEEN + slot
        self._tail = self._next = self._words[self._head_at]
        self._words[self._tail_at] = self._tail
        self._fence = make_fence()

    def open(self) -> list[memoryview]:
        """Return the messages that lie here, where they lie; :meth:`done` must follow.

        Raises
        ------
        OSError
            What lies here makes no sense.
        """
        head, tail = self._words[self._head_at], self._tail
        found: list[memoryview] = []
        if tail == head:
            return found
        if _WEAK:
            self._fence()
        end = tail + SLOT_BYTES
        while tail != head:
            at = tail & _MASK
            size = self._lengths[at >> 3]
            if size:
                found.append(self._ring[at + 8 : at + 8 + size])
                tail += size + 15 & -8
            else:
                tail += SLOT_BYTES - at
            if tail > end or size > MAX_MESSAGE_BYTES:
                raise OSError("what a process left in the ring segment makes no sense")
        self._next = tail
        return found

    def done(self) -> None:
        """Give the room of the messages back."""
        if self._next != self._tail:
            if _WEAK:
                self._fence()
            self._words[self._tail_at] = self._tail = self._next

    def seen(self, received: int) -> None:
        """Note how many bytes came by the socket, all of whose frames were delivered."""
        self._words[self._seen_at] = received


class RingScanner:
    """All slots of this process's own ring segment; used by the thread that reads.

    Parameters
    ----------
    memory : Segment
        The ring segment.

    Attributes
    ----------
    fence : callable
        As a sender's.
    """

    def __init__(self, memory: Memory) -> None:
        self._words = memory.view[:PAGE].cast("Q")
        self._heads: Any = memory.view.obj  # its slices are copies
        self._stop = 8 * _HEADS  # of the heads in use
        self._looked = b""
        self._receivers: tuple[RingReader, ...] = ()
        self.fence: Callable[[], None] | None = any_fence

    def add(self, receiver: RingReader) -> None:
        """Look into a slot from now on."""
        self._receivers += (receiver,)
        self._stop = max(self._stop, 8 * (_HEADS + receiver.slot + 1))

    def remove(self, receiver: RingReader) -> None:
        """Look into it no more."""
        self._receivers = tuple(each for each in self._receivers if each is not receiver)

    def mark_awake(self) -> None:
        """Say that a thread looks here."""
        self._words[_AWAKE] = 1

    def mark_asleep(self) -> bool:
        """Say that no thread looks here any more; True when something new lies here all the same."""
        self._words[_AWAKE] = 0
        assert self.fence is not None
        self.fence()
        return self.has_new()

    def has_new(self) -> bool:
        """Return whether any head has moved since the last :meth:`take`."""
        heads: bytes = self._heads[8 * _HEADS : self._stop]
        return heads != self._looked

    def spin(self) -> bool:
        """Look again and again for a message for about a microsecond; true when one has come."""
        heads, start, stop, looked = self._heads, 8 * _HEADS, self._stop, self._looked
        for _ in _TIMES:  # noqa: SIM110 - a generator takes as long as a look
            if heads[start:stop] != looked:
                return True
        return False

    def take(self, frames: list[Frame]) -> list[RingReader]:
        """Append the frames that lie in all slots.

        Returns
        -------
        list of Receiver
            Where something lies that is not short and whole frames: they must be opened.
        """
        self._looked = self._heads[8 * _HEADS : self._stop]
        unpack, size = HEADER.unpack_from, HEADER.size
        left: list[RingReader] = []
        for receiver in self._receivers:
            words = self._words
            if words[receiver._head_at] == receiver._tail:
                continue
            try:
                messages = receiver.open()
            except OSError:
                left.append(receiver)
                continue
            found = []
            for message in messages:
                if len(message) < size:
                    break
                kind, flags, _spare, lane, nbuf, call_id, body_len = unpack(message)
                if nbuf or len(message) - size != body_len:
                    break
                frame = Frame(kind, flags, lane, call_id, bytes(message[size:]), [])
                frame.link = receiver.link
                found.append(frame)
            else:
                before = len(frames)
                frames += found
                try:
                    receiver.done()
                except BaseException:
                    del frames[before:]  # they still lie there
                    raise
                continue
            left.append(receiver)
        return left
