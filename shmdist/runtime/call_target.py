"""Where a call runs: on a given process, or on a worker taken from a pool."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import ShmdistError
from shmdist.runtime.interrupts import current
from shmdist.runtime.stack import need_stack
from shmdist.serialization import codec
from shmdist.transport.messages import BY_ID

#: Set in a call that runs on this process by a pool's leave, and in the tasks that it begins: pools
#: do not let those wait for the worker that waits for them.
nested: ContextVar[bool] = ContextVar("shmdist.nested", default=False)


#: How each function that runs another one is called; for the texts of errors.
USAGE = {
    "remotecall": "remotecall(f, where, *args)",
    "remotecall_fetch": "remotecall_fetch(f, where, *args)",
    "remotecall_wait": "remotecall_wait(f, where, *args)",
    "remote_do": "remote_do(f, where, *args)",
    "remote": "remote(pool, f)",
    "spawnat": "spawnat(pid, f, *args)",
    "spawn": "spawn(f, *args)",
    "fetchfrom": "fetchfrom(pid, f, *args)",
    "fetchany": "fetchany(f, *args)",
}


def check_callable(f: Any, name: str, other: Any = None) -> None:
    """Raise a TypeError unless `f` can be called; `other` is the argument beside it."""
    if callable(f):
        return
    cure = "give the function and its arguments, not what it returns: (f, x) and not (f(x))"
    if callable(other):
        cure = "mind the order of the arguments"
        if name in ("spawn", "fetchany"):
            cure = f"{USAGE['spawnat' if name == 'spawn' else 'fetchfrom']} runs it on a given process"
    raise TypeError(f"{USAGE[name]}: f must be callable, not {f!r:.80}; {cure}")


class CallTarget:
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
            what = "where" if "where" in USAGE[name] else "pool"
            cure = ""
            if isinstance(where, (list, tuple, range)):
                cure = "; WorkerPool(pids) makes a pool of process ids"
            raise TypeError(
                f"{USAGE[name]}: {what} must be a process id, which is an integer, or a worker pool, "
                f"not {where!r:.80}{cure}"
            )

    def lend(self) -> None:
        """Let the pool lend its worker; it is given back by :meth:`back`, which must be sure to follow."""
        need_stack()  # for the way back as well
        pool = self.pool
        if not hasattr(pool, "_lend"):  # a pool of the user's own
            self.pid = pool.take()
            self.lent = True
            return
        thread_state = current()
        thread_state.enter()  # an interrupt must not come between the loan and the note of it
        try:
            self.pid = pool._lend()
            self.lent = True
        finally:
            thread_state.leave()

    def payload(self, f: Any, args: Any, kwargs: Any) -> tuple[int, codec.Payload]:
        """Pickle a call for this place; returns its flags, too."""
        ship = getattr(self.pool, "ship", None)
        if ship is None:
            return 0, codec.dumps_call(f, args, kwargs)
        shipped = ship(f)
        if self.pid not in shipped.there:
            thread_state = current()
            thread_state.enter()
            try:
                shipped.send_to(self.pid)
            finally:
                thread_state.leave()
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
        except (ShmdistError, ValueError):
            pass  # the pool is gone
        except Exception:
            self.lent = True
        return not self.lent

    def _back(self) -> None:
        pool = self.pool
        if not hasattr(pool, "_give_back"):
            if self.lent:
                self.lent = False
                pool.put(self.pid)
            return
        thread_state = current()
        thread_state.enter()
        try:
            lent, self.lent = self.lent, False
            if lent:
                firmly(pool._give_back, self.pid)
        except Exception:
            self.lent = True
            raise
        finally:
            thread_state.leave()
