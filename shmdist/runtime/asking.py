"""A node's part as one that asks: requests, what is sent for them, and giving them up.

Time limits
-----------
What is asked of a reference within a time is judged by its owner, for only he knows whether it was
done. When the time is up, :meth:`Asking.hurry` tells him to do it at once or not at all, and
his answer is still waited for: see ``references.ask``. So that such a request does not wait
for ever to be written either, its thread notes in ``Strand.until`` when that is to be given up.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shmdist.runtime.ownership import Ownership
from shmdist.runtime.replies import Reply
from shmdist.runtime.strand import Cell, current
from shmdist.wire import codec
from shmdist.wire.link import Link, LinkClosed, SendInterrupted, Unwoken
from shmdist.wire.messages import AT_ONCE, HEADER, NO_LANE, Kind, Parts

if TYPE_CHECKING:
    from shmdist.runtime.sharing import Sharing

_RESULT, _CANCEL = int(Kind.RESULT), int(Kind.CANCEL)
_header = HEADER.pack


class Asking(Ownership):
    """The asking side of a node; see there for the attributes."""

    links: dict[int, Link]
    pending: dict[int, Reply]
    call_ids: Iterator[int]
    sharing: Sharing

    def death(self, pid: int) -> BaseException:
        """Return the error that tells how a process went; the node knows."""
        raise NotImplementedError  # a Node has it

    def request(
        self,
        pid: int,
        kind: int,
        flags: int,
        payload: codec.Payload | None,
        *,
        lane: int = NO_LANE,
        callback: Callable[[Reply], None] | None = None,
        call_id: int | None = None,
        reply: Reply | None = None,
        fd: int = -1,
        unwoken: Unwoken = None,
    ) -> Reply:
        """Send a frame that will be answered; the caller is inside the runtime.

        Raises
        ------
        ProcessExitedException
            The process is gone.
        KeyboardInterrupt
            While the frame waited to be written; it is withdrawn.
        TimeoutError
            Likewise, when the thread's time (``Strand.until``) was up.
        """
        link = self.links.get(pid) or self.link_to(pid)
        if reply is None:
            reply = Reply(next(self.call_ids) if call_id is None else call_id, pid, callback)
        call_id = reply.call_id
        self.pending[call_id] = reply
        try:
            if not self._leave(link, kind, flags, lane, call_id, payload, unwoken):
                parts = codec.frame(kind, flags, lane, call_id, payload, link)
                self.send(link, parts, payload, fd, unwoken)
        except LinkClosed:
            pass  # its death is on its way to us, and says how it went
        except BaseException:
            self.cancel(reply)
            raise
        if pid in self.graves and self.pending.pop(call_id, None) is not None:
            self.fail(reply, self.death(pid))
        return reply

    def _leave(
        self,
        link: Link,
        kind: int,
        flags: int,
        lane: int,
        call_id: int,
        payload: codec.Payload | None,
        unwoken: Unwoken = None,
    ) -> bool:
        """Leave a frame in the receiver's mailbox; False when it must be sent.

        Most are short, and this is all there is to do for them.
        """
        if payload is None or not payload.is_short or link.mail_out is None or self.sharing.has_dues():
            return False
        body = payload.parts[0]
        head = _header(kind, flags | payload.flags, 0, lane, 0, call_id, len(body))
        return link.leave_whole(head + body, unwoken)

    def send(
        self,
        link: Link,
        parts: Parts,
        payload: codec.Payload | None,
        fd: int = -1,
        unwoken: Unwoken = None,
    ) -> None:
        """Write a frame; the references in it are counted for the receiver first."""
        strand, sharing = current(), self.sharing
        if payload is not None and payload.refs:
            self._count_ahead(payload, link, parts)
        if sharing.has_dues():
            self._pay(link)
        try:
            link.send(parts, strand.interrupted, fd, unwoken)
        except SendInterrupted as stopped:
            if stopped.begun:
                self.flush(link)
                if strand.pending:
                    strand.deliver()
                return  # as if it were written; when the time is up, who asked will see that
            if payload is not None and payload.refs:
                self.uncount(payload.refs, link.pid)
            try:
                strand.stop()
            except BaseException:
                sharing.take_back(parts, link.pid)
                raise
            self.send(link, parts, payload, fd)  # the program's own handler lets it go on
        if len(parts) > 1 and parts.wanted:
            sharing.keeper.want(parts.wanted, link.pid)

    def _count_ahead(self, payload: codec.Payload, link: Link, parts: Parts) -> None:
        """Count the references in a frame for its receiver, before it is written."""
        strand = current()
        while True:
            try:
                self.count(payload.refs, link.pid, strand.interrupted)
                return
            except SendInterrupted:
                try:
                    strand.stop()
                except BaseException:
                    self.sharing.take_back(parts, link.pid)
                    raise

    def _pay(self, link: Link) -> None:
        """Give blocks back to the process at the end of `link`, ahead of what goes there now."""
        dues = self.sharing.dues(link)
        if dues and not link.post(dues):
            self.flush(link)

    def wait_inside(self, reply: Cell, seconds: float = math.inf) -> None:
        """Wait so long at most for what a peer's runtime answers by itself; another thread reads meanwhile.

        Raises
        ------
        KeyboardInterrupt, TimeoutError
            Nobody waits for a peer that stands still longer than he likes.
        """
        strand = current()
        strand.look()
        lock = threading.Lock()
        lock.acquire()
        reply.add(lock)
        deadline = time.monotonic() + seconds
        try:
            while not reply.done and time.monotonic() < deadline:
                lock.acquire(timeout=0.05)  # it may have been done before it saw the lock
                if strand.interrupted() and not reply.done:
                    strand.stop()
        finally:
            reply.remove(lock)

    def answer(self, link: Link, call_id: int, flags: int, payload: codec.Payload | None) -> bool:
        """Answer a request; False when the other side is gone."""
        if self._leave(link, _RESULT, flags, 0, call_id, payload):
            return True
        if payload is not None and payload.buffers:
            # Counts of blocks are told by this link; what goes by another one they could overtake.
            link = self.links.get(link.pid, link)
        parts = codec.frame(_RESULT, flags, 0, call_id, payload, link)
        try:
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid)
            if self.sharing.has_dues():
                parts[:0] = self.sharing.dues(link)  # in one piece with the answer
            link.send(parts, self.dispatcher.held_up)
        except LinkClosed:
            return False
        if len(parts) > 1 and parts.wanted:
            self.sharing.keeper.want(parts.wanted, link.pid)
        return True

    def post(
        self, link: Link, kind: int, flags: int, call_id: int, payload: codec.Payload | None = None
    ) -> None:
        """Send a frame without ever blocking; from any thread."""
        with current():
            if not link.post(codec.frame(kind, flags, 0, call_id, payload)):
                self.flush(link)

    def fail(self, reply: Reply, error: BaseException) -> None:
        """Complete a reply, which the caller has claimed, with an error."""
        reply.error = error
        callback, reply.callback = reply.callback, None
        try:
            if callback is not None:
                callback(reply)
        finally:
            self.dispatcher.complete(reply)

    def wait(self, reply: Cell, timeout: float | None = None) -> bool:
        """Wait for a reply; False when the time was up."""
        return reply.done or self.dispatcher.wait(reply, timeout)

    def cancel(self, reply: Reply) -> bool:
        """Give up a request: nobody waits for its answer, and the worker is told.

        Returns
        -------
        bool
            False when the answer is here, or being handed over this very moment.
        """
        with current():
            if self.pending.pop(reply.call_id, None) is None:
                return False
            link = self.links.get(reply.pid)
            if link is not None:
                self.post(link, _CANCEL, 0, reply.call_id)
        return True

    def hurry(self, reply: Reply) -> None:
        """Have an operation that was asked for done at once or not at all; its answer tells which."""
        link = self.links.get(reply.pid)
        if link is not None:
            self.post(link, _CANCEL, AT_ONCE, reply.call_id)
