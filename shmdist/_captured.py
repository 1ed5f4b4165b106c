"""How exceptions travel between processes.

An exception that leaves its process must survive three things that pickling alone does not: a
constructor whose parameters differ from ``args``, a ``__str__`` that fails, and the loss of its
traceback.  So three steps are kept apart:

1. `capture`, where it was raised: the text is made there, once, while the frames still exist.
2. `reduce_exception`, in the pickler: the instance is rebuilt from its fields; no constructor runs.
3. `remote_exception`, where it is seen: an instance of `RemoteException` *and* of the original type.

No code of the user's exception class (``__new__``, ``__init__``, ``__setattr__``,
``__init_subclass__``) runs in steps 2 and 3: what a constructor does besides storing its arguments
(registering, logging, opening) happened in the process that raised, and must not happen again here.
"""

from __future__ import annotations

import os
import types
import weakref

TYPE_CHECKING = False  # Not from typing: this file is on the start-up path of every worker.
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

__all__ = [
    "CapturedException",
    "RemoteException",
    "ShmdistError",
    "capture",
    "rebuild_exception",
    "reduce_exception",
    "remote_exception",
]

_RUNTIME_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "runtime") + os.sep
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: set for classes made by a class statement.
_FIELD_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
# The C-level accessors, taken once: a class may hide them behind properties of the same name.
_ARGS = vars(BaseException)["args"]
_DICT = vars(BaseException)["__dict__"]
_CAUSE = vars(BaseException)["__cause__"]
_SUPPRESS = vars(BaseException)["__suppress_context__"]


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
            for c in type(self.ex).__mro__
            if not c.__flags__ & _HEAP_TYPE and not issubclass(c, BaseExceptionGroup)
        )
        ex = rebuild_exception(base, (self.message,))
        return CapturedException(ex, self.type_name, self.message, self.traceback_text)


class _Carried:
    """Pickles as the exception it holds, robustly even under a pickler without our reducer.

    `seen` maps ``id`` of an exception to what stands for it in this one pickle, so that the same
    exception twice stays one, and cycles end.
    """

    __slots__ = ("ex", "seen")

    def __init__(self, ex: BaseException, seen: dict[int, Any]) -> None:
        self.ex: Any = ex
        self.seen = seen

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickler asks once. This and `seen` are a ring, and the exception holds frames and all in them.
        ex, self.ex = self.ex, None
        reduced = reduce_exception(ex, self.seen)
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


