"""Workers on other hosts, started through SSH.

How a worker comes to be
------------------------
1. The machine's text and the ssh configuration give a way: one login, or several, each
   through the one before it (``machines``, ``sshconfig``).
2. Logins are made side by side, at most `max_parallel` at once; one for each host, however
   many workers it gets, and one for each host on the way (``sshlogin``).
3. Each worker gets a channel of its host's login. Its command line is the interpreter and
   one line of Python; cookie, directory, environment and module path go by standard input.
   Where shmdist is missing its source goes the same way (``sshworker``, ``shmdist.worker.bootstrap``).
4. The worker listens, by TCP at the address at which the login came in (or at the one
   that the machine's text names), and says where. With `tunnel` it listens on the
   loopback interface alone.
5. Process 1 connects: directly, or by a channel of the login (``tunnel``). The tunnel is
   also taken where there is no direct way.

How it ends
-----------
With its link; with its channel, which process 1 closes when it removes the worker; and with
the server's process of the login, which ends when process 1 does, however it went.  A
worker that ignores all that is killed by a command of its own.  A login is closed when the
last of its workers is gone.

What fails, fails for one host: `LaunchWorkerError` has one cause for each, with the host, the
step that failed, the command and what the remote side wrote to its standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmdist._log import warn
from shmdist.errors import LaunchWorkerError
from shmdist.managers.base import ClusterManager, WorkerConfig
from shmdist.managers.ssh.host_spec import check_hosts, parse_machines

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from shmdist.managers.ssh.remote_worker import RemoteWorker

_DIRECT_TIMEOUT = 2.0  # a direct connection may take before the login is used instead
_PER_HOST = ("exename", "exeflags", "dir", "env", "password", "key_filename")


class SSHManager(ClusterManager):
    """Launches workers on machines that are reached by SSH.

    Parameters
    ----------
    machines : list
        Texts ``[user@]host[:port] [bind_addr[:port]]``, or pairs of a text and a number of
        workers (or ``"auto"``: one for each CPU there). IPv6 addresses stand in brackets.

    Notes
    -----
    ``addprocs(["host", ("user@host:2222", 4)], **params)`` makes one. Its parameters,
    besides those common to all managers:

    - ``tunnel=False``: carry all traffic through the login's connection, encrypted; the
      workers listen on their loopback interface alone.
    - ``max_parallel=10``: logins at once.
    - ``shell="posix"``: the remote login shell; sh, bash, dash, zsh, csh and fish are alike.
    - ``key_filename``, ``passphrase``, ``password``, ``allow_agent=True``: what proves who
      the user is. The ssh configuration's keys are tried too.
    - ``known_hosts``: a file, or several; default: as the ssh configuration says.
    - ``host_key_policy``: ``"reject"`` refuses hosts whose key is not known,
      ``"accept-new"`` adds their keys; a key that has changed is always refused. Default:
      as the ssh configuration says, else rejection.
    - ``ssh_config``: a file; default the user's and the system's.
    - ``bootstrap=True``: send the source of shmdist to hosts where it is missing, or of
      another version.

    ``exename``, ``exeflags``, ``dir``, ``env``, ``password`` and ``key_filename`` may be
    mappings from hosts to values. The variables ``SHMDIST_*`` of this process are passed on.

    References
    ----------
    Julia manual, `addprocs` and `SSHManager` in "Distributed Computing".

    Examples
    --------
    >>> SSHManager(["node1", ("me@node2:2222", 4)])
    SSHManager(['node1', ('me@node2:2222', 4)])
    """

    def __init__(self, machines: Any) -> None:
        self.machines = parse_machines(machines)
        self._detours: list[str] = []  # what the program is to be warned of at the end of the launch

    def __repr__(self) -> str:
        shown = [m.text if m.count == 1 else (m.text, m.count or "auto") for m in self.machines]
        return f"SSHManager({shown!r})"

    def default_params(self) -> dict[str, Any]:
        """Return the common parameters, and those of SSH."""
        return {
            **super().default_params(),
            "dir": None,
            "tunnel": False,
            "max_parallel": 10,
            "shell": "posix",
            "key_filename": (),
            "passphrase": None,
            "password": None,
            "allow_agent": True,
            "known_hosts": None,
            "host_key_policy": None,
            "ssh_config": None,
            "bootstrap": True,
        }

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        """Log in, start the workers, and yield each as soon as it has said where it listens."""
        if params["shell"] != "posix":
            raise ValueError(
                f"shell must be 'posix': other remote systems are not known, {params['shell']!r}"
            )
        for name in _PER_HOST:
            check_hosts(name, params[name], self.machines)
        # Nobody loads paramiko who starts no worker with it.
        from shmdist.managers.ssh.launch import Launching

        launching = Launching(self.machines, params)
        failures: list[LaunchWorkerError] = []
        try:
            launching.begin()
            for worker in launching.outcomes():
                if worker.config is not None:
                    worker.handed_over = True
                    yield worker.config
                elif worker.failure is not None:
                    failures.append(worker.failure)
        except BaseException:
            launching.give_up()
            raise
        launching.settle()
        self._tell_of_detours()
        failures += launching.failures
        if len(failures) == 1:
            raise failures[0]
        if failures:
            hosts = list(dict.fromkeys(str(failure.host) for failure in failures))
            raise LaunchWorkerError(
                f"{len(failures)} launches failed, on {len(hosts)} of {len(self.machines)} machines: "
                f"{', '.join(hosts)}",
                causes=failures,
            )

    def _tell_of_detours(self) -> None:
        """Warn of logins that carry what they were not asked to."""
        detours, self._detours = self._detours, []
        if detours:
            more = f" (and {len(detours) - 1} more hosts alike)" if len(detours) > 1 else ""
            warn(f"shmdist: {detours[0]}{more}", RuntimeWarning)

    def connect(self, id: int, config: WorkerConfig) -> Connection:
        """Connect to a worker: directly, or through its login."""
        from shmdist.managers.ssh import tunnel
        from shmdist.transport.listener import connect

        worker: RemoteWorker = config.userdata
        host, port = worker.address or ("", 0)
        login = worker.login
        reached: OSError | None = None
        if not config.tunnel and login.direct:
            try:
                # Where the first hosts do not answer, the next may be behind the same firewall.
                patience = max(0.3, _DIRECT_TIMEOUT / (1 + len(self._detours)))
                connection = connect(("tcp", (host, port)), patience)
                config.connect_at = ("tcp", (host, port))
                return connection
            except OSError as error:
                reached = error
                login.direct = False  # no need to find out again
        try:
            connection = tunnel.bridge(login.dial(host, port, window_size=tunnel.WINDOW), worker)
        except Exception as error:
            if reached is not None:
                raise ConnectionError(
                    f"no direct way to {host} port {port} ({reached}), and none through the login ({error})"
                ) from error
            raise
        if reached is not None and not host.startswith(("127.", "::1")):
            self._detours.append(
                f"there is no direct way to {host} port {port} ({reached}): all that goes to workers of "
                f"{login.hop} is carried by its login; pass tunnel=True, which does so from the start, "
                f"or have that host's firewall let its workers' ports through"
            )
        return connection

    def manage(self, id: int, config: WorkerConfig, op: str) -> None:
        """Close what a worker had when it is done with, and its login with its last worker."""
        if op == "finalize":
            worker: RemoteWorker = config.userdata
            worker.finish()

    def kill(self, id: int, config: WorkerConfig) -> None:
        """Kill the process, by a command of its own."""
        worker: RemoteWorker = config.userdata
        if config.ospid:
            with contextlib.suppress(Exception):
                worker.login.run(f"kill -9 {config.ospid}")
        worker.finish()


__all__ = ["SSHManager"]
