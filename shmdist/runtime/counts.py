"""Reference counts of this process: references that live here, and counts of those that it holds.

Counts travel as messages of their own.  The protocol is written down in ``reftable``.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from shmdist._ending import VOID, Ending
from shmdist._firmly import firmly
from shmdist.errors import CapturedException, ShmdistError, remote_exception
from shmdist.refcount.receipts import Receipts
from shmdist.refcount.table import RRID, Entry, RefTable, State
from shmdist.runtime.interrupts import collection_runs, current
from shmdist.runtime.peers import Peers
from shmdist.runtime.reactor import Reactor
from shmdist.serialization import codec
from shmdist.transport.link import STUCK_SECONDS, LinkClosed, SendInterrupted
from shmdist.transport.messages import Arrived, Frame, Kind

_REFS = int(Kind.REFS)
_FLUSH_SECONDS = 0.005  # that dropped references are gathered before they are told
_MAX_COLLECTION_SECONDS = 1.0

#: A change of a count: whence and number of the reference, the process, by how much, and who told.
Change = tuple[int, int, int, int, int]
#: A reference that is held, and its owner.
Ref = tuple[RRID, int]


class ReferenceCounts:
    """The references that live here, and the counts of those that this process holds.

    Attributes
    ----------
    lock : lock
        Guards the tables: that of :class:`Peers`.
    receipts : Receipts
        Of counts of references that others than their owners gave.
    released : deque
        References dropped, by finalizers: owner and id.
    unsent_releases : dict
        Counts to give back, by owner: by reference and reporter.
    freed : deque
        Entries that nothing refers to any more, whose values are to be let go of.
    deferred_jobs : deque
        What finalizers leave to be done.
    """

    def __init__(self, peers: Peers, reactor: Reactor) -> None:
        self.peers = peers
        self.reactor = reactor
        self.lock = peers.lock
        self.refs = RefTable()
        self.receipts = Receipts()
        self.released: deque[tuple[int, RRID]] = deque()
        self.unsent_releases: dict[int, dict[tuple[RRID, int], int]] = {}
        self.freed: deque[Entry] = deque()
        self.deferred_jobs: deque[Callable[[], None]] = deque()
        self._flush_asked = False

    def __repr__(self) -> str:
        return f"<ReferenceCounts {self.refs!r}>"

    def count(
        self, refs: Iterable[tuple[RRID, int]], pid: int, interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Tell the owners of `refs` that `pid` is about to hold one more.

        Raises
        ------
        SendInterrupted
            Given up, and taken back where it was told; as with any other error.
        """
        told: list[Ref] = []
        by_owner: dict[int, list[Ref]] = {}
        for ref in refs:
            by_owner.setdefault(ref[1], []).append(ref)
        for owner, its in by_owner.items():
            changes = None
            try:
                changes = self._changes(its, pid, +1)
                self.tell_counts(owner, changes, interrupted)
                told += its
            except BaseException:
                if changes is not None:
                    told += its[: len(its) - len(changes)]  # what is told is no more among them
                self.unregister_for(told, pid)
                raise

    def unregister_for(self, refs: Iterable[tuple[RRID, int]], pid: int) -> None:
        """Take back what :meth:`count` has told. Never blocks, for the owner may stand still."""
        for rrid, owner in refs:
            changes = self._changes([(rrid, owner)], pid, -1)
            if owner == self.peers.pid:
                self.change_counts(changes)
                self.drop()
            elif owner not in self.peers.lost:
                with contextlib.suppress(LinkClosed, ShmdistError):
                    link = self.peers.way_to(owner)
                    if not link.post(codec.frame(_REFS, 0, 0, owner, codec.pickled(changes))):
                        firmly(self.reactor.flush, link)

    def _changes(self, refs: Iterable[tuple[RRID, int]], pid: int, delta: int) -> list[Change]:
        return [(*rrid, pid, delta, 0 if owner == self.peers.pid else self.peers.pid) for rrid, owner in refs]

    def tell_counts(
        self, owner: int, changes: list[Change], interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Send changes of counts to an owner, or make them when that is this process.

        What is told, or concerns nobody any more, is taken out of `changes`.
        """
        if owner == self.peers.pid:
            self.change_counts(changes)
            if self.freed:
                firmly(self.drop)
            return
        queued = False
        try:
            if owner not in self.peers.lost:
                link = self.peers.way_to(owner)
                parts = codec.frame(_REFS, 0, 0, owner, codec.pickled(changes))
                queued = not link.send(parts, interrupted, patience=STUCK_SECONDS)
        except SendInterrupted as stopped:
            if stopped.begun:
                del changes[:]
                firmly(self.reactor.flush, link)
            raise
        except (LinkClosed, ShmdistError):
            pass  # the owner is gone, and the counts with it
        del changes[:]
        if queued:
            firmly(self.reactor.flush, link)

    def change_counts(self, changes: list[Change]) -> None:
        """Change counts of references that live here; what nobody holds any more is :attr:`freed`.

        What has been changed is taken out of `changes`. After an error this may be called again.
        """
        with self.lock:
            while changes:
                whence, number, pid, delta, reporter = changes[0]
                self.freed += self.refs.add(RRID(whence, number), pid, delta, reporter)
                del changes[0]

    def drop(self) -> None:
        """Let go of values that nobody refers to any more; again after an error."""
        while self.freed:
            try:
                entry = self.freed.popleft()
            except IndexError:
                return  # another thread was faster
            waiters, entry.waiters = entry.waiters, []
            try:
                while waiters:
                    waiters[0].fail(ShmdistError(f"the last reference to {tuple(entry.rrid)} is gone"))
                    del waiters[0]
            except BaseException:
                entry.waiters = waiters
                self.freed.appendleft(entry)
                raise
            entry.value = None

    def arrived(self, frame: Frame) -> bool:
        """Note from whom the references in a frame came; on the reading thread.

        Returns
        -------
        bool
            False when its sender is lost here: their counts are taken off, so it must be dropped.
        """
        if type(frame.buffers[0]) is Arrived:
            return True  # it is noted
        refs = firmly(codec.references, frame)
        back = partial(self.released.extend, [(owner, rrid) for rrid, owner in refs])
        count = Ending(VOID)
        arrived = Arrived(refs, count, self.see_to_released)
        sender = frame.link.pid
        given = self._of_others(refs, sender)
        if given:
            with self.lock:
                if sender in self.peers.lost:
                    return False
                for rrid, owner in given:
                    firmly(self.receipts.note, owner, rrid, sender)
        count.__del__ = back
        frame.buffers[0] = arrived
        return True

    def _of_others(self, refs: Iterable[Ref], sender: int) -> list[Ref]:
        """Return those references whose owner, another one than the sender, lives."""
        return [ref for ref in refs if ref[1] != sender and ref[1] not in self.peers.lost]

    def give_back(self, refs: Iterable[tuple[RRID, int]]) -> None:
        """Give back references that came in a frame but were never made.  Takes no lock."""
        self.released += [(owner, rrid) for rrid, owner in refs]
        self.see_to_released()

    def see_to_released(self) -> None:
        """See to it that owners are told what was dropped here.  Runs in finalizers: takes no lock."""
        firmly(self._ask_for_housekeeping)

    def run_soon(self, job: Callable[[], None]) -> None:
        """Let a standby thread run `job` soon.  Runs in finalizers: takes no lock."""
        self.deferred_jobs.append(job)
        self._ask_for_housekeeping()

    def hand_over(self, job: Callable[[], object]) -> None:
        """Let another thread run `job`, user code that may wait.  Runs in finalizers: takes no lock."""

        def run() -> None:
            thread_state = current()
            depth, thread_state.runtime_depth = thread_state.runtime_depth, 0
            try:
                job()
            finally:
                thread_state.runtime_depth = depth

        self.run_soon(lambda: self.reactor.soon(run))

    def _ask_for_housekeeping(self) -> None:
        if self._flush_asked:
            return
        try:
            self._flush_asked = True
            self.reactor.poller.wake()
        except BaseException:  # an interrupt, which nothing puts off in a finalizer
            self._flush_asked = False  # the next one asks
            raise

    def flush_released(self) -> None:
        """Tell the owners which references were dropped here; what cannot be told now is owed still."""
        self._flush_asked = False  # first: what is dropped from here on is asked for anew
        with self.lock:
            while self.released:
                self._settle(*self.released[0])
                del self.released[0]
            owners = list(self.unsent_releases)
        for owner in owners:
            with self.lock:
                counts = self.unsent_releases.get(owner, {})
                changes = [
                    (*rrid, self.peers.pid, delta, reporter) for (rrid, reporter), delta in counts.items()
                ]
                if counts:
                    del self.unsent_releases[owner]
            try:
                self.tell_counts(owner, changes)
            finally:
                if changes:
                    self._owe_again(owner, changes)

    def _owe_again(self, owner: int, changes: list[Change]) -> None:
        """These could not be told."""
        with self.lock:
            counts = dict(self.unsent_releases.get(owner, {}))
            for whence, number, _, delta, reporter in changes:
                key = RRID(whence, number), reporter
                counts[key] = counts.get(key, 0) + delta
            self.unsent_releases[owner] = counts

    def _settle(self, owner: int, rrid: RRID) -> None:
        """Note that a count is owed; the lock is held."""
        counts = self.unsent_releases.setdefault(owner, {})
        reporter = self.receipts.spend(owner, rrid)
        try:
            counts[rrid, reporter] = counts.get((rrid, reporter), 0) - 1
        except BaseException:
            if reporter:
                self.receipts.note(owner, rrid, reporter)
            raise

    def housekeeping(self) -> None:
        """Do what was asked for by finalizers; on a standby thread."""
        try:
            deadline = time.monotonic() + _MAX_COLLECTION_SECONDS
            if self.released or self.deferred_jobs or collection_runs():
                time.sleep(_FLUSH_SECONDS)  # more of them come together
            while collection_runs() and time.monotonic() < deadline:
                time.sleep(_FLUSH_SECONDS)  # a finalizer asks before all that go with it are noted
            # Also when another thread was faster: who asked us must be able to ask again.
            self.flush_released()
            while True:
                try:
                    job = self.deferred_jobs.popleft()
                except IndexError:  # asked for and not looked at: two threads may be here
                    break
                try:
                    self.reactor.threads.guarded(job)
                except BaseException:
                    self.deferred_jobs.appendleft(job)
                    raise
        except BaseException:
            self._flush_asked = False
            firmly(self._ask_for_housekeeping)  # what is left is done then
            raise

    def lose(self, pid: int) -> None:
        """Take off the counts of a process that is gone."""
        with self.lock:
            self.freed += self.refs.peer_lost(pid)

    def create(self, rrid: RRID, kind: Any, client: int | None) -> Entry:
        """Enter a reference that lives here from now on."""
        with self.lock:
            return self.refs.create(rrid, kind, client)

    def has_value(self, rrid: RRID) -> bool:
        """Return whether a reference lives here and has its value."""
        with current(), self.lock:
            entry = self.refs.get(rrid)
            return entry is not None and entry.state is State.SET

    def set_value(self, entry: Entry, value: Any) -> None:
        """Give an entry its value, and tell who waits for it."""
        with self.lock:
            waiters = self.refs.set_value(entry, value)
        for waiter in waiters:
            firmly(self._tell, waiter, value)

    def _tell(self, waiter: Any, value: Any) -> None:
        if isinstance(value, CapturedException):
            waiter.fail(remote_exception(self.peers.pid, value))
        else:
            waiter.resolve(value)

    def store(self, key: tuple[int, int], value: Any, captured: CapturedException | None) -> None:
        """Keep the outcome of a call that a Future of its caller stands for."""
        with self.lock:
            entry = self.refs.get(RRID(*key))
        if entry is not None:  # else every reference to it is gone already
            self.set_value(entry, value if captured is None else captured)
