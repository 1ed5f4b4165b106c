"""RemoteChannel, and the functions on references."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shmdist._timeouts import seconds
from shmdist.errors import ChannelClosed
from shmdist.refcount.table import RRID
from shmdist.references.base import Reference, ask, call_owner
from shmdist.references.channel import Channel
from shmdist.references.future import Future
from shmdist.references.future_interface import NO_TAKE
from shmdist.references.server import USER_CHANNEL_MIN_SECONDS, local_channel
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node, process_id
from shmdist.runtime.waiting import ResultWaiter
from shmdist.serialization import codec
from shmdist.serialization.channel_items import make_item, open_item
from shmdist.serialization.local_copy import local_copy

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class RemoteChannel(Reference):
    """A channel that lives on one process and can be used from all.

    Parameters
    ----------
    factory : callable, optional
        Called without arguments on `pid`; returns the channel: a `Channel`, or anything
        with its methods. Default: ``Channel(1)``.
    pid : int, optional
        Where the channel lives; default this process.

    Notes
    -----
    ``RemoteChannel(2)`` is one on process 2 with the default channel. ``take`` and ``put``
    wait at the owner without using a thread there. An item that was on its way to a
    ``take`` which was interrupted goes back to the head of the channel.

    Items are values, also where the channel lives on this process: who puts one may change what he
    has, and what ``take`` and ``fetch`` return is the caller's own. A shared array stays shared. What
    cannot be pickled can be put by threads of the channel's process alone, and stays what it is; a
    ``take`` by another process is then a `SerializationError`, and leaves the item.

    The owner judges what was done in time: after a `TimeoutError` an item has neither been put
    nor taken, and a ``timeout`` of 0 is a try. It has half a second to answer when the time is up.
    Only if it stands still for that long is the outcome open: the put may be done when it goes on, and
    an item that was taken goes back to the head; the text of the error says so. Methods of a channel
    of your own cannot be broken off either: a put that has begun there may still be done.

    References
    ----------
    Julia manual, `RemoteChannel` in "Distributed Computing".

    Examples
    --------
    >>> channel = RemoteChannel(lambda: Channel(10))
    >>> channel.put("a")
    >>> channel.fetch(), len(channel), channel.take()
    ('a', 1, 'a')
    """

    __module__ = "shmdist"

    def __init__(self, factory: Any = None, pid: int | None = None) -> None:
        size = None
        if hasattr(factory, "__index__") and not callable(factory):
            if pid is not None:
                raise TypeError("RemoteChannel takes a factory and a process id, or one of them")
            factory, pid, size = None, process_id(factory), factory
        if factory is not None and not callable(factory):
            raise TypeError(
                f"the factory must be callable, as in RemoteChannel(lambda: Channel(10)), not {factory!r}"
            )
        node = current_node()
        owner = node.pid if pid is None else process_id(pid)
        if size is not None and owner not in node.peers.members and owner not in node.peers.leaving:
            raise ValueError(
                f"there is no process {size}; the processes are {sorted(node.peers.members)}. "
                f"For room for {size} items: RemoteChannel(lambda: Channel({size}))"
            )
        rrid = RRID(node.pid, next(node.requests.call_ids))
        # It comes as a reference, whose count goes back by itself when an interrupt keeps it from this one.
        made = call_owner(owner, _make_channel, tuple(rrid), factory)
        self._rrid, self._where = rrid, owner
        self._count, made._count = made._count, None

    def __repr__(self) -> str:
        state = ", inert" if self._inert else ""
        return f"<RemoteChannel {tuple(self._rrid)} on process {self._where}{state}>"

    def _do(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        """Run an operation where the channel is."""
        node = self._alive()
        timeout = seconds(timeout)
        if self._where != node.pid:
            return ask(self._where, name, self._rrid, args[0] if args else None, timeout)
        channel = local_channel(node.counts, self._rrid)
        if name == "len":
            return len(channel)
        method = getattr(channel, name)
        if isinstance(channel, Channel):
            wants_time = timeout is not None and name not in ("isready", "isopen", "close")
            return method(*args, timeout=timeout) if wants_time else method(*args)
        args = local_copy(args)  # as a Channel does by itself
        if timeout is None or name in ("isready", "isopen", "close"):
            value = method(*args)
        else:
            value = _within(timeout, channel, name, args)
        return local_copy(value) if name == "fetch" else value

    def put(self, value: Any, timeout: float | None = None) -> None:
        """Put an item: a copy, made now; waits while the channel is full.

        Raises
        ------
        ChannelClosed, TimeoutError
            The item is not in the channel; unless its process stands still (see the class).
        """
        self._do("put", value, timeout=timeout)

    def take(self, timeout: float | None = None) -> Any:
        """Remove the next item and return it; waits for one.

        Raises
        ------
        ChannelClosed
            The channel is closed and drained.
        TimeoutError
            No item was taken; if its process stands still, one that is taken later goes back.
        """
        return self._do("take", timeout=timeout)

    def fetch(self, timeout: float | None = None) -> Any:
        """Return the next item and leave it; waits for one."""
        return self._do("fetch", timeout=timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until there is an item."""
        self._do("wait", timeout=timeout)

    def isready(self, timeout: float | None = None) -> bool:
        """Return whether there is an item."""
        return bool(self._do("isready", timeout=timeout))

    def isempty(self, timeout: float | None = None) -> bool:
        """Return whether there is no item; takes none away."""
        return not self.isready(timeout)

    def isopen(self, timeout: float | None = None) -> bool:
        """Return whether items may still be put."""
        return bool(self._do("isopen", timeout=timeout))

    def close(self, timeout: float | None = None) -> None:
        """Close the channel: no more puts; what is in it can still be taken."""
        self._do("close", timeout=timeout)

    def __len__(self) -> int:
        return int(self._do("len"))

    def __bool__(self) -> bool:
        return True  # a reference is one, however many items its channel has

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                item = self.take()
            except ChannelClosed:
                return
            yield item

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _load_inert, (tuple(self._rrid), self._where)


