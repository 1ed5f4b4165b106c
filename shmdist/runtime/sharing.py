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
- The receiver dies before, while or after a token is written: :meth:`SharedMemory.lose` drops his
  counts, and a later one is refused. While the sender still copies into the block, the count
  is the sender's own, so nobody else is given the block.
- The sender dies: the frame that has not come whole is dropped. Arrays over his blocks stay
  what they are, for the mapping is the receiver's own.
- A holder dies who passed an array on: what he told the owner before was written before. What he
  did not come to send after that is found by an audit (``runtime.count_audit``).
- A descriptor on its way is the system's, and closed with the link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shmdist.memory.arena import Extent
from shmdist.memory.leases import OWN, PRIVATE, SHARED, Lease, LeaseHandle
from shmdist.memory.segment import Segment
from shmdist.runtime.block_buffers import Kept, ReturningBuffer, address_of, write_pieces
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.fork_safety import ForkGuard
from shmdist.runtime.host_copies import HostCopySender
from shmdist.runtime.interrupts import current
from shmdist.runtime.maintenance import ArenaMaintainer
from shmdist.runtime.peers import Peers
from shmdist.runtime.reactor import Reactor
from shmdist.runtime.requests import RequestClient
from shmdist.runtime.segment_exchange import SegmentExchange
from shmdist.serialization import arrays, codec
from shmdist.serialization.arrays import LINE, SharedSource, StridedSource, contiguous
from shmdist.transport.messages import TOKEN, BlockRef, OutgoingFrames


class SharedMemory:
    """Hangs on its node as ``sharing``.

    Attributes
    ----------
    blocks : BlockCounts
        The tables, and the lock that guards them.
    """

    def __init__(
        self, peers: Peers, reactor: Reactor, counts: ReferenceCounts, requests: RequestClient
    ) -> None:
        self.peers, self._reactor = peers, reactor
        self.blocks = blocks = requests.blocks
        self.lock, self.arena, self.holds = blocks.lock, blocks.arena, blocks.holds
        self.receipts = blocks.receipts
        self.offers = SegmentExchange(blocks, requests)
        self.maintainer = ArenaMaintainer(blocks, counts, self.offers)
        self.forks = ForkGuard(blocks)
        self.copies = HostCopySender(self, requests, counts)
        self.room, self.revoke = self.copies.room, blocks.revoke

    def __repr__(self) -> str:
        return f"<SharedMemory {self.blocks!r}>"

    @property
    def pid(self) -> int:
        """The number of this process in the cluster."""
        return self.peers.pid

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
            grants are to be taken back (:meth:`BlockCounts.revoke`).

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
                if pid in self.peers.lost:
                    raise self.peers.death(pid)
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
            return self.blocks.keep_block(source, bytes(view) if token is None else token)
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
                write_pieces(segment, block.offset, pieces, self._reactor.start)
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
            self.blocks.settle()
            return self.arena.take(nbytes, self.pid)

    def keep(self, source: Any) -> Any:
        """Copy a buffer that will be sent later: into a block, or plain memory where there is none."""
        nbytes = len(source)
        if nbytes >= LINE and len(self.peers.members) > 1:
            with current():
                hold = self._take_hold(nbytes, OWN)
                if hold is not None:
                    write_pieces(hold.lease.segment, hold.lease.offset, [source], self._reactor.start)
                    return Kept(hold)
            self.maintainer.want([nbytes], None)
        return source.bytes() if isinstance(source, StridedSource) else bytearray(source)

    def copy_for_many(self, source: Any, grow: bool = False) -> LeaseHandle | None:
        """Copy a buffer into a block that several processes will see; None when there is no warm one.

        `grow` makes one: dearer than the stream to one receiver, and cheaper than that to several.
        """
        hold = self.take_for_many(len(source), grow)
        if hold is not None:
            write_pieces(hold.lease.segment, hold.lease.offset, [source], self._reactor.start)
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
            self.blocks.settle()
            if new is not None:
                self.blocks.add_segment(new)
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
            elif owner not in self.peers.lost:
                change = (lease.serial, pid, +1, self.pid)
                self._grant(done, owner, lease.serial, self.blocks.tell, owner, [change])
        return BlockRef(TOKEN.pack(lease.serial, owner, segment.number, part.offset, part.nbytes, mode))

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

    def _go_home(self, moving: ReturningBuffer) -> BlockRef | None:
        """Return the token of a block that nobody here looks into any more; else None."""
        lease = moving.lease
        with self.lock:
            self.blocks.settle()
            if not lease.dead or lease.pins:
                return None
        owner, number = lease.segment.owner, lease.segment.number
        return BlockRef(TOKEN.pack(lease.serial, owner, number, moving.offset, moving.nbytes, OWN))

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
                if sender in self.peers.lost:
                    raise LookupError(f"process {sender} is gone, and what it told is audited")
                if owner not in self.peers.lost:
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
        self._reactor.hand_out_segments()
        try:
            return self.holds.segment(owner, number)
        except LookupError:
            with self.lock:
                if owner not in self.peers.lost:
                    change = serial, self.pid, -1, 0 if sender == owner else sender
                    self.blocks.unsent_releases.setdefault(owner, []).append(change)
            self.maintainer.wake()
            raise

    # ------------------------------------------------------------------ shared arrays

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

    def lose(self, pid: int) -> None:
        """A process is gone: its counts are dropped, and its memory is not ours to keep."""
        with self.lock:
            self.blocks.settle()
            self.arena.lose(pid)
            self.blocks.unsent_releases.pop(pid, None)
            self.receipts.forget(pid)
            kept = self.offers.lost(pid)
        self.maintainer.wake()
        for segment in kept:
            self.maintainer.keep_for_now(segment)

    def state(self) -> dict[str, Any]:
        """Return what is lent and held; for people and tests."""
        with self.lock:
            self.blocks.settle()
            self.arena._check()
            self.holds._check()
            self.receipts._check()
            return {
                "lent": {block.serial: dict(block.counts) for block in self.arena.blocks.values()},
                "held": [repr(lease) for lease in self.holds.leases()],
                "unsent_releases": {
                    owner: list(changes) for owner, changes in self.blocks.unsent_releases.items() if changes
                },
                # A segment's own, and the one that the module mmap keeps.
                "descriptors": 2 * len(self.holds.segments)
                + self.maintainer.descriptors
                + self._reactor.rings.descriptors,
            }
