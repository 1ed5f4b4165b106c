"""``everywhere`` and ``remotecall_eval``: code that all processes run."""

from __future__ import annotations
import __future__

import ast
import builtins
import dis
import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from shmdist._parsing import parsing
from shmdist.calls import remote_do, remotecall, remotecall_fetch
from shmdist.errors import CompositeException, RemoteException, SerializationError, local_exception
from shmdist.processes import process_ids, procs, usable_workers
from shmdist.references.future import Future
from shmdist.runtime.interrupts import is_interrupt
from shmdist.runtime.node import Node, current_node
from shmdist.scheduling.function_broadcast import BroadcastFunction
from shmdist.serialization import codec, definitions
from shmdist.serialization.modules import MAIN

#: The flags of all that a `from __future__` import changes.
_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


def _module(name: str) -> ModuleType:
    module = sys.modules.get(name)
    return module if module is not None else importlib.import_module(name)


class _Call(NamedTuple):
    """A call of `everywhere`, as all its processes see it."""

    token: tuple[int, int]  # see `serialization.definitions`
    pids: list[int]
    package: str | None  # against which relative imports resolve, as in the program


def _call(pids: list[int]) -> _Call:
    node = current_node()
    package = getattr(sys.modules["__main__"], "__package__", None)
    return _Call((node.pid, next(node.requests.call_ids)), pids, package or None)


def _run(
    code: str, bindings: dict[str, Any], module_name: str, call: _Call | None = None
) -> tuple[Any, list[str]]:
    """Run code in a module of this process.

    Returns
    -------
    value : object
        That of its last expression.
    names : list of str
        What it has set, when the module is ``__main__``.
    """
    namespace = _module(module_name).__dict__
    if namespace is not sys.modules["__main__"].__dict__ or call is None:
        return _execute(code, bindings, namespace), []
    if call.package and not namespace.get("__package__"):
        namespace["__package__"] = call.package
    before = namespace.copy()
    try:
        value = _execute(code, bindings, namespace)
    finally:
        names = _note_set(code, before, {**namespace}, bindings, call)
    return value, names


def _note_set(
    code: str, before: dict[str, Any], after: dict[str, Any], bindings: dict[str, Any], call: _Call
) -> list[str]:
    """Note the names that code has set in ``__main__``; those set to what they were before as well."""
    stored = {
        each.argval
        for each in dis.get_instructions(compile(code, "<everywhere>", "exec", dont_inherit=True))
        if each.opname in ("STORE_NAME", "STORE_GLOBAL")
    }
    changed = {name for name, value in after.items() if before.get(name, before) is not value}
    names = {name for name in stored | changed | bindings.keys() if name in after and name[:2] != "__"}
    definitions.forget(before.keys() - after.keys())
    definitions.define(call.token, {name: after[name] for name in names}, call.pids)
    return sorted(names)


def _execute(code: str, bindings: dict[str, Any], namespace: dict[str, Any]) -> Any:
    """Run code with these globals; returns the value of its last expression."""
    namespace.update(bindings)
    tree = parsing(_tree, code)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    # This file's `from __future__` is none of the code's, but the code may have its own.
    statements = compile(tree, "<everywhere>", "exec", dont_inherit=True)
    with current_node().tasks.context.keeping():
        exec(statements, namespace)
        if not isinstance(last, ast.Expr):
            return None
        flags = statements.co_flags & _FUTURES
        return eval(compile(ast.Expression(last.value), "<everywhere>", "eval", flags, True), namespace)


def _tree(code: str) -> ast.Module:
    tree: ast.Module = ast.parse(code, "<everywhere>", "exec")
    return tree


def _checked(code: str, name: str) -> str:
    """Return code that can be compiled: what is wrong with it is told before anything runs."""
    first = next((line for line in code.splitlines() if line.strip() and line.lstrip()[0] != "#"), "")
    if first[:1].isspace():
        code = textwrap.dedent(code)  # a text in triple quotes inside a function
    compile(code, f"<{name}>", "exec", dont_inherit=True)
    return code


def _imports(code: str) -> str:
    """Return the import statements at the top level of `code`."""
    tree = parsing(_tree, code)
    found = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in found)


class _SentAlong:
    """What came to this process with definitions of ``everywhere``, and is in ``__main__`` for their sake."""

    def __init__(self, node: Node) -> None:
        self.values: dict[str, Any] = {}


