"""A node's part as one that is asked: operations, and frames that are neither call nor answer."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from shmdist._log import Log
from shmdist.runtime.reftable import RRID
from shmdist.wire import codec
from shmdist.wire.messages import AT_ONCE, BROKEN, IS_ERROR, IS_NEW, NOT_RUN, Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.node import Node

_CANCEL, _REFS, _OP = int(Kind.CANCEL), int(Kind.REFS), int(Kind.OP)
_LEASES, _SEGMENT, _AUDIT = int(Kind.LEASES), int(Kind.SEGMENT), int(Kind.AUDIT)
_COUNTS = (_REFS, _LEASES, _AUDIT)
_log = Log("node")


def operate(node: Node, frame: Frame) -> None:
    """Run an operation on a reference that lives here."""
    operation = node.waiting.get((frame.link.pid, frame.call_id))
    if operation is None or operation.given_up:  # its process is gone, or does not want it any more
        node.give_back(list(codec.references(frame)))
        if operation is not None:
            operation.not_done()
        return
    try:
        name, rrid, argument = codec.loads(frame, node.give_back)
        node.operations[name](node, operation, RRID(*rrid), argument)
    except Exception as error:
        operation.fail(error)


def control(node: Node, frame: Frame) -> None:
    """Handle a frame that is neither call, operation nor answer; must not block."""
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
        freed = node.change_counts(pickle.loads(frame.body))
        if freed:  # their values' finalizers are users' code, which must not run here
            node.dispatcher.start(lambda: node.drop(freed))
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
            node.tasks.cancel(key)
    elif kind == Kind.FUNC:
        node.functions.put(frame)
    elif kind == Kind.DROP:
        node.functions.drop(frame.link.pid, frame.call_id)
    elif kind == Kind.STOP:
        node.tasks.interrupt_all()
    elif kind == Kind.MAIL:
        node.dispatcher.mail.accept(frame)
    elif kind == Kind.BEAT:
        pass  # that it came is all
    else:
        handler = node.controls.get(kind)
        if handler is None:
            _log.warning("process %d sent %r, which has no meaning here", frame.link.pid, frame)
        else:
            handler(frame)


def _audit_late_words(node: Node, frame: Frame) -> None:
    """See to counts told by who is lost already: its link was made the moment it died."""
    if frame.link.pid in node.graves:
        node.audits.ask_about(frame.link.pid)


def unclaimed(node: Node, frame: Frame) -> None:
    """Handle an answer that nobody waits for any more; on the reading thread."""
    refs = codec.references(frame)
    back = node.unclaimed_takes.pop(frame.call_id, None)
    if back is not None and not frame.flags & (IS_ERROR | NOT_RUN | BROKEN):
        # A take that was given up while its item was on the way: the item goes back, unread.
        owner, rrid = back
        node.dispatcher.start(lambda: _return_item(node, owner, rrid, frame))
        return
    if refs:
        node.give_back(refs)


def _return_item(node: Node, owner: int, rrid: RRID, frame: Frame) -> None:
    value = codec.loads(frame, node.give_back)
    payload = codec.dumps(("untake", tuple(rrid), value))
    node.request(owner, _OP, 0, payload)
