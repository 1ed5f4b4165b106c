"""Handlers of the frames that are neither calls nor answers."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.refcount.table import RRID
from shmdist.runtime.replies import PendingOperation
from shmdist.serialization import codec
from shmdist.transport.messages import AT_ONCE, BROKEN, FOR_GOOD, IS_ERROR, IS_NEW, NOT_RUN, Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.executor import IncomingCall
    from shmdist.runtime.node import Node

_CANCEL, _REFS, _REFERENCE_OP = int(Kind.CANCEL), int(Kind.REFS), int(Kind.REFERENCE_OP)
_CALL, _RESULT = int(Kind.CALL), int(Kind.RESULT)
_LEASES, _SEGMENT, _AUDIT = int(Kind.LEASES), int(Kind.SEGMENT), int(Kind.AUDIT)
_COUNTS = (_REFS, _LEASES, _AUDIT)
_log = Log("node")


def fail(node: Node, frame: Frame, error: Exception) -> IncomingCall | None:
    """Fail what a frame concerns that this process could not handle; on the reading thread.

    Returns
    -------
    Task or None
        To be refused: answered with the error.
    """
    if frame.kind == _RESULT:
        reply = node.pending.pop(frame.call_id, None)
        if reply is None:
            on_late_answer(node, frame)
        else:
            firmly(node.fail, reply, error)
    elif frame.kind == _CALL:
        task = node.tasks.queued.get((frame.link.pid, frame.call_id)) or node.tasks.accept(frame)
        if task.ticket < 0:
            frame.lane = 0  # it has not entered it
        task.refusal = error
        return task
    elif frame.kind == _REFERENCE_OP:
        key = (frame.link.pid, frame.call_id)
        operation = node.waiting.get(key) or PendingOperation(node, frame.link, frame.call_id)
        operation.fail(error)
    else:
        control(node, frame)
    return None


def operate(node: Node, frame: Frame) -> None:
    """Run an operation on a reference that lives here; or what was put off until the reading is let go of."""
    if frame.kind == Kind.DROP_FUNCTION:
        node.functions.drop(frame.link.pid, frame.call_id)
        return
    operation = node.waiting.get((frame.link.pid, frame.call_id))
    if operation is None or operation.given_up:  # its process is gone, or does not want it any more
        frame.buffers = []  # what is in it goes back
        if operation is not None:
            operation.not_done()
        return
    try:
        if frame.flags & BROKEN:
            raise MemoryError("this process had no memory to receive what was put or asked")
        name, rrid, argument = codec.loads(frame, node.give_back)
        node.operations[name](node, operation, RRID(*rrid), argument)
    except Exception as error:
        operation.fail(error)


def control(node: Node, frame: Frame) -> None:
    """Handle a frame that is neither call, operation nor answer; must not block.

    Again after an error: nobody will ask for it once more.
    """
    kind = frame.kind
    if kind in _COUNTS and frame.call_id != node.pid:
        link = node.links.get(frame.call_id)  # for another process, which the sender cannot reach
        if link is not None:
            payload = codec.Payload()
            payload.parts.append(frame.body)
            node.post(link, kind, 0, frame.call_id, payload)
    elif kind == _LEASES:
        node.sharing.on_leases(frame)
        _audit_late_words(node, frame)
    elif kind == _SEGMENT:
        node.sharing.offers.on_segment(frame)
    elif kind == _REFS and frame.flags & IS_NEW:
        node.create(RRID(*pickle.loads(frame.body)), "future", frame.link.pid)
    elif kind == _REFS:
        if not frame.buffers:
            frame.buffers = [pickle.loads(frame.body)]
        node.change_counts(frame.buffers[0])
        if node.freed:  # their values' finalizers are users' code, which must not run here
            node.reactor.soon(node.drop)
        _audit_late_words(node, frame)
    elif kind == _CANCEL:
        key = (frame.link.pid, frame.call_id)
        if frame.flags & NOT_RUN:
            node.tasks.withdraw(key)
            return
        operation = node.waiting.get(key)
        if operation is not None:
            operation.withdraw(given_up=not frame.flags & AT_ONCE)
        elif not frame.flags & AT_ONCE:  # else it is answered already
            node.tasks.cancel(key, for_good=bool(frame.flags & FOR_GOOD))
    elif kind == Kind.FUNCTION:
        node.functions.put(frame)
    elif kind == Kind.DROP_FUNCTION:
        node.reactor.put_off(frame)  # what a function holds has users' finalizers, which must not run here
    elif kind == Kind.INTERRUPT_ALL:
        node.tasks.interrupt_all()
    elif kind == Kind.RING:
        node.reactor.rings.accept(frame)
    elif kind == Kind.HEARTBEAT:
        pass  # that it came is all
    else:
        handler = node.controls.get(kind)
        if handler is None:
            _log.warning("process %d sent %r, which has no meaning here", frame.link.pid, frame)
        else:
            handler(frame)


def _audit_late_words(node: Node, frame: Frame) -> None:
    """See to counts told by who is lost already: its link was made the moment it died."""
    if frame.link.pid in node.lost_processes:
        node.audits.ask_about(frame.link.pid)


def on_late_answer(node: Node, frame: Frame) -> None:
    """Handle an answer that no thread waits for any more; on the reading thread."""
    back = node.unclaimed_takes.get(frame.call_id)
    if back is None:
        return
    if not frame.flags & (IS_ERROR | NOT_RUN | BROKEN):
        # A take that was given up while its item was on the way: the item goes back, unread.
        owner, rrid = back
        item: list[Any] = []
        node.reactor.soon(lambda: _return_item(node, owner, rrid, frame, item))
    node.unclaimed_takes.pop(frame.call_id, None)


def _return_item(node: Node, owner: int, rrid: RRID, frame: Frame, item: list[Any]) -> None:
    """Put an item back into its channel; again after an error, for which it is kept in `item`."""
    if not item:
        item += [codec.loads(frame, node.give_back)]
    payload = codec.dumps(("untake", tuple(rrid), item[0]))
    node.request(owner, _REFERENCE_OP, 0, payload)
