"""Imports on a worker: one thread at a time.

Python locks each module by itself.  Two threads that come to different parts of one package first
wait for each other then, and one of them is given a module that is half imported: an ``ImportError``,
or a package that stays broken.  The first calls of a fresh worker come side by side, each brings
modules by its function, arguments and body, so that is no rare case there.

Protocol
--------
- A thread that is to load a module takes `_lock` first, and holds it for that import and all inside it.
  A module that is there whole costs nothing of this.
- *A module that waits while it is imported* (it starts a thread and joins it, makes a remote call, wants
  a lock whose holder imports) would wait for ever.  So who waits looks at the holder every `_LOOK_SECONDS`:
  when the holder stays at one instruction, for `_WAITING_SECONDS` in code that waits and `_STUCK_SECONDS`
  elsewhere, the import goes on beside it, as without this file.
- *A lock left behind*, by an exception that came between its taking and the ``try``, or by a fork: its
  holder imports nothing for `_WAITING_SECONDS`, and the lock is replaced.

No other lock is wanted while `_lock` is held but those of the modules, and whatever they do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from shmdist.runtime.thread_frames import frames_of

_LOOK_SECONDS = 0.01  # between two looks at the holder
_WAITING_SECONDS = 0.1  # that the holder stays at one instruction of code that waits
_STUCK_SECONDS = 2.0  # that it stays at one of any other code, in which it may load a large library
_PACKAGE = __name__.partition(".")[0]

_find_and_load: Any = None  # Python's own
_lock = threading.RLock()  # held by the thread that imports
_holder = 0  # the thread that took it last
_beside: set[int] = set()  # threads that import without it
_hooks: dict[str, Callable[[ModuleType], None]] = {}  # what modules to come are given to


def one_at_a_time() -> None:
    """Let the threads of this process import one after the other, from here on."""
    global _find_and_load
    # What the import statement, importlib and pickle all end in; they look it up there each time.
    bootstrap: Any = sys.modules.get("_frozen_importlib")
    if _find_and_load is None and hasattr(bootstrap, "_find_and_load"):
        _find_and_load = bootstrap._find_and_load
        bootstrap._find_and_load = _load


def when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Call `hook` with a module as soon as it has been imported, which it may be already."""
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
    else:
        _hooks[name] = hook


def _load(name: str, import_: Any) -> ModuleType:
    """Import a module; stands for Python's own function."""
    global _holder
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        return _find_and_load(name, import_)  # type: ignore[no-any-return]  # it is untyped
    lock = _lock
    if not lock.acquire(False):
        taken = None if threading.get_ident() in _beside else _wait()
        if taken is None:
            return _load_beside(name, import_)
        lock = taken
    try:
        _holder = threading.get_ident()
        loaded: ModuleType = _find_and_load(name, import_)
        if name in _hooks:
            _run_hook(loaded, name)
        return loaded
    finally:
        lock.release()


#: As Python does with its own, it leaves its frames out of the traceback of an import that failed.
_load.__code__ = _load.__code__.replace(co_filename="<frozen importlib._bootstrap>")


def _run_hook(module: ModuleType, name: str) -> None:
    hook = _hooks.pop(name, None)  # one step: two threads may have imported it side by side
    if hook is not None:
        hook(module)


def _load_beside(name: str, import_: Any) -> ModuleType:
    """Import a module, and what it imports, beside the holder of the lock."""
    me = threading.get_ident()
    outermost = me not in _beside
    _beside.add(me)
    try:
        loaded: ModuleType = _find_and_load(name, import_)
        if name in _hooks:
            _run_hook(loaded, name)
        return loaded
    finally:
        if outermost:
            _beside.discard(me)


_load_beside.__code__ = _load_beside.__code__.replace(co_filename="<frozen importlib._bootstrap>")


def _wait() -> Any:
    """Wait for the lock; return it, taken, or None when its holder waits for something itself."""
    global _lock
    seen: tuple[int, int, int] | None = None
    since = 0.0
    while True:
        lock = _lock
        if lock.acquire(timeout=_LOOK_SECONDS):
            return lock
        holder = _holder
        place, limit = _look_at(holder)
        now = time.monotonic()
        if (holder, *place) != seen:
            seen, since = (holder, *place), now
        elif now - since >= limit:
            if place != _NOWHERE:
                return None
            if lock is _lock:
                _lock = threading.RLock()


_NOWHERE = (0, 0)


def _look_at(ident: int) -> tuple[tuple[int, int], float]:
    """Return where a thread is in its import, and for how many seconds it may stay there."""
    frames = frames_of(ident)
    codes = _load.__code__, _load_beside.__code__, _wait.__code__
    if next((frame.f_code for frame in frames if frame.f_code in codes), None) is not codes[0]:
        return _NOWHERE, _WAITING_SECONDS
    frame = frames[0]
    module = frame.f_globals.get("__name__", "")
    waits = module in _WAITERS or module.partition(".")[0] == _PACKAGE
    # Not the frame itself, which would keep alive what is in it.
    return (id(frame), frame.f_lasti), _WAITING_SECONDS if waits else _STUCK_SECONDS


_WAITERS = frozenset({"threading", "queue", "selectors", "subprocess"})

__all__ = ["one_at_a_time", "when_imported"]
