"""The receiving side of host copies; ``runtime.host_copies`` describes the protocol."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from shmdist._log import Log
from shmdist.memory.leases import PRIVATE, Lease, LeaseHandle, LeaseTable
from shmdist.memory.segment import Segment
from shmdist.runtime.replies import PendingReply
from shmdist.runtime.requests import RequestClient
from shmdist.serialization import codec
from shmdist.transport.link import Link
from shmdist.transport.messages import BROKEN, TOKEN, Frame, Kind

HOST_COPY, _RESULT = int(Kind.HOST_COPY), int(Kind.RESULT)
HERE, GONE, APART = range(3)  # answers: it is here; the lender has it not; nothing can be shared
_log = Log("host_copies")

Key = tuple[int, int]  # of a copy: its sender, and its number there


class _ReceivedCopy:
    """What this process has of another one's copy.

    Attributes
    ----------
    hold : LeaseHandle or None
        Of its block, once there is one.
    here : bool
        Whether the bytes are in the block.
    asking : list
        Who wants it and must wait for the bytes: link and request.
    """

    __slots__ = ("asking", "here", "hold")

    def __init__(self) -> None:
        self.hold: LeaseHandle | None = None
        self.here = False
        self.asking: list[tuple[Link, int]] = []


class _PartLease(Lease):
    """A part of a copy, seen through a mapping of its own: its count is that of the whole."""

    __slots__ = ("whole",)

    def __init__(self, whole: LeaseHandle, offset: int, nbytes: int) -> None:
        lease = whole.lease
        super().__init__(lease.segment, 0, lease.offset + offset, nbytes, PRIVATE)
        self.whole = whole


class Offers(Protocol):
    """What is needed of the exchange of segments."""

    def ensure_mapped(self, segment: Segment, pid: int, patience: float, /) -> bool:
        """See to it that a process has mapped a segment."""


class Maintainer(Protocol):
    """What is needed of the arena's maintainer."""

    def used(self) -> None:
        """Note that a block was taken."""


class BlockSource(Protocol):
    """What is needed of the shared memory of this process."""

    @property
    def holds(self) -> LeaseTable:
        """The leases of this process."""

    @property
    def offers(self) -> Offers:
        """The exchange of segments."""

    @property
    def maintainer(self) -> Maintainer:
        """The arena's maintainer."""

    def take_for_many(self, nbytes: int, grow: bool) -> LeaseHandle | None:
        """Take a block that several processes will see; None when there is none."""


