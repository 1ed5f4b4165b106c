"""What makes a process a worker's: its streams, its module ``__main__``, its tie to its parent, its host."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from types import ModuleType
from typing import Any


def host_identity() -> str:
    """Return a text that is equal for processes that can share memory and local sockets."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        # Abstract sockets belong to the network namespace, so it is part of the identity.
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}"
    except OSError:
        import uuid

        return f"{uuid.getnode():x}/{socket.gethostname()}/{os.getuid()}"


def prepare(settings: dict[str, Any], close_stdin: bool, stderr_to_stdout: bool) -> None:
    """Make this process a place where users' functions can run."""
    os.environ.pop("SHMDIST_IS_TO_BE_WORKER", None)  # see `managers.local`
    if "path" in settings:
        sys.path[:] = _search_path(settings)
    if "pythonpath" in settings:  # ours was for finding shmdist; users' child processes get theirs
        if settings["pythonpath"] is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = settings["pythonpath"]
    if close_stdin:
        _keep_lifeline(settings.get("parent"))
    if stderr_to_stdout:
        os.dup2(1, 2)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]  # any text stream
    _tell_of_crashes()
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = [""]


def _tell_of_crashes() -> None:
    """Have a crash in C code tell which call it was in: these are the worker's last lines."""
    import faulthandler

    if not faulthandler.is_enabled():  # as the user's -X faulthandler has it
        # Only the thread that crashed: the last lines of stderr that process 1 keeps must have it.
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr
            faulthandler.enable(all_threads=False)


def _search_path(settings: dict[str, Any]) -> list[str]:
    """Return the module path: process 1's; another interpreter keeps its own before that."""
    theirs: list[str] = settings["path"]
    if settings.get("prefix", sys.prefix) == sys.prefix:
        return theirs
    # What leads to shmdist is process 1's site-packages, as a rule; those may be another version's.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    wanted = (settings["pythonpath"] or "").split(os.pathsep)
    mine = [entry for entry in sys.path if entry != root or entry in wanted]
    return list(dict.fromkeys([*mine, *theirs]))


_lifeline = -1


def _keep_lifeline(parent: int | None) -> None:
    """Move standard input away, and die with its other end."""
    global _lifeline
    if parent is None:
        return
    try:
        import fcntl

        _lifeline = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        # Its process group, when that is its own: a Pool of the user's functions say, whose processes
        # wait for ever for a worker that was killed.
        owner = -os.getpid() if os.getpgrp() == os.getpid() else os.getpid()
        fcntl.fcntl(_lifeline, fcntl.F_SETOWN, owner)
        fcntl.fcntl(_lifeline, fcntl.F_SETSIG, int(signal.SIGKILL))
        flags = fcntl.fcntl(_lifeline, fcntl.F_GETFL)
        fcntl.fcntl(_lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    except (AttributeError, OSError, ImportError):
        pass  # not Linux: the link's end and the watched parent remain
    if os.getppid() != parent:
        os._exit(1)  # it died before we could ask to be told


def buffer_c_output_by_line() -> None:
    """Let what C code prints come out at each newline, as Python's own output does."""
    with contextlib.suppress(Exception):
        import ctypes

        libc = ctypes.CDLL(None)
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)


def own_address() -> str:
    """Return the address of this host by which others reach it."""
    # No packet is sent: connecting a datagram socket only chooses the interface.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))
        address: str = sock.getsockname()[0]
        return address
    return "127.0.0.1"


__all__ = ["buffer_c_output_by_line", "host_identity", "own_address", "prepare"]
