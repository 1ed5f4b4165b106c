"""The node: all state of one process of the cluster, and what is sent and received with it.

The only module-level variable is the current node.  Everything else hangs on it.

Locks, in the order in which they may be taken (a later one while an earlier is held):

1. ``Dispatcher._baton``: the right to read; not a lock that anybody waits for.
2. ``Node.lock``: members, links, reference table.  No user code, pickling, or sending
   while it is held: decide under it, act after it.
3. ``OwnCalls._lock``, ``Mail._lock``, ``Link.gate``, ``Link._kick``, ``Strand.guard``, ``Sharing.lock``,
   ``Lending._lock``, ``Spares._lock``: short and leaf-like.
4. ``Link._write``: held while a frame is written; taken with none of the above held.

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
from collections.abc import Callable
from typing import Any, ClassVar

from shmdist._log import Log
from shmdist.errors import CapturedException, ProcessExitedException, RemoteException, ShmdistError
from shmdist.memory.receipts import Receipts
from shmdist.runtime import served
from shmdist.runtime.asking import Asking
from shmdist.runtime.audits import Audits
from shmdist.runtime.dispatch import Dispatcher
from shmdist.runtime.heart import Heart
from shmdist.runtime.output import Outputs
from shmdist.runtime.reftable import RRID, RefTable
from shmdist.runtime.replies import Operation, Reply, pack_error, unpack_error
from shmdist.runtime.sharing import Sharing
from shmdist.runtime.task import Functions, Tasks
from shmdist.wire import codec
from shmdist.wire.atoms import PICKLE
from shmdist.wire.link import Link
from shmdist.wire.messages import (
    BROKEN,
    IS_ERROR,
    NOT_RUN,
    Frame,
    Kind,
    PeerInfo,
)

_RESULT, _CANCEL = int(Kind.RESULT), int(Kind.CANCEL)
_NEWS = 0.3  # seconds that process 1 may take to tell how another one ended
_log = Log("node")


class Node(Asking):
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
        "inherited",
        "inquest",
        "joined_hooks",
        "last_words",
        "lost_hooks",
        "master_gone",
        "news",
        "ospid",
        "unclaimed_takes",
    )
    #: Operations on references, by name; ``refs`` enters them.
    operations: ClassVar[dict[str, Callable[[Node, Operation, RRID, Any], None]]] = {}

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ospid = os.getpid()
        self.cookie = b""
        self.lock = threading.RLock()  # guards the tables below up to `refs`; see the module's docstring
        self.links: dict[int, Link] = {}  # the link to send by, by process
        self.all_links: dict[int, set[Link]] = {}  # two processes that dial each other at once have two
        self.peers: dict[int, PeerInfo] = {}  # the members that are alive, this process among them
        self.graves: dict[int, BaseException] = {}  # members that are gone, and how they went
        self.last_words: dict[int, dict[int, int]] = {}  # how far members that are gone were: element by call
        self.refs = RefTable()
        self.receipts = Receipts()  # of counts of references that others than their owners gave
        self.call_ids = itertools.count(1)
        self.lanes = itertools.count(1)
        self.pending: dict[int, Reply] = {}  # answers waited for, by call; popping one is claiming it
        self.waiting: dict[tuple[int, int], Operation] = {}  # others' operations not yet answered
        self.unclaimed_takes: dict[int, tuple[int, RRID]] = {}  # takes given up: whose item goes back
        self.released: deque[tuple[int, RRID]] = deque()  # references dropped, by finalizers: owner and id
        self.errands: deque[Callable[[], None]] = deque()  # what finalizers leave to be done
        self._flush_asked = False
        self.tasks = Tasks(self)
        self.functions = Functions(self)
        self.outputs = Outputs()
        self.settings: dict[str, Any] = {}
        self.joined_hooks: list[Callable[[list[int]], None]] = []
        self.lost_hooks: list[Callable[[int], None]] = []
        self.controls: dict[int, Callable[[Frame], None]] = {}
        #: Makes a link to a member that has none; set when this process joins a cluster.
        self.connector: Callable[[int], Link] | None = None
        #: Finds out how a process ended whose link did; may wait. Set by process 1.
        self.inquest: Callable[[int], BaseException] = self.hearsay
        self.news: dict[int, BaseException] = {}  # how members went, as process 1 told
        #: Told when process 1 is gone; a worker ends then.
        self.master_gone: Callable[[], None] = lambda: None
        self.is_worker = False
        self.exiting = False  # the program is at its end, and so are its workers
        self.closed = False
        #: Files that a forked child must not keep open, lest this process seem alive.
        self.inherited: list[Any] = []
        self.dispatcher = Dispatcher(self)
        self.heart = Heart(self)
        self.sharing = Sharing(self)
        self.audits = Audits(self)

    def __repr__(self) -> str:
        return (
            f"<Node {self.pid}, members {sorted(self.peers)}, links {sorted(self.links)}, "
            f"{len(self.pending)} awaited, {self.tasks!r}, {self.refs!r}>"
        )

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
        if pid in self.graves:
            raise self.death(pid)
        if pid not in self.peers:
            raise ValueError(f"there is no process {pid}; the processes are {sorted(self.peers)}")

    def death(self, pid: int) -> BaseException:
        """Return a fresh copy of the error that tells how `pid` went."""
        return copy.copy(self.graves.get(pid) or ProcessExitedException(pid))

    def add_link(self, link: Link) -> Link:
        """Begin to read `link`; returns the link to send to its process by."""
        with self.lock:
            primary = self.links.setdefault(link.pid, link)
            self.all_links.setdefault(link.pid, set()).add(link)
        self.dispatcher.add(link)
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
        self.lost(link.pid, self.inquest(link.pid))

    def hearsay(self, pid: int, patience: float = _NEWS) -> BaseException:
        """Find out how a process ended from process 1, which will tell in a moment."""
        deadline = time.monotonic() + patience
        while pid not in self.news and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.news.get(pid) or ProcessExitedException(pid)

    def lost(self, pid: int, error: BaseException) -> None:
        """Process `pid` is gone: see the module's docstring.  Told twice, it is once."""
        with self.lock:
            if pid in self.graves:
                return
            self.graves[pid] = error
            self.peers.pop(pid, None)
            self.links.pop(pid, None)
            freed = self.refs.peer_lost(pid)
        for call_id, reply in list(self.pending.items()):
            if self.exiting:
                break  # threads that still wait end with the program, silently
            if reply.pid == pid and self.pending.pop(call_id, None) is not None:
                self.fail(reply, self.death(pid))
        for key, operation in list(self.waiting.items()):
            if key[0] == pid and self.waiting.pop(key, None) is not None:
                operation.withdraw(given_up=True)
        self.functions.forget(pid)
        self.sharing.lost(pid)
        self.drop(freed)
        for hook in list(self.lost_hooks):
            try:
                hook(pid)
            except Exception:
                _log.exception("a hook for the loss of process %d failed", pid)

    # ------------------------------------------------------------------ answers to what was asked

    def open(self, reply: Reply, what: Any) -> Any:
        """Return the value of a reply that is done, or raise its error."""
        if self.outputs.lines:
            self.print_output()
        if reply.error is not None:
            # A copy, for the callers' frames hold the reply: they would hold each other, and all in them.
            raise copy.copy(reply.error)
        frame = reply.frame
        assert frame is not None
        return self.read_result(frame, reply.pid, what)

    def read_result(self, frame: Frame, pid: int, what: Any) -> Any:
        """Read a RESULT frame: its value, or raise what it tells; `what` is a function, or a text."""
        if not frame.flags and not frame.buffers:
            body = frame.body
            try:
                return marshal.loads(body) if body[0] != PICKLE else pickle.loads(body)
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

    operate = served.operate
    control = served.control
    unclaimed = served.unclaimed

    # ------------------------------------------------------------------ output

    @property
    def has_output(self) -> bool:
        """Whether workers have printed something that is not shown yet."""
        return bool(self.outputs.lines)

    def read_output(self, fd: int) -> None:
        """Take what a worker printed; on the reading thread."""
        if not self.outputs.read(fd):
            self.dispatcher.poller.remove(fd)
            self.outputs.close(fd)

    def print_output(self) -> None:
        """Show what workers printed, through this process's ``sys.stdout``."""
        self.outputs.show()

    def flush_own_output(self) -> None:
        """Write out what this worker's calls printed, before their results go."""
        if self.is_worker:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):
                pass  # a function has replaced or closed them


def name_of(what: Any) -> str:
    """Return what an error calls a function; or a text as it is."""
    return what if isinstance(what, str) else getattr(what, "__qualname__", None) or f"{what!r:.80}"


_current: Node | None = None
_making = threading.Lock()  # guards the making of the current node


def current_node() -> Node:
    """Return this process's node; process 1 gets its own on first use."""
    node = _current
    return node if node is not None else _make_node()


def _make_node() -> Node:
    global _current
    with _making:
        if _current is None:
            node = Node(1)
            node.peers[1] = PeerInfo(1, "", "", node.ospid, ())
            _current = node
        return _current


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
        for part in (node.dispatcher, node.outputs, node.tasks):
            part.abandon()
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
