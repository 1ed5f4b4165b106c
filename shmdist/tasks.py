"""Local tasks: a function on a thread of this process, and groups of things that end together."""

from __future__ import annotations

import concurrent.futures
import contextvars
import math
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any

from shmdist._timeouts import FOREVER, seconds
from shmdist.errors import CompositeException, local_exception
from shmdist.runtime import call_target
from shmdist.runtime.interrupts import collecting, current
from shmdist.runtime.node import current_node
from shmdist.runtime.waiting import Waiter


class Task(concurrent.futures.Future):  # type: ignore[type-arg]  # generic only in stubs
    """A function that runs on a thread of this process; made by :func:`async_`.

    Notes
    -----
    It has the interface of `concurrent.futures.Future` and can be awaited in asyncio. Its
    error is the function's own.

    References
    ----------
    Julia manual, `Task`.

    Examples
    --------
    >>> task = async_(pow, 2, 8)
    >>> task.fetch()
    256
    """

    __module__ = "shmdist"
    _is_shmdist_task = True
    _what: str  # what it runs
    _waiter: Waiter | None = None  # of who waits for its end

    def __repr__(self) -> str:
        state = (
            "failed"
            if self.done() and not self.cancelled() and self._exception is not None
            else self._state.lower()
        )
        return f"<Task {getattr(self, '_what', '')} {state}>"

    def _await(self, timeout: float | None) -> None:
        """Wait for the end, reading the links meanwhile."""
        timeout = seconds(timeout)
        if self.done():
            return
        reactor = current_node().reactor
        waiter = self._end_waiter()
        thread_state = current()
        thread_state.enter()
        try:
            if not reactor.wait(waiter, timeout):
                raise TimeoutError(f"{self!r} took more than {timeout:g} s")
        finally:
            thread_state.leave()

    def _end_waiter(self) -> Waiter:
        """Return the waiter that is done when the function has ended: one for all who wait."""
        with self._condition:
            waiter = self._waiter
            if waiter is not None:
                return waiter
            waiter = self._waiter = Waiter()
        reactor = current_node().reactor
        self.add_done_callback(lambda _: reactor.complete(waiter))
        return waiter

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the function to end, and return its value or raise its error."""
        self._await(timeout)
        return super().result(0)

    def result(self, timeout: float | None = None) -> Any:
        """Return the value; the same as :meth:`fetch`."""
        return self.fetch(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the function to end, and return its error, or None."""
        self._await(timeout)
        return super().exception(0)

    def wait(self, timeout: float | None = None) -> Task:
        """Wait for the function to end; raises its error.

        Returns
        -------
        Task
            This one.
        """
        self.fetch(timeout)
        return self

    def isready(self) -> bool:
        """Return whether the function has ended."""
        return self.done()

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return asyncio.wrap_future(self).__await__()


# Python takes these for the end of an iterator or generator: `await` and `yield from` would swallow them.
_ENDS = (StopIteration, StopAsyncIteration, GeneratorExit)

_group: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("shmdist.sync", default=None)


def sync_groups() -> Iterator[list[Any]]:
    """Yield the list of the `sync` block that encloses the running code, if there is one."""
    group = _group.get()
    # What a finalizer begins is not the block's, inside which it runs.
    if group is not None and not collecting():
        yield group


def start_task(f: Callable[..., Any], args: Any = (), kwargs: Any = types.MappingProxyType({})) -> Task:
    """Run a function on a thread of the runtime."""
    task = Task()
    task._what = getattr(f, "__qualname__", None) or repr(f)
    task.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    if current().task is not None:
        context.run(call_target.nested.set, True)

    def run() -> None:
        thread_state = current()
        depth, thread_state.runtime_depth = thread_state.runtime_depth, 0
        try:
            value = context.run(f, *args, **kwargs)
        except BaseException as error:
            thread_state.runtime_depth = depth
            if isinstance(error, _ENDS):
                error = local_exception(current_node().pid, error)
            task.set_exception(error)
        else:
            thread_state.runtime_depth = depth
            task.set_result(value)

    current_node().reactor.start(run)
    return task


