"""Functions that go by value, pickled once for many calls.

Pickling a function of ``__main__`` by value takes longer than all the rest of a short call: 40 us,
and several times that when it uses a large package, for then all modules are gone through. So the
bytes are kept, together with all that they were made from, and are used again while that is what
it was: code, defaults, closure, each global that the code names, and the same of the functions
that go by value among those. That is looked at in each call, for a function means what it means
when it is called.

Kept is only what cannot change behind its identity: numbers, texts, modules, and functions and
classes that go by name. A function that uses a list, an array, or an object of the user's is
pickled anew each time.

Each call gets a function of its own where it arrives, as if it had been pickled for that call:
what it does to its globals is gone with it.

The body of a call is the length of the function's pickle in four bytes, that pickle, and the
arguments as in ``serialization.function_names``.
"""

from __future__ import annotations

import itertools
import marshal
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from shmdist._signals import is_interruption
from shmdist.serialization import definitions
from shmdist.serialization.arrays import rebuild_arguments
from shmdist.serialization.atoms import TUPLE
from shmdist.serialization.global_names import global_names
from shmdist.serialization.modules import MAIN, registered
from shmdist.serialization.pickler import Payload, PlainPickler, cloud_pickler, reducers
from shmdist.serialization.stdlib_reducers import is_importable

_MOST = 500  # functions that are kept
_MAX_FUNCTION_BYTES = 1 << 14  # of one
_TRIES = 4  # in vain, after which a code's functions are pickled anew each time
_DEEPEST = 50  # functions that one uses

_CONSTANTS = frozenset({int, float, complex, str, bytes, bool, type(None), type(...)})
_ABSENT = object()
#: Globals that go along with every function.
_ALWAYS = ("__package__", "__name__", "__path__", "__file__")


class _Changing(Exception):
    """A function uses what may change behind its identity."""


class _FunctionFingerprint:
    """What a function consists of; nothing of it is kept alive but what is anyway, or is small."""

    __slots__ = ("_alive", "_ids", "_names", "functions", "named")

    def __init__(self, function: Any, died: Callable[[Any], None]) -> None:
        code = function.__code__
        self._names = (*global_names(code), *_ALWAYS)
        if function.__dict__:
            raise _Changing
        if function.__annotations__:
            PlainPickler(Payload(), 5).dump(function.__annotations__)  # stops at what goes by value
        there = _consists_of(function, self._names)
        self._ids = list(map(id, there))
        self._alive = []  # or another thing could get the id
        self.named: list[Any] = []  # what goes by name
        self.functions: list[Any] = []  # references to those that go by value
        for each in there:
            if each is code or each is _ABSENT or _is_constant(each):
                self._alive.append(each)
            elif goes_by_name(each) or definitions.find(each) is not None:
                self.named.append(each)
            elif type(each) is FunctionType:
                self.functions.append(weakref.ref(each, died))
            else:
                raise _Changing

    def is_of(self, function: Any) -> bool:
        """Return whether a function consists of just this."""
        return list(map(id, _consists_of(function, self._names))) == self._ids and not function.__dict__


def _consists_of(function: Any, names: Iterable[str]) -> list[Any]:
    """Return the parts of a function, and the globals of these names."""
    code, name, title, module, text, defaults, keywords, cells, there = _PARTS(function)
    parts = [code, name, title, module, text, len(defaults or ()), *map(there.get, names, _ABSENTS)]
    if defaults:
        parts += defaults
    if keywords:
        parts += itertools.chain(*keywords.items())
    if cells:
        parts += map(_content, cells)
    return parts


_PARTS = attrgetter(
    "__code__",
    "__name__",
    "__qualname__",
    "__module__",
    "__doc__",
    "__defaults__",
    "__kwdefaults__",
    "__closure__",
    "__globals__",
)
_ABSENTS = itertools.repeat(_ABSENT)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return object()


