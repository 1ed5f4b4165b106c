"""The node: all state of one process of the cluster.

The only module-level variable is the current node.  Everything else hangs on it.

Locks, in the order in which they may be taken (a later one while an earlier is held):

1. ``Reactor._leader_lock``: the right to read; not a lock that anybody waits for.
2. ``Peers.lock``: members, links, reference table.  No user code, pickling, or sending
   while it is held: decide under it, act after it.
3. ``OwnCalls._lock``, ``RingExchange._lock``, ``Link.gate``, ``Link._kick``, ``ThreadState.guard``,
   ``BlockCounts.lock``, ``HostCopyReceiver._lock``, ``MappingCache._lock``: short and leaf-like.
4. ``Link._write``: held while a frame is written; taken with none of the above held.

Finalizers run wherever Python allocates, also while a lock is held. Hence all locks of the package are taken
inside the runtime only, where a finalizer comes to none (``runtime.interrupts``), but for these:

- ``ThreadState.guard``, ``_Driver._lock`` of ``scheduling.input_reader``: nothing is called or made while
  they are held, so no finalizer runs. Only a profiler or debugger in Python may run one there even so: the
  first is re-entrant, and no finalizer comes to the second.
- ``imports._lock``, ``CallContext._lock``, ``picklers._cloud_lock``, ``ClusterController.changing``:
  re-entrant, and held while users' code runs (an import, a manager).
- Those on which a thread sleeps (of a ``Waiter``, ``source._bed``, ``source._watch_ended``,
  ``refs.given_up``): no thread holds one while it works.
- ``Listener._count`` and those of the managers: only threads that accept or launch come to them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from shmdist.memory.progress_page import ProgressPage
from shmdist.runtime.block_counts import BlockCounts
from shmdist.runtime.count_audit import CountAudit
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.environment import own_files
from shmdist.runtime.executor import CallExecutor
from shmdist.runtime.function_store import FunctionStore
from shmdist.runtime.heartbeat import HeartbeatMonitor
from shmdist.runtime.interrupts import current
from shmdist.runtime.output import Outputs
from shmdist.runtime.peers import Peers
from shmdist.runtime.poll_set import Events
from shmdist.runtime.reactor import Reactor
from shmdist.runtime.requests import RequestClient
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.router import Router
from shmdist.runtime.sharing import SharedMemory
from shmdist.serialization import definitions
from shmdist.transport.link import Link
from shmdist.transport.messages import PeerInfo

_Part = TypeVar("_Part")


class Node:
    """One process of the cluster: its parts, each given what it needs of the others.

    Parameters
    ----------
    pid : int
        Its process id in the cluster; 1 for the process that the user started.

    Attributes
    ----------
    peers : Peers
        Members and links, and who is lost.
    reactor : Reactor
        The threads, and the reading.
    counts : ReferenceCounts
        References that live here, and counts of those that this process holds.
    requests : RequestClient
        Requests to others, and answers.
    sharing : SharedMemory
        Blocks and segments.
    tasks : CallExecutor
        Calls that run here.
    functions : FunctionStore
        Functions that were sent ahead of their calls.
    audits, router, heartbeat, outputs : CountAudit, Router, HeartbeatMonitor, Outputs
        Counts after deaths, frames, silent hosts, what workers print.
    parts : dict
        What higher layers keep for this node, by class: see :meth:`part`.
    pages : dict of int to ProgressPage
        On which local workers note how far they are; process 1's alone.
    inherited : list
        Files that a forked child must not keep open, lest this process seem alive.
    """

    def __init__(self, pid: int) -> None:
        self.ospid = os.getpid()
        self.cookie = b""
        self.parts: dict[Any, Any] = {}
        self.pages: dict[int, ProgressPage] = {}
        self.inherited: list[Any] = []
        self.reserve = Reserve()
        self.peers = peers = Peers(pid, self._read_link)
        self.reactor = reactor = Reactor(peers, self.reserve)
        self.outputs = Outputs()
        self.outputs.attach(reactor.start, reactor.poller.remove, reactor.poller.add_output)
        self.counts = counts = ReferenceCounts(peers, reactor)
        blocks = BlockCounts(peers, reactor)
        self.requests = requests = RequestClient(peers, reactor, counts, blocks, self.outputs)
        self.sharing = sharing = SharedMemory(peers, reactor, counts, requests)
        self.functions = FunctionStore(counts.give_back)
        self.tasks = CallExecutor(
            requests, counts, sharing, self.functions, self.reserve, self.flush_own_output
        )
        self.audits = CountAudit(counts, blocks)
        self.router = Router(requests, counts, sharing, self.tasks, self.functions, self.audits, self.reserve)
        self.heartbeat = HeartbeatMonitor(peers, reactor)
        peers.undo_on_loss += [
            counts.lose,
            requests.lose,
            self.functions.forget,
            sharing.lose,
            lambda pid: counts.drop(),
        ]
        reactor.connect(
            Events(
                route=self.router.route,
                fail=self.router.fail,
                control=self.router.control,
                added=self._link_added,
                read_output=self.outputs.read,
                ended=peers.link_ended,
                operate=self.router.operate,
                run=self.tasks.run,
                refuse=self.tasks.refuse,
                woken=counts.housekeeping,
                stopping=self.heartbeat.close,
                closing=sharing.maintainer.close,
            )
        )

    def __repr__(self) -> str:
        return f"<Node {self.pid}: {self.peers!r}, {self.requests!r}, {self.tasks!r}, {self.counts!r}>"

    @property
    def pid(self) -> int:
        """The number of this process in the cluster."""
        return self.peers.pid

    @property
    def lock(self) -> threading.RLock:
        """The lock of members, links and references."""
        return self.peers.lock

    def part(self, kind: Callable[[Node], _Part]) -> _Part:
        """Return what a higher layer keeps for this node: a `kind`, made when it is first asked for."""
        part: _Part | None = self.parts.get(kind)
        if part is None:
            with current(), self.lock:
                part = self.parts.get(kind)
                if part is None:
                    part = self.parts[kind] = kind(self)
        return part

    def find_part(self, kind: type[_Part]) -> _Part | None:
        """Return such a part if it was made."""
        return self.parts.get(kind)

    def _read_link(self, link: Link) -> None:
        self.reactor.add(link)

    def _link_added(self, link: Link) -> None:
        """See to a link that is about to be read."""
        link.sharing = self.sharing if link.is_local else self.sharing.copies
        if not link.is_local:
            self.heartbeat.watch(link)

    # ------------------------------------------------------------------ output

    @property
    def has_output(self) -> bool:
        """Whether workers have printed something that is not shown yet."""
        return self.outputs.busy

    def print_output(self, *pids: int) -> None:
        """Wait until what these workers printed is written to this process's streams."""
        self.outputs.show(pids)

    def flush_own_output(self) -> None:
        """Write out what this worker's calls printed, before their results go."""
        if self.peers.is_worker:
            for file in own_files:
                if file.writing:
                    return  # another thread waits in it, for its reader; the text follows with the next flush
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):
                pass  # a function has replaced or closed them


