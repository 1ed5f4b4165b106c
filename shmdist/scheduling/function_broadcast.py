"""Functions sent ahead of their calls: pickled once, sent once to each worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from shmdist.serialization import codec
from shmdist.transport.link import LinkClosed, Wakeups
from shmdist.transport.messages import Kind, OutgoingFrames

_FUNCTION = int(Kind.FUNCTION)
_SMALL_FUNCTION_BYTES = 1 << 16  # of a function that nobody is woken for to forget it


class BroadcastFunction:
    """A function on its way to many calls: pickled once, sent once to each worker.

    Parameters
    ----------
    f : callable
        The function, with what it closes over.
    what : str
        What it is, for the text of an error.
    """

    def __init__(self, f: Callable[..., Any], what: str = "the function") -> None:
        self.node = current_node()
        self.f = f
        self.number = next(self.node.requests.call_ids)
        self._what = what
        self.payload = codec.dumps(f, what, what)
        self.payload.spread = {}
        self.there: set[int] = set()
        self._lock = threading.Lock()  # guards `there`; held while one thread sends to a worker

    def send_to(self, pid: int, wakeups: Wakeups = None) -> None:
        """See to it that process `pid` has the function; `wakeups` as in ``Link.leave``."""
        if pid in self.there:
            return
        holders = self.payload.holders
        # One that came later lacks what `everywhere` has defined.
        if holders is not None and pid not in holders:
            self.payload = codec.dumps(self.f, self._what, self._what)
            self.payload.spread = {}
        thread_state = current()
        thread_state.enter()
        try:
            self._send_to(pid, wakeups)
        finally:
            thread_state.leave()

    def _send_to(self, pid: int, wakeups: Wakeups) -> None:
        node = self.node
        link = node.peers.link_to(pid)
        with self._lock:
            if pid in self.there:
                return
            try:
                parts = codec.frame(_FUNCTION, 0, 0, self.number, self.payload, link)
                node.requests.send(link, parts, self.payload, wakeups=wakeups)
            except LinkClosed:
                raise node.peers.death(pid) from None
            self.there.add(pid)

    def go_ahead(self, pid: int, together: codec.Payload, parts: OutgoingFrames, *, alone: bool) -> None:
        """Put the frame of the function in `parts`, ahead of the first call; or see it sent `alone`.

        Its references are added to those of `together`, what goes out with it.
        """
        if alone or pid in self.there or pid not in self.node.peers.links:
            self.send_to(pid)
            return
        codec.frame(int(Kind.FUNCTION), 0, 0, self.number, self.payload, self.node.peers.links[pid], parts)
        together.refs += self.payload.refs
        self.there.add(pid)

    def drop(self) -> None:
        """Let all workers forget the function, a small one when they wake; again after an error."""
        with current():
            self._drop()

    def _drop(self) -> None:
        node, payload = self.node, self.payload
        payload.spread = {}  # its blocks
        quietly = not payload.refs and not payload.buffers and payload.nbytes() < _SMALL_FUNCTION_BYTES
        while self.there:
            pid = next(iter(self.there))
            link = node.peers.links.get(pid)
            if link is not None:
                frame = codec.frame(int(Kind.DROP_FUNCTION), 0, 0, self.number, None)
                if not quietly or not link.leave(frame, []):
                    node.reactor.post(link, int(Kind.DROP_FUNCTION), 0, self.number)
            self.there.discard(pid)

    def drop_in_turn(self) -> None:
        """Let all workers forget the function when the calls sent before this have begun."""
        with current():
            self._drop_in_turn()

    def _drop_in_turn(self) -> None:
        node = self.node
        self.payload.spread = {}
        payload = codec.dumps((_drop, (node.pid, self.number), {}))
        while self.there:
            pid = next(iter(self.there))
            link = node.peers.links.get(pid)
            if link is not None:
                # A call that follows others starts after them, and they have found their function.
                node.reactor.post(link, int(Kind.CALL), 0, next(node.requests.call_ids), payload)
            self.there.discard(pid)

    def forget(self, pid: int) -> None:
        """Note that a worker is gone."""
        self.there.discard(pid)


def _drop(sender: int, number: int) -> None:
    """Forget a function that `sender` has sent to this process."""
    current_node().functions.drop(sender, number)
