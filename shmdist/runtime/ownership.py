"""A node's part in references: those that live here, and the counts of those that are held here.

Counts travel as messages of their own.  The protocol is written down in ``reftable``.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from shmdist.errors import CapturedException, ShmdistError, remote_exception
from shmdist.memory.receipts import Receipts
from shmdist.runtime.reftable import RRID, Entry, RefTable, State
from shmdist.wire import codec
from shmdist.wire.link import Link, LinkClosed, SendInterrupted
from shmdist.wire.messages import Frame, Kind

if TYPE_CHECKING:
    from shmdist.runtime.dispatch import Dispatcher

_REFS = int(Kind.REFS)
_FLUSH_DELAY = 0.005  # seconds that dropped references are gathered before they are told

#: A change of a count: whence and number of the reference, the process, by how much, and who told.
Change = tuple[int, int, int, int, int]


class Ownership:
    """The reference side of a node; see there for the attributes."""

    pid: int
    lock: Any
    refs: RefTable
    receipts: Receipts
    graves: dict[int, BaseException]
    dispatcher: Dispatcher
    released: deque[tuple[int, RRID]]
    errands: deque[Callable[[], None]]
    _flush_asked: bool

    def link_to(self, pid: int) -> Link:
        """Return the link to a process; the node knows how."""
        raise NotImplementedError  # a Node has it

    def way_to(self, pid: int) -> Link:
        """Return the link by which a process is told of counts; errors as those of :meth:`link_to`."""
        try:
            return self.link_to(pid)
        except ConnectionError:
            # This topology has no way there; process 1 has. It is the same way each time, so
            # the order of what is told is kept.
            return self.link_to(1)

    def count(
        self, refs: Iterable[tuple[RRID, int]], pid: int, interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Tell the owners of `refs` that `pid` is about to hold one more.

        Raises
        ------
        SendInterrupted
            Given up, and taken back where it was told.
        """
        told: list[tuple[RRID, int]] = []
        by_owner: dict[int, list[tuple[RRID, int]]] = {}
        for ref in refs:
            by_owner.setdefault(ref[1], []).append(ref)
        for owner, its in by_owner.items():
            try:
                self.tell_counts(owner, self._changes(its, pid, +1), interrupted)
            except SendInterrupted as stopped:
                self.uncount(told + its if stopped.begun else told, pid)
                raise
            told += its

    def uncount(self, refs: Iterable[tuple[RRID, int]], pid: int) -> None:
        """Take back what :meth:`count` has told. Never blocks, for the owner may stand still."""
        for rrid, owner in refs:
            changes = self._changes([(rrid, owner)], pid, -1)
            if owner == self.pid:
                self.drop(self.change_counts(changes))
            elif owner not in self.graves:
                with contextlib.suppress(LinkClosed, ShmdistError):
                    link = self.way_to(owner)
                    if not link.post(codec.frame(_REFS, 0, 0, owner, codec.pickled(changes))):
                        self.flush(link)

    def _changes(self, refs: Iterable[tuple[RRID, int]], pid: int, delta: int) -> list[Change]:
        return [(*rrid, pid, delta, 0 if owner == self.pid else self.pid) for rrid, owner in refs]

    def flush(self, link: Link) -> None:
        """Have what was posted written by a thread that may wait."""
        self.dispatcher.start(lambda: (link.flush(block=True), None)[1])

    def tell_counts(
        self, owner: int, changes: list[Change], interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Send changes of counts to an owner, or make them when that is this process."""
        if owner == self.pid:
            self.drop(self.change_counts(changes))
            return
        if owner in self.graves:
            return
        payload = codec.pickled(changes)
        try:
            link = self.way_to(owner)
            try:
                link.send(codec.frame(_REFS, 0, 0, owner, payload), interrupted)
            except SendInterrupted as stopped:
                if stopped.begun:
                    self.flush(link)
                raise
        except (LinkClosed, ShmdistError):
            pass  # the owner is gone, and the counts with it

    def change_counts(self, changes: Iterable[Change]) -> list[Entry]:
        """Change counts of references that live here; returns those that nobody holds any more."""
        freed: list[Entry] = []
        with self.lock:
            for whence, number, pid, delta, teller in changes:
                freed += self.refs.add(RRID(whence, number), pid, delta, teller)
        return freed

    def drop(self, freed: list[Entry]) -> None:
        """Let go of values that nobody refers to any more."""
        for entry in freed:
            waiters, entry.waiters = entry.waiters, []
            for waiter in waiters:
                waiter.fail(ShmdistError(f"the last reference to {tuple(entry.rrid)} is gone"))
            entry.value = None

    def arrived(self, frame: Frame) -> bool:
        """Note from whom the references in a frame came; on the reading thread.

        Returns
        -------
        bool
            False when its sender is lost here: their counts are taken off, so it must be dropped.
        """
        refs = codec.references(frame)
        frame.buffers[0] = refs
        sender = frame.link.pid
        given = [(rrid, owner) for rrid, owner in refs if owner != sender and owner not in self.graves]
        if given:
            with self.lock:
                if sender in self.graves:
                    return False
                for rrid, owner in given:
                    self.receipts.note(owner, rrid, sender)
        return True

    def give_back(self, refs: Iterable[tuple[RRID, int]]) -> None:
        """Give back references that came in a frame but were never made."""
        for rrid, owner in refs:
            self.release(owner, rrid)

    def release(self, owner: int, rrid: RRID) -> None:
        """Note that one reference was dropped here.  Runs in finalizers: takes no lock."""
        self.released.append((owner, rrid))
        self._ask_for_housekeeping()

    def errand(self, job: Callable[[], None]) -> None:
        """Let a standby thread run `job` soon.  Runs in finalizers: takes no lock."""
        self.errands.append(job)
        self._ask_for_housekeeping()

    def _ask_for_housekeeping(self) -> None:
        if self._flush_asked:
            return
        try:
            self._flush_asked = True
            self.dispatcher.poller.wake()
        except BaseException:  # an interrupt, which nothing puts off in a finalizer
            self._flush_asked = False  # the next one asks
            raise

    def flush_released(self) -> None:
        """Tell the owners which references were dropped here."""
        self._flush_asked = False  # first: what is dropped from here on is asked for anew
        by_owner: dict[int, dict[tuple[RRID, int], int]] = {}
        with self.lock:
            while self.released:
                owner, rrid = self.released.popleft()
                counts = by_owner.setdefault(owner, {})
                key = rrid, self.receipts.spend(owner, rrid)
                counts[key] = counts.get(key, 0) - 1
        for owner, counts in by_owner.items():
            changes = [(*rrid, self.pid, delta, teller) for (rrid, teller), delta in counts.items()]
            self.tell_counts(owner, changes)

    def housekeeping(self) -> None:
        """Do what was asked for by finalizers; on a standby thread."""
        if self.released or self.errands:
            threading.Event().wait(_FLUSH_DELAY)  # more of them come together
        # Also when another thread was faster: who asked us must be able to ask again.
        self.flush_released()
        while self.errands:
            self.errands.popleft()()

    def create(self, rrid: RRID, kind: Any, client: int | None) -> Entry:
        """Enter a reference that lives here from now on."""
        with self.lock:
            return self.refs.create(rrid, kind, client)

    def has_value(self, rrid: RRID) -> bool:
        """Tell whether a reference lives here and has its value."""
        with self.lock:
            entry = self.refs.get(rrid)
            return entry is not None and entry.state is State.SET

    def set_value(self, entry: Entry, value: Any) -> None:
        """Give an entry its value, and tell who waits for it."""
        with self.lock:
            waiters = self.refs.set_value(entry, value)
        for waiter in waiters:
            if isinstance(value, CapturedException):
                waiter.fail(remote_exception(self.pid, value))
            else:
                waiter.resolve(value)

    def store(self, key: tuple[int, int], value: Any, captured: CapturedException | None) -> None:
        """Keep the outcome of a call that a Future of its caller stands for."""
        with self.lock:
            entry = self.refs.get(RRID(*key))
        if entry is not None:  # else every reference to it is gone already
            self.set_value(entry, value if captured is None else captured)
