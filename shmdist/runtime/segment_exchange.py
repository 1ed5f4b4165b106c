"""Which segments other processes have mapped, and which of theirs this process has mapped.

A segment is offered to a process once: its descriptor goes with a frame, and the answer says
whether it is mapped there now. Only then are tokens of it sent to that process; who cannot map
it gets everything by the stream. So does a process that does not answer in `ANSWER_SECONDS`, until
it has answered; and one that could not map it is asked again after `RETRY_SECONDS`.

A shared array has no other way. Its token is sent behind the offer if the answer takes longer, for a
receiver that stands still is to hold up nobody. He comes to the offer first
(``PollSet.hand_out_segments``), and where he cannot map the segment, the token is refused: its frame
is a broken one, and the count goes back.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

from shmdist.memory.segment import Segment
from shmdist.runtime.block_counts import BlockCounts
from shmdist.runtime.replies import PendingReply
from shmdist.runtime.requests import RequestClient
from shmdist.serialization import codec
from shmdist.transport.link import Link
from shmdist.transport.messages import Frame, Kind

ANSWER_SECONDS = 0.1  # that a thread waits for the answer to an offer
RETRY_SECONDS = 5.0  # after which who could not map a segment is asked again: it had no descriptor, say
_SEGMENT, _RESULT = int(Kind.SEGMENT), int(Kind.RESULT)


class _Offer:
    """An offer that is not answered."""

    __slots__ = ("reply", "sent", "since")

    def __init__(self, reply: PendingReply) -> None:
        self.reply = reply
        self.since = time.monotonic()
        self.sent = False  # what is sent now comes after it


class _PeerSegments:
    """What this process knows of another one that shares memory with it."""

    __slots__ = ("accepted", "offered", "refused")

    def __init__(self) -> None:
        self.accepted: dict[int, set[int]] = {}  # numbers of segments that it has mapped, by owner
        self.offered: dict[tuple[int, int], _Offer] = {}  # not yet answered, by owner and number
        self.refused: dict[tuple[int, int], tuple[str, float]] = {}  # why, and until when that holds


class SegmentExchange:
    """Who has mapped what; the lock of the blocks guards the table here.

    Attributes
    ----------
    report_trouble, keep_for_now : callable
        Note why values take the stream, and keep a segment for a moment. Set by the maintainer.
    """

    report_trouble: Callable[[str, str], None]
    keep_for_now: Callable[[Segment], None]

    def __init__(self, blocks: BlockCounts, requests: RequestClient) -> None:
        self._blocks, self._requests, self._peers = blocks, requests, blocks.peers
        self.peers: dict[int, _PeerSegments] = {}
        self._passed_on: set[tuple[int, int]] = set()  # mapped here, and offered by others than their owner

    def offer(self, pid: int, segment: Segment, *, needed: bool = False) -> _Offer | None:
        """Send a process the descriptor of a segment, once; its answer is noted when it comes.

        Returns
        -------
        _Offer or None
            None when the answer is here; or when the process takes nothing, and it is not `needed`.
        """
        requests = self._requests
        key = (segment.owner, segment.number)
        link = self._peers.links.get(pid)
        if link is not None and link.is_stuck and not needed:
            return None
        with self._blocks.lock:
            peer = self.peers.setdefault(pid, _PeerSegments())
            if segment.number in peer.accepted.get(segment.owner, ()):
                return None
            if key in peer.refused and time.monotonic() < peer.refused[key][1]:
                return None
            offer = peer.offered.get(key)
            if offer is not None:
                return offer
            reply = PendingReply(next(requests.call_ids), pid, lambda reply: self._answered(pid, key, reply))
            offer = peer.offered[key] = _Offer(reply)
        if link is None or not link.is_local:
            with self._blocks.lock:
                peer.refused[key] = "it is not on this host", math.inf
                peer.offered.pop(key, None)
            return None
        payload = codec.dumps((*key, segment.size, os.fstat(segment.fd).st_ino))
        try:
            requests.request(pid, _SEGMENT, 0, payload, reply=reply, fd=segment.fd)
        except BaseException:
            with self._blocks.lock:
                peer.offered.pop(key, None)
            self._blocks.reactor.complete(reply)
            raise
        offer.sent = True
        return offer

    def _answered(self, pid: int, key: tuple[int, int], reply: Any) -> None:
        """Note the answer to an offer; on the reading thread."""
        with self._blocks.lock:
            peer = self.peers.get(pid)
            if peer is None:
                return
            peer.offered.pop(key, None)
            if reply.frame is None:
                return  # the process is gone
            trouble = pickle.loads(reply.frame.body)
            if trouble is None:
                peer.accepted.setdefault(key[0], set()).add(key[1])
                peer.refused.pop(key, None)
            else:
                peer.refused[key] = trouble, time.monotonic() + RETRY_SECONDS
        if trouble is not None:
            self.report_trouble("mapping", f"process {pid} cannot map shared memory ({trouble})")

    def ensure_mapped(
        self, segment: Segment, pid: int, patience: float = ANSWER_SECONDS, *, needed: bool = False
    ) -> bool:
        """See to it that a process has mapped a segment.

        Returns
        -------
        bool
            False when it cannot, or does not answer in time. If it is `needed`, then true in the latter
            case: it is mapped before anything is read that is sent now.
        """
        peer = self.peers.get(pid)
        if peer is not None and segment.number in peer.accepted.get(segment.owner, ()):
            if segment.owner not in self._peers.lost:
                return True
            peer.accepted[segment.owner].discard(segment.number)
        offer = self.offer(pid, segment, needed=needed)
        if offer is None:
            peer = self.peers.get(pid)
            return peer is not None and segment.number in peer.accepted.get(segment.owner, ())
        # What it says counts, not the table: when the owner is gone, others take it out again.
        requests, reply = self._requests, offer.reply
        link = self._peers.links.get(pid)
        if link is None or not link.is_stuck:
            requests.wait_inside(reply, offer.since + patience - time.monotonic())
        while needed and not offer.sent and not reply.done:  # by another thread, which is about to
            requests.wait_inside(reply, ANSWER_SECONDS)
        if not reply.done:
            if link is not None:
                link.note_stuck()
            return needed
        return reply.frame is not None and pickle.loads(reply.frame.body) is None

    def refusal_reason(self, pid: int, segment: Segment) -> str:
        """Return why a process has not mapped a segment."""
        peer = self.peers.get(pid)
        return (
            "it is gone" if peer is None else peer.refused.get((segment.owner, segment.number), ("", 0.0))[0]
        )

    def on_segment(self, frame: Frame) -> None:
        """Map a segment that is offered, or forget one; on the reading thread."""
        owner, number, size, inode = pickle.loads(frame.body)
        link: Link = frame.link
        if not size:
            self._forget(owner, number)
            return
        if len(frame.buffers) < 2:  # else it has been done, and could not be answered
            frame.buffers = [-1, self._map(frame, owner, number, size, inode)]
        payload = codec.pickled(frame.buffers[1])
        self._blocks.reactor.post(link, _RESULT, 0, frame.call_id, payload)

    def _map(self, frame: Frame, owner: int, number: int, size: int, inode: int) -> str | None:
        """Map a segment that is offered; returns why that cannot be, or None."""
        link: Link = frame.link
        trouble = None
        fd = link.take_fd(frame)
        try:
            if fd >= 0 and os.fstat(fd).st_ino != inode:
                link.give_fd_back(frame)  # it is the next frame's: ours was lost
                fd = -1
            if fd < 0:
                trouble = "its descriptor was lost: too many open files?"
            elif (owner, number) not in self._blocks.holds.segments:
                segment = Segment(owner, number, size, fd)
                fd = -1
                self._enter(segment)
            if link.pid != owner and not trouble:
                self._passed_on.add((owner, number))
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        if fd >= 0:
            os.close(fd)
        return trouble

    def _enter(self, segment: Segment) -> None:
        """Keep another process's segment."""
        key = (segment.owner, segment.number)
        with self._blocks.lock:
            if segment.owner not in self._peers.lost:
                self._blocks.holds.segments[key] = segment
                return
            # Nobody will say when it may go: it stays for the token that follows, and then
            # as long as arrays need it. It is offered anew each time.
            self._blocks.holds.orphans[key] = segment
        self.keep_for_now(segment)

    def _forget(self, owner: int, number: int) -> None:
        """Let go of a segment."""
        with self._blocks.lock:
            self._blocks.holds.segments.pop((owner, number), None)
            self._passed_on.discard((owner, number))
            for peer in self.peers.values():
                peer.accepted.get(owner, set()).discard(number)

    def forget_segments(self, numbers: list[int]) -> None:
        """Let go of segments of which nothing is lent, here and everywhere."""
        for number in numbers:
            self._forget(self._peers.pid, number)
            for link in list(self._peers.links.values()):
                if link.is_local:  # whoever it was that offered it there
                    self._blocks.reactor.post(
                        link, _SEGMENT, 0, 0, codec.dumps((self._peers.pid, number, 0, 0))
                    )

    def lost(self, pid: int) -> list[Segment]:
        """A process is gone; the lock is held. Returns the segments that tokens may still come for."""
        self.peers.pop(pid, None)
        for peer in self.peers.values():
            peer.accepted.pop(pid, None)  # who passes its arrays on must offer them anew
        holds = self._blocks.holds
        kept = []
        for key in [key for key in holds.segments if key[0] == pid]:
            segment = holds.orphans[key] = holds.segments.pop(key)
            if key in self._passed_on:
                # Who passed its arrays on may not know yet that it is gone, and offers none anew.
                self._passed_on.discard(key)
                kept.append(segment)
        return kept
