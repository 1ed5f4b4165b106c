"""The blocks of this process, its leases of others', and how counts of them are given back.

Counts that ended leases had are owed to the owners of the blocks. They go with the next frame to that
process, or by a frame of their own a moment later (``runtime.maintenance``).
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.errors import ShmdistError
from shmdist.memory.arena import Arena
from shmdist.memory.leases import Lease, LeaseTable
from shmdist.memory.mapping import PAGE
from shmdist.memory.segment import Segment
from shmdist.refcount.receipts import Receipts
from shmdist.runtime.block_buffers import ReturningBuffer
from shmdist.runtime.interrupts import current
from shmdist.runtime.peers import Peers
from shmdist.runtime.reactor import Reactor
from shmdist.serialization import codec
from shmdist.transport.link import STUCK_SECONDS, Link, LinkClosed
from shmdist.transport.messages import Frame, Kind, OutgoingFrames

_LEASES = int(Kind.LEASES)
_log = Log("sharing")

#: A change of a count: the block's number, the process, by how much, and who told (0 for the owner).
Change = tuple[int, int, int, int]


def _no_maintainer(*_: Any) -> None:
    """Do nothing: there is no maintainer yet."""


class BlockCounts:
    """The arena, the leases, and the counts that are owed.

    Attributes
    ----------
    lock : lock
        Guards the arena, the holds, and the tables here. A leaf: nothing is sent, copied or
        waited for while it is held.
    arena : Arena
        The blocks of this process.
    holds : LeaseTable
        What this process holds, of its own blocks and of others'.
    unsent_releases : dict
        Counts to give back, by owner.
    receipts : Receipts
        Of counts that others than the owner gave.
    numbers : iterator of int
        For new segments.
    wake, want : callable
        Wake the maintainer; and let it know sizes of blocks that are wanted, and for which process. The first
        is safe in finalizers. Set by the maintainer.
    """

    def __init__(self, peers: Peers, reactor: Reactor) -> None:
        self.peers, self.reactor = peers, reactor
        self.lock = threading.Lock()
        self.wake: Callable[[], None] = _no_maintainer
        self.want: Callable[[list[int], int | None], None] = _no_maintainer
        self.holds = LeaseTable(self.lock, lambda: self.wake(), current)
        self.arena = Arena(PAGE)
        self.unsent_releases: dict[int, list[Change]] = {}
        self.receipts = Receipts()
        self.numbers = itertools.count(1)

    def __repr__(self) -> str:
        owed = sum(map(len, self.unsent_releases.values()))
        return f"<BlockCounts {self.arena!r}, {self.holds!r}, owed {owed}>"

    def settle(self) -> None:
        """Give back what ended holds had; the lock is held."""
        over = self.holds.drain()
        while over:
            self.release(over[-1])
            del over[-1]

    def release(self, lease: Lease) -> None:
        """Give a count back: now when the block is this process's, else with the next releases."""
        owner = lease.segment.owner
        if not lease.serial:
            pass  # a part, which has no count of its own
        elif owner == self.peers.pid:
            self.arena.change(lease.serial, owner, -1)
        elif owner not in self.peers.lost:
            reporter = self.receipts.spend(owner, lease.serial)
            try:
                self.unsent_releases.setdefault(owner, []).append(
                    (lease.serial, self.peers.pid, -1, reporter)
                )
            except BaseException:
                if reporter:
                    self.receipts.note(owner, lease.serial, reporter)
                raise

    def has_pending_releases(self) -> bool:
        """Return whether there may be counts to give back; for the hot path."""
        return bool(self.holds.ended or self.unsent_releases)

    def pending_releases(self, link: Link) -> OutgoingFrames:
        """Return the frame that gives counts back to the process at the end of `link`, if any.

        They stand in its `unsent_releases`, for :meth:`take_back` if it is not written.
        """
        with self.lock:
            self.settle()
            # By any other link it could overtake what was told by this one.
            if self.peers.links.get(link.pid) is not link or not self.unsent_releases.get(link.pid):
                return OutgoingFrames()
            changes = self.unsent_releases.pop(link.pid)
        try:
            parts = _leases_frame(link.pid, changes)
            parts.unsent_releases = changes
        except BaseException:
            self._owe(link.pid, changes)
            raise
        return parts

    def _owe(self, owner: int, changes: list[Change]) -> None:
        """What is owed could not be told: it is owed again."""
        with self.lock:
            if owner not in self.peers.lost:
                self.unsent_releases[owner] = [*changes, *self.unsent_releases.get(owner, ())]

    def tell(self, owner: int, changes: list[Change]) -> None:
        """Tell an owner now, and before it whatever is owed to it.

        Raises
        ------
        Exception
            There is no memory, say: what is owed is owed as before.
        """
        try:
            self._tell(owner, changes)
        except (LinkClosed, ConnectionError, ShmdistError) as error:
            if owner not in self.peers.lost:  # else the counts went with it
                _log.info("process %d could not be told of its blocks: %s", owner, error)

    def _tell(self, owner: int, changes: list[Change]) -> None:
        with self.lock:
            unsent_releases = self.unsent_releases.pop(owner, [])
        try:
            if not (unsent_releases or changes) or owner in self.peers.lost:
                return
            link, parts = self.peers.way_to(owner), _leases_frame(owner, [*unsent_releases, *changes])
            written = link.send(parts, patience=STUCK_SECONDS)
        except BaseException:
            self._owe(owner, unsent_releases)
            raise
        if not written:
            firmly(self.reactor.flush, link)

    def pay(self) -> None:
        """Give back whatever is owed, to everybody."""
        with self.lock:
            self.settle()
            owners = list(self.unsent_releases)
        for owner in owners:
            self.tell(owner, [])

    def on_leases(self, frame: Frame) -> None:
        """Change counts of this process's blocks, as their holders tell."""
        if not frame.buffers:
            frame.buffers = [pickle.loads(frame.body)]
        changes: list[Change] = frame.buffers[0]  # those that are made are taken out of it: see `control`
        with self.lock:
            while changes:
                self.arena.change(*changes[0])
                del changes[0]
        self.wake()  # it may sleep for ever, all that is not in use having been given back

    def take_back(self, parts: OutgoingFrames, pid: int) -> None:
        """Take back what was granted for frames, and what they were to give back, unless they are gone."""
        if parts.gone:
            return
        grants = parts.grants
        with self.lock:
            while grants:
                owner, serial = grants[-1]
                if owner == self.peers.pid:
                    self.arena.change(serial, pid, -1)
                elif owner not in self.peers.lost:
                    self.unsent_releases.setdefault(owner, []).append((serial, pid, -1, self.peers.pid))
                del grants[-1]
        unsent_releases, parts.unsent_releases = parts.unsent_releases, []
        if unsent_releases:
            self._owe(pid, unsent_releases)

    def revoke(self, parts: OutgoingFrames, payload: codec.Payload | None, pid: int) -> None:
        """A frame is not written: its counts are taken back, and what was to go home with it does not."""
        self.take_back(parts, pid)
        if payload is not None:
            self.stay(payload)

    def stay(self, payload: codec.Payload) -> None:
        """What was to go home with a payload does not."""
        for source in payload.buffers:
            if type(source) is ReturningBuffer:
                self.keep_block(source, None)

    def keep_block(self, moving: ReturningBuffer, result: Any) -> Any:
        """The block does not go home after all: its lease is like any other again."""
        lease = moving.lease
        with self.lock:
            self.settle()
            if lease.moving and lease.dead and not lease.pins:
                self.release(lease)
            lease.moving = False
        return result

    def add_segment(self, segment: Segment) -> None:
        """Enter a new segment of this process; the lock is held."""
        key = self.peers.pid, segment.number
        self.holds.segments[key] = segment
        try:
            self.arena.add_segment(segment.number, segment.size)
        except BaseException:
            if segment.number not in self.arena.segments():
                del self.holds.segments[key]
            raise


def _leases_frame(owner: int, changes: list[Change]) -> OutgoingFrames:
    payload = codec.pickled(changes)
    return codec.frame(_LEASES, 0, 0, owner, payload)
