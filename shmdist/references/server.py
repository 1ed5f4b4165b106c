"""The owner's side of references: the operations that other processes request.

None of them blocks. One that has to wait leaves an ``PendingOperation`` with the future or the
channel, which answers it later, and tells the operation how it is withdrawn.
"""

from __future__ import annotations

import threading
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import CapturedException, SerializationError, ShmdistError, remote_exception
from shmdist.refcount.table import RRID, Entry, State
from shmdist.references.channel import Channel
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.interrupts import current
from shmdist.runtime.replies import PendingOperation
from shmdist.runtime.router import Operation, register_operations

USER_CHANNEL_MIN_SECONDS = 0.05  # that the method of a user's own channel has at least, whatever the timeout


def local_channel(counts: ReferenceCounts, rrid: RRID) -> Any:
    """Return the channel that `rrid` names; it lives on this process."""
    entry = counts.refs.get(rrid)  # one step for the interpreter
    if entry is None or entry.state is not State.SET:
        raise ShmdistError(f"there is no channel {tuple(rrid)} on process {counts.peers.pid}")
    return entry.value


def _serve(
    counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, name: str, argument: Any
) -> None:
    """Run a waiting operation: its answer may come later, and it may be withdrawn till then."""
    if name == "fetch" and argument is not None and not counts.has_value(rrid):
        raise SerializationError(argument)  # asked for by a weak reference
    waiter = None
    with current(), counts.lock:
        entry = counts.refs.lookup(rrid)
        if entry.state is State.UNSET and name in ("fetch", "wait"):
            # A future without a value, or one of whose creation we have not heard yet.
            waiter = operation if name == "fetch" else _ReadinessWaiter(operation)
            entry.waiters.append(waiter)
    if waiter is not None:
        firmly(operation.waits, lambda: _withdraw(counts, entry, waiter))  # or it stays there for good
    elif entry.kind != "channel":
        _serve_future(counts, operation, entry, name, argument)
    elif isinstance(entry.value, Channel):
        _serve_channel(operation, entry.value, name, argument)
    else:
        _UserChannelOperation(counts, operation, entry.value, name, argument)


def _serve_future(
    counts: ReferenceCounts, operation: PendingOperation, entry: Any, name: str, argument: Any
) -> None:
    if name == "put":
        counts.set_value(entry, argument)
        operation.resolve(None)
    elif name in ("fetch", "wait"):
        if isinstance(entry.value, CapturedException):
            operation.fail(remote_exception(counts.peers.pid, entry.value))
        else:
            operation.resolve(entry.value if name == "fetch" else None)
    else:
        raise TypeError(f"a Future has no {name}")


def _serve_channel(operation: PendingOperation, channel: Channel, name: str, argument: Any) -> None:
    if name == "put":
        channel.put_async(argument, operation)
    elif name == "take":
        operation.undo = channel.untake
        channel.take_async(operation)
    elif name == "fetch":
        channel.fetch_async(operation)
    else:
        channel.wait_async(operation)
    firmly(operation.waits, lambda: channel.cancel(operation))


class _UserChannelOperation:
    """An operation on a channel of the user's own: its methods may block, so it gets a thread.

    It cannot be withdrawn from the method, but who gave up need not wait for it: the first to
    take the lock decides. A put is decided when it begins, for its item cannot be got back.
    """

    def __init__(
        self, counts: ReferenceCounts, operation: PendingOperation, channel: Any, name: str, argument: Any
    ) -> None:
        self._counts, self._operation = counts, operation
        self._channel, self._name, self._argument = channel, name, argument
        self._decided = threading.Lock()
        if name == "take":
            operation.undo = channel.put
        operation.waits(self._withdraw)
        counts.reactor.start(self._run)

    def _run(self) -> None:
        putting = self._name == "put"
        if putting and not self._decided.acquire(False):
            return
        try:
            method = getattr(self._channel, self._name)
            value = method(self._argument) if putting else method()
        except Exception as error:
            if putting or self._decided.acquire(False):
                self._operation.fail(error)
            return
        if putting or self._decided.acquire(False):
            self._operation.resolve(value)
        elif self._name == "take":
            self._channel.put(value)  # no thread waits for it any more

    def _withdraw(self) -> bool:
        if self._operation.given_up:
            return self._decided.acquire(False)
        try:
            self._counts.reactor.later(USER_CHANNEL_MIN_SECONDS, self._end)  # so that it finds what is there
        except (RuntimeError, MemoryError):  # no thread can be had
            self._end()
        return False

    def _end(self) -> None:
        if self._decided.acquire(False):
            self._operation.not_done()


class _ReadinessWaiter:
    """Tells an operation that a value is there, and keeps the value."""

    def __init__(self, operation: PendingOperation) -> None:
        self._operation = operation

    def resolve(self, value: Any) -> None:
        self._operation.resolve(None)

    def fail(self, error: BaseException) -> None:
        self._operation.fail(error)


def _withdraw(counts: ReferenceCounts, entry: Entry, waiter: Any) -> bool:
    with current(), counts.lock:
        if waiter in entry.waiters:
            entry.waiters.remove(waiter)
            return True
    return False


def _waiting(name: str) -> Operation:
    return lambda counts, operation, rrid, argument: _serve(counts, operation, rrid, name, argument)


def _isready(counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, argument: Any) -> None:
    with current(), counts.lock:
        entry = counts.refs.lookup(rrid)
    if entry.kind == "channel":
        _at_once("isready")(counts, operation, rrid, argument)
    else:
        operation.resolve(entry.state is State.SET)


def _at_once(name: str) -> Operation:
    def run(counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, argument: Any) -> None:
        channel = local_channel(counts, rrid)
        operation.resolve(len(channel) if name == "len" else getattr(channel, name)())

    return run


def _untake(counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, argument: Any) -> None:
    channel = local_channel(counts, rrid)
    if hasattr(channel, "untake"):
        channel.untake(argument)
    else:
        counts.reactor.soon(lambda: channel.put(argument))
    operation.resolve(None)


register_operations(
    {
        **{name: _waiting(name) for name in ("fetch", "wait", "take", "put")},
        **{name: _at_once(name) for name in ("isopen", "close", "len")},
        "isready": _isready,
        "untake": _untake,
    }
)
