"""What Future and RemoteChannel have in common: a name, an owner, and asking the owner."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from shmdist.errors import ShmdistError
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.reftable import RRID
from shmdist.runtime.replies import Reply
from shmdist.runtime.strand import current
from shmdist.wire import codec
from shmdist.wire.messages import NOT_RUN, WANT_VALUE, Kind

_CALL, _OP = int(Kind.CALL), int(Kind.OP)
_TAKES = ("take", "lend")  # operations whose value is lost to others, and goes back when nobody gets it
GRACE = 0.5  # seconds that an owner has, when the time is up, to say whether an operation was done
_WRITING = 0.1  # seconds in which it may be written, at least


def ask(owner: int, name: str, rrid: RRID, argument: Any = None, timeout: float | None = None) -> Any:
    """Run an operation on the reference `rrid` at its owner, another process.

    The owner judges what was in time. When the time is up it is told to do the operation at once or
    not at all, and has `GRACE` seconds to answer which of the two it was; what was done after all is
    a success. So a timeout of 0 is a try.

    Raises
    ------
    TimeoutError
        It was not done. Or the owner stands still, as the text then says: whether it is done is open,
        but a taken item goes back to the head of the channel.
    """
    node = current_node()
    payload = codec.dumps((name, tuple(rrid), argument), "the value")
    what = f"{name} of a reference on process {owner}"
    strand = current()
    reply = None
    try:
        strand.enter()
        try:
            if timeout is None:
                reply = node.request(owner, _OP, 0, payload)
                node.wait(reply)
            else:
                begun = time.monotonic()
                reply = _send_in_time(node, owner, payload, begun + max(timeout, _WRITING))
                if reply is not None and not node.wait(reply, begun + timeout - time.monotonic()):
                    node.hurry(reply)
                    if not node.wait(reply, GRACE):
                        raise TimeoutError(
                            f"{what} timed out after {timeout:.3g} s; the process does not answer, so it "
                            f"may be done when it goes on"
                        )
        finally:
            strand.leave()  # which may raise as well, though the answer is there
    except BaseException:
        if reply is not None:
            _give_up(node, reply, (owner, rrid) if name in _TAKES else None)
        raise
    if reply is None:
        raise TimeoutError(f"{what} timed out after {timeout:.3g} s, unsent: the process does not read")
    if reply.frame is not None and reply.frame.flags & NOT_RUN:
        raise TimeoutError(f"{what} timed out after {timeout:.3g} s")
    return node.open(reply, what)


def _send_in_time(node: Node, owner: int, payload: codec.Payload, until: float) -> Reply | None:
    """Send an operation; None when that could not be begun in time. The caller is inside the runtime."""
    strand = current()
    strand.until = until
    try:
        return node.request(owner, _OP, 0, payload)
    except TimeoutError:
        return None
    finally:
        strand.until = math.inf


def _give_up(node: Node, reply: Reply, back: tuple[int, RRID] | None) -> None:
    """Wait for the answer no longer; what it brings goes `back`, if it is an item."""
    if back is not None:
        node.unclaimed_takes[reply.call_id] = back
    if node.cancel(reply):
        return
    while not reply.done:
        time.sleep(0)  # it comes at the very moment of giving up
    if reply.frame is not None:
        node.unclaimed(reply.frame)
    node.unclaimed_takes.pop(reply.call_id, None)


def call_owner(owner: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(*args)`` on `owner`, which may be this process, as a call of its own."""
    node = current_node()
    if owner == node.pid:
        return function(*args)
    payload = codec.dumps((function, args, {}), "the call")
    strand = current()
    strand.enter()
    try:
        reply = node.request(owner, _CALL, WANT_VALUE, payload)
        try:
            node.wait(reply)
        except BaseException:
            node.cancel(reply)
            raise
    finally:
        strand.leave()
    return node.open(reply, getattr(function, "__name__", "the call"))


class Reference:
    """What Future and RemoteChannel have in common: a name, an owner, a count there."""

    _rrid: RRID
    _where: int
    _held = False  # a count at the owner is to be given back
    _inert = False

    def _set_up(self, rrid: RRID, where: int) -> None:
        self._rrid = rrid
        self._where = where
        self._held = True
        # It tells the owner when this reference is dropped.
        current_node().dispatcher.threads.ensure_standby()

    @property
    def where(self) -> int:
        """The process that holds the value."""
        return self._where

    def _release(self) -> None:
        """Give the count at the owner back, once."""
        with current():
            if self._held:
                self._held = False
                current_node().release(self._where, self._rrid)

    def __del__(self) -> None:
        if self._held:
            self._held = False
            try:
                current_node().release(self._where, self._rrid)
            except Exception:
                pass

    def _alive(self) -> Node:
        """Return the node, or say why this reference leads nowhere."""
        if self._inert:
            raise ShmdistError(
                f"this {type(self).__name__} was pickled outside a cluster and refers to nothing: "
                f"send references as arguments or results of remote calls, or through channels"
            )
        return current_node()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference) or type(self) is not type(other):
            return NotImplemented
        return self._rrid == other._rrid

    def __hash__(self) -> int:
        return hash(self._rrid)

    def __getitem__(self, index: Any) -> Any:
        self._alive()
        return call_owner(self._where, _index_here, self, index)


def _index_here(ref: Any, index: Any) -> Any:
    """Index the value of `ref` on its owner."""
    value = ref.fetch()
    return value if index == () and type(index) is tuple else value[index]
