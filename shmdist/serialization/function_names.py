"""Calls of importable functions: the name, followed by the pickled arguments.

A pickle would say the same. But pickling a function by name means to import it each time, on
both sides, and that takes longer than all the rest of a short call. So functions seen to be
importable are noted here with their names, and names with where they were found.

The body is the length of the name in two bytes, module and name with a zero byte between
them, then the arguments: a tuple of atoms (``serialization.atoms``), or what ``arrays.rebuild_arguments``
reads. What ``everywhere`` has defined has no module, and the call that defined it behind its name
(``serialization.definitions``).
"""

from __future__ import annotations

import importlib
import marshal
import sys
from typing import Any

from shmdist.serialization import definitions
from shmdist.serialization.arrays import rebuild_arguments
from shmdist.serialization.atoms import TUPLE
from shmdist.serialization.modules import MAIN, goes_by_value

_MOST = 1000  # functions and names that are noted
#: By function the beginning of the body, the module's name and its own. A function that is not importable
#: any more (its module was reloaded, say) is found out when it is called.
#: No others are noted: a closure would be kept alive here, and what it captures.
_heads: dict[Any, tuple[bytes, str, str]] = {}
_found: dict[bytes, tuple[Any, str, str]] = {}  # module, its name, the function's name


def head(f: Any) -> bytes | None:
    """Return the beginning of the body of a call of `f`; None when it cannot go by name."""
    known = _heads.get(f)
    if known is not None:
        # As they were: those of a function in C are made anew each time that one asks for them.
        beginning, name, attribute = known
        if getattr(sys.modules.get(name), attribute, None) is f:
            return None if "cloudpickle.cloudpickle" in sys.modules and goes_by_value(name) else beginning
        _heads.pop(f, None)  # another thread may have found the same
        return None
    name, attribute = f.__module__ or "", f.__qualname__
    text = f"{name}\0{attribute}".encode()
    if name in MAIN:
        return definitions.head(f)
    if (
        len(text) >= 1 << 16
        or goes_by_value(name)
        or getattr(sys.modules.get(name), attribute, None) is not f
    ):
        return None
    if len(_heads) >= _MOST:
        _heads.clear()  # it keeps the functions alive, so it is kept short
    beginning = len(text).to_bytes(2, "little") + text
    _heads[f] = beginning, name, attribute
    return beginning


def load(body: bytes | bytearray) -> tuple[Any, Any, Any]:
    """Return function, arguments and keyword arguments of a call.

    Raises
    ------
    Exception
        The module cannot be imported, has no such function, or the arguments cannot be read.
    """
    if type(body) is not bytes:
        body = bytes(body)
    end = 2 + (body[0] | body[1] << 8)
    name = body[2:end]
    place = _found.get(name)
    if place is None or sys.modules.get(place[1]) is not place[0]:
        place = _find(name)
    try:
        function = getattr(place[0], place[2])
    except AttributeError:
        raise AttributeError(f"Can't get attribute {place[2]!r} on {place[0]!r}") from None
    if body[end] == TUPLE:
        return function, marshal.loads(body[end:]), {}
    return function, rebuild_arguments(body, end), {}


def _find(name: bytes) -> tuple[Any, str, str]:
    module, _, attribute = name.decode().partition("\0")
    if not module:
        return definitions.called(attribute.split("\0")), "", "value"
    if module.startswith("numpy."):
        importlib.import_module("numpy")  # the whole first, as in `codec.prepare`
    importlib.import_module(module)
    if len(_found) >= _MOST:
        _found.clear()
    place = _found[name] = sys.modules[module], module, attribute
    return place
