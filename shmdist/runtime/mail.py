"""The mailbox of a process: who may leave frames there, and whose this process leaves frames in.

A link gets a slot when it has been read a few times, so that processes which hardly talk need
none. The mailbox's descriptor goes with a MAIL frame; who cannot map it goes on using the
socket, and nothing else changes.

A slot is used again only when the process at the other end of its link is no more: it may be
about to leave a message, though the link has ended here.
"""

from __future__ import annotations

import os
import pickle
import threading
from typing import TYPE_CHECKING

from shmdist._log import Log
from shmdist.memory.segment import Window
from shmdist.wire import codec
from shmdist.wire.link import Link, LinkClosed
from shmdist.wire.mailbox import SIZE, Mailbox, Sender
from shmdist.wire.messages import Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

LIVELY = 8  # reads of a link after which it gets a slot
_log = Log("mail")


class Mail:
    """The mailbox's side of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()  # guards all below
        self.box: Mailbox | None = None
        self._links: tuple[Link, ...] = ()  # that have slots
        self._users: dict[int, int] = {}  # slots, and who writes there: its process id in the system
        self._closing = False

    @property
    def descriptors(self) -> int:
        """How many descriptors are open for mailboxes: two for its own, and what wakes each other process."""
        own = 0 if self.box is None else 2
        return own + sum(link.kick_out >= 0 for link in self._node.dispatcher.links())

    def read(self, frames: list[Frame]) -> None:
        """Append the frames that lie in the mailbox; the baton is held."""
        assert self.box is not None
        for receiver in self.box.take(frames):
            link = receiver.link
            try:
                link.read_mail(frames)
            except OSError as error:
                _log.warning("%r is ended: %s", link, error)
                link.shut()

    def offer(self, link: Link) -> None:
        """Give a link a slot, and tell the process at its other end."""
        node = self._node
        try:
            with self._lock:
                if self._closing or link.closed or link.mail_in is not None:
                    return
                if self.box is None:
                    self.box = Mailbox.make(node.pid)
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
            for slot, fd in (-1, node.dispatcher.poller.kicker), (receiver.slot, self.box.segment.fd):
                payload = codec.pickled((slot, os.fstat(fd).st_ino))
                link.send(codec.frame(int(Kind.MAIL), 0, 0, 0, payload), fd=fd)
        except LinkClosed:
            pass
        except (OSError, ValueError) as error:
            _log.info("no mailbox for process %d: %s", link.pid, error)

    def accept(self, frame: Frame) -> None:
        """Leave frames in the mailbox that is offered, from now on; on the reading thread."""
        link: Link = frame.link
        slot, inode = pickle.loads(frame.body)
        fd = link.take_fd()
        if fd < 0:
            return
        if os.fstat(fd).st_ino != inode:
            link.give_fd_back(fd)  # it is the next frame's: ours was lost
            return
        if slot < 0:
            link.kick_out = fd
            return
        try:
            link.mail_out = Sender(Window(fd, SIZE), slot)
        except (OSError, ValueError) as error:
            _log.info("the mailbox of process %d is not used: %s", link.pid, error)
        finally:
            os.close(fd)

    def forget(self, link: Link) -> None:
        """A link has ended, and what was left by it has been read."""
        with self._lock:
            self._links = tuple(each for each in self._links if each is not link)
            if self.box is not None and link.mail_in is not None:
                self.box.remove(link.mail_in)

    def close(self) -> None:
        """Use no mailbox any more."""
        with self._lock:
            self._closing = True


def _exists(ospid: int) -> bool:
    """Tell whether there is such a process; of 0 nobody knows, so there is."""
    try:
        os.kill(ospid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
