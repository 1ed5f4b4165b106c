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
- A holder dies who passed an array on: what he told the owner before was written before.
- A descriptor on its way is the system's, and closed with the link.

Forks
-----
A forked child sees the blocks of its parent, but the cluster does not know it. Its values must
not change when the parent gives them back: they are pinned until the child has ended or has
become another program, which the end of a pipe tells. And what the child writes must stay its
own: it maps them privately, in their place.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

from shmdist._log import Log
from shmdist.memory.arena import Arena
from shmdist.memory.holds import OWN, PRIVATE, SHARED, Hold, Holds, Lease
from shmdist.memory.segment import PAGE, Segment
from shmdist.runtime.keeper import Keeper
from shmdist.runtime.replies import Reply
from shmdist.wire import arrays, codec
from shmdist.wire.arrays import SharedView, Strided, contiguous
from shmdist.wire.link import Link
from shmdist.wire.messages import TOKEN, Frame, Kind, Parts, Token

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

#: Buffers from this size on, in bytes, go through blocks: below it, the stream is faster.
LINE = 1 << 15
_SEGMENT, _LEASES, _RESULT = int(Kind.SEGMENT), int(Kind.LEASES), int(Kind.RESULT)
_log = Log("sharing")

#: A change of a count: the block's number, the process, by how much.
Change = tuple[int, int, int]


