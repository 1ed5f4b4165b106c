"""Leases: the blocks, own and others', that arrays of this process lie in. The holder's side of the arena.

A *lease* is one count that this process has for a block; a *hold* is the object that stands
for it. Every array made over the block has the hold as its base, however many views, reshapes
and buffers lie between, so the hold ends with the last of them. Its end, which may come
in any thread, inside any lock, appends the lease to a queue (``Ending``), no more. Whoever next has the
lock takes the queue apart (:meth:`LeaseTable.drain`): only then is a mapping taken down, and the
count given back.

Three kinds of lease
--------------------
- ``OWN``: the block is this process's alone, to read and write. A value that arrived.
- ``PRIVATE``: others read the same block. This process sees it through a mapping of its own,
  which keeps to itself what is written.
- ``SHARED``: an array that was made to be shared: all see what anybody writes.

A value that goes home
----------------------
The result of a call may be an argument of it, or a view of one. Its block belongs to the
caller, and need not be copied when nothing else here looks into it any more. That is known
only when the call's arguments are gone. So the lease is *moving* from when the result was
pickled: a hold that ends meanwhile gives nothing back, it only leaves the lease ``dead``; and
a dead one is free to go.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

from shmdist._ending import Ending
from shmdist.memory.private_mappings import PrivateView
from shmdist.memory.segment import Segment

OWN, PRIVATE, SHARED = 0, 1, 2


class Lease:
    """One count of a block; see the module's docstring.

    Attributes
    ----------
    segment : Segment
        Where the block lies; kept mapped by this.
    serial : int
        The block's number with its owner.
    offset, nbytes : int
        The part of the segment that this lease is about; bytes.
    mode : int
        OWN, PRIVATE or SHARED.
    start : int
        Address in this process, once an array was made over it.
    moving, dead : bool
        See the module's docstring.
    pins : int
        Forked children that still see it: until they are gone it is not given back.
    """

    __slots__ = (
        "apart",
        "dead",
        "mode",
        "moving",
        "nbytes",
        "offset",
        "pins",
        "private",
        "segment",
        "serial",
        "start",
    )

    def __init__(self, segment: Segment, serial: int, offset: int, nbytes: int, mode: int) -> None:
        self.segment = segment
        self.serial = serial
        self.offset = offset
        self.nbytes = nbytes
        self.mode = mode
        self.start = 0
        self.private: PrivateView | None = None
        self.moving = self.dead = False
        self.apart = False  # its place in the segment is mapped for this process alone, since a fork
        self.pins = 0

    def __repr__(self) -> str:
        mode = ("own", "private", "shared")[self.mode]
        state = " moving" * self.moving + " dead" * self.dead + f" pinned {self.pins}" * bool(self.pins)
        return (
            f"<Lease {mode} block {self.serial} of process {self.segment.owner}, {self.nbytes} bytes{state}>"
        )

    def view(self) -> memoryview:
        """Return the bytes, unaware of what a private mapping has changed."""
        return self.segment.view[self.offset : self.offset + self.nbytes]


class LeaseHandle:
    """Stands for a lease; the base of every array over it."""

    __slots__ = ("__weakref__", "_ending", "_holds", "lease")

    def __init__(self, holds: LeaseTable, lease: Lease) -> None:
        self._holds = holds
        self.lease = lease
        self._ending: Ending | None = Ending(partial(holds.ended.append, lease))

    def __repr__(self) -> str:
        return f"<LeaseHandle {self.lease!r}>"

    def __del__(self) -> None:
        # No name of the module: at the end of the program they are gone before the last arrays.
        for _ in (1, 2):
            try:
                self._ending = None
                if self._holds.idle:
                    self._holds.wake()
                return
            except KeyboardInterrupt:
                again = self._holds.thread_state().again()  # noqa: F841 - raised when this frame ends
            except Exception:
                pass  # no memory; or made by halves, or the program is at its end

    def __reduce__(self) -> Any:
        raise TypeError("a hold of shared memory belongs to its process")

    def __len__(self) -> int:
        return self.lease.nbytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """How numpy sees it: as bytes that may be written."""
        lease = self.lease
        return {"version": 3, "shape": (lease.nbytes,), "typestr": "|u1", "data": (lease.start, False)}

    def array(self) -> Any:
        """Return the memory as a numpy array of bytes, whose base is this.

        Where the system refuses a private mapping, it is a copy.
        """
        import numpy

        lease = self.lease
        if not lease.start:
            thread_state = self._holds.thread_state()
            thread_state.enter()  # an interrupt must not come between the mapping and the tables
            try:
                if lease.mode == PRIVATE:
                    private = lease.private = lease.segment.private(lease.offset, lease.nbytes)
                    lease.start = private.address + lease.offset - private.start
                else:
                    lease.start = lease.segment.address + lease.offset
                self._holds.enter(lease)
            except OSError:
                return numpy.frombuffer(bytearray(lease.view()), "B")
            finally:
                thread_state.leave()
        return numpy.asarray(self)


class _Unshielded:
    """Puts nothing off."""

    def enter(self) -> None:
        """Do nothing."""

    def leave(self) -> None:
        """Do nothing."""

    def again(self) -> None:
        """Do nothing."""


class LeaseTable:
    """The leases of one process, and the segments they lie in.

    Parameters
    ----------
    lock : lock
        Guards all but `ended`; the arena's as well. Nothing that can take long, and no user's
        code, runs while it is held.
    wake : callable
        Called by finalizers when :attr:`idle`: sees to it that :meth:`drain` is called soon.
    thread state : callable
        Returns what puts interrupts of the calling thread off, between ``enter`` and ``leave``.
    """

    def __init__(
        self, lock: Any, wake: Callable[[], None], thread_state: Callable[[], Any] | None = None
    ) -> None:
        self._lock = lock
        self.wake = wake
        self.thread_state = thread_state or _Unshielded
        self.idle = True  # nobody is going to look at `ended` by himself
        self.segments: dict[tuple[int, int], Segment] = {}  # by owner and number
        #: Segments whose owner is gone: they live as long as the leases in them.
        self.orphans: WeakValueDictionary[tuple[int, int], Segment] = WeakValueDictionary()
        self.ended: deque[Lease] = deque()  # leases whose holds are gone; finalizers append
        self._starts: list[tuple[int, int]] = []  # address and id of the leases with arrays, sorted
        self._by_id: dict[int, Lease] = {}
        self.shared = 0  # how many of them are SHARED
        self.dead: list[Lease] = []  # ended, but pinned by a forked child
        self.over: list[Lease] = []  # ended, whose counts are to be given back

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self._by_id)} in {len(self.segments)} segments, {len(self.ended)} ended>"

    def __len__(self) -> int:
        return len(self._by_id)

    def segment(self, owner: int, number: int) -> Segment:
        """Return a segment.

        Raises
        ------
        LookupError
            It is not mapped here.
        """
        segment = self.segments.get((owner, number))
        return self.orphans[owner, number] if segment is None else segment

    def leases(self) -> list[Lease]:
        """Return the leases with arrays."""
        return list(self._by_id.values())

    def enter(self, lease: Lease) -> None:
        """Let a lease be found by address from now on."""
        with self._lock:
            self._by_id[id(lease)] = lease
            try:
                insort(self._starts, (lease.start, id(lease)))
            except BaseException:
                del self._by_id[id(lease)]
                raise
            self.shared += lease.mode == SHARED

    def find(self, address: int, nbytes: int) -> Lease | None:
        """Return the lease in whose memory all of `nbytes` bytes at `address` lie.

        Several leases of one block have the same part of it, so any will do.
        """
        thread_state = self.thread_state()
        thread_state.enter()  # a finalizer that came to this lock once more would wait for itself
        try:
            with self._lock:
                index = bisect_right(self._starts, (address, sys.maxsize)) - 1
                if index < 0:
                    return None
                lease = self._by_id[self._starts[index][1]]
        finally:
            thread_state.leave()
        return lease if address + nbytes <= lease.start + lease.nbytes else None

    def drain(self) -> list[Lease]:
        """Take the ended leases apart; returns those whose counts are to be given back: the table of them.

        The lock is held. A lease leaves a table when it is in the next one: an error on the way, and it
        is taken apart again. Who gives a count back takes the lease out.
        """
        ended, over = self.ended, self.over
        while ended:
            lease = ended[0]
            lease.dead = True
            key = id(lease)
            if key in self._by_id:
                index = bisect_left(self._starts, (lease.start, key))
                del self._starts[index], self._by_id[key]
                self.shared -= lease.mode == SHARED
            if self._come_together(lease):
                if lease.private is not None:
                    lease.segment.spares.rest(lease.private)
                    lease.private = None
                if lease.pins:
                    self.dead.append(lease)
                elif not lease.moving:
                    over.append(lease)
            del ended[0]
        return over

    @staticmethod
    def _come_together(lease: Lease) -> bool:
        """Let a lease's place in its segment be the segment's again; False when that cannot be."""
        if not lease.apart:
            return True
        try:
            lease.segment.part(lease.offset, lease.nbytes, shared=True)
        except OSError:
            return False  # not given back: what others put there could not be seen here
        return True

    def _check(self) -> None:
        """Assert what must hold whenever the lock is free."""
        assert self._starts == sorted((lease.start, id(lease)) for lease in self._by_id.values())
        assert self.shared == sum(lease.mode == SHARED for lease in self._by_id.values())
        spans = sorted(
            {(lease.start, lease.start + lease.nbytes) for lease in self._by_id.values() if lease.nbytes}
        )
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start, "two leases overlap"
