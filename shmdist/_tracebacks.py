"""The text of an error and its traceback, as other processes see it.

Frames of this package are left out: what the user's own functions did is what he looks for. With
``SHMDIST_FULL_TRACEBACK=1`` in the environment they are shown.
"""

from __future__ import annotations

import os

from shmdist._paths import PACKAGE

TYPE_CHECKING = False  # Not from typing: this file is on the start-up path of every worker.
if TYPE_CHECKING:
    import traceback
    from types import TracebackType

__all__ = ["end_of", "format_error", "users_part"]


def end_of(tb: TracebackType | None) -> TracebackType | None:
    """Return the last entry of a traceback: where the error was raised."""
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb


def users_part(tb: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the leading entries of this package; all of it where it has no others."""
    rest = tb
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(PACKAGE):
        rest = rest.tb_next
    return tb if rest is None else rest


def format_error(exc: BaseException, tb: TracebackType | None, line: str, *, full: bool = False) -> str:
    """Format an error, and those it came of, as Python prints them; never raises.

    Parameters
    ----------
    exc : BaseException
        The error.
    tb : traceback or None
        Its traceback.
    line : str
        What the text ends with where Python cannot format the error.
    full : bool
        Show the frames of this package too.
    """
    import traceback

    try:
        formatted = traceback.TracebackException(type(exc), exc, tb)
        if not full and os.environ.get("SHMDIST_FULL_TRACEBACK", "0") in ("", "0"):
            _leave_out_internal(formatted)
        return "".join(formatted.format())
    except Exception:
        pass
    try:  # without looking into the error
        frames = "".join(traceback.format_tb(tb))
        return f"Traceback (most recent call last):\n{frames}{line}\n"
    except Exception:
        return f"{line}\n(the traceback could not be formatted)\n"


def _leave_out_internal(formatted: traceback.TracebackException) -> None:
    """Take the frames of this package out of each error of a chain, where it has others."""
    waiting: list[traceback.TracebackException | None] = [formatted]
    while waiting:
        each = waiting.pop()
        if each is None:
            continue
        frames = [frame for frame in each.stack if not frame.filename.startswith(PACKAGE)]
        if frames:
            each.stack[:] = frames
        waiting += [each.__cause__, each.__context__, *(each.exceptions or ())]