class HostCopyReceiver:
    """The table of what is here, and what is done for those who want it; hangs on ``HostCopySender``."""

    def __init__(self, sharing: BlockSource, requests: RequestClient) -> None:
        self._sharing, self._requests = sharing, requests
        self._peers, self._reactor = requests.peers, requests.reactor
        self._lock = threading.Lock()  # guards the table; a leaf
        self.table: dict[Key, _ReceivedCopy] = {}
        self._peers.lost_hooks.append(self._lost)

    def __repr__(self) -> str:
        return f"<HostCopyReceiver {sorted(self.table)}>"

    def room(self, number: int, size: int, sender: int) -> Any:
        """Return the memory for the bytes of a copy that is coming; on the reading thread.

        Raises
        ------
        MemoryError
            None was asked for, or it was forgotten.
        """
        kept = self.table.get((sender, number))
        if kept is None or kept.hold is None or kept.here or kept.hold.lease.nbytes != size:
            raise MemoryError(f"there is no room for copy {number} of process {sender}")
        return kept.hold.lease.view()

    def adopt(self, token: bytes, sender: int) -> LeaseHandle:
        """Return a hold of a part of a copy; on the reading thread.

        Raises
        ------
        LookupError
            It is not here.
        """
        number, _, _, offset, nbytes, _ = TOKEN.unpack(token)
        kept = self.table.get((sender, number))
        # The bytes came before the token, though who reads may not have been told yet.
        if kept is None or kept.hold is None:
            raise LookupError(f"copy {number} of process {sender} is not here")
        self._sharing.maintainer.used()
        return LeaseHandle(self._sharing.holds, _PartLease(kept.hold, offset, nbytes))

    def on_frame(self, frame: Frame) -> None:
        """Handle a frame about copies; on the reading thread."""
        link = frame.link
        if frame.flags & BROKEN:
            self._forget((link.pid, frame.call_id))  # of its own requests no copy has the number
            return
        verb, *details = pickle.loads(frame.body)
        if verb == "here":
            self._arrived((link.pid, details[0]))
        elif verb == "forget":
            self._forget((link.pid, details[0]))
        elif verb == "give":
            self._give_up(link, frame.call_id, (details[0], details[1]))
        else:
            key, kept = (link.pid, details[0]), _ReceivedCopy()
            with self._lock:
                former, self.table[key] = self.table.get(key), kept
            self._refuse(former)
            work = self._make_room if verb == "room" else self._take
            self._reactor.soon(lambda: self._provide(link, frame.call_id, key, kept, work, details[1:]))

    def _provide(
        self,
        link: Link,
        call_id: int,
        key: Key,
        kept: _ReceivedCopy,
        work: Callable[..., int],
        details: list[Any],
    ) -> None:
        """Get a copy's block, and tell its sender."""
        try:
            # Who sees memory through a mapping of its own, does so as an array.
            answer = work(key, kept, *details) if find_spec("numpy") is not None else APART
        except ConnectionError as error:
            _log.info("process %d cannot share: %s", link.pid, error)
            answer = APART
        except Exception as error:  # the lender has gone meanwhile, say
            _log.info("copy %d of process %d: %s", key[1], key[0], error)
            answer = GONE
        if answer != HERE:
            with self._lock:
                if self.table.get(key) is kept:
                    del self.table[key]
        self._requests.answer(link, call_id, 0, codec.pickled(answer))

    def _enter(self, key: Key, kept: _ReceivedCopy, hold: LeaseHandle, here: bool) -> int:
        with self._lock:
            if self.table.get(key) is not kept:
                return GONE  # it took too long: no thread waits for it
            kept.hold, kept.here = hold, here
            return HERE

    def _make_room(self, key: Key, kept: _ReceivedCopy, nbytes: int) -> int:
        """Get a block of this process's arena."""
        hold = self._sharing.take_for_many(nbytes, grow=True)
        return APART if hold is None else self._enter(key, kept, hold, False)

    def _take(self, key: Key, kept: _ReceivedCopy, lender: int, seconds: float) -> int:
        """Get a block from a process of this host."""
        deadline = time.monotonic() + seconds
        link = self._link_to(lender, seconds)
        if link is None:
            return GONE
        if not link.is_local:
            return APART
        reply = self._requests.request(lender, HOST_COPY, 0, codec.pickled(("give", *key)))
        answer = answer_of(self._requests, reply, deadline - time.monotonic())
        if answer != HERE or reply.frame is None:
            return GONE if answer is None else answer
        hold = reply.frame.buffers[0]
        # Bytes, when the segment was taken back from us meanwhile.
        return self._enter(key, kept, hold, True) if type(hold) is LeaseHandle else APART

    def _link_to(self, pid: int, seconds: float) -> Link | None:
        """Return the link to a process of this host; None when it takes too long to make."""
        errors: list[Exception] = []
        made = threading.Event()

        def make() -> None:
            try:
                self._peers.link_to(pid)
            except Exception as error:
                errors.append(error)
            made.set()

        if pid not in self._peers.links:
            self._reactor.start(make)
            made.wait(seconds)
            if errors:
                raise errors[0]
        return self._peers.links.get(pid)

    def _give_up(self, link: Link, call_id: int, key: Key) -> None:
        """Lend a copy to another process of this host, now or when it is here; on the reading thread."""
        with self._lock:
            kept = self.table.get(key)
            if kept is not None and not kept.here:
                kept.asking.append((link, call_id))
                return
        if kept is None:
            self._reactor.post(link, _RESULT, 0, call_id, codec.pickled(GONE))
        else:
            self._lend(kept, link, call_id)

    def _lend(self, kept: _ReceivedCopy, link: Link, call_id: int) -> None:
        hold = kept.hold
        assert hold is not None

        def lend() -> None:
            lease = hold.lease
            if not link.is_local or not self._sharing.offers.ensure_mapped(lease.segment, link.pid, math.inf):
                self._requests.answer(link, call_id, 0, codec.pickled(APART))
                return
            payload = codec.pickled(HERE)
            payload.buffers.append(lease.view())
            payload.spread = {0: hold}
            self._requests.answer(link, call_id, 0, payload)

        self._reactor.soon(lend)

    def _arrived(self, key: Key) -> None:
        """The bytes of a copy are here."""
        with self._lock:
            kept = self.table.get(key)
            if kept is None:
                return
            kept.here = True
            asking, kept.asking = kept.asking, []
        for link, call_id in asking:
            self._lend(kept, link, call_id)

    def _forget(self, key: Key) -> None:
        with self._lock:
            kept = self.table.pop(key, None)
        self._refuse(kept)

    def _refuse(self, kept: _ReceivedCopy | None) -> None:
        """Tell those who wait for a copy that it will not come."""
        if kept is not None:
            for link, call_id in kept.asking:
                self._reactor.post(link, _RESULT, 0, call_id, codec.pickled(GONE))

    def _lost(self, pid: int) -> None:
        """A process is gone, and its copies with it."""
        with self._lock:
            keys = [key for key in self.table if key[0] == pid]
        for key in keys:
            self._forget(key)


def answer_of(requests: RequestClient, reply: PendingReply, seconds: float) -> int | None:
    """Return the answer to a request; None when there is none in time."""
    try:
        requests.wait_inside(reply, seconds)
    finally:
        requests.pending.pop(reply.call_id, None)
    frame = reply.frame
    return None if frame is None or frame.flags & BROKEN else pickle.loads(frame.body)


__all__ = ["HOST_COPY", "GONE", "HERE", "HostCopyReceiver", "answer_of"]
