"""Mailboxes: memory in which processes of one host leave short messages for another one.

A process has one mailbox, with a slot for each process that may leave messages there. Who
leaves one has no system call to make, and a reader that is looking finds it in less than a
microsecond. A reader that sleeps is woken by a descriptor made for that (`Kick`), and not by the
socket: with the socket's data the system takes it that the sender is about to sleep, puts the
reader on the sender's processor, and one waits for the other. All else goes by the socket: what
is long, what has a descriptor with it, and what finds the slot full.

Layout
------
A page of 8-byte words, then the slots, each a ring of `RING` bytes::

    awake | heads of all slots | tails of all slots | bytes of the socket seen, of all slots

Head and tail of a slot count bytes and never go back. The head is the sender's, all other
words are the receiver's. A message lies in one piece, at a multiple of 8, after its length;
length 0 means that the next one lies at the ring's beginning.

Order across both roads
-----------------------
- A sender may use the slot only while the receiver has seen every byte that was written to the
  socket (its word says so). So whatever lies in the slot was sent after all that has been read
  from the socket.
- A receiver that gets bytes from the socket looks into the slot before it takes a frame from
  them. Whatever lies there was sent before those bytes: after them the slot was shut.

The end of the socket is bytes from the socket in this sense: what was left in the slot is
delivered first. A sender that dies while it writes has not moved the head, and its message
was never there.

Sleep
-----
`awake` says that somebody looks into the mailbox, or is going to before he sleeps. A reader
clears it, *then* looks once more, then sleeps. A sender moves the head, *then* looks at
`awake`; finding it cleared he wakes the reader. Between the two steps each side has a fence,
so at least one sees what the other did. A reader that was woken first clears the descriptor,
then looks.

Memory order
------------
A word is written by one process only, with one aligned 8-byte store. Processors of the x86
family let others see stores in their order and need a fence at the two places above only;
on others there is one more before the head and the tail are moved and after the head is read.
The fence is the release and taking of a lock, which on all systems of CPython are full ones
when they come in this order.
"""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING, Any

from shmdist.memory.segment import PAGE, Segment, Window

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS = 64  # processes that can leave messages
RING = 1 << 16  # bytes of a slot
MOST = RING // 4  # bytes of a message
SIZE = PAGE + SLOTS * RING
_MASK = RING - 1
_AWAKE, _HEADS, _TAILS, _SEEN = 0, 8, 8 + SLOTS, 8 + 2 * SLOTS  # indices of words
_WEAK = platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")

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


def fence() -> None:
    """Do the same for any thread, and for one that is interrupted here by a finalizer which does so too."""
    make_fence()()


class Sender:
    """One slot of another process's mailbox; used by one thread at a time.

    Parameters
    ----------
    segment : Window or Segment
        The mailbox, mapped.
    slot : int
        Which slot.
    """

    def __init__(self, segment: Window | Segment, slot: int) -> None:
        self._segment = segment
        self._words = segment.view[:PAGE].cast("Q")
        self._ring = segment.view[PAGE + slot * RING : PAGE + (slot + 1) * RING]
        self._lengths = self._ring.cast("Q")
        self._head_at, self._tail_at, self._seen_at = _HEADS + slot, _TAILS + slot, _SEEN + slot
        self._head = self._words[self._head_at]
        self._tail = self._words[self._tail_at]
        self._fence = make_fence()

    def put(self, parts: list[Any], sent: int) -> int:
        """Leave a message.

        Parameters
        ----------
        parts : list of bytes-like
            What it consists of.
        sent : int
            Bytes that were written to the socket so far.

        Returns
        -------
        int
            `REFUSED`, `LEFT` or `UNSEEN`.
        """
        words = self._words
        if words[self._seen_at] != sent:
            return REFUSED
        if len(parts) == 1:
            data = parts[0]
            size = len(data)
        else:
            size = sum(map(len, parts))
        if size > MOST:
            return REFUSED
        if len(parts) > 1:
            data = b"".join(parts)
        head = self._head
        at = head & _MASK
        new = head + (size + 15 & -8)
        over = at + size + 8 > RING
        if over:
            new += RING - at
        if new - self._tail > RING:
            self._tail = words[self._tail_at]
            if new - self._tail > RING:
                return REFUSED
        if over:
            self._lengths[at >> 3] = 0
            at = 0
        self._ring[at + 8 : at + 8 + size] = data
        self._lengths[at >> 3] = size
        if _WEAK:
            self._fence()
        words[self._head_at] = self._head = new
        self._fence()
        return LEFT if words[_AWAKE] else UNSEEN


