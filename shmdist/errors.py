"""Every public exception; ``_exceptions`` sends them to other processes."""

from __future__ import annotations

from shmdist._exceptions import (
    CapturedException,
    RemoteException,
    ShmdistError,
    _safe_str,
    capture,
    join_tracebacks,
    local_exception,
    remote_exception,
)
from shmdist._rebuilding import add_note, drop_tracebacks, rebuild_exception, reduce_exception

TYPE_CHECKING = False  # Not from typing: this file is on the start-up path of every worker.
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = [
    "AuthenticationError",
    "CapturedException",
    "ChannelClosed",
    "CompositeException",
    "LaunchWorkerError",
    "ProcessExitedException",
    "RemoteException",
    "SerializationError",
    "ShmdistError",
    "VersionMismatch",
    "add_note",
    "capture",
    "describe_exit",
    "drop_tracebacks",
    "join_tracebacks",
    "local_exception",
    "no_workers_left",
    "rebuild_exception",
    "reduce_exception",
    "remote_exception",
]


#: What a worker was lost in that was asked to go, and killed when it did not.
REMOVAL = "its removal by rmprocs"
#: What a worker was lost in whose host could not be heard any more.
SILENCE = "a silence of its host"


class ProcessExitedException(ShmdistError):
    """A worker is gone: it exited, was killed, or its host fell silent.

    Parameters
    ----------
    pid : int
        The worker's id in the cluster.
    host, ospid : str and int, optional
        Where it ran, and its id in the operating system there.
    exitcode, signal : int and str, optional
        How it ended: its exit code, or the name of the signal (``"SIGKILL"``).
    stderr_tail : sequence of str
        The last lines it wrote to its standard error.
    oom : bool
        Whether the system's counters show that memory ran out.
    what : str, optional
        The call that was lost with it, or that it was being removed.

    Notes
    -----
    All are attributes, and the text is made of them when asked for: one death reported to many
    callers is a ``copy.copy`` each, with its own ``what``.

    References
    ----------
    Julia manual, `ProcessExitedException` in "Distributed Computing".

    Examples
    --------
    >>> print(ProcessExitedException(3, host="node7", ospid=123, exitcode=3))
    process 3 (host node7, OS pid 123) exited with code 3
    """

    __module__ = "shmdist"

    def __init__(
        self,
        pid: int,
        *,
        host: str | None = None,
        ospid: int | None = None,
        exitcode: int | None = None,
        signal: str | None = None,
        stderr_tail: Sequence[str] = (),
        oom: bool = False,
        what: str | None = None,
    ) -> None:
        super().__init__(pid)
        self.pid = pid
        self.host = host
        self.ospid = ospid
        self.exitcode = exitcode
        self.signal = signal
        self.stderr_tail = tuple(stderr_tail)
        self.oom = oom
        self.what = what

    def __str__(self) -> str:
        known = [f"host {self.host}"] if self.host else []
        known += [f"OS pid {self.ospid}"] if self.ospid is not None else []
        text = f"process {self.pid}" + (f" ({', '.join(known)})" if known else "") + f" {self.ending}"
        if self.what == SILENCE and not self.signal and self.exitcode is None:
            return text + "; is it switched off, suspended, or cut off?" + _tail_text(self.stderr_tail)
        text += f" during {self.what}" if self.what else ""
        if self.oom:
            text += "; probably out of memory: the system ended a process of this group to free some. "
            text += "Send less at once, or use fewer workers."
        elif self.signal == "SIGKILL" and self.what != REMOVAL:
            text += "; SIGKILL often means the system ran out of memory"
        return text + _tail_text(self.stderr_tail)

    @property
    def ending(self) -> str:
        """How it went, in a few words: ``"exited with code 3"``."""
        if self.signal:
            return f"was killed by {self.signal}"
        if self.exitcode is not None:
            return f"exited with code {self.exitcode}"
        if self.what == SILENCE:
            return "is lost: nothing came from its host for SHMDIST_HEARTBEAT_TIMEOUT seconds"
        return "closed its connection (exit status unknown)"


