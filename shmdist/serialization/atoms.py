"""Atoms: plain values and tuples of them, written by :mod:`marshal` in a quarter of a pickle's time.

Most arguments and results of short calls are numbers, and to pickle them takes as long as to send them.
They are written by ``marshal.dumps(value, FORMAT)``, which takes these types alone and no kinds of them. What
it writes begins with no `PICKLE`, as all other bodies do; so who reads looks at the first byte.

It is the second version of marshal's format, which all Pythons from 2.5 on read: floats in binary, and
nothing in it that refers to anything.  To read it is no safer than to read a pickle, and no less safe:
either comes from a process that has shown that it knows the cookie.
"""

from __future__ import annotations

import marshal
import pickle
from typing import Any

#: Types that no rule of ours concerns; marshal can write them all.
ATOMS = frozenset({int, float, str, type(None), bool, bytes, complex})
FORMAT = 2
PICKLE = 0x80  # the first byte of every pickle of protocol 2 and later
TUPLE = ord("(")  # that of a tuple as marshal writes it


def loads(body: Any) -> Any:
    """Read an atom, or a pickle."""
    return pickle.loads(body) if body[0] == PICKLE else marshal.loads(body)
