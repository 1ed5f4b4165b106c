"""Loggers that import `logging` only when something is logged; and warnings."""

from __future__ import annotations

import sys

from shmdist._paths import PACKAGE


def warn(text: str, category: type[Warning]) -> None:
    """Warn the program of something, at its own line that called the package, if one did."""
    import warnings

    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    if frame.f_globals.get("__name__") in ("threading", "runpy"):  # a thread of the package's, or a worker
        level = 2
    warnings.warn(text, category, stacklevel=level)


class Log:
    """The logger ``shmdist.<name>``; logging raises nothing.

    Parameters
    ----------
    name : str
        Its name below ``shmdist``.
    """

    def __init__(self, name: str) -> None:
        self._name = f"shmdist.{name}"

    def _log(self, level: int, text: str, args: tuple[object, ...], traceback: bool = False) -> None:
        try:
            import logging

            logging.getLogger("shmdist").addHandler(logging.NullHandler())  # silent by default
            logging.getLogger(self._name).log(level, text, *args, exc_info=traceback)
        except Exception:
            pass  # no memory, no descriptor: who logs goes on all the same

    def info(self, text: str, *args: object) -> None:
        """Log what an administrator may want to know."""
        self._log(20, text, args)

    def warning(self, text: str, *args: object) -> None:
        """Log what should not be, and does no harm."""
        self._log(30, text, args)

    def exception(self, text: str, *args: object) -> None:
        """Log an error that is being handled, with its traceback."""
        self._log(40, text, args, traceback=True)