class Receiver:
    """One slot of this process's own mailbox; used by the thread that reads."""

    def __init__(self, mailbox: Mailbox, slot: int) -> None:
        self.slot = slot
        segment = mailbox.segment
        self._words = mailbox.words
        self._ring = segment.view[PAGE + slot * RING : PAGE + (slot + 1) * RING]
        self._lengths = self._ring.cast("Q")
        self._head_at, self._tail_at, self._seen_at = _HEADS + slot, _TAILS + slot, _SEEN + slot
        self._tail = self._next = self._words[self._head_at]
        self._words[self._tail_at] = self._tail
        self._fence = make_fence()

    def has_some(self) -> bool:
        """Tell whether there is a message."""
        head: int = self._words[self._head_at]
        return head != self._tail

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
        end = tail + RING
        while tail != head:
            at = tail & _MASK
            size = self._lengths[at >> 3]
            if size:
                found.append(self._ring[at + 8 : at + 8 + size])
                tail += size + 15 & -8
            else:
                tail += RING - at
            if tail > end or size > MOST:
                raise OSError("what a process left in the mailbox makes no sense")
        self._next = tail
        return found

    def done(self) -> None:
        """Give the room of the messages back."""
        if _WEAK:
            self._fence()
        self._words[self._tail_at] = self._tail = self._next

    def seen(self, received: int) -> None:
        """Note how many bytes came by the socket, all of whose frames were delivered."""
        self._words[self._seen_at] = received


class Mailbox:
    """The mailbox of a process, as it has it itself.

    Attributes
    ----------
    segment : Segment
        Its memory, to be offered to others.
    words : memoryview
        ``words[0]`` says that somebody looks here; set by who begins to.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.words = segment.view[:PAGE].cast("Q")
        self._fence = fence
        self._heads = segment.memory
        self._stop = 8 * _HEADS  # of the heads in use
        self._looked = b""
        self.used: set[int] = set()

    @classmethod
    def make(cls, owner: int) -> Mailbox:
        """Make a mailbox.

        Raises
        ------
        OSError
            There is no memory for it.
        """
        return cls(Segment.make(owner, 0, SIZE, reserved=PAGE))

    def add(self) -> Receiver | None:
        """Open one more slot; None when all are in use.

        Raises
        ------
        OSError
            There is no memory for it.
        """
        slot = next((slot for slot in range(SLOTS) if slot not in self.used), -1)
        if slot < 0:
            return None
        self.segment.reserve(PAGE + slot * RING, RING)
        self.used.add(slot)
        self.words[_SEEN + slot] = (1 << 64) - 1  # until something comes by the socket
        self._stop = max(self._stop, 8 * (_HEADS + slot + 1))
        return Receiver(self, slot)

    def stirred(self) -> bool:
        """Tell whether any head has moved since :meth:`look`."""
        heads: bytes = self._heads[8 * _HEADS : self._stop]
        return heads != self._looked

    def watch(self) -> bool:
        """Look out for a message for about a microsecond; true when one has come."""
        heads, start, stop, looked = self._heads, 8 * _HEADS, self._stop, self._looked
        for _ in _TIMES:  # noqa: SIM110 - a generator takes as long as a look
            if heads[start:stop] != looked:
                return True
        return False

    def look(self) -> None:
        """Take note of all heads; all slots must be opened after this."""
        self._looked = self._heads[8 * _HEADS : self._stop]

    def sleep(self) -> bool:
        """Say that nobody looks here any more; True when there is something to be looked at all the same."""
        self.words[_AWAKE] = 0
        self._fence()
        return self.stirred()
