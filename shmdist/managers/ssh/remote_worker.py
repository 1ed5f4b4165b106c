"""One worker on a remote host: its launch and its output.

The command line holds the interpreter and one line of Python, quoted so that sh, bash, dash,
zsh, csh and fish take it alike; all else goes by standard input (see ``shmdist.worker.bootstrap``).  What the
worker says of itself it says in lines that begin with a random token, wherever they stand in
what the login shell prints.

One thread, the pump, takes what comes on all channels of a manager. What a worker prints it gives to a
pipe that process 1 reads. Where that is full, for no thread reads the program's output, the pump takes no
more of this worker: the channel's window closes, and the worker's prints wait. A thread waits meanwhile
until the pipe takes more.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pkgutil
import queue
import re
import secrets
import select
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shmdist.errors import LaunchWorkerError
from shmdist.managers.base import WorkerConfig
from shmdist.managers.ssh.host_key_check import PhaseError
from shmdist.managers.ssh.host_spec import Machine
from shmdist.managers.ssh.login import Login

if TYPE_CHECKING:
    import paramiko

_STAGE = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
_KEPT_BYTES = 1 << 16  # kept of what comes before a worker is up
_TAIL = 50  # lines of it shown in an error


def quote(words: Sequence[str]) -> str:
    """Return a command line that all shells of Unix split into `words`.

    Examples
    --------
    >>> quote(["/opt/my python", "-c", "print(1)"])
    "'/opt/my python' '-c' 'print(1)'"
    """
    for word in words:
        if "\n" in word or "\0" in word:
            raise ValueError(f"{word!r} cannot stand on a command line of every shell")
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)


def launch_line(interpreter: Sequence[str], flags: Sequence[str], hash_seed: str) -> str:
    """Return the command line of a worker: nothing in it is secret, or long.

    ``exec`` makes the worker the server's own child, which is how it learns that the
    connection is gone though its threads are busy.
    """
    return "exec " + quote(["env", f"PYTHONHASHSEED={hash_seed}", *interpreter, *flags, "-c", _STAGE])


def read_sources(package: str) -> dict[str, bytes]:
    """Return the sources of an installed package, by their paths."""
    import importlib.util

    found = {}
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for place, _, files in os.walk(folder):
            for file in files:
                if file.endswith(".py"):
                    path = os.path.join(place, file)
                    name = os.path.relpath(path, os.path.dirname(folder)).replace(os.sep, "/")
                    with open(path, "rb") as source:
                        found[name] = source.read()
    return found


def digest(sources: dict[str, bytes]) -> str:
    """Return a digest of a package's sources, by which two hosts find whether theirs are the same."""
    whole = hashlib.sha256()
    for name in sorted(sources):
        whole.update(name.encode() + b"\0" + sources[name] + b"\0")
    return whole.hexdigest()


