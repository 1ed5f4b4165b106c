"""Hands out ring slots: who may write frames into our rings, and whose rings we write into.

A link gets a slot when it has been read a few times, so that processes which hardly talk need
none. The ring segment's descriptor goes with a RING frame; who cannot map it goes on using the
socket, and nothing else changes.

A process that leaves something for many others at once (a map's first batches) wakes them
together, by one descriptor to which all of them listen: the group wake-up. Woken one by one, the first
could take the processor from the sender before the second is woken. A process that can listen says so
with its ring segment; the descriptor is sent when it would have been of use for the first time.

A slot is used again only when the process at the other end of its link is no more: it may be
about to leave a message, though the link has ended here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Protocol

from shmdist._log import Log
from shmdist.memory.mapping import Window
from shmdist.runtime.interrupts import current
from shmdist.runtime.peers import Peers
from shmdist.serialization import codec
from shmdist.transport.link import Link, LinkClosed
from shmdist.transport.messages import BadFrame, Frame, Kind
from shmdist.transport.poller import Poller, WakeupFd
from shmdist.transport.ring import SIZE, InboundRings, RingWriter

_MAX_WAKE_DELAY_SECONDS = 2e-4  # for which a receiver may have to wait until others can be woken with it
LIVELY = 8  # reads of a link after which it gets a slot
_log = Log("ring_exchange")


class BatchedWakeups(list[Link]):
    """Links by which something is being left, whose receivers are woken together at the end of the block."""

    def __init__(self, exchange: RingExchange) -> None:
        super().__init__()
        self._exchange = exchange
        self._since = time.perf_counter()

    def __enter__(self) -> BatchedWakeups:
        return self

    def __exit__(self, *failure: object) -> None:
        if self:
            self._exchange.wake(self)

    def turn(self) -> None:
        """Wake those who have waited for a while: what comes next may take as long."""
        now = time.perf_counter()
        if now - self._since > _MAX_WAKE_DELAY_SECONDS:
            self._since = now
            if self:
                self._exchange.wake(self)
                self.clear()


class Reader(Protocol):
    """What is needed of the reactor."""

    poller: Poller

    def start(self, job: Callable[[], None], /) -> None:
        """Run a job on another thread."""

    def links(self) -> list[Link]:
        """Return the links that are read."""

    def post(self, link: Link, kind: int, flags: int, call_id: int, payload: codec.Payload | None, /) -> None:
        """Send a frame without ever blocking."""


class RingExchange:
    """The ring segments of this process and of those that it writes to."""

    def __init__(self, peers: Peers, reader: Reader) -> None:
        self._peers, self._reader = peers, reader
        self._lock = threading.Lock()  # guards all below
        self.inbound: InboundRings | None = None
        self._links: tuple[Link, ...] = ()  # that have slots
        self._users: dict[int, int] = {}  # slots, and who writes there: its process id in the system
        self._closing = False
        self._group_wakeup: WakeupFd | None = None
        self._group_wakeups: dict[Link, int] = {}  # what others wake us by

    @property
    def descriptors(self) -> int:
        """Descriptors open for ring segments: two for its own, one to wake each other one, group wake-ups."""
        own = 2 * (self.inbound is not None) + (self._group_wakeup is not None) + len(self._group_wakeups)
        return own + sum(link.kick_out >= 0 for link in self._reader.links())

    def read(self, link: Link, frames: list[Frame]) -> None:
        """Append frames of a link that do not lie whole in the ring segment; the lead is held."""
        link.unfinished = True
        try:
            link.read_mail(frames)
        except BadFrame as error:
            _log.warning("%r is ended: %s", link, error)
            link.shut()
        link.unfinished = False

    def offer(self, link: Link) -> None:
        """Give a link a slot, and tell the process at its other end."""
        try:
            with self._lock:
                if self._closing or link.closed or link.ring_in is not None:
                    return
                if self.inbound is None:
                    self.inbound = InboundRings.make(self._peers.pid)
                taken = {each.ring_in.slot for each in self._links if each.ring_in is not None}
                for slot, ospid in list(self._users.items()):
                    if slot not in taken and not _exists(ospid):
                        del self._users[slot]
                        self.inbound.used.discard(slot)
                receiver = self.inbound.open_slot(link)
                if receiver is None:
                    return
                peer = self._peers.members.get(link.pid)
                self._users[receiver.slot] = 0 if peer is None else peer.ospid
                link.ring_in = receiver
                self._links += (link,)
            poller = self._reader.poller
            _send(link, _KICK, poller.kicker, poller.supports_group_wakeup)
            _send(link, receiver.slot, self.inbound.segment.fd, False)
        except LinkClosed:
            pass
        except (OSError, ValueError) as error:
            _log.info("no ring segment for process %d: %s", link.pid, error)

    def accept(self, frame: Frame) -> None:
        """Leave frames in the ring segment that is offered, from now on; on the reading thread."""
        link: Link = frame.link
        slot, inode, listens = pickle.loads(frame.body)
        if slot == _HEARD:
            link.hears_group_wakeup = True
            return
        fd = link.take_fd(frame)
        if fd < 0:
            return
        if os.fstat(fd).st_ino != inode:
            link.give_fd_back(frame)  # it is the next frame's: ours was lost
            return
        if slot == _KICK:
            link.set_wakeup_fd(fd, listens)
            return
        if slot == _GROUP_WAKEUP:
            with self._lock:
                if self._closing or self._group_wakeups.get(link, fd) != fd:
                    os.close(fd)
                    return
                if link not in self._group_wakeups:
                    self._reader.poller.add_group_wakeup(fd)
                    self._group_wakeups[link] = fd
            # The descriptor may get lost; who has said nothing is woken by himself.
            self._reader.post(link, int(Kind.RING), 0, 0, codec.pickled((_HEARD, 0, False)))
            return
        try:
            link.ring_out = RingWriter(Window(fd, SIZE), slot)
        except Exception as error:
            _log.info("the ring segment of process %d is not used: %s", link.pid, error)
        frame.buffers[0] = -1
        os.close(fd)

    def wake(self, links: list[Link]) -> None:
        """Wake the receivers for whom something was left by these links, all at once if that can be."""
        thread_state = current()
        thread_state.enter()  # an interrupt must not come between a write and the note of it
        try:
            self._wake(list(dict.fromkeys(links)))
        finally:
            thread_state.leave()

    def _wake(self, links: list[Link]) -> None:
        unaware = [link for link in links if link.supports_group_wakeup] if len(links) > 1 else []
        if len(links) > 1:
            listening = sum(link.hears_group_wakeup for link in list(self._peers.links.values()))
            ringing = [link for link in links if link.hears_group_wakeup]
            # It wakes all who listen, so most of them should have something to do.
            if self._group_wakeup is not None and len(ringing) > 1 and 2 * len(ringing) >= listening:
                self._group_wakeup.set()
                links = [link for link in links if link not in ringing]
        for link in links:
            link.wake()
        if unaware:
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be had: the next time, then
                self._reader.start(lambda: self._send_group_wakeup(unaware))

    def _send_group_wakeup(self, links: list[Link]) -> None:
        """Send processes the descriptor by which they are woken together from now on."""
        for link in links:
            try:
                with self._lock:
                    if self._closing or link.closed or not link.supports_group_wakeup:
                        continue
                    link.supports_group_wakeup = False  # it is told once
                    if self._group_wakeup is None:
                        self._group_wakeup = WakeupFd()
                _send(link, _GROUP_WAKEUP, self._group_wakeup.setter, False)
            except LinkClosed:
                pass
            except OSError as error:
                _log.info("no group wake-up for process %d: %s", link.pid, error)

    def forget(self, link: Link) -> None:
        """A link has ended, and what was left by it has been read."""
        with self._lock:
            fd = self._group_wakeups.pop(link, -1)
            if fd >= 0:
                self._reader.poller.remove_group_wakeup(fd)
                os.close(fd)
            self._links = tuple(each for each in self._links if each is not link)
            if self.inbound is not None and link.ring_in is not None:
                self.inbound.remove(link.ring_in)

    def close(self) -> None:
        """Use no ring segment any more."""
        with self._lock:
            self._closing = True
            for fd in self._group_wakeups.values():
                self._reader.poller.remove_group_wakeup(fd)
            self.abandon()

    def abandon(self) -> None:
        """Give descriptors back; in a forked child, whose parent goes on to listen."""
        while self._group_wakeups:
            os.close(self._group_wakeups.popitem()[1])
        if self._group_wakeup is not None:
            self._group_wakeup.close()


_KICK, _GROUP_WAKEUP, _HEARD = -1, -2, -3  # in the place of a slot


def _send(link: Link, slot: int, fd: int, listens: bool) -> None:
    payload = codec.pickled((slot, os.fstat(fd).st_ino, listens))
    link.send(codec.frame(int(Kind.RING), 0, 0, 0, payload), fd=fd)


def _exists(ospid: int) -> bool:
    """Return whether there is such a process; of 0 nobody knows, so there is."""
    try:
        os.kill(ospid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
