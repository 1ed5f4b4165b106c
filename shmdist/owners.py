"""The owner's side of references: the operations that other processes ask for.

None of them blocks. One that has to wait leaves an ``Operation`` with the future or the
channel, which answers it later, and a way to withdraw it in ``node.waiting``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shmdist.channels import Channel
from shmdist.errors import CapturedException, ShmdistError, remote_exception
from shmdist.runtime.node import Node
from shmdist.runtime.reftable import RRID, State
from shmdist.runtime.replies import Operation


def local_channel(node: Node, rrid: RRID) -> Any:
    """Return the channel that `rrid` names; it lives on this process."""
    with node.lock:
        entry = node.refs.get(rrid)
    if entry is None or entry.state is not State.SET:
        raise ShmdistError(f"there is no channel {tuple(rrid)} on process {node.pid}")
    return entry.value


def _serve(node: Node, operation: Operation, rrid: RRID, name: str, argument: Any) -> None:
    """Run a waiting operation: its answer may come later, and it may be withdrawn till then."""
    with node.lock:
        entry = node.refs.lookup(rrid)
        if entry.state is State.UNSET and name in ("fetch", "wait"):
            # A future without a value, or one of whose creation we have not heard yet.
            waiter = operation if name == "fetch" else _ReadyOnly(operation)
            entry.waiters.append(waiter)
            node.waiting[operation.link.pid, operation.call_id] = lambda: _withdraw(node, entry, waiter)
            return
    value = entry.value
    if entry.kind != "channel":
        _serve_future(node, operation, entry, name, argument)
    elif isinstance(value, Channel):
        _serve_channel(node, operation, value, name, argument)
    else:
        # A channel of the user's own: its methods may block, so they get a thread. They cannot be
        # withdrawn, but who gave up need not wait for them: the first to take the lock decides.
        decided = threading.Lock()
        node.waiting[operation.link.pid, operation.call_id] = lambda: decided.acquire(False)
        node.dispatcher.start(lambda: _serve_foreign(operation, value, name, argument, decided))


def _serve_future(node: Node, operation: Operation, entry: Any, name: str, argument: Any) -> None:
    if name == "put":
        node.set_value(entry, argument)
        operation.resolve(None)
    elif name in ("fetch", "wait"):
        if isinstance(entry.value, CapturedException):
            operation.fail(remote_exception(node.pid, entry.value))
        else:
            operation.resolve(entry.value if name == "fetch" else None)
    else:
        raise TypeError(f"a Future has no {name}")


def _serve_channel(node: Node, operation: Operation, channel: Channel, name: str, argument: Any) -> None:
    key = (operation.link.pid, operation.call_id)
    # Entered first: the operation may be resolved, and take it out, before the next line.
    node.waiting[key] = lambda: channel.cancel(operation)
    if name == "put":
        channel.put_async(argument, operation)
    elif name == "take":
        operation.undo = channel.untake
        channel.take_async(operation)
    elif name == "fetch":
        channel.fetch_async(operation)
    else:
        channel.wait_async(operation)


def _serve_foreign(
    operation: Operation, channel: Any, name: str, argument: Any, decided: threading.Lock
) -> None:
    if name == "take":
        operation.undo = channel.put
    try:
        value = getattr(channel, name)(argument) if name == "put" else getattr(channel, name)()
    except Exception as error:
        if decided.acquire(False):
            operation.fail(error)
        return
    if decided.acquire(False):
        operation.resolve(value)
    elif name == "take":
        channel.put(value)  # nobody waits for it any more


class _ReadyOnly:
    """Tells an operation that a value is there, and keeps the value."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    def resolve(self, value: Any) -> None:
        self._operation.resolve(None)

    def fail(self, error: BaseException) -> None:
        self._operation.fail(error)


def _withdraw(node: Node, entry: Any, waiter: Any) -> bool:
    with node.lock:
        if waiter in entry.waiters:
            entry.waiters.remove(waiter)
            return True
    return False


def _waiting(name: str) -> Callable[[Node, Operation, RRID, Any], None]:
    return lambda node, operation, rrid, argument: _serve(node, operation, rrid, name, argument)


def _isready(node: Node, operation: Operation, rrid: RRID, argument: Any) -> None:
    with node.lock:
        entry = node.refs.lookup(rrid)
    if entry.kind == "channel":
        _at_once("isready")(node, operation, rrid, argument)
    else:
        operation.resolve(entry.state is State.SET)


def _at_once(name: str) -> Callable[[Node, Operation, RRID, Any], None]:
    def run(node: Node, operation: Operation, rrid: RRID, argument: Any) -> None:
        channel = local_channel(node, rrid)
        operation.resolve(len(channel) if name == "len" else getattr(channel, name)())

    return run


def _untake(node: Node, operation: Operation, rrid: RRID, argument: Any) -> None:
    channel = local_channel(node, rrid)
    if hasattr(channel, "untake"):
        channel.untake(argument)
    else:
        node.dispatcher.start(lambda: channel.put(argument))
    operation.resolve(None)


Node.operations.update({name: _waiting(name) for name in ("fetch", "wait", "take", "put")})
Node.operations.update({name: _at_once(name) for name in ("isopen", "close", "len")})
Node.operations.update({"isready": _isready, "untake": _untake})
