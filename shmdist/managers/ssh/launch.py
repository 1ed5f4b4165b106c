"""One launch of workers by SSH: all machines at once, each with its own success or failure."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from shmdist._paths import PACKAGE_ROOT
from shmdist._version import __version__
from shmdist.errors import LaunchWorkerError
from shmdist.managers.base import THREAD_VARIABLES, working_folder
from shmdist.managers.local import own_flags
from shmdist.managers.processes import authkey, hash_seed
from shmdist.managers.ssh.config import Hop, find_route, read_config
from shmdist.managers.ssh.host_key_check import PhaseError
from shmdist.managers.ssh.host_spec import Machine, env_for, for_machine
from shmdist.managers.ssh.login import Agent, Credentials, Login
from shmdist.managers.ssh.remote_worker import Pump, RemoteWorker, digest, launch_line, read_sources

_STEP_TIMEOUT = 20.0  # for each step of a login


class Launching:
    """The logins and workers of one launch; it lives as long as the last of them.

    Parameters
    ----------
    machines : sequence of Machine
    params : dict
        Of ``addprocs``, with the cookie.
    """

    def __init__(self, machines: Sequence[Machine], params: dict[str, Any]) -> None:
        self._machines, self._params = machines, params
        self.timeout = float(os.environ.get("SHMDIST_WORKER_TIMEOUT", "60"))
        self.failures: list[LaunchWorkerError] = []  # of machines that no worker was begun on
        self._slots = threading.Semaphore(max(1, int(params["max_parallel"])))
        self._agent = Agent()
        self._pump = Pump()
        self._digest = digest(read_sources("shmdist"))
        self._config = read_config(params["ssh_config"])
        self._folder = working_folder()
        self._lock = threading.Lock()  # guards what follows
        self._logins: dict[tuple[Any, ...], Login] = {}
        self._users: dict[Login, int] = {}  # workers of a login, or of one that goes through it
        self._workers: list[RemoteWorker] = []
        self._settled = False
        self._given_up = False
        self._jobs = 0  # machines that are being logged in to; the launching thread's
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()

    # ------------------------------------------------------------------ begin

    def begin(self) -> None:
        """Begin with all machines.

        Raises
        ------
        ValueError
            The ssh configuration makes no sense; nothing was begun.
        """
        routes = [find_route(machine, self._params, self._config) for machine in self._machines]
        for machine, route in zip(self._machines, routes, strict=True):
            self._spawn(machine, self._login(route, machine), machine.count or 1)

    def _login(self, route: tuple[Hop, ...], machine: Machine) -> Login:
        """Return the login at the end of a way; those that go the same way share it."""
        params = self._params
        keys = for_machine(params["key_filename"], machine, ()) or ()
        files = (os.fspath(keys),) if isinstance(keys, (str, os.PathLike)) else tuple(map(os.fspath, keys))
        password = for_machine(params["password"], machine)
        credentials = Credentials(files, params["passphrase"], password, params["allow_agent"])
        login: Login | None = None
        key: tuple[Any, ...] = (files, password)
        for hop in route:
            key = (*key, hop)
            if key not in self._logins:
                step = min(self.timeout, _STEP_TIMEOUT)
                self._logins[key] = Login(hop, login, credentials, self._agent, self._slots, step)
            login = self._logins[key]
        assert login is not None
        return login

    def _spawn(self, machine: Machine, login: Login, count: int) -> None:
        self._jobs += 1
        threading.Thread(
            target=self._begin_machine, args=(machine, login, count), name="shmdist-ssh-launch", daemon=True
        ).start()

    def _begin_machine(self, machine: Machine, login: Login, count: int) -> None:
        """Log in, and begin `count` workers; on a thread of its own."""
        begun: list[RemoteWorker] = []
        failure = None
        commands: list[str] = []
        try:
            commands = self._commands(machine)
            login.ensure()
            for _ in range(count):
                worker = self._worker(machine, login, commands)
                begun.append(worker)
                worker.start(self.timeout)
        except Exception as error:
            phase = error.phase if isinstance(error, PhaseError) else "launch"
            if begun:
                begun[-1].fail(phase, str(error))
            else:
                command = commands[0] if commands and phase == "launch" else None
                failure = LaunchWorkerError(str(error), host=str(login.hop), phase=phase, command=command)
        self._news.put((len(begun), failure))

    def _worker(self, machine: Machine, login: Login, commands: list[str]) -> RemoteWorker:
        worker = RemoteWorker(
            machine, login, self._settings(machine), commands, self._pump, self._news.put, self._leave
        )
        with self._lock:
            if self._given_up:
                raise PhaseError("launch", "the launch was given up")
            self._workers.append(worker)
            each: Login | None = login
            while each is not None:
                self._users[each] = self._users.get(each, 0) + 1
                each = each.via
        return worker

    def _commands(self, machine: Machine) -> list[str]:
        """Return the command lines to try: this interpreter's path, then others' names."""
        params = self._params
        flags = for_machine(params["exeflags"], machine, ()) or ()
        flags = [flags] if isinstance(flags, str) else list(flags)
        seed = hash_seed({**os.environ, **env_for(params["env"], machine)}, params)
        exename = for_machine(params["exename"], machine)
        if exename is not None:
            words = [exename] if isinstance(exename, (str, os.PathLike)) else list(exename)
            return [launch_line([os.fspath(word) for word in words], flags, seed)]
        minor = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        mine = None if getattr(sys, "frozen", False) else sys.executable
        names = [name for name in (mine, minor, "python3") if name]
        return [launch_line([name], [*own_flags(), *flags], seed) for name in names]

    def _settings(self, machine: Machine) -> dict[str, Any]:
        """Return what a worker is told by standard input."""
        params = self._params
        folder = for_machine(params["dir"], machine)
        env = {name: value for name, value in os.environ.items() if name.startswith("SHMDIST_")}
        blas = {} if params["enable_threaded_blas"] else dict.fromkeys(THREAD_VARIABLES, "1")
        return {
            "cookie": params["cookie"],
            "authkey": authkey(),
            "python": sys.version.split()[0],
            "version": __version__,
            "digest": self._digest,
            "root": PACKAGE_ROOT,
            "numpy": _numpy_version(),
            "dir": os.fspath(folder) if folder is not None else self._folder,
            "dir_wanted": folder is not None,
            "env": {**env, **env_for(params["env"], machine)},
            "defaults": blas,
            "prefix": sys.prefix,
            "path": [os.path.join(self._folder, entry) for entry in sys.path],
            "bootstrap": bool(params["bootstrap"]),
            "tunnel": bool(params["tunnel"]),
            "bind_addr": machine.bind_addr or ("127.0.0.1" if params["tunnel"] else None),
            "bind_port": machine.bind_port or 0,
        }

    # ------------------------------------------------------------------ outcomes

    def outcomes(self) -> Iterator[RemoteWorker]:
        """Yield each worker when it is up or has failed, until all machines are done with."""
        begun = decided = 0
        while self._jobs or decided < begun:
            try:
                news = self._news.get(timeout=self._patience())
            except queue.Empty:
                self._fail_late()
                continue
            if isinstance(news, RemoteWorker):
                decided += 1
                if news.machine.count is None and news.config is not None:
                    self._fill(news)
                if news.failure is not None:
                    news.discard()
                yield news
                continue
            number, failure = news
            begun += number
            self._jobs -= 1
            if failure is not None:
                self.failures.append(failure)

    def _fill(self, first: RemoteWorker) -> None:
        """Begin as many further workers as the machine has CPUs, for the count "auto"."""
        cpus = int(first.hello.get("cpus", 1))
        with self._lock:
            others = sum(worker.machine is first.machine for worker in self._workers)
        if others == 1 and cpus > 1:
            self._spawn(first.machine, first.login, cpus - 1)

    def _patience(self) -> float:
        """Return the seconds until the first worker's time is up."""
        with self._lock:
            ends = [worker.deadline for worker in self._workers if worker.undecided]
        return max(0.01, min([*ends, time.monotonic() + 1.0]) - time.monotonic())

    def _fail_late(self) -> None:
        """Fail the workers whose time is up."""
        now = time.monotonic()
        with self._lock:
            late = [worker for worker in self._workers if worker.undecided and worker.deadline <= now]
        for worker in late:
            worker.fail(
                "launch", f"the worker said nothing within {self.timeout:g} s (SHMDIST_WORKER_TIMEOUT)"
            )

    # ------------------------------------------------------------------ end

    def give_up(self) -> None:
        """End all that has been begun and is not a member yet."""
        with self._lock:
            self._given_up = True
            unwanted = [worker for worker in self._workers if not worker.handed_over]
        for worker in unwanted:
            worker.discard()
        self.settle()  # a login is closed in whatever it is at

    def settle(self) -> None:
        """From now on, close each login when its last worker is gone."""
        with self._lock:
            self._settled = True
        self._close_unused()

    def _leave(self, worker: RemoteWorker) -> None:
        """A worker is done with."""
        with self._lock:
            self._workers.remove(worker)
            each: Login | None = worker.login
            while each is not None:
                self._users[each] -= 1
                each = each.via
        self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            if not self._settled:
                return
            unused = [key for key, login in self._logins.items() if not self._users.get(login)]
            closing = [self._logins.pop(key) for key in unused]
            last = not self._logins and bool(closing)
        for login in reversed(closing):  # those before it on the way come after it
            with contextlib.suppress(Exception):
                login.close()
        if last:
            self._pump.close()
            self._agent.close()


def _numpy_version() -> str | None:
    """Return the version of numpy here, without loading it."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        return str(numpy.__version__)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("numpy")
    except PackageNotFoundError:
        return None


__all__ = ["Launching"]
