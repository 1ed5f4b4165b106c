"""The node: all state of one process of the cluster.

The only module-level variable is the current node.  Everything else hangs on it.

Locks, in the order in which they may be taken (a later one while an earlier is held):

1. ``Reactor._leader_lock``: the right to read; not a lock that anybody waits for.
2. ``Node.lock``: members, links, reference table.  No user code, pickling, or sending
   while it is held: decide under it, act after it.
3. ``OwnCalls._lock``, ``RingExchange._lock``, ``Link.gate``, ``Link._kick``, ``ThreadState.guard``,
   ``SharedMemory.lock``, ``HostCopyReceiver._lock``, ``MappingCache._lock``: short and leaf-like.
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

How a process is lost
---------------------
Its link ends (or its manager says that it died, and the link is shut, which comes to the
same).  When everything it wrote has been read, :meth:`Node.lost` is called once for it:
what waits for an answer from it fails with one ``ProcessExitedException``, its counts in
the reference table go, what it waited for here is withdrawn, and who subscribed is told.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import marshal
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeVar

from shmdist._firmly import firmly
from shmdist._log import Log
from shmdist.errors import CapturedException, ProcessExitedException, RemoteException, ShmdistError
from shmdist.memory.progress_page import ProgressPage
from shmdist.refcount.receipts import Receipts
from shmdist.refcount.table import RRID, Entry, RefTable
from shmdist.runtime import router
from shmdist.runtime.count_audit import CountAudit
from shmdist.runtime.environment import own_files
from shmdist.runtime.executor import CallExecutor, FunctionStore
from shmdist.runtime.heartbeat import HeartbeatMonitor
from shmdist.runtime.interrupts import current
from shmdist.runtime.output import Outputs
from shmdist.runtime.reactor import Reactor
from shmdist.runtime.replies import PendingOperation, PendingReply, pack_error, unpack_error
from shmdist.runtime.requests import RequestClient
from shmdist.runtime.reserve import Reserve
from shmdist.runtime.sharing import SharedMemory
from shmdist.serialization import codec, definitions
from shmdist.serialization.atoms import PICKLE
from shmdist.transport.link import Link
from shmdist.transport.messages import BROKEN, IS_ERROR, NOT_RUN, Frame, Kind, PeerInfo

_CALL = int(Kind.CALL)
_EXIT_CAUSE_SECONDS = 0.3  # that process 1 may take to tell how another one ended
_log = Log("node")
_Part = TypeVar("_Part")


class Node(RequestClient):
    """One process of the cluster.

    Parameters
    ----------
    pid : int
        Its process id in the cluster; 1 for the process that the user started.
    """

    # Those that are rarely used. CPython keeps 29 others where a call finds them sooner than in a dict.
    __slots__ = (
        "connector",
        "controls",
        "cookie",
        "find_exit_cause",
        "freed",
        "inherited",
        "joined_hooks",
        "last_progress",
        "leaving",
        "leaving_hooks",
        "lost_hooks",
        "master_gone",
        "ospid",
        "pages",
        "parts",
        "reported_exits",
        "unclaimed_takes",
        "unsent_releases",
    )
    #: Operations on references, by name; ``references.remote_channel`` enters them.
    operations: ClassVar[dict[str, Callable[[Node, PendingOperation, RRID, Any], None]]] = {}

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ospid = os.getpid()
        self.cookie = b""
        self.lock = threading.RLock()  # guards the tables below up to `refs`; see the module's docstring
        self.links: dict[int, Link] = {}  # the link to send by, by process
        self.all_links: dict[int, set[Link]] = {}  # two processes that dial each other at once have two
        self.peers: dict[int, PeerInfo] = {}  # the members that are alive, this process among them
        self.lost_processes: dict[int, BaseException] = {}  # members that are gone, and how they went
        #: Members that are gone, are about to go, or were asked to: they get no new work.
        self.leaving: set[int] = set()
        # How far members that are gone were: element by call
        self.last_progress: dict[int, dict[int, int]] = {}
        self.refs = RefTable()
        self.receipts = Receipts()  # of counts of references that others than their owners gave
        # On which local workers note how far they are; process 1's alone
        self.pages: dict[int, ProgressPage] = {}
        self.call_ids = itertools.count(1)
        self.lanes = itertools.count(1)
        self.pending: dict[int, PendingReply] = {}  # answers waited for, by call; popping one is claiming it
        self.waiting: dict[tuple[int, int], PendingOperation] = {}  # others' operations not yet answered
        self.unclaimed_takes: dict[int, tuple[int, RRID]] = {}  # takes given up: whose item goes back
        self.released: deque[tuple[int, RRID]] = deque()  # references dropped, by finalizers: owner and id
        # Counts to be given back: ``ReferenceCounts``
        self.unsent_releases: dict[int, dict[tuple[RRID, int], int]] = {}
        self.freed: deque[Entry] = deque()  # whose values are to be let go of
        self.deferred_jobs: deque[Callable[[], None]] = deque()  # what finalizers leave to be done
        self._flush_asked = False
        self.tasks = CallExecutor(self)
        self.functions = FunctionStore(self)
        self.outputs = Outputs()
        self.parts: dict[Any, Any] = {}  # what higher layers keep for this node, by class: `part`
        self.joined_hooks: list[Callable[[list[int]], None]] = []
        self.leaving_hooks: list[Callable[[int], None]] = []  # called when process 1 asks a member to go
        self.lost_hooks: list[Callable[[int], None]] = []
        self.controls: dict[int, Callable[[Frame], None]] = {}
        #: Makes a link to a member that has none; set when this process joins a cluster.
        self.connector: Callable[[int], Link] | None = None
        #: Finds out how a process ended whose link did; may wait. Set by process 1.
        self.find_exit_cause: Callable[[int], BaseException] = self.exit_cause_from_master
        self.reported_exits: dict[int, BaseException] = {}  # how members went, as process 1 told
        #: Told when process 1 is gone; a worker ends then.
        self.master_gone: Callable[[], None] = lambda: None
        self.is_worker = False
        self.exiting = False  # the program is at its end, and so are its workers
        self.closed = False
        #: Files that a forked child must not keep open, lest this process seem alive.
        self.inherited: list[Any] = []
        self.reserve = Reserve()
        self.reactor = Reactor(self)
        poller = self.reactor.poller
        self.outputs.attach(self.reactor.start, poller.remove, poller.add_output)
        self.heartbeat = HeartbeatMonitor(self)
        self.sharing = SharedMemory(self)
        self.audits = CountAudit(self)

    def __repr__(self) -> str:
        return (
            f"<Node {self.pid}, members {sorted(self.peers)}, links {sorted(self.links)}, "
            f"{len(self.pending)} awaited, {self.tasks!r}, {self.refs!r}>"
        )

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

    def check_member(self, pid: int) -> None:
        """Raise the error that says why `pid` cannot be called, if it cannot."""
        if pid in self.lost_processes:
            raise self.death(pid)
        if pid not in self.peers:
            raise ValueError(f"there is no process {pid}; the processes are {sorted(self.peers)}")

    def death(self, pid: int) -> BaseException:
        """Return a fresh copy of the error that tells how `pid` went.

        When the program ends, its workers go first: who asks then ends as threads do that wait, silently. Not
        inside the runtime, where this thread may be the one that reads, and others wait for it.
        """
        thread_state = current()
        if self.exiting and not thread_state.main and not thread_state.runtime_depth:
            raise SystemExit
        return copy.copy(self.lost_processes.get(pid) or ProcessExitedException(pid))

    def deaths(self, pids: Collection[int], patience: float = _EXIT_CAUSE_SECONDS) -> list[BaseException]:
        """Return how processes went that are about to go, or have gone; waits a moment for the news."""
        deadline = time.monotonic() + patience
        while any(pid not in self.lost_processes for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.002)
        return [self.death(pid) for pid in pids]

    def add_link(self, link: Link) -> Link:
        """Begin to read `link`; returns the link to send to its process by."""
        with self.lock:
            primary = self.links.setdefault(link.pid, link)
            self.all_links.setdefault(link.pid, set()).add(link)
        self.reactor.add(link)
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
        self.lost(link.pid, self.find_exit_cause(link.pid))

    def exit_cause_from_master(self, pid: int, patience: float = _EXIT_CAUSE_SECONDS) -> BaseException:
        """Find out how a process ended from process 1, which will tell in a moment."""
        deadline = time.monotonic() + patience
        while pid not in self.reported_exits and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.reported_exits.get(pid) or ProcessExitedException(pid)

    def lost(self, pid: int, error: BaseException) -> None:
        """Process `pid` is gone: see the module's docstring.  Told twice, it is once."""
        with self.lock:
            if pid in self.lost_processes:
                return
            self.lost_processes[pid] = error
        firmly(self._lose, pid)

    def _lose(self, pid: int) -> None:
        """Do what a lost process asks for; again after an error."""
        with self.lock:
            self.leaving.add(pid)
            self.peers.pop(pid, None)
            self.links.pop(pid, None)
            self.freed += self.refs.peer_lost(pid)
        for call_id, reply in list(self.pending.items()):
            if self.exiting:
                break  # threads that still wait end with the program, silently
            if reply.pid == pid:
                death = self.death(pid)
                if self.pending.pop(call_id, None) is not None:
                    firmly(self.fail, reply, death)
        for key, operation in list(self.waiting.items()):
            if key[0] == pid:
                operation.withdraw(given_up=True)
                self.waiting.pop(key, None)
        self.functions.forget(pid)
        self.sharing.lost(pid)
        self.drop()
        for hook in list(self.lost_hooks):
            try:
                firmly(hook, pid)
            except Exception:
                _log.exception("a hook for the loss of process %d failed", pid)

    # ------------------------------------------------------------------ answers to what was asked

    def open(self, reply: PendingReply, what: Any) -> Any:
        """Return the value of a reply that is done, or raise its error."""
        if self.outputs.busy:
            self.outputs.show((reply.pid,))
        if reply.error is not None:
            # A copy, for the callers' frames hold the reply: they would hold each other, and all in them.
            raise copy.copy(reply.error)
        frame = reply.frame
        assert frame is not None
        return self.read_result(frame, reply.pid, what)

    def call(self, pid: int, flags: int, payload: codec.Payload, what: Any) -> Any:
        """Send a call to another process, wait for its value, and return that."""
        thread_state = current()
        thread_state.enter()
        try:
            reply = self.request(pid, _CALL, flags, payload)
            try:
                if not reply.done:
                    self.reactor.wait(reply)
            except BaseException:
                self.cancel(reply)
                raise
        finally:
            thread_state.leave()
        return self.open(reply, what)

    def read_result(self, frame: Frame, pid: int, what: Any) -> Any:
        """Read a RESULT frame: its value, or raise what it tells; `what` is a function, or a text."""
        if not frame.flags and not frame.buffers:
            body = frame.body
            try:
                if body[0] != PICKLE:
                    return marshal.loads(body)
                codec.prepare(body)
                return pickle.loads(body)
            except Exception as error:
                raise codec.unreadable(error, f"the result of {name_of(what)} from process {pid}") from error
        return self._read_rarer(frame, pid, name_of(what))

    def _read_rarer(self, frame: Frame, pid: int, what: str) -> Any:
        """Read the result that an error, a large value, or a value with references is."""
        if frame.flags & BROKEN:
            raise MemoryError(f"this process had no memory to receive the result of {what}")
        if frame.flags & NOT_RUN:
            raise ShmdistError(f"{what} was withdrawn before it began")
        if frame.flags & IS_ERROR:
            raise self.load_error(frame)
        try:
            return codec.loads(frame, self.give_back)
        except Exception as error:
            raise codec.unreadable(error, f"the result of {what} from process {pid}") from error

    # ------------------------------------------------------------------ errors on the wire

    def dump_error(self, captured: CapturedException) -> codec.Payload:
        """Pickle an error that is the answer to a request."""
        return codec.dumps((self.pid, *pack_error(captured)))

    def load_error(self, frame: Frame) -> RemoteException:
        """Return the error that a RESULT frame tells."""
        return unpack_error(*codec.loads(frame, self.give_back))

    # ------------------------------------------------------------------ being asked

    operate = router.operate
    control = router.control
    on_late_answer = router.on_late_answer

    # ------------------------------------------------------------------ output

    @property
    def has_output(self) -> bool:
        """Whether workers have printed something that is not shown yet."""
        return self.outputs.busy

    def read_output(self, fd: int) -> None:
        """Take what a worker printed; on the reading thread."""
        self.outputs.read(fd)

    def print_output(self, *pids: int) -> None:
        """Wait until what these workers printed is written to this process's streams."""
        self.outputs.show(pids)

    def flush_own_output(self) -> None:
        """Write out what this worker's calls printed, before their results go."""
        if self.is_worker:
            for file in own_files:
                if file.writing:
                    return  # another thread waits in it, for its reader; the text follows with the next flush
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):
                pass  # a function has replaced or closed them


def name_of(what: Any) -> str:
    """Return what an error calls a function; or a text as it is."""
    return what if isinstance(what, str) else getattr(what, "__qualname__", None) or f"{what!r:.80}"


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
            node.peers[1] = PeerInfo(1, "", "", node.ospid, ())
            _current = node
        return _current


def _processes() -> list[int]:
    node = current_node()
    return [node.pid, *node.peers, *node.links]


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
        node.closed = True
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
