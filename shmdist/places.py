"""Where a call is to run: on a process, or on a worker that a pool lends for it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from shmdist.runtime.strand import current
from shmdist.wire import codec
from shmdist.wire.messages import BY_ID

#: Set in a call that runs on this process by a pool's leave, and in the tasks that it begins: pools
#: do not let those wait for the worker that waits for them.
nested: ContextVar[bool] = ContextVar("shmdist.nested", default=False)


class Place:
    """Where a call is to run: a process id, or a worker that a pool lends."""

    __slots__ = ("lent", "pid", "pool")

    def __init__(self, where: Any, name: str) -> None:
        self.pool: Any = None
        self.pid = 0
        self.lent = False
        if type(where) is int:
            self.pid = where
        elif hasattr(where, "__index__") and not isinstance(where, bool):
            self.pid = where.__index__()  # first, for numpy's integers have take and put as well
        elif hasattr(where, "_lend") or (hasattr(where, "take") and hasattr(where, "put")):
            self.pool = where
        else:
            raise TypeError(
                f"{name}(f, where, *args): where must be a process id or a worker pool, not {where!r:.80}"
            )

    def lend(self) -> None:
        """Let the pool lend its worker; it is given back by :meth:`back`, which must be sure to follow."""
        pool = self.pool
        if not hasattr(pool, "_lend"):  # a pool of the user's own
            self.pid = pool.take()
            self.lent = True
            return
        strand = current()
        strand.enter()  # an interrupt must not come between the loan and the note of it
        try:
            self.pid = pool._lend()
            self.lent = True
        finally:
            strand.leave()

    def payload(self, f: Any, args: Any, kwargs: Any) -> tuple[int, codec.Payload]:
        """Pickle a call for this place; returns its flags, too."""
        ship = getattr(self.pool, "ship", None)
        if ship is None:
            return 0, codec.dumps_call(f, args, kwargs)
        shipped = ship(f)
        if self.pid not in shipped.there:
            strand = current()
            strand.enter()
            try:
                shipped.send_to(self.pid)
            finally:
                strand.leave()
        return BY_ID, codec.dumps((shipped.number, args, kwargs), "the call's arguments")

    @staticmethod
    def run_nested(f: Any, args: Any, kwargs: Any) -> Any:
        """Run a call, by a pool's leave, on this process and this thread."""
        token = nested.set(True)
        try:
            return f(*args, **kwargs)
        finally:
            nested.reset(token)

    def back(self) -> None:
        """Give the worker back to the pool that lent it."""
        if not self.lent:
            return
        try:
            self._back()
        except KeyboardInterrupt:
            self._back()  # it may have come before the first had begun
            raise

    def back_at_once(self) -> bool:
        """Give the worker back before anybody hears of the call's end; on the thread that reads.

        So who has heard of it finds the worker free.  False where that would take waiting, or run code of the
        user's: the pool is another process's, or of the user's own kind.  Then :meth:`back` is to follow.
        """
        try:
            state = self.pool._state if hasattr(self.pool, "_lend") else None
            if state is not None:
                self.lent = False
                self.lent = not state.give_back_from_reader(self.pid)
        except Exception:
            pass  # the pool is gone
        return not self.lent

    def _back(self) -> None:
        pool = self.pool
        if not hasattr(pool, "_give_back"):
            if self.lent:
                self.lent = False
                pool.put(self.pid)
            return
        strand = current()
        strand.enter()
        try:
            lent, self.lent = self.lent, False
            if lent:
                pool._give_back(self.pid)
        finally:
            strand.leave()