def no_workers_left(deaths: Sequence[Any], cure: str) -> ShmdistError:
    """Return the error of work for which there is no worker, because all have died.

    Parameters
    ----------
    deaths : sequence of ProcessExitedException
        How they went.
    cure : str
        What the program can do about it.
    """
    told = [f"process {death.pid} {death.ending}" for death in deaths]
    if len(told) > _TOLD:
        told[_TOLD:] = [f"and {len(told) - _TOLD} more"]
    return ShmdistError(f"no workers left ({len(deaths)} died: {', '.join(told)}); {cure}")


_TOLD = 8  # deaths named in one text, at most


def _tail_text(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "\nLast lines of its stderr:" + "".join(f"\n    {line.rstrip()}" for line in lines)


class LaunchWorkerError(ShmdistError):
    """Some of the workers asked for did not come up.

    Parameters
    ----------
    message : str
        What went wrong.
    host, phase : str, optional
        Where, and during which step (``"connect"``, ``"authenticate"``).
    command, exitcode : str or sequence of str, and int, optional
        The command that was run there, and what it ended with.
    stderr_tail : sequence of str
        The last lines it wrote.
    pids : sequence of int
        Workers of the same request that did start, and stay in the cluster.
    causes : sequence of BaseException
        The failures one by one, where there were several.

    Examples
    --------
    >>> print(LaunchWorkerError("no answer in 60 s", host="node7", phase="connect", pids=[2, 3]))
    no answer in 60 s (host node7, phase connect)
    Started and still in the cluster: 2, 3
    """

    __module__ = "shmdist"

    def __init__(
        self,
        message: str,
        *,
        host: str | None = None,
        phase: str | None = None,
        command: str | Sequence[str] | None = None,
        exitcode: int | None = None,
        stderr_tail: Sequence[str] = (),
        pids: Sequence[int] = (),
        causes: Sequence[BaseException] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.phase = phase
        self.command = command
        self.exitcode = exitcode
        self.stderr_tail = tuple(stderr_tail)
        self.pids = tuple(pids)
        self.causes = tuple(causes)

    def __str__(self) -> str:
        known = [f"host {self.host}"] if self.host else []
        known += [f"phase {self.phase}"] if self.phase else []
        known += [f"exit code {self.exitcode}"] if self.exitcode is not None else []
        text = self.message + (f" ({', '.join(known)})" if known else "")
        if self.command:
            command = self.command if isinstance(self.command, str) else " ".join(self.command)
            text += f"\nCommand: {command}"
        text += _tail_text(self.stderr_tail)
        for cause in self.causes:
            text += f"\nCause: {type(cause).__name__}: " + _safe_str(cause).replace("\n", "\n    ")
        if self.pids:
            text += "\nStarted and still in the cluster: " + ", ".join(map(str, self.pids))
        return text


class ChannelClosed(ShmdistError):
    """A channel is closed, and what was asked of it needs it open.

    Examples
    --------
    >>> raise ChannelClosed("channel is closed")
    Traceback (most recent call last):
    shmdist.ChannelClosed: channel is closed
    """

    __module__ = "shmdist"


class FinalizerError(ShmdistError):
    """A finalizer asked for what it cannot have where it runs; no outcome of what it asked about."""


class SerializationError(ShmdistError):
    """Something cannot be sent to another process.

    Parameters
    ----------
    message : str
        What could not be sent and why.
    path : str, optional
        The way from the argument to the part at fault, such as ``"args[0].model['lock']"``; it may begin
        with an element of a map, a binding or the function as well: ``"element 3['lock']"``.
    obj_type : str, optional
        Name of the part at fault's type.

    Examples
    --------
    >>> print(SerializationError("cannot send", path="args[0].lock", obj_type="_thread.lock"))
    cannot send: args[0].lock, of type _thread.lock
    """

    __module__ = "shmdist"

    def __init__(self, message: str, *, path: str | None = None, obj_type: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.obj_type = obj_type

    def __str__(self) -> str:
        known = [self.path] if self.path else []
        known += [f"of type {self.obj_type}"] if self.obj_type else []
        return f"{self.message}: {', '.join(known)}" if known else self.message


class AuthenticationError(ShmdistError):
    """The other end of a connection could not prove that it belongs to this cluster.

    Parameters
    ----------
    message : str
    reply : bytes
        What to send to the other end before closing; may be empty.

    Examples
    --------
    >>> AuthenticationError("cookie refused").reply
    b''
    """

    __module__ = "shmdist"

    def __init__(self, message: str, *, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


class VersionMismatch(ShmdistError):
    """The two ends of a connection speak different protocols; made as `AuthenticationError` is.

    Examples
    --------
    >>> print(VersionMismatch("protocol 1 here, 2 there"))
    protocol 1 here, 2 there
    """

    __module__ = "shmdist"

    def __init__(self, message: str, *, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


class CompositeException(ShmdistError, ExceptionGroup[Exception]):
    """Several failures at once; an `ExceptionGroup`, so ``except*`` and ``split`` work.

    Parameters
    ----------
    message : str
        What they failed in.
    exceptions : sequence of BaseException
        At least one.  A group of this kind may hold only `Exception`: anything else, such as
        ``KeyboardInterrupt``, is held as a `RemoteException` whose ``captured.ex`` it is.
    pid : int
        The process said to have raised what is so wrapped; 0 where that is not known.

    References
    ----------
    Julia manual, `CompositeException` in "Tasks".

    Examples
    --------
    >>> group = CompositeException("sync", [ValueError("a"), KeyError("b")])
    >>> print(group)
    sync: 2 failures, the first ValueError: a
    >>> group.subgroup(KeyError).exceptions
    (KeyError('b'),)
    """

    __module__ = "shmdist"

    def __new__(
        cls, message: str, exceptions: Sequence[BaseException], *, pid: int = 0
    ) -> CompositeException:
        """Make the group; its members are fixed here, before ``__init__``."""
        held = [e if isinstance(e, Exception) else remote_exception(pid, capture(e)) for e in exceptions]
        return super().__new__(cls, message, held)

    def __init__(self, message: str, exceptions: Sequence[BaseException], *, pid: int = 0) -> None:
        # The base's __init__ would store what the caller gave; keep what __new__ made of it.
        super().__init__(message, self.exceptions)

    def derive(self, excs: Sequence[Exception], /) -> CompositeException:  # type: ignore[override]  # has no T
        """Make the group that holds a part of these failures; for ``split`` and ``except*``."""
        return CompositeException(self.message, excs)

    def __str__(self) -> str:
        first, count = self.exceptions[0], len(self.exceptions)
        failures = "1 failure" if count == 1 else f"{count} failures, the first"
        return f"{self.message}: {failures} {type(first).__name__}: {_first_line(first)}"


def _first_line(exc: BaseException) -> str:
    return (_safe_str(exc).splitlines() or [""])[0]


def describe_exit(returncode: int | None) -> tuple[int | None, str | None]:
    """Split a return code of `subprocess` into exit code and signal name.

    Parameters
    ----------
    returncode : int or None
        As ``Popen.returncode``: negative for a signal, None while the process runs.

    Returns
    -------
    exitcode : int or None
    signal : str or None

    Examples
    --------
    >>> describe_exit(3), describe_exit(-9)
    ((3, None), (None, 'SIGKILL'))
    """
    if returncode is None or returncode >= 0:
        return returncode, None
    import signal

    try:
        return None, signal.Signals(-returncode).name
    except ValueError:  # A real-time signal between the two that have names.
        return None, f"signal {-returncode}"
