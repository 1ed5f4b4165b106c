"""Future: the value, present or still to come, of a computation on some process.

Where the value is
------------------
It lives with its owner, the process that computes it, until somebody fetches it. A fetch
brings a copy here and gives this process's count at the owner back. Results that cannot
change and are small (numbers, short texts) come along with the word that they are ready.

Where the value goes
--------------------
A future that has been fetched takes its value along where it is sent, if that can be pickled; else
it goes as a reference. When this process owns the value, it enters it anew for that. When another
one does, the reference is *weak*: it has no count, for the owner may have forgotten the value, and a
fetch by it brings the value or a clear error.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from functools import partial
from typing import Any

from shmdist._ending import VOID, Ending
from shmdist._timeouts import seconds
from shmdist.errors import (
    CapturedException,
    FinalizerError,
    RemoteException,
    SerializationError,
    ShmdistError,
    capture,
    join_tracebacks,
    remote_exception,
)
from shmdist.refcount.table import RRID, AlreadySet, Entry, State
from shmdist.references.base import _index_here, ask
from shmdist.references.future_interface import Cancelled, ConcurrentFutureInterface, soon
from shmdist.references.future_pickling import can_go, keeping, packed, stand_in, unpacked
from shmdist.runtime.interrupts import ThreadState, current
from shmdist.runtime.node import Node, current_node, process_id
from shmdist.runtime.replies import PendingReply
from shmdist.runtime.waiting import ResultWaiter
from shmdist.serialization import codec
from shmdist.serialization.local_copy import local_copy
from shmdist.transport.link import LinkClosed
from shmdist.transport.messages import FOR_GOOD, IS_ERROR, IS_NEW, NOT_RUN, Kind

_REFS = int(Kind.REFS)


class LocalTask:
    """A call that runs on a thread of this process, as far as interrupting it goes."""

    __slots__ = ("interrupted", "thread_state")

    def __init__(self) -> None:
        self.interrupted = False
        self.thread_state: ThreadState | None = None  # of the thread that runs it

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in it."""
        self.interrupted = True
        if self.thread_state is not None:
            self.thread_state.interrupt_call(self)


