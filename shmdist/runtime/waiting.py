"""What is notified of the outcome of an operation."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class Completion(Protocol):
    """What is told the outcome of an operation: one call of one of the two, by whoever decided it.

    The channel's lock is not held. An error raised here is logged, and costs nobody else his outcome.
    """

    def resolve(self, value: Any, /) -> None:
        """It succeeded; `value` is the item of a take or fetch, and None of a put or wait."""

    def fail(self, exc: BaseException, /) -> None:
        """It cannot succeed any more."""


class ResultWaiter:
    """The completion on which a thread of this process waits.

    Attributes
    ----------
    done : bool
        Set last, once, with `value` and `exc` in place; then a thread asleep on `lock` is woken.
    value : object
        What it was resolved with.
    exc : BaseException or None
        What it failed with.
    lock : lock or None
        Held, and waited for, by the thread that sleeps; None when no thread ever had to.
    """

    __slots__ = ("__weakref__", "done", "exc", "lock", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.exc: BaseException | None = None
        self.lock: threading.Lock | None = None

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

    def wake(self) -> None:
        """Wake the thread that sleeps here, done or not."""
        lock = self.lock
        if lock is not None:
            try:
                lock.release()
            except RuntimeError:
                pass  # awake already

    #: It is completed by a channel, which does not know of threads that read.
    kicked = False

    def add(self, lock: Any) -> None:
        """Let the thread sleep on `lock`, or on what stands for one."""
        self.lock = lock

    def remove(self, lock: Any) -> None:
        """The thread sleeps no more."""
        self.lock = None

    def sleep(self, timeout: float | None) -> None:
        """Sleep until woken, or for `timeout` seconds; an interrupt ends it with its exception."""
        lock = self.lock
        if lock is None:
            lock = threading.Lock()
            lock.acquire()
            self.lock = lock
        # Looked at after the lock is in place: who sets `done` later finds the lock and releases it.
        if not self.done:
            lock.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX))

    def __repr__(self) -> str:
        state = "waiting" if not self.done else "failed" if self.exc is not None else "resolved"
        return f"<ResultWaiter {state}>"
