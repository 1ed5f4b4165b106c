"""The environment of a worker: its streams, its tie to its parent, its host."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
from typing import Any

from shmdist._paths import PACKAGE_ROOT


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
    # A program that ignores it has it ignored in the programs it starts: users' child processes would
    # all seem to exit with code 0.
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "path" in settings:
        sys.path[:] = _search_path(settings)
    if "pythonpath" in settings:  # ours was for finding shmdist; users' child processes get theirs
        _set_variable("PYTHONPATH", settings["pythonpath"])
    if "hash_seed" in settings:
        _set_variable("PYTHONHASHSEED", settings["hash_seed"])
    if close_stdin:
        _keep_lifeline(settings.get("parent"))
    if stderr_to_stdout:
        os.dup2(1, 2)
    _open_streams()
    _tell_of_crashes()
    sys.argv = [""]


class OutputFile(io.FileIO):
    """A worker's standard output or error.

    While a thread waits in it, for its reader to read, it holds the stream's lock. Others must know that
    before they flush the stream: the lock cannot be waited for with a limit.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.writing = False  # a thread is in `write`; one at a time, for it holds the lock
        self.name: Any = None

    def write(self, data: Any) -> Any:
        """Write, and be known to do so."""
        self.writing = True  # no count: an interrupt between the two would leave it wrong for good
        try:
            return super().write(data)
        finally:
            self.writing = False


def _open_streams() -> None:
    """Make the streams that users' functions print to: whole lines at once, and of any text."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if stream.fileno() != fd:
                continue
            stream.flush()
            file = OutputFile(fd)
            file.name = stream.name
            text = io.TextIOWrapper(
                io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=True
            )
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)
            own_files.append(file)


#: The files under this worker's own streams.
own_files: list[OutputFile] = []


def _set_variable(name: str, value: str | None) -> None:
    """Set an environment variable, or take it away."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


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
    wanted = (settings["pythonpath"] or "").split(os.pathsep)
    mine = [entry for entry in sys.path if entry != PACKAGE_ROOT or entry in wanted]
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
