"""Children that a worker's function forks: each ends where the function ends in it.

What called the function is the runtime of the parent, which must not run on in the child. So the
child ends there as a program would that ends so: with 0, with the code of a ``SystemExit``, or with
a traceback and 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import NoReturn

from shmdist._paths import PACKAGE
from shmdist.errors import capture

#: The thread that forked this process within a call; other calls that run here are none of the parent's.
_forked_by = 0


def note() -> None:
    """Note, in a forked child, that its one thread runs a call of the parent."""
    global _forked_by
    _forked_by = threading.get_ident()


def is_child() -> bool:
    """Return whether this thread runs a call of the process that this one was forked from."""
    return _forked_by == threading.get_ident()


def end(error: BaseException | None) -> NoReturn:
    """End this process as the call's function has ended; no more of the runtime runs."""
    code = 1
    try:
        code = _tell(error)
        for thread in threading.enumerate():  # a program waits for those
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # replaced, or closed
                stream.flush()
        os._exit(code & 0xFF)


def _tell(error: BaseException | None) -> int:
    """Say on stderr what there is to say of an error; return the exit code."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code
        text = f"{error.code}\n"
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            trace = trace.tb_next
        text = capture(error.with_traceback(trace)).traceback_text
    sys.stderr.write(text)
    return 1


__all__ = ["end", "is_child", "note"]