class _Peer:
    """What this process knows of another one that shares memory with it."""

    __slots__ = ("accepted", "offered", "refused")

    def __init__(self) -> None:
        self.accepted: dict[int, set[int]] = {}  # numbers of segments that it has mapped, by owner
        self.offered: dict[tuple[int, int], Any] = {}  # replies not yet here, by owner and number
        self.refused: dict[tuple[int, int], str] = {}  # and why


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
        self.holds = Holds(self.lock, self.keeper.wake)
        self.arena = Arena(PAGE)
        self.peers: dict[int, _Peer] = {}
        self.owed: dict[int, list[Change]] = {}  # counts to give back, by owner
        self.numbers = itertools.count(1)  # of segments
        self._pins: list[tuple[int, int, list[Lease]]] = []  # of forks: pipe's ends, what is pinned

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
            self._release(lease)

    def _release(self, lease: Lease) -> None:
        """Give a count back: now when the block is this process's, else with the next dues."""
        owner = lease.segment.owner
        if owner == self.pid:
            self.arena.change(lease.serial, owner, -1)
        elif owner not in self._node.graves:
            self.owed.setdefault(owner, []).append((lease.serial, self.pid, -1))

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
            try:
                link = node.link_to(owner)
            except ConnectionError:
                link = node.link_to(1)  # no way there in this topology; process 1 has one
            link.send(_leases_frame(owner, changes))
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
            for serial, pid, delta in changes:
                self.arena.change(serial, pid, delta)

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
                why = self._why_refused(pid, source.lease.segment)
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
            if self._introduce(segment, pid):
                _write(segment, block.offset, pieces)
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

    def copy_for_many(self, source: Any) -> Hold | None:
        """Copy a buffer into a block that several processes will see; None when there is no warm one."""
        block = self._take(len(source))
        if block is None:
            return None
        segment = self.holds.segments[self.pid, block.segment]
        hold = Hold(self.holds, Lease(segment, block.serial, block.offset, len(source), PRIVATE))
        _write(segment, block.offset, [source])
        return hold

    def _pass_on(self, lease: Lease, part: Lease, mode: int, pid: int, done: Parts) -> Token | None:
        """Give `pid` a count for a block that this process holds; returns the token of a part of it."""
        segment = lease.segment
        owner = segment.owner
        if owner != pid:
            if not self._introduce(segment, pid):
                return None
            if owner == self.pid:
                with self.lock:
                    self.arena.lend(lease.serial, pid)
            elif owner not in self._node.graves:
                self.tell(owner, [(lease.serial, pid, +1)])
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
                    self.owed.setdefault(owner, []).append((serial, pid, -1))

    # ------------------------------------------------------------------ going home

    def mark_moving(self, payload: codec.Payload, pid: int) -> None:
        """Let the buffers of a result that lie in blocks of its receiver go home without a copy."""
        if not len(self.holds):
            return
        for index, buffer in enumerate(payload.buffers):
            if type(buffer) is not memoryview or len(buffer) < LINE:
                continue
            address = _address(buffer)
            lease = self.holds.find(address, len(buffer))
            if lease is None or lease.mode != OWN or lease.segment.owner != pid or lease.moving:
                continue
            with self.lock:
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
            lease.moving = False
            if lease.dead and not lease.pins:
                self._release(lease)
        return result

    # ------------------------------------------------------------------ coming in

    def adopt(self, token: bytes, sender: int) -> Hold:
        """Return the hold of a block that a frame from `sender` brings; on the reading thread.

        Raises
        ------
        LookupError
            Its segment is not mapped here.
        """
        serial, owner, number, offset, nbytes, mode = TOKEN.unpack(token)
        segment = self.holds.segment(owner, number)
        if owner == self.pid:  # it comes home
            with self.lock:
                self.arena.change(serial, self.pid, +1)
                if mode == OWN:
                    self.arena.change(serial, sender, -1)
        if mode == SHARED and arrays.find_shared is None:
            arrays.find_shared = self.find_shared
        return Hold(self.holds, Lease(segment, serial, offset, nbytes, mode))

    # ------------------------------------------------------------------ segments

    def add_segment(self, segment: Segment) -> None:
        """Enter a new segment of this process; the lock is held."""
        self.holds.segments[self.pid, segment.number] = segment
        self.arena.add_segment(segment.number, segment.size)

    def offer(self, pid: int, segment: Segment) -> Any:
        """Send a process the descriptor of a segment, once; its answer is noted when it comes.

        Returns
        -------
        Reply or None
            What the answer is waited for with; None when it is here.
        """
        node = self._node
        key = (segment.owner, segment.number)
        with self.lock:
            peer = self.peers.setdefault(pid, _Peer())
            if segment.number in peer.accepted.get(segment.owner, ()) or key in peer.refused:
                return None
            reply = peer.offered.get(key)
            if reply is not None:
                return reply
            reply = Reply(next(node.call_ids), pid, lambda reply: self._answered(pid, key, reply))
            peer.offered[key] = reply
        link = node.links.get(pid)
        if link is None or not link.is_local:
            with self.lock:
                peer.refused[key] = "it is not on this host"
                peer.offered.pop(key, None)
            return None
        payload = codec.dumps((*key, segment.size, os.fstat(segment.fd).st_ino))
        try:
            node.request(pid, _SEGMENT, 0, payload, reply=reply, fd=segment.fd)
        except BaseException:
            with self.lock:
                peer.offered.pop(key, None)
            node.dispatcher.complete(reply)
            raise
        return reply

    def _answered(self, pid: int, key: tuple[int, int], reply: Any) -> None:
        """Note the answer to an offer; on the reading thread."""
        trouble: Any = "it is gone"
        if reply.frame is not None:
            trouble = pickle.loads(reply.frame.body)
        with self.lock:
            peer = self.peers.get(pid)
            if peer is None:
                return
            peer.offered.pop(key, None)
            if trouble is None:
                peer.accepted.setdefault(key[0], set()).add(key[1])
            else:
                peer.refused[key] = trouble
        if trouble is not None:
            self.keeper.trouble(f"process {pid} cannot map shared memory ({trouble})")

    def _introduce(self, segment: Segment, pid: int) -> bool:
        """See to it that a process has mapped a segment; False when it cannot. Waits for its answer."""
        peer = self.peers.get(pid)
        if peer is not None and segment.number in peer.accepted.get(segment.owner, ()):
            if segment.owner not in self._node.graves:
                return True
            peer.accepted[segment.owner].discard(segment.number)
        reply = self.offer(pid, segment)
        if reply is not None:
            self._node.wait_inside(reply)
        peer = self.peers.get(pid)
        return peer is not None and segment.number in peer.accepted.get(segment.owner, ())

    def _why_refused(self, pid: int, segment: Segment) -> str:
        peer = self.peers.get(pid)
        return "it is gone" if peer is None else peer.refused.get((segment.owner, segment.number), "")

    def on_segment(self, frame: Frame) -> None:
        """Map a segment that is offered, or forget one; on the reading thread."""
        owner, number, size, inode = pickle.loads(frame.body)
        link: Link = frame.link
        if not size:
            with self.lock:
                self.holds.segments.pop((owner, number), None)
            return
        trouble = None
        fd = link.take_fd()
        try:
            if fd >= 0 and os.fstat(fd).st_ino != inode:
                link.give_fd_back(fd)  # it is the next frame's: ours was lost
                fd = -1
            if fd < 0:
                trouble = "its descriptor was lost: too many open files?"
            elif (owner, number) in self.holds.segments:
                os.close(fd)
            else:
                self._enter(Segment(owner, number, size, fd))
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        payload = codec.Payload()
        payload.parts.append(pickle.dumps(trouble, 5))
        self._node.post(link, _RESULT, 0, frame.call_id, payload)

    def _enter(self, segment: Segment) -> None:
        """Keep another process's segment."""
        key = (segment.owner, segment.number)
        with self.lock:
            if segment.owner not in self._node.graves:
                self.holds.segments[key] = segment
                return
            # Nobody will say when it may go: it stays for the token that follows, and then
            # as long as arrays need it. It is offered anew each time.
            self.holds.orphans[key] = segment
        self.keeper.keep_for_now(segment)

    def forget_segments(self, numbers: list[int]) -> None:
        """Let go of segments of which nothing is lent, here and everywhere."""
        with self.lock:
            told = []
            for number in numbers:
                self.holds.segments.pop((self.pid, number), None)
                for pid, peer in self.peers.items():
                    if number in peer.accepted.get(self.pid, ()):
                        peer.accepted[self.pid].discard(number)
                        told.append((pid, number))
        for pid, number in told:
            link = self._node.links.get(pid)
            if link is not None:
                self._node.post(link, _SEGMENT, 0, 0, codec.dumps((self.pid, number, 0, 0)))

    # ------------------------------------------------------------------ shared arrays

    def make_shared(self, nbytes: int) -> tuple[Hold, bool]:
        """Return the hold of a new block for a shared array, and whether the block is known to be zero.

        Raises
        ------
        MemoryError
            There is not so much memory.
        """
        arrays.find_shared = self.find_shared
        with self.lock:
            self.settle()
            block = self.arena.take(nbytes, self.pid)
        fresh = block is None
        if block is None:
            segment = self.keeper.make_segment(nbytes)
            with self.lock:
                self.add_segment(segment)
                block = self.arena.take(nbytes, self.pid, {segment.number})
        self.keeper.used()
        assert block is not None
        segment = self.holds.segments[self.pid, block.segment]
        return Hold(self.holds, Lease(segment, block.serial, block.offset, nbytes, SHARED)), fresh

    def find_shared(self, low: int, high: int) -> Lease | None:
        """Return the lease of the shared array in which addresses from `low` to before `high` lie."""
        if not self.holds.shared:
            return None
        lease = self.holds.find(low, high - low)
        return lease if lease is not None and lease.mode == SHARED else None

    # ------------------------------------------------------------------ death and forks

    def lost(self, pid: int) -> None:
        """A process is gone: its counts are dropped, and its memory is not ours to keep."""
        with self.lock:
            self.settle()
            self.arena.lose(pid)
            self.owed.pop(pid, None)
            self.peers.pop(pid, None)
            for peer in self.peers.values():
                peer.accepted.pop(pid, None)  # who passes its arrays on must offer them anew
            for key in [key for key in self.holds.segments if key[0] == pid]:
                self.holds.orphans[key] = self.holds.segments.pop(key)

    def before_fork(self) -> None:
        """Pin the values that a child is going to see."""
        self.lock.acquire()  # so that the child finds the tables whole
        self.settle()
        leases = [lease for lease in self.holds.leases() if lease.mode != SHARED]
        if leases:
            reads, writes = os.pipe()
            for lease in leases:
                lease.pins += 1
            self._pins.append((reads, writes, leases))
        else:
            self._pins.append((-1, -1, []))

    def after_fork_in_parent(self) -> None:
        """Unpin them when the child is gone."""
        reads, writes, leases = self._pins.pop()
        self.lock.release()
        if reads < 0:
            return
        os.close(writes)

        def unpin() -> None:
            os.close(reads)
            with self.lock:
                self.settle()
                for lease in leases:
                    lease.pins -= 1
                    if lease in self.holds.dead and not lease.pins:
                        self.holds.dead.remove(lease)
                        if not lease.moving:
                            self._release(lease)
            self.pay()

        self._node.dispatcher.watch(reads, unpin)

    def after_fork_in_child(self) -> None:
        """Let what the child writes to its values stay its own; the pipe's end stays open with it."""
        reads, _, leases = self._pins.pop()
        if reads >= 0:
            os.close(reads)
        for lease in leases:
            if lease.mode == OWN:
                lease.segment.keep_own_copy(lease.offset, lease.nbytes)
        self.holds.idle = False  # nobody to wake
        arrays.find_shared = None  # to a cluster of the child they are arrays like any other

    def state(self) -> dict[str, Any]:
        """Return what is lent and held; for people and tests."""
        with self.lock:
            self.settle()
            self.arena._check()
            self.holds._check()
            return {
                "lent": {block.serial: dict(block.counts) for block in self.arena.blocks.values()},
                "held": [repr(lease) for lease in self.holds.leases()],
                "owed": {owner: list(changes) for owner, changes in self.owed.items() if changes},
            }


