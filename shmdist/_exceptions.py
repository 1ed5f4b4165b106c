"""How exceptions travel between processes.

An exception that leaves its process must survive three things that pickling alone does not: a
constructor whose parameters differ from ``args``, a ``__str__`` that fails, and the loss of its
traceback.  So three steps are kept apart:

1. `capture`, where it was raised: the text is made there, once, while the frames still exist.
2. `_rebuilding.reduce_exception`, in the pickler: it is rebuilt from its fields; no constructor runs.
3. `remote_exception`, where it is seen: an instance of `RemoteException` *and* of the original type.

No code of the user's exception class (``__new__``, ``__init__``, ``__setattr__``,
``__init_subclass__``) runs in steps 2 and 3: what a constructor does besides storing its arguments
(registering, logging, opening) happened in the process that raised, and must not happen again here.
"""

from __future__ import annotations

import weakref

from shmdist._rebuilding import (
    _ARGS,
    _CAUSE,
    _DICT,
    _HEAP_TYPE,
    _MRO,
    _TRACEBACK,
    _allocate,
    _Carried,
    _carry,
    _field_descriptors,
    _fields,
    _group_arguments,
    _has_builtin_pickling,
    _set_state,
    rebuild_exception,
)
from shmdist._tracebacks import end_of, format_error, users_part

TYPE_CHECKING = False  # Not from typing: this file is on the start-up path of every worker.
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = [
    "CapturedException",
    "RemoteException",
    "ShmdistError",
    "capture",
    "join_tracebacks",
    "local_exception",
    "remote_exception",
]

_FIELD_NAMES = ("_shmdist_pid", "_shmdist_captured")
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
# Python takes these for the end of an iterator: `for`, `yield from` and `await` would swallow the error.
_ENDS_OF_ITERATION = (StopIteration, StopAsyncIteration)


