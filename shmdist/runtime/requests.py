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

import copy
import itertools
import marshal
import math
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import CapturedException, RemoteException, ShmdistError
from shmdist.refcount.table import RRID
from shmdist.runtime.block_counts import BlockCounts
from shmdist.runtime.counts import Ref, ReferenceCounts
from shmdist.runtime.interrupts import current
from shmdist.runtime.output import Outputs
from shmdist.runtime.peers import Peers
from shmdist.runtime.reactor import Reactor
from shmdist.runtime.replies import PendingOperation, PendingReply, pack_error, unpack_error
from shmdist.runtime.stack import need_stack
from shmdist.runtime.waiting import Waiter
from shmdist.serialization import codec
from shmdist.serialization.atoms import PICKLE
from shmdist.transport.link import STUCK_SECONDS, Link, LinkClosed, SendInterrupted, Wakeups
from shmdist.transport.messages import (
    AT_ONCE,
    BROKEN,
    HEADER,
    IS_ERROR,
    NO_LANE,
    NOT_RUN,
    Frame,
    Kind,
    OutgoingFrames,
)

_CALL, _RESULT, _CANCEL = int(Kind.CALL), int(Kind.RESULT), int(Kind.CANCEL)
_header = HEADER.pack


class RequestClient:
    """Sends requests and answers them.

    Attributes
    ----------
    pending : dict of int to PendingReply
        Answers waited for, by call; popping one is claiming it.
    waiting : dict of tuple to PendingOperation
        Others' operations that are not yet answered, by process and call.
    unclaimed_takes : dict
        Takes that were given up, by call: whose item goes back.
    call_ids, lanes : iterator of int
        Numbers for new calls and lanes.
    """

    def __init__(
        self,
        peers: Peers,
        reactor: Reactor,
        counts: ReferenceCounts,
        blocks: BlockCounts,
        outputs: Outputs,
    ) -> None:
        self.peers, self.reactor, self.counts, self.blocks, self.outputs = (
            peers,
            reactor,
            counts,
            blocks,
            outputs,
        )
        self.links = peers.links
        self.start, self.post = reactor.start, reactor.post
        self.pending: dict[int, PendingReply] = {}
        self.waiting: dict[tuple[int, int], PendingOperation] = {}
        self.unclaimed_takes: dict[int, tuple[int, RRID]] = {}
        self.call_ids = itertools.count(1)
        self.lanes = itertools.count(1)

    def __repr__(self) -> str:
        return f"<RequestClient {len(self.pending)} awaited, {len(self.waiting)} to be answered>"

    @property
    def pid(self) -> int:
        """The number of this process."""
        return self.peers.pid

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
        link = self.links.get(pid) or self.peers.link_to(pid)
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
                self.blocks.take_back(parts, pid)
            self.cancel(reply)
            raise
        if pid in self.peers.lost and self.pending.pop(call_id, None) is not None:
            self.fail(reply, self.peers.death(pid))
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
            or self.blocks.holds.ended  # as `has_pending_releases`
            or self.blocks.unsent_releases
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
        thread_state, blocks = current(), self.blocks
        refs = payload.refs if payload is not None else ()
        counted = begun = False
        written = True
        try:
            if refs:
                need_stack()  # for the way back as well
                while not counted:
                    try:
                        self.counts.count(refs, link.pid, thread_state.interrupted)
                        counted = True
                    except SendInterrupted:
                        thread_state.raise_deferred_or_timeout()
            if blocks.has_pending_releases():
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
                    self.counts.unregister_for(refs, link.pid)
                blocks.take_back(parts, link.pid)
            raise
        try:
            if not written:
                self.reactor.flush(link)
            if len(parts) > 1 and parts.wanted:
                blocks.want(parts.wanted, link.pid)
        except Warning:
            raise  # the program has asked for it
        except Exception:
            if not written:
                self.reactor.flush(link)
        if begun and thread_state.has_deferred:  # but when the time is up, who asked will see that
            thread_state.raise_deferred()

    def _pay(self, link: Link) -> None:
        """Give blocks back to the process at the end of `link`, ahead of what goes there now."""
        pending_releases = self.blocks.pending_releases(link)
        if not pending_releases:
            return
        try:
            written = link.post(pending_releases)
            pending_releases.gone = True
        except BaseException:
            self.blocks.take_back(pending_releases, link.pid)
            raise
        if not written:
            firmly(self.reactor.flush, link)

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
                self.counts.count(payload.refs, link.pid)
                counted = payload.refs
            if self.blocks.has_pending_releases():
                pending_releases = self.blocks.pending_releases(link)
                parts.unsent_releases = pending_releases.unsent_releases
                parts[:0] = pending_releases  # in one piece with the answer
            written = link.send(parts, self.reactor.held_up, patience=STUCK_SECONDS)
            parts.gone = True
        except LinkClosed:
            return False
        except BaseException:
            self.counts.unregister_for(counted, link.pid)
            self.blocks.revoke(parts, payload, link.pid)
            raise
        if not written:
            firmly(self.reactor.flush, link)
        try:
            if len(parts) > 1 and parts.wanted:
                self.blocks.want(parts.wanted, link.pid)
        except Exception:
            pass  # the next one finds no block either
        return True

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
                firmly(self.reactor.post, link, _CANCEL, 0, reply.call_id)
        return True

    def expire_now(self, reply: PendingReply) -> None:
        """Have an operation that was asked for done at once or not at all; its answer tells which."""
        link = self.links.get(reply.pid)
        if link is not None:
            self.post(link, _CANCEL, AT_ONCE, reply.call_id)

    # ------------------------------------------------------------------ what answers say

    def open(self, reply: PendingReply, what: Any) -> Any:
        """Return the value of a reply that is done, or raise its error."""
        if self.outputs.busy:
            self.outputs.show((reply.pid,))
        if reply.error is not None:
            # A copy, for the callers' frames hold the reply: they would hold each other, and all in them.
            raise copy.copy(reply.error)
        frame = reply.frame
        assert frame is not None
        return self.read_result(frame, reply.pid, what)

    def call(self, pid: int, flags: int, payload: codec.Payload, what: Any) -> Any:
        """Send a call to another process, wait for its value, and return that."""
        thread_state = current()
        thread_state.enter()
        try:
            reply = self.request(pid, _CALL, flags, payload)
            try:
                if not reply.done:
                    self.reactor.wait(reply)
            except BaseException:
                self.cancel(reply)
                raise
        finally:
            thread_state.leave()
        return self.open(reply, what)

    def read_result(self, frame: Frame, pid: int, what: Any) -> Any:
        """Read a RESULT frame: its value, or raise what it tells; `what` is a function, or a text."""
        if not frame.flags and not frame.buffers:
            body = frame.body
            try:
                if body[0] != PICKLE:
                    return marshal.loads(body)
                codec.prepare(body)
                return pickle.loads(body)
            except Exception as error:
                raise codec.unreadable(error, f"the result of {name_of(what)} from process {pid}") from error
        return self._read_rarer(frame, pid, name_of(what))

    def _read_rarer(self, frame: Frame, pid: int, what: str) -> Any:
        """Read the result that an error, a large value, or a value with references is."""
        if frame.flags & BROKEN:
            raise MemoryError(f"this process had no memory to receive the result of {what}")
        if frame.flags & NOT_RUN:
            raise ShmdistError(f"{what} was withdrawn before it began")
        if frame.flags & IS_ERROR:
            raise self.load_error(frame)
        try:
            return codec.loads(frame, self.counts.give_back)
        except Exception as error:
            raise codec.unreadable(error, f"the result of {what} from process {pid}") from error

    def dump_error(self, captured: CapturedException) -> codec.Payload:
        """Pickle an error that is the answer to a request."""
        return codec.dumps((self.peers.pid, *pack_error(captured)))

    def load_error(self, frame: Frame) -> RemoteException:
        """Return the error that a RESULT frame tells."""
        return unpack_error(*codec.loads(frame, self.counts.give_back))

    # ------------------------------------------------------------------ losses

    def lose(self, pid: int) -> None:
        """Fail what waits for a process that is gone; withdraw what it waited for. Again after an error."""
        for call_id, reply in list(self.pending.items()):
            if self.peers.exiting:
                break  # threads that still wait end with the program, silently
            if reply.pid == pid:
                death = self.peers.death(pid)
                if self.pending.pop(call_id, None) is not None:
                    firmly(self.fail, reply, death)
        for key, operation in list(self.waiting.items()):
            if key[0] == pid:
                operation.withdraw(given_up=True)
                self.waiting.pop(key, None)


def name_of(what: Any) -> str:
    """Return what an error calls a function; or a text as it is."""
    return what if isinstance(what, str) else getattr(what, "__qualname__", None) or f"{what!r:.80}"
