"""Takes exceptions apart into their fields, and rebuilds them without running code of their class.

A class may have a constructor whose parameters differ from ``args``, refuse to be changed, or hide what
it has behind properties. So everything here goes by the accessors of the built-in types, in C.
"""

from __future__ import annotations

import types

TYPE_CHECKING = False  # Not from typing: this file is on the start-up path of every worker.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: set for classes made by a class statement.
_FIELD_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
# The C-level accessors, taken once: a class may hide them behind properties of the same name.
_ARGS = vars(BaseException)["args"]
_DICT = vars(BaseException)["__dict__"]
_CAUSE = vars(BaseException)["__cause__"]
_CONTEXT = vars(BaseException)["__context__"]
_TRACEBACK = vars(BaseException)["__traceback__"]
_SUPPRESS = vars(BaseException)["__suppress_context__"]
_MRO = vars(type)["__mro__"]


class _Carried:
    """Pickles as the exception it holds, robustly even under a pickler without our reducer.

    `seen` maps ``id`` of an exception to what stands for it in this one pickle, so that the same
    exception twice stays one, and cycles end.
    """

    __slots__ = ("by_fields", "ex", "seen")

    def __init__(self, ex: BaseException, seen: dict[int, Any], *, by_fields: bool = False) -> None:
        self.ex: Any = ex
        self.seen = seen
        self.by_fields = by_fields

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickler asks once. This and `seen` are a ring, and the exception holds frames and all in them.
        ex, self.ex = self.ex, None
        reduced = reduce_exception(ex, self.seen, by_fields=self.by_fields)
        return ex.__reduce_ex__(protocol) if reduced is NotImplemented else reduced


