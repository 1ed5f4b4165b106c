"""Remote calls: run a function on another process, and get its value or a reference to it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, overload

from shmdist._ending import VOID
from shmdist._firmly import firmly
from shmdist.errors import CapturedException, RemoteException, local_exception
from shmdist.pools import default_worker_pool, least_loaded_worker
from shmdist.refcount.table import RRID, AlreadySet
from shmdist.references.future import Future, LocalTask
from shmdist.runtime.call_target import USAGE, CallTarget, check_callable
from shmdist.runtime.interrupts import current, finalizing, is_interrupt
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import PendingReply
from shmdist.runtime.requests import name_of
from shmdist.serialization import codec
from shmdist.serialization.atoms import ATOMS
from shmdist.serialization.local_copy import local_copy
from shmdist.tasks import sync_groups
from shmdist.transport.link import LinkClosed, SendInterrupted
from shmdist.transport.messages import WANT_STORE, WANT_VALUE, Kind

_CALL = int(Kind.CALL)
_T = TypeVar("_T")


def remotecall_fetch(f: Callable[..., _T], where: Any, /, *args: Any, **kwargs: Any) -> _T:
    """Run ``f(*args, **kwargs)`` on another process, and wait for its value.

    Parameters
    ----------
    f : callable
        Goes by name when it can be imported, by value otherwise.
    where : int or worker pool
        Process id; this process's own runs it here. Of a pool, a free worker.
    *args, **kwargs
        For `f`. It gets copies, also on this process; the caller may change his when this returns.

    Raises
    ------
    RemoteException
        What `f` raised there; it is an instance of that error's type as well.
    ProcessExitedException
        The worker is gone.
    SerializationError
        `f` or an argument cannot be sent; the text names the part at fault.
    KeyboardInterrupt
        Ctrl-C here; the call is interrupted there.

    Notes
    -----
    Thread-safe. Calls on one worker run side by side; two from one caller start in order.

    References
    ----------
    Julia manual, `remotecall_fetch`.

    Examples
    --------
    >>> remotecall_fetch(max, 1, 3, 4)
    4
    """
    node = current_node()
    if type(where) is not int or where == node.pid:
        value: _T = _fetch_slowly(node, f, where, args, kwargs)
        return value
    check_callable(f, "remotecall_fetch", where)
    value = node.requests.call(where, WANT_VALUE, codec.dumps_call(f, args, kwargs), f)
    return value


def _fetch_slowly(node: Node, f: Any, where: Any, args: Any, kwargs: Any) -> Any:
    """The rarer forms of remotecall_fetch: on a pool, or on this process."""
    check_callable(f, "remotecall_fetch", where)
    place = CallTarget(where, "remotecall_fetch")
    try:
        if place.pool is not None:
            place.lend()
        if place.pid != node.pid:
            flags, payload = place.payload(f, args, kwargs)
            return node.requests.call(place.pid, WANT_VALUE | flags, payload, f)
        own = node.reactor.own
        if own.begun != own.made:
            own.catch_up()
        args, kwargs = _own_arguments(args, kwargs)
        try:
            return f(*args, **kwargs) if place.pool is None else place.run_nested(f, args, kwargs)
        except BaseException as error:
            if is_interrupt(error):
                raise
            told = local_exception(node.pid, error)
            if told is error:
                raise
            raise told from None  # its traceback is that of the cause as well
    finally:
        try:
            place.back()
        except BaseException as error:  # an interrupt may have come before it began
            place.back()
            if not isinstance(error, Exception):
                raise


def remotecall(f: Callable[..., Any], where: Any, /, *args: Any, **kwargs: Any) -> Future:
    """Run ``f(*args, **kwargs)`` on another process; returns at once with a Future of its value.

    Parameters
    ----------
    f : callable
        The function.
    where : int or worker pool
        Process id. Of a pool, a free worker, which goes back when the call has ended.
    *args, **kwargs
        For `f`; copied before this returns.

    Returns
    -------
    Future
        The value stays on the worker until it is fetched.

    Raises
    ------
    ProcessExitedException, SerializationError
        As for :func:`remotecall_fetch`.

    References
    ----------
    Julia manual, `remotecall`.

    Examples
    --------
    >>> remotecall(pow, 1, 2, 10).fetch()
    1024
    """
    check_callable(f, "remotecall", where)
    place = CallTarget(where, "remotecall")
    return _start(f, place, args, kwargs)


def _start(f: Any, place: CallTarget, args: Any, kwargs: Any) -> Future:
    """Begin a call whose value stays where it runs; at its end a pool gets its worker back."""
    node = current_node()
    rrid = RRID(node.pid, next(node.requests.call_ids))
    what = name_of(f)
    try:
        if place.pool is not None:
            place.lend()
        pid = place.pid
        if pid == node.pid:
            args, kwargs = _own_arguments(args, kwargs)
            thread_state = current()
            thread_state.enter()
            try:
                future = _start_here(node, f, rrid, args, kwargs, place)
            finally:
                thread_state.leave()
        else:
            if pid not in node.peers.links:
                node.peers.link_to(pid)
            flags, payload = place.payload(f, args, kwargs)
            future = _start_there(node, what, rrid, place, flags, payload)
    except BaseException:
        firmly(place.back)
        raise
    for group in sync_groups():
        group.append(future)
    return future


def _start_there(
    node: Node, what: str, rrid: RRID, place: CallTarget, flags: int, payload: codec.Payload
) -> Future:
    """Send a call whose value stays where it runs."""
    pid = place.pid
    thread_state = current()
    thread_state.enter()
    try:
        future = Future._of_call(rrid, pid, what)

        def ended(reply: PendingReply) -> None:
            future._reply = reply
            try:
                if place.lent and not place.back_at_once():
                    node.reactor.soon(place.back)
            finally:
                reply.done = True  # before it looks who else is to be told: who comes later finds it done
                future._on_reply(reply)

        try:
            reply = node.requests.request(
                pid, _CALL, WANT_STORE | flags, payload, callback=ended, call_id=rrid.id
            )
        except BaseException as error:
            stopped = error.__context__
            if isinstance(stopped, SendInterrupted) and not stopped.begun:
                assert future._count is not None
                future._count.__del__ = VOID  # the call never left: its owner counts no such reference
            raise
        if future._reply is None:
            future._reply = reply
    finally:
        thread_state.leave()
    return future


def _own_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments for a call that this process makes to itself: copies, as a worker gets."""
    if not kwargs:
        if len(args) == 1:
            [value] = args
            return args if type(value) in ATOMS else (local_copy(value),), kwargs
        return local_copy(args), kwargs
    copied: tuple[Any, Any] = local_copy((args, kwargs))
    return copied


