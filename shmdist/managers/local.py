"""The manager of workers on this host: it starts all their processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmdist._paths import PACKAGE_ROOT
from shmdist.errors import LaunchWorkerError, describe_exit
from shmdist.managers.base import (
    THREAD_VARIABLES,
    ClusterManager,
    WorkerConfig,
    refusal,
    usable_cpus,
    working_folder,
)
from shmdist.managers.processes import WorkerProcess, authkey, hash_seed
from shmdist.memory.progress_page import make_page
from shmdist.transport import versions

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_MARK = "SHMDIST_IS_TO_BE_WORKER"  # a variable that a worker removes: who still has it is no worker
_IGNORES_ENVIRONMENT = re.compile("-[bBdiOPqRsSuvVx]*[EI]")  # -E or -I, perhaps among other flags
_BE_WORKER = "from shmdist.__main__ import main; main(['worker'])"
_MAX_OUTPUT_BYTES = 1 << 20  # of a worker's output looked through for its line


class LocalManager(ClusterManager):
    """Launches `n` workers on this host.

    Parameters
    ----------
    n : int, optional
        How many; ``None``: one per CPU that this process may use.
    restrict : bool
        Let the workers be reached from this host alone.

    References
    ----------
    Julia manual, `LocalManager` in "Distributed Computing".

    Examples
    --------
    >>> LocalManager(4)
    LocalManager(4, restrict=True)
    """

    def __init__(self, n: int | None = None, restrict: bool = True) -> None:
        if n is None:
            n = usable_cpus()
        if isinstance(n, bool) or not hasattr(n, "__index__") or n.__index__() < 1:
            raise ValueError(f"the number of workers must be a positive integer, not {n!r}")
        self.n = n.__index__()
        self.restrict = restrict

    def __repr__(self) -> str:
        return f"LocalManager({self.n}, restrict={self.restrict})"

    def default_params(self) -> dict[str, Any]:
        """Return the common parameters and ``restrict``."""
        return {**super().default_params(), "restrict": self.restrict}

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        """Start the processes, and yield each as soon as it has said where it listens."""
        launches: list[_Launch] = []
        try:
            _check_interpreter(params)
            params = {**params, "dir": params["dir"] or working_folder()}
            try:
                for _ in range(self.n):
                    launches.append(_Launch(params))
            except OSError as error:
                raise LaunchWorkerError(
                    f"a worker process could not be started: {refusal(error)}",
                    host="localhost",
                    phase="start",
                    command=_command_text(params),
                ) from error
            yield from _until_up(launches)
        finally:
            for launch in launches:
                if not launch.up:
                    launch.discard()
        failed = [launch.failure for launch in launches if launch.failure is not None]
        if failed:
            first = _by_version(failed[0], params)
            first.causes = tuple(failed[1:2])  # they fail alike; one more shows it
            raise first

    def connect(self, id: int, config: WorkerConfig) -> Connection:
        """Connect by AF_UNIX; by TCP where `exename` has put the worker into another network namespace."""
        try:
            return super().connect(id, config)
        except OSError:
            if config.port is None:
                raise
            config.connect_at = ("tcp", (config.bind_addr, config.port))
            return super().connect(id, config)

    def kill(self, id: int, config: WorkerConfig) -> None:
        """Kill the process."""
        config.process.kill()

    def manage(self, id: int, config: WorkerConfig, op: str) -> None:
        """Reap the process when it is done with."""
        if op != "finalize" or config.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            config.process.wait(timeout=1)
            return
        config.process.kill()  # it has closed its link, or is another program now: nobody else will
        with contextlib.suppress(subprocess.TimeoutExpired):
            config.process.wait(timeout=5)


def _until_up(launches: list[_Launch]) -> Iterator[WorkerConfig]:
    """Yield each worker as it comes up, until all have, failed, or the time is up."""
    timeout = float(os.environ.get("SHMDIST_WORKER_TIMEOUT", "60"))
    deadline = time.monotonic() + timeout
    waiting = len(launches)
    with selectors.DefaultSelector() as selector:
        for launch in launches:
            selector.register(launch.out, selectors.EVENT_READ, launch)
            selector.register(launch.err, selectors.EVENT_READ, launch)
        while waiting:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                for launch in launches:
                    if not launch.up and launch.failure is None:
                        launch.fail(f"said nothing within {timeout:g} s (SHMDIST_WORKER_TIMEOUT)")
                return
            for key, _ in ready:
                launch = key.data
                if launch.decided():
                    continue
                more = launch.read(key.fd)
                if launch.decided():
                    waiting -= 1
                    for fd in (launch.out, launch.err):
                        with contextlib.suppress(KeyError):
                            selector.unregister(fd)
                elif not more:
                    selector.unregister(key.fd)
                if launch.up:
                    yield launch.config()


class _Launch:
    """One process on its way to be a worker."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.up = False
        self.failure: LaunchWorkerError | None = None
        self.command = _command(params)
        self.address = ""
        self.text = {}  # type: dict[int, bytes]
        environment = _environment(params)
        settings = {
            "cookie": params["cookie"],
            "path": _module_path(),
            "pythonpath": (environment.get("PYTHONPATH")),
            "prefix": sys.prefix,
            "local": bool(params["restrict"]),
            "bind_addr": "auto",  # if it listens by TCP at all
            "tell_unix": True,  # then too: memory is shared by AF_UNIX alone
            "parent": os.getpid(),
            "authkey": authkey(),
        }
        self.page = make_page()
        if self.page is not None:
            settings["page"] = self.page.fd
        # The worker's users see their own, as with the module path below.
        settings["hash_seed"] = environment.get("PYTHONHASHSEED")
        environment["PYTHONHASHSEED"] = hash_seed(environment, params)
        # The package itself must be found before the path can be told.
        former = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = PACKAGE_ROOT if not former else f"{PACKAGE_ROOT}{os.pathsep}{former}"
        try:
            self.process = self._popen(params, environment)
        except BaseException:
            if self.page is not None:
                self.page.close()
            raise
        if self.page is not None:
            self.page.close_fd()
        streams = self.process.stdin, self.process.stdout, self.process.stderr
        assert streams[0] is not None and streams[1] is not None and streams[2] is not None
        # The pipe of the cookie stays open: its end tells the worker that this process is gone.
        self.lifeline = streams[0]
        with contextlib.suppress(BrokenPipeError):
            self.lifeline.write(json.dumps(settings).encode() + b"\n")
        # Bare descriptors: Popen would close its own stream objects when it is collected.
        self.out = self.err = -1
        try:
            self.out = os.dup(streams[1].fileno())
            self.err = os.dup(streams[2].fileno())
        except OSError:  # too many open files
            self.discard()
            raise
        finally:
            streams[1].close()
            streams[2].close()
        self.text = {self.out: b"", self.err: b""}

    def _popen(self, params: dict[str, Any], environment: dict[str, str]) -> WorkerProcess:
        """Start the process."""
        return WorkerProcess(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # closing must not try once more to write to a process that is gone
            cwd=params["dir"],
            env=environment,
            # The terminal's Ctrl-C is for process 1, which knows what to do about its workers.
            start_new_session=True,
            pass_fds=() if self.page is None else (self.page.fd,),
        )

    def read(self, fd: int) -> bool:
        """Read what has come, and look for the line; False at the end of the pipe."""
        data = os.read(fd, 1 << 16)
        self.text[fd] += data
        if fd == self.out:
            before, found, after = self.text[fd].partition(b"shmdist_worker:")
            if found and b"\n" in after:
                line, _, rest = after.partition(b"\n")
                self.address = line.decode().strip()
                self.text[fd] = before + rest
                self.up = True
            elif len(self.text[fd]) > _MAX_OUTPUT_BYTES:
                self.fail("printed much, but not where it listens")
        if not data and fd == self.out and not self.up:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
            with contextlib.suppress(OSError):
                os.set_blocking(self.err, False)
                self.text[self.err] += os.read(self.err, 1 << 20)
            self.fail("ended before it was up")
        return bool(data)

    def decided(self) -> bool:
        """Return whether the worker is up or has failed."""
        return self.up or self.failure is not None

    def fail(self, message: str) -> None:
        """Note why this worker did not come up."""
        exitcode, name = describe_exit(self.process.exit_status())
        if name is not None:
            message += f" (killed by {name})"
        interpreter = self.command[: self.command.index("-P")]
        if not any("py" in os.path.basename(word).lower() for word in interpreter):
            message += f"; is {interpreter[0]} a Python interpreter? Tell addprocs one with exename="
        self.failure = LaunchWorkerError(
            f"a worker on this host {message}",
            host="localhost",
            phase="start",
            command=" ".join(self.command),
            exitcode=exitcode,
            stderr_tail=self.text[self.err].decode("utf-8", "replace").splitlines()[-50:],
        )

    def discard(self) -> None:
        """End the process, and give everything back."""
        self.process.kill()
        self.process.wait()
        self.lifeline.close()
        for fd in (self.out, self.err):
            if fd >= 0:
                os.close(fd)
        if self.page is not None:
            self.page.close()

    def config(self) -> WorkerConfig:
        """Return the configuration of the worker, which is up."""
        port, *places = self.address.split("#")
        path = places[-1].removeprefix("unix:")
        connect_at = ("unix", "\0" + path[1:] if path.startswith("@") else path)
        return WorkerConfig(
            io=(self.out, self.err),
            io_rest=(self.text[self.out], self.text[self.err]),
            host="localhost",
            port=int(port) or None,
            bind_addr=places[0] if int(port) else None,
            connect_at=connect_at,
            process=self.process,
            ospid=self.process.pid,
            userdata=self.lifeline,
            page=self.page,
        )