def async_(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task:
    """Run ``f(*args, **kwargs)`` on a thread of this process; returns at once.

    References
    ----------
    Julia manual, `@async`.

    Examples
    --------
    >>> async_(lambda: 42).fetch()
    42
    """
    if not callable(f):
        raise TypeError(f"async_(f, *args): f must be callable, not {f!r:.80}")
    task = start_task(f, args, kwargs)
    for group in sync_groups():
        group.append(task)
    return task


def _error_of(begun: Any) -> Exception | None:
    """Wait for the end of a task or call, and return its error.

    What is raised is this thread's own: Ctrl-C.
    """
    if not isinstance(begun, Task):
        try:
            begun.wait()
            begun._raise_failure()
        except Exception as error:
            return error
        return None
    try:
        its = begun.exception()
    except concurrent.futures.CancelledError as cancelled:
        return cancelled
    if its is None or isinstance(its, Exception):
        return its
    # A group of errors must not hold what ends threads and programs.
    told = local_exception(current_node().pid, its)
    assert isinstance(told, Exception)
    return told


class _Sync(ContextDecorator):
    """A block of :func:`sync`; no generator, for one sets attributes of errors, which may refuse it."""

    def __init__(self) -> None:
        self._group: list[Any] = []
        self._token: Any = None

    def _recreate_cm(self) -> _Sync:
        return _Sync()  # for each call of what it decorates

    def __enter__(self) -> None:
        self._token = _group.set(self._group)

    def __exit__(self, kind: Any, failure: BaseException | None, tb: object) -> None:
        _group.reset(self._token)
        if failure is not None and not isinstance(failure, Exception):
            return
        group = self._group
        errors: list[BaseException] = [failure] if failure is not None else []
        index = 0
        while index < len(group):  # it may grow while we wait
            its = _error_of(group[index])
            index += 1
            if its is not None and not any(its is error for error in errors):
                errors.append(its)
        if len(errors) == (failure is not None):  # what the block itself raised goes on
            return
        raise CompositeException(f"{len(errors)} of {len(group)} tasks failed", errors) from None


def sync() -> AbstractContextManager[None]:
    """Wait, at the end of the block, for everything begun inside.

    That is every ``spawn``, ``spawnat``, ``remotecall``, ``async_`` and ``@distributed``
    loop of the block, and of the tasks begun in it.

    Raises
    ------
    CompositeException
        The errors of all that failed; also of the block itself, when there are others.

    References
    ----------
    Julia manual, `@sync`.

    Examples
    --------
    >>> results = []
    >>> with sync():
    ...     for i in range(3):
    ...         _ = async_(results.append, i)
    >>> sorted(results)
    [0, 1, 2]
    """
    return _Sync()


def timedwait(test: Callable[[], Any], timeout: float, pollint: float = 0.1) -> str:
    """Wait until ``test()`` is true, or the time is up.

    Parameters
    ----------
    test : callable
        Asked every `pollint` seconds.
    timeout : float
        Seconds.
    pollint : float
        Seconds, at least 0.001.

    Returns
    -------
    {"ok", "timed_out"}

    References
    ----------
    Julia manual, `timedwait`.

    Examples
    --------
    >>> timedwait(lambda: True, 1.0)
    'ok'
    """
    pause, limit = seconds(pollint, "pollint"), seconds(timeout)
    if pause is not None and pause < 1e-3:
        raise ValueError(f"pollint must be at least 0.001 s, not {pollint!r}")
    deadline = math.inf if limit is None else time.monotonic() + limit
    while True:
        if test():
            return "ok"
        left = deadline - time.monotonic()
        if left <= 0:
            return "timed_out"
        threading.Event().wait(min(FOREVER if pause is None else pause, left))


__all__ = ["Task", "async_", "sync", "timedwait"]
