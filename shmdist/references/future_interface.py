"""The ``concurrent.futures`` interface of a Future, made when it is first used.

``concurrent.futures.wait`` and ``as_completed`` reach into a future's private fields, and the
first such reach subscribes the future to its completion.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

from shmdist._cancelled import Cancelled
from shmdist.errors import ShmdistError
from shmdist.refcount.table import Entry, State
from shmdist.references.base import Reference, ask_later
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import PendingReply

_FIELDS = frozenset({"_condition", "_state", "_waiters", "_done_callbacks", "_result", "_exception"})
_Base = concurrent.futures.Future
NO_TAKE = "a Future cannot be taken from: its value is for all who hold it. Use fetch()"


def soon(job: Callable[[], None]) -> None:
    """Run what may be users' code, on a thread that need not read; from any thread."""
    node = current_node()
    try:
        node.reactor.outcomes.put_callback(job)
    except (RuntimeError, MemoryError):  # no room for another thread
        node.counts.run_soon(job)


class _Finisher:
    """Waits for a value that lives here, for a future that somebody subscribed to."""

    def __init__(self, future: ConcurrentFutureInterface) -> None:
        self._future = future

    def resolve(self, value: Any) -> None:
        """The value is there."""
        soon(self._future._finish)

    def fail(self, error: BaseException) -> None:
        """The error is there."""
        soon(self._future._finish)


class ConcurrentFutureInterface(Reference, _Base):  # type: ignore[type-arg]  # generic only in stubs
    """What makes a reference to one outcome a `concurrent.futures.Future`."""

    _outcome: tuple[bool, Any] | None = None  # (True, value) or (False, error), once it is here
    _keepers: list[None] | None = None  # one for each of those for whom the owner must keep the value
    _weak: str | None = None  # it has no count, and why it came without its value
    _reply: PendingReply | None = None  # of the call that computes it, when this process made it

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the outcome; a Future knows how."""
        raise NotImplementedError  # a Future has it

    def isready(self, timeout: float | None = None) -> bool:
        """Return whether the outcome is there; a Future knows how."""
        raise NotImplementedError  # a Future has it

    def _open_reply(self, reply: PendingReply) -> None:
        raise NotImplementedError  # a Future has it

    def _settle(self, succeeded: bool, value: Any) -> None:
        raise NotImplementedError  # a Future has it

    def _entry(self, node: Node) -> Entry | None:
        """Return the entry of one that lives here; a Future knows which."""
        raise NotImplementedError  # a Future has it

    def _keep(self) -> None:
        """Have the owner keep the value though another thread fetches it meanwhile.

        Who calls this asks :meth:`_is_settled` after it: the owner may have forgotten the value by then.
        """
        keepers = self._keepers
        if keepers is None:
            keepers = self.__dict__.setdefault("_keepers", [])  # one step, as the next one
        keepers.append(None)

    def _is_settled(self) -> bool:
        """Return whether the outcome is here; what was known of it before may have changed."""
        return self._outcome is not None

    def _keep_no_longer(self) -> None:
        """Let go of what :meth:`_keep` has kept. The last one gives the count back if the outcome is here."""
        assert self._keepers is not None
        self._keepers.pop()
        if self._outcome is not None:
            self._let_go()

    def _let_go(self) -> None:
        """Let the owner forget the value, unless it is kept; a Future knows how."""
        raise NotImplementedError  # a Future has it

    def __getattr__(self, name: str) -> Any:
        if name == "take":  # no method: what has take and put is a pool
            raise AttributeError(NO_TAKE)
        if name not in _FIELDS:
            raise AttributeError(f"'Future' object has no attribute {name!r}")
        node = current_node()
        with current(), node.lock:  # two threads may look at once
            if "_condition" in self.__dict__:
                return self.__dict__[name]
            _Base.__init__(self)
        if self._outcome is not None:
            self._finish()
        elif self._reply is not None:
            if self._reply.done:
                self._finish()
        elif not self._inert:
            self._await_later()
        return self.__dict__[name]

    def _finish(self) -> None:
        """Bring the outcome to the interface of concurrent.futures."""
        error: BaseException | None = None
        value = None
        try:
            value = self.fetch()
        except BaseException as caught:
            error = caught
        if self.cancelled():
            _Base.cancel(self)
            with self._condition:
                if self._state == "CANCELLED":
                    self.set_running_or_notify_cancel()
            return
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(value)
        except concurrent.futures.InvalidStateError:
            pass  # another thread did it

    def _await_later(self) -> None:
        """Have :meth:`_finish` called when the outcome is there; no thread waits for it."""
        node = current_node()
        if self._where != node.pid:
            self._keep()
            if self._outcome is None and ask_later(
                self._where, "fetch", self._rrid, self._weak, self._on_answer
            ):
                return
            self._keep_no_longer()
        elif self._weak is None:
            with current(), node.lock:
                entry = self._entry(node)
                if entry is not None and entry.state is State.UNSET:
                    entry.waiters.append(_Finisher(self))
                    return
        node.reactor.start(self._finish)

    def _on_answer(self, reply: PendingReply) -> None:
        """The owner has answered; on the reading thread."""
        soon(lambda: self._finish_answer(reply))

    def _finish_answer(self, reply: PendingReply) -> None:
        """Take what the owner has answered; where it cannot be read, :meth:`_finish` asks again."""
        outcome: tuple[bool, Any] | None = None
        try:
            outcome = True, current_node().requests.open(reply, f"fetch of {self!r}")
        except ShmdistError as error:
            outcome = False, error
        except Exception:
            pass
        self._keep_no_longer()
        if outcome is not None:
            self._settle(*outcome)
        self._finish()

    def _finish_reply(self) -> None:
        """The call has ended; its value may still be with the owner."""
        if self._outcome is None and self._reply is not None:
            self._open_reply(self._reply)
        if self._outcome is None:
            self._await_later()
        else:
            self._finish()

    def result(self, timeout: float | None = None) -> Any:
        """Return the value; the same as :meth:`fetch`."""
        return self.fetch(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the outcome; return the error, or None.

        Raises
        ------
        concurrent.futures.CancelledError
            The call was cancelled.
        """
        try:
            self.fetch(timeout)
        except Cancelled:
            if self.cancelled():
                raise
        except TimeoutError:
            if self._outcome is None:
                raise
        except Exception:
            if self._outcome is None:
                raise
        assert self._outcome is not None
        return None if self._outcome[0] else self._outcome[1]

    def done(self) -> bool:
        """Return whether the outcome is there."""
        return self.isready()

    def running(self) -> bool:
        """Return whether the computation has not ended."""
        return not self.isready()

    def cancelled(self) -> bool:
        """Return whether the call was withdrawn, by :meth:`cancel` or before it began."""
        if self._outcome is None and self._reply is not None and self._reply.done:
            self._open_reply(self._reply)
        outcome = self._outcome
        # Not an instance of it: the call may itself have raised what another one's withdrawal was.
        return outcome is not None and not outcome[0] and type(outcome[1]) is Cancelled

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(self)`` when the outcome is there, on some thread of this process."""
        _ = self._condition
        super().add_done_callback(fn)

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return asyncio.wrap_future(self).__await__()


__all__ = ["NO_TAKE", "Cancelled", "ConcurrentFutureInterface", "soon"]
