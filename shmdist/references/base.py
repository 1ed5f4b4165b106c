"""The base of Future and RemoteChannel: a name, an owner, and requests to the owner."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from shmdist._ending import VOID, Ending
from shmdist._firmly import firmly
from shmdist._timeouts import seconds
from shmdist.errors import SerializationError, ShmdistError, local_exception
from shmdist.refcount.table import RRID
from shmdist.runtime.interrupts import current, is_interrupt
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import PendingReply
from shmdist.serialization import codec
from shmdist.transport.link import LinkClosed
from shmdist.transport.messages import NOT_RUN, WANT_VALUE, Kind

_CALL, _REFERENCE_OP = int(Kind.CALL), int(Kind.REFERENCE_OP)
_TAKES = ("take", "lend")  # operations whose value is lost to others, and goes back when nobody gets it
ANSWER_GRACE_SECONDS = 0.5  # that an owner has, when the time is up, to say whether an operation was done
_MIN_WRITE_SECONDS = 0.1  # in which it may be written, at least


def ask(owner: int, name: str, rrid: RRID, argument: Any = None, timeout: float | None = None) -> Any:
    """Run an operation on the reference `rrid` at its owner, another process.

    The owner judges what was in time. When the time is up it is told to do the operation at once or
    not at all, and has `ANSWER_GRACE_SECONDS` to answer which of the two it was; what was done after all is
    a success. So a timeout of 0 is a try.

    Raises
    ------
    TimeoutError
        It was not done. Or the owner stands still, as the text then says: whether it is done is open,
        but a taken item goes back to the head of the channel.
    """
    node = current_node()
    timeout = seconds(timeout)
    payload = codec.dumps((name, tuple(rrid), argument), "the value")
    what = f"{name} of a reference on process {owner}"
    thread_state = current()
    reply = None
    back = (owner, rrid) if name in _TAKES else None
    try:
        thread_state.enter()
        try:
            if timeout is None:
                reply = node.requests.request(owner, _REFERENCE_OP, 0, payload)
                node.requests.wait(reply)
            else:
                begun = time.monotonic()
                reply = _send_in_time(node, owner, payload, begun + max(timeout, _MIN_WRITE_SECONDS))
                if reply is not None and not node.requests.wait(reply, begun + timeout - time.monotonic()):
                    node.requests.expire_now(reply)
                    if not node.requests.wait(reply, ANSWER_GRACE_SECONDS):
                        raise TimeoutError(
                            f"{what} timed out after {timeout:.3g} s; the process does not answer, so it "
                            f"may be done when it goes on"
                        )
        except BaseException:
            if reply is not None:
                given_up, reply = reply, None
                firmly(_give_up, node, given_up, back)
            raise
        finally:
            thread_state.leave()  # which may raise as well, though the answer is there
        if reply is None:
            raise TimeoutError(f"{what} timed out after {timeout:.3g} s, unsent: the process does not read")
        if reply.frame is not None and reply.frame.flags & NOT_RUN:
            reply = None  # nothing is to be given up
            raise TimeoutError(f"{what} timed out after {timeout:.3g} s")
        return node.requests.open(reply, what)
    except SerializationError:  # nobody can read it
        raise
    except BaseException:
        if reply is not None:
            firmly(_give_up, node, reply, back)
        raise


def ask_later(
    owner: int, name: str, rrid: RRID, argument: Any, answered: Callable[[PendingReply], None]
) -> bool:
    """Begin an operation on a reference at its owner, another process, and wait for nothing.

    Parameters
    ----------
    answered : callable
        Told the reply when it has come, on the thread that reads: it must not block.

    Returns
    -------
    bool
        False when there is no link to the owner yet: to make one may take long.
    """
    node = current_node()
    link = node.peers.links.get(owner)
    if link is None:
        return False
    payload = codec.dumps((name, tuple(rrid), argument), "the value")
    with current():
        reply = PendingReply(next(node.requests.call_ids), owner, answered)
        node.requests.pending[reply.call_id] = reply
        with contextlib.suppress(LinkClosed):  # its death is on its way to us
            node.reactor.post(link, _REFERENCE_OP, 0, reply.call_id, payload)
        if owner in node.peers.lost and node.requests.pending.pop(reply.call_id, None) is not None:
            node.requests.fail(reply, node.peers.death(owner))
    return True


def _send_in_time(node: Node, owner: int, payload: codec.Payload, until: float) -> PendingReply | None:
    """Send an operation; None when that could not be begun in time. The caller is inside the runtime."""
    thread_state = current()
    thread_state.send_deadline = until
    try:
        return node.requests.request(owner, _REFERENCE_OP, 0, payload)
    except TimeoutError:
        return None
    finally:
        thread_state.send_deadline = math.inf


def _give_up(node: Node, reply: PendingReply, back: tuple[int, RRID] | None) -> None:
    """Wait for the answer no longer; what it brings goes `back`, if it is an item."""
    if back is not None:
        node.requests.unclaimed_takes[reply.call_id] = back
    if node.requests.cancel(reply):
        return
    while not reply.done:
        time.sleep(0)  # it comes at the very moment of giving up
    if reply.frame is not None:
        node.router.on_late_answer(reply.frame)
    node.requests.unclaimed_takes.pop(reply.call_id, None)


def call_owner(owner: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(*args)`` on `owner`, which may be this process, as a call of its own."""
    node = current_node()
    if owner == node.pid:
        try:
            return function(*args)
        except BaseException as error:
            if is_interrupt(error):
                raise
            told = local_exception(owner, error)
            if told is error:
                raise
            raise told from None  # its traceback is that of the cause as well
    payload = codec.dumps((function, args, {}), "the call")
    thread_state = current()
    thread_state.enter()
    try:
        reply = node.requests.request(owner, _CALL, WANT_VALUE, payload)
        try:
            node.requests.wait(reply)
        except BaseException:
            _give_up(node, reply, None)
            raise
        # Read before an interrupt can come: what it refers to is counted, and goes back with the value.
        return node.requests.open(reply, getattr(function, "__name__", "the call"))
    finally:
        thread_state.leave()