def _within(timeout: float, channel: Any, name: str, args: tuple[Any, ...]) -> Any:
    """Run a method of a user's own channel, which knows no timeout, for at most `timeout` seconds."""
    waiter = ResultWaiter()
    given_up = threading.Lock()  # taken by the first of the two: the caller's giving up, or the outcome

    def run() -> None:
        try:
            value = getattr(channel, name)(*args)
        except Exception as error:
            if given_up.acquire(False):
                waiter.fail(error)
            return
        if given_up.acquire(False):
            waiter.resolve(value)
        elif name == "take":
            channel.put(value)  # no thread waits for it any more

    current_node().reactor.start(run)
    thread_state = current()
    thread_state.enter()
    try:
        in_time = current_node().reactor.wait(waiter, max(timeout, USER_CHANNEL_MIN_SECONDS))
    except BaseException:
        if not given_up.acquire(False) and name == "take":
            channel.put(waiter.value)
        raise
    finally:
        thread_state.leave()
    if not in_time and given_up.acquire(False):
        raise TimeoutError(f"{name} of {type(channel).__name__} took more than {timeout:g} s")
    while not waiter.done:
        time.sleep(0)  # it comes this very moment
    if waiter.exc is not None:
        raise waiter.exc
    return waiter.value


def _reduce(channel: RemoteChannel, pickler: Any) -> Any:
    """Pickle a channel's reference for another process of the cluster."""
    if pickler.payload is None or channel._inert:
        return channel.__reduce_ex__(5)
    pickler.payload.refs.append((channel._rrid, channel._where))
    return _load, (tuple(channel._rrid), channel._where)


def _load(rrid: tuple[int, int], where: int) -> RemoteChannel:
    channel = RemoteChannel.__new__(RemoteChannel)
    count, back = channel._prepare(RRID(*rrid), where)
    codec.note_created_reference((channel._rrid, where))
    count.__del__ = back
    return channel


