"""Which segments other processes have mapped, and which of theirs are mapped here.

A segment is offered to a process once: its descriptor goes with a frame, and the answer says
whether it is mapped there now. Only then are tokens of it sent to that process; who cannot map
it gets everything by the stream.
"""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

from shmdist.memory.segment import Segment
from shmdist.runtime.replies import Reply
from shmdist.wire import codec
from shmdist.wire.link import Link
from shmdist.wire.messages import Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.sharing import Sharing

_SEGMENT, _RESULT = int(Kind.SEGMENT), int(Kind.RESULT)


class _Peer:
    """What this process knows of another one that shares memory with it."""

    __slots__ = ("accepted", "offered", "refused")

    def __init__(self) -> None:
        self.accepted: dict[int, set[int]] = {}  # numbers of segments that it has mapped, by owner
        self.offered: dict[tuple[int, int], Any] = {}  # replies not yet here, by owner and number
        self.refused: dict[tuple[int, int], str] = {}  # and why


class Offers:
    """The segments' side of a node's sharing, whose lock guards the table here."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self.peers: dict[int, _Peer] = {}
        self._passed_on: set[tuple[int, int]] = set()  # mapped here, and offered by others than their owner

    def offer(self, pid: int, segment: Segment) -> Any:
        """Send a process the descriptor of a segment, once; its answer is noted when it comes.

        Returns
        -------
        Reply or None
            What the answer is waited for with; None when it is here.
        """
        node = self._sharing.node
        key = (segment.owner, segment.number)
        with self._sharing.lock:
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
            with self._sharing.lock:
                peer.refused[key] = "it is not on this host"
                peer.offered.pop(key, None)
            return None
        payload = codec.dumps((*key, segment.size, os.fstat(segment.fd).st_ino))
        try:
            node.request(pid, _SEGMENT, 0, payload, reply=reply, fd=segment.fd)
        except BaseException:
            with self._sharing.lock:
                peer.offered.pop(key, None)
            node.dispatcher.complete(reply)
            raise
        return reply

    def _answered(self, pid: int, key: tuple[int, int], reply: Any) -> None:
        """Note the answer to an offer; on the reading thread."""
        with self._sharing.lock:
            peer = self.peers.get(pid)
            if peer is None:
                return
            peer.offered.pop(key, None)
            if reply.frame is None:
                return  # the process is gone
            trouble = pickle.loads(reply.frame.body)
            if trouble is None:
                peer.accepted.setdefault(key[0], set()).add(key[1])
            else:
                peer.refused[key] = trouble
        if trouble is not None:
            self._sharing.keeper.trouble("mapping", f"process {pid} cannot map shared memory ({trouble})")

    def introduce(self, segment: Segment, pid: int) -> bool:
        """See to it that a process has mapped a segment; False when it cannot. Waits for its answer."""
        peer = self.peers.get(pid)
        if peer is not None and segment.number in peer.accepted.get(segment.owner, ()):
            if segment.owner not in self._sharing.node.graves:
                return True
            peer.accepted[segment.owner].discard(segment.number)
        reply = self.offer(pid, segment)
        if reply is not None:
            # What it says counts, not the table: when the owner is gone, others take it out again.
            self._sharing.node.wait_inside(reply)
            return reply.frame is not None and pickle.loads(reply.frame.body) is None
        peer = self.peers.get(pid)
        return peer is not None and segment.number in peer.accepted.get(segment.owner, ())

    def why_refused(self, pid: int, segment: Segment) -> str:
        """Return why a process has not mapped a segment."""
        peer = self.peers.get(pid)
        return "it is gone" if peer is None else peer.refused.get((segment.owner, segment.number), "")

    def on_segment(self, frame: Frame) -> None:
        """Map a segment that is offered, or forget one; on the reading thread."""
        owner, number, size, inode = pickle.loads(frame.body)
        link: Link = frame.link
        if not size:
            self._forget(owner, number)
            return
        trouble = None
        fd = link.take_fd()
        try:
            if fd >= 0 and os.fstat(fd).st_ino != inode:
                link.give_fd_back(fd)  # it is the next frame's: ours was lost
                fd = -1
            if fd < 0:
                trouble = "its descriptor was lost: too many open files?"
            elif (owner, number) in self._sharing.holds.segments:
                os.close(fd)
            else:
                self._enter(Segment(owner, number, size, fd))
            if link.pid != owner and not trouble:
                self._passed_on.add((owner, number))
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        payload = codec.pickled(trouble)
        self._sharing.node.post(link, _RESULT, 0, frame.call_id, payload)

    def _enter(self, segment: Segment) -> None:
        """Keep another process's segment."""
        key = (segment.owner, segment.number)
        with self._sharing.lock:
            if segment.owner not in self._sharing.node.graves:
                self._sharing.holds.segments[key] = segment
                return
            # Nobody will say when it may go: it stays for the token that follows, and then
            # as long as arrays need it. It is offered anew each time.
            self._sharing.holds.orphans[key] = segment
        self._sharing.keeper.keep_for_now(segment)

    def _forget(self, owner: int, number: int) -> None:
        """Let go of a segment."""
        with self._sharing.lock:
            self._sharing.holds.segments.pop((owner, number), None)
            self._passed_on.discard((owner, number))
            for peer in self.peers.values():
                peer.accepted.get(owner, set()).discard(number)

    def forget_segments(self, numbers: list[int]) -> None:
        """Let go of segments of which nothing is lent, here and everywhere."""
        node = self._sharing.node
        for number in numbers:
            self._forget(node.pid, number)
            for link in list(node.links.values()):
                if link.is_local:  # whoever it was that offered it there
                    node.post(link, _SEGMENT, 0, 0, codec.dumps((node.pid, number, 0, 0)))

    def lost(self, pid: int) -> list[Segment]:
        """A process is gone; the lock is held. Returns the segments that tokens may still come for."""
        self.peers.pop(pid, None)
        for peer in self.peers.values():
            peer.accepted.pop(pid, None)  # who passes its arrays on must offer them anew
        holds = self._sharing.holds
        kept = []
        for key in [key for key in holds.segments if key[0] == pid]:
            segment = holds.orphans[key] = holds.segments.pop(key)
            if key in self._passed_on:
                # Who passed its arrays on may not know yet that it is gone, and offers none anew.
                self._passed_on.discard(key)
                kept.append(segment)
        return kept
