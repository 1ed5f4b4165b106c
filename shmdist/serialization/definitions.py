"""What ``everywhere`` has defined in this process, and how it goes by name to others.

A name that ``everywhere`` sets is each process's own, so what stands for it in a pickle is the name:

- *Functions and classes* go with the number of the call of ``everywhere`` that defined them. Who receives
  them uses its own, when that is from this call or from a later one of the same process. Any other may be
  another function of the same name, and is not used.
- *Any other name* that a function by value reads is left to the receiver where ``everywhere`` has set it,
  unless the program has given it another value here since: then that goes along as any global does. Names
  that functions of ``everywhere`` assign by ``global`` are state, and are left to the receiver always.

A process may lack a definition: it was added later, or left out by ``procs=``. So each definition notes which
processes have it (as its call of ``everywhere`` found, a worker as it was told). When all that there are have
it, the name is all that goes. Otherwise what it stands for goes as well, by value, and is read by
those that need it. A payload made for all tells in ``Payload.holders`` who alone can read it.

Everything here is one step on a dict or set; the tables are changed by ``everywhere`` alone.
"""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

from shmdist.errors import ShmdistError
from shmdist.serialization.modules import MAIN
from shmdist.serialization.stdlib_reducers import CACHED, is_importable

_NOTHING = type("_Nothing", (), {"__slots__": ()})()  # what no name is set to
Token = tuple[int, int]  # the process that called `everywhere`, and the number of that call


class Definition:
    """What a name stands for by a call of ``everywhere``.

    Attributes
    ----------
    token : tuple of int
        Which call that was.
    holders : set of int
        The processes that have it.
    """

    __slots__ = ("_value", "head", "holders", "name", "token")

    def __init__(self, name: str, token: Token, value: Any, holders: Iterable[int]) -> None:
        self.name = name
        self.token = token
        self.holders = frozenset(holders)
        text = f"\0{name}\0{token[0]}\0{token[1]}".encode()
        self.head = (
            len(text).to_bytes(2, "little") + text
        )  # of a call of it (``serialization.function_names``)
        try:  # a large array lives as long as the program uses it
            self._value = value if is_definition(value) else weakref.ref(value)
        except TypeError:
            self._value = value
            if _let_go_at_collection not in gc.callbacks:
                gc.callbacks.append(_let_go_at_collection)

    @property
    def value(self) -> Any:
        """What it was set to; what it is now stands in ``__main__``."""
        if type(self._value) is not weakref.ref:
            return self._value
        value = self._value()
        return _NOTHING if value is None else value

    def forget_value(self) -> None:
        """Keep it alive no longer."""
        self._value = _NOTHING

    def is_held_by_all(self) -> bool:
        """Return whether all processes that there are have it."""
        return all_hold(self.holders)


_list_processes: Callable[[], Iterable[int]] = tuple


def register_processes(list_processes: Callable[[], Iterable[int]]) -> None:
    """Have the processes that something may be sent to listed by this; once, by the runtime."""
    global _list_processes
    _list_processes = list_processes


def all_hold(holders: frozenset[int]) -> bool:
    """Return whether `holders` are all processes that there are."""
    return holders.issuperset(_list_processes())


_by_name: dict[str, Definition] = {}
_by_id: dict[int, Definition] = {}  # of functions and classes, which the definition keeps alive
_originals: dict[
    str, Any
] = {}  # decorated functions, of which `__main__` has a copy; kept alive for their ids
_copies: dict[int, tuple[Any, Definition]] = {}  # of those that came by value: a weak reference
state_names: set[str] = set()  # names that functions of `everywhere` assign by ``global``
version = 0  # goes up with each change


def is_definition(value: Any) -> bool:
    """Return whether a value is a function or a class, or a cached function."""
    return isinstance(value, (FunctionType, type)) or type(value) is CACHED


def define(token: Token, values: dict[str, Any], holders: Iterable[int], original: Any = None) -> None:
    """Note what a call of ``everywhere`` has set in this process.

    Parameters
    ----------
    token : tuple of int
        The call.
    values : dict
        What it has set in ``__main__``.
    holders : iterable of int
        The processes that have set it.
    original : function or class, optional
        What was decorated, for the one value: it stands for the name as well.
    """
    global version
    _let_go_of_others(sys.modules["__main__"].__dict__)
    for name, value in values.items():
        former = _by_name.get(name)
        is_own = is_definition(value) and (value.__module__ in MAIN or not is_importable(value))
        if former is None:
            pids = holders
        else:
            _let_go(former)
            pids = holders if is_own else former.holders.union(holders)
        made = _by_name[name] = Definition(name, token, value, pids)
        if is_own:
            _by_id.setdefault(id(value), made)
            if isinstance(value, type):
                _track(value, f"shmdist.everywhere {token} {name}")
            for code in _codes(value):
                _note_state(token, _assigned(code))
        if is_own and original is not None:
            _originals[name] = original
            _by_id[id(original)] = made
    version += 1


def _note_state(token: Token, names: set[str]) -> None:
    """Note names that a function of `everywhere` assigns: who has them already is not known."""
    state_names.update(names)
    for name in names:
        if name not in _by_name:
            _by_name[name] = Definition(name, token, _NOTHING, ())


def _let_go_of_others(here: dict[str, Any]) -> None:
    """Keep nothing alive that the program has given another value in its place."""
    for name, made in list(_by_name.items()):
        if id(made.value) not in _by_id and here.get(name, _NOTHING) is not made.value:
            made.forget_value()


def _let_go_at_collection(phase: str, info: dict[str, int]) -> None:
    """Keep lists and the like, which have no weak references, no longer than to the next collection."""
    if phase == "start" and info["generation"] == 2:
        _let_go_of_others(sys.modules["__main__"].__dict__)


