"""The cluster-manager interface: how worker processes are launched, reached and ended."""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shmdist._log import warn
from shmdist.memory.limits import control_groups

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

#: Variables that set how many threads numerical libraries use.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass
class WorkerConfig:
    """What a manager knows of one worker; it fills in what it needs.

    Attributes
    ----------
    io : tuple of int, optional
        Descriptors of the worker's standard output and error, which process 1 reads.
    host : str, optional
        Host name, for people and error texts; with `port`, where the worker is reached.
    port : int, optional
        Port the worker listens on.
    count : int, str or None
        Number of workers to launch on the host.
    exename, exeflags : str and sequence of str, optional
        Python interpreter and its arguments.
    userdata : object
        Whatever the manager wants to keep.
    tunnel, forward : bool and int, optional
        Whether all traffic goes through the login's connection, and the local port for it.
    multiplex : bool, optional
        Whether tunnels share one login. For Julia's managers; `SSHManager` always has one
        login for a host, and does not ask.
    bind_addr : str, optional
        Address the worker listens on; without it, that of `host`.
    sshflags : object
        Further settings of the login.
    max_parallel : int, optional
        Logins at once.
    connect_at : tuple, optional
        Where the worker is reached: ``("unix", path)`` or ``("tcp", (host, port))``. By
        default `port` at `bind_addr` or `host`.
    process : object
        Of a local process, its ``subprocess.Popen``.
    ospid : int, optional
        Process id in the worker's operating system.
    environ : mapping, optional
        Environment of the worker.
    ident, connect_idents : object and sequence, optional
        With ``topology="custom"``: the worker's own name, and the names of the workers
        it may be connected with.
    enable_threaded_blas : bool, optional
        Whether numerical libraries may use several threads.

    References
    ----------
    Julia manual, `WorkerConfig` in "Distributed Computing".

    Examples
    --------
    >>> WorkerConfig(host="localhost", connect_at=("tcp", ("127.0.0.1", 9000))).port is None
    True
    """

    io: tuple[int, int] | None = None
    host: str | None = None
    port: int | None = None
    count: int | str | None = None
    exename: str | None = None
    exeflags: Sequence[str] | None = None
    userdata: Any = None
    tunnel: bool | None = None
    multiplex: bool | None = None
    forward: int | None = None
    bind_addr: str | None = None
    sshflags: Any = None
    max_parallel: int | None = None
    connect_at: tuple[str, Any] | None = None
    process: Any = None
    ospid: int | None = None
    environ: Mapping[str, str] | None = None
    ident: Any = None
    connect_idents: Sequence[Any] | None = None
    enable_threaded_blas: bool | None = None
    #: Bytes already read from `io`'s descriptors, to be shown with the rest.
    io_rest: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)
    #: Where a local worker notes how far it is.
    page: Any = field(default=None, repr=False)


class ClusterManager(ABC):
    """Base class of cluster managers: how workers are launched, reached, and ended.

    A manager starts worker processes, each of which runs ``start_worker`` with the
    cluster's cookie, and says where each is reached.

    References
    ----------
    Julia manual, "ClusterManagers".

    Examples
    --------
    >>> class Here(ClusterManager):
    ...     def launch(self, params):
    ...         yield WorkerConfig(host="127.0.0.1", port=9009)
    """

    def default_params(self) -> dict[str, Any]:
        """Return the parameters that ``addprocs`` takes for this manager, with defaults.

        The ones common to all managers are there already; a manager adds its own to
        ``super().default_params()``.
        """
        return {
            "topology": "all_to_all",
            "lazy": True,
            "dir": None,
            "exename": None,
            "exeflags": (),
            "env": {},
            "enable_threaded_blas": False,
        }

    @abstractmethod
    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        """Start workers, and yield each one's configuration as it comes up.

        Parameters
        ----------
        params : dict
            As of :meth:`default_params`, with the user's values, and ``cookie``. Also
            ``hash_seed``, the text that is to be ``PYTHONHASHSEED`` in the workers' environment
            where the user has set none: then texts have the same hash on all workers.

        Raises
        ------
        LaunchWorkerError
            After the ones that did start were yielded.
        """

    def manage(self, id: int, config: WorkerConfig, op: str) -> None:  # noqa: B027 - by default, nothing
        """Take note of what happens to a worker.

        Parameters
        ----------
        id : int
            Its process id in the cluster.
        config : WorkerConfig
            As launched.
        op : {"register", "deregister", "interrupt", "finalize"}
            It joined; it left; interrupt it (it also gets a message); forget it.
        """

    def kill(self, id: int, config: WorkerConfig) -> None:  # noqa: B027 - by default, nothing
        """End a worker that has not ended though it was asked to.

        The default does nothing: the manager knows no other way.
        """

    def peer_config(self, **fields: Any) -> WorkerConfig:
        """Return what a worker knows of another one, for :meth:`connect`."""
        return WorkerConfig(**fields)

    def connect(self, id: int, config: WorkerConfig) -> Connection:
        """Return a connection to a launched worker; no handshake yet.

        The default connects to ``config.connect_at``, or else to ``config.port`` at
        ``config.bind_addr`` or ``config.host``. It is asked again when two workers have
        no way to each other: process 1 then makes one more connection to each, and joins them.

        On a worker that was made by ``init_worker(cookie, manager)`` this is asked for
        connections to other workers; `config` then has what all know of each: ``host``,
        ``ospid`` and ``connect_at``.
        """
        from shmdist.transport.listener import connect

        if config.connect_at is None:
            address = config.bind_addr or (config.host or "").rpartition("@")[2]
            if not address or config.port is None:
                raise ValueError(
                    f"{type(self).__name__} gave neither host and port nor connect_at for worker {id}, "
                    f"and has no connect() of its own"
                )
            config.connect_at = ("tcp", (address, config.port))  # others may need it too
        return connect(config.connect_at)


def refusal(error: BaseException) -> str:
    """Return why the system did not let a worker be, and what to do about it."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        # Two for its output, one each for its standard input, its process, the link, a wake-up, its
        # ring segment, and segments of shared memory.
        return f"{error}; raise the limit on open files (ulimit -n): a worker on this host takes about ten"
    return str(error)


def working_folder() -> str:
    """Return the working directory; warn and return the home directory, or ``/``, when it was deleted."""
    try:
        return os.getcwd()
    except OSError as error:
        home = os.path.expanduser("~")
        folder = home if os.path.isdir(home) else "/"
        warn(
            f"shmdist: this program's working directory is gone ({error}): workers start in {folder}; "
            f"name another with dir=",
            RuntimeWarning,
        )
        return folder


def usable_cpus() -> int:
    """Return the number of CPUs this process may use: affinity and cgroup quota respected."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, _quota()))


def _quota() -> int:
    """Return the CPUs that this process's cgroups allow, rounded up; many when they set no limit."""
    least = 1 << 20
    for version, folder in control_groups("cpu"):  # each level may set its own, and the root has none
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = _words(folder, "cpu.max")
            else:
                [quota], [period] = _words(folder, "cpu.cfs_quota_us"), _words(folder, "cpu.cfs_period_us")
            if quota not in ("max", "-1"):
                least = min(least, -(-int(quota) // int(period)))
    return least


def _words(folder: str, name: str) -> list[str]:
    with open(os.path.join(folder, name)) as file:
        return file.read().split()
