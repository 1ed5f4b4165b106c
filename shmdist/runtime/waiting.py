"""What threads wait for, and what is notified of the outcome of an operation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Completion(Protocol):
    """What is told the outcome of an operation: one call of one of the two, by whoever decided it.

    The channel's lock is not held. An error raised here is logged, and costs nobody else his outcome.
    """

    def resolve(self, value: Any, /) -> None:
        """It succeeded; `value` is the item of a take or fetch, and None of a put or wait."""

    def fail(self, exc: BaseException, /) -> None:
        """It cannot succeed any more."""


_adding = threading.Lock()  # guards the locks of all waiters; nothing else is done while it is held


def _after_fork() -> None:
    """Make the lock anew in a forked child: its holder may be a thread of the parent."""
    global _adding
    _adding = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Waiter:
    """Something that threads wait for.

    Attributes
    ----------
    done : bool
        Set once, by whoever completes the waiter; then `locks` are released.
    locks : tuple of lock
        Where the waiting threads sleep while another one reads for them.
    """

    __slots__ = ("__weakref__", "done", "locks")
    #: Whoever completes it knows how to wake a thread that reads (``Reactor.complete``).
    kicked = True

    def __init__(self) -> None:
        self.done = False
        self.locks: tuple[Any, ...] = ()

    def add(self, lock: Any) -> None:
        """Let a thread sleep on `lock` until the waiter is done."""
        with _adding:
            self.locks += (lock,)

    def remove(self, lock: Any) -> None:
        """The thread sleeps no more."""
        with _adding:
            self.locks = tuple(each for each in self.locks if each is not lock)

    def wake(self) -> None:
        """Wake the threads that sleep here, done or not."""
        for lock in self.locks:
            try:
                lock.release()
            except RuntimeError:
                pass  # awake already


class WakeCallback:
    """Stands for the lock of a waiter whose thread does not sleep on a lock, but reads."""

    __slots__ = ("release",)

    def __init__(self, kick: Callable[[], None]) -> None:
        self.release = kick


class ResultWaiter(Waiter):
    """The completion on which a thread of this process waits.

    Attributes
    ----------
    done : bool
        Set last, once, with `value` and `exc` in place.
    value : object
        What it was resolved with.
    exc : BaseException or None
        What it failed with.
    """

    __slots__ = ("exc", "value")
    #: It is completed by a channel, which does not know of threads that read.
    kicked = False

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None
        self.exc: BaseException | None = None

    def resolve(self, value: Any, /) -> None:
        """Set the value and wake the thread."""
        self.value = value
        self.done = True
        self.wake()

    def fail(self, exc: BaseException, /) -> None:
        """Set the exception and wake the thread."""
        self.exc = exc
        self.done = True
        self.wake()

    def __repr__(self) -> str:
        state = "waiting" if not self.done else "failed" if self.exc is not None else "resolved"
        return f"<ResultWaiter {state}>"
