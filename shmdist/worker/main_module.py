"""The module ``__main__`` of a worker: the names of the program that runs on process 1.

What ``everywhere`` and ``remotecall_eval`` set stands in the module. Any other attribute that is asked of it,
as ``pickle`` and ``multiprocessing`` do to find a function or class by its name, is looked for

1. in the globals of the functions by value that the asking thread is in, so that a function found is
   the one that the call has, and not a copy;
2. in those of other threads, when the asking one is in none: it is a helper of theirs, as a pool's is;
3. on process 1. Classes, functions, modules and what cannot change arrive; other data does not, for a
   copy of it would soon be another. What was found, or that nothing was, is kept until process 1 calls again.

The asking thread waits as it does for any remote call, so process 1 may be waiting for this worker meanwhile.

A process forked by a worker (``multiprocessing.Pool`` in a function) must not use the worker's links. It
finds what the functions that ran at the fork had, what was asked for before, and classes that came by value.
"""

from __future__ import annotations

import copyreg
import importlib
import os
import sys
import threading
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

from shmdist.errors import FinalizerError, ShmdistError
from shmdist.runtime.node import current_node
from shmdist.runtime.thread_frames import frames_of_all, outwards
from shmdist.serialization import codec
from shmdist.serialization.atoms import ATOMS
from shmdist.serialization.modules import MAIN
from shmdist.serialization.stdlib_reducers import CACHED
from shmdist.transport.messages import WANT_VALUE

_NAMESPACE: Any = vars(ModuleType)["__dict__"]
_EVALUATORS = frozenset({"typing", "typing_extensions"})
_GIVEN = (type, FunctionType, BuiltinFunctionType, CACHED, ModuleType, *ATOMS)


class MainModule(ModuleType):
    """``__main__`` of a worker."""

    def __init__(self) -> None:
        super().__init__("__main__")
        self.__dict__["__builtins__"] = __builtins__

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # of a module it is a plain attribute
        """The module's globals; for who evaluates annotations, with those that must be asked for."""
        names: dict[str, Any] = _NAMESPACE.__get__(self)
        caller = sys._getframe(1).f_globals.get("__name__")
        return _AskingNames(names) if caller in _EVALUATORS else names

    def __getattr__(self, name: str) -> Any:
        if name[:2] == name[-2:] == "__":
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        return _names.find(name, _NAMESPACE.__get__(self), sys._getframe(1))


class _AskingNames(dict[str, Any]):
    """A copy of the globals of ``__main__`` in which what is missing is asked for."""

    def __missing__(self, name: str) -> Any:
        try:
            return getattr(sys.modules["__main__"], name)
        except AttributeError:
            raise KeyError(name) from None


def _reduce(_: Any) -> tuple[Any, ...]:
    return importlib.import_module, ("__main__",)


copyreg.pickle(MainModule, _reduce)


class _Asking(threading.local):
    """The names that this thread is asking for."""

    names: tuple[str, ...] = ()


class _Names:
    """What is found for ``__main__`` outside it."""

    def __init__(self) -> None:
        self._ospid = os.getpid()
        #: By name: when process 1 was asked, whether it was found, and the value or the text of the error.
        self._asked: dict[str, tuple[int, bool, Any]] = {}
        self._asking = _Asking()
        self._at_fork: list[dict[str, Any]] = []

    def find(self, name: str, here: dict[str, Any], frame: FrameType | None) -> Any:
        """Return what a name stands for; raises AttributeError."""
        places = _globals_in(outwards(frame), here)
        is_child = os.getpid() != self._ospid
        if is_child:
            places += self._at_fork
        elif not places:
            places = _globals_of_all(here)
        for place in places:
            if name in place:
                return place[name]
        if name in self._asking.names:  # its own pickle asks for it
            raise AttributeError(f"module '__main__' has no attribute {name!r}")
        found, value = self._left(name) if is_child else self._ask(name)
        if not found:
            raise AttributeError(value)
        return value

    def _ask(self, name: str) -> tuple[bool, Any]:
        """Return whether process 1 has a name, and the value or the text of the error."""
        node = current_node()
        link = node.peers.links.get(1)
        if link is None:
            return False, f"module '__main__' has no attribute {name!r}"
        now = link.calls_read
        known = self._asked.get(name)
        if known is not None and known[0] == now:
            return known[1:]
        outer = self._asking.names
        self._asking.names = (*outer, name)
        try:
            found, value = _ask_master(name)
        except FinalizerError:
            raise  # no answer, which others could use
        except ShmdistError as error:
            found, value = False, f"process 1 cannot send {name!r} of module '__main__': {error}"
        finally:
            self._asking.names = outer
        self._asked[name] = now, found, value
        return found, value

    def _left(self, name: str) -> tuple[bool, Any]:
        """Return what a forked process has of a name."""
        known = self._asked.get(name)
        if known is not None and known[1]:
            return known[1:]
        cloudpickle = sys.modules.get("cloudpickle.cloudpickle")
        for kind in reversed(list(getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", {}).values())):
            if kind.__module__ in MAIN and getattr(kind, "__qualname__", "") == name:
                return True, kind
        return False, (
            f"module '__main__' has no attribute {name!r} "
            f"(this process was forked by a worker, and cannot ask process 1)"
        )

    def before_fork(self) -> None:
        """Keep for the child what is found by way of threads that it will not have."""
        main = sys.modules.get("__main__")
        if type(main) is MainModule and os.getpid() == self._ospid:
            here = _NAMESPACE.__get__(main)
            self._at_fork = _globals_in(outwards(sys._getframe(1)), here) + _globals_of_all(here)

    def after_fork(self) -> None:
        """Let go of that in the parent."""
        self._at_fork = []


def _globals_in(frames: list[FrameType], here: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the globals of the functions by value of the program that a thread is in, innermost first."""
    found: list[dict[str, Any]] = []
    for frame in frames:
        there = frame.f_globals
        if there is not here and there.get("__name__") in MAIN and not any(there is each for each in found):
            found.append(there)
    return found


def _globals_of_all(here: dict[str, Any]) -> list[dict[str, Any]]:
    return [there for frames in frames_of_all().values() for there in _globals_in(frames, here)]


def _ask_master(name: str) -> tuple[bool, Any]:
    payload = codec.dumps_call(_give, (name,), {})
    answer: tuple[bool, Any] = current_node().requests.call(
        1, WANT_VALUE, payload, f"the search for {name} of __main__"
    )
    return answer


def _give(name: str) -> tuple[bool, Any]:
    """Return whether the program has a name that may go, and its value; or why not."""
    main = sys.modules["__main__"]
    try:
        value = getattr(main, name)
    except AttributeError:
        return False, f"module '__main__' has no attribute {name!r}"
    if _may_go(value):
        return True, value
    return False, (
        f"module '__main__' of a worker has no attribute {name!r}: on process 1 it is a "
        f"{type(value).__qualname__}, which can change; pass it as an argument, or set it by everywhere"
    )


def _may_go(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, _GIVEN) or kind.__module__ in ("typing", "types"):  # `list[int]`, a TypeVar
        return True
    if kind in (tuple, frozenset):
        return all(map(_may_go, value))
    return type(kind).__name__ == "EnumType"


_names = _Names()
os.register_at_fork(before=_names.before_fork, after_in_parent=_names.after_fork)


__all__ = ["MainModule"]
