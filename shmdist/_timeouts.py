"""Checks time limits, in the same way for everything that waits."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["FOREVER", "seconds"]

FOREVER = 1e9  # seconds: what is longer is no limit, and no clock or system call need take it


def seconds(timeout: Any, name: str = "timeout") -> float | None:
    """Return a time limit as functions here take one.

    Parameters
    ----------
    timeout : number or None
        Seconds, as the caller gave them.
    name : str
        Of the parameter, for the errors.

    Returns
    -------
    float or None
        From 0 to `FOREVER`. None: no limit. What is negative is 0, a try.

    Raises
    ------
    ValueError
        It is NaN.
    TypeError
        It is no number.

    Examples
    --------
    >>> seconds(2), seconds(-1), seconds(None), seconds(float("inf"))
    (2.0, 0.0, None, None)
    """
    if timeout is None:
        return None
    kind = type(timeout)
    if kind is not float:
        if kind is bool or isinstance(timeout, (str, bytes)) or not hasattr(kind, "__float__"):
            raise TypeError(f"{name} must be a number of seconds or None, not {timeout!r:.80}")
        try:
            timeout = float(timeout)
        except OverflowError:  # an int that no float can hold
            timeout = math.inf if timeout > 0 else 0.0
    if timeout >= FOREVER:
        return None
    if timeout > 0:
        return float(timeout)
    if timeout != timeout:
        raise ValueError(f"{name} must be a number of seconds or None, not NaN")
    return 0.0
