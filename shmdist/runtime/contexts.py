"""The context of calls: what is set up once on a process holds in each later call there.

The threads of a worker are used again, and a call runs on whichever is free. What Python keeps by
thread or context (the decimal context, numpy's error state, every ``contextvars.ContextVar``) would
then be there in some calls and not in others, and would stay after the call that set it. So each call
runs in a copy of one context, the process's *base*: what the call sets is its own. Code run by
``everywhere`` and ``remotecall_eval`` is what changes the base, when it ends.

Two values can change where they stand: the decimal context, and numpy's error state before numpy 2, which
belongs to the thread. Once the base has one of these, each call gets a copy of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_MISSING = object()


class CallContext:
    """The base of one process.

    Attributes
    ----------
    base : contextvars.Context
        Replaced when it changes, and never entered: a call runs in a copy.
    prepare : callable or None
        Run in the copy before the call.
    """

    __slots__ = ("_decimal", "_errors", "_lock", "base", "prepare")

    def __init__(self) -> None:
        self.base = contextvars.Context()
        self.prepare: Callable[[], None] | None = None
        self._decimal: Any = None  # the base's decimal context
        self._errors: Any = None  # numpy 1's error state
        self._lock = threading.RLock()  # guards the changing of all above

    def __repr__(self) -> str:
        return f"<CallContext of {len(self.base)} variables>"

    def new(self) -> contextvars.Context:
        """Return the context for one call."""
        context = self.base.copy()
        if self.prepare is not None:
            context.run(self.prepare)
        return context

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Let each later call have what the block sets in its context."""
        before = contextvars.copy_context()
        # It can change where it stands: its text shows it.
        decimals = {variable: repr(value) for variable, value in before.items() if _is_decimal(value)}
        errors = _numpy_errors()
        try:
            yield
        finally:
            changed = {
                variable: value
                for variable, value in contextvars.copy_context().items()
                if before.get(variable, _MISSING) is not value
                or (variable in decimals and decimals[variable] != repr(value))
            }
            now = _numpy_errors()
            if changed or now != errors:
                self._change(changed, now if now != errors else None)

    def _change(self, changed: dict[contextvars.ContextVar[Any], Any], errors: Any) -> None:
        def enter() -> None:
            for variable, value in changed.items():
                variable.set(value)

        with self._lock:
            base = self.base.copy()
            base.run(enter)
            for value in changed.values():
                if _is_decimal(value):
                    self._decimal = value.copy()
            if errors is not None:
                self._errors = errors
            if self._decimal is not None or self._errors is not None:
                self.prepare = self._prepare
            self.base = base

    def _prepare(self) -> None:
        """Give the call its own of what can change where it stands; run in its context."""
        if self._decimal is not None:
            sys.modules["decimal"].setcontext(self._decimal.copy())
        if self._errors is not None:
            sys.modules["numpy"].seterrobj(list(self._errors))


def _is_decimal(value: Any) -> bool:
    """Return whether a value is a decimal context."""
    decimal = sys.modules.get("decimal")
    return decimal is not None and isinstance(value, decimal.Context)


def _numpy_errors() -> Any:
    """Return this thread's error state of numpy 1, which later versions keep in a context variable."""
    get = getattr(sys.modules.get("numpy"), "geterrobj", None)
    return None if get is None else get()


__all__ = ["CallContext"]
