"""Code that is run by all processes: ``everywhere`` and ``remotecall_eval``."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

from shmdist.calls import remotecall, remotecall_fetch
from shmdist.cluster import _pids, procs
from shmdist.errors import CompositeException, capture, remote_exception
from shmdist.runtime.node import current_node


def _module(name: str) -> ModuleType:
    module = sys.modules.get(name)
    return module if module is not None else importlib.import_module(name)


def _run(code: str, bindings: dict[str, Any], module_name: str) -> Any:
    """Run code in a module of this process; returns the value of its last expression."""
    namespace = _module(module_name).__dict__
    namespace.update(bindings)
    tree = ast.parse(code, "<everywhere>", "exec")
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<everywhere>", "exec"), namespace)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "<everywhere>", "eval"), namespace)


def _imports(code: str) -> str:
    """Return the import statements at the top level of `code`."""
    tree = ast.parse(code, "<everywhere>", "exec")
    found = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(ast.unparse(node) for node in found)


def _define(name: str, value: Any, needed: dict[str, Any]) -> None:
    """Define a function or class in ``__main__`` of this process."""
    namespace = sys.modules["__main__"].__dict__
    for key, thing in needed.items():
        namespace.setdefault(key, thing)
    if isinstance(value, FunctionType):
        # Bound to the globals of this __main__, as one defined here would be.
        here = FunctionType(value.__code__, namespace, value.__name__, value.__defaults__, value.__closure__)
        here.__kwdefaults__ = value.__kwdefaults__
        here.__dict__.update(value.__dict__)
        here.__annotations__ = value.__annotations__
        here.__doc__ = value.__doc__
        here.__qualname__ = value.__qualname__
        here.__module__ = "__main__"
        value = here
    namespace[name] = value


def _ask_all(targets: Sequence[int], f: Callable[..., Any], args: tuple[Any, ...], what: str) -> None:
    """Run a function on all of `targets` at once, this process among them; raise all their errors."""
    me = current_node().pid
    futures = []
    errors: list[BaseException] = []
    for pid in targets:
        if pid != me:
            try:
                futures.append(remotecall(f, pid, *args))
            except Exception as error:
                errors.append(error)
    if me in targets:
        try:
            f(*args)
        except Exception as error:
            wrapped = remote_exception(me, capture(error))
            wrapped.__cause__ = error
            errors.append(wrapped)
    for future in futures:
        try:
            future.fetch()
        except Exception as error:
            errors.append(error)
    if errors:
        raise CompositeException(f"{what} failed on {len(errors)} of {len(targets)} processes", errors)


def _targets(which: Any) -> list[int]:
    if which is None:
        return procs()
    targets = _pids((which,))
    for pid in targets:
        if pid != current_node().pid:
            current_node().check_member(pid)
    return targets


def everywhere(code: Any = None, procs: Any = None, /, **bindings: Any) -> Any:
    """Run code, or define a function or class, under ``__main__`` on all processes.

    Parameters
    ----------
    code : str, function or class
        A text is run statement by statement; its imports run first on the caller, so
        that a module is built or compiled once. A function or class, ``everywhere`` being
        its decorator, is defined under its name.
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
    if code is None or (
        procs is None and not isinstance(code, (str, FunctionType, type)) and not callable(code)
    ):
        which = code
        return lambda thing: everywhere(thing, which, **bindings)
    targets = _targets(procs)
    single = hasattr(procs, "__index__")
    if not isinstance(code, str):
        return _define_everywhere(code, targets, bindings)
    imports = _imports(code)  # a SyntaxError is told before anything runs
    compile(code, "<everywhere>", "exec")
    if imports:
        _run(imports, {}, "__main__")
    if single:
        return remotecall_fetch(_run, targets[0], code, bindings, "__main__")
    _ask_all(targets, _run_quietly, (code, bindings, "__main__"), "everywhere")
    return None


def _run_quietly(code: str, bindings: dict[str, Any], module_name: str) -> None:
    """Run code; its value is not sent back."""
    _run(code, bindings, module_name)


def _define_everywhere(thing: Any, targets: list[int], bindings: dict[str, Any]) -> Any:
    name = getattr(thing, "__name__", None)
    if not isinstance(name, str) or not (inspect.isfunction(thing) or inspect.isclass(thing)):
        raise TypeError(f"everywhere takes a text, a function or a class, not {thing!r:.80}")
    if "<locals>" not in thing.__qualname__ and thing.__module__ == "__main__" and not bindings:
        # Defined here by the statement that is being decorated.
        targets = [pid for pid in targets if pid != current_node().pid]
        if current_node().pid != 1:
            sys.modules["__main__"].__dict__[name] = thing
    needed = {**_globals_of(thing), **bindings}
    if bindings:
        namespace = sys.modules["__main__"].__dict__
        namespace.update(bindings)
    _ask_all(targets, _define, (name, thing, needed), f"everywhere of {name}")
    return thing


def _globals_of(thing: Any) -> dict[str, Any]:
    """Return the globals that a function names and that exist here."""
    if not isinstance(thing, FunctionType):
        return {}
    found = {}
    codes = [thing.__code__]
    while codes:
        code = codes.pop()
        for name in code.co_names:
            if name in thing.__globals__ and not hasattr(builtins, name) and name != thing.__name__:
                found[name] = thing.__globals__[name]
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return found


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
    compile(code, "<remotecall_eval>", "exec")
    if hasattr(procs, "__index__"):
        return remotecall_fetch(_run, procs, code, {}, name)
    _ask_all(_targets(procs), _run_quietly, (code, {}, name), "remotecall_eval")
    return None


__all__ = ["everywhere", "remotecall_eval"]