def _define(
    name: str, value: Any, needed: dict[str, Any], bindings: dict[str, Any], call: _Call
) -> tuple[None, list[str]]:
    """Define a function or class in ``__main__`` of this process."""
    namespace, original = sys.modules["__main__"].__dict__, value
    # What came here with an earlier definition gives way to what comes with this one; what this
    # process has got by other ways is its own.
    along = current_node().part(_SentAlong).values
    for key, thing in needed.items():
        if key not in namespace or (key in along and namespace[key] is along[key]):
            namespace[key] = along[key] = thing
    namespace.update(bindings)
    for key in (name, *bindings):
        along.pop(key, None)
    if isinstance(value, FunctionType):
        value = _bound_here(value, namespace)
        value.__module__ = "__main__"
        _tie(value)
    elif isinstance(value, type):
        for attribute, thing in list(vars(value).items()):
            method = _method_bound_here(thing, namespace)
            if method is not thing:
                setattr(value, attribute, method)
    namespace[name] = value
    definitions.define(call.token, dict(bindings), call.pids)
    definitions.define(call.token, {name: value}, (call.token[0], *call.pids), original)
    return None, [name, *bindings]


def _bound_here(function: FunctionType, namespace: dict[str, Any]) -> FunctionType:
    """Return a function with the globals of this ``__main__``, as one defined here would have."""
    closure = function.__closure__
    here = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    here.__kwdefaults__ = function.__kwdefaults__
    here.__dict__.update(function.__dict__)
    here.__annotations__ = function.__annotations__
    here.__doc__ = function.__doc__
    here.__qualname__ = function.__qualname__
    here.__module__ = function.__module__
    return here


def _tie(function: FunctionType) -> None:
    """Let a function find itself that calls itself by a local name, which had no value yet."""
    for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if free == function.__name__:
            try:
                _ = cell.cell_contents
            except ValueError:
                cell.cell_contents = function


def _method_bound_here(thing: Any, namespace: dict[str, Any]) -> Any:
    """Return an attribute of a class that came by value, its functions bound to this ``__main__``."""
    if isinstance(thing, FunctionType):
        its = thing.__globals__
        at_home = its is namespace or its is vars(sys.modules.get(thing.__module__, object))
        return thing if at_home else _bound_here(thing, namespace)
    if isinstance(thing, (staticmethod, classmethod)):
        inner = _method_bound_here(thing.__func__, namespace)
        return thing if inner is thing.__func__ else type(thing)(inner)
    if type(thing) is property:
        get, set_, delete = (
            _method_bound_here(part, namespace) for part in (thing.fget, thing.fset, thing.fdel)
        )
        return property(get, set_, delete, thing.__doc__)
    return thing


class _At:
    """A place for calls of a function that is sent ahead."""

    def __init__(self, pid: int, shipped: BroadcastFunction) -> None:
        self._pid = pid
        self._shipped = shipped

    def _lend(self) -> int:
        return self._pid

    def _give_back(self, pid: int) -> None:
        pass

    def ship(self, f: Any) -> BroadcastFunction:
        """Return the function as it is sent."""
        return self._shipped


def _ask_all(
    targets: Sequence[int],
    f: Callable[..., Any],
    args: tuple[Any, ...],
    what: str,
    call: _Call | None = None,
) -> None:
    """Run a function on all of `targets` at once, this process among them; raise all their errors.

    A function that defines gets the call as its last argument, and returns a value and the names it has set.
    """
    args = args if call is None else (*args, call)
    me = current_node().pid
    errors: list[BaseException] = []
    done: dict[int, Any] = {}
    others = [pid for pid in targets if pid != me]
    if len(others) > 1:  # pickled once for all of them
        shipped = BroadcastFunction(functools.partial(f, *args), f"what {what} sends")
        try:
            futures = _begin(shipped.f, (), [_At(pid, shipped) for pid in others], errors)
            _end(futures, me in targets, f, args, errors, done)
        except BaseException:
            shipped.drop_in_turn()  # some calls may not have begun
            raise
        shipped.drop()  # not by a call, which an interrupt of all calls would end
    else:
        _end(_begin(f, args, others, errors), me in targets, f, args, errors, done)
    if call is not None:
        _settle(call, {pid: names for pid, (_, names) in done.items()})
    if errors:
        raise CompositeException(f"{what} failed on {len(errors)} of {len(targets)} processes", errors)