class Future(ConcurrentFutureInterface):
    """A value on some process, there or still to come; written once.

    Parameters
    ----------
    pid : int, optional
        The process that holds the value; default this one.

    Notes
    -----
    Futures are made by ``remotecall``, ``spawn`` and ``spawnat``; one made directly gets
    its value by :meth:`put`. It may be sent to any process. The value is freed when the
    last reference to it in the cluster is gone or has fetched it. Sent on after that, it takes the value
    along, if that can be pickled; if not, it can be fetched while its process still has the value.

    It is a `concurrent.futures.Future` too, for ``concurrent.futures.wait`` and
    ``as_completed``, and can be awaited in asyncio.

    References
    ----------
    Julia manual, `Future` in "Distributed Computing".

    Examples
    --------
    >>> future = Future()
    >>> future.isready()
    False
    >>> future.put(42).fetch()
    42
    """

    __module__ = "shmdist"
    _local: LocalTask | None = None  # the call that computes it, when it runs here
    _what = "a remote call"
    _revived = False  # entered anew at its owner, this process

    def __init__(self, pid: int | None = None) -> None:
        node = current_node()
        owner = node.pid if pid is None else process_id(pid)
        rrid = RRID(node.pid, next(node.requests.call_ids))
        with current():
            self._set_up(rrid, owner)
            if owner == node.pid:
                node.counts.create(rrid, "future", node.pid)
            else:
                node.peers.link_to(owner)
                # Not an operation, which would be run later than words on counts that follow it.
                payload = codec.dumps(tuple(rrid))
                try:
                    node.requests.send(
                        node.peers.links[owner], codec.frame(_REFS, IS_NEW, 0, owner, payload), None
                    )
                except (LinkClosed, KeyError):
                    raise node.peers.death(owner) from None

    @classmethod
    def _of_call(cls, rrid: RRID, where: int, what: str) -> Future:
        """Return the future of a call that is about to be sent."""
        self = cls.__new__(cls)
        self._set_up(rrid, where)
        self._what = what
        return self

    def __repr__(self) -> str:
        return f"<Future {tuple(self._rrid)} on process {self._where}, {self._state_here()}>"

    def _state_here(self) -> str:
        """Return the word for its state, as far as that is known here; asks nobody."""
        if self._outcome is not None:
            return "fetched" if self._outcome[0] else "cancelled" if self.cancelled() else "failed"
        if self._inert:
            return "inert"
        reply, node = self._reply, current_node()
        if reply is not None and reply.done:
            flags = 0 if reply.frame is None else reply.frame.flags
            failed = reply.error is not None or flags & IS_ERROR
            return "cancelled" if flags & NOT_RUN else "failed" if failed else "ready"
        if reply is None and self._weak is None and self._where == node.pid:
            with current(), node.lock:
                entry = node.counts.refs.get(self._rrid)
            if entry is not None and entry.state is State.SET:
                return "failed" if isinstance(entry.value, CapturedException) else "ready"
        return "pending" if self._weak is None else "ready"

    # ------------------------------------------------------------------ its outcome

    def _on_reply(self, reply: PendingReply) -> None:
        """The call has ended; on the reading thread, so nothing here may block."""
        if "_condition" in self.__dict__:
            soon(self._finish_reply)

    def _settle(self, succeeded: bool, value: Any) -> None:
        """Keep the outcome, and let the owner forget it."""
        if isinstance(value, RemoteException) and not succeeded:
            original = value.captured.ex
            if type(original) is Cancelled and original.rrid == self._rrid:
                value = original  # told by the owner: another process cancelled it
        self._decide((succeeded, value))
        self._let_go()

    def _decide(self, outcome: tuple[bool, Any]) -> bool:
        """Keep the outcome; False when another thread was first. One step for the interpreter."""
        return self.__dict__.setdefault("_outcome", outcome) is outcome

    def _let_go(self) -> None:
        """Let the owner forget the value, unless it is kept (:meth:`_keep`)."""
        if not self._keepers and not self._revived:
            self._release()

    def _entry(self, node: Node) -> Entry | None:
        """Return the entry of one that lives here, under the node's lock; None: its outcome is here."""
        entry = node.counts.refs.get(self._rrid)
        if entry is None and self._outcome is not None:
            return None  # another thread has fetched it, and let it go
        return node.counts.refs.lookup(self._rrid) if entry is None else entry

    def _open_reply(self, reply: PendingReply) -> None:
        """Take what the word of the call's end brought; the value may still be with the owner."""
        node = current_node()
        frame = reply.frame
        if reply.error is not None:
            self._settle(False, reply.error)
        elif frame is None:
            return
        elif frame.flags & NOT_RUN:
            self._settle(False, Cancelled(f"{self._what} was withdrawn before it began", self._rrid))
        elif frame.flags & IS_ERROR:
            self._settle(False, node.requests.load_error(frame))
        elif frame.body:
            self._settle(True, pickle.loads(frame.body))

    def _give(self) -> Any:
        assert self._outcome is not None
        succeeded, value = self._outcome
        if succeeded:
            return value
        raise value

    def _raise_failure(self) -> None:
        """Raise the error of a call that has ended in one; its value is not fetched."""
        if self._state_here() in ("failed", "cancelled"):
            self.fetch()

    def fetch(self, timeout: float | None = None) -> Any:
        """Wait for the value, and return it; it is kept here, and freed at its owner.

        Parameters
        ----------
        timeout : float, optional
            Seconds.

        Raises
        ------
        RemoteException
            What the computation raised.
        ProcessExitedException
            Its process is gone.
        TimeoutError
            The value is not there, and the computation goes on; a ``timeout`` of 0 is a try. A process
            that holds the value has half a second longer to say so.
        KeyboardInterrupt
            Ctrl-C; a call that this process began for it is interrupted too.
        """
        timeout = seconds(timeout)
        if self._outcome is not None:
            return self._give()
        node = self._alive()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._await_end(node, timeout)
        if self._outcome is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._where == node.pid:
                self._fetch_here(node, left)
            else:
                self._fetch_there(left)
        if node.has_output:
            node.print_output(self._where)
        return self._give()

    def _fetch_there(self, timeout: float | None) -> None:
        """Ask the owner for the value."""
        self._keep()
        try:
            if self._is_settled():
                return
            outcome = True, ask(self._where, "fetch", self._rrid, self._weak, timeout)
        except FinalizerError:
            raise  # it is not the future's
        except ShmdistError as error:
            outcome = False, error
        finally:
            self._keep_no_longer()
        self._settle(*outcome)

    def _await_end(self, node: Node, timeout: float | None) -> None:
        """Wait for the end of the call that this process began, if it did."""
        reply = self._reply
        if reply is None:
            return
        if not reply.done:
            thread_state = current()
            thread_state.enter()
            try:
                try:
                    if not node.requests.wait(reply, timeout):
                        raise TimeoutError(
                            f"{self._what} on process {self._where} took more than {timeout:g} s"
                        )
                except TimeoutError:
                    raise
                except BaseException:
                    self._interrupt(node)
                    raise
            finally:
                thread_state.leave()
        if self._outcome is None:
            self._open_reply(reply)
        if node.has_output:
            node.print_output(self._where)

    def _interrupt(self, node: Node, flags: int = 0) -> None:
        """Interrupt the call that computes this; its end still comes."""
        if self._local is not None:
            self._local.interrupt()
            return
        reply = self._reply
        link = node.peers.links.get(self._where)
        if reply is not None and not reply.done and link is not None:
            node.reactor.post(link, int(Kind.CANCEL), flags, reply.call_id)

    def _fetch_here(self, node: Node, timeout: float | None) -> None:
        """Wait for a value that lives in this process."""
        waiter = ResultWaiter()
        if self._weak is not None and not node.counts.has_value(self._rrid):
            self._settle(False, SerializationError(self._weak))
            return
        thread_state = current()
        thread_state.enter()
        try:
            with node.lock:
                entry = self._entry(node)
                if entry is None:
                    return
                ready = entry.state is not State.UNSET
                if not ready:
                    entry.waiters.append(waiter)
            if not ready:
                try:
                    if not node.reactor.wait(waiter, timeout):
                        raise TimeoutError(f"{self!r} got no value within {timeout:g} s")
                finally:
                    with node.lock:
                        if waiter in entry.waiters:
                            entry.waiters.remove(waiter)
        finally:
            thread_state.leave()
        if waiter.exc is not None:
            if isinstance(waiter.exc, RemoteException):
                join_tracebacks(waiter.exc)
            self._settle(False, waiter.exc)
            return
        value = entry.value
        if isinstance(value, CapturedException):
            error = remote_exception(node.pid, value)
            join_tracebacks(error)
            self._settle(False, error)
        else:
            self._settle(True, value)

    def wait(self, timeout: float | None = None) -> Future:
        """Wait until the value or the error is there, without fetching it.

        Returns
        -------
        Future
            This one, whatever the call has come to, as ``wait`` of the standard library's results does:
            what it raised is raised where the value is asked for.

        Raises
        ------
        ProcessExitedException
            Its process is gone.
        TimeoutError
            It has not ended within `timeout` seconds.
        """
        timeout = seconds(timeout)
        node = self._alive() if self._outcome is None else current_node()
        if self._outcome is None:
            self._await_end(node, timeout)
        if self._outcome is None and self._reply is None and self._weak is None:
            if self._where == node.pid:
                with current(), node.lock:
                    entry = self._entry(node)
                    ready = entry is None or entry.state is State.SET
                if not ready:
                    self._fetch_here(node, timeout)
            else:
                self._keep()
                try:
                    if not self._is_settled():
                        ask(self._where, "wait", self._rrid, timeout=timeout)
                except FinalizerError:
                    raise  # it is not the future's
                except ShmdistError as error:
                    self._settle(False, error)
                finally:
                    self._keep_no_longer()
        if self._outcome is not None and not self._outcome[0]:
            failure = self._outcome[1]
            if not isinstance(failure, (RemoteException, Cancelled)):
                raise failure
        return self

    def put(self, value: Any, timeout: float | None = None) -> Future:
        """Give the future its value: a copy, also where it lives on this process.

        Raises
        ------
        ShmdistError
            It has one already.
        TimeoutError
            It has not got this one; unless its process stands still, as the text then says: it may get
            it when that goes on.
        """
        timeout = seconds(timeout)
        if self._outcome is not None or self._weak is not None:
            raise AlreadySet(self._rrid)  # and its owner may have forgotten it since
        node = self._alive()
        if self._where == node.pid:
            value = local_copy(value)
            thread_state = current()
            thread_state.enter()  # no interrupt must come between the value and the word to who waits for it
            try:
                with node.lock:
                    entry = self._entry(node)
                if entry is None:
                    raise AlreadySet(self._rrid)
                node.counts.set_value(entry, value)
            finally:
                thread_state.leave()
        else:
            self._keep()
            try:
                if self._is_settled():
                    raise AlreadySet(self._rrid)
                ask(self._where, "put", self._rrid, value, timeout)
            finally:
                self._keep_no_longer()
        return self

    def isempty(self, timeout: float | None = None) -> bool:
        """Return whether the value (or error) is not there."""
        return not self.isready(timeout)

    def isopen(self, timeout: float | None = None) -> bool:
        """Return whether it may still be written: it has no value (or error)."""
        return not self.isready(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Raise `TypeError`: a future is closed by being written, once."""
        raise TypeError(
            "a Future cannot be closed: it is written once, and then no more. Use put() to write it, "
            "or cancel() to withdraw the call that computes it"
        )

    def isready(self, timeout: float | None = None) -> bool:
        """Return whether the value (or error) is there."""
        timeout = seconds(timeout)
        if self._outcome is not None or self._weak is not None:
            return True
        if self._reply is not None:
            return self._reply.done
        node = self._alive()
        if self._where == node.pid:
            with current(), node.lock:
                entry = self._entry(node)
                return entry is None or entry.state is State.SET
        self._keep()
        try:
            return self._is_settled() or bool(ask(self._where, "isready", self._rrid, timeout=timeout))
        finally:
            self._keep_no_longer()

    def cancel(self) -> bool:
        """Withdraw the call that computes this, or interrupt it when it runs.

        From then on the future is cancelled, for all who hold it: `CancelledError` is raised at once where it
        is waited for. The call itself may take a moment longer to end; a worker from a pool goes back when
        it has.

        Returns
        -------
        bool
            False when it has ended, or was not begun by this process.
        """
        if self._outcome is not None:
            return self.cancelled()
        if (self._local is None and self._reply is None) or self.isready():
            return False
        node = current_node()
        with current():
            if not self._decide((False, Cancelled(f"{self._what} was cancelled", self._rrid))):
                return self.cancelled()
            self._interrupt(node, FOR_GOOD)
            if self._local is not None:
                self._cancel_here(node)
            elif self._reply is not None:
                # Those who wait for its end see the outcome; who gives a worker back waits on.
                node.reactor.complete(self._reply)
            self._let_go()
        if "_condition" in self.__dict__:
            self._finish()
        return True

    def _cancel_here(self, node: Node) -> None:
        """Let others that hold this future of a call of this process see that it is cancelled."""
        assert self._outcome is not None
        with current(), node.lock:
            entry = node.counts.refs.get(self._rrid)
        if entry is not None:
            with contextlib.suppress(AlreadySet):  # it has ended this very moment
                node.counts.set_value(entry, capture(self._outcome[1]))

    def __getitem__(self, index: Any) -> Any:
        if self._outcome is not None:
            return _index_here(self, index)  # the owner has it no more
        return super().__getitem__(index)

    # ------------------------------------------------------------------ travel

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _load_inert, (tuple(self._rrid), self._where, packed(self, self._outcome, protocol))

    def _revive(self) -> bool:
        """Enter a value that has been fetched at its owner anew; False when that is not this process."""
        node = current_node()
        outcome = self._outcome
        if self._where != node.pid or self._weak is not None or outcome is None or not outcome[0]:
            return False
        with current(), node.lock:
            count, back = Ending(VOID), partial(node.counts.released.append, (node.pid, self._rrid))
            if not node.counts.has_value(self._rrid):
                entry = node.counts.refs.create(self._rrid, "future", node.pid)
                if self._count is None:
                    count.__del__, self._count = back, count
                self._revived = True
                node.counts.refs.set_value(entry, outcome[1])
            elif self._count is None:
                node.counts.refs.add(self._rrid, node.pid, +1)
                count.__del__, self._count = back, count
            self._revived = True
        return True


def _reduce(future: Future, pickler: Any) -> Any:
    """Pickle a future for another process of the cluster."""
    if pickler.payload is None or future._inert:
        return future.__reduce_ex__(5)
    if future._outcome is None and future._reply is not None and future._reply.done:
        future._open_reply(future._reply)
    name = tuple(future._rrid), future._where
    if future._outcome is not None:
        succeeded, value = future._outcome
        # The same one for the second time in one pickle: it is part of its own value.
        met = pickler.__dict__.setdefault("met", set())
        again = id(future) in met
        met.add(id(future))
        known = pickler.__dict__.setdefault("verdicts", {})
        if codec.is_simple(value) or (not again and can_go(future, future._outcome, known)):
            # In a trial it has been tried just now.
            return _load_settled, (*name, (True, None) if pickler.payload.is_trial else future._outcome)
        if not succeeded and not again:
            return _load_settled, (*name, (False, stand_in(value)))
        if not future._revive():
            return _load_weak, (*name, _why_weak(future))
    elif future._weak is not None:
        return _load_weak, (*name, future._weak)
    ref = keeping(future)
    if future._is_settled() and not future._revived:
        return _reduce(future, pickler)  # another thread has fetched it this very moment
    pickler.payload.refs.append(ref)
    return _load, name


def _why_weak(future: Future) -> str:
    return (
        f"the value of {future!r} was fetched by process {current_node().pid}, which cannot send it on, "
        f"and process {future._where} has it no more: send the future before it is fetched"
    )


def _load(rrid: tuple[int, int], where: int) -> Future:
    future = Future.__new__(Future)
    count, back = future._prepare(RRID(*rrid), where)
    codec.note_created_reference((future._rrid, where))
    count.__del__ = back
    return future


def _load_weak(rrid: tuple[int, int], where: int, why: str) -> Future:
    future = Future.__new__(Future)
    future._rrid, future._where, future._weak = RRID(*rrid), where, why
    return future


def _load_settled(rrid: tuple[int, int], where: int, outcome: tuple[bool, Any]) -> Future:
    future = Future.__new__(Future)
    future._rrid, future._where, future._outcome = RRID(*rrid), where, outcome
    return future


def _load_inert(rrid: tuple[int, int], where: int, outcome: Any) -> Future:
    future = Future.__new__(Future)
    future._rrid, future._where, future._inert = RRID(*rrid), where, True
    future._outcome = unpacked(outcome)
    return future


codec.reducers[Future] = _reduce