def _module_path() -> list[str]:
    """Return ``sys.path`` for a process of another working directory."""
    try:
        return [entry or os.getcwd() for entry in sys.path]
    except OSError:  # it has been deleted, so nothing can be imported from it
        return [entry for entry in sys.path if entry]


def _check_interpreter(params: dict[str, Any]) -> None:
    """Refuse to start a program that is no Python interpreter: this one, once more."""
    message = None
    if params["exename"] is None and getattr(sys, "frozen", False):
        message = f"this program is frozen, so that its sys.executable, {sys.executable}, is no interpreter"
    elif _MARK in os.environ:
        message = "this program was started in place of a Python interpreter that is to be a worker"
    if message is not None:
        raise LaunchWorkerError(
            f"{message}: tell addprocs the Python interpreter with exename=", host="localhost", phase="start"
        )


def _command(params: dict[str, Any]) -> list[str]:
    """Return the command line of a worker."""
    executable = params["exename"] or sys.executable
    flags = params["exeflags"]
    flags = [flags] if isinstance(flags, str) else list(flags)
    if not executable:
        raise LaunchWorkerError(
            "this program has no sys.executable: tell addprocs the Python interpreter with exename=",
            host="localhost",
            phase="start",
        )
    command = _words(executable)
    if params["exename"] is None:
        command += own_flags()
    # -P: the current directory must not come before the standard library.
    command += ["-P", *flags]
    if any(map(_IGNORES_ENVIRONMENT.match, command[1:])):  # and so the path to the package there
        command += ["-c", f"import sys; sys.path.insert(0, {PACKAGE_ROOT!r}); {_BE_WORKER}"]
    return [*command, "-m", "shmdist", "worker"]


