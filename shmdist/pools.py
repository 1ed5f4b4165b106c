"""Worker pools: they lend a free worker to each call.

A `WorkerPool` lives on the process that made it, in a `PoolState`, and may be used from all:
its handles find the state through a reference, as RemoteChannels do. Taking a worker is
taking from a channel of free ones, so it can wait, time out and be interrupted without
losing one. A process that dies gives back what it had taken.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from shmdist.errors import ShmdistError, no_workers_left
from shmdist.processes import fallen_workers, process_ids, remedy, usable_workers, workers
from shmdist.references.base import ask, call_owner
from shmdist.references.remote_channel import RemoteChannel, channel_from_id
from shmdist.runtime import call_target
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node, current_node
from shmdist.scheduling.function_broadcast import BroadcastFunction
from shmdist.scheduling.pool_state import PoolState, give_back


class AbstractWorkerPool(ABC):
    """What a worker pool can do; base class for pools of one's own.

    A pool lends workers: :meth:`take` removes a free one, :meth:`put` gives it back.
    ``remotecall(f, pool)``, ``remote(pool, f)`` and ``pmap`` take any pool.

    References
    ----------
    Julia manual, `AbstractWorkerPool`.

    Examples
    --------
    >>> isinstance(WorkerPool([1]), AbstractWorkerPool)
    True
    """

    __module__ = "shmdist"

    @abstractmethod
    def push(self, pid: int, timeout: float | None = None) -> None:
        """Add a worker to the pool."""

    @abstractmethod
    def put(self, pid: int, timeout: float | None = None) -> None:
        """Give a worker back."""

    @abstractmethod
    def take(self, timeout: float | None = None) -> int:
        """Remove a free worker and return its process id; waits for one."""

    @abstractmethod
    def workers(self, timeout: float | None = None) -> list[int]:
        """Return the process ids of all workers of the pool, free or not."""

    @abstractmethod
    def isready(self, timeout: float | None = None) -> bool:
        """Return whether a worker is free."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a worker is free."""
        self.put(self.take(timeout))

    def __len__(self) -> int:
        return len(self.workers())

    def __bool__(self) -> bool:
        return True


class WorkerPool(AbstractWorkerPool):
    """A pool of workers; its handles may be used from any process.

    Parameters
    ----------
    pids : sequence of int
        The workers; default none yet.

    Notes
    -----
    Workers that are gone leave the pool by themselves. Thread-safe.

    References
    ----------
    Julia manual, `WorkerPool`.

    Examples
    --------
    >>> pool = WorkerPool([1])
    >>> pid = pool.take()
    >>> pool.isready(), len(pool)
    (False, 1)
    >>> pool.put(pid)
    """

    __module__ = "shmdist"

    def __init__(self, pids: Iterable[int] = ()) -> None:
        state = PoolState(_members(pids))
        self._ref = RemoteChannel(lambda: state)

    @classmethod
    def _of(cls, state: PoolState) -> WorkerPool:
        """Return a handle to a pool that is there."""
        self = cls.__new__(cls)
        self._ref = RemoteChannel(lambda: state)
        return self

    def __repr__(self) -> str:
        if self._ref._inert or self._ref.where != current_node().pid:
            return f"<WorkerPool of process {self._ref.where}>"
        return f"<WorkerPool {self.workers()}>"

    @property
    def _state(self) -> PoolState | None:
        """The pool itself, when it lives on this process."""
        ref = self._ref
        node = ref._alive()
        return channel_from_id(ref._rrid) if ref._where == node.pid else None

    def _call(self, name: str, *args: Any, timeout: float | None = None) -> Any:
        state = self._state
        if state is not None:
            return getattr(state, name)(*args)
        return ask(self._ref._where, "pool", self._ref._rrid, (name, args), timeout)

    def push(self, pid: int, timeout: float | None = None) -> None:
        """Add a worker to the pool.

        Raises
        ------
        ValueError, ProcessExitedException
            There is no such worker.
        """
        self._call("push", pid, timeout=timeout)

    def put(self, pid: int, timeout: float | None = None) -> None:
        """Give a worker back that was taken."""
        self._call("give_back", pid, current_node().pid, timeout=timeout)

    def take(self, timeout: float | None = None) -> int:
        """Remove a free worker and return its process id; waits for one.

        Raises
        ------
        ShmdistError
            The pool has no workers: all have died, or were removed.
        TimeoutError
            None was free in time.
        """
        state = self._state
        if state is not None:
            pid: int = state.take(timeout)
        else:
            pid, _ = ask(self._ref._where, "lend", self._ref._rrid, None, timeout)
        return pid

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a worker is free."""
        self._ref.wait(timeout)

    def isready(self, timeout: float | None = None) -> bool:
        """Return whether a worker is free."""
        return self._ref.isready(timeout)

    def workers(self, timeout: float | None = None) -> list[int]:
        """Return the process ids of the pool's workers, free or not."""
        pids: list[int] = self._call("workers", timeout=timeout)
        return pids

    def _no_workers(self) -> ShmdistError:
        error: ShmdistError = self._call("no_workers")
        return error

    def _lend(self) -> int:
        state = self._state
        if state is not None:
            return state.lend(_nested())
        pid, _ = ask(self._ref._where, "lend", self._ref._rrid, _nested())
        return int(pid)

    def _give_back(self, pid: int) -> None:
        give_back(self._ref._where, self._ref._rrid, pid)


