"""A worker pool on the process it lives on: its members, and which of them are free.

A pool is a channel of free workers that knows its members, so a ``take`` of another process
waits in it as an entry, without a thread, and is withdrawn when it is given up.

Loans
-----
Each worker that is not free is on loan, to one process or, by nested calls, to several. It
is free again when all have given it back or are gone: a process that dies gives back what
it had. Who leaves the pool keeps its loans, for it may come back before they end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from math import inf
from typing import Any

from shmdist._firmly import firmly
from shmdist.errors import REMOVAL, ProcessExitedException, ShmdistError, no_workers_left
from shmdist.refcount.table import RRID
from shmdist.references.channel import Channel, Completion, _inside, _tell, _Told
from shmdist.references.remote_channel import channel_from_id
from shmdist.references.server import local_channel
from shmdist.runtime.counts import ReferenceCounts
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import current_node, process_id
from shmdist.runtime.replies import PendingOperation, PendingReply
from shmdist.runtime.router import register_operations
from shmdist.runtime.stack import need_stack
from shmdist.serialization import codec
from shmdist.transport.messages import Kind

_REFERENCE_OP = int(Kind.REFERENCE_OP)
_LOCK_SECONDS = 0.05  # for which the lock is waited for where nothing may block


class PoolState(Channel):
    """The members of a pool, the free ones as the items of a channel, and the loans."""

    def __init__(self, pids: Iterable[int] = (), died: Iterable[int] = ()) -> None:
        super().__init__(inf)
        node = current_node()
        self._home = node.pid
        self.cure = ""  # what a program can do when all have died, for the text of an error
        # The channel's lock guards these as well.
        self.members: dict[int, None] = {}
        #: Who has the worker, by worker, once for each loan; none has an empty list.
        self.loans: dict[int, list[int]] = {}
        self._former: set[int] = set()  # members that have left
        self.died = dict.fromkeys(died)  # those that died, since a worker was pushed last
        for pid in pids:
            self.push(pid)
        # The hook must not keep the pool, and goes with it.
        alive = weakref.ref(self, lambda _: node.peers.lost_hooks.remove(lost))

        def lost(pid: int) -> None:
            state = alive()
            if state is not None:
                state.lost(pid)

        node.peers.lost_hooks.append(lost)

    def __repr__(self) -> str:
        return f"<PoolState members={list(self.members)} free={list(self._items)} loans={self.loans}>"

    # ------------------------------------------------------------------ lending

    def take_async(self, w: Completion) -> None:
        """Lend a free worker to `w`, now or when there is one."""
        told: _Told = []
        try:
            with self._lock:
                if not self._refused(told, w):
                    pid = self._first_free()
                    if pid is not None:
                        self._lend(told, pid, w)
                    else:
                        self._refuse_twice(w)
                        self._takers[id(w)] = w
        finally:
            if told:
                _tell(told)

    def lend_async(self, nested: bool, w: Completion) -> None:
        """Lend a worker for a call.

        One that is itself made by a call on a worker of this pool (`nested`) must not wait for
        a free one: its own worker would wait for it. It gets the one with least to do.
        """
        told: _Told = []
        try:
            with self._lock:
                waits = not (nested and _borrower(w, self._home) in self.members) or bool(self._items)
                staying = (
                    [] if waits else [pid for pid in self.members if pid not in current_node().peers.leaving]
                )
                waits = not staying
                if staying:
                    pid = min(staying, key=lambda each: len(self.loans.get(each, ())))
                    self._lend(told, pid, w)
        finally:
            if told:
                _tell(told)
        if waits:
            self.take_async(w)

    def lend(self, nested: bool) -> int:
        """Lend a worker for a call of this process."""
        pid: int = self._perform("take", None, self.lend_async, nested)
        return pid

    def take(self, timeout: float | None = None) -> int:
        """Lend a free worker to this process; waits for one."""
        need_stack()  # for the way back as well
        pid: int = super().take(timeout)
        return pid

    def _first_free(self) -> int | None:
        """Return the first free worker that is not about to go; None when there is none."""
        leaving = current_node().peers.leaving
        while self._items:
            pid: int = self._items[0]
            if pid not in leaving:
                return pid
            del self._items[0]
        return None

    def _lend(self, told: _Told, pid: int, w: Completion) -> None:
        """Lend a worker, which is free no more; where an error comes before, it still is."""
        loans = [*self.loans.get(pid, ()), _borrower(w, self._home)]
        self._resolve(told, w, pid)
        self.loans[pid] = loans
        for place, free in enumerate(self._items):  # no call, from which an error might come now
            if free == pid:
                del self._items[place]
                break

    def _refused(self, told: _Told, w: Completion) -> bool:
        """Fail who would wait for ever."""
        if self._closed:
            self._fail(told, w, self._drained("the pool is closed"))
        elif not self.members:
            self._fail(told, w, self.no_workers())
        return self._closed or not self.members

    def _watch(self, w: Completion, verb: str) -> None:
        told: _Told = []
        with self._lock:
            refused = not self.members and self._refused(told, w)
        _tell(told)
        if not refused:
            super()._watch(w, verb)

    # ------------------------------------------------------------------ giving back

    def put_async(self, value: int, w: Completion) -> None:
        """Take a worker back."""
        try:
            self.give_back(value, self._home)
        except ValueError as error:
            w.fail(error)
        else:
            w.resolve(None)

    def untake(self, value: Any) -> None:
        """Take a worker back that came too late; with its borrower when that is another process."""
        pid, borrower = value if isinstance(value, tuple) else (value, self._home)
        self.give_back(pid, borrower)

    @_inside
    def give_back(self, pid: int, borrower: int) -> None:
        """End a loan of `borrower`, or of whoever has `pid` if that one has not."""
        told: _Told = []
        try:
            with self._lock:
                firmly(self._end_loan, told, pid, borrower)  # nobody else will give it back
        finally:
            if told:
                _tell(told)

    def give_back_from_reader(self, pid: int) -> bool:
        """End a loan of this process, on the thread that reads; False when that could not be done at once.

        Other processes, to which an answer may have to be written, are told by another thread. And the thread
        that reads may be one whose signal came while it had the lock: it must not wait for itself.
        """
        told: _Told = []
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return False
        try:
            self._end_loan(told, pid, self._home)
        except ValueError:
            raise
        except Exception:
            return False  # nothing is changed
        finally:
            self._lock.release()
        if told:
            firmly(self._tell_soon, told)
        return True

    @staticmethod
    def _tell_soon(told: _Told) -> None:
        current_node().reactor.soon(lambda: _tell(told))

    def _end_loan(self, told: _Told, pid: int, borrower: int) -> None:
        """End a loan; an error leaves it as it was."""
        loans = list(self.loans.get(pid, ()))
        if loans:
            loans.remove(borrower if borrower in loans else loans[0])
        elif pid not in self.members and pid not in self._former:
            raise ValueError(f"worker {pid} is not of this pool, which has {sorted(self.members)}: push it")
        if loans:
            self.loans[pid] = loans
        else:
            self._set_free(told, pid)

    def _set_free(self, told: _Told, pid: int) -> None:
        """Nobody has `pid`: the next who waits gets it. Its loans are ended last."""
        if pid not in self.members or pid in self._items or pid in current_node().peers.leaving:
            if pid in self.loans:  # it has left, or is about to; or was free, and must not be lent twice
                del self.loans[pid]
            return
        firmly(self._show, told, pid)
        if self._takers:
            key, w = next(iter(self._takers.items()))
            loans = [_borrower(w, self._home)]
            self._resolve(told, w, pid)
            self.loans[pid] = loans
            del self._takers[key]
        else:
            self._items.append(pid)
            if pid in self.loans:
                del self.loans[pid]

    # ------------------------------------------------------------------ members

    @_inside
    def push(self, pid: int) -> None:
        """Add a worker."""
        pid = process_id(pid)
        current_node().peers.check_member(pid)
        told: _Told = []
        with self._lock:
            self.members[pid] = None
            self.died.clear()
            if not self.loans.get(pid):
                firmly(self._set_free, told, pid)
        _tell(told)
        # One that went before it was a member is taken out by nobody else.
        if pid in current_node().peers.lost:
            self.lost(pid)

    @_inside
    def discard(self, pid: int) -> None:
        """Take a worker out."""
        told: _Told = []
        died = getattr(current_node().peers.lost.get(pid), "what", REMOVAL) != REMOVAL
        with self._lock:
            firmly(self._take_out, told, pid, died)
        _tell(told)

    def _take_out(self, told: _Told, pid: int, died: bool) -> None:
        if pid in self.members:
            self._former.add(pid)
            if died:
                self.died[pid] = None
            del self.members[pid]
        if pid in self._items:
            self._items.remove(pid)
        if not self.members:  # a thread that waits for a worker would wait for ever
            while self._takers:
                key, w = next(iter(self._takers.items()))
                self._fail(told, w, self.no_workers())
                del self._takers[key]
            while self._watchers:
                key, (w, _) = next(iter(self._watchers.items()))
                self._fail(told, w, self.no_workers())
                del self._watchers[key]

    @_inside
    def lost(self, pid: int) -> None:
        """A process is gone: as a member, and as one that had workers."""
        self.discard(pid)
        told: _Told = []
        try:
            with self._lock:
                firmly(self._end_loans, told, pid)
        finally:
            _tell(told)

    def _end_loans(self, told: _Told, pid: int) -> None:
        self.loans.pop(pid, None)
        for each, loans in list(self.loans.items()):
            if pid in loans:
                left = [borrower for borrower in loans if borrower != pid]
                if left:
                    self.loans[each] = left
                else:
                    self._set_free(told, each)

    @_inside
    def workers(self) -> list[int]:
        """Return all workers, free or not."""
        with self._lock:
            return list(self.members)

    def no_workers(self) -> ShmdistError:
        """Return the error of work for this pool when it has no workers."""
        node = current_node()
        died = [pid for pid in (*self.died, *self.members) if pid in node.peers.lost]
        if not died:
            return ShmdistError("the pool has no workers left: they were removed, or none was pushed")
        return no_workers_left(
            [node.peers.death(pid) for pid in died], self.cure or "push others into the pool"
        )


def _borrower(w: Any, home: int) -> int:
    """Return the process that a loan is for."""
    borrower: int = getattr(w, "borrower", home)
    return borrower


# ---------------------------------------------------------------------- loans to other processes


class _LoanReply:
    """Tells a process's request for a worker its outcome."""

    def __init__(self, operation: PendingOperation, state: PoolState) -> None:
        self._operation = operation
        self.borrower = operation.link.pid
        operation.undo = state.untake

    def resolve(self, pid: int) -> None:
        self._operation.resolve((pid, self.borrower))

    def fail(self, error: BaseException) -> None:
        self._operation.fail(error)


