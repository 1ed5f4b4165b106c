"""The node: all state of one process of the cluster, and what is sent and received with it.

The only module-level variable is the current node.  Everything else hangs on it.

Locks, in the order in which they may be taken (a later one while an earlier is held):

1. ``Dispatcher._baton``: the right to read; not a lock that anybody waits for.
2. ``Node.lock``: members, links, reference table.  No user code, pickling, or sending
   while it is held: decide under it, act after it.
3. ``Mail._lock``, ``Link.gate``, ``Link._kick``, ``Strand.guard``, ``Sharing.lock``,
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
import math
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from shmdist._log import Log
from shmdist.errors import (
    CapturedException,
    ProcessExitedException,
    RemoteException,
    ShmdistError,
)
from shmdist.memory.receipts import Receipts
from shmdist.runtime import served
from shmdist.runtime.audits import Audits
from shmdist.runtime.dispatch import Dispatcher
from shmdist.runtime.heart import Heart
from shmdist.runtime.output import Outputs
from shmdist.runtime.ownership import Ownership
from shmdist.runtime.reftable import RRID, RefTable
from shmdist.runtime.replies import Operation, Reply, pack_error, unpack_error
from shmdist.runtime.sharing import Sharing
from shmdist.runtime.strand import Cell, current
from shmdist.runtime.task import Functions, Tasks
from shmdist.wire import codec
from shmdist.wire.link import Link, LinkClosed, SendInterrupted, Unwoken
from shmdist.wire.messages import (
    BROKEN,
    HAS_REFS,
    IS_ERROR,
    NO_LANE,
    NOT_RUN,
    Frame,
    Kind,
    Parts,
    PeerInfo,
)

_RESULT, _CANCEL = int(Kind.RESULT), int(Kind.CANCEL)
_NEWS = 0.3  # seconds that process 1 may take to tell how another one ended
_log = Log("node")


class Node(Ownership):
    """One process of the cluster.

    Parameters
    ----------
    pid : int
        Its process id in the cluster; 1 for the process that the user started.
    """

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
        self.waiting: dict[
            tuple[int, int], Callable[[], Any]
        ] = {}  # operations that wait here, by how to withdraw
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

    def hearsay(self, pid: int) -> BaseException:
        """Find out how a process ended from process 1, which will tell in a moment."""
        deadline = time.monotonic() + _NEWS
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
        for key, withdraw in list(self.waiting.items()):
            if key[0] == pid and self.waiting.pop(key, None) is not None:
                withdraw()
        self.functions.forget(pid)
        self.sharing.lost(pid)
        self.drop(freed)
        for hook in list(self.lost_hooks):
            try:
                hook(pid)
            except Exception:
                _log.exception("a hook for the loss of process %d failed", pid)

    # ------------------------------------------------------------------ asking

    def request(
        self,
        pid: int,
        kind: int,
        flags: int,
        payload: codec.Payload | None,
        *,
        lane: int = NO_LANE,
        callback: Callable[[Reply], None] | None = None,
        call_id: int | None = None,
        reply: Reply | None = None,
        fd: int = -1,
        unwoken: Unwoken = None,
    ) -> Reply:
        """Send a frame that will be answered; the caller is inside the runtime.

        Raises
        ------
        ProcessExitedException
            The process is gone.
        KeyboardInterrupt
            While the frame waited to be written; it is withdrawn.
        """
        link = self.links.get(pid) or self.link_to(pid)
        if reply is None:
            reply = Reply(next(self.call_ids) if call_id is None else call_id, pid, callback)
        call_id = reply.call_id
        parts = codec.frame(kind, flags, lane, call_id, payload, link)
        self.pending[call_id] = reply
        try:
            short = payload is not None and payload.is_short and not self.sharing.has_dues()
            if not short or not link.leave(parts, unwoken):
                self.send(link, parts, payload, fd, unwoken)
        except LinkClosed:
            pass  # its death is on its way to us, and says how it went
        except BaseException:
            self.cancel(reply)
            raise
        if pid in self.graves and self.pending.pop(call_id, None) is not None:
            self.fail(reply, self.death(pid))
        return reply

    def send(
        self,
        link: Link,
        parts: Parts,
        payload: codec.Payload | None,
        fd: int = -1,
        unwoken: Unwoken = None,
    ) -> None:
        """Write a frame; the references in it are counted for the receiver first."""
        if payload is not None and payload.refs:
            self.count(payload.refs, link.pid, +1)
        strand, sharing = current(), self.sharing
        if sharing.has_dues():
            self._pay(link)
        try:
            link.send(parts, strand.interrupted, fd, unwoken)
        except SendInterrupted as stopped:
            if stopped.begun:
                self.dispatcher.start(lambda: (link.flush(block=True), None)[1])
                strand.deliver()
                return
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid, -1)
            try:
                strand.deliver()
            except BaseException:
                sharing.take_back(parts, link.pid)
                raise
            self.send(link, parts, payload, fd)  # the program's own handler lets it go on
        if len(parts) > 1 and parts.wanted:
            sharing.keeper.want(parts.wanted, link.pid)

    def _pay(self, link: Link) -> None:
        """Give blocks back to the process at the end of `link`, ahead of what goes there now."""
        dues = self.sharing.dues(link)
        if dues and not link.post(dues):
            self.dispatcher.start(lambda: (link.flush(block=True), None)[1])

    def wait_inside(self, reply: Cell, seconds: float = math.inf) -> None:
        """Wait so long at most for what a peer's runtime answers by itself; another thread reads meanwhile.

        Raises
        ------
        KeyboardInterrupt
            Nobody waits for a peer that stands still longer than he likes.
        """
        strand = current()
        lock = threading.Lock()
        lock.acquire()
        reply.add(lock)
        deadline = time.monotonic() + seconds
        try:
            while not reply.done and time.monotonic() < deadline:
                lock.acquire(timeout=0.05)  # it may have been done before it saw the lock
                if strand.pending and not reply.done:
                    strand.deliver()
        finally:
            reply.remove(lock)

    def answer(self, link: Link, call_id: int, flags: int, payload: codec.Payload | None) -> bool:
        """Answer a request; False when the other side is gone."""
        if payload is not None and payload.buffers:
            # Counts of blocks are told by this link; what goes by another one they could overtake.
            link = self.links.get(link.pid, link)
        parts = codec.frame(_RESULT, flags, 0, call_id, payload, link)
        try:
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid, +1)
            if self.sharing.has_dues():
                parts[:0] = self.sharing.dues(link)  # in one piece with the answer
            link.send(parts, self.dispatcher.held_up)
        except LinkClosed:
            return False
        if len(parts) > 1 and parts.wanted:
            self.sharing.keeper.want(parts.wanted, link.pid)
        return True

    def post(
        self, link: Link, kind: int, flags: int, call_id: int, payload: codec.Payload | None = None
    ) -> None:
        """Send a frame without ever blocking; from any thread."""
        if not link.post(codec.frame(kind, flags, 0, call_id, payload)):
            self.dispatcher.start(lambda: (link.flush(block=True), None)[1])

    def fail(self, reply: Reply, error: BaseException) -> None:
        """Complete a reply, which the caller has claimed, with an error."""
        reply.error = error
        self.dispatcher.complete(reply)
        callback, reply.callback = reply.callback, None
        if callback is not None:
            callback(reply)

    def wait(self, reply: Cell, timeout: float | None = None) -> bool:
        """Wait for a reply; False when the time was up."""
        return reply.done or self.dispatcher.wait(reply, timeout)

    def cancel(self, reply: Reply) -> bool:
        """Give up a request: nobody waits for its answer, and the worker is told.

        Returns
        -------
        bool
            False when the answer is here, or being handed over this very moment.
        """
        if self.pending.pop(reply.call_id, None) is None:
            return False
        link = self.links.get(reply.pid)
        if link is not None:
            self.post(link, _CANCEL, 0, reply.call_id)
        return True

    def open(self, reply: Reply, what: str) -> Any:
        """Return the value of a reply that is done, or raise its error."""
        if self.has_output:
            self.print_output()
        if reply.error is not None:
            # A copy, for the callers' frames hold the reply: they would hold each other, and all in them.
            raise copy.copy(reply.error)
        frame = reply.frame
        assert frame is not None
        return self.read_result(frame, reply.pid, what)

    def read_result(self, frame: Frame, pid: int, what: str) -> Any:
        """Read a RESULT frame: its value, or raise what it tells."""
        if frame.flags & BROKEN:
            raise MemoryError(f"this process had no memory to receive the result of {what}")
        if frame.flags & NOT_RUN:
            raise ShmdistError(f"{what} was withdrawn before it began")
        if frame.flags & IS_ERROR:
            raise self.load_error(frame)
        try:
            if not frame.flags & HAS_REFS and not frame.buffers:
                return pickle.loads(frame.body)
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
