"""Who is in the cluster: the processes, the workers, this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shmdist.errors import no_workers_left
from shmdist.membership.controller import ClusterController
from shmdist.runtime.node import current_node, process_id


def process_ids(pids: Sequence[Any]) -> list[int]:
    """Flatten what functions that take process ids are given."""
    flat: list[int] = []
    for pid in pids:
        if hasattr(pid, "__index__") and not isinstance(pid, bool):
            flat.append(pid.__index__())
        elif hasattr(pid, "workers") and callable(pid.workers):
            flat += pid.workers()
        elif isinstance(pid, (str, bytes)) or not hasattr(pid, "__iter__"):
            raise TypeError(f"process ids are integers, not {pid!r:.80}")
        else:
            flat += process_ids(tuple(pid))
    return list(dict.fromkeys(flat))


def _alive() -> list[int]:
    node = current_node()
    leaving = node.peers.leaving
    return sorted(pid for pid in list(node.peers.members) if pid not in leaving)


def fallen_workers() -> list[int]:
    """Return the workers that have died, when there are no others; on process 1, which knows."""
    cluster = current_node().find_part(ClusterController)
    return [] if cluster is None or workers() != [1] else cluster.fallen()


def usable_workers() -> list[int]:
    """Return the workers, ``[1]`` when there never were any or all were removed.

    Raises
    ------
    ShmdistError
        All have died. The program has to know: what killed them would run on process 1 next.
    """
    pids = workers()
    if pids == [1]:
        fallen = fallen_workers()
        if fallen:
            raise no_workers_left(current_node().peers.deaths(fallen), remedy(fallen))
    return pids


def remedy(fallen: list[int]) -> str:
    """Return what a program can do when workers have died that nothing is left without."""
    return f"addprocs() adds others, rmprocs({fallen[-1]}) lets process 1 do their work"


def procs(pid: int | None = None) -> list[int]:
    """Return the ids of all processes, or of all on the host of process `pid`.

    References
    ----------
    Julia manual, `procs`.

    Examples
    --------
    >>> procs()
    [1]
    """
    alive = _alive()
    if pid is None:
        return alive
    node = current_node()
    pid = process_id(pid)
    node.peers.check_member(pid)
    host = node.peers.members[pid].host
    return [other for other in alive if node.peers.members[other].host == host]


def workers() -> list[int]:
    """Return the ids of all workers; ``[1]`` when there are none.

    References
    ----------
    Julia manual, `workers`.

    Examples
    --------
    >>> workers()
    [1]
    """
    return [pid for pid in _alive() if pid != 1] or [1]


def nprocs() -> int:
    """Return the number of processes.

    References
    ----------
    Julia manual, `nprocs`.

    Examples
    --------
    >>> nprocs()
    1
    """
    return len(_alive())


def nworkers() -> int:
    """Return the number of workers; 1 when there is only process 1.

    References
    ----------
    Julia manual, `nworkers`.

    Examples
    --------
    >>> nworkers()
    1
    """
    return len(workers())


def myid() -> int:
    """Return the id of this process; 1 for the one that the user started.

    References
    ----------
    Julia manual, `myid`.

    Examples
    --------
    >>> myid()
    1
    """
    return current_node().pid


def other_procs() -> list[int]:
    """Return the ids of all processes but this one.

    Examples
    --------
    >>> other_procs()
    []
    """
    me = myid()
    return [pid for pid in _alive() if pid != me]


def other_workers() -> list[int]:
    """Return the ids of all workers but this process.

    Examples
    --------
    >>> other_workers()
    []
    """
    return [pid for pid in other_procs() if pid != 1]


__all__ = [
    "fallen_workers",
    "myid",
    "nprocs",
    "nworkers",
    "other_procs",
    "other_workers",
    "process_ids",
    "procs",
    "remedy",
    "usable_workers",
    "workers",
]
