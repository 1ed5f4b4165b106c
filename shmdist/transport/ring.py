"""Rings: shared memory through which processes of one host send short frames.

A process has one ring segment, with a slot for each process that may leave messages there. Who
leaves one has no system call to make, and a reader that is looking finds it in less than a
microsecond. A reader that sleeps is woken by a descriptor made for that (`WakeupFd`), and not by the
socket: with the socket's data the system takes it that the sender is about to sleep, puts the
reader on the sender's processor, and one waits for the other. All else goes by the socket: what
is long, what has a descriptor with it, and what finds the slot full.

Layout
------
A page of 8-byte words, then the ring_slots, each a ring of `SLOT_BYTES`::

    awake | heads of all slots | tails of all slots | bytes of the socket seen, of all slots

Head and tail of a slot count bytes and never go back. The head is the sender's, all other
words are the receiver's. A message lies in one piece, at a multiple of 8, after its length;
length 0 means that the next one lies at the ring's beginning.

Order across both paths
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
`awake` says that somebody looks into the ring segment, or is going to before he sleeps. A reader
clears it, *then* looks once more, then sleeps. A sender moves the head, *then* looks at
`awake`; finding it cleared he wakes the reader. Between the two steps each side has a fence,
so at least one sees what the other did. A reader that was woken first clears the descriptor,
then looks. A sender that leaves something for several wakes them together (``runtime.ring_exchange``), by
a descriptor to which all of them listen, and which no process clears: each change of it wakes them.

Memory order
------------
A word is written by one process only, with one aligned 8-byte store. Processors of the x86
family let others see stores in their order and need a fence at the two places above only;
on others there is one more before the head and the tail are moved and after the head is read.
In C (`_native.c`) all these are acquires, releases and fences of the language. In Python the fence
is the release and taking of a lock, which on all systems of CPython are full ones when they come
in this order.

Who does it
-----------
``transport.ring_slots`` in Python, and ``_native.c`` in C where it could be built: a call makes four steps
here, and each is a microsecond shorter in C. That is what brings a call from 14 us to 10.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from shmdist.memory.mapping import PAGE
from shmdist.memory.segment import Segment
from shmdist.transport import native, ring_slots
from shmdist.transport.messages import Frame
from shmdist.transport.ring_slots import LEFT, MAX_MESSAGE_BYTES, REFUSED, SLOT_BYTES, SLOTS, UNSEEN

SIZE = PAGE + SLOTS * SLOT_BYTES

if TYPE_CHECKING:
    from shmdist.transport.ring_slots import RingReader, RingScanner, RingWriter
else:
    if native.module is None:
        _module = ring_slots
    else:
        _module = native.module
        _module.settle(PAGE, Frame)
    RingScanner, RingReader, RingWriter = _module.RingScanner, _module.RingReader, _module.RingWriter


class Keeping:
    """Which slots of a ring segment are in use, whoever looks into them.

    Attributes
    ----------
    segment : Segment
        The ring segment's memory, to be offered to others.
    used : set of int
        Slots that somebody may leave messages in.
    """

    receiver_type: type[RingReader] = RingReader
    add: Callable[[RingReader], None]

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)  # type: ignore[call-arg]  # a lookout comes next
        self.segment = segment
        self.used: set[int] = set()

    @classmethod
    def make(cls, owner: int) -> Self:
        """Make a ring segment.

        Raises
        ------
        OSError
            There is no memory for it.
        """
        return cls(Segment.make(owner, 0, SIZE, reserved=PAGE))

    def open_slot(self, link: Any) -> RingReader | None:
        """Open one more slot, for what comes from the other side of `link`; None when all are in use.

        Raises
        ------
        OSError
            There is no memory for it.
        """
        slot = next((slot for slot in range(SLOTS) if slot not in self.used), -1)
        if slot < 0:
            return None
        self.segment.reserve(PAGE + slot * SLOT_BYTES, SLOT_BYTES)
        self.used.add(slot)
        receiver = self.receiver_type(self.segment, slot, link)
        receiver.seen((1 << 64) - 1)  # until something comes by the socket
        self.add(receiver)
        return receiver


class InboundRings(Keeping, RingScanner):
    """The ring segment of a process, as it has it itself."""


__all__ = [
    "LEFT",
    "MAX_MESSAGE_BYTES",
    "REFUSED",
    "SLOT_BYTES",
    "SIZE",
    "SLOTS",
    "UNSEEN",
    "InboundRings",
    "RingReader",
    "RingWriter",
]