def archived(packages: Sequence[str]) -> bytes:
    """Return an archive of the sources of installed packages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in packages:
            for name, source in read_sources(package).items():
                archive.writestr(name, source)
    return buffer.getvalue()


def framed(data: bytes) -> bytes:
    """Return bytes after their length, as ``worker.bootstrap`` reads them."""
    return b"%d\n" % len(data) + data


def _nothing(worker: RemoteWorker) -> None:
    pass


class Pump:
    """The thread that takes what comes on channels, and gives it to their workers."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[RemoteWorker | None] = queue.SimpleQueue()
        self._begun = False

    def watch(self, worker: RemoteWorker, channel: paramiko.Channel) -> None:
        """Have `worker` step whenever something has come on `channel`."""
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._run, name="shmdist-ssh-pump", daemon=True).start()
        notifier = _ReadyNotifier(self._ready, worker)
        channel.in_buffer.set_event(notifier)  # type: ignore[arg-type]  # it has what is used of an Event
        channel.in_stderr_buffer.set_event(notifier)  # type: ignore[arg-type]  # as above
        self._ready.put(worker)

    def step(self, worker: RemoteWorker) -> None:
        """Have `worker` step."""
        self._ready.put(worker)

    def _run(self) -> None:
        while (worker := self._ready.get()) is not None:
            try:
                worker.step()
            except Exception as error:
                worker.fail("launch", f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """End the thread."""
        self._ready.put(None)


class _ReadyNotifier:
    """What a channel rings when something has come: an Event to it."""

    def __init__(self, ready: queue.SimpleQueue[Any], worker: RemoteWorker) -> None:
        self._ready, self._worker = ready, worker

    def set(self) -> None:
        self._ready.put(self._worker)

    def clear(self) -> None:
        pass

    set_forever = set


class RemoteWorker:
    """One worker, from its launch on.

    Parameters
    ----------
    machine, login
        Where.
    settings : dict
        What ``worker.bootstrap`` is told.
    commands : list of str
        Command lines; a further one is tried when one finds no interpreter.
    report, leave : callable
        Called with this worker when it is up or has failed, and when it is done with.
    """

    def __init__(
        self,
        machine: Machine,
        login: Login,
        settings: dict[str, Any],
        commands: list[str],
        pump: Pump,
        report: Callable[[RemoteWorker], None],
        leave: Callable[[RemoteWorker], None],
    ) -> None:
        self.machine, self.login = machine, login
        self._settings, self._commands = settings, list(commands)
        self._pump, self._report, self._leave = pump, report, leave
        self._token = b""
        self._channel: paramiko.Channel | None = None
        self._owner = os.getpid()
        self.command = commands[0]
        self.deadline = float("inf")
        self.hello: dict[str, Any] = {}
        self.address: tuple[str, int] | None = None
        self.failure: LaunchWorkerError | None = None
        self._out = self._err = b""
        self._unwritten: tuple[bool, bytes] | None = None  # what the pipe did not take; the pump's
        self._waiting = False  # a thread waits until it does
        self._started = False  # the interpreter runs
        self._pipes: dict[bool, int] = {}  # where the output goes, by whether it is stderr
        self._ended = threading.Event()
        self.exitcode: int | None = None
        self.config: WorkerConfig | None = None
        self._told = False
        self._deciding = threading.Lock()  # guards that one who is not wanted does not come up
        self._unwanted = False
        self.handed_over = False  # whoever launched it knows of it, and ends it

    def __repr__(self) -> str:
        state = "failed" if self.failure else "up" if self.address else "starting"
        return f"<RemoteWorker on {self.login.hop}, {state}>"

    @property
    def undecided(self) -> bool:
        """Whether it is neither up nor failed."""
        return self.config is None and self.failure is None

    # ------------------------------------------------------------------ launch

    def start(self, timeout: float) -> None:
        """Run the next command line."""
        self.command = self._commands.pop(0)
        token = secrets.token_hex(16)
        self._token = token.encode()
        self._out = self._err = b""
        channel = self.login.session()
        with self._deciding:
            if self._unwanted:
                channel.close()
                raise PhaseError("launch", "the launch was given up")
            self._channel = channel
        running = False
        try:
            channel.settimeout(timeout)
            channel.exec_command(self.command)
            running = True
            self.deadline = time.monotonic() + timeout
            self._pump.watch(self, channel)
            source = pkgutil.get_data("shmdist.worker", "bootstrap.py") or b""
            settings = json.dumps({**self._settings, "token": token}).encode()
            channel.sendall(framed(source + b"\nmain()\n") + framed(settings))
        except Exception as error:
            if not running:
                channel.close()
                raise PhaseError("launch", f"the command could not be run: {error}") from error
            # It may have ended by itself, and its output says why: the pump finds that out.

    def step(self) -> None:
        """Take what has come; on the pump's thread."""
        channel = self._channel
        if channel is None or self._ended.is_set() or not self._pass_on_rest():
            return
        over = channel.closed  # asked first: nothing comes after that
        while channel.recv_stderr_ready() and not self._unwritten:
            self._take_err(channel.recv_stderr(1 << 16))
        while channel.recv_ready() and not self._unwritten:
            self._take_out(channel.recv(1 << 16))
        if self._unwritten:
            return  # it is called again when the pipe takes more
        if over or (channel.eof_received and channel.exit_status_ready() and not self.address):
            self._end(channel)

    def _take_err(self, data: bytes) -> None:
        if self.config is not None:
            self._pass_on(True, data)
            return
        self._err = (self._err + data)[-_KEPT_BYTES:]
        _, found, rest = self._err.partition(self._token + b"\n")
        if found:
            self._err = rest  # what the login shell said is no error of the worker
            self._started = True

    def _take_out(self, data: bytes) -> None:
        if self.config is not None:
            self._pass_on(False, data)
            return
        self._out += data
        while self.config is None:
            at = self._out.find(self._token + b" ")
            end = self._out.find(b"\n", at) if at >= 0 else -1
            if end < 0:
                self._out = self._out[max(0, at) if at >= 0 else -_KEPT_BYTES :]
                return
            line, self._out = self._out[at + len(self._token) : end], self._out[end + 1 :]
            self._hear(json.loads(line))

    def _hear(self, told: dict[str, Any]) -> None:
        """Take one line that the worker says of itself."""
        kind = told["kind"]
        self._started = True
        if kind == "need":
            # Not on this thread: it may take long, and others have something to say.
            threading.Thread(target=self._send_sources, args=(told["packages"],), daemon=True).start()
        elif kind == "error":
            self.fail("launch", told["message"])
        elif kind == "hello":
            self.hello = told
        elif kind == "up":
            found = re.fullmatch(r"shmdist_worker:(\d+)#(.*)", told["line"])
            if found is None:
                self.fail("launch", f"the worker says {told['line']!r}, which makes no sense")
            elif self.failure is None:
                self.address = (found[2], int(found[1]))
                self._come_up()

    def _send_sources(self, packages: list[str]) -> None:
        try:
            assert self._channel is not None
            self._channel.sendall(framed(archived(packages)))
        except Exception as error:
            self.fail("launch", f"the package could not be sent: {error}")

    def _come_up(self) -> None:
        with self._deciding:
            if self._unwanted:
                return
            self._make_config()
        self._tell()

    def _make_config(self) -> None:
        read_out, self._pipes[False] = os.pipe()
        read_err, self._pipes[True] = os.pipe()
        for fd in self._pipes.values():
            os.set_blocking(fd, False)
        self.config = WorkerConfig(
            io=(read_out, read_err),
            io_rest=(self._out, self._err),
            host=self.machine.host,
            port=self.address[1] if self.address else None,
            bind_addr=self.machine.bind_addr,
            ospid=self.hello.get("pid"),
            tunnel=self._settings["tunnel"],
            userdata=self,
        )
        self._out = self._err = b""

    def _end(self, channel: paramiko.Channel) -> None:
        """The command has ended."""
        code = channel.exit_status if channel.exit_status_ready() else -1
        self.exitcode = code if code >= 0 else None
        if self.config is None and self.failure is None:
            channel.close()
            if not self._started and self._commands and self.login.transports[-1].is_active():
                self._channel = None  # it may ring again, and is done with
                threading.Thread(target=self._try_next, daemon=True).start()
                return
            self.fail("launch", self._why(code))
        self._ended.set()
        self._close_pipes()

    def _why(self, code: int) -> str:
        if self._started:
            return "the worker ended before it was up"
        if code == 127:
            return "the login shell finds no such interpreter, or ends by itself; name one with exename="
        if code == -1:
            return "the connection ended before the worker was up"
        return "the interpreter did not start"

    def _try_next(self) -> None:
        """There may be another interpreter."""
        try:
            self.start(max(1.0, self.deadline - time.monotonic()))
        except PhaseError as error:
            self.fail(error.phase, str(error))

    def fail(self, phase: str, message: str) -> None:
        """Note why this worker did not come up; once."""
        if self.config is not None or self.failure is not None:
            return
        lines = (self._err or self._out).decode("utf-8", "replace").splitlines()
        lines = [line for line in lines if self._token.decode() not in line]
        self.failure = LaunchWorkerError(
            message,
            host=str(self.login.hop),
            phase=phase,
            command=self.command,
            exitcode=self.exitcode,
            stderr_tail=lines[-_TAIL:],
        )
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._report(self)

    # ------------------------------------------------------------------ life

    def _pass_on(self, error: bool, data: bytes) -> None:
        """Give output to the pipe that process 1 reads."""
        fd = self._pipes.get(error)
        view = memoryview(data)
        try:
            while view and fd is not None:
                view = view[os.write(fd, view) :]
        except BlockingIOError:
            self._unwritten, self._waiting = (error, bytes(view)), True
            name = "shmdist-ssh-output"
            threading.Thread(target=self._wait_for_room, args=(fd,), name=name, daemon=True).start()
        except OSError:
            self._close_pipe(error)  # process 1 is done with it

    def _pass_on_rest(self) -> bool:
        """Give the pipe what it did not take before; False when it still does not."""
        if self._unwritten is not None:
            if self._waiting:
                return False
            (error, data), self._unwritten = self._unwritten, None
            self._pass_on(error, data)
        return self._unwritten is None

    def _wait_for_room(self, fd: int) -> None:
        """Wait until the pipe takes more, or is done with."""
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while not self._ended.is_set() and not poller.poll(500):
            pass
        self._waiting = False
        self._pump.step(self)

    def _close_pipe(self, error: bool) -> None:
        fd = self._pipes.pop(error, None)
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _close_pipes(self) -> None:
        self._close_pipe(False)
        self._close_pipe(True)

    def beat(self) -> None:
        """Let its watchdog hear this process, by a byte on its standard input; it may block."""
        channel = self._channel
        if channel is not None:
            with contextlib.suppress(OSError):  # it has ended
                channel.send(b"\n")

    def wait(self, timeout: float) -> int | None:
        """Wait for the end of the remote process; return its exit code when it is known."""
        self._ended.wait(timeout)
        return self.exitcode

    def finish(self) -> None:
        """End the channel; the worker ends with it."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(Exception):
                channel.close()
        self._ended.set()
        self._close_pipes()
        leave, self._leave = self._leave, _nothing
        leave(self)

    def discard(self) -> None:
        """End a launch that is not wanted any more."""
        with self._deciding:
            self._unwanted = True
        if self.config is not None and self.config.io is not None:
            for fd in self.config.io:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.finish()

    def close(self) -> None:
        """Give back, in a forked child, what belongs to its parent."""
        if os.getpid() != self._owner:
            login: Login | None = self.login
            while login is not None:
                if not login.closed:
                    login.abandon()
                login = login.via
            self._close_pipes()


__all__ = [
    "Pump",
    "RemoteWorker",
    "archived",
    "digest",
    "framed",
    "launch_line",
    "quote",
    "read_sources",
]
