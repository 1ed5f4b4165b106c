"""A worker pool where it lives: its members, who of them is free, and who has the others.

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
from collections import OrderedDict
from collections.abc import Iterable
from math import inf
from typing import Any

from shmdist.channels import Channel, Completion, _tell, _Told
from shmdist.errors import ProcessExitedException, ShmdistError
from shmdist.owners import local_channel
from shmdist.refs import channel_from_id
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.reftable import RRID
from shmdist.runtime.replies import Operation, Reply
from shmdist.runtime.strand import current
from shmdist.wire import codec
from shmdist.wire.messages import Kind

_OP = int(Kind.OP)
_MOMENT = 0.05  # seconds for which the lock is waited for where nothing may block


class PoolState(Channel):
    """The members of a pool, the free ones as the items of a channel, and the loans."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        super().__init__(inf)
        node = current_node()
        self._home = node.pid
        # The channel's lock guards these as well.
        self.members: dict[int, None] = {}
        #: Who has the worker, by worker, once for each loan; none has an empty list.
        self.loans: dict[int, list[int]] = {}
        self._former: set[int] = set()  # members that have left
        for pid in pids:
            self.push(pid)
        # The hook must not keep the pool, and goes with it.
        alive = weakref.ref(self, lambda _: node.lost_hooks.remove(lost))

        def lost(pid: int) -> None:
            state = alive()
            if state is not None:
                state.lost(pid)

        node.lost_hooks.append(lost)

    def __repr__(self) -> str:
        return f"<PoolState members={list(self.members)} free={list(self._items)} loans={self.loans}>"

    # ------------------------------------------------------------------ lending

    def take_async(self, w: Completion) -> None:
        """Lend a free worker to `w`, now or when there is one."""
        told: _Told = []
        with self._lock:
            if not self._refused(told, w):
                if self._items:
                    self._lend(told, self._items.popleft(), w)
                else:
                    self._refuse_twice(w)
                    self._takers[id(w)] = w
        _tell(told)

    def lend_async(self, nested: bool, w: Completion) -> None:
        """Lend a worker for a call.

        One that is itself made by a call on a worker of this pool (`nested`) must not wait for
        a free one: its own worker would wait for it. It gets the one with least to do.
        """
        told: _Told = []
        with self._lock:
            waits = not (nested and _borrower(w, self._home) in self.members) or bool(self._items)
            if not waits:
                pid = min(self.members, key=lambda each: len(self.loans.get(each, ())))
                self._lend(told, pid, w)
        _tell(told)
        if waits:
            self.take_async(w)

    def lend(self, nested: bool) -> int:
        """Lend a worker for a call of this process."""
        pid: int = self._perform("take", None, self.lend_async, nested)
        return pid

    def _lend(self, told: _Told, pid: int, w: Completion) -> None:
        self.loans.setdefault(pid, []).append(_borrower(w, self._home))
        self._resolve(told, w, pid)

    def _refused(self, told: _Told, w: Completion) -> bool:
        """Fail who would wait for ever."""
        if self._closed:
            self._fail(told, w, self._drained("the pool is closed"))
        elif not self.members:
            self._fail(told, w, _no_workers())
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

    def give_back(self, pid: int, borrower: int) -> None:
        """End a loan of `borrower`, or of whoever has `pid` if that one has not."""
        told: _Told = []
        with self._lock:
            self._end_loan(told, pid, borrower)
        _tell(told)

    def give_back_from_reader(self, pid: int) -> bool:
        """End a loan of this process, on the thread that reads; False when that could not be done at once.

        Other processes, to which an answer may have to be written, are told by another thread. And the thread
        that reads may be one whose signal came while it had the lock: it must not wait for itself.
        """
        told: _Told = []
        if not self._lock.acquire(timeout=_MOMENT):
            return False
        try:
            self._end_loan(told, pid, self._home)
        finally:
            self._lock.release()
        if told:
            try:
                current_node().dispatcher.start(lambda: _tell(told))
            except RuntimeError:  # no thread can be had
                _tell(told)
        return True

    def _end_loan(self, told: _Told, pid: int, borrower: int) -> None:
        loans = self.loans.get(pid, [])
        if loans:
            loans.remove(borrower if borrower in loans else loans[0])
        elif pid not in self.members and pid not in self._former:
            raise ValueError(f"worker {pid} is not of this pool, which has {sorted(self.members)}: push it")
        if not loans:
            self._set_free(told, pid)

    def _set_free(self, told: _Told, pid: int) -> None:
        """Nobody has `pid`: the next who waits gets it."""
        self.loans.pop(pid, None)
        if pid not in self.members or pid in self._items or pid in current_node().graves:
            return  # it has left, or is about to; or it was free already, and must not be lent twice
        self._show(told, pid)
        if self._takers:
            self._lend(told, pid, self._takers.popitem(last=False)[1])
        else:
            self._items.append(pid)

    # ------------------------------------------------------------------ members

    def push(self, pid: int) -> None:
        """Add a worker."""
        current_node().check_member(pid)
        told: _Told = []
        with self._lock:
            self.members[pid] = None
            if not self.loans.get(pid):
                self._set_free(told, pid)
        _tell(told)
        if pid in current_node().graves:  # it went before it was a member, so nobody else takes it out
            self.discard(pid)

    def discard(self, pid: int) -> None:
        """Take a worker out."""
        told: _Told = []
        with self._lock:
            if pid in self.members:
                del self.members[pid]
                self._former.add(pid)
            if pid in self._items:
                self._items.remove(pid)
            if not self.members:  # who waits for a worker would wait for ever
                takers, self._takers = self._takers, OrderedDict()
                watchers, self._watchers = self._watchers, OrderedDict()
                for w in (*takers.values(), *(w for w, _ in watchers.values())):
                    self._fail(told, w, _no_workers())
        _tell(told)

    def lost(self, pid: int) -> None:
        """A process is gone: as a member, and as one that had workers."""
        self.discard(pid)
        told: _Told = []
        with self._lock:
            self.loans.pop(pid, None)
            for each, loans in list(self.loans.items()):
                if pid in loans:
                    loans[:] = [borrower for borrower in loans if borrower != pid]
                    if not loans:
                        self._set_free(told, each)
        _tell(told)

    def workers(self) -> list[int]:
        """Return all workers, free or not."""
        with self._lock:
            return list(self.members)


