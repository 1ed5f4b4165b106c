"""Channels: queues between the threads of one process, as Julia's; a RemoteChannel serves one to the others.

The core never blocks. Who wants something hands in a `Completion`, which is told once, now or later:
a thousand remote takers waiting at one channel cost a thousand queue entries and no thread. The
blocking methods for local threads stand on the same core with a `ResultWaiter` as completion.

Every operation decides what happens, to all whom it concerns, under the channel's one lock, and
changes the state there; only then, with the lock let go, it tells them (`_tell`). So no completion
runs inside the lock, and none is promised an item that another thread may still take. `ResultWaiter` is
the exception: it runs no code but its own and cannot block, so it is told inside the lock, and a
thread that finds its waiter neither queued nor done knows that nothing was given to it.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Any, SupportsIndex, TypeAlias, TypeVar

from shmdist._firmly import firmly
from shmdist._timeouts import seconds
from shmdist.errors import ChannelClosed, SerializationError
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from shmdist.runtime.waiting import Completion, ResultWaiter
from shmdist.serialization.channel_items import Item

__all__ = ["Channel", "Completion", "ResultWaiter"]

_F = TypeVar("_F", bound=Callable[..., Any])

# How an outcome is told, and what: a bound `resolve` or `fail`, and its argument.
_Told: TypeAlias = "list[tuple[Callable[[Any], None], Any]]"


def _tell(told: Iterable[tuple[Callable[[Any], None], Any]]) -> None:
    """Tell the outcomes decided; the channel's lock is not held."""
    rest = iter(told)
    for tell, what in rest:
        try:
            firmly(tell, what)
        except Exception:
            import logging  # not at the top: workers should start fast, and this should never happen

            logging.getLogger("shmdist.references.channel").exception("a completion raised: %r", tell)
        except BaseException:
            # Ctrl-C ends this thread's operation, but what was decided for others stands.
            _tell(rest)
            raise


def _inside(method: _F) -> _F:
    """Let a method that takes the lock and waits for nothing run inside the runtime, safe from interrupts."""

    @functools.wraps(method)
    def inside(self: Channel, *args: Any, **kwargs: Any) -> Any:
        with current():
            return method(self, *args, **kwargs)

    return inside  # type: ignore[return-value]  # it has the signature of `method`