def _start_here(node: Node, f: Any, rrid: RRID, args: Any, kwargs: Any, place: CallTarget) -> Future:
    """Begin a call on a thread of this process; the caller is inside the runtime."""
    future = Future._of_call(rrid, node.pid, name_of(f))  # first: the entry lives as long as it
    entry = node.counts.create(rrid, "future", node.pid)

    task = future._local = LocalTask()

    def ended(value: Any, captured: CapturedException | None) -> None:
        if place.lent:
            place.back_at_once()
        with contextlib.suppress(AlreadySet):  # it was cancelled
            node.counts.set_value(entry, value if captured is None else captured)
        place.back()

    node.reactor.own.begin(node.tasks.context.new().run, (f, *args), kwargs, task, ended)
    return future


def remotecall_wait(f: Callable[..., Any], where: Any, /, *args: Any, **kwargs: Any) -> Future:
    """Run ``f(*args, **kwargs)`` on another process and wait for its end, not for its value.

    Returns
    -------
    Future
        Of the value, which stays on the worker.

    Raises
    ------
    RemoteException
        What `f` raised there.

    References
    ----------
    Julia manual, `remotecall_wait`.

    Examples
    --------
    >>> remotecall_wait(pow, 1, 2, 3).isready()
    True
    """
    check_callable(f, "remotecall_wait", where)
    future = _start(f, CallTarget(where, "remotecall_wait"), args, kwargs).wait()
    future._raise_failure()
    return future


