"""Doing what must be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def firmly(function: Callable[..., _T], *args: Any) -> _T:
    """Call what nobody will call again: a second time where it raises, for there was no memory, say.

    It is such that an error leaves it undone, or that it may be done twice. The error itself has given some
    memory back.

    Examples
    --------
    >>> left = [3]
    >>> firmly(left.pop)
    3
    """
    try:
        return function(*args)
    except Exception:
        return function(*args)


__all__ = ["firmly"]