def _settle(call: _Call, done: dict[int, list[str]]) -> None:
    """Note who has set which names; where that is not all, the others are told."""
    holders: dict[str, list[int]] = {}
    for pid, names in done.items():
        for name in names:
            holders.setdefault(name, []).append(pid)
    me = current_node().pid
    if me not in call.pids:
        for name, pids in holders.items():
            definitions.note_holders([name], pids, call.token)
    some = {name: pids for name, pids in holders.items() if len(pids) < len(call.pids)}
    if some:
        definitions.correct_holders(call.token, some)
        for pid in call.pids:
            if pid != me:
                with suppress(Exception):  # it is gone, probably
                    remote_do(definitions.correct_holders, pid, call.token, some)


def _begin(f: Any, args: Any, places: Sequence[Any], errors: list[BaseException]) -> list[Future]:
    """Begin the same call in several places."""
    futures = []
    for place in places:
        try:
            futures.append(remotecall(f, place, *args))
        except SerializationError:
            raise  # it will not be otherwise for the next one
        except Exception as error:
            errors.append(error)
    return futures


def _end(
    futures: list[Future],
    here: bool,
    f: Any,
    args: Any,
    errors: list[BaseException],
    done: dict[int, Any],
) -> None:
    """Run a call here, if it is to, and wait for those begun; Ctrl-C ends them all."""
    me = current_node().pid
    try:
        if here:
            try:
                current_node().reactor.own.catch_up()
                done[me] = f(*args)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                errors.append(local_exception(current_node().pid, error))
        for future in futures:
            try:
                done[future.where] = future.fetch()
            except Exception as error:
                errors.append(error)
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _targets(which: Any) -> list[int]:
    if which is None:
        return procs()
    targets = process_ids((which,))
    for pid in targets:
        if pid != current_node().pid:
            current_node().peers.check_member(pid)
    return targets


def everywhere(code_or_def: Any = None, procs: Any = None, **bindings: Any) -> Any:
    """Run code, or define a function or class, under ``__main__`` on all processes.

    Parameters
    ----------
    code_or_def : str, function or class
        A text is run statement by statement; its imports run first on the caller, so
        that a module is built or compiled once. A function or class, ``everywhere`` being
        its decorator, is defined under its name. Left out, the result is such a decorator.
    procs : int or sequence of int, optional
        The processes; default all. An int: that process alone.
    **bindings
        Values that the code sees under these names, as of now.

    Returns
    -------
    object
        The function or class itself; for one process, the value of the last expression;
        else None.

    Raises
    ------
    SyntaxError
        Nothing was run.
    CompositeException
        The errors of all processes on which it failed; the others have run it.
    RemoteException
        For one process, its error.

    Notes
    -----
    A function sees the globals of ``__main__`` where it runs. Modules and other globals
    it names that are missing there are sent along.

    References
    ----------
    Julia manual, `@everywhere`.

    Examples
    --------
    >>> everywhere("import math; scale = factor * math.pi", factor=2)
    >>> everywhere("round(scale, 2)", 1)
    6.28
    """
    code = code_or_def
    if code is None:
        return lambda thing: everywhere(thing, procs, **bindings)
    if procs is None and not isinstance(code, (str, FunctionType, type)) and not callable(code):
        return lambda thing: everywhere(thing, code, **bindings)  # @everywhere(pids)
    targets = _targets(procs)
    single = hasattr(procs, "__index__")
    if not isinstance(code, str):
        return _define_everywhere(code, targets, bindings)
    code = _checked(code, "everywhere")
    imports = _imports(code)
    if imports:
        _execute(imports, {}, sys.modules["__main__"].__dict__)
    with _named(bindings):
        if single:
            return _run_on_one(targets[0], code, bindings, "__main__")
        _ask_all(targets, _run_quietly, (code, bindings, "__main__"), "everywhere", _call(targets))
    return None


@contextmanager
def _named(sent: dict[str, Any]) -> Iterator[None]:
    """Let the error of what cannot be sent say which of the things `sent` it is, and which part of that."""
    try:
        yield
    except SerializationError as error:
        if isinstance(error, RemoteException):
            raise
        for name, thing in sent.items():
            codec.dumps(thing, f"{name}, which everywhere sends,", name)
        raise


def _run_on_one(pid: int, code: str, bindings: dict[str, Any], module_name: str) -> Any:
    """Run code on one process; returns the value of its last expression."""
    call = _call([pid])
    value, names = remotecall_fetch(_run, pid, code, bindings, module_name, call)
    _settle(call, {pid: names})
    return value


def _run_quietly(
    code: str, bindings: dict[str, Any], module_name: str, call: _Call
) -> tuple[None, list[str]]:
    """Run code; its value is not sent back."""
    return None, _run(code, bindings, module_name, call)[1]