class Repeated:
    """Arrays that a map sends many times, or many overlapping views of: copied once.

    Parameters
    ----------
    sharing : Sharing
        Of this process.
    bases : list of ndarray
        Contiguous arrays, which nobody writes to as long as the map runs.
    """

    def __init__(self, sharing: Sharing, bases: list[Any]) -> None:
        self._sharing = sharing
        self._spans = sorted(
            (base.__array_interface__["data"][0], base.nbytes, index) for index, base in enumerate(bases)
        )
        self._bases = bases
        self._copies: dict[int, Hold | None] = {}
        self._lock = threading.Lock()  # guards `_copies`: a base is copied once

    def find(self, source: Any) -> tuple[Lease, Lease] | None:
        """Return the lease of the copy in which a buffer's bytes lie, and one of just these bytes."""
        if isinstance(source, Strided):
            return None
        address = _address(source)
        for start, nbytes, index in self._spans:
            if start <= address and address + len(source) <= start + nbytes:
                with self._lock:
                    if index not in self._copies:
                        raw = memoryview(self._bases[index].reshape(-1, order="A").view("B"))
                        self._copies[index] = self._sharing.copy_for_many(raw)
                hold = self._copies[index]
                if hold is None:
                    return None
                lease = hold.lease
                offset = lease.offset + address - start
                return lease, Lease(lease.segment, lease.serial, offset, len(source), PRIVATE)
        return None


def _leases_frame(owner: int, changes: list[Change]) -> Parts:
    payload = codec.Payload()
    payload.parts.append(pickle.dumps(changes, 5))
    return codec.frame(_LEASES, 0, 0, owner, payload)


def _address(buffer: Any) -> int:
    """Return where a buffer lies."""
    import numpy

    address: int = numpy.frombuffer(buffer, "B").__array_interface__["data"][0]
    return address


def _write(segment: Segment, offset: int, pieces: list[Any]) -> None:
    """Write pieces one after the other."""
    for piece in pieces:
        if isinstance(piece, Strided):
            piece.write_to(segment.array[offset : offset + piece.nbytes])
        else:
            segment.write(offset, piece)
        offset += len(piece)
