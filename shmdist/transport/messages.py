"""The messages of the protocol: one table of kinds, one frame layout.

A frame is a fixed header, then (when ``nbuf`` > 0) a table of ``nbuf`` 64-bit
lengths, then the body, then the out-of-band buffers one after the other::

    kind u8 | flags u8 | spare u16 | lane u32 | nbuf u32 | call_id u64 | body u64

All numbers are little-endian.  A length with `IN_BLOCK` set is that of a *token*: the
bytes of that buffer lie in a block of shared memory, and the token says where.

What the receiver needs to route the frame and to answer it stands in the header, apart
from the pickled body: a body that cannot be read costs that one call and never the link.

============= ======================= ================================================= =======
kind          body                    meaning                                           answer
============= ======================= ================================================= =======
CALL          (f, args, kwargs)       run ``f(*args, **kwargs)``                        by flags
RESULT        value or captured error the answer to CALL or REFERENCE_OP ``call_id``    none
REFERENCE_OP  (name, rrid, args)      an operation on a reference's owner               RESULT
CANCEL        none                    give up CALL or REFERENCE_OP ``call_id``          none
REFS          ((whence, id, pid, n,   counts of references of ``call_id`` change;       none
              reporter)..)              ``reporter`` told of them (``runtime.count_audit``)
FUNCTION      a function              keep it under ``call_id`` for later calls         none
DROP_FUNCTION none                    forget function ``call_id``                       none
HELLO         Hello                   first frame on a link, from who connected         none
JOIN          Join                    process 1 makes the receiver a member             RESULT
PEERS         tuple of PeerInfo       further members                                   none
LOST          (pid, error, notes)     a member is gone, and how far it was              none
INTERRUPT_ALL none                    interrupt every call that runs here               none
EXIT          none                    leave the cluster and end                         none
SEGMENT       (owner, number, size)   map this memory, whose descriptor is with the     RESULT
                                      frame; of size 0: forget it
LEASES        ((serial, pid, n,       counts of blocks of ``call_id`` change            none
              reporter)..)
RELAY         pid                     join the sender and ``pid``, by process 1         RESULT
HEARTBEAT     none                    the sender is alive (``runtime.heartbeat``)       none
RING          (slot, inode, listens)  short frames may be left in this slot of the      none
                                      ring segment whose descriptor is with it; of slot -1:
                                      it wakes who looks into that, who can listen to a
                                      group wake-up if the third is true; of -2: a group
                                      wake-up; of -3: the sender listens to it
HOST_COPY     (what, ...)             a copy of a value (``runtime.host_copies``)       by what
AUDIT         (pid, sender)           what has ``call_id`` from ``pid``, which is lost? none
                                      For the same, and what it has: that
============= ======================= ================================================= =======

A frame is a plain mutable record and not a frozen dataclass: one is made for every
message that arrives, and a frozen one costs five times as much to make.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from shmdist._ending import VOID, Ending
from shmdist.transport import native

HEADER = struct.Struct("<BBHIIQQ")
#: A block: its number and its owner, segment and offset, bytes, and how it may be used (``memory.leases``).
TOKEN = struct.Struct("<QIIQQB")
IN_BLOCK = 1 << 63  # in the table of lengths


class BadFrame(OSError):
    """What came makes no sense; the link by which it came is ended."""


class Kind(IntEnum):
    """Type codes of the frames; the table is in the module's docstring."""

    CALL = 1
    RESULT = 2
    REFERENCE_OP = 3
    CANCEL = 4
    REFS = 5
    FUNCTION = 6
    DROP_FUNCTION = 7
    HELLO = 8
    JOIN = 9
    PEERS = 10
    LOST = 11
    INTERRUPT_ALL = 12
    EXIT = 13
    SEGMENT = 14
    LEASES = 15
    RELAY = 16
    HEARTBEAT = 17
    RING = 18
    HOST_COPY = 19
    AUDIT = 20


# Flags of any frame.
HAS_REFS = 0x01  # buffer 0 is a pickled tuple of the references inside the body
BODY_LAST = 0x02  # the body is the last buffer, for it lies in a block
# Flags of CALL: what the caller wants back.
WANT_VALUE = 0x10  # the value itself (remotecall_fetch)
WANT_STORE = 0x20  # keep the value here as a Future; tell when it is there
BY_NAME = 0x04  # the body is the name of a function, and its arguments (``serialization.function_names``)
BY_VALUE = 0x08  # the body is a pickled function, and its arguments (``serialization.pickled_functions``)
BY_ID = 0x40  # the body is (function id, args, kwargs): a function sent before by FUNCTION
# Flags of CANCEL; NOT_RUN withdraws a call that has not begun, and leaves another alone.
FOR_GOOD = 0x40  # of a call: its Future is cancelled, whatever the call still comes to
AT_ONCE = 0x10  # of an operation: it is done now or not at all, and the answer tells which
# Flags of REFS.
IS_NEW = 0x10  # the body is (whence, id): a Future that the sender has made here
# Flags of RESULT.
IS_ERROR = 0x10  # the body is a captured error
NOT_RUN = 0x20  # cancelled before it began
STORED = 0x40  # the value stays with the owner; the body is empty
BROKEN = 0x80  # the frame could not be received (no memory for it); set by the link

