"""The members of the cluster as this process knows them, the links to them, and how they are lost.

How a process is lost
---------------------
Its link ends (or its manager says that it died, and the link is shut, which comes to the
same).  When everything it wrote has been read, :meth:`Peers.lose` is called once for it:
each part of the node undoes what it had with that process (`undo_on_loss`), in the order in which
the node lists them, and then the subscribers are told (`lost_hooks`).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Collection

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.errors import ProcessExitedException
from shmdist.runtime.interrupts import current
from shmdist.transport.link import Link
from shmdist.transport.messages import PeerInfo

_EXIT_CAUSE_SECONDS = 0.3  # that process 1 may take to tell how another one ended
_log = Log("node")


def _nothing() -> None:
    """Do nothing."""


class Peers:
    """Members and links.

    Attributes
    ----------
    pid : int
        The number of this process in the cluster; 0 until a worker joins one.
    lock : lock
        Guards the tables here and those of references.
    links : dict of int to Link
        The link to send by, by process.
    all_links : dict of int to set of Link
        Two processes that dial each other at once have two.
    members : dict of int to PeerInfo
        The members that are alive, this process among them.
    lost : dict of int to BaseException
        Members that are gone, and how they went.
    leaving : set of int
        Members that are gone, are about to go, or were asked to: they get no new work.
    last_progress : dict of int to dict
        How far members that are gone were: element by call.
    reported_exits : dict of int to BaseException
        How members went, as process 1 told.
    read_link : callable
        Begins to read a link; the reactor's.
    undo_on_loss : list of callable
        What the parts of the node do when a process is lost; each may be done twice.
    joined_hooks, leaving_hooks, lost_hooks : list of callable
        Told of new members, of one that process 1 asks to go, and of one that is lost.
    connector : callable or None
        Makes a link to a member that has none; set when this process joins a cluster.
    find_exit_cause : callable
        Finds out how a process ended whose link did; may wait. Process 1 sets its own.
    master_gone : callable
        Told when process 1 is gone; a worker ends then.
    exiting : bool
        The program is at its end, and so are its workers.
    """

    def __init__(self, pid: int, read_link: Callable[[Link], None]) -> None:
        self.pid = pid
        self.lock = threading.RLock()
        self.links: dict[int, Link] = {}
        self.all_links: dict[int, set[Link]] = {}
        self.members: dict[int, PeerInfo] = {}
        self.lost: dict[int, BaseException] = {}
        self.leaving: set[int] = set()
        self.last_progress: dict[int, dict[int, int]] = {}
        self.reported_exits: dict[int, BaseException] = {}
        self.read_link = read_link
        self.undo_on_loss: list[Callable[[int], None]] = []
        self.joined_hooks: list[Callable[[list[int]], None]] = []
        self.leaving_hooks: list[Callable[[int], None]] = []
        self.lost_hooks: list[Callable[[int], None]] = []
        self.connector: Callable[[int], Link] | None = None
        self.find_exit_cause: Callable[[int], BaseException] = self.exit_cause_from_master
        self.master_gone: Callable[[], None] = _nothing
        self.is_worker = False
        self.exiting = False
        self.closed = False

    def __repr__(self) -> str:
        return f"<Peers of {self.pid}: members {sorted(self.members)}, links {sorted(self.links)}>"

    # ------------------------------------------------------------------ links

    def link_to(self, pid: int) -> Link:
        """Return the link to process `pid`, made now when there is none.

        Raises
        ------
        ProcessExitedException
            It is gone.
        ValueError
            There is no such process.
        """
        link = self.links.get(pid)
        if link is not None:
            return link
        self.check_member(pid)
        if self.connector is None:
            raise self.death(pid)
        return self.connector(pid)

    def way_to(self, pid: int) -> Link:
        """Return the link by which a process is told of counts; errors as those of :meth:`link_to`."""
        try:
            return self.link_to(pid)
        except ConnectionError:
            # This topology has no way there; process 1 has. It is the same way each time, so
            # the order of what is told is kept.
            return self.link_to(1)

    def add_link(self, link: Link) -> Link:
        """Begin to read `link`; returns the link to send to its process by."""
        with self.lock:
            primary = self.links.setdefault(link.pid, link)
            self.all_links.setdefault(link.pid, set()).add(link)
        self.read_link(link)
        return primary

    def link_ended(self, link: Link) -> None:
        """Everything that came by `link` has been read, and no more will; on its own thread."""
        with self.lock:
            links = self.all_links.get(link.pid, set())
            links.discard(link)
            last = not links
        link.close()
        if not last or self.closed or link.pid < 0:  # it never said who it was
            return
        if self.is_worker and link.pid == 1:
            self.master_gone()
            return
        self.leaving.add(link.pid)  # before it is known how it went, which takes a moment
        self.lose(link.pid, self.find_exit_cause(link.pid))

    # ------------------------------------------------------------------ losses

    def check_member(self, pid: int) -> None:
        """Raise the error that says why `pid` cannot be called, if it cannot."""
        if pid in self.lost:
            raise self.death(pid)
        if pid not in self.members:
            raise ValueError(f"there is no process {pid}; the processes are {sorted(self.members)}")

    def death(self, pid: int) -> BaseException:
        """Return a fresh copy of the error that tells how `pid` went.

        When the program ends, its workers go first: who asks then ends as threads do that wait, silently. Not
        inside the runtime, where this thread may be the one that reads, and others wait for it.
        """
        thread_state = current()
        if self.exiting and not thread_state.main and not thread_state.runtime_depth:
            raise SystemExit
        return copy.copy(self.lost.get(pid) or ProcessExitedException(pid))

    def deaths(self, pids: Collection[int], patience: float = _EXIT_CAUSE_SECONDS) -> list[BaseException]:
        """Return how processes went that are about to go, or have gone; waits a moment for the news."""
        deadline = time.monotonic() + patience
        while any(pid not in self.lost for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.002)
        return [self.death(pid) for pid in pids]

    def exit_cause_from_master(self, pid: int, patience: float = _EXIT_CAUSE_SECONDS) -> BaseException:
        """Find out how a process ended from process 1, which will tell in a moment."""
        deadline = time.monotonic() + patience
        while pid not in self.reported_exits and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.reported_exits.get(pid) or ProcessExitedException(pid)

    def lose(self, pid: int, error: BaseException) -> None:
        """Note that process `pid` is gone: see the module's docstring. Told twice, it is once."""
        with self.lock:
            if pid in self.lost:
                return
            self.lost[pid] = error
        firmly(self._lose, pid)

    def _lose(self, pid: int) -> None:
        """Do what a lost process asks for; again after an error."""
        with self.lock:
            self.leaving.add(pid)
            self.members.pop(pid, None)
            self.links.pop(pid, None)
        for undo in self.undo_on_loss:
            undo(pid)
        for hook in list(self.lost_hooks):
            try:
                firmly(hook, pid)
            except Exception:
                _log.exception("a hook for the loss of process %d failed", pid)


__all__ = ["Peers"]
