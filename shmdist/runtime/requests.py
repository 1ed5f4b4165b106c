"""Requests to other processes: sending them, and giving them up.

Time limits
-----------
What is asked of a reference within a time is judged by its owner, for only he knows whether it was
done. When the time is up, :meth:`RequestClient.expire_now` tells him to do it at once or not at all, and
his answer is still waited for: see ``references.ask``. So that such a request does not wait
for ever to be written either, its thread notes in ``ThreadState.send_deadline`` when that is to be given up.

Receivers that do not read
--------------------------
What is sent without a time limit, and each answer, waits in the link's outbox when its receiver takes
nothing (``transport.link``), and its sender goes on. For what was granted with it, being queued is being
written: it will be written, unless the receiver is lost, and then all its counts are dropped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shmdist._firmly import firmly
from shmdist.runtime.counts import Ref, ReferenceCounts
from shmdist.runtime.interrupts import current
from shmdist.runtime.replies import PendingReply
from shmdist.runtime.stack import need_stack
from shmdist.runtime.waiting import Waiter
from shmdist.serialization import codec
from shmdist.transport.link import STUCK_SECONDS, Link, LinkClosed, SendInterrupted, Wakeups
from shmdist.transport.messages import AT_ONCE, HEADER, NO_LANE, Kind, OutgoingFrames

if TYPE_CHECKING:
    from shmdist.runtime.sharing import SharedMemory

_RESULT, _CANCEL = int(Kind.RESULT), int(Kind.CANCEL)
_header = HEADER.pack


class RequestClient(ReferenceCounts):
    """The asking side of a node; see there for the attributes."""

    links: dict[int, Link]
    pending: dict[int, PendingReply]
    call_ids: Iterator[int]
    sharing: SharedMemory

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
        callback: Callable[[PendingReply], None] | None = None,
        call_id: int | None = None,
        reply: PendingReply | None = None,
        fd: int = -1,
        wakeups: Wakeups = None,
    ) -> PendingReply:
        """Send a frame that will be answered; the caller is inside the runtime.

        Raises
        ------
        ProcessExitedException
            The process is gone.
        KeyboardInterrupt
            While the frame waited to be written; it is withdrawn.
        TimeoutError
            Likewise, when the thread's time (``ThreadState.send_deadline``) was up.
        """
        link = self.links.get(pid) or self.link_to(pid)
        if reply is None:
            reply = PendingReply(next(self.call_ids) if call_id is None else call_id, pid, callback)
        call_id = reply.call_id
        self.pending[call_id] = reply
        parts = None
        try:
            if not self._leave(link, kind, flags, lane, call_id, payload, wakeups):
                parts = codec.frame(kind, flags, lane, call_id, payload, link)
                self.send(link, parts, payload, fd, wakeups)
        except LinkClosed:
            pass  # its death is on its way to us, and says how it went
        except BaseException:
            if parts is not None:
                self.sharing.take_back(parts, pid)
            self.cancel(reply)
            raise
        if pid in self.lost_processes and self.pending.pop(call_id, None) is not None:
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
        wakeups: Wakeups = None,
    ) -> bool:
        """Leave a frame in the receiver's ring segment; False when it must be sent.

        Most are short, and this is all there is to do for them.
        """
        if (
            payload is None
            or not payload.is_short
            or link.ring_out is None
            or self.sharing.holds.ended  # as `has_pending_releases`
            or self.sharing.unsent_releases
        ):
            return False
        body = payload.parts[0]
        head = _header(kind, flags | payload.flags, 0, lane, 0, call_id, len(body))
        return link.try_ring_one(head + body, wakeups)

    def send(
        self,
        link: Link,
        parts: OutgoingFrames,
        payload: codec.Payload | None,
        fd: int = -1,
        wakeups: Wakeups = None,
    ) -> None:
        """Write a frame; the references in it are counted for the receiver first.

        An error leaves all as it was, what was granted with `parts` is taken back; unless those are `gone`.
        """
        thread_state, sharing = current(), self.sharing
        refs = payload.refs if payload is not None else ()
        counted = begun = False
        written = True
        try:
            if refs:
                need_stack()  # for the way back as well
                while not counted:
                    try:
                        self.count(refs, link.pid, thread_state.interrupted)
                        counted = True
                    except SendInterrupted:
                        thread_state.raise_deferred_or_timeout()
            if sharing.has_pending_releases():
                self._pay(link)
            # Who has a time limit wants to know whether it was written by then.
            patience = STUCK_SECONDS if thread_state.send_deadline == math.inf else math.inf
            while not parts.gone:
                try:
                    written = link.send(parts, thread_state.interrupted, fd, wakeups, patience)
                    parts.gone = True
                except SendInterrupted as stopped:
                    parts.gone = begun = stopped.begun
                    written = False
                    if not begun:
                        thread_state.raise_deferred_or_timeout()  # else the program's handler lets it go on
        except LinkClosed:
            raise  # with the other side its counts are gone
        except BaseException:
            if not parts.gone:
                if counted:
                    self.unregister_for(refs, link.pid)
                sharing.take_back(parts, link.pid)
            raise
        try:
            if not written:
                self.flush(link)
            if len(parts) > 1 and parts.wanted:
                sharing.maintainer.want(parts.wanted, link.pid)
        except Warning:
            raise  # the program has asked for it
        except Exception:
            if not written:
                self.flush(link)
        if begun and thread_state.has_deferred:  # but when the time is up, who asked will see that
            thread_state.raise_deferred()

    def _pay(self, link: Link) -> None:
        """Give blocks back to the process at the end of `link`, ahead of what goes there now."""
        pending_releases = self.sharing.pending_releases(link)
        if not pending_releases:
            return
        try:
            written = link.post(pending_releases)
            pending_releases.gone = True
        except BaseException:
            self.sharing.take_back(pending_releases, link.pid)
            raise
        if not written:
            firmly(self.flush, link)

    def wait_inside(self, reply: Waiter, seconds: float = math.inf) -> None:
        """Wait so long at most for what a peer's runtime answers by itself; another thread reads meanwhile.

        Raises
        ------
        KeyboardInterrupt, TimeoutError
            As the caller's interrupt or time limit: no thread need wait for a peer that stands still.
        """
        thread_state = current()
        thread_state.refresh_signal_handlers()
        lock = threading.Lock()
        lock.acquire()
        reply.add(lock)
        deadline = time.monotonic() + seconds
        try:
            while not reply.done and time.monotonic() < deadline:
                lock.acquire(timeout=0.05)  # it may have been done before it saw the lock
                if thread_state.interrupted() and not reply.done:
                    thread_state.raise_deferred_or_timeout()
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
        counted: list[Ref] = []
        try:
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid)
                counted = payload.refs
            if self.sharing.has_pending_releases():
                pending_releases = self.sharing.pending_releases(link)
                parts.unsent_releases = pending_releases.unsent_releases
                parts[:0] = pending_releases  # in one piece with the answer
            written = link.send(parts, self.reactor.held_up, patience=STUCK_SECONDS)
            parts.gone = True
        except LinkClosed:
            return False
        except BaseException:
            self.unregister_for(counted, link.pid)
            self.sharing.revoke(parts, payload, link.pid)
            raise
        if not written:
            firmly(self.flush, link)
        try:
            if len(parts) > 1 and parts.wanted:
                self.sharing.maintainer.want(parts.wanted, link.pid)
        except Exception:
            pass  # the next one finds no block either
        return True

    def post(
        self, link: Link, kind: int, flags: int, call_id: int, payload: codec.Payload | None = None
    ) -> None:
        """Send a frame without ever blocking; from any thread. After an error it is not sent."""
        with current():
            if not link.post(codec.frame(kind, flags, 0, call_id, payload)):
                firmly(self.flush, link)

    def fail(self, reply: PendingReply, error: BaseException) -> None:
        """Complete a reply, which the caller has claimed, with an error."""
        reply.error = error
        callback, reply.callback = reply.callback, None
        try:
            if callback is not None:
                firmly(callback, reply)
        finally:
            self.reactor.complete(reply)

    def wait(self, reply: Waiter, timeout: float | None = None) -> bool:
        """Wait for a reply; False when the time was up."""
        return reply.done or self.reactor.wait(reply, timeout)

    def cancel(self, reply: PendingReply) -> bool:
        """Give up a request: no thread waits for its answer, and the worker is told.

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
                firmly(self.post, link, _CANCEL, 0, reply.call_id)
        return True

    def expire_now(self, reply: PendingReply) -> None:
        """Have an operation that was asked for done at once or not at all; its answer tells which."""
        link = self.links.get(reply.pid)
        if link is not None:
            self.post(link, _CANCEL, AT_ONCE, reply.call_id)