def _load_inert(rrid: tuple[int, int], where: int) -> RemoteChannel:
    channel = RemoteChannel.__new__(RemoteChannel)
    channel._rrid, channel._where, channel._inert = RRID(*rrid), where, True
    return channel


codec.reducers[RemoteChannel] = _reduce


def _make_channel(rrid: tuple[int, int], factory: Callable[[], Any] | None) -> RemoteChannel:
    """Make a channel on its owner, for the process that named it; returns a reference."""
    channel = Channel(1) if factory is None else factory()
    missing = [name for name in ("put", "take", "fetch", "isready", "close") if not hasattr(channel, name)]
    if missing:
        raise TypeError(
            f"the factory of a RemoteChannel must return a channel; "
            f"{type(channel).__name__} has no {missing[0]}()"
        )
    node = current_node()
    if isinstance(channel, Channel):
        channel._keep, channel._open = functools.partial(make_item, node.sharing.keep), open_item
    with current():
        made = RemoteChannel.__new__(RemoteChannel)
        count, back = made._prepare(RRID(*rrid), node.pid)
        entry = node.counts.create(RRID(*rrid), "channel", node.pid)
        count.__del__ = back
        node.counts.set_value(entry, channel)
    return made


# ---------------------------------------------------------------------- functions


def fetch(x: Any, timeout: float | None = None) -> Any:
    """Wait for and return the value of a reference; of anything else, the thing itself.

    Parameters
    ----------
    x : Future, RemoteChannel, Channel, Task, or any object
        Of a channel, the next item, which stays. Of a list or tuple, each of its items is fetched.
    timeout : float, optional
        Seconds, for all together; then `TimeoutError`.

    Returns
    -------
    object
        A list of a list, a tuple of a tuple, in which what is no reference is itself.

    References
    ----------
    Julia manual, `fetch`.

    Examples
    --------
    >>> fetch(5)
    5
    >>> fetch([Future().put(1), 2, (Future().put(3),)])
    [1, 2, (3,)]
    """
    if isinstance(x, (list, tuple)):
        return _each(x, fetch, timeout)
    if isinstance(x, (Reference, Channel)) or _is_task(x):
        return x.fetch(timeout)
    return x


def _each(x: Any, do: Callable[[Any, float | None], Any], timeout: float | None) -> Any:
    """Do something with the references in a list or tuple; the time is for all together."""
    limit = seconds(timeout)
    deadline = None if limit is None else time.monotonic() + limit
    results = []
    for item in x:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        results.append(do(item, left))
    if isinstance(x, list):
        return results
    make = getattr(type(x), "_make", tuple)  # of a named tuple
    return make(results)


def _is_task(x: Any) -> bool:
    return getattr(type(x), "_is_shmdist_task", False)


def _method(x: Any, name: str) -> Any:
    method = getattr(x, name, None)
    if method is None:
        raise TypeError(
            f"{name}() takes a Future, RemoteChannel, Channel or pool that has it, not {type(x).__name__}"
        )
    return method


def _state_of(x: Any, name: str, timeout: float | None) -> Any:
    """Ask for what is told at once where it is known, and may be far from here."""
    method = _method(x, name)
    if seconds(timeout) is None or isinstance(x, Channel) or _is_task(x):
        return method()
    return method(timeout=timeout)


def wait(x: Any, timeout: float | None = None) -> Any:
    """Wait until a reference has a value, a channel an item, a pool a free worker, a task ended.

    Parameters
    ----------
    x : Future, RemoteChannel, Channel, Task or pool
        What to wait for. A future is ready when it has failed, too; a failed task raises its error. Of a
        list or tuple, each of its items is waited for; what is no reference needs no waiting.
    timeout : float, optional
        Seconds, for all together; then `TimeoutError`.

    Returns
    -------
    object
        `x`, if it is a future, a task, a list or a tuple.

    Examples
    --------
    >>> wait(Future().put(1)).fetch()
    1
    """
    if isinstance(x, (list, tuple)):
        _each(x, _wait_for, timeout)
        return x
    return _method(x, "wait")(timeout=timeout)


