"""Finds the part of an object that cannot be pickled, and the path to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import (
    CodeType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
)
from typing import Any

from shmdist.errors import SerializationError
from shmdist.serialization.stdlib_reducers import cells, implementations
from shmdist.serialization.unsendable import Unsendable, refusal

_MOST = 2000  # objects looked at; a huge structure gets a shorter path instead of a long wait
_DEEPEST = 30
_LEFT_OUT = frozenset({"__dict__", "__weakref__", "_abc_impl"})  # of a class that goes by value

Check = Callable[[Any], BaseException | None]


def explain(obj: Any, what: str, error: BaseException, check: Check, at: str = "") -> SerializationError:
    """Return the error that names the part at fault inside `obj`.

    Parameters
    ----------
    obj : object
        What could not be pickled.  A ``(f, args, kwargs)`` tuple is named as a call, and the
        operand of an operation on a reference as a value.  Where the runtime has put something
        around what the user gave, that has a method ``_named_parts``, as `_parts` below.
    what : str
        What it is, for the text.
    error : BaseException
        The pickler's own error.
    check : callable
        Returns the error of pickling a part, None when the part can be sent.
    at : str
        How the path begins.
    """
    if what.startswith("the call"):
        parts = _call_parts(obj)
    elif what == "the value":
        parts = iter([("the value", obj[2])])
    elif hasattr(type(obj), "_named_parts"):
        parts, at = obj._named_parts(), ""
    else:
        parts = _parts(obj)
    path, part, reason = _descend(obj, error, check, parts)
    kind = type(part)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = f"{type(reason).__name__}: {reason}"
    except Exception:  # its __str__ is the user's
        text = type(reason).__name__
    part = "a part of it" if path else "it"
    cure = "; make that on the worker, or send what it is made from"
    if kind is GeneratorType:
        cure = "; a generator runs where it was made: make a list of it, list(...)"
    if type(reason) is Unsendable:
        text, cure = str(reason), ""
    return SerializationError(
        f"{what} cannot be sent, for {part} cannot be pickled ({text}){cure}",
        path=at + path or None,
        obj_type=name,
    )


def _descend(
    obj: Any, error: BaseException, check: Check, parts: Iterator[tuple[str, Any]]
) -> tuple[str, Any, BaseException]:
    """Follow the first part that cannot be sent, down to one all of whose parts can."""
    path = ""
    seen: set[int] = set()
    budget = itertools.repeat(None, _MOST)
    while id(obj) not in seen and len(seen) < _DEEPEST and refusal(type(obj)) is None:
        seen.add(id(obj))
        try:
            for (step, part), _ in zip(parts, budget, strict=False):
                found = check(part)
                if found is not None:
                    path, obj, error = path + step, part, found
                    break
            else:
                break
        except Exception:
            break  # a repr, an attribute, an iteration of the user's object: the way ends before it
        parts = _parts(obj)
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
        for kind, function in implementations(obj).items():  # `singledispatch`
            yield f".dispatch({kind.__qualname__})", function
        for name, cell in zip(obj.__code__.co_freevars, cells(obj), strict=False):
            try:
                yield f" captures {name}", cell.cell_contents
            except ValueError:
                continue  # an empty cell
        for index, value in enumerate(obj.__defaults__ or ()):
            yield f".__defaults__[{index}]", value
        for name in _names(obj.__code__):
            if name in obj.__globals__:
                yield f" uses global {name}", obj.__globals__[name]
    elif isinstance(obj, type):
        for name, value in vars(obj).items():
            if name not in _LEFT_OUT and not isinstance(value, (GetSetDescriptorType, MemberDescriptorType)):
                yield f".{name}", value
    else:
        if type(obj).__module__ == "functools" and hasattr(obj, "func"):  # partial
            yield ".func", obj.func
            yield from ((f".args{step}", part) for step, part in _parts(obj.args))
            yield from ((f".keywords{step}", part) for step, part in _parts(obj.keywords))
        if isinstance(obj, BaseException):
            yield from ((f".args{step}", part) for step, part in _parts(obj.args))
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict):
            for name, value in attributes.items():
                yield f".{name}", value
        for kind in type(obj).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(obj, name):
                    yield f".{name}", getattr(obj, name)
        yield ".__class__", type(obj)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that `code` and the functions inside it may look up as globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