def _no_workers() -> ShmdistError:
    return ShmdistError("the pool has no workers: its workers have exited, or none was pushed")


def _borrower(w: Any, home: int) -> int:
    """Return the process that a loan is for."""
    borrower: int = getattr(w, "borrower", home)
    return borrower


# ---------------------------------------------------------------------- loans to other processes


class _Loan:
    """Tells a process's request for a worker its outcome."""

    def __init__(self, operation: Operation, state: PoolState) -> None:
        self._operation = operation
        self.borrower = operation.link.pid
        operation.undo = state.untake

    def resolve(self, pid: int) -> None:
        self._operation.resolve((pid, self.borrower))

    def fail(self, error: BaseException) -> None:
        self._operation.fail(error)


def _lend(node: Node, operation: Operation, rrid: RRID, nested: bool | None) -> None:
    """Serve a request for a worker; `nested` is None when it is not for a call."""
    state = local_channel(node, rrid)
    loan = _Loan(operation, state)
    if nested is None:
        state.take_async(loan)
    else:
        state.lend_async(nested, loan)
    operation.waits(lambda: state.cancel(loan))


def _run(node: Node, operation: Operation, rrid: RRID, call: tuple[str, Any]) -> None:
    """Serve one of the calls that need not wait."""
    name, args = call
    operation.resolve(getattr(local_channel(node, rrid), name)(*args))


Node.operations.update({"lend": _lend, "pool": _run})


def give_back(owner: int, rrid: RRID, pid: int) -> None:
    """Give a worker back to the pool `rrid` on `owner`; an interrupt does not keep it from that."""
    node = current_node()
    strand = current()
    strand.enter()
    try:
        if owner == node.pid:
            channel_from_id(rrid).give_back(pid, node.pid)
            return
        payload = codec.dumps(("untake", tuple(rrid), (pid, node.pid)))
        call_id = next(node.call_ids)
        link = node.link_to(owner)
        reply = node.pending[call_id] = Reply(call_id, owner)
        node.post(link, _OP, 0, call_id, payload)
        if owner in node.graves:
            node.pending.pop(call_id, None)
            return
        node.wait(reply)  # for it to be free when this returns; an interrupt ends no more than that
    except ProcessExitedException:
        pass  # the pool is gone, and what the call has brought is still good
    finally:
        strand.leave()