def _wait_for(x: Any, timeout: float | None) -> None:
    """Wait for an item of a list."""
    if hasattr(x, "wait") or isinstance(x, (list, tuple)):
        wait(x, timeout)


def put(x: Any, value: Any, timeout: float | None = None) -> Any:
    """Put `value` into a future (once), a channel (waits for room), or a pid into a pool.

    Returns
    -------
    object
        `x`.

    Examples
    --------
    >>> take(put(Channel(1), "item"))
    'item'
    """
    _method(x, "put")(value, timeout=timeout)
    return x


def take(x: Any, timeout: float | None = None) -> Any:
    """Remove and return the next item of a channel, or a free worker of a pool.

    Parameters
    ----------
    x : RemoteChannel, Channel or pool
        A Future has no take: its value is for all who hold it.
    timeout : float, optional
        Seconds; then `TimeoutError`, and nothing is lost.

    Examples
    --------
    >>> channel = Channel(2)
    >>> channel.put(1)
    >>> take(channel)
    1
    """
    if isinstance(x, Future):
        raise TypeError(NO_TAKE)
    return _method(x, "take")(timeout=timeout)


def isready(x: Any, timeout: float | None = None) -> bool:
    """Return whether fetch or take would return at once.

    Examples
    --------
    >>> isready(Future())
    False
    """
    return bool(_state_of(x, "isready", timeout))


def isempty(x: Any, timeout: float | None = None) -> bool:
    """Return whether a channel has no item, a future no value; takes none.

    Examples
    --------
    >>> isempty(Channel(1))
    True
    """
    return bool(_state_of(x, "isempty", timeout))


def isopen(x: Any, timeout: float | None = None) -> bool:
    """Return whether a channel is open, and a future not yet written.

    Examples
    --------
    >>> isopen(Channel(1))
    True
    """
    return bool(_state_of(x, "isopen", timeout))


def close(x: Any, timeout: float | None = None) -> None:
    """Close a channel: no more puts; what is in it can still be taken.

    Parameters
    ----------
    x : RemoteChannel or Channel
        A Future is closed by its value alone, so it is a `TypeError`.
    timeout : float, optional
        Seconds; then `TimeoutError`.

    Examples
    --------
    >>> channel = Channel(1)
    >>> close(channel)
    >>> isopen(channel)
    False
    """
    _state_of(x, "close", timeout)


def remoteref_id(ref: Reference) -> RRID:
    """Return the name of a reference, the same on every process.

    References
    ----------
    Julia manual, `remoteref_id`.

    Examples
    --------
    >>> remoteref_id(Future()).whence
    1
    """
    if not isinstance(ref, Reference):
        raise TypeError(f"remoteref_id() takes a Future or RemoteChannel, not {type(ref).__name__}")
    return ref._rrid


def channel_from_id(rrid: RRID) -> Any:
    """Return the channel behind a RemoteChannel, on the process where it lives.

    Raises
    ------
    ShmdistError
        There is none on this process.

    Examples
    --------
    >>> channel_from_id(remoteref_id(RemoteChannel(lambda: Channel(5)))).size
    5
    """
    return local_channel(current_node().counts, RRID(*rrid))


def worker_id_from_socket(connection: Connection | Any) -> int:
    """Return the process id at the other end of a connection; -1 when it is none of the cluster's.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Or anything with the same descriptor.

    Examples
    --------
    >>> import sys
    >>> worker_id_from_socket(sys.__stdin__)
    -1
    """
    node = current_node()
    try:
        fd = connection if isinstance(connection, int) else connection.fileno()
    except (OSError, ValueError, AttributeError):
        return -1
    with current(), node.lock:
        links = [link for links in node.peers.all_links.values() for link in links]
    return next((link.pid for link in links if link.fd == fd and not link.closed), -1)


__all__ = [
    "Future",
    "RemoteChannel",
    "channel_from_id",
    "close",
    "fetch",
    "isempty",
    "isopen",
    "isready",
    "put",
    "remoteref_id",
    "take",
    "wait",
    "worker_id_from_socket",
]
