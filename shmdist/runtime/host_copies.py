"""Host copies: a value for several processes of another host crosses the network once.

Which values
------------
Those of which the library knows that they go to many: a payload with a ``spread`` (a function
sent ahead of its calls, with what it closes over), and arrays that a map sends over and over
(``payload.known``). Each is a :class:`HostCopy` with the sender, who numbers it.

How a value goes
----------------
For the first process of a host the sender asks for *room*: a block of that process's arena. The
bytes then go by the stream in a frame of their own, and are received straight into the block.
A frame that needs them has a token in the place of them: the copy's number, and which part.

Any further process of that host is asked to *take* the copy from one that has it, its lender. It
asks the lender to *give* it, by the local link of the two, is given a count for the block as
for any other (``runtime.sharing``), and tells the sender. Only then is a token sent to it: a token
is never refused. Each array is made over a private mapping of the block, in which what is
written stays its own; nobody writes to the block itself.

Whatever goes wrong, and whoever does not answer in time, the value goes by the stream, as it
would have without all this. Who could not share is left alone for a while (`RETRY_SHARING_SECONDS`).

Who holds the block
-------------------
The first process owns the block, and has a count for it; each that took it has one. What a
process has of a copy stands in its table by sender and number, and changes by what comes from
the sender alone, by one link and so in order: from *room* or *take* until *forget*. Arrays made
of a copy keep its hold alive themselves, and need no counts of their own. The sender keeps
a copy as long as its payload, and as long as frames with tokens of it wait to be written.

No thread waits for a user's code
------------------------------
Requests are noted by who reads, and done on threads of the runtime. A process whose
interpreter is held, by C code say, does not answer. Who is to take from it waits for `ANSWER_SECONDS`,
and as long again as the bytes took to send, for they may still be on their way; then the sender
has another one lend them, or makes the taker the first of its host. A taker that stands
still itself is sent the bytes, and reads them when it can. What comes too late finds its entry
gone from the table, and is dropped.

Death, at each step
-------------------
- The first process dies before it has all the bytes: who takes from it is told so, and tells
  the sender, who makes it the first one.
- It dies later: the memory lives on in the others' mappings, and any of them lends it.
- One that takes it dies: its count is dropped by the owner, as any.
- The sender dies: his copies are struck from the tables. Arrays stay what they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shmdist._log import Log, warn
from shmdist.memory.leases import PRIVATE
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.host_copy_receiver import (
    GONE,
    HERE,
    HOST_COPY,
    BlockSource,
    HostCopyReceiver,
    answer_of,
)
from shmdist.runtime.requests import RequestClient
from shmdist.serialization import codec
from shmdist.serialization.arrays import LINE, SharedSource, contiguous
from shmdist.transport.link import LinkClosed
from shmdist.transport.messages import TOKEN, BlockRef, OutgoingFrames, PeerInfo

ANSWER_SECONDS = 2.0  # that another process may take to answer
RETRY_SHARING_SECONDS = 30.0  # for which a process that could not share is sent its own
_BYTES_PER_SECOND = 1 << 28  # bytes of memory that it may take a second to make ready
_log = Log("host_copies")


class HostCopy:
    """A value that this process sends to many.

    Attributes
    ----------
    number : int
        What others know it by.
    there : set of int
        The processes that have it.
    lenders : dict of int to None
        Those of them that others are sent to, the first one first.
    asked : set of int
        The processes that may have something of it.
    patience : float
        Seconds to wait for who takes it.
    """

    __slots__ = ("_copies", "asked", "lenders", "number", "patience", "there")

    def __init__(self, copies: HostCopySender) -> None:
        self._copies = copies
        self.number = next(copies.requests.call_ids)
        self.there: set[int] = set()
        self.lenders: dict[int, None] = {}
        self.asked: set[int] = set()
        self.patience = ANSWER_SECONDS

    def __repr__(self) -> str:
        return f"<HostCopy {self.number}, at {sorted(self.there)}>"

    def __del__(self) -> None:
        try:
            if self.asked:
                copies, number, asked = self._copies, self.number, self.asked
                copies.run_soon(lambda: copies.withdraw(number, asked))
        except Exception:
            pass  # the program is at its end


class HostCopySender:
    """What a link to another host asks in the place of ``SharedMemory``; hangs on that as ``copies``."""

    def __init__(self, sharing: BlockSource, requests: RequestClient, counts: ReferenceCounts) -> None:
        self.requests, self.peers, self.run_soon = requests, requests.peers, counts.run_soon
        self._warned = False  # that a shared array is copied for another host
        self.lending = HostCopyReceiver(sharing, requests)
        self.room, self.adopt = self.lending.room, self.lending.adopt
        self._alone: dict[int, float] = {}  # processes that could not share, and until when

    def __repr__(self) -> str:
        return f"<HostCopySender {self.lending!r}, alone {sorted(self._alone)}>"

    def place(
        self, payload: codec.Payload, size: int, pid: int, done: OutgoingFrames
    ) -> tuple[list[Any], bool]:
        """Return what stands for a payload's buffers; parameters and result as of ``SharedMemory.place``."""
        if not self._warned and any(type(source) is SharedSource for source in payload.buffers):
            self._warn(pid)
        spread, known = payload.spread, payload.known
        if spread is None and known is None:
            return [contiguous(source) for source in payload.buffers], False
        buffers = [
            contiguous(source) if token is None else token
            for index, source in enumerate(payload.buffers)
            for token in [self._place(payload, index, source, pid, done)]
        ]
        if spread is None or size < LINE:
            return buffers, False
        copy = spread.setdefault("body", HostCopy(self))
        if not self._give(copy, lambda: b"".join(payload.parts), size, pid):
            return buffers, False
        buffers.append(self._token(copy, 0, size, done))
        return buffers, True

    def revoke(self, parts: OutgoingFrames, payload: codec.Payload, pid: int) -> None:
        """Nothing is granted to another host."""

    def _warn(self, pid: int) -> None:
        """Warn, once, that a shared array does not stay one."""
        self._warned = True
        warn(
            f"process {pid} is not of this host: it gets a copy of a shared array, and what it writes "
            f"there is seen by nobody else; return the values instead, or send numpy.array(a)",
            UserWarning,
        )

    def _place(
        self, payload: codec.Payload, index: int, source: Any, pid: int, done: OutgoingFrames
    ) -> BlockRef | None:
        """Return the token of a buffer; None when its bytes are to be sent."""
        nbytes = len(source)
        if nbytes < LINE:
            return None
        found = None if payload.known is None else payload.known.copy_of(source)
        if found is not None:
            copy, raw, offset, times = found
            # All of it, when this process is going to ask for the rest, or another one of its host.
            likely = pid in copy.there or len(raw) == nbytes or times >= self._hosts()
            if not likely or not self._give(copy, lambda: raw, len(raw), pid, often=True):
                return None
            return self._token(copy, offset, nbytes, done)
        if payload.spread is None:
            return None
        copy = payload.spread.setdefault((index,), HostCopy(self))
        if not self._give(copy, lambda: contiguous(source), nbytes, pid):
            return None
        return self._token(copy, 0, nbytes, done)

    def _token(self, copy: HostCopy, offset: int, nbytes: int, done: OutgoingFrames) -> BlockRef:
        done.kept.append(copy)
        return BlockRef(TOKEN.pack(copy.number, self.peers.pid, 0, offset, nbytes, PRIVATE))

    def _give(
        self, copy: HostCopy, raw: Callable[[], Any], nbytes: int, pid: int, often: bool = False
    ) -> bool:
        """See to it that process `pid` has a copy; False when it is better sent the bytes.

        `often`: it is going to need them more than once itself.
        """
        if pid in copy.there:
            return True
        lost_processes = self.peers.lost
        while pid not in lost_processes and self._alone.get(pid, 0.0) < time.monotonic():
            lender = self._lender(copy, pid)
            if lender is None:
                return (often or self._has_sibling(pid)) and self._send_first(copy, raw, nbytes, pid)
            # It says so when it has waited for its lender for so long: or it stands still itself.
            what = ("take", copy.number, lender, copy.patience)
            answer = self._ask(copy, pid, what, copy.patience + ANSWER_SECONDS)
            if answer == HERE:
                copy.there.add(pid)
                copy.lenders[pid] = None
                return True
            if answer == GONE:
                copy.lenders.pop(lender, None)
            else:
                self._leave_alone(pid)
        return False

    def _send_first(self, copy: HostCopy, raw: Callable[[], Any], nbytes: int, pid: int) -> bool:
        """Send a copy to the first process of a host."""
        seconds = ANSWER_SECONDS + nbytes / _BYTES_PER_SECOND
        if self._ask(copy, pid, ("room", copy.number, nbytes), seconds) != HERE:
            self._leave_alone(pid)
            return False
        begun = time.monotonic()
        payload = codec.pickled(("here", copy.number))
        payload.buffers.append(raw())
        try:
            self.requests.send(
                self.peers.links[pid], codec.frame(HOST_COPY, 0, 0, copy.number, payload), None
            )
        except (LinkClosed, KeyError):
            return False  # its death is on its way
        copy.patience = ANSWER_SECONDS + time.monotonic() - begun
        copy.there.add(pid)
        copy.lenders[pid] = None
        return True

    def _ask(self, copy: HostCopy, pid: int, what: Any, seconds: float) -> int | None:
        """Return a process's answer; None when there is none in time."""
        copy.asked.add(pid)
        return answer_of(
            self.requests, self.requests.request(pid, HOST_COPY, 0, codec.pickled(what)), seconds
        )

    def _leave_alone(self, pid: int) -> None:
        now = time.monotonic()
        self._alone = {other: until for other, until in self._alone.items() if until > now}
        self._alone[pid] = now + RETRY_SHARING_SECONDS
        _log.info("process %d shares no copies for now", pid)

    def _members(self) -> list[PeerInfo]:
        return list(self.peers.members.values())

    def _hosts(self) -> int:
        return len({peer.host for peer in self._members()})

    def _lender(self, copy: HostCopy, pid: int) -> int | None:
        """Return a process that has the copy, and from which `pid` can take it."""
        peers = self.peers.members
        taker = peers.get(pid)
        for lender in list(copy.lenders):
            peer = peers.get(lender)
            if peer is not None and taker is not None and _may_share(peer, taker):
                return lender
        return None

    def _has_sibling(self, pid: int) -> bool:
        """Return whether there is another process to which `pid` could lend a copy."""
        peer = self.peers.members.get(pid)
        if peer is None:
            return False
        for other in self._members():
            if other.pid in (pid, self.peers.pid) or not _may_share(peer, other):
                continue
            link = self.peers.links.get(other.pid)
            if link is None or not link.is_local:
                return True
        return False

    def withdraw(self, number: int, pids: set[int]) -> None:
        """Let processes forget a copy."""
        for pid in pids:
            link = self.peers.links.get(pid)
            if link is not None:
                self.requests.reactor.post(link, HOST_COPY, 0, 0, codec.pickled(("forget", number)))


def _may_share(one: PeerInfo, other: PeerInfo) -> bool:
    """Return whether two processes are on one host, and may be connected."""
    return (
        one.host == other.host
        and (one.links is None or other.pid in one.links)
        and (other.links is None or one.pid in other.links)
    )


__all__ = ["HostCopy", "HostCopySender"]