def workers_of(pool: Any) -> list[int]:
    """Return the workers of a pool that are not about to go, for a map or a loop.

    Raises
    ------
    ShmdistError
        It has none.
    """
    node = current_node()
    members = pool.workers()
    pids = [pid for pid in members if pid not in node.peers.leaving]
    if pids:
        return pids
    deaths = node.peers.deaths(members)
    if hasattr(pool, "_no_workers"):
        raise pool._no_workers()
    if members:
        raise no_workers_left(deaths, "push others into the pool")
    raise ShmdistError("the pool has no workers left: its workers have exited, or none was pushed")


def _members(pids: Any) -> list[int]:
    return pids.workers() if isinstance(pids, AbstractWorkerPool) else process_ids((pids,))


def _nested() -> bool:
    """Return whether this code belongs to a call, which a pool may have lent a worker for."""
    node = current_node()
    # A worker's other threads are most likely those of its calls.
    return (
        current().task is not None
        or call_target.nested.get()
        or (node.peers.is_worker and bool(node.tasks.running))
    )


class CachingPool(AbstractWorkerPool):
    """A pool that sends each function, and what it closes over, once to each worker.

    Parameters
    ----------
    pids : sequence of int
        The workers.

    Notes
    -----
    For functions that close over much data and are called often. It is used on the
    process that made it. ``clear(pool)`` lets the workers forget the functions. Changes
    of what a function closes over are not seen by workers that have it.

    References
    ----------
    Julia manual, `CachingPool`.

    Examples
    --------
    >>> pool = CachingPool([1])
    >>> remote(pool, abs)(-2)
    2
    """

    __module__ = "shmdist"

    def __init__(self, pids: Iterable[int]) -> None:
        self._node = current_node()
        self._state = PoolState(_members(pids))
        # By what _identity tells; the entry keeps that alive
        self._functions: dict[Any, BroadcastFunction] = {}
        self._lock = threading.Lock()  # guards `_functions`

    def __repr__(self) -> str:
        return f"<CachingPool {self.workers()}, {len(self._functions)} functions>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a CachingPool is used on the process that made it; send its workers() and make one there"
        )

    def push(self, pid: int, timeout: float | None = None) -> None:
        """Add a worker to the pool."""
        self._state.push(pid)

    def put(self, pid: int, timeout: float | None = None) -> None:
        """Give a worker back that was taken."""
        self._state.give_back(pid, self._node.pid)

    def take(self, timeout: float | None = None) -> int:
        """Remove a free worker and return its process id; waits for one."""
        pid: int = self._state.take(timeout)
        return pid

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a worker is free."""
        self._state.wait(timeout)

    def isready(self, timeout: float | None = None) -> bool:
        """Return whether a worker is free."""
        return self._state.isready()

    def workers(self, timeout: float | None = None) -> list[int]:
        """Return the process ids of the pool's workers, free or not."""
        return self._state.workers()

    def _no_workers(self) -> ShmdistError:
        return self._state.no_workers()

    def _lend(self) -> int:
        pid: int = self._state.lend(_nested())
        return pid

    def _give_back(self, pid: int) -> None:
        thread_state = current()
        thread_state.enter()
        try:
            self._state.give_back(pid, self._node.pid)
        finally:
            thread_state.leave()

    def ship(self, f: Callable[..., Any]) -> BroadcastFunction:
        """Return the function as it is kept for this pool's workers."""
        return self._ship((_identity(f), None), lambda: f)

    def ship_as(self, f: Callable[..., Any], wrapper: Callable[[Any], Any]) -> BroadcastFunction:
        """Return ``wrapper(f)`` as it is kept for this pool's workers."""
        return self._ship((_identity(f), wrapper), lambda: wrapper(f))

    def _ship(self, key: Any, make: Callable[[], Any]) -> BroadcastFunction:
        with current(), self._lock:
            shipped = self._functions.get(key)
        if shipped is None:
            made = BroadcastFunction(make())  # not under the lock: pickling runs the code of what is pickled
            with current(), self._lock:
                shipped = self._functions.setdefault(key, made)
        return shipped

    def clear(self) -> None:
        """Let the workers forget the functions sent to them."""
        with current(), self._lock:
            functions, self._functions = self._functions, {}
        _drop(functions)

    def __del__(self) -> None:
        try:
            functions = self._functions
            if functions and not self._node.peers.closed:
                self._node.counts.run_soon(lambda: _drop(functions))  # a finalizer may run inside any lock
        except Exception:
            pass


def _drop(functions: dict[Any, BroadcastFunction]) -> None:
    for shipped in functions.values():
        shipped.drop_in_turn()


def _identity(f: Any) -> Any:
    """Return what tells `f` from other functions; each look at a method makes a new object of it."""
    return (id(f.__self__), id(f.__func__)) if type(f) is MethodType else id(f)


