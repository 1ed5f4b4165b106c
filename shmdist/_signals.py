"""Recognizes errors that a signal handler raised in the middle of other work."""

from __future__ import annotations

import signal
import threading
from types import CodeType
from typing import Any


def is_interruption(error: BaseException) -> bool:
    """Return whether an error was raised by a handler of a signal, which the calling thread was running.

    An alarm may go off while an object is pickled, or while a function of the user's runs for a
    call: then its error is not the object's or the function's, and goes on as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None and handlers:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> CodeType | None:
    """Return the code of a handler that is written in Python."""
    handler = getattr(handler, "func", handler)  # of a partial
    handler = getattr(handler, "__func__", handler)  # of a method
    code = getattr(handler, "__code__", None)
    if code is None:
        code = getattr(vars(type(handler)).get("__call__"), "__code__", None)
    return code if isinstance(code, CodeType) else None