# A lane runs its calls one after the other, in order; lane 0 is no lane.
NO_LANE = 0


class _Record:
    """What a frame consists of."""

    __slots__ = ("body", "buffers", "call_id", "flags", "kind", "lane", "link")

    def __init__(self, kind: int, flags: int, lane: int, call_id: int, body: Any, buffers: list[Any]) -> None:
        self.kind = kind
        self.flags = flags
        self.lane = lane
        self.call_id = call_id
        self.body = body
        self.buffers = buffers
        self.link: Any = None


if TYPE_CHECKING:
    Record = _Record
else:
    # The same in C, so that what finds frames in a ring segment (``transport.ring``) can make them.
    Record = _Record if native.module is None else native.module.Record


class Frame(Record):
    """One received message.

    Attributes
    ----------
    kind, flags, lane, call_id
        As in the header.
    body : bytes or bytearray
        The pickled body, not yet read.
    buffers : list
        Writable buffers that belong to this frame alone, and holds of blocks.
    link
        The link it came by; set by the reader.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        try:
            name = Kind(self.kind).name
        except ValueError:
            name = f"kind {self.kind}"
        return (
            f"<Frame {name} id={self.call_id} flags={self.flags:#04x} lane={self.lane} "
            f"body={len(self.body)} buffers={len(self.buffers)}>"
        )


class Arrived:
    """The references of a frame that has arrived, as its first buffer: they are given back when this ends.

    Parameters
    ----------
    refs : tuple
        Empty once the frame is read, for then they are what was made of it.
    count : Ending
        Notes them.
    seen_to : callable
        Called after that.
    """

    __slots__ = ("count", "refs", "seen_to")

    def __init__(self, refs: tuple[Any, ...], count: Ending, seen_to: Callable[[], None]) -> None:
        self.refs = refs
        self.count: Ending | None = count
        self.seen_to = seen_to

    def __del__(self) -> None:
        try:
            self.count = None
            if self.refs:
                self.seen_to()
        except Exception:
            pass  # with the next ones

    def take(self) -> None:
        """From now on whoever reads the frame sees to them."""
        if self.count is not None:
            self.count.__del__ = VOID
        self.refs = ()


class BlockRef(bytes):
    """A packed token: stands for a buffer among a frame's buffers."""

    __slots__ = ()


class OutgoingFrames(list[Any]):
    """The parts of frames ready to be written, and what was granted for them.

    Attributes
    ----------
    grants : list
        Counts of blocks given to the receiver: to be taken back when nothing is written.
    owed : list
        Counts of blocks that the frames give back to the receiver: owed again when nothing is written.
    wanted : list of int
        Bytes of each buffer that would have gone through a block, had there been one.
    kept : list
        What must live until the frames are written.
    gone : bool
        They are written, or will be: nothing may be taken back any more.
    """

    __slots__ = ("gone", "grants", "kept", "unsent_releases", "wanted")
    gone: bool
    grants: list[Any]
    kept: list[Any]
    unsent_releases: list[Any]
    wanted: list[int]

    def __getattr__(self, name: str) -> Any:
        # Made on first use: most frames have none, and many are made.
        if name not in OutgoingFrames.__slots__:
            raise AttributeError(name)
        if name == "gone":
            return False
        found: list[Any] = []
        setattr(self, name, found)
        return found


class PeerInfo(NamedTuple):
    """What every member knows of a member.

    Attributes
    ----------
    pid : int
        Its process id in the cluster.
    host : str
        Identity of its host: equal for processes that may share memory.
    name : str
        The host's name, for people.
    ospid : int
        Its process id in its operating system.
    addresses : tuple of tuple
        Where it listens: ``("unix", path)`` and ``("tcp", (address, port))``.
    links : frozenset of int, or None
        Process ids it may be connected with besides process 1; ``None`` means all.
    """

    pid: int
    host: str
    name: str
    ospid: int
    addresses: tuple[tuple[str, Any], ...]
    links: frozenset[int] | None = None


class Hello(NamedTuple):
    """First frame on a link, from the process that connected."""

    pid: int
    host: str


class Join(NamedTuple):
    """Process 1 makes the receiver a member of the cluster."""

    pid: int
    lazy: bool
    topology: str
    peers: tuple[PeerInfo, ...]
    carried: bool  # by a tunnel: a heartbeat tells little of the host behind it
    prefix: str | None  # process 1's ``sys.prefix``, if it is on this host
    parent: int | None  # process 1's own process id, if it has started the worker