def process_id(pid: Any) -> int:
    """Return a process id that a user gave, of numpy perhaps, as an integer."""
    if isinstance(pid, bool) or not hasattr(pid, "__index__"):
        raise TypeError(f"process ids are integers, not {pid!r:.80}")
    number: int = pid.__index__()
    return number


_current: Node | None = None
_making = threading.Lock()  # guards the making of the current node


def current_node() -> Node:
    """Return this process's node; process 1 gets its own on first use."""
    node = _current
    return node if node is not None else _make_node()


def _make_node() -> Node:
    global _current
    with current(), _making:
        if _current is None:
            node = Node(1)
            node.peers.members[1] = PeerInfo(1, "", "", node.ospid, ())
            _current = node
        return _current


def _processes() -> list[int]:
    node = current_node()
    return [node.pid, *node.peers.members, *node.peers.links]


definitions.register_processes(_processes)


def set_current(node: Node | None) -> None:
    """Make `node` this process's node."""
    global _current
    _current = node


def _after_fork() -> None:
    """Forget the cluster in a forked child: it is the parent's."""
    global _current, _making
    _making = threading.Lock()
    node, _current = _current, None
    if node is not None:
        node.peers.closed = True
        for part in (node.reactor, node.outputs, node.tasks):
            part.abandon()
        node.reserve.open()
        for file in node.inherited:
            with contextlib.suppress(OSError):
                file.close()
        node.sharing.forks.after_in_child()


def _before_fork() -> None:
    if _current is not None:
        _current.sharing.forks.before()


def _after_fork_in_parent() -> None:
    if _current is not None:
        _current.sharing.forks.after_in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