def _carry(value: Any, seen: dict[int, Any]) -> Any:
    """Return `value` with the exceptions in it, also within tuples, lists and dicts, as `_Carried`."""
    kind = type(value)
    if issubclass(kind, BaseException):
        return seen.setdefault(id(value), _Carried(value, seen))
    if kind is tuple or kind is list:
        return kind(_carry(item, seen) for item in value)
    if kind is dict:
        return {key: _carry(item, seen) for key, item in value.items()}
    return value


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error, also to one that refuses changes.

    Examples
    --------
    >>> error = ValueError("boom")
    >>> add_note(error, "while reading")
    >>> error.__notes__
    ['while reading']
    """
    fields = _DICT.__get__(error)
    notes = fields.get("__notes__")
    fields["__notes__"] = [*notes, note] if isinstance(notes, list) else [note]


def drop_tracebacks(error: BaseException) -> None:
    """Let go of the frames that `error` and those it came of hold, and of all in them."""
    errors: list[BaseException | None] = [error]
    seen = set()
    while errors:
        each = errors.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        _TRACEBACK.__set__(each, None)
        errors += [_CAUSE.__get__(each), _CONTEXT.__get__(each)]
        group = _group_arguments(each)
        if group is not None:
            errors += group[1]
        captured = _DICT.__get__(each).get("_shmdist_captured")
        if captured is not None:
            errors.append(captured.ex)


def reduce_exception(
    exc: BaseException, seen: dict[int, Any] | None = None, *, by_fields: bool = False
) -> Any:
    """Pickle reducer for exceptions that have no pickling of their own.

    For ``Pickler.reducer_override``.  The standard way calls the class with ``args``, which fails
    on loading for every constructor whose parameters differ, and drops slots and ``__cause__``.
    ``seen`` is for calls from within; with ``by_fields`` pickling of the class's own is passed by.

    Returns
    -------
    tuple or NotImplemented
        A reduce tuple with the state in third place and its setter in sixth (pickled once the
        object is known, so that cycles through ``__cause__`` end); `NotImplemented` where the
        standard way, or the class's own, loses nothing.

    Examples
    --------
    >>> class Odd(Exception):
    ...     def __init__(self, a, b):
    ...         super().__init__(f"{a} and {b}")
    >>> make, arguments, *_ = reduce_exception(Odd(1, 2))
    >>> make(*arguments)
    Odd('1 and 2')
    >>> reduce_exception(ValueError("x"))
    NotImplemented
    """
    cls = type(exc)
    if not by_fields and not _has_builtin_pickling(cls):
        return _reduce_own(exc, {id(exc): exc} if seen is None else seen)
    state: dict[str, Any] = {"dict": dict(_DICT.__get__(exc)), "fields": _fields(exc)}
    # Python leaves it out of pickles as well: any object at all, of any size.
    if issubclass(cls, AttributeError):
        state["fields"].pop("obj", None)
    cause, suppress = _CAUSE.__get__(exc), _SUPPRESS.__get__(exc)
    if cause is not None or suppress:
        state["cause"], state["suppress"] = cause, suppress
    if not by_fields and not cls.__flags__ & _HEAP_TYPE and len(state) == 2 and not state["fields"]:
        return NotImplemented
    seen = {id(exc): exc} if seen is None else seen
    arguments = _carry((cls, _ARGS.__get__(exc), _group_arguments(exc)), seen)
    return rebuild_exception, arguments, _carry(state, seen), None, None, _set_state


def _reduce_own(exc: BaseException, seen: dict[int, Any]) -> Any:
    """Reduce an exception whose class pickles itself, which leaves out its notes and its cause."""
    notes, cause = _DICT.__get__(exc).get("__notes__"), _CAUSE.__get__(exc)
    if notes is None and cause is None and not _SUPPRESS.__get__(exc):
        return NotImplemented
    reduced = exc.__reduce_ex__(5)
    if type(reduced) is not tuple or any(reduced[3:5]):
        return NotImplemented
    parts: tuple[Any, ...] = reduced
    make, arguments, state, _, _, set_own = parts + (None,) * (6 - len(parts))
    around = {"suppress": _SUPPRESS.__get__(exc)}
    if notes is not None:
        around["dict"] = {"__notes__": notes}
    if cause is not None:
        around["cause"] = cause
    return make, arguments, (state, set_own, _carry(around, seen)), None, None, _set_own


def _set_own(exc: BaseException, state: Any) -> None:
    """Set what the class wants set, then notes and cause."""
    own, set_own, around = state
    if set_own is not None:
        set_own(exc, own)
    elif own is not None:
        exc.__setstate__(own)
    _DICT.__get__(exc).update(around.get("dict", {}))
    if "cause" in around:
        _CAUSE.__set__(exc, around["cause"])
    _SUPPRESS.__set__(exc, around["suppress"])


def _has_builtin_pickling(cls: type) -> bool:
    def inherits(name: str) -> bool:
        owner = next(klass for klass in _MRO.__get__(cls) if name in vars(klass))
        return owner.__module__ == "builtins" and not owner.__flags__ & _HEAP_TYPE

    return inherits("__reduce__") and inherits("__reduce_ex__") and inherits("__setstate__")


def rebuild_exception(
    cls: type[BaseException], args: tuple[Any, ...], group: tuple[Any, ...] | None = None
) -> BaseException:
    """Make an exception of a given type and ``args`` without running its constructor.

    ``group`` is message and exceptions, for the types of exception groups.

    Examples
    --------
    >>> rebuild_exception(KeyError, ("a",))
    KeyError('a')
    """
    exc: BaseException = _allocate(cls, group or ())
    _ARGS.__set__(exc, args)
    return exc


def _allocate(cls: type[BaseException], arguments: Sequence[Any]) -> Any:
    """Make an instance with the ``__new__`` of the built-in type that fixes its memory layout."""
    for klass in _MRO.__get__(cls):
        new = vars(klass).get("__new__")
        if isinstance(new, types.BuiltinMethodType):
            try:
                made = new(cls, *arguments)
                if issubclass(cls, StopIteration):  # C code reads its value without a look whether it has one
                    StopIteration.__init__(made)
                return made
            except TypeError:  # Another base has the larger layout; its turn comes.
                continue
    raise TypeError(f"no built-in base of {cls.__name__} can make an instance of it")


def _field_descriptors(cls: type) -> Iterator[tuple[type, str, Any]]:
    for klass in _MRO.__get__(cls):
        # What these three hold travels separately, and a group's members are read-only.
        if klass not in (BaseException, BaseExceptionGroup, object):
            for name, descriptor in vars(klass).items():
                if isinstance(descriptor, _FIELD_DESCRIPTORS) and name not in ("__dict__", "__weakref__"):
                    yield klass, name, descriptor


def _fields(exc: BaseException) -> dict[str, Any]:
    """Values of slots, and of members kept in C such as ``errno``; by name, unset ones left out."""
    found: dict[str, Any] = {}
    for klass, name, descriptor in _field_descriptors(type(exc)):
        try:
            value = descriptor.__get__(exc, klass)
        except Exception:  # An empty slot.
            continue
        # Unset C members read as None, but setting None is not the same: OSError would print it.
        if name not in found and (value is not None or klass.__flags__ & _HEAP_TYPE):
            found[name] = value
    return found


def _set_state(exc: BaseException, state: Mapping[str, Any]) -> None:
    _DICT.__get__(exc).update(state["dict"])
    fields = dict(state["fields"])
    for _klass, name, descriptor in _field_descriptors(type(exc)) if fields else ():
        if name in fields:
            try:
                descriptor.__set__(exc, fields.pop(name))
            except (AttributeError, TypeError):  # Read-only: its value came with the allocation.
                continue
    if "cause" in state:
        _CAUSE.__set__(exc, state["cause"])
        _SUPPRESS.__set__(exc, state["suppress"])


def _group_arguments(exc: BaseException) -> tuple[str, list[BaseException]] | None:
    # Not isinstance(), here and above: it asks the instance, whose __getattribute__ may be the user's.
    if issubclass(type(exc), BaseExceptionGroup):
        group: Any = BaseExceptionGroup
        return group.message.__get__(exc), list(group.exceptions.__get__(exc))
    return None


__all__ = ["add_note", "drop_tracebacks", "rebuild_exception", "reduce_exception"]
