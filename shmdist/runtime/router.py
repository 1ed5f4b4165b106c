"""Hands each frame to what waits for it, and runs the operations on references that live here.

The reactor calls all of this; `operate` when it has let go of the lead, the rest on the thread that reads.
None of it runs users' code or blocks. Parts enter what they handle by :meth:`Router.register`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.refcount.table import RRID
from shmdist.runtime.count_audit import CountAudit
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.executor import CallExecutor, IncomingCall
from shmdist.runtime.function_store import FunctionStore
from shmdist.runtime.replies import PendingOperation, PendingReply
from shmdist.runtime.requests import RequestClient
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.sharing import SharedMemory
from shmdist.serialization import codec
from shmdist.transport.messages import (
    AT_ONCE,
    BROKEN,
    FOR_GOOD,
    HAS_REFS,
    IS_ERROR,
    IS_NEW,
    NOT_RUN,
    Frame,
    Kind,
)

_CANCEL, _REFS, _REFERENCE_OP = int(Kind.CANCEL), int(Kind.REFS), int(Kind.REFERENCE_OP)
_CALL, _RESULT = int(Kind.CALL), int(Kind.RESULT)
_LEASES, _SEGMENT, _AUDIT = int(Kind.LEASES), int(Kind.SEGMENT), int(Kind.AUDIT)
_FUNCTION, _DROP_FUNCTION = int(Kind.FUNCTION), int(Kind.DROP_FUNCTION)
_COUNTS = (_REFS, _LEASES, _AUDIT)
_log = Log("node")

#: Runs an operation on a reference: given the references, what is to be answered, its name and its argument.
Operation: TypeAlias = "Callable[[ReferenceCounts, PendingOperation, RRID, Any], None]"
_operations: dict[str, Operation] = {}


def register_operations(operations: Mapping[str, Operation]) -> None:
    """Enter operations on references, by name."""
    _operations.update(operations)


class Router:
    """What is done with each kind of frame."""

    def __init__(
        self,
        requests: RequestClient,
        counts: ReferenceCounts,
        sharing: SharedMemory,
        executor: CallExecutor,
        functions: FunctionStore,
        audits: CountAudit,
        reserve: Reserve,
    ) -> None:
        self._requests, self._counts, self._executor = requests, counts, executor
        self._functions, self._audits, self._reserve = functions, audits, reserve
        self._blocks, self._maintainer = sharing.blocks, sharing.maintainer
        self._peers, self._reactor = requests.peers, requests.reactor
        self._enter_lane = self._reactor.lanes.enter
        self._handlers: dict[int, Callable[[Frame], None]] = {
            _CANCEL: self._on_cancel,
            _FUNCTION: functions.put,
            # What a function holds has users' finalizers, which must not run here.
            _DROP_FUNCTION: self._reactor.put_off,
            int(Kind.INTERRUPT_ALL): lambda frame: executor.interrupt_all(),
            int(Kind.RING): self._reactor.rings.accept,
            int(Kind.HEARTBEAT): lambda frame: None,  # that it came is all
            _SEGMENT: sharing.offers.on_segment,
            int(Kind.HOST_COPY): sharing.copies.lending.on_frame,
            _REFS: self._on_references,
            _LEASES: self._on_leases,
            _AUDIT: audits.on_audit,
        }

    def __repr__(self) -> str:
        return f"<Router of {len(self._handlers)} kinds>"

    def register(self, kind: int, handler: Callable[[Frame], None]) -> None:
        """Have frames of a kind handled; again after an error, for nobody will ask for them once more."""
        self._handlers[int(kind)] = handler

    # ------------------------------------------------------------------ all frames

    def route(self, frame: Frame) -> IncomingCall | Frame | None:
        """Give a frame to what waits for it.

        Returns
        -------
        IncomingCall, Frame or None
            What is to be run when the reading is let go of.
        """
        kind = frame.kind
        if frame.flags & HAS_REFS and not self._counts.arrived(frame):
            return None
        if kind == _RESULT:
            reply = self._requests.pending.pop(frame.call_id, None)
            if reply is None:
                self.on_late_answer(frame)
                return None
            reply.frame = frame
            try:
                callback = reply.callback
                if callback is not None:
                    reply.callback = None  # a Future that holds the reply must not be held by it
                    callback(reply)
            except Exception as error:
                self._insist(callback, reply, error)
            finally:
                reply.done = True
                if reply.locks:
                    firmly(reply.wake)
            return None
        if kind == _CALL:
            call = self._executor.accept(frame)
            if frame.lane and not self._enter_lane(call):
                return None  # it follows the one before it in its lane
            call.ticket = frame.link.calls_read
            frame.link.calls_read += 1
            return call
        if kind == _REFERENCE_OP:
            requests, link, call_id = self._requests, frame.link, frame.call_id
            # It can be withdrawn now.
            requests.waiting[link.pid, call_id] = PendingOperation(requests, link, call_id)
            return frame
        self.control(frame)
        return None

    def fail(self, frame: Frame, error: Exception) -> IncomingCall | None:
        """Fail what a frame concerns that could not be handed out.

        Returns
        -------
        IncomingCall or None
            To be refused: answered with the error.
        """
        if frame.flags & HAS_REFS and not self._counts.arrived(frame):
            return None
        requests = self._requests
        if frame.kind == _RESULT:
            reply = requests.pending.pop(frame.call_id, None)
            if reply is None:
                self.on_late_answer(frame)
            else:
                firmly(requests.fail, reply, error)
        elif frame.kind == _CALL:
            call = self._executor.queued.get((frame.link.pid, frame.call_id)) or self._executor.accept(frame)
            if call.ticket < 0:
                frame.lane = 0  # it has not entered it
            call.refusal = error
            return call
        elif frame.kind == _REFERENCE_OP:
            key = (frame.link.pid, frame.call_id)
            operation = requests.waiting.get(key) or PendingOperation(requests, frame.link, frame.call_id)
            operation.fail(error)
        else:
            self.control(frame)
        return None

    def control(self, frame: Frame) -> None:
        """Handle a frame that is neither call, operation nor answer; again after an error."""
        kind = frame.kind
        if kind in _COUNTS and frame.call_id != self._peers.pid:
            self._pass_on(frame)
            return
        handler = self._handlers.get(kind)
        if handler is None:
            _log.warning("process %d sent %r, which has no meaning here", frame.link.pid, frame)
        else:
            handler(frame)

    def operate(self, frame: Frame) -> None:
        """Run an operation on a reference; or what was put off until the reading is let go of."""
        if frame.kind == _DROP_FUNCTION:
            self._functions.drop(frame.link.pid, frame.call_id)
            return
        operation = self._requests.waiting.get((frame.link.pid, frame.call_id))
        if operation is None or operation.given_up:  # its process is gone, or does not want it any more
            frame.buffers = []  # what is in it goes back
            if operation is not None:
                operation.not_done()
            return
        try:
            if frame.flags & BROKEN:
                raise MemoryError("this process had no memory to receive what was put or asked")
            name, rrid, argument = codec.loads(frame, self._counts.give_back)
            _operations[name](self._counts, operation, RRID(*rrid), argument)
        except Exception as error:
            operation.fail(error)

    # ------------------------------------------------------------------ kinds

    def _pass_on(self, frame: Frame) -> None:
        """Pass on what is told of counts to a process that the sender cannot reach."""
        link = self._peers.links.get(frame.call_id)
        if link is not None:
            payload = codec.Payload()
            payload.parts.append(frame.body)
            self._reactor.post(link, frame.kind, 0, frame.call_id, payload)

    def _on_references(self, frame: Frame) -> None:
        """Make a reference that is new, or change counts."""
        counts = self._counts
        if frame.flags & IS_NEW:
            counts.create(RRID(*pickle.loads(frame.body)), "future", frame.link.pid)
            return
        if not frame.buffers:
            frame.buffers = [pickle.loads(frame.body)]
        counts.change_counts(frame.buffers[0])
        if counts.freed:  # their values' finalizers are users' code, which must not run here
            self._reactor.soon(counts.drop)
        self._audit_late_words(frame)

    def _on_leases(self, frame: Frame) -> None:
        self._blocks.on_leases(frame)
        self._audit_late_words(frame)

    def _audit_late_words(self, frame: Frame) -> None:
        """See to counts told by a process that is lost already: its link was made the moment it died."""
        if frame.link.pid in self._peers.lost:
            self._audits.ask_about(frame.link.pid)

    def _on_cancel(self, frame: Frame) -> None:
        key = (frame.link.pid, frame.call_id)
        if frame.flags & NOT_RUN:
            self._executor.withdraw(key)
            return
        operation = self._requests.waiting.get(key)
        if operation is not None:
            operation.withdraw(given_up=not frame.flags & AT_ONCE)
        elif not frame.flags & AT_ONCE:  # else it is answered already
            self._executor.cancel(key, for_good=bool(frame.flags & FOR_GOOD))

    def on_late_answer(self, frame: Frame) -> None:
        """Handle an answer that no thread waits for any more."""
        takes = self._requests.unclaimed_takes
        back = takes.get(frame.call_id)
        if back is None:
            return
        if not frame.flags & (IS_ERROR | NOT_RUN | BROKEN):
            # A take that was given up while its item was on the way: the item goes back, unread.
            owner, rrid = back
            item: list[Any] = []
            self._reactor.soon(lambda: self._return_item(owner, rrid, frame, item))
        takes.pop(frame.call_id, None)

    def _return_item(self, owner: int, rrid: RRID, frame: Frame, item: list[Any]) -> None:
        """Put an item back into its channel; again after an error, for which it is kept in `item`."""
        if not item:
            item += [codec.loads(frame, self._counts.give_back)]
        payload = codec.dumps(("untake", tuple(rrid), item[0]))
        self._requests.request(owner, _REFERENCE_OP, 0, payload)

    def _insist(self, callback: Any, reply: PendingReply, error: Exception) -> None:
        """Tell of an answer again: whoever is told raises nothing, but where it has no memory for that."""
        self._reserve.open()
        _log.exception("an error in what an answer was told to: %r", error)
        for _ in range(3):
            try:
                callback(reply)
            except Exception:
                continue
            return