class RemoteException(ShmdistError):
    """An exception that a remote call raised.

    What a failed call raises is made by `remote_exception` and is an instance of this class and of
    the original type as well: ``except ValueError`` and ``except RemoteException`` both catch it.
    Where the original is no `Exception` (``KeyboardInterrupt``, ``SystemExit``), or its type cannot
    be subclassed, it is a `RemoteException` alone.

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
        return remote_exception, (self.pid, self.captured)

    # Both, and the copies too: the original type may define any of them for itself.
    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()

    def __copy__(self) -> RemoteException:
        return remote_exception(self.pid, self.captured)

    def __deepcopy__(self, memo: object) -> RemoteException:
        return remote_exception(self.pid, self.captured)


# Original type -> its two-faced class, so that the same error twice has one type.  Values are weak:
# a class that a notebook redefines a thousand times must not stay alive for our sake.  Unlocked: of
# two threads that race, the later class replaces the earlier, and both are right.
_two_faced: weakref.WeakValueDictionary[type, type[RemoteException]] = weakref.WeakValueDictionary()


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
    try:
        cls = _two_faced_class(type(captured.ex))
        if cls is not RemoteException:
            error = _allocate(cls, _group_arguments(captured.ex) or ())
            _set_state(error, {"dict": dict(_DICT.__get__(captured.ex)), "fields": _fields(captured.ex)})
            assert isinstance(error, RemoteException)
            error._assign(pid, captured)
            notes = error.__dict__.get("__notes__")
            if isinstance(notes, list):  # add_note() here must not reach into the original.
                error.__dict__["__notes__"] = list(notes)
            if error.pid == pid and error.captured is captured:
                return error
    except Exception:  # Whatever a hostile class does, the error itself must be told.
        pass
    return RemoteException(pid, captured)


def _two_faced_class(original: type[BaseException]) -> type[RemoteException]:
    if issubclass(original, RemoteException):
        return original
    if not issubclass(original, Exception):
        return RemoteException
    cls = _two_faced.get(original)
    if cls is None:
        name = f"RemoteException[{original.__name__}]"
        namespace = {"__module__": "shmdist", "__qualname__": name, "__doc__": RemoteException.__doc__}
        metaclass: Any = type(original)
        try:
            cls = metaclass(name, (RemoteException, original), namespace)
            if cls is None or not (issubclass(cls, RemoteException) and issubclass(cls, original)):
                cls = RemoteException
        except Exception:  # A final C type, a metaclass that refuses: no class of both is possible.
            cls = RemoteException
        _two_faced[original] = cls
    return cls


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
    if issubclass(type(exc), RemoteException):  # Named after what first went wrong, not after each hop.
        inner: CapturedException = _DICT.__get__(exc)["_shmdist_captured"]
        type_name, message = inner.type_name, inner.message
    else:
        type_name, message = _type_name(type(exc)), _safe_str(exc)
    try:
        import traceback

        tb = exc.__traceback__
        while skip_internal and tb and tb.tb_frame.f_code.co_filename.startswith(_RUNTIME_FOLDER):
            tb = tb.tb_next
        lines = traceback.format_exception(type(exc), exc, tb or exc.__traceback__)
        text = "".join(lines)
    except Exception:
        text = f"{type_name}: {message}\n(the traceback could not be formatted)\n"
    return CapturedException(exc, type_name, message, text)


def _type_name(cls: type) -> str:
    module = cls.__module__
    return cls.__qualname__ if module in ("builtins", "__main__") else f"{module}.{cls.__qualname__}"


def _safe_str(exc: object) -> str:
    try:
        return str(exc)
    except BaseException:  # __str__ is user code; even SystemExit from it must not hide the error.
        return f"<str() of this {type(exc).__name__} failed>"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reduce_exception(exc: BaseException, seen: dict[int, Any] | None = None) -> Any:
    """Pickle reducer for exceptions that have no pickling of their own.

    For ``Pickler.reducer_override``.  The standard way calls the class with ``args``, which fails
    on loading for every constructor whose parameters differ, and drops slots and ``__cause__``.
    ``seen`` is for calls from within.

    Returns
    -------
    tuple or NotImplemented
        A reduce tuple with the state in third place and its setter in sixth (pickled once the
        object is known, so that cycles through ``__cause__`` end); `NotImplemented` where the
        class pickles itself in Python, or the standard way loses nothing.

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
    if not _has_builtin_pickling(cls):
        return NotImplemented
    state: dict[str, Any] = {"dict": dict(_DICT.__get__(exc)), "fields": _fields(exc)}
    # Python leaves it out of pickles as well: any object at all, of any size.
    if issubclass(cls, AttributeError):
        state["fields"].pop("obj", None)
    cause, suppress = _CAUSE.__get__(exc), _SUPPRESS.__get__(exc)
    if cause is not None or suppress:
        state["cause"], state["suppress"] = cause, suppress
    if not cls.__flags__ & _HEAP_TYPE and len(state) == 2 and not state["fields"]:
        return NotImplemented
    seen = {id(exc): exc} if seen is None else seen
    arguments = _carry((cls, _ARGS.__get__(exc), _group_arguments(exc)), seen)
    return rebuild_exception, arguments, _carry(state, seen), None, None, _set_state


def _has_builtin_pickling(cls: type) -> bool:
    def inherits(name: str) -> bool:
        owner = next(klass for klass in cls.__mro__ if name in vars(klass))
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
    for klass in cls.__mro__:
        new = vars(klass).get("__new__")
        if isinstance(new, types.BuiltinMethodType):
            try:
                return new(cls, *arguments)
            except TypeError:  # Another base has the larger layout; its turn comes.
                continue
    raise TypeError(f"no built-in base of {cls.__name__} can make an instance of it")


def _field_descriptors(cls: type) -> Iterator[tuple[type, str, Any]]:
    for klass in cls.__mro__:
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
