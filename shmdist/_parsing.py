"""Parses Python's own text while other threads may do so too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")
_TRIES = 100 if sys.version_info < (3, 11, 8) else 1  # a few are enough: the other thread is soon through


def parsing(function: Callable[[Any], _T], what: object) -> _T:
    """Return ``function(what)``, which parses: ``ast.parse``, or ``inspect.signature`` of what C defines.

    CPython before 3.11.8 keeps the depth of the tree in one place for all threads. When the collector runs
    while a tree is made, another thread may make one meanwhile, and the first ends in a SystemError.
    """
    for _ in range(_TRIES - 1):
        try:
            return function(what)
        except SystemError:
            pass
    return function(what)


__all__ = ["parsing"]
