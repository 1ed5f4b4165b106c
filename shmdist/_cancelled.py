"""The error of a cancelled call, apart because it needs ``concurrent.futures``."""

from __future__ import annotations

from concurrent.futures import CancelledError

from shmdist._exceptions import ShmdistError

__all__ = ["Cancelled"]


class Cancelled(ShmdistError, CancelledError):
    """A call was cancelled: it was withdrawn before it began, or its Future was given up.

    Parameters
    ----------
    message : str
    rrid : (int, int), optional
        The name of its Future: a call may have raised what another one's withdrawal was.

    Examples
    --------
    >>> import concurrent.futures
    >>> issubclass(Cancelled, concurrent.futures.CancelledError)
    True
    """

    __module__ = "shmdist"

    def __init__(self, message: str = "", rrid: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.rrid = rrid
