"""Checks that there is stack enough for what must not be broken off.

A RecursionError can come at any call, also where a worker is given back to its pool, or a count taken
back, because of one. So what lends a worker, or sends a reference, looks first. The interpreter has no
quick way to ask. From Python 3.12 on a frame so far up can be looked for (0.1 us); in 3.11 C code counts
as Python's does, and so does `isinstance` for nested tuples (0.3 us). That is too much for each call, and
little for these.
"""

from __future__ import annotations

import sys
from typing import Any

RESERVE = 60  # frames; a loan, a wait for it and the way back need about thirty

_name_of_frame = getattr(sys, "_getframemodulename", None)
_nested: Any = int
for _ in range(RESERVE):
    _nested = (_nested,)


def need_stack() -> None:
    """Raise a RecursionError unless `RESERVE` more calls may be made inside one another."""
    if _name_of_frame is None:
        isinstance(None, _nested)  # as deep as this
        return
    limit = sys.getrecursionlimit()
    if limit > 2 * RESERVE and _name_of_frame(limit - RESERVE) is not None:
        raise RecursionError("maximum recursion depth exceeded, nearly: too little is left for a remote call")


__all__ = ["RESERVE", "need_stack"]
