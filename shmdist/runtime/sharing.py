"""Shared memory of this process: which buffers travel as blocks, and who holds them.

How a value goes
----------------
The sender copies it into a block of his own arena, gives the receiver a count for the block,
and sends a token in the place of the bytes. The receiver makes an array over the block; when
the last view of it is gone, he gives the count back, with the next frame that goes to the
sender anyway, or a moment later. Both keep their mappings, so a block that is used again is
warm on both sides. A segment is *offered* to a receiver once, with its descriptor, and a token
of it is sent only when he has answered that it is mapped (``runtime.segment_exchange``). Who cannot map
it, or does not answer, gets everything by the stream. So does a value for which there is no warm block: the
maintainer (``runtime.maintenance``) sees to it, off the path, that there is one next time.

One block for many
------------------
A payload for several receivers is copied once; each gets a count and a private mapping of the
block, in which what he writes stays his own. The sender's count lasts as long as the payload.

Shared arrays
-------------
An array made by ``shmdist.shared`` is sent as the place where it lies. A holder that passes it on tells
the owner first: the counts are written down in ``memory.arena``. When the owner is gone, the memory lives
in the mappings of those who hold it, and nobody counts any more.

Death, at each step
-------------------
- The receiver dies before, while or after a token is written: :meth:`SharedMemory.lost` drops his
  counts, and a later one is refused. While the sender still copies into the block, the count
  is the sender's own, so nobody else is given the block.
- The sender dies: the frame that has not come whole is dropped. Arrays over his blocks stay
  what they are, for the mapping is the receiver's own.
- A holder dies who passed an array on: what he told the owner before was written before. What he
  did not come to send after that is found by an audit (``runtime.count_audit``).
- A descriptor on its way is the system's, and closed with the link.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.errors import ShmdistError
from shmdist.memory.arena import Arena, Extent
from shmdist.memory.leases import OWN, PRIVATE, SHARED, Lease, LeaseHandle, LeaseTable
from shmdist.memory.mapping import PAGE
from shmdist.memory.segment import Segment
from shmdist.refcount.receipts import Receipts
from shmdist.runtime.block_buffers import Kept, ReturningBuffer, address_of, write_pieces
from shmdist.runtime.fork_safety import ForkGuard
from shmdist.runtime.host_copies import HostCopySender
from shmdist.runtime.interrupts import current
from shmdist.runtime.maintenance import ArenaMaintainer
from shmdist.runtime.segment_exchange import SegmentExchange
from shmdist.serialization import arrays, codec
from shmdist.serialization.arrays import LINE, SharedSource, StridedSource, contiguous
from shmdist.transport.link import STUCK_SECONDS, Link, LinkClosed
from shmdist.transport.messages import TOKEN, BlockRef, Frame, Kind, OutgoingFrames

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_SEGMENT, _LEASES, _RESULT = int(Kind.SEGMENT), int(Kind.LEASES), int(Kind.RESULT)
_log = Log("sharing")

#: A change of a count: the block's number, the process, by how much, and who told (0 for the owner).
Change = tuple[int, int, int, int]


class SharedMemory:
    """Hangs on its node as ``sharing``.

    Attributes
    ----------
    lock : lock
        Guards the arena, the holds, and the tables below. A leaf: nothing is sent, copied or
        waited for while it is held.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self.lock = threading.Lock()
        self.maintainer = ArenaMaintainer(self)
        self.holds = LeaseTable(self.lock, self.maintainer.wake, current)
        self.arena = Arena(PAGE)
        self.offers = SegmentExchange(self)
        self.forks = ForkGuard(self)
        self.copies = HostCopySender(self)
        self.room = self.copies.room
        self.unsent_releases: dict[int, list[Change]] = {}  # counts to give back, by owner
        self.receipts = Receipts()  # of counts that others than the owner gave
        self.numbers = itertools.count(1)  # of segments

    def __repr__(self) -> str:
        owed = sum(map(len, self.unsent_releases.values()))
        return f"<SharedMemory {self.arena!r}, {self.holds!r}, owed {owed}>"

    @property
    def pid(self) -> int:
        """The number of this process in the cluster."""
        return self._node.pid

    @property
    def node(self) -> Node:
        """Whose sharing this is."""
        return self._node

    # ------------------------------------------------------------------ counts

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
        elif owner == self.pid:
            self.arena.change(lease.serial, owner, -1)
        elif owner not in self._node.lost_processes:
            reporter = self.receipts.spend(owner, lease.serial)
            try:
                self.unsent_releases.setdefault(owner, []).append((lease.serial, self.pid, -1, reporter))
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
            if self._node.links.get(link.pid) is not link or not self.unsent_releases.get(link.pid):
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
            if owner not in self._node.lost_processes:
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
            if owner not in self._node.lost_processes:  # else the counts went with it
                _log.info("process %d could not be told of its blocks: %s", owner, error)

    def _tell(self, owner: int, changes: list[Change]) -> None:
        with self.lock:
            unsent_releases = self.unsent_releases.pop(owner, [])
        node = self._node
        try:
            if not (unsent_releases or changes) or owner in node.lost_processes:
                return
            link, parts = node.way_to(owner), _leases_frame(owner, [*unsent_releases, *changes])
            written = link.send(parts, patience=STUCK_SECONDS)
        except BaseException:
            self._owe(owner, unsent_releases)
            raise
        if not written:
            firmly(node.flush, link)

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
        self.maintainer.wake()  # it may sleep for ever, all that is not in use having been given back

    # ------------------------------------------------------------------ going out

    def place(
        self, payload: codec.Payload, size: int, pid: int, done: OutgoingFrames
    ) -> tuple[list[Any], bool]:
        """Return what stands for a payload's buffers in a frame to process `pid`.

        Parameters
        ----------
        payload : Payload
            Its buffers and its body.
        size : int
            Bytes of the body.
        pid : int
            The receiver.
        done : OutgoingFrames
            Where grants are noted, and the buffers for which no block was there. Where this raises, the
            grants are to be taken back (:meth:`revoke`).

        Returns
        -------
        tuple of (list, bool)
            Contiguous bytes, and tokens; and whether the body is the last of them.
        """
        buffers: list[Any] = []
        for index, source in enumerate(payload.buffers):
            buffers.append(self._place(payload, index, source, pid, done))
        token = self._copy(payload.parts, size, pid, done) if size >= LINE else None
        if token is not None:
            buffers.append(token)
        return buffers, token is not None

    def _place(self, payload: codec.Payload, index: int, source: Any, pid: int, done: OutgoingFrames) -> Any:
        kind = type(source)
        if kind is SharedSource:
            token = self._pass_on(source.lease, source.lease, SHARED, pid, done)
            if token is None:
                if pid in self._node.lost_processes:
                    raise self._node.death(pid)
                why = self.offers.refusal_reason(pid, source.lease.segment)
                raise MemoryError(f"process {pid} cannot be given the shared array: {why}")
            return token
        if kind is Kept:
            lease = source.hold.lease
            token = self._pass_on(lease, lease, OWN, pid, done)
            return source.bytes() if token is None else token
        if kind is ReturningBuffer:
            token = self._go_home(source)
            if token is not None:
                return token
            view = source.lease.segment.view[source.offset : source.offset + source.nbytes]
            token = self._copy([view], len(source), pid, done)
            # Copied, for the block may be given back while the stream still reads it.
            return self._stay(source, bytes(view) if token is None else token)
        if len(source) < LINE:
            return contiguous(source)
        if payload.known is not None:
            found = payload.known.find(source)
            token = None if found is None else self._pass_on(found[0], found[1], PRIVATE, pid, done)
            if token is not None:
                return token
        if payload.spread is not None:
            hold = payload.spread.get(index)
            if hold is None:
                hold = self.copy_for_many(source)
            if hold is not None:
                payload.spread[index] = hold
                token = self._pass_on(hold.lease, hold.lease, PRIVATE, pid, done)
            else:
                token = None
                done.wanted.append(len(source))
            return contiguous(source) if token is None else token
        token = self._copy([source], len(source), pid, done)
        return contiguous(source) if token is None else token

    def _copy(self, pieces: list[Any], nbytes: int, pid: int, done: OutgoingFrames) -> BlockRef | None:
        """Copy bytes into a block for `pid`; None when there is no warm one that it can see."""
        block = self._take(nbytes)
        if block is None:
            done.wanted.append(nbytes)
            return None
        serial = block.serial
        try:
            segment = self.holds.segments[self.pid, block.segment]
            token = BlockRef(TOKEN.pack(serial, self.pid, segment.number, block.offset, nbytes, OWN))
            introduced = self.offers.ensure_mapped(segment, pid)
            if introduced:
                write_pieces(segment, block.offset, pieces, self._node.reactor.start)
                self._grant(done, self.pid, serial, self.arena.hand_over, serial, self.pid, pid)
        except BaseException:
            self._give_up(serial)
            raise
        if introduced:
            return token
        self._give_up(serial)
        return None

    def _grant(
        self, done: OutgoingFrames, owner: int, serial: int, count: Callable[..., Any], *args: Any
    ) -> None:
        """Note a count for the receiver of a frame, and make it; neither when that fails."""
        done.grants.append((owner, serial))
        try:
            if owner == self.pid:
                with self.lock:
                    count(*args)
            else:
                count(*args)
        except BaseException:
            del done.grants[-1]
            raise

    def _give_up(self, serial: int) -> None:
        """Give this process's count of a block back."""
        with self.lock:
            self.arena.change(serial, self.pid, -1)

    def _take(self, nbytes: int) -> Extent | None:
        self.maintainer.used()  # first: it may fail
        with self.lock:
            self.settle()
            return self.arena.take(nbytes, self.pid)

    def keep(self, source: Any) -> Any:
        """Copy a buffer that will be sent later: into a block, or plain memory where there is none."""
        nbytes = len(source)
        if nbytes >= LINE and len(self._node.peers) > 1:
            with current():
                hold = self._take_hold(nbytes, OWN)
                if hold is not None:
                    write_pieces(hold.lease.segment, hold.lease.offset, [source], self._node.reactor.start)
                    return Kept(hold)
            self.maintainer.want([nbytes], None)
        return source.bytes() if isinstance(source, StridedSource) else bytearray(source)

    def copy_for_many(self, source: Any, grow: bool = False) -> LeaseHandle | None:
        """Copy a buffer into a block that several processes will see; None when there is no warm one.

        `grow` makes one: dearer than the stream to one receiver, and cheaper than that to several.
        """
        hold = self.take_for_many(len(source), grow)
        if hold is not None:
            write_pieces(hold.lease.segment, hold.lease.offset, [source], self._node.reactor.start)
        return hold

    def take_for_many(self, nbytes: int, grow: bool) -> LeaseHandle | None:
        """Take a block that several processes will see; None when there is no warm one."""
        hold = self._take_hold(nbytes, PRIVATE)
        if hold is None and grow:
            self.maintainer.provide_now(nbytes)
            hold = self._take_hold(nbytes, PRIVATE)
        return hold

    def _take_hold(self, nbytes: int, mode: int, new: Segment | None = None) -> LeaseHandle | None:
        """Take a block, out of a new segment perhaps, and return its hold; None when there is no warm one."""
        if mode != SHARED:
            self.maintainer.used()  # first: it may fail
        with self.lock:
            self.settle()
            if new is not None:
                self.add_segment(new)
            block = self.arena.take(nbytes, self.pid, None if new is None else {new.number})
        if block is None:
            return None
        try:
            segment = self.holds.segments[self.pid, block.segment]
            return LeaseHandle(self.holds, Lease(segment, block.serial, block.offset, nbytes, mode))
        except BaseException:
            self._give_up(block.serial)
            raise

    def _pass_on(
        self, lease: Lease, part: Lease, mode: int, pid: int, done: OutgoingFrames
    ) -> BlockRef | None:
        """Give `pid` a count for a block that this process holds; returns the token of a part of it."""
        segment = lease.segment
        owner = segment.owner
        if owner != pid:
            if not self.offers.ensure_mapped(segment, pid, needed=mode == SHARED):
                return None
            if owner == self.pid:
                self._grant(done, owner, lease.serial, self.arena.lend, lease.serial, pid)
            elif owner not in self._node.lost_processes:
                change = (lease.serial, pid, +1, self.pid)
                self._grant(done, owner, lease.serial, self.tell, owner, [change])
        return BlockRef(TOKEN.pack(lease.serial, owner, segment.number, part.offset, part.nbytes, mode))

    def take_back(self, parts: OutgoingFrames, pid: int) -> None:
        """Take back what was granted for frames, and what they were to give back, unless they are gone."""
        if parts.gone:
            return
        grants = parts.grants
        with self.lock:
            while grants:
                owner, serial = grants[-1]
                if owner == self.pid:
                    self.arena.change(serial, pid, -1)
                elif owner not in self._node.lost_processes:
                    self.unsent_releases.setdefault(owner, []).append((serial, pid, -1, self.pid))
                del grants[-1]
        unsent_releases, parts.unsent_releases = parts.unsent_releases, []
        if unsent_releases:
            self._owe(pid, unsent_releases)

    # ------------------------------------------------------------------ going home

    def mark_moving(self, payload: codec.Payload, pid: int) -> None:
        """Let the buffers of a result that lie in blocks of its receiver go home without a copy."""
        if not len(self.holds):
            return
        for index, buffer in enumerate(payload.buffers):
            if type(buffer) is not memoryview or len(buffer) < LINE:
                continue
            address = address_of(buffer)
            lease = self.holds.find(address, len(buffer))
            if lease is None or lease.segment.owner != pid:
                continue
            moving = ReturningBuffer(lease, lease.offset + address - lease.start, len(buffer))
            with self.lock:  # a fork in another thread makes it no longer OWN
                if lease.mode != OWN or lease.moving:
                    continue
                lease.moving = True
                payload.buffers[index] = moving

    def revoke(self, parts: OutgoingFrames, payload: codec.Payload | None, pid: int) -> None:
        """A frame is not written: its counts are taken back, and what was to go home with it does not."""
        self.take_back(parts, pid)
        if payload is not None:
            self.stay(payload)

    def stay(self, payload: codec.Payload) -> None:
        """What was to go home with a payload does not."""
        for source in payload.buffers:
            if type(source) is ReturningBuffer:
                self._stay(source, None)

    def _go_home(self, moving: ReturningBuffer) -> BlockRef | None:
        """Return the token of a block that nobody here looks into any more; else None."""
        lease = moving.lease
        with self.lock:
            self.settle()
            if not lease.dead or lease.pins:
                return None
        owner, number = lease.segment.owner, lease.segment.number
        return BlockRef(TOKEN.pack(lease.serial, owner, number, moving.offset, moving.nbytes, OWN))

    def _stay(self, moving: ReturningBuffer, result: Any) -> Any:
        """The block does not go home after all: its lease is like any other again."""
        lease = moving.lease
        with self.lock:
            self.settle()
            if lease.moving and lease.dead and not lease.pins:
                self.release(lease)
            lease.moving = False
        return result

    # ------------------------------------------------------------------ coming in

    def adopt(self, token: bytes, sender: int) -> LeaseHandle:
        """Return the hold of a block that a frame from `sender` brings; on the reading thread.

        Raises
        ------
        LookupError
            Its segment is not mapped here, or its sender is lost and has been audited.
        """
        serial, owner, number, offset, nbytes, mode = TOKEN.unpack(token)
        try:
            segment = self.holds.segment(owner, number)
        except LookupError:
            segment = self._come_with(owner, number, serial, sender)
        if mode == PRIVATE:
            self.maintainer.used()  # what is written there is this process's memory, until it is let go
        elif mode == SHARED and arrays.find_shared is None:
            arrays.registry, arrays.find_shared = self.holds, self.find_shared
        # Without a count as yet: where an error comes before it has one, it is adopted again.
        lease = Lease(segment, 0, offset, nbytes, mode)
        hold = LeaseHandle(self.holds, lease)
        with self.lock:
            if owner == self.pid:  # it comes home
                if mode == OWN:
                    self.arena.hand_over(serial, sender, self.pid)
                else:
                    self.arena.change(serial, self.pid, +1)
            elif owner != sender:
                if sender in self._node.lost_processes:
                    raise LookupError(f"process {sender} is gone, and what it told is audited")
                if owner not in self._node.lost_processes:
                    self.receipts.note(owner, serial, sender)
            lease.serial = serial
        return hold

    def _come_with(self, owner: int, number: int, serial: int, sender: int) -> Segment:
        """Return the segment of a token that may have come together with the offer of it.

        Raises
        ------
        LookupError
            It is not mapped here: the token is refused, and its count goes back.
        """
        self._node.reactor.hand_out_segments()
        try:
            return self.holds.segment(owner, number)
        except LookupError:
            with self.lock:
                if owner not in self._node.lost_processes:
                    change = serial, self.pid, -1, 0 if sender == owner else sender
                    self.unsent_releases.setdefault(owner, []).append(change)
            self.maintainer.wake()
            raise

    # ------------------------------------------------------------------ shared arrays

    def add_segment(self, segment: Segment) -> None:
        """Enter a new segment of this process; the lock is held."""
        key = self.pid, segment.number
        self.holds.segments[key] = segment
        try:
            self.arena.add_segment(segment.number, segment.size)
        except BaseException:
            if segment.number not in self.arena.segments():
                del self.holds.segments[key]
            raise

    def make_shared(self, nbytes: int) -> tuple[LeaseHandle, bool]:
        """Return the hold of a new block for a shared array, and whether the block is known to be zero.

        Raises
        ------
        MemoryError
            There is not so much memory.
        """
        arrays.registry, arrays.find_shared = self.holds, self.find_shared
        segment: Segment | None = None
        while (hold := self._take_hold(nbytes, SHARED, segment)) is None:
            # Not touched: whoever writes to it first, has it near.
            if self.maintainer.warm(nbytes, touch=False):
                segment = None
            else:
                segment = self.maintainer.make_shared_segment(nbytes)
        self.maintainer.used()
        return hold, segment is not None

    def find_shared(self, low: int, high: int) -> Lease | None:
        """Return the lease of the shared array in which addresses from `low` to before `high` lie."""
        if not self.holds.shared:
            return None
        lease = self.holds.find(low, high - low)
        return lease if lease is not None and lease.mode == SHARED else None

    # ------------------------------------------------------------------ death

    def lost(self, pid: int) -> None:
        """A process is gone: its counts are dropped, and its memory is not ours to keep."""
        with self.lock:
            self.settle()
            self.arena.lose(pid)
            self.unsent_releases.pop(pid, None)
            self.receipts.forget(pid)
            kept = self.offers.lost(pid)
        self.maintainer.wake()
        for segment in kept:
            self.maintainer.keep_for_now(segment)

    def state(self) -> dict[str, Any]:
        """Return what is lent and held; for people and tests."""
        with self.lock:
            self.settle()
            self.arena._check()
            self.holds._check()
            self.receipts._check()
            return {
                "lent": {block.serial: dict(block.counts) for block in self.arena.blocks.values()},
                "held": [repr(lease) for lease in self.holds.leases()],
                "unsent_releases": {
                    owner: list(changes) for owner, changes in self.unsent_releases.items() if changes
                },
                # A segment's own, and the one that the module mmap keeps.
                "descriptors": 2 * len(self.holds.segments)
                + self.maintainer.descriptors
                + self._node.reactor.rings.descriptors,
            }


def _leases_frame(owner: int, changes: list[Change]) -> OutgoingFrames:
    payload = codec.pickled(changes)
    return codec.frame(_LEASES, 0, 0, owner, payload)