def note_holders(names: Iterable[str], holders: Iterable[int], token: Token) -> None:
    """Note that other processes have set names that this one has otherwise."""
    global version
    here = sys.modules["__main__"].__dict__
    for name in names:
        former = _by_name.get(name)
        if former is not None:
            former.holders = former.holders.union(holders)
        elif name in here:  # the program's own
            _by_name[name] = Definition(name, token, here[name], holders)
    version += 1


def correct_holders(token: Token, holders: dict[str, list[int]]) -> None:
    """Note who alone has set names by a call."""
    global version
    for name, pids in holders.items():
        definition = _by_name.get(name)
        if definition is not None and definition.token == token:
            definition.holders = frozenset(pids)
    version += 1  # a function may have been pickled meanwhile, for those that were thought to have them


def release(names: Iterable[str]) -> None:
    """Note that names were set to None, to give memory back."""
    for name in names:
        made = _by_name.get(name)
        if made is not None:
            _let_go(made)
            made.forget_value()


def forget(names: Iterable[str]) -> None:
    """Forget names that are no more."""
    global version
    for name in names:
        former = _by_name.pop(name, None)
        if former is not None:
            _let_go(former)
    version += 1


def _track(kind: type, number: str) -> None:
    """Let copies of a class be one class, from whichever process: they meet by cloudpickle's number."""
    from cloudpickle import cloudpickle

    with cloudpickle._DYNAMIC_CLASS_TRACKER_LOCK:
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS[kind] = number
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID[number] = kind


def _let_go(former: Definition) -> None:
    for thing in (former.value, _originals.pop(former.name, None)):
        if _by_id.get(id(thing)) is former:
            del _by_id[id(thing)]


def _codes(value: Any) -> list[CodeType]:
    """Return the codes of a function, or of a class's methods."""
    value = getattr(value, "__wrapped__", value)
    found = [value] if isinstance(value, FunctionType) else list(vars(value).values())
    functions = [getattr(each, "__func__", getattr(each, "fget", each)) for each in found]
    return [function.__code__ for function in functions if isinstance(function, FunctionType)]


def _assigned(code: CodeType) -> set[str]:
    import dis

    names = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_GLOBAL"}
    return names.union(*(_assigned(inner) for inner in code.co_consts if type(inner) is CodeType))


# ---------------------------------------------------------------------- sending


def find(thing: Any) -> tuple[Definition, str] | None:
    """Return the definition that a function or class is, or is a part of, and the path to the part."""
    if not _by_id and not _copies:
        return None
    made = _by_id.get(id(thing))
    if made is not None:
        return made, ""
    copied = _copies.get(id(thing))
    if copied is not None and copied[0]() is thing:
        return copied[1], ""
    first, _, rest = getattr(thing, "__qualname__", "").partition(".")
    made = _by_name.get(first)
    if rest and made is not None and id(made.value) in _by_id:  # a method, or a class in a class
        try:
            return (made, rest) if _part(made.value, rest) is thing else None
        except AttributeError:
            pass
    return None


def _part(thing: Any, path: str) -> Any:
    for step in path.split("."):
        thing = getattr(thing, step)
    return thing


def reference(thing: Any, payload: Any) -> Any:
    """Return how to pickle what ``everywhere`` has defined, by name alone; None where that is not enough."""
    found = find(thing)
    if found is None or not found[0].is_held_by_all():
        return None
    definition, path = found
    restrict(payload, definition.holders)
    return look_up, (definition.name, definition.token, path)


def restrict(payload: Any, holders: frozenset[int] | None) -> None:
    """Note that only these processes can read a payload."""
    if payload is not None and holders is not None:
        payload.holders = holders if payload.holders is None else payload.holders & holders


def head(function: Any) -> bytes | None:
    """Return the beginning of the body of a call of a function; None when its name is not enough."""
    definition = _by_id.get(id(function))
    return None if definition is None or not definition.is_held_by_all() else definition.head


def own(name: str, value: Any) -> Definition | None:
    """Return the definition of a global that is left to the receiver."""
    made = None if id(value) in _by_id else _by_name.get(name)
    return made if made is not None and (made.value is value or name in state_names) else None


# ---------------------------------------------------------------------- receiving


def is_set(name: str) -> bool:
    """Return whether ``everywhere`` has set a name in this process."""
    return name in _by_name and name in sys.modules["__main__"].__dict__


def look_up(name: str, token: Token, path: str = "", by_value: bytes | None = None) -> Any:
    """Return this process's own function or class; or the one that came along, where it has none."""
    made = _by_name.get(name)
    if made is not None and made.token[0] == token[0] and made.token[1] >= token[1]:
        return _part(made.value, path) if path else made.value
    if by_value is None:
        raise ShmdistError(
            f"this process does not have {name} as everywhere defined it on process {token[0]}; "
            f"call everywhere for this process, too"
        )
    copy = pickle.loads(by_value)
    if not path:
        key = id(copy)
        known = Definition(name, token, None, ())
        _copies[key] = weakref.ref(copy, lambda _: _copies.pop(key, None)), known
    return copy


def called(text: list[str]) -> Definition:
    """Return the definition that a call names; `text` is what stands behind the first zero of its head."""
    name, token = text[0], (int(text[1]), int(text[2]))
    look_up(name, token)
    return _by_name[name]


class LiveGlobals(dict[str, Any]):
    """Globals of functions by value beside state: a name that is not here is looked up in ``__main__``."""

    def __missing__(self, name: str) -> Any:
        return sys.modules["__main__"].__dict__[name]


__all__ = ["Definition", "LiveGlobals", "define", "find", "look_up", "own", "reference"]