class Reference:
    """What Future and RemoteChannel have in common: a name, an owner, a count there."""

    _rrid: RRID
    _where: int
    _count: Ending | None = None  # has a count at the owner, which is given back when it ends
    _inert = False

    def _set_up(self, rrid: RRID, where: int) -> None:
        """Name this reference, which the owner counts, or has never heard of if it was made here."""
        count, back = self._prepare(rrid, where)
        count.__del__ = back

    def _prepare(self, rrid: RRID, where: int) -> tuple[Ending, Callable[[], object]]:
        """Name this reference, which is not counted yet; returns its count, and what it is to note then."""
        self._rrid = rrid
        self._where = where
        node = current_node()
        # It tells the owner when this reference is dropped.
        node.reactor.threads.ensure_standby()
        count = self._count = Ending(VOID)
        return count, partial(node.counts.released.append, (where, rrid))

    @property
    def where(self) -> int:
        """The process that holds the value."""
        return self._where

    def _release(self) -> None:
        """Give the count at the owner back, once."""
        with current():
            if self._count is not None:
                self._count = None
                firmly(current_node().counts.see_to_released)

    def __del__(self) -> None:
        if self._count is not None:
            try:
                self._count = None
                current_node().counts.see_to_released()
            except KeyboardInterrupt:
                again = current().again()  # noqa: F841 - raised when this frame ends
                firmly(current_node().counts.see_to_released)
            except Exception:
                pass  # with the next one

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

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Return an array without dimensions that holds this reference.

        Without it numpy takes what can be indexed for a sequence, and would ask the owner for each item.
        """
        import numpy

        array = numpy.empty(1, object)
        array[0] = self
        return array.reshape(())


def _index_here(ref: Any, index: Any) -> Any:
    """Index the value of `ref` on its owner."""
    value = ref.fetch()
    return value if index == () and type(index) is tuple else value[index]
