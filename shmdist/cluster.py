"""Adds and removes workers, and tells which processes are in the cluster."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from shmdist._timeouts import seconds
from shmdist.errors import ShmdistError
from shmdist.managers.base import ClusterManager
from shmdist.managers.local import LocalManager
from shmdist.managers.ssh.manager import SSHManager
from shmdist.membership.controller import ClusterController
from shmdist.processes import process_ids, workers
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node
from shmdist.tasks import start_task
from shmdist.transport.messages import Kind

_TOPOLOGIES = ("all_to_all", "master_worker", "custom")


class WorkerList(list[int]):
    """The process ids that ``addprocs`` returns; as a context manager it removes them.

    Examples
    --------
    >>> with addprocs(1) as pids:  # doctest: +SKIP
    ...     print(pids)
    [2]
    """

    __module__ = "shmdist"

    def __enter__(self) -> WorkerList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        node = current_node()
        members = [pid for pid in self if pid in node.peers.members or pid in node.peers.leaving]
        if members:  # those that died as well: from here on the program does without them
            rmprocs(*members)


def _cluster(what: str) -> ClusterController:
    """Return process 1's cluster; elsewhere it is an error."""
    node = current_node()
    if node.pid != 1:
        raise ShmdistError(
            f"only process 1 can {what}, and this is process {node.pid}: use remotecall(..., 1)"
        )
    return node.part(ClusterController)


def addprocs(n: Any = None, **params: Any) -> WorkerList:
    """Add worker processes.

    Parameters
    ----------
    n : int, list, ClusterManager, or None
        How many workers on this host; ``None``: one per CPU that this process may use. Or
        machines to be reached by SSH, each ``"[user@]host[:port] [bind_addr[:port]]"`` or
        such a text and a count: ``["node1", ("me@node2", 4), ("node3", "auto")]``; see
        `SSHManager` for the parameters it takes. Or a manager that launches them.
    topology : {"all_to_all", "master_worker", "custom"}
        Which workers may be connected with one another.
    lazy : bool
        Connect two workers when one first calls the other, not now.
    dir : str
        The workers' working directory; default the current one.
    exename : str
        The Python interpreter; default this one.
    exeflags : sequence of str
        Arguments for the interpreter.
    env : mapping
        Environment variables of the workers, besides this process's.
    enable_threaded_blas : bool
        Let numerical libraries use threads in the workers. By default the variables that
        say so are set to 1, unless the program's environment has them.
    restrict : bool
        For local workers: let them be reached from this host alone.

    Returns
    -------
    list of int
        Their process ids. Also a context manager that removes them at its end.

    Raises
    ------
    LaunchWorkerError
        Some did not come up; ``pids`` has those that did, and they stay.
    TypeError
        A parameter that the manager does not have.

    Notes
    -----
    No ``if __name__ == "__main__"`` guard is needed: workers do not run the program.

    References
    ----------
    Julia manual, `addprocs`.

    Examples
    --------
    >>> with addprocs(2) as pids:
    ...     len(pids)
    2
    """
    cluster = _cluster("add processes")
    if current_node().peers.closed or cluster.node.peers.closed:
        raise ShmdistError(
            "the program ends, and its workers have ended: no more can be added. Have an atexit handler "
            "that needs workers registered after the first addprocs(), then it runs before their end"
        )
    if n is None or (hasattr(n, "__index__") and not isinstance(n, bool)):
        manager: ClusterManager = LocalManager(n)
    elif isinstance(n, ClusterManager):
        manager = n
    elif isinstance(n, (list, tuple, str)):
        manager = SSHManager(n)
    else:
        raise TypeError(
            f"addprocs() takes a number of workers, a list of machines or a ClusterManager, not {n!r:.80}"
        )
    known = manager.default_params()
    for name in params:
        if name not in known:
            raise TypeError(
                f"addprocs() has no parameter {name!r}; "
                f"{type(manager).__name__} takes {', '.join(sorted(known))}"
            )
    merged = {**known, **params}
    if merged["topology"] not in _TOPOLOGIES:
        raise ValueError(f"topology must be one of {', '.join(_TOPOLOGIES)}, not {merged['topology']!r}")
    with cluster.changing:
        return WorkerList(cluster.add(manager, merged))


