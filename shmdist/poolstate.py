"""A worker pool where it lives: its members, and who of them is free."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from shmdist.channels import Channel
from shmdist.errors import ShmdistError
from shmdist.refs import channel_from_id
from shmdist.runtime.node import current_node


class PoolState:
    """A pool where it lives: its members, the free ones among them, and who has how much to do."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._lock = threading.Lock()  # guards `members` and `busy`
        self.members: dict[int, None] = {}
        self.busy: Counter[int] = Counter()  # calls lent to, beyond those that took the worker
        self.free = Channel(float("inf"))
        for pid in pids:
            self.push(pid)
        node = current_node()
        alive = weakref.ref(self)

        def lost(pid: int) -> None:
            state = alive()
            if state is None:
                node.lost_hooks.remove(lost)
            else:
                state.discard(pid)

        node.lost_hooks.append(lost)

    # The face of a channel, for RemoteChannel.
    def put(self, pid: int) -> None:
        """Give a worker back."""
        with self._lock:
            if pid not in self.members:
                if pid in current_node().graves:
                    return
                raise ValueError(
                    f"worker {pid} is not of this pool, which has {sorted(self.members)}: push it"
                )
        self.free.put(pid)

    def take(self, timeout: float | None = None) -> int:
        """Remove a free worker; waits for one."""
        while True:
            self._check_any()
            pid: int = self.free.take(timeout)
            with self._lock:
                if pid in self.members:
                    return pid

    def fetch(self, timeout: float | None = None) -> int:
        """Return a free worker and leave it."""
        pid: int = self.free.fetch(timeout)
        return pid

    def wait(self, timeout: float | None = None) -> None:
        """Wait for a free worker."""
        self._check_any()
        self.free.wait(timeout)

    def isready(self) -> bool:
        """Tell whether a worker is free."""
        return self.free.isready()

    def close(self) -> None:
        """Lend no more."""
        self.free.close()

    def _check_any(self) -> None:
        if not self.members:
            raise ShmdistError("the pool has no workers: its workers have exited, or none was pushed")

    def push(self, pid: int) -> None:
        """Add a worker."""
        node = current_node()
        if pid != node.pid:
            node.check_member(pid)
        with self._lock:
            if pid in self.members:
                return
            self.members[pid] = None
        self.free.put(pid)

    def discard(self, pid: int) -> None:
        """Take a worker out that is gone."""
        with self._lock:
            self.members.pop(pid, None)
        # Its id may stand among the free ones: take() passes over it, but it must not look ready.
        kept = []
        try:
            while self.free.isready():
                item = self.free.take(timeout=0)
                if item != pid:
                    kept.append(item)
        except (TimeoutError, ShmdistError):
            pass
        for item in kept:
            self.free.put(item)
        if not self.members:  # who waits for a worker would wait for ever
            old, self.free = self.free, Channel(float("inf"))
            old.close(ShmdistError("the pool has no workers left"))

    def workers(self) -> list[int]:
        """Return all workers, free or not."""
        with self._lock:
            return list(self.members)

    def lend(self, nested_on: int | None) -> tuple[int, bool]:
        """Return a worker for a call, and whether it was taken.

        A call that itself runs on a worker of this pool must not wait for a free one: its
        own worker would wait for it. It gets the one with least to do, besides its work.
        """
        if nested_on is not None and nested_on in self.members:
            try:
                return self.take(timeout=0), True
            except TimeoutError:
                with self._lock:
                    pid = min(self.members, key=lambda each: self.busy[each])
                    self.busy[pid] += 1
                return pid, False
        return self.take(), True

    def give_back(self, pid: int, taken: bool) -> None:
        """Take a worker back that was lent."""
        if taken:
            self.put(pid)
            return
        with self._lock:
            self.busy[pid] -= 1
            if not self.busy[pid]:
                del self.busy[pid]


def on_state(rrid: Any, name: str, args: tuple[Any, ...]) -> Any:
    """Call a method of a pool's state, on the process where it lives."""
    return getattr(channel_from_id(rrid), name)(*args)
