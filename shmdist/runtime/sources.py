"""What a process reads: its links, its mailbox, what its workers print, and the ends of processes.

One thread at a time reads, the holder of the baton (``runtime.dispatch``). It looks into the
mailbox first, for that costs no system call; while anything lies there it asks the system only
every so often, so that neither road waits for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from shmdist._log import Log
from shmdist.runtime.mail import LIVELY, Mail
from shmdist.runtime.threads import Threads
from shmdist.wire.messages import Frame
from shmdist.wire.poller import FEW, make_poller

if TYPE_CHECKING:
    from shmdist.runtime.node import Node
    from shmdist.wire.link import Link

_log = Log("dispatch")


class Sources:
    """The descriptors and the memory that a process reads."""

    threads: Threads
    start: Callable[[Callable[[], None]], None]
    _route: Callable[[Frame], None]

    def __init__(self, node: Node) -> None:
        self._node = node
        self.poller = make_poller()
        self._wait, self._outputs = self.poller.poll, self.poller.outputs
        self.mail = Mail(node)
        self._frames: list[Frame] = []  # what one turn of reading brought; the baton's holder's
        self._mail_turns = 0
        self._links: dict[int, Link] = {}  # by descriptor
        self._watched: dict[int, Callable[[], None]] = {}  # descriptors of processes, by what to do

    def add(self, link: Link) -> None:
        """Read `link` from now on."""
        sharing = self._node.sharing
        link.sharing = sharing if link.is_local else sharing.copies
        if not link.is_local:
            self._node.heart.watch(link)
        self._links[link.fd] = link
        self.threads.ensure_standby()
        self.poller.add(link.fd)

    def watch(self, fd: int, action: Callable[[], None]) -> None:
        """Run `action` once, on a thread of its own, when `fd` becomes readable."""
        self._watched[fd] = action
        self.threads.ensure_standby()
        self.poller.add(fd)

    def links(self) -> list[Link]:
        """Return the links that are read."""
        return list(self._links.values())

    def unwatch(self, fd: int) -> None:
        """Forget a watched descriptor; its owner closes it after this."""
        self.poller.remove(fd)
        self._watched.pop(fd, None)

    def _poll(self, timeout: float) -> bool:
        """Read what has come, waiting at most `timeout` seconds; False if nothing. The baton is held."""
        frames = self._frames
        box = self.mail.box
        if box is None:
            events = self._wait(timeout, FEW)
        elif box.stirred() or (timeout and box.sleep()):
            box.wake()
            for receiver in box.take(frames):
                self.mail.read(receiver.link, frames)
            self._mail_turns += 1
            events = () if self._mail_turns & 15 else self._wait(0, FEW)  # neither road may wait for ever
        else:
            events = self._wait(timeout, FEW)
            if timeout:
                box.wake()
        if not events and not frames:
            return False
        ended = None
        for fd, _ in events:
            link = self._links.get(fd)
            if link is not None:
                if not link.read(frames):
                    ended = [*(ended or ()), link]
                elif link.reads == LIVELY and link.is_local:
                    self.start(functools.partial(self.mail.offer, link))
            elif not self.poller.is_kick(fd):
                action = self._watched.pop(fd, None)
                self.poller.remove(fd)
                if action is not None:
                    self.start(action)
        if self.poller.has_outputs:
            # A call's output was written before its result, so after the result has been
            # read the output is there to be read, and must be taken first.
            outputs = self._outputs(0, FEW)
            for fd, _ in self._outputs(0) if len(outputs) == FEW else outputs:
                self._node.read_output(fd)
        if frames:
            self._frames = []
            for frame in frames:
                try:
                    self._route(frame)
                except Exception:
                    _log.exception("%r could not be handled", frame)
        if ended:
            for link in ended:
                self.poller.remove(link.fd)
                if self._links.pop(link.fd, None) is not None:
                    link.shut()
                    self.mail.forget(link)
                    self.start(functools.partial(self._node.link_ended, link))
        return True