def remote_do(f: Callable[..., Any], where: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run ``f(*args, **kwargs)`` on another process and forget it.

    Returns at once, also when `where` is this process. The value is dropped; an error is
    printed by the process that ran it.

    References
    ----------
    Julia manual, `remote_do`.

    Examples
    --------
    >>> remote_do(abs, 1, -3)
    """
    check_callable(f, "remote_do", where)
    try:
        _do(f, where, args, kwargs)
    except Exception:
        if not finalizing():
            raise
        current_node().counts.hand_over(lambda: _do(f, where, args, kwargs))


def _do(f: Any, where: Any, args: Any, kwargs: Any) -> None:
    """Send a call whose outcome is dropped, or begin it here."""
    place = CallTarget(where, "remote_do")
    node = current_node()
    try:
        if place.pool is not None:
            place.lend()
        if place.pid == node.pid:
            args, kwargs = _own_arguments(args, kwargs)
            node.reactor.own.begin(
                node.tasks.context.new().run, (f, *args), kwargs, LocalTask(), _tell_failure
            )
            return
        flags, payload = place.payload(f, args, kwargs)
        thread_state = current()
        thread_state.enter()
        try:
            link = node.peers.link_to(place.pid)
            try:
                node.requests.send(
                    link, codec.frame(_CALL, flags, 0, next(node.requests.call_ids), payload, link), payload
                )
            except LinkClosed:
                raise node.peers.death(place.pid) from None
        finally:
            thread_state.leave()
    finally:
        firmly(place.back)


def _tell_failure(value: Any, captured: CapturedException | None) -> None:
    if captured is not None:
        print(captured.traceback_text, file=sys.stderr)  # noqa: T201 - the contract: it is printed


@overload
def remote(f: Callable[..., _T], /) -> Callable[..., _T]: ...
@overload
def remote(*, f: Callable[..., _T]) -> Callable[..., _T]: ...
@overload
def remote(pool: Any, f: Callable[..., _T]) -> Callable[..., _T]: ...
def remote(pool: Any = None, f: Any = None) -> Any:
    """Return a function that runs `f` on a worker of a pool, and returns its value.

    Parameters
    ----------
    pool : worker pool, optional
        Default: the default worker pool. ``remote(f)`` leaves it out.
    f : callable
        The function.

    References
    ----------
    Julia manual, `remote`.

    Examples
    --------
    >>> remote(abs)(-3)
    3
    """
    if f is None:
        pool, f = None, pool
    check_callable(f, "remote", pool)
    if pool is not None:
        CallTarget(pool, "remote")

    def call(*args: Any, **kwargs: Any) -> Any:
        return remotecall_fetch(f, default_worker_pool() if pool is None else pool, *args, **kwargs)

    try:
        functools.update_wrapper(call, f)
    except Exception:
        pass
    return call


def _pid_of(pid: Any, name: str) -> int:
    if isinstance(pid, str) and pid in ("any", ":any"):
        return least_loaded_worker()
    if isinstance(pid, bool) or not hasattr(pid, "__index__"):
        raise TypeError(
            f"{USAGE[name]}: pid must be a process id, which is an integer, or 'any', not {pid!r:.80}"
        )
    index: int = pid.__index__()
    return index


def spawnat(pid: Any, f: Callable[..., Any] | None = None, /, *args: Any, **kwargs: Any) -> Any:
    """Run ``f(*args, **kwargs)`` on a process; returns a Future at once.

    Parameters
    ----------
    pid : int or "any"
        ``"any"`` chooses the worker with least to do.
    f : callable, optional
        Left out, the result decorates a ``def`` without arguments, whose name is then
        bound to the Future.
    *args, **kwargs
        For `f`.

    Returns
    -------
    Future

    References
    ----------
    Julia manual, `@spawnat`.

    Examples
    --------
    >>> spawnat(1, pow, 2, 5).fetch()
    32
    >>> @spawnat(1)
    ... def answer():
    ...     return 6 * 7
    >>> answer.fetch()
    42
    """
    if f is None:
        if args or kwargs:
            raise TypeError("spawnat(pid, f, *args): the function is missing")
        return lambda body: spawnat(pid, body)
    check_callable(f, "spawnat", pid)
    return _start(f, CallTarget(_pid_of(pid, "spawnat"), "spawnat"), args, kwargs)


def spawn(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
    """Run ``f(*args, **kwargs)`` on the worker with least to do; returns a Future at once.

    As a decorator over a ``def`` without arguments it binds the name to the Future.

    References
    ----------
    Julia manual, `@spawn`.

    Examples
    --------
    >>> spawn(sum, [1, 2, 3]).fetch()
    6
    """
    check_callable(f, "spawn", args[0] if args else None)
    return _start(f, CallTarget(least_loaded_worker(), "spawn"), args, kwargs)


def fetchfrom(pid: Any, f: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
    """Run ``f(*args, **kwargs)`` on a process, and return its value.

    References
    ----------
    Julia manual, `@fetchfrom`.

    Examples
    --------
    >>> fetchfrom(1, len, "abc")
    3
    """
    check_callable(f, "fetchfrom", pid)
    return remotecall_fetch(f, _pid_of(pid, "fetchfrom"), *args, **kwargs)


def fetchany(f: Callable[..., _T], /, *args: Any, **kwargs: Any) -> _T:
    """Run ``f(*args, **kwargs)`` on the worker with least to do, and return its value.

    References
    ----------
    Julia manual, `@fetch`.

    Examples
    --------
    >>> fetchany(len, "abcd")
    4
    """
    check_callable(f, "fetchany", args[0] if args else None)
    return remotecall_fetch(f, least_loaded_worker(), *args, **kwargs)


__all__ = [
    "RemoteException",
    "fetchany",
    "fetchfrom",
    "remote",
    "remote_do",
    "remotecall",
    "remotecall_fetch",
    "remotecall_wait",
    "spawn",
    "spawnat",
]