class PickledFunction:
    """The bytes of a function that goes by value; pickles as the function.

    Parameters
    ----------
    function : function
        One that goes by value.

    Raises
    ------
    Exception
        It uses what may change, or cannot be pickled.
    """

    __slots__ = ("__weakref__", "_first", "_holders", "_modules", "_named", "_others", "_version", "head")

    def __init__(self, function: Any) -> None:
        import dis  # noqa: F401 - what is needed comes before the modules are counted

        import cloudpickle  # noqa: F401 - as above

        self._version = definitions.version
        self._modules = len(sys.modules)  # a part of a package that comes later, is to be imported there too
        alive = weakref.ref(self)

        def died(_: Any) -> None:
            value = alive()
            if value is not None:
                value._modules = -1

        self._first = _FunctionFingerprint(function, died)
        self._others: dict[Any, _FunctionFingerprint] = {}
        todo = list(self._first.functions)
        while todo:
            reference = todo.pop()
            if reference not in self._others:
                part = self._others[reference] = _FunctionFingerprint(reference(), died)
                todo += part.functions
                if len(self._others) > _DEEPEST:
                    raise _Changing
        self._named = [thing for part in (self._first, *self._others.values()) for thing in part.named]
        payload = Payload()
        pickler = cloud_pickler()(payload, 5, buffer_callback=payload.keep_out)
        pickler.payload = payload
        pickler.dump(function)
        data = b"".join(payload.parts)
        if payload.refs or payload.buffers or len(data) > _MAX_FUNCTION_BYTES or pickler.took_along:
            raise _Changing
        self._holders = payload.holders
        #: The beginning of the body of a call.
        self.head = len(data).to_bytes(4, "little") + data

    def __reduce__(self) -> Any:
        return pickle.loads, (self.head[4:],)

    def stands_for(self, function: Any) -> bool:
        """Return whether the function would have these bytes now as well."""
        return (
            self._first.is_of(function)
            and len(sys.modules) == self._modules
            and self._version == definitions.version
            and (self._holders is None or definitions.all_hold(self._holders))
            and all(
                (used := reference()) is not None and part.is_of(used)
                for reference, part in self._others.items()
            )
            and all(goes_by_name(each) or definitions.find(each) is not None for each in self._named)
            and not registered()
        )


def _reduce(value: PickledFunction, pickler: Any) -> Any:
    definitions.restrict(pickler.payload, value._holders)
    return value.__reduce__()


reducers[PickledFunction] = _reduce


def load(body: bytes | bytearray) -> tuple[Any, Any, Any]:
    """Return function, arguments and keyword arguments of a call.

    Raises
    ------
    Exception
        The function or the arguments cannot be read.
    """
    end = 4 + int.from_bytes(body[:4], "little")
    function = pickle.loads(body[4:end])
    if body[end] == TUPLE:
        return function, marshal.loads(body[end:]), {}
    return function, rebuild_arguments(body, end), {}


class _Entry:
    """What is kept for a code."""

    __slots__ = ("code", "tries", "value")

    def __init__(self, code: CodeType) -> None:
        self.code = code  # keeps its id from being another's
        self.value: PickledFunction | None = None
        self.tries = 0  # in vain, since it was last of use


_kept: dict[int, _Entry] = {}  # by the code's id


def kept(function: Any) -> PickledFunction | None:
    """Return what pickles as a function that goes by value; None where that must be pickled itself.

    From the second time on that one with its code is asked for.
    """
    if type(function) is not FunctionType or (
        function.__module__ not in MAIN and "<" not in function.__qualname__  # <lambda>, <locals>
    ):
        return None
    if definitions.find(function) is not None:
        return None
    code = function.__code__
    entry = _kept.get(id(code))
    if entry is None:
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[id(code)] = _Entry(code)
        return None
    value = entry.value
    if value is not None and value.stands_for(function):
        entry.tries = 0
        return value
    if entry.tries >= _TRIES or registered():  # which may end, and then the bytes would be others
        return None
    entry.tries += 1
    try:
        value = PickledFunction(function)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # pickling runs the code of any class; it will say what is wrong
        if is_interruption(error):
            raise
        value = None
    entry.value = value
    return value


def _is_constant(thing: Any) -> bool:
    """Return whether a thing is never anything else."""
    kind = type(thing)
    if kind in _CONSTANTS:
        return True
    if kind is tuple:
        return all(map(_is_constant, thing))
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind.__module__ == "numpy" and issubclass(kind, (numpy.number, numpy.bool_))


def goes_by_name(thing: Any) -> bool:
    """Return whether a module, class or function is what is found where it says that it is."""
    kind = type(thing)
    if kind is ModuleType:
        return sys.modules.get(thing.__name__) is thing
    if kind not in _BY_NAME and kind.__name__ not in _NUMPYS and not issubclass(kind, type):
        return False
    return is_importable(thing, otherwise="numpy")  # universal functions do not say it


_BY_NAME = frozenset({FunctionType, BuiltinFunctionType})
_NUMPYS = frozenset({"ufunc", "_ArrayFunctionDispatcher"})