def _define_everywhere(thing: Any, targets: list[int], bindings: dict[str, Any]) -> Any:
    name = getattr(thing, "__name__", None)
    if not isinstance(name, str) or not (inspect.isfunction(thing) or inspect.isclass(thing)):
        raise TypeError(f"everywhere takes a text, a function or a class, not {thing!r:.80}")
    if "<locals>" not in thing.__qualname__ and thing.__module__ in MAIN and not bindings:
        # Defined here by the statement that is being decorated.
        targets = [pid for pid in targets if pid != current_node().pid]
        if current_node().pid != 1:
            sys.modules["__main__"].__dict__[name] = thing
    me = current_node().pid
    call = _call(targets)
    needed = {}
    for key, value in _globals_of(thing).items():
        known = definitions.own(key, value)
        if key not in bindings and (known is None or not known.holders.issuperset(targets)):
            needed[key] = value
    with _named({name: thing, **needed, **bindings}):
        _ask_all(targets, _define, (name, thing, needed, bindings), f"everywhere of {name}", call)
    if me not in targets:
        definitions.define(call.token, {name: thing}, [me, *targets], thing)
    return thing


def _globals_of(thing: Any) -> dict[str, Any]:
    """Return the globals that a function, or a class's methods, name and that exist here."""
    found = {}
    for function in _functions_of(thing):
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            for name in code.co_names:
                if name in function.__globals__ and not hasattr(builtins, name) and name != thing.__name__:
                    found[name] = function.__globals__[name]
            codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return found


def _functions_of(thing: Any) -> list[FunctionType]:
    if isinstance(thing, FunctionType):
        return [thing]
    if not isinstance(thing, type) or _is_importable(thing):
        return []
    parts: list[Any] = []
    for value in vars(thing).values():
        parts += [
            getattr(value, "__func__", value),
            *(getattr(value, name, None) for name in ("fget", "fset")),
        ]
    return [part for part in parts if isinstance(part, FunctionType)]


def _is_importable(kind: type) -> bool:
    """Return whether a class goes by name, and has its own globals wherever it goes."""
    return kind.__module__ not in MAIN and "<locals>" not in kind.__qualname__


def remotecall_eval(module_name: Any, procs: Any, code: str) -> Any:
    """Run code in a module on one or several processes.

    Parameters
    ----------
    module_name : str or module
        ``"__main__"``, or a module that can be imported there.
    procs : int or sequence of int
        One process: the value of the last expression comes back. Several: None.
    code : str
        Python source.

    Raises
    ------
    RemoteException, CompositeException
        As for :func:`everywhere`.

    References
    ----------
    Julia manual, `remotecall_eval`.

    Examples
    --------
    >>> remotecall_eval("math", 1, "floor(pi)")
    3
    """
    name = module_name.__name__ if isinstance(module_name, ModuleType) else str(module_name)
    if not isinstance(code, str):
        raise TypeError(f"remotecall_eval(module, procs, code): code must be a text, not {code!r:.80}")
    code = _checked(code, "remotecall_eval")
    if hasattr(procs, "__index__"):
        return _run_on_one(procs.__index__(), code, {}, name)
    targets = _targets(procs)
    _ask_all(targets, _run_quietly, (code, {}, name), "remotecall_eval", _call(targets))
    return None


def clear(names: Any = None, pids: Any = None, *, pool: Any = None) -> Any:
    """Empty a CachingPool's cache, or set globals of ``__main__`` to None.

    Parameters
    ----------
    names : str, sequence of str, or CachingPool
        Names of globals; or the pool, which may also be given as `pool`.
    pids : int or sequence of int, optional
        With names: the processes; default all workers.

    Returns
    -------
    object
        The pool, or None.

    References
    ----------
    Julia manual, `clear!`.

    Examples
    --------
    >>> clear(CachingPool([1]))
    <CachingPool [1], 0 functions>
    """
    if (names is None) == (pool is None):
        raise TypeError("clear(pool) or clear(names, pids): give one of them")
    what = names if pool is None else pool
    if hasattr(what, "clear") and not isinstance(what, (str, list, set, dict)):
        what.clear()
        return what
    names = (what,) if isinstance(what, str) else tuple(what)
    _ask_all(usable_workers() if pids is None else _targets(pids), _set_none, (names,), "clear")
    return None


def _set_none(names: tuple[str, ...]) -> None:
    main = sys.modules["__main__"].__dict__
    for name in names:
        if name in main:
            main[name] = None
    definitions.release(names)


__all__ = ["everywhere", "remotecall_eval"]
