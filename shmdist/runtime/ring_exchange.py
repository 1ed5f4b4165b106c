"""Hands out ring slots: who may write frames into our rings, and whose rings we write into.

A link gets a slot when it has been read a few times, so that processes which hardly talk need
none. The mailbox's descriptor goes with a RING frame; who cannot map it goes on using the
socket, and nothing else changes.

A process that leaves something for many others at once (a map's first batches) wakes them
together: by a bell, which is one descriptor that all of them listen to. Woken one by one, the
first could take the processor from who wakes them before it comes to the second. Who can listen
says so with his mailbox; the bell is sent when it would have been of use for the first time.

A slot is used again only when the process at the other end of its link is no more: it may be
about to leave a message, though the link has ended here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from typing import TYPE_CHECKING

from shmdist._log import Log
from shmdist.memory.segment import Window
from shmdist.runtime.interrupts import current
from shmdist.serialization import codec
from shmdist.transport.link import Link, LinkClosed
from shmdist.transport.messages import BadFrame, Frame, Kind
from shmdist.transport.poller import WakeupFd
from shmdist.transport.ring import SIZE, InboundRings, RingWriter

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_MAX_WAKE_DELAY_SECONDS = 2e-4  # for which a receiver may have to wait until others can be woken with it
LIVELY = 8  # reads of a link after which it gets a slot
_log = Log("mail")


class BatchedWakeups(list[Link]):
    """Links by which something is being left, whose receivers are woken together at the end of the block."""

    def __init__(self, mail: RingExchange) -> None:
        super().__init__()
        self._mail = mail
        self._since = time.perf_counter()

    def __enter__(self) -> BatchedWakeups:
        return self

    def __exit__(self, *failure: object) -> None:
        if self:
            self._mail.wake(self)

    def turn(self) -> None:
        """Wake those who have waited for a while: what comes next may take as long."""
        now = time.perf_counter()
        if now - self._since > _MAX_WAKE_DELAY_SECONDS:
            self._since = now
            if self:
                self._mail.wake(self)
                self.clear()


class RingExchange:
    """The mailbox's side of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()  # guards all below
        self.box: InboundRings | None = None
        self._links: tuple[Link, ...] = ()  # that have slots
        self._users: dict[int, int] = {}  # slots, and who writes there: its process id in the system
        self._closing = False
        self._bell: WakeupFd | None = None
        self._bells: dict[Link, int] = {}  # descriptors of others' bells

    @property
    def descriptors(self) -> int:
        """How many descriptors are open for mailboxes: two for its own, what wakes each other one, bells."""
        own = 2 * (self.box is not None) + (self._bell is not None) + len(self._bells)
        return own + sum(link.kick_out >= 0 for link in self._node.dispatcher.links())

    def read(self, link: Link, frames: list[Frame]) -> None:
        """Append frames of a link that do not lie whole in the mailbox; the lead is held."""
        link.unfinished = True
        try:
            link.read_mail(frames)
        except BadFrame as error:
            _log.warning("%r is ended: %s", link, error)
            link.shut()
        link.unfinished = False

    def offer(self, link: Link) -> None:
        """Give a link a slot, and tell the process at its other end."""
        node = self._node
        try:
            with self._lock:
                if self._closing or link.closed or link.mail_in is not None:
                    return
                if self.box is None:
                    self.box = InboundRings.make(node.pid)
                taken = {each.mail_in.slot for each in self._links if each.mail_in is not None}
                for slot, ospid in list(self._users.items()):
                    if slot not in taken and not _exists(ospid):
                        del self._users[slot]
                        self.box.used.discard(slot)
                receiver = self.box.open_slot(link)
                if receiver is None:
                    return
                peer = node.peers.get(link.pid)
                self._users[receiver.slot] = 0 if peer is None else peer.ospid
                link.mail_in = receiver
                self._links += (link,)
            poller = node.dispatcher.poller
            _send(link, _KICK, poller.kicker, poller.supports_group_wakeup)
            _send(link, receiver.slot, self.box.segment.fd, False)
        except LinkClosed:
            pass
        except (OSError, ValueError) as error:
            _log.info("no mailbox for process %d: %s", link.pid, error)

    def accept(self, frame: Frame) -> None:
        """Leave frames in the mailbox that is offered, from now on; on the reading thread."""
        link: Link = frame.link
        slot, inode, bells = pickle.loads(frame.body)
        if slot == _HEARD:
            link.has_bell = True
            return
        fd = link.take_fd(frame)
        if fd < 0:
            return
        if os.fstat(fd).st_ino != inode:
            link.give_fd_back(frame)  # it is the next frame's: ours was lost
            return
        if slot == _KICK:
            link.set_wakeup_fd(fd, bells)
            return
        if slot == _BELL:
            with self._lock:
                if self._closing or self._bells.get(link, fd) != fd:
                    os.close(fd)
                    return
                if link not in self._bells:
                    self._node.dispatcher.poller.add_bell(fd)
                    self._bells[link] = fd
            # The descriptor may get lost; who has said nothing is woken by himself.
            self._node.post(link, int(Kind.RING), 0, 0, codec.pickled((_HEARD, 0, False)))
            return
        try:
            link.mail_out = RingWriter(Window(fd, SIZE), slot)
        except Exception as error:
            _log.info("the mailbox of process %d is not used: %s", link.pid, error)
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
            listening = sum(link.has_bell for link in list(self._node.links.values()))
            ringing = [link for link in links if link.has_bell]
            # It wakes all who listen, so most of them should have something to do.
            if self._bell is not None and len(ringing) > 1 and 2 * len(ringing) >= listening:
                self._bell.set()
                links = [link for link in links if link not in ringing]
        for link in links:
            link.wake()
        if unaware:
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be had: the next time, then
                self._node.dispatcher.start(lambda: self._give_bell(unaware))

    def _give_bell(self, links: list[Link]) -> None:
        """Tell processes by which bell they are woken from now on."""
        for link in links:
            try:
                with self._lock:
                    if self._closing or link.closed or not link.supports_group_wakeup:
                        continue
                    link.supports_group_wakeup = False  # it is told once
                    if self._bell is None:
                        self._bell = WakeupFd()
                _send(link, _BELL, self._bell.setter, False)
            except LinkClosed:
                pass
            except OSError as error:
                _log.info("no bell for process %d: %s", link.pid, error)

    def forget(self, link: Link) -> None:
        """A link has ended, and what was left by it has been read."""
        with self._lock:
            bell = self._bells.pop(link, -1)
            if bell >= 0:
                self._node.dispatcher.poller.remove_bell(bell)
                os.close(bell)
            self._links = tuple(each for each in self._links if each is not link)
            if self.box is not None and link.mail_in is not None:
                self.box.remove(link.mail_in)

    def close(self) -> None:
        """Use no mailbox any more."""
        with self._lock:
            self._closing = True
            for bell in self._bells.values():
                self._node.dispatcher.poller.remove_bell(bell)
            self.abandon()

    def abandon(self) -> None:
        """Give descriptors back; in a forked child, whose parent goes on to listen."""
        while self._bells:
            os.close(self._bells.popitem()[1])
        if self._bell is not None:
            self._bell.close()


_KICK, _BELL, _HEARD = -1, -2, -3  # in the place of a slot


def _send(link: Link, slot: int, fd: int, bells: bool) -> None:
    payload = codec.pickled((slot, os.fstat(fd).st_ino, bells))
    link.send(codec.frame(int(Kind.RING), 0, 0, 0, payload), fd=fd)


def _exists(ospid: int) -> bool:
    """Tell whether there is such a process; of 0 nobody knows, so there is."""
    try:
        os.kill(ospid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
