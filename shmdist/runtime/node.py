"""The node: all state of one process of the cluster, and what is sent and received with it.

The only module-level variable is the current node.  Everything else hangs on it.

Locks, in the order in which they may be taken (a later one while an earlier is held):

1. ``Dispatcher._baton``: the right to read; not a lock that anybody waits for.
2. ``Node.lock``: members, links, reference table.  No user code, pickling, or sending
   while it is held: decide under it, act after it.
3. ``Dispatcher._roles``, ``Link.gate``, ``Strand.guard``: short and leaf-like.
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
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from shmdist._log import Log
from shmdist.errors import (
    CapturedException,
    ProcessExitedException,
    RemoteException,
    ShmdistError,
)
from shmdist.runtime.dispatch import Dispatcher
from shmdist.runtime.output import Outputs
from shmdist.runtime.ownership import Ownership
from shmdist.runtime.reftable import RRID, RefTable
from shmdist.runtime.replies import Operation, Reply, pack_error, unpack_error
from shmdist.runtime.strand import Cell, current
from shmdist.runtime.task import Functions, Tasks
from shmdist.wire import codec
from shmdist.wire.link import Link, LinkClosed, SendInterrupted
from shmdist.wire.messages import BROKEN, HAS_REFS, IS_ERROR, IS_NEW, NO_LANE, NOT_RUN, Frame, Kind, PeerInfo

if TYPE_CHECKING:
    from shmdist.wire.link import Part

_CALL, _RESULT, _CANCEL, _REFS, _OP = (
    int(Kind.CALL),
    int(Kind.RESULT),
    int(Kind.CANCEL),
    int(Kind.REFS),
    int(Kind.OP),
)
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
        if call_id is None:
            call_id = next(self.call_ids)
        reply = Reply(call_id, pid, callback)
        self.pending[call_id] = reply
        try:
            self.send(link, codec.frame(kind, flags, lane, call_id, payload), payload)
        except LinkClosed:
            # Its death is on its way to us, and says how it went.
            if pid in self.graves and self.pending.pop(call_id, None) is not None:
                self.fail(reply, self.death(pid))
        except BaseException:
            self.cancel(reply)
            raise
        else:
            if pid in self.graves and self.pending.pop(call_id, None) is not None:
                self.fail(reply, self.death(pid))
        return reply

    def send(self, link: Link, parts: list[Part], payload: codec.Payload | None) -> None:
        """Write a frame; the references in it are counted for the receiver first."""
        if payload is not None and payload.refs:
            self.count(payload.refs, link.pid, +1)
        strand = current()
        try:
            link.send(parts, strand.interrupted)
        except SendInterrupted as stopped:
            if stopped.begun:
                self.dispatcher.start(lambda: (link.flush(block=True), None)[1])
                strand.deliver()
                return
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid, -1)
            strand.deliver()
            self.send(link, parts, payload)  # the program's own handler lets it go on

    def answer(self, link: Link, call_id: int, flags: int, payload: codec.Payload | None) -> bool:
        """Answer a request; False when the other side is gone."""
        parts = codec.frame(_RESULT, flags, 0, call_id, payload)
        try:
            if payload is not None and payload.refs:
                self.count(payload.refs, link.pid, +1)
            link.send(parts)
        except LinkClosed:
            return False
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
            raise reply.error
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

    def operate(self, frame: Frame) -> None:
        """Run an operation on a reference that lives here."""
        if self.waiting.pop((frame.link.pid, frame.call_id), None) is None:
            self.give_back(list(codec.references(frame)))  # withdrawn meanwhile
            return
        operation = Operation(self, frame.link, frame.call_id)
        try:
            name, rrid, argument = codec.loads(frame, self.give_back)
            self.operations[name](self, operation, RRID(*rrid), argument)
        except Exception as error:
            operation.fail(error)

    def control(self, frame: Frame) -> None:
        """Handle a frame that is neither call, operation nor answer; must not block."""
        kind = frame.kind
        if kind == _REFS and frame.call_id != self.pid:
            link = self.links.get(frame.call_id)  # for another process, which the sender cannot reach
            if link is not None:
                payload = codec.Payload()
                payload.parts.append(frame.body)
                self.post(link, _REFS, 0, frame.call_id, payload)
        elif kind == _REFS and frame.flags & IS_NEW:
            self.create(RRID(*pickle.loads(frame.body)), "future", frame.link.pid)
        elif kind == _REFS:
            freed = self.change_counts(pickle.loads(frame.body))
            if freed:  # their values' finalizers are users' code, which must not run here
                self.dispatcher.start(lambda: self.drop(freed))
        elif kind == _CANCEL:
            key = (frame.link.pid, frame.call_id)
            if frame.flags & NOT_RUN:
                self.tasks.withdraw(key)
                return
            withdraw = self.waiting.pop(key, None)
            if withdraw is None:
                self.tasks.cancel(key)
            elif withdraw():
                self.post(frame.link, _RESULT, NOT_RUN, frame.call_id)
            # else it is being answered this very moment
        elif kind == Kind.FUNC:
            self.functions.put(frame)
        elif kind == Kind.DROP:
            self.functions.drop(frame.link.pid, frame.call_id)
        elif kind == Kind.STOP:
            self.tasks.interrupt_all()
        else:
            handler = self.controls.get(kind)
            if handler is None:
                _log.warning("process %d sent %r, which has no meaning here", frame.link.pid, frame)
            else:
                handler(frame)

    def unclaimed(self, frame: Frame) -> None:
        """Handle an answer that nobody waits for any more; on the reading thread."""
        refs = codec.references(frame)
        back = self.unclaimed_takes.pop(frame.call_id, None)
        if back is not None and not frame.flags & (IS_ERROR | NOT_RUN | BROKEN):
            # A take that was given up while its item was on the way: the item goes back, unread.
            owner, rrid = back
            self.dispatcher.start(lambda: self._return_item(owner, rrid, frame))
            return
        if refs:
            self.give_back(refs)

    def _return_item(self, owner: int, rrid: RRID, frame: Frame) -> None:
        value = codec.loads(frame, self.give_back)
        payload = codec.dumps(("untake", tuple(rrid), value))
        self.request(owner, _OP, 0, payload)

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
        node.dispatcher.abandon()
        node.outputs.abandon()
        for file in node.inherited:
            with contextlib.suppress(OSError):
                file.close()


os.register_at_fork(after_in_child=_after_fork)