# ---------------------------------------------------------------------- the default pool


class _DefaultPool:
    """The pool that a process uses when none is named.

    Attributes
    ----------
    used : AbstractWorkerPool, or None
        That one: the program's own, or on process 1 the one of all workers.
    of_all : WorkerPool, or None
        Process 1's pool of all workers, also while the program uses another one.
    """

    def __init__(self, node: Node) -> None:
        self.used: Any = None
        self.of_all: WorkerPool | None = None
        if node.pid == 1:
            node.peers.joined_hooks.append(_joined)
            node.peers.leaving_hooks.append(_lost)
            node.peers.lost_hooks.append(_lost)

    def of_all_workers(self, node: Node) -> Any:
        """Return the pool in use, which is made of all workers if there is none."""
        if self.used is None:
            with current(), node.lock:
                if self.used is None:
                    fallen = fallen_workers()
                    state = PoolState([] if fallen else workers(), died=fallen)
                    self.used = self.of_all = WorkerPool._of(state)
            _joined([pid for pid in workers() if pid != 1])  # those that came meanwhile, and found no pool
        return self.used


def _own_state(node: Node) -> PoolState | None:
    default = node.find_part(_DefaultPool)
    return None if default is None or default.of_all is None else default.of_all._state


def _joined(pids: list[int]) -> None:
    """Let new workers into the default pool; the first ones replace process 1."""
    node = current_node()
    state = _own_state(node)
    if state is None:
        return
    for pid in pids:
        if pid in node.peers.members and pid not in node.peers.leaving:
            state.push(pid)
    if set(state.workers()) > {1}:
        state.discard(1)
    elif not state.workers():
        _replace_the_last(state)


def _lost(pid: int) -> None:
    """Take a worker that is gone, or asked to go, out of the default pool."""
    state = _own_state(current_node())
    if state is not None:
        if set(state.workers()) <= {pid}:
            _replace_the_last(state)  # first: the thread that waits for a worker gets this one
        state.discard(pid)


def _replace_the_last(state: PoolState) -> None:
    """Let process 1 into the default pool, unless the last workers have died."""
    fallen = fallen_workers()
    state.cure = remedy(fallen) if fallen else ""
    if not fallen:
        for pid in workers():  # [1], unless others have come this moment
            state.push(pid)


def default_worker_pool() -> Any:
    """Return the pool that is used when none is named: all workers, as they come and go.

    On a worker it is a handle to process 1's.

    References
    ----------
    Julia manual, `default_worker_pool`.

    Examples
    --------
    >>> default_worker_pool().workers()
    [1]
    """
    node = current_node()
    default = node.part(_DefaultPool)
    if node.pid == 1:
        return default.of_all_workers(node)
    if default.used is None:
        default.used = call_owner(1, _default_for_workers)
    return default.used


def as_pool(pool: Any, name: str) -> Any:
    """Return the pool that a map or loop called `name` was given; process ids stand for a pool of theirs.

    Raises
    ------
    TypeError, ValueError, ProcessExitedException
        It is neither; or there is no such process.
    """
    if pool is None:
        return default_worker_pool()
    if hasattr(pool, "take") and hasattr(pool, "workers"):
        return pool
    if isinstance(pool, (str, bytes)) or not hasattr(pool, "__iter__"):
        raise TypeError(f"{name}: pool must be a worker pool or a list of process ids, not {pool!r:.80}")
    pids = list(pool)
    for pid in pids:
        if not hasattr(pid, "__index__") or isinstance(pid, bool):
            what = "a list of process ids, which are integers"
            raise TypeError(f"{name}: pool must be {what}, not {pid!r:.80}")
    if not pids:
        raise ValueError(f"{name}: pool is an empty list: it must name a worker at least; see workers()")
    return WorkerPool(pids)


def _default_for_workers() -> Any:
    """Return a handle to the default pool that may be sent."""
    pool = default_worker_pool()
    return WorkerPool._of(pool._state) if isinstance(pool, CachingPool) else pool


def set_default_worker_pool(pool: AbstractWorkerPool) -> None:
    """Use `pool` when none is named, on this process.

    References
    ----------
    Julia manual, `default_worker_pool!`.

    Examples
    --------
    >>> before = default_worker_pool()
    >>> set_default_worker_pool(WorkerPool([1]))
    >>> set_default_worker_pool(before)
    """
    if not hasattr(pool, "take"):
        raise TypeError(f"set_default_worker_pool() takes a worker pool, not {type(pool).__name__}")
    current_node().part(_DefaultPool).used = pool


_turn = itertools.count()


def least_loaded_worker() -> int:
    """Return the worker with least to do, as far as this process knows; in turn among equals."""
    node = current_node()
    pids = usable_workers()
    load = Counter(reply.pid for reply in list(node.requests.pending.values()))
    turn = next(_turn)
    return min(pids, key=lambda pid: (load[pid], (pids.index(pid) - turn) % len(pids)))


__all__ = [
    "AbstractWorkerPool",
    "CachingPool",
    "WorkerPool",
    "default_worker_pool",
    "set_default_worker_pool",
]