class Channel:
    """A queue of items between threads, with room for `size` of them.

    Parameters
    ----------
    size : int or float("inf"), optional
        How many items wait in the channel before a `put` blocks. 0, the default, is unbuffered: a
        `put` waits until its item is taken. ``float("inf")`` is without bound.

    Raises
    ------
    TypeError, ValueError
        `size` is no such number.

    Notes
    -----
    Any thread may call any method at any time. A finalizer (``__del__``) that the garbage collector runs
    in a thread that is just inside a channel gets an error there, for it would wait for itself. Takers get
    items in the order in which they came, and items in the order in which they were put; putters are let in
    in theirs.

    A blocking method that ends with an exception, also ``KeyboardInterrupt``, leaves nothing behind:
    it does not go on waiting unseen, and an item given to it already is the next to be taken.

    Items are the objects themselves, as in `queue.Queue`. Once a `RemoteChannel` serves the channel they
    are values: a ``put`` copies, and so does a ``fetch``.

    A channel is true, however many items it has.

    References
    ----------
    Julia manual, "Asynchronous Programming", section "Communicating with Channels".

    Examples
    --------
    >>> from shmdist.references.channel import Channel
    >>> channel = Channel(2)
    >>> channel.put("a"); channel.put("b")
    >>> channel
    <Channel size=2 open items=2 takers=0 putters=0 watchers=0>
    >>> channel.close()
    >>> list(channel)
    ['a', 'b']
    """

    __module__ = "shmdist"

    # What is kept of a value that is put, and the value of what is kept, by the verb that gets it. A channel
    # that a RemoteChannel serves has these of its own (``references.remote_channel``): there items are
    # values. None: they are the objects themselves.
    _keep: Callable[[Any], Any] | None = None
    _open: Callable[[Any, str], Any] | None = None

    def __init__(self, size: SupportsIndex | float = 0) -> None:
        # A bool is an index to Python, but Channel(True) is a mistake.
        if size != inf and (isinstance(size, (bool, float)) or not hasattr(size, "__index__")):
            raise TypeError(f'size must be an int or float("inf"), not {size!r}')
        self._size: float = inf if size == inf else operator.index(size)  # type: ignore[arg-type]  # is one
        if self._size < 0:
            raise ValueError(f"size must be 0 (unbuffered) or more, not {size}")
        # Guards all fields below. Inside it no completion but ResultWaiter runs, no item is dropped, and
        # no code of an item runs; so it is a leaf: no other lock is ever taken under it.
        self._lock = threading.Lock()
        #: Items that may be taken, oldest first; more than `size` only by `untake`.
        self._items: deque[Any] = deque()
        #: The threads that wait to take, first come first; empty while there are items or putters.
        self._takers: OrderedDict[int, Completion] = OrderedDict()
        #: Threads that wait to fetch (True) or for readiness (False); empty while there are items or putters.
        self._watchers: OrderedDict[int, tuple[Completion, bool]] = OrderedDict()
        #: The threads that wait to put, and what; empty while there is room: fewer items than `size`.
        self._putters: OrderedDict[int, tuple[Completion, Any]] = OrderedDict()
        #: Once closed no thread waits: no takers, watchers or putters. Never opened again.
        self._closed = False
        #: What takers of the closed and empty channel are told instead of ChannelClosed; None while open.
        self._exc: BaseException | None = None

    # --- the core: nothing blocks --------------------------------------------------------------

    def put_async(self, value: Any, w: Completion) -> None:
        """Put `value`; `w` resolves to None once it is taken or has a place in the buffer.

        Here as in the next three, a `w` that would wait twice is a ValueError.
        """
        told: _Told = []
        try:
            with self._lock:
                if self._closed:
                    self._fail(told, w, self._put_refused("cannot put: the channel is closed"))
                elif self._takers:
                    firmly(self._show, told, value)
                    key, taker = next(iter(self._takers.items()))
                    self._resolve(told, taker, value)
                    del self._takers[key]
                    firmly(self._resolve, told, w, None)
                elif len(self._items) < self._size:
                    self._items.append(value)
                    firmly(self._show, told, value)
                    firmly(self._resolve, told, w, None)
                else:
                    self._refuse_twice(w)
                    self._putters[id(w)] = (w, value)
                    firmly(self._show, told, value)
        finally:
            if told:
                _tell(told)

    def take_async(self, w: Completion) -> None:
        """Take the next item; `w` resolves to it, now or when there is one."""
        told: _Told = []
        try:
            with self._lock:
                if self._items:
                    self._resolve(told, w, self._items[0])
                    del self._items[0]
                    if self._putters:
                        firmly(self._let_in, told)
                elif self._putters:
                    key, (putter, value) = next(iter(self._putters.items()))
                    self._resolve(told, w, value)
                    del self._putters[key]
                    firmly(self._resolve, told, putter, None)
                elif self._closed:
                    self._fail(told, w, self._drained("cannot take: the channel is closed and empty"))
                else:
                    self._refuse_twice(w)
                    self._takers[id(w)] = w
        finally:
            if told:
                _tell(told)

    def _let_in(self, told: _Told) -> None:
        """Let putters in while there is room: after `untake` there may be none yet."""
        while self._putters and len(self._items) < self._size:
            key, (putter, value) = next(iter(self._putters.items()))
            self._items.append(value)
            del self._putters[key]
            firmly(self._resolve, told, putter, None)

    def fetch_async(self, w: Completion) -> None:
        """Look at the next item; `w` resolves to it, now or when there is one, and it stays."""
        self._watch(w, "fetch")

    def wait_async(self, w: Completion) -> None:
        """Wait for an item; `w` resolves to None when there is one, which another may take first."""
        self._watch(w, "wait")

    def _watch(self, w: Completion, verb: str) -> None:
        told: _Told = []
        with self._lock:
            if self._items or self._putters:
                head = self._items[0] if self._items else next(iter(self._putters.values()))[1]
                if verb == "fetch" and type(head) is Item:
                    head.seen = True
                self._resolve(told, w, head if verb == "fetch" else None)
            elif self._closed:
                self._fail(told, w, self._drained(f"cannot {verb}: the channel is closed and empty"))
            else:
                self._refuse_twice(w)
                self._watchers[id(w)] = (w, verb == "fetch")
        _tell(told)

    def cancel(self, w: Completion) -> bool:
        """Withdraw `w`, if it still waits.

        Returns
        -------
        bool
            True if it waited: it is never told anything, and its put never happened. False if its
            outcome is decided (perhaps it is being told just now), or it was never handed in.
        """
        dropped: Any = None  # outlives the lock: the end of an item may run code
        with self._lock:
            for queue in (self._takers, self._watchers, self._putters):
                dropped = queue.pop(id(w), None)
                if dropped is not None:
                    return True
        return False

    def untake(self, value: Any) -> None:
        """Put an item back as the next to be taken, whatever the size, also after `close`.

        For the item of a taker who was interrupted, or died. A taker who waits gets it at once.
        """
        told: _Told = []
        try:
            with self._lock:
                firmly(self._show, told, value)
                if self._takers:
                    key, taker = next(iter(self._takers.items()))
                    self._resolve(told, taker, value)
                    del self._takers[key]
                else:
                    self._items.appendleft(value)
        finally:
            if told:
                _tell(told)

    @_inside
    def close(self, exc: BaseException | None = None) -> None:
        """Close the channel; closing it again does nothing.

        Items in the buffer may still be taken. Whoever waits to take, fetch or put gets an error, and
        the items of blocked putters are not delivered.

        Parameters
        ----------
        exc : BaseException, optional
            What takers get once the channel is empty, all this instance, instead of `ChannelClosed`.
        """
        if exc is not None and not isinstance(exc, BaseException):
            raise TypeError(f"exc must be an exception instance, not {exc!r}")
        told: _Told = []
        with self._lock:
            if self._closed:
                return
            getters = [*self._takers.values(), *(w for w, _ in self._watchers.values())]
            putters = [w for w, _ in self._putters.values()]
            dropped = self._putters  # outlives the lock: the end of an item may run code
            nobody: tuple[Any, Any, Any] = (OrderedDict(), OrderedDict(), OrderedDict())
            self._takers, self._watchers, self._putters = nobody
            self._closed, self._exc = True, exc
            for w in getters:
                firmly(self._fail_drained, told, w)
            for w in putters:
                firmly(self._fail_undelivered, told, w)
        _tell(told)
        del dropped

    def _fail_drained(self, told: _Told, w: Completion) -> None:
        self._fail(told, w, self._drained("the channel was closed, and is empty"))

    def _fail_undelivered(self, told: _Told, w: Completion) -> None:
        self._fail(told, w, self._put_refused("the channel was closed; the item was not delivered"))

    @staticmethod
    def _resolve(told: _Told, w: Completion, value: Any) -> None:
        w.resolve(value) if type(w) is ResultWaiter else told.append((w.resolve, value))

    @staticmethod
    def _fail(told: _Told, w: Completion, exc: BaseException) -> None:
        w.fail(exc) if type(w) is ResultWaiter else told.append((w.fail, exc))

    def _show(self, told: _Told, value: Any) -> None:
        """Let all who watch see an item that has come, before anybody takes it."""
        while self._watchers:
            key, (w, wants_it) = next(iter(self._watchers.items()))
            if wants_it and type(value) is Item:
                value.seen = True
            self._resolve(told, w, value if wants_it else None)
            del self._watchers[key]

    def _refuse_twice(self, w: Completion) -> None:
        if id(w) in self._takers or id(w) in self._watchers or id(w) in self._putters:
            raise ValueError(f"{w!r} waits at this channel already; use one completion an operation")

    def _drained(self, text: str) -> BaseException:
        # A new one each time: threads that raise one instance add to one traceback.
        return ChannelClosed(text) if self._exc is None else self._exc

    def _put_refused(self, text: str) -> BaseException:
        error = ChannelClosed(text)
        error.__cause__ = self._exc
        return error

    # --- for local threads ---------------------------------------------------------------------

    def put(self, value: Any, timeout: float | None = None) -> None:
        """Put an item, and wait until there is room; on an unbuffered channel, until it is taken.

        Parameters
        ----------
        value : object
            The item.
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        ChannelClosed, TimeoutError
            It is closed, or was while this waited; no room in time. The item is not in the channel.
        """
        self._perform("put", timeout, self.put_async, value if self._keep is None else self._keep(value))

    def take(self, timeout: float | None = None) -> Any:
        """Remove and return the next item, once there is one.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        ChannelClosed
            The channel is closed and empty; if it was closed with an exception, that one.
        TimeoutError
            No item in time. None is lost.
        """
        return self._perform("take", timeout, self.take_async)

    def fetch(self, timeout: float | None = None) -> Any:
        """Return the next item, once there is one, and leave it; errors as those of `take`.

        On an unbuffered channel it is the item of the first blocked `put`, which goes on waiting.
        """
        return self._perform("fetch", timeout, self.fetch_async)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for an item, which another thread may take first; errors as those of `take`."""
        self._perform("wait", timeout, self.wait_async)

    @staticmethod
    def _block(waiter: ResultWaiter, timeout: float | None) -> None:
        """Wait until the waiter is done, or for so many seconds; may return early. Reads links meanwhile."""
        current_node().reactor.wait(waiter, timeout)

    def _perform(self, verb: str, timeout: float | None, begin: Callable[..., None], *args: Any) -> Any:
        """Begin an operation of the core, wait for its outcome, and undo it if the waiting fails."""
        waiter = ResultWaiter()
        timeout = seconds(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with current():
                begin(*args, waiter)
                while not waiter.done:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is None or left > 0:
                        self._block(waiter, left)
                    elif self.cancel(waiter):
                        raise TimeoutError(f"{verb} timed out after {timeout:.3g} s: {self!r}")
                    # else it was decided this very moment, under the lock: the waiter is done.
            if waiter.exc is None:
                return waiter.value if self._open is None else self._open(waiter.value, verb)
        except BaseException as error:
            with current():
                # Neither withdrawn nor done: not begun, or undone before.
                taken = not self.cancel(waiter) and verb == "take" and waiter.done and waiter.exc is None
                if taken and type(error) is not SerializationError:  # that nobody can read
                    self.untake(waiter.value)
            raise
        try:
            raise waiter.exc
        finally:
            del waiter  # else exception, traceback, this frame and waiter would be a circle

    def isready(self) -> bool:
        """Return whether there is an item to take."""
        return len(self) > 0

    def isempty(self) -> bool:
        """Return whether there is no item to take."""
        return len(self) == 0

    def isfull(self) -> bool:
        """Return whether a `put` would find no room in the buffer; always true when unbuffered."""
        return len(self._items) >= self._size  # without the lock: one step for the interpreter

    def isopen(self) -> bool:
        """Return whether the channel is not closed; a closed one may still have items."""
        return not self._closed

    @property
    def size(self) -> float:
        """How many items the buffer holds: an int, or ``float("inf")``."""
        return self._size

    def __len__(self) -> int:
        return self._available()

    def __bool__(self) -> bool:
        return True  # a channel is one, however many items it has

    def _available(self) -> int:
        """Count the items in the buffer, and on an unbuffered channel those of blocked putters."""
        return len(self._items) + (len(self._putters) if self._size == 0 else 0)

    def __iter__(self) -> Iterator[Any]:
        """Take items until the channel is closed and empty."""
        while True:
            try:
                item = self.take()
            except ChannelClosed:
                return
            yield item

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError(
            "a Channel belongs to its process and cannot be pickled or copied; to use one from several "
            "processes make it a RemoteChannel: RemoteChannel(lambda: Channel(n))"
        )

    def __repr__(self) -> str:
        return (
            f"<Channel size={self._size} {'closed' if self._closed else 'open'} items={self._available()} "
            f"takers={len(self._takers)} putters={len(self._putters)} watchers={len(self._watchers)}>"
        )

    def _check(self) -> None:
        """Assert the invariants, in the words that stand at the fields."""
        with self._lock:
            waiting = bool(self._takers or self._watchers or self._putters)
            there = bool(self._items or self._putters)
            assert not (self._takers and there), f"takers empty while there are items or putters: {self}"
            assert not (self._watchers and there), f"watchers empty while there are items or putters: {self}"
            room = len(self._items) < self._size
            assert not (self._putters and room), f"putters empty while there is room: {self}"
            assert not (self._closed and waiting), f"once closed nobody waits: {self}"
            assert self._closed or self._exc is None, f"exc is None while open: {self}"