def _by_version(failure: LaunchWorkerError, params: dict[str, Any]) -> LaunchWorkerError:
    """Return a better reason why a launch failed: an interpreter too old to take our flags, say."""
    words = params["exename"]
    if words is None or failure.exitcode is None:  # it has not ended by itself
        return failure
    try:
        asked = [*_words(words), "-c", "import sys; print(sys.version.split()[0])"]
        said = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2.0)
    except (OSError, subprocess.SubprocessError):
        return failure
    if re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+\S*\n", said.stdout) is None:
        return failure
    mine = versions.own_versions(numpy=False)
    why = versions.conflict(mine, mine._replace(python=said.stdout.strip()), "a worker on this host")
    if why is None:
        return failure
    return LaunchWorkerError(
        why,
        host=failure.host,
        phase="versions",
        command=failure.command,
        exitcode=failure.exitcode,
        stderr_tail=failure.stderr_tail,
    )


def _words(executable: Any) -> list[str]:
    """Return the words of an interpreter: a path, or several words."""
    several = [executable] if isinstance(executable, (str, os.PathLike)) else executable
    return [os.fspath(word) for word in several]


def _command_text(params: dict[str, Any]) -> str:
    return " ".join(_command(params))


def own_flags() -> list[str]:
    """Return the flags that make a worker's interpreter behave as this one does."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # multiprocessing's
    for key, value in sys._xoptions.items():  # those that it does not know
        option = key if value is True else f"{key}={value}"
        if option not in flags:
            flags += ["-X", option]
    return flags


def _environment(params: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a worker."""
    environment = dict(os.environ)
    if not params["enable_threaded_blas"]:
        for name in THREAD_VARIABLES:
            environment.setdefault(name, "1")
    environment[_MARK] = "1"
    environment.update({str(key): str(value) for key, value in dict(params["env"]).items()})
    return environment


__all__ = ["LocalManager", "own_flags"]
