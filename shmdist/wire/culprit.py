"""Finding what cannot be sent inside an object, and the path that leads to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

from shmdist.errors import SerializationError

_MOST = 2000  # objects looked at; a huge structure gets a shorter path instead of a long wait
_DEEPEST = 30

Check = Callable[[Any], BaseException | None]


def explain(obj: Any, what: str, error: BaseException, check: Check) -> SerializationError:
    """Return the error that names the culprit inside `obj`.

    Parameters
    ----------
    obj : object
        What could not be pickled.  A ``(f, args, kwargs)`` tuple is named as a call.
    what : str
        What it is, for the text.
    error : BaseException
        The pickler's own error.
    check : callable
        Returns the error of pickling a part, None when the part can be sent.
    """
    budget = [_MOST]
    path, culprit, reason = _descend(obj, "", error, check, budget, set(), is_call=what.startswith("the call"))
    kind = type(culprit)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    place = f"{path} " if path else ""
    return SerializationError(
        f"{what} cannot be sent: {place}(a {name}) cannot be pickled: {type(reason).__name__}: {reason}. "
        f"Make it on the worker, or send what it is made from.",
        path=path,
        obj_type=name,
    )


def _descend(
    obj: Any, path: str, error: BaseException, check: Check, budget: list[int], seen: set[int], *, is_call: bool = False
) -> tuple[str, Any, BaseException]:
    """Follow the first part that cannot be sent, down to one all of whose parts can."""
    if id(obj) in seen or len(seen) > _DEEPEST:
        return path, obj, error
    seen.add(id(obj))
    for step, part in _call_parts(obj) if is_call else _parts(obj):
        budget[0] -= 1
        if budget[0] < 0:
            break
        found = check(part)
        if found is not None:
            return _descend(part, path + step, found, check, budget, seen)
    return path, obj, error


def _call_parts(call: Any) -> Iterator[tuple[str, Any]]:
    function, args, kwargs = call
    yield "function", function
    for index, value in enumerate(args):
        yield f"args[{index}]", value
    for key, value in kwargs.items():
        yield f"argument {key}", value


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of `obj` with the step that leads to each."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{key!r:.60}]", value
        for key in obj:
            yield f" key {key!r:.60}", key
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield f"[{index}]", value
    elif isinstance(obj, (set, frozenset)):
        for value in obj:
            yield f" member {value!r:.60}", value
    elif isinstance(obj, MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=False):
            try:
                yield f" captures {name}", cell.cell_contents
            except ValueError:
                continue  # an empty cell
        for index, value in enumerate(obj.__defaults__ or ()):
            yield f".__defaults__[{index}]", value
        for name in obj.__code__.co_names:
            if name in obj.__globals__:
                yield f" uses global {name}", obj.__globals__[name]
    else:
        if type(obj).__module__ == "functools" and hasattr(obj, "func"):  # partial
            yield ".func", obj.func
            yield from ((f".args{step}", part) for step, part in _parts(obj.args))
            yield from ((f".keywords{step}", part) for step, part in _parts(obj.keywords))
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(obj, type):
            for name, value in attributes.items():
                yield f".{name}", value
