"""The face of ``concurrent.futures`` that a Future has, set up only when somebody looks at it.

``concurrent.futures.wait`` and ``as_completed`` reach into a future's private fields, and the
first such reach subscribes the future to its completion.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

from shmdist.errors import ShmdistError
from shmdist.references import Reference
from shmdist.runtime.node import current_node
from shmdist.runtime.replies import Reply

_FIELDS = frozenset({"_condition", "_state", "_waiters", "_done_callbacks", "_result", "_exception"})
_Base = concurrent.futures.Future
NO_TAKE = "a Future cannot be taken from: its value is for all who hold it. Use fetch()"


class Cancelled(ShmdistError, concurrent.futures.CancelledError):
    """A call was withdrawn before it began."""

    __module__ = "shmdist"


class Face(Reference, _Base):  # type: ignore[type-arg]  # generic only in stubs
    """What makes a reference to one outcome a `concurrent.futures.Future`."""

    _outcome: tuple[bool, Any] | None = None  # (True, value) or (False, error), once it is here
    _reply: Reply | None = None  # of the call that computes it, when this process made it

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the outcome; a Future knows how."""
        raise NotImplementedError  # a Future has it

    def isready(self, timeout: float | None = None) -> bool:
        """Tell whether the outcome is there; a Future knows how."""
        raise NotImplementedError  # a Future has it

    def _open_reply(self, reply: Reply) -> None:
        raise NotImplementedError  # a Future has it

    def __getattr__(self, name: str) -> Any:
        if name == "take":  # no method: what has take and put is a pool
            raise AttributeError(NO_TAKE)
        if name not in _FIELDS:
            raise AttributeError(f"'Future' object has no attribute {name!r}")
        node = current_node()
        with node.lock:  # two threads may look at once
            if "_condition" in self.__dict__:
                return self.__dict__[name]
            _Base.__init__(self)
        if self._outcome is not None:
            self._finish()
        elif self._reply is not None:
            if self._reply.done:
                self._finish()
        elif not self._inert:
            node.dispatcher.start(self._finish)
        return self.__dict__[name]

    def _finish(self) -> None:
        """Bring the outcome to the face of concurrent.futures."""
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

    def result(self, timeout: float | None = None) -> Any:
        """Return the value; the same as :meth:`fetch`."""
        return self.fetch(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the outcome; return the error, or None.

        Raises
        ------
        concurrent.futures.CancelledError
            The call was withdrawn before it began.
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
        """Tell whether the outcome is there."""
        return self.isready()

    def running(self) -> bool:
        """Tell whether the computation has not ended."""
        return not self.isready()

    def cancelled(self) -> bool:
        """Tell whether the call was withdrawn before it began."""
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


__all__ = ["NO_TAKE", "Cancelled", "Face"]
