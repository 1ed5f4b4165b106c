"""A node's shared memory: what goes through blocks, what is held of others', who is told.

How a value goes
----------------
The sender copies it into a block of his own arena, gives the receiver a count for the block,
and sends a token in the place of the bytes. The receiver makes an array over the block; when
the last view of it is gone, he gives the count back, with the next frame that goes to the
sender anyway, or a moment later. Both keep their mappings, so a block that is used again is
warm on both sides. A segment is *offered* to a receiver once, with its descriptor, and a token
of it is sent only when he has answered that it is mapped: a token is never refused. Who
cannot map it gets everything by the stream. So does a value for which there is no warm block:
the keeper (``runtime.keeper``) sees to it, off the path, that there is one next time.

One block for many
------------------
A payload for several receivers is copied once; each gets a count and a private mapping of the
block, in which what he writes stays his own. The sender's count lasts as long as the payload.

Shared arrays
-------------
An array made by ``shmdist.shared`` is sent as the place where it lies, and waits for its
segment to be accepted. A holder that passes it on tells the owner first: the counts are
written down in ``memory.arena``. When the owner is gone, the memory lives in the mappings of
those who hold it, and nobody counts any more.

Death, at each step
-------------------
- The receiver dies before, while or after a token is written: :meth:`Sharing.lost` drops his
  counts, and a later one is refused. While the sender still copies into the block, the count
  is the sender's own, so nobody else is given the block.
- The sender dies: the frame that has not come whole is dropped. Arrays over his blocks stay
  what they are, for the mapping is the receiver's own.
- A holder dies who passed an array on: what he told the owner before was written before. What he
  did not come to send after that is found by an audit (``runtime.audits``).
- A descriptor on its way is the system's, and closed with the link.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.memory.arena import Arena
from shmdist.memory.holds import OWN, PRIVATE, SHARED, Hold, Holds, Lease
from shmdist.memory.receipts import Receipts
from shmdist.memory.segment import PAGE, Segment
from shmdist.runtime.copies import Copies
from shmdist.runtime.forks import Forks
from shmdist.runtime.keeper import Keeper
from shmdist.runtime.offers import Offers
from shmdist.runtime.strand import current
from shmdist.wire import arrays, codec
from shmdist.wire.arrays import LINE, SharedView, Strided, contiguous
from shmdist.wire.link import Link
from shmdist.wire.messages import TOKEN, Frame, Kind, Parts, Token

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_SEGMENT, _LEASES, _RESULT = int(Kind.SEGMENT), int(Kind.LEASES), int(Kind.RESULT)
_log = Log("sharing")

#: A change of a count: the block's number, the process, by how much, and who told (0 for the owner).
Change = tuple[int, int, int, int]


class Moving:
    """A buffer of a result that lies in a block of the caller: stands for it without holding it."""

    __slots__ = ("lease", "nbytes", "offset")

    def __init__(self, lease: Lease, offset: int, nbytes: int) -> None:
        self.lease = lease
        self.offset = offset
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes


class Sharing:
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
        self.keeper = Keeper(self)
        self.holds = Holds(self.lock, self.keeper.wake, current)
        self.arena = Arena(PAGE)
        self.offers = Offers(self)
        self.forks = Forks(self)
        self.copies = Copies(self)
        self.room = self.copies.room
        self.owed: dict[int, list[Change]] = {}  # counts to give back, by owner
        self.receipts = Receipts()  # of counts that others than the owner gave
        self.numbers = itertools.count(1)  # of segments

    def __repr__(self) -> str:
        return f"<Sharing {self.arena!r}, {self.holds!r}, owed {sum(map(len, self.owed.values()))}>"

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
        for lease in self.holds.drain():
            self.release(lease)

    def release(self, lease: Lease) -> None:
        """Give a count back: now when the block is this process's, else with the next dues."""
        owner = lease.segment.owner
        if not lease.serial:
            pass  # a part, which has no count of its own
        elif owner == self.pid:
            self.arena.change(lease.serial, owner, -1)
        elif owner not in self._node.graves:
            teller = self.receipts.spend(owner, lease.serial)
            self.owed.setdefault(owner, []).append((lease.serial, self.pid, -1, teller))

    def has_dues(self) -> bool:
        """Tell whether there may be counts to give back; for the hot path."""
        return bool(self.holds.ended or self.owed)

    def dues(self, link: Link) -> Parts:
        """Return the frame that gives counts back to the process at the end of `link`, if any."""
        with self.lock:
            self.settle()
            # By any other link it could overtake what was told by this one.
            if self._node.links.get(link.pid) is not link:
                return Parts()
            changes = self.owed.pop(link.pid, None)
        return _leases_frame(link.pid, changes) if changes else Parts()

    def tell(self, owner: int, changes: list[Change]) -> None:
        """Tell an owner now, and before it whatever is owed to it."""
        with self.lock:
            changes = [*self.owed.pop(owner, ()), *changes]
        node = self._node
        if not changes or owner in node.graves:
            return
        try:
            node.way_to(owner).send(_leases_frame(owner, changes))
        except Exception as error:
            if owner not in node.graves:  # else the counts went with it
                _log.info("process %d could not be told of its blocks: %s", owner, error)

    def pay(self) -> None:
        """Give back whatever is owed, to everybody."""
        with self.lock:
            self.settle()
            owners = list(self.owed)
        for owner in owners:
            self.tell(owner, [])

    def on_leases(self, frame: Frame) -> None:
        """Change counts of this process's blocks, as their holders tell."""
        changes: list[Change] = pickle.loads(frame.body)
        with self.lock:
            for change in changes:
                self.arena.change(*change)
        self.keeper.wake()  # it may sleep for ever, all that is not in use having been given back

    # ------------------------------------------------------------------ going out

    def place(self, payload: codec.Payload, size: int, pid: int, done: Parts) -> tuple[list[Any], bool]:
        """Return what stands for a payload's buffers in a frame to process `pid`.

        Parameters
        ----------
        payload : Payload
            Its buffers and its body.
        size : int
            Bytes of the body.
        pid : int
            The receiver.
        done : Parts
            Where grants are noted, and the buffers for which no block was there.

        Returns
        -------
        tuple of (list, bool)
            Contiguous bytes, and tokens; and whether the body is the last of them.
        """
        buffers: list[Any] = []
        try:
            for index, source in enumerate(payload.buffers):
                buffers.append(self._place(payload, index, source, pid, done))
            in_block = False
            if size >= LINE:
                token = self._copy(payload.parts, size, pid, done)
                if token is not None:
                    buffers.append(token)
                    in_block = True
        except BaseException:
            self.take_back(done, pid)
            for source in payload.buffers:
                if type(source) is Moving:
                    self._stay(source, None)
            raise
        return buffers, in_block

    def _place(self, payload: codec.Payload, index: int, source: Any, pid: int, done: Parts) -> Any:
        kind = type(source)
        if kind is SharedView:
            token = self._pass_on(source.lease, source.lease, SHARED, pid, done)
            if token is None:
                if pid in self._node.graves:
                    raise self._node.death(pid)
                why = self.offers.why_refused(pid, source.lease.segment)
                raise MemoryError(f"process {pid} cannot be given the shared array: {why}")
            return token
        if kind is Moving:
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

    def _copy(self, pieces: list[Any], nbytes: int, pid: int, done: Parts) -> Token | None:
        """Copy bytes into a block for `pid`; None when there is no warm one that it can see."""
        block = self._take(nbytes)
        if block is None:
            done.wanted.append(nbytes)
            return None
        segment = self.holds.segments[self.pid, block.segment]
        serial, written = block.serial, False
        try:
            if self.offers.introduce(segment, pid):
                _write(segment, block.offset, pieces, self._node.dispatcher.start)
                written = True
        finally:
            with self.lock:
                if written:
                    self.arena.lend(serial, pid)
                self.arena.change(serial, self.pid, -1)
        if not written:
            return None
        done.grants.append((self.pid, serial))
        return Token(TOKEN.pack(serial, self.pid, segment.number, block.offset, nbytes, OWN))

    def _take(self, nbytes: int) -> Any:
        with self.lock:
            self.settle()
            block = self.arena.take(nbytes, self.pid)
        if block is not None:
            self.keeper.used()
        return block

    def copy_for_many(self, source: Any, grow: bool = False) -> Hold | None:
        """Copy a buffer into a block that several processes will see; None when there is no warm one.

        `grow` makes one: dearer than the stream to one receiver, and cheaper than that to several.
        """
        hold = self.take_for_many(len(source), grow)
        if hold is not None:
            _write(hold.lease.segment, hold.lease.offset, [source], self._node.dispatcher.start)
        return hold

    def take_for_many(self, nbytes: int, grow: bool) -> Hold | None:
        """Take a block that several processes will see; None when there is no warm one."""
        block = self._take(nbytes)
        if block is None and grow:
            self.keeper.provide_now(nbytes)
            block = self._take(nbytes)
        if block is None:
            return None
        segment = self.holds.segments[self.pid, block.segment]
        return Hold(self.holds, Lease(segment, block.serial, block.offset, nbytes, PRIVATE))

    def _pass_on(self, lease: Lease, part: Lease, mode: int, pid: int, done: Parts) -> Token | None:
        """Give `pid` a count for a block that this process holds; returns the token of a part of it."""
        segment = lease.segment
        owner = segment.owner
        if owner != pid:
            if not self.offers.introduce(segment, pid):
                return None
            if owner == self.pid:
                with self.lock:
                    self.arena.lend(lease.serial, pid)
            elif owner not in self._node.graves:
                self.tell(owner, [(lease.serial, pid, +1, self.pid)])
            done.grants.append((owner, lease.serial))
        return Token(TOKEN.pack(lease.serial, owner, segment.number, part.offset, part.nbytes, mode))

    def take_back(self, parts: Parts, pid: int) -> None:
        """Take back what was granted for frames that will not be written."""
        grants, parts.grants = parts.grants, []
        with self.lock:
            for owner, serial in grants:
                if owner == self.pid:
                    self.arena.change(serial, pid, -1)
                elif owner not in self._node.graves:
                    self.owed.setdefault(owner, []).append((serial, pid, -1, self.pid))

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
            with self.lock:  # a fork in another thread makes it no longer OWN
                if lease.mode != OWN or lease.moving:
                    continue
                lease.moving = True
            payload.buffers[index] = Moving(lease, lease.offset + address - lease.start, len(buffer))

    def _go_home(self, moving: Moving) -> Token | None:
        """Return the token of a block that nobody here looks into any more; else None."""
        lease = moving.lease
        with self.lock:
            self.settle()
            if not lease.dead or lease.pins:
                return None
        owner, number = lease.segment.owner, lease.segment.number
        return Token(TOKEN.pack(lease.serial, owner, number, moving.offset, moving.nbytes, OWN))

    def _stay(self, moving: Moving, result: Any) -> Any:
        """The block does not go home after all: its lease is like any other again."""
        lease = moving.lease
        with self.lock:
            self.settle()
            stays, lease.moving = lease.moving, False
            if stays and lease.dead and not lease.pins:
                self.release(lease)
        return result

    # ------------------------------------------------------------------ coming in

    def adopt(self, token: bytes, sender: int) -> Hold:
        """Return the hold of a block that a frame from `sender` brings; on the reading thread.

        Raises
        ------
        LookupError
            Its segment is not mapped here, or its sender is lost and has been audited.
        """
        serial, owner, number, offset, nbytes, mode = TOKEN.unpack(token)
        segment = self.holds.segment(owner, number)
        if owner == self.pid:  # it comes home
            with self.lock:
                self.arena.change(serial, self.pid, +1)
                if mode == OWN:
                    self.arena.change(serial, sender, -1)
        elif owner != sender:
            with self.lock:
                if sender in self._node.graves:
                    raise LookupError(f"process {sender} is gone, and what it told is audited")
                if owner not in self._node.graves:
                    self.receipts.note(owner, serial, sender)
        if mode == PRIVATE:
            self.keeper.used()  # what is written there is this process's memory, until it is let go
        elif mode == SHARED and arrays.find_shared is None:
            arrays.registry, arrays.find_shared = self.holds, self.find_shared
        return Hold(self.holds, Lease(segment, serial, offset, nbytes, mode))

    # ------------------------------------------------------------------ shared arrays

    def add_segment(self, segment: Segment) -> None:
        """Enter a new segment of this process; the lock is held."""
        self.holds.segments[self.pid, segment.number] = segment
        self.arena.add_segment(segment.number, segment.size)

    def make_shared(self, nbytes: int) -> tuple[Hold, bool]:
        """Return the hold of a new block for a shared array, and whether the block is known to be zero.

        Raises
        ------
        MemoryError
            There is not so much memory.
        """
        arrays.registry, arrays.find_shared = self.holds, self.find_shared
        with self.lock:
            self.settle()
            block = self.arena.take(nbytes, self.pid)
        fresh = False
        while block is None:
            # Not touched: whoever writes to it first, has it near.
            if self.keeper.warm(nbytes, touch=False):
                among = None
            else:
                segment = self.keeper.make_shared_segment(nbytes)
                among, fresh = {segment.number}, True
            with self.lock:
                if among is not None:
                    self.add_segment(segment)
                block = self.arena.take(nbytes, self.pid, among)
        self.keeper.used()
        segment = self.holds.segments[self.pid, block.segment]
        return Hold(self.holds, Lease(segment, block.serial, block.offset, nbytes, SHARED)), fresh

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
            self.owed.pop(pid, None)
            self.receipts.forget(pid)
            kept = self.offers.lost(pid)
        self.keeper.wake()
        for segment in kept:
            self.keeper.keep_for_now(segment)

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
                "owed": {owner: list(changes) for owner, changes in self.owed.items() if changes},
                # A segment's own, and the one that the module mmap keeps.
                "descriptors": 2 * len(self.holds.segments)
                + self.keeper.descriptors
                + self._node.dispatcher.mail.descriptors,
            }


def _leases_frame(owner: int, changes: list[Change]) -> Parts:
    payload = codec.pickled(changes)
    return codec.frame(_LEASES, 0, 0, owner, payload)


def address_of(buffer: Any) -> int:
    """Return where a buffer lies."""
    import numpy

    address: int = numpy.frombuffer(buffer, "B").__array_interface__["data"][0]
    return address


def _write(segment: Segment, offset: int, pieces: list[Any], start: Any) -> None:
    """Write pieces one after the other."""
    for piece in pieces:
        if isinstance(piece, Strided):
            piece.write_to(segment.array[offset : offset + piece.nbytes])
        else:
            segment.write(offset, piece, start)
        offset += len(piece)