def rmprocs(*pids: Any, waitfor: float | None = None) -> Any:
    """Remove worker processes.

    Parameters
    ----------
    *pids : int or sequence of int
        Workers.
    waitfor : float, optional
        Seconds to wait for their end. 0 returns a `Task` at once. Default: as long as it
        takes; a worker that ignores being asked is killed.

    Raises
    ------
    TimeoutError
        They did not end in time; they are killed in the background.

    Notes
    -----
    Calls that run on a removed worker fail with `ProcessExitedException`.

    References
    ----------
    Julia manual, `rmprocs`.

    Examples
    --------
    >>> rmprocs(*addprocs(1))
    """
    cluster = _cluster("remove processes")
    wanted = process_ids(pids)
    limit = seconds(waitfor, "waitfor")
    if waitfor is not None and waitfor < 0:
        raise ValueError(f"waitfor must be seconds, 0 or more, not {waitfor!r}")
    if 1 in wanted:
        raise ValueError("process 1 cannot be removed")
    node = current_node()
    for pid in wanted:
        if pid not in cluster.members and pid not in node.peers.lost:
            raise ValueError(f"there is no worker {pid}; the workers are {sorted(cluster.members)}")
    if wanted:
        cluster.settled |= node.peers.leaving
    if limit == 0:
        with current():
            cluster.ask_to_exit(wanted)  # now: what follows must not choose them
        return start_task(_remove, (cluster, wanted, None))
    _remove(cluster, wanted, limit)
    return None


def _remove(cluster: ClusterController, pids: list[int], waitfor: float | None) -> None:
    thread_state = current()
    thread_state.enter()
    try:
        cluster.remove(pids, waitfor)
    finally:
        thread_state.leave()


def interrupt(*pids: Any) -> None:
    """Interrupt the remote calls that run on workers; an idle worker is unharmed.

    Parameters
    ----------
    *pids : int or sequence of int
        Workers; none named: all.

    Notes
    -----
    Each call that runs there ends in ``KeyboardInterrupt``, which its caller sees as a
    `RemoteException`. On the worker's main thread blocking system calls are interrupted as
    well; on another thread such a call's caller gets the error, and the thread ends when
    the system call returns.

    References
    ----------
    Julia manual, `interrupt`.

    Examples
    --------
    >>> interrupt()
    """
    node = current_node()
    wanted = process_ids(pids) or [pid for pid in workers() if pid != 1]
    cluster = node.find_part(ClusterController)
    for pid in wanted:
        if pid == node.pid:
            node.tasks.interrupt_all()
            continue
        node.reactor.post(node.peers.link_to(pid), int(Kind.INTERRUPT_ALL), 0, 0)
        member = cluster.members.get(pid) if cluster is not None else None
        if member is not None:
            member.manager.manage(pid, member.config, "interrupt")


def cluster_cookie(cookie: str | bytes | None = None) -> str:
    """Return the cluster's cookie, the secret that its processes prove to one another; or set it.

    Parameters
    ----------
    cookie : str or bytes, optional
        A new one, before the first worker is added. Make it random.

    References
    ----------
    Julia manual, `cluster_cookie`.

    Examples
    --------
    >>> len(cluster_cookie()) >= 32
    True
    """
    node = current_node()
    if cookie is not None:
        if node.peers.links:
            raise ShmdistError("the cookie cannot change while there are workers")
        text = cookie.encode() if isinstance(cookie, str) else bytes(cookie)
        if not text or b"\n" in text:
            raise ValueError("the cookie must be a text of one line")
        node.cookie = text
    elif not node.cookie:
        import secrets

        node.cookie = secrets.token_hex(32).encode()
    return node.cookie.decode()


__all__ = [
    "WorkerList",
    "addprocs",
    "cluster_cookie",
    "interrupt",
    "rmprocs",
]