def _lend(counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, nested: bool | None) -> None:
    """Serve a request for a worker; `nested` is None when it is not for a call."""
    state = local_channel(counts, rrid)
    loan = _LoanReply(operation, state)
    if nested is None:
        state.take_async(loan)
    else:
        state.lend_async(nested, loan)
    operation.waits(lambda: state.cancel(loan))


def _run(counts: ReferenceCounts, operation: PendingOperation, rrid: RRID, call: tuple[str, Any]) -> None:
    """Serve one of the calls that need not wait."""
    name, args = call
    operation.resolve(getattr(local_channel(counts, rrid), name)(*args))


register_operations({"lend": _lend, "pool": _run})


def give_back(owner: int, rrid: RRID, pid: int) -> None:
    """Give a worker back to the pool `rrid` on `owner`; an interrupt does not keep it from that."""
    node = current_node()
    thread_state = current()
    thread_state.enter()
    try:
        if owner == node.pid:
            channel_from_id(rrid).give_back(pid, node.pid)
            return
        payload = codec.dumps(("untake", tuple(rrid), (pid, node.pid)))
        call_id = next(node.requests.call_ids)
        link = node.peers.link_to(owner)
        reply = node.requests.pending[call_id] = PendingReply(call_id, owner)
        node.reactor.post(link, _REFERENCE_OP, 0, call_id, payload)
        if owner in node.peers.lost:
            node.requests.pending.pop(call_id, None)
            return
        try:
            node.requests.wait(
                reply
            )  # for it to be free when this returns; an interrupt ends no more than that
        except Exception:
            pass  # nor does an error: it is given back, and must not be so twice
    except ProcessExitedException:
        pass  # the pool is gone, and what the call has brought is still good
    finally:
        thread_state.leave()