class ShmdistError(Exception):
    """Root of the exceptions that shmdist itself raises.

    Fields live in the instance dictionary, so one ``__reduce__`` serves every subclass, whatever
    its constructor takes.

    Examples
    --------
    >>> issubclass(ChannelClosed, ShmdistError)
    True
    """

    __module__ = "shmdist"

    def __reduce__(self) -> tuple[Any, ...]:
        seen: dict[int, Any] = {id(self): self}
        state = _carry(dict(self.__dict__), seen)
        if self.__cause__ is not None:
            state["__cause__"] = _carry(self.__cause__, seen)
        return rebuild_exception, _carry((type(self), self.args, _group_arguments(self)), seen), state or None

    # Not by __reduce__: what that wraps is unwrapped by a pickler only.
    def __copy__(self) -> BaseException:
        other = rebuild_exception(type(self), self.args, _group_arguments(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: object) -> BaseException:
        return self.__copy__()  # Exceptions held are shared: they are facts, not data to edit.


class CapturedException:
    """What is kept of an exception when it leaves its process; treat it as immutable.

    Parameters
    ----------
    ex : BaseException
        The original, or a stand-in where the original could not be sent.
    type_name, message : str
        Name of its type (with the module, unless built-in or of ``__main__``), and its ``str()``.
    traceback_text : str
        Its traceback, causes included, as the process that raised it would print it.

    Examples
    --------
    >>> from shmdist.errors import capture
    >>> capture(KeyError("a"))
    CapturedException(KeyError: 'a')
    """

    __module__ = "shmdist"
    __slots__ = ("ex", "message", "traceback_text", "type_name")

    def __init__(self, ex: BaseException, type_name: str, message: str, traceback_text: str) -> None:
        self.ex = ex
        self.type_name = type_name
        self.message = message
        self.traceback_text = traceback_text

    def __repr__(self) -> str:
        return f"CapturedException({self.type_name}: {_shorten(self.message)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedException, (_carry(self.ex, {}), self.type_name, self.message, self.traceback_text)

    def __copy__(self) -> CapturedException:
        return self

    def __deepcopy__(self, memo: object) -> CapturedException:
        return self

    def stand_in(self) -> CapturedException:
        """Return a copy that any pickler takes, for when ``ex`` cannot be sent.

        Its ``ex`` has the nearest built-in type (no group) and the message; the texts stay.

        Examples
        --------
        >>> from shmdist.errors import capture
        >>> capture(ModuleNotFoundError("no foo", name=lambda: 0)).stand_in().ex
        ModuleNotFoundError('no foo')
        """
        base: Any = next(
            c
            for c in _MRO.__get__(type(self.ex))
            if not c.__flags__ & _HEAP_TYPE and not issubclass(c, BaseExceptionGroup)
        )
        ex = rebuild_exception(base, (self.message,))
        own = {name for _, name, _ in _field_descriptors(base)}
        fields = {
            name: value for name, value in _fields(self.ex).items() if name in own and type(value) in _ATOMS
        }
        _set_state(ex, {"dict": {}, "fields": fields})
        return CapturedException(ex, self.type_name, self.message, self.traceback_text)

    def by_fields(self, sendable: Callable[[Any], bool]) -> CapturedException:
        """Return a copy that is pickled by its fields, whatever pickling its class has of its own.

        Parameters
        ----------
        sendable : callable
            Tells of a value whether it can be sent. Fields that cannot are left out.
        """
        ex = self.ex
        if issubclass(type(ex), RemoteException):
            inner: CapturedException = _DICT.__get__(ex)["_shmdist_captured"]
            added = {name: value for name, value in _added(ex).items() if sendable(value)}  # type: ignore[arg-type]  # is one
            again = _remade(_DICT.__get__(ex)["_shmdist_pid"], inner.by_fields(sendable), added)
            return CapturedException(again, self.type_name, self.message, self.traceback_text)
        group = _group_arguments(ex)
        if group is not None:
            members = [e if sendable(e) else capture(e).stand_in().ex for e in group[1]]
            group = group[0], members
        args = (value if sendable(value) else _safe_repr(value) for value in _ARGS.__get__(ex))
        other = rebuild_exception(type(ex), tuple(args), group)
        state: dict[str, Any] = {
            "dict": {name: value for name, value in _DICT.__get__(ex).items() if sendable(value)},
            "fields": {name: value for name, value in _fields(ex).items() if sendable(value)},
        }
        cause = _CAUSE.__get__(ex)
        if cause is not None and sendable(cause):
            state["cause"], state["suppress"] = cause, True
        _set_state(other, state)
        return _ByFields(other, self.type_name, self.message, self.traceback_text)

    @property
    def has_own_pickling(self) -> bool:
        """Whether the class of ``ex`` pickles itself, in a way that may fail where it is read."""
        kind = type(self.ex)
        if issubclass(kind, RemoteException):
            inner: CapturedException = _DICT.__get__(self.ex)["_shmdist_captured"]
            return inner.has_own_pickling
        return not _has_builtin_pickling(kind)


class _ByFields(CapturedException):
    """Is pickled as a `CapturedException` whose ``ex`` is rebuilt from its fields."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        carried = _Carried(self.ex, {id(self.ex): self.ex}, by_fields=True)
        return CapturedException, (carried, self.type_name, self.message, self.traceback_text)


class RemoteException(ShmdistError):
    """An exception that a remote call raised.

    What a failed call raises is made by `remote_exception` and is an instance of this class and of
    the original type as well: ``except ValueError`` and ``except RemoteException`` both catch it.
    Where the original is no `Exception` (``KeyboardInterrupt``, ``SystemExit``), ends iterations
    (``StopIteration``, ``StopAsyncIteration``), or its type cannot be subclassed, it is a
    `RemoteException` alone.

    Parameters
    ----------
    pid : int
        Process that raised it; 0 where that is not known.
    captured : CapturedException
        The original and its traceback text.

    Notes
    -----
    Fields of the original (``errno``, ``filename``, ...) are fields of this; where one of them is
    called ``pid`` or ``captured``, this class's wins and the original's is at ``captured.ex``.

    References
    ----------
    Julia manual, `RemoteException` in "Distributed Computing".

    Examples
    --------
    >>> from shmdist.errors import capture, remote_exception
    >>> error = remote_exception(3, capture(FileNotFoundError(2, "no such file", "a.txt")))
    >>> isinstance(error, RemoteException), isinstance(error, FileNotFoundError)
    (True, True)
    >>> error.pid, error.errno, error.filename
    (3, 2, 'a.txt')
    """

    __module__ = "shmdist"

    def __init__(self, pid: int, captured: CapturedException) -> None:
        super().__init__()
        self._assign(pid, captured)

    def __init_subclass__(cls) -> None:
        # Does not go on to the next class: in a two-faced class that is the user's hook.
        pass

    # The original type may refuse changes. But what raises an error again sets its traceback, and what
    # passes it on adds notes to it.
    __setattr__ = BaseException.__setattr__
    __delattr__ = BaseException.__delattr__

    def _assign(self, pid: int, captured: CapturedException) -> None:
        _ARGS.__set__(self, _ARGS.__get__(captured.ex))
        fields = _DICT.__get__(self)
        fields["_shmdist_pid"] = pid
        fields["_shmdist_captured"] = captured

    @property
    def pid(self) -> int:
        """Process that raised it."""
        value: int = _DICT.__get__(self)["_shmdist_pid"]
        return value

    @property
    def captured(self) -> CapturedException:
        """The original and its traceback text."""
        value: CapturedException = _DICT.__get__(self)["_shmdist_captured"]
        return value

    def __str__(self) -> str:
        captured = self.captured
        where = f"process {self.pid}" if self.pid else "an unnamed process"
        return (
            f"{captured.message or captured.type_name}\n\n"
            f"Raised on {where} (as {captured.type_name}):\n{captured.traceback_text.rstrip()}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pid}, {_shorten(self.captured.message)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        added = _carry(_added(self), {id(self): self})
        return _remade, (self.pid, self.captured, added) if added else (self.pid, self.captured)

    # Both, and the copies too: the original type may define any of them for itself.
    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()

    def __copy__(self) -> RemoteException:
        return _remade(self.pid, self.captured, _added(self))

    def __deepcopy__(self, memo: object) -> RemoteException:
        return _remade(self.pid, self.captured, _added(self))


def _added(error: RemoteException) -> dict[str, Any]:
    """Return what was set on an error after it was made: notes, and attributes such as ``index``."""
    fields = _DICT.__get__(error)
    original = _DICT.__get__(fields["_shmdist_captured"].ex)
    return {
        name: list(value) if name == "__notes__" and isinstance(value, list) else value
        for name, value in fields.items()
        if name not in _FIELD_NAMES and not (name in original and _same(original[name], value))
    }


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) is list and len(a) == len(b) and all(map(_is, a, b)))


def _is(a: Any, b: Any) -> bool:
    return a is b


def _remade(pid: int, captured: CapturedException, added: Mapping[str, Any] | None = None) -> RemoteException:
    """Make the error of `remote_exception` again, with what was set on it."""
    error = remote_exception(pid, captured)
    if added:
        _DICT.__get__(error).update(added)
    return error


# Original type -> its two-faced class, so that the same error twice has one type.  Values are weak:
# a class that a notebook redefines a thousand times must not stay alive for our sake.  Unlocked: of
# two threads that race, the later class replaces the earlier, and both are right.
_two_faced: weakref.WeakValueDictionary[Any, type[RemoteException]] = weakref.WeakValueDictionary()


def remote_exception(pid: int, captured: CapturedException) -> RemoteException:
    """Make the exception that the caller of a failed remote call sees.

    Parameters
    ----------
    pid : int
        Process that raised it.
    captured : CapturedException
        What that process sent.

    Returns
    -------
    RemoteException
        Also an instance of the type of ``captured.ex`` where that type is an `Exception` and can
        be combined; a `RemoteException` alone otherwise.  Where the original is a
        `RemoteException` already, its class is used again and ``pid`` is the nearer process.

    Examples
    --------
    >>> error = remote_exception(2, capture(ZeroDivisionError("division by zero")))
    >>> type(error).__name__, str(error).splitlines()[0]
    ('RemoteException[ZeroDivisionError]', 'division by zero')
    """
    for guarded in (False, True):
        try:
            return _make_two_faced(pid, captured, guarded)
        except Exception:  # Whatever a hostile class does, the error itself must be told.
            continue
    return RemoteException(pid, captured)


def _make_two_faced(pid: int, captured: CapturedException, guarded: bool) -> RemoteException:
    """Make the exception of both types; `guarded` against attribute access of the original type's own."""
    ex = captured.ex
    cls = _two_faced_class(type(ex), guarded)
    if cls is RemoteException:
        return RemoteException(pid, captured)
    error = _allocate(cls, _group_arguments(ex) or ())
    _set_state(error, {"dict": dict(_DICT.__get__(ex)), "fields": _fields(ex)})
    assert isinstance(error, RemoteException)
    error._assign(pid, captured)
    notes = error.__dict__.get("__notes__")
    if isinstance(notes, list):  # add_note() here must not reach into the original.
        error.__dict__["__notes__"] = list(notes)
    assert error.pid == pid and error.captured is captured
    return error


def _two_faced_class(original: type[BaseException], guarded: bool) -> type[RemoteException]:
    mro = _MRO.__get__(original)
    if RemoteException in mro:
        return original  # type: ignore[return-value]  # is one
    if Exception not in mro or any(kind in mro for kind in _ENDS_OF_ITERATION):
        return RemoteException
    cls = _two_faced.get((original, guarded))
    if cls is None:
        cls = _two_faced[original, guarded] = _combine(original, guarded)
    return cls


def _combine(original: type[BaseException], guarded: bool) -> type[RemoteException]:
    """Make the class of both; `RemoteException` itself where none is possible."""
    name = f"RemoteException[{original.__name__}]"
    namespace: dict[str, object] = {
        "__module__": "shmdist",
        "__qualname__": name,
        "__doc__": RemoteException.__doc__,
    }
    if guarded:
        namespace["__getattribute__"] = BaseException.__getattribute__
    metaclass: Any = type(original)
    bases = RemoteException, original
    # A metaclass may refuse subclasses or return something else; then it is passed by.
    for make in (metaclass, lambda *definition: type.__new__(metaclass, *definition)):
        try:
            cls: Any = make(name, bases, dict(namespace))
            mro = _MRO.__get__(cls)
        except Exception:  # A final C type, say.
            continue
        if RemoteException in mro and original in mro:
            return cls  # type: ignore[no-any-return]  # was looked at
    return RemoteException


def local_exception(pid: int, error: BaseException) -> BaseException:
    """Make the exception that the caller sees of a call that failed in his own process, `pid`.

    Its traceback goes on into that of `error`: a debugger lands in the user's own frame, and there is no
    cause that would tell the same again.

    Returns
    -------
    BaseException
        As of `remote_exception`. An error that has passed such a call of this process before stays
        itself: so n calls within each other have the text of one. `error` itself where there is no
        room on the stack; a caller further up has it.

    Examples
    --------
    >>> error = local_exception(1, ValueError("boom"))
    >>> isinstance(error, ValueError), isinstance(error, RemoteException), error.pid
    (True, True, 1)
    """
    try:
        if _went_on(error) and _DICT.__get__(error)["_shmdist_pid"] == pid:
            return error
        captured = capture(error)
        try:
            made = _make_two_faced(pid, captured, guarded=False)
        except RecursionError:
            return error
        except Exception:
            made = remote_exception(pid, captured)
        join_tracebacks(made)
        return made
    except RecursionError:
        return error


def join_tracebacks(error: BaseException) -> None:
    """Let the traceback of an error that was raised on this process be that of its original."""
    original = _DICT.__get__(error)["_shmdist_captured"].ex
    _TRACEBACK.__set__(error, users_part(_TRACEBACK.__get__(original)))


def _went_on(error: BaseException) -> bool:
    """Return whether `error` is a RemoteException whose traceback ends where that of the original does."""
    if not issubclass(type(error), RemoteException):
        return False
    original = _DICT.__get__(error)["_shmdist_captured"].ex
    last = end_of(_TRACEBACK.__get__(error))
    return last is not None and last is end_of(_TRACEBACK.__get__(original))


def capture(exc: BaseException, *, skip_internal: bool = True) -> CapturedException:
    """Keep an exception and the text of its traceback; never raises.

    Parameters
    ----------
    exc : BaseException
        The exception, with its traceback still attached.
    skip_internal : bool
        Leave out the leading frames that belong to the machinery which called the user's function.
        They stay where there are no other frames.

    Returns
    -------
    CapturedException
        With ``ex`` being `exc` itself.

    Examples
    --------
    >>> captured = capture(ValueError("boom"))
    >>> captured.type_name, captured.message
    ('ValueError', 'boom')
    """
    shown, tb = exc, _TRACEBACK.__get__(exc)
    if _went_on(exc):  # Its traceback shows all that the text of the original does.
        exc = _kept(exc, _DICT.__get__(exc)["_shmdist_captured"].ex)
        shown = _DICT.__get__(shown)["_shmdist_captured"].ex
    if issubclass(type(shown), RemoteException):  # Named after what first went wrong, not after each hop.
        inner: CapturedException = _DICT.__get__(shown)["_shmdist_captured"]
        type_name, message = inner.type_name, inner.message
        if issubclass(type(inner.ex), RemoteException):
            exc = _kept(exc, inner.ex)
    else:
        type_name, message = _type_name(type(shown)), _safe_str(shown)
    text = format_error(shown, tb, f"{type_name}: {message}", full=not skip_internal)
    return CapturedException(exc, type_name, message, text)


def _kept(error: BaseException, original: BaseException) -> BaseException:
    """Return what is to be kept of `error`: its original, unless that would lose what was set on it."""
    # Not isinstance(), here and below: it asks the instance, whose __getattribute__ may be the user's.
    if not issubclass(type(error), RemoteException):
        return error
    added = _added(error)  # type: ignore[arg-type]  # is one
    if not added:
        return original
    if not issubclass(type(original), RemoteException):
        return error
    assert isinstance(original, RemoteException)
    return _remade(original.pid, original.captured, {**_added(original), **added})


def _type_name(cls: type) -> str:
    try:
        module = cls.__module__
    except Exception:  # Of a metaclass that guards it.
        return str(vars(type)["__name__"].__get__(cls))
    return cls.__qualname__ if module in ("builtins", "__main__") else f"{module}.{cls.__qualname__}"


def _safe_str(exc: object) -> str:
    try:
        return str(exc)
    except BaseException:  # __str__ is user code; even SystemExit from it must not hide the error.
        return f"<str() of this {type(exc).__name__} failed>"


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except BaseException:  # As above.
        return f"<repr() of this {type(value).__name__} failed>"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
