"""Loggers that cost nothing until something is logged: `logging` is slow to import."""

from __future__ import annotations


class Log:
    """The logger ``shmdist.<name>``.

    Parameters
    ----------
    name : str
        Its name below ``shmdist``.
    """

    def __init__(self, name: str) -> None:
        self._name = f"shmdist.{name}"

    def _log(self, level: int, text: str, args: tuple[object, ...], traceback: bool = False) -> None:
        import logging

        logging.getLogger("shmdist").addHandler(logging.NullHandler())  # silent by default
        logging.getLogger(self._name).log(level, text, *args, exc_info=traceback)

    def info(self, text: str, *args: object) -> None:
        """Log what an administrator may want to know."""
        self._log(20, text, args)

    def warning(self, text: str, *args: object) -> None:
        """Log what should not be, and does no harm."""
        self._log(30, text, args)

    def exception(self, text: str, *args: object) -> None:
        """Log an error that is being handled, with its traceback."""
        self._log(40, text, args, traceback=True)
