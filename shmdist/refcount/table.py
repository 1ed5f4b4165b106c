"""The owner's side of distributed references: which process holds what, and when the last holder is gone.

A reference names a value that lives on one process, its *owner*. The owner keeps one `Entry` for it
in its `RefTable`; every process that holds the reference is a *client* of that entry. This file is
pure: no I/O, no lock (the caller holds one around every call), and nothing is acted upon. An error leaves
the table as it was: what can fail is done before the first change. "The last
client is gone" is a list of entries returned, whose values the caller drops, and whose waiters it
fails, after it has let go of its lock.

The protocol
------------
Three words travel to the owner, on the one ordered link that each process has to it:

NEW
    The creator's call, which counts the creator as the first client (`RefTable.create`). A process
    writes NEW before it gives the reference to anybody.
ADD(q)
    "q is about to be sent this reference" (`add(rrid, q, +1)`). Who forwards a reference to q writes
    ADD(q) to the owner *before* the frame that carries the reference to q, and so before any later
    DEL of its own on the same link. Written means handed to the operating system, not to a buffer of
    ours. Each forwarding counts, also when q has the reference already, and when it ignores it.
DEL
    "I dropped one" (`add(rrid, sender, -1)`), once for every NEW or ADD that named the sender.

Links are ordered but do not wait for each other, so DEL(q) from q may overtake ADD(q) from p. Counts
are therefore kept per process, add up, and may be below zero for a while.

**An entry lives while it is pinned or any of its counts is above zero.** It is pinned until its NEW
has come: a third process may use, forward and drop the reference before the owner hears of its
creation, and until then the counts do not tell the whole story. For the same reason a DEL for an
unknown entry makes one, with the count -1: forgetting it would leave the later ADD for ever.

Why no entry is freed too early. Call each copy of a reference that was created or sent an instance;
the creator's is the root, every other has as parent the instance it was forwarded from. An instance
is *added* once its NEW or ADD has arrived, *dropped* once its DEL has. Let the root be added.

1. A child of a dropped instance is added: its ADD went before that DEL on one link.
2. If some instance is not dropped, then some instance is added and not dropped: go from the root
   towards it, and take the first not dropped, which is added by 1.
3. Its process p may still have no count above zero, because of an instance y there that is dropped
   and not added. Go up from y: by 1 each ancestor is undropped, until one, w, is added. Its child v
   on that way is not added, and v's ADD was written before y reached p. If w were at p, that ADD
   would have arrived before y's DEL; so w is at another process q, and is added and not dropped. Now q
   has a count above zero, or again a y' dropped and not added. DEL of y' has arrived and ADD of v,
   from the same process, has not: so DEL of y' was written before ADD of v, which was before DEL of y.
4. Step 3 leads to ever earlier DELs. There are finitely many, so it ends at a count above zero.

And why none is kept too long: when every instance is dropped, each is added by 1, all counts are
zero, and nothing about the entry is on its way, so that it does not come back either.

Death
-----
`peer_lost(p)` is told once, after everything p wrote to this process has been read (EOF on its link).
All counts of p go, the reference in flight to p with them, and whatever is said about p later is
ignored; process ids are never used again, so that this stays right. What p forwarded before it died
stays counted for the receiver, because its ADDs came before the EOF. If p was the creator (`whence`)
and its NEW has not come, it never will: the pin is undone.

A forwarder killed between its ADD(q) and the frame to q leaves a reference counted for q that q does
not have. Several threads of it may be there, waiting for their turn to write to q. So ADD and DEL name
their reporter, and what a lost one told is audited: q says what it has from it (``runtime.count_audit``), and
the count of q follows (`RefTable.audited`).

Not guaranteed: when a host goes silent and bytes are lost on its links, counts may be wrong in either
direction; entries above zero then end with the process counted, entries below with the creator.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from shmdist.errors import ShmdistError

__all__ = ["RRID", "AlreadySet", "Entry", "Freed", "Kind", "RefTable", "State"]

Kind: TypeAlias = Literal["future", "channel"]
_Key = TypeVar("_Key")


class RRID(NamedTuple):
    """The name of a reference, the same on every process.

    Parameters
    ----------
    whence : int
        Id of the process that created the reference (not that of its owner).
    id : int
        A number that process uses once.

    Examples
    --------
    >>> RRID(1, 7)
    RRID(whence=1, id=7)
    """

    whence: int
    id: int


RRID.__module__ = "shmdist"


class AlreadySet(ShmdistError):
    """A value was put into a Future that has one.

    Parameters
    ----------
    rrid : RRID
        The Future's name.
    """

    def __init__(self, rrid: RRID) -> None:
        super().__init__(
            f"Future {tuple(rrid)} already has a value: a Future is written once. "
            "To send several values use a RemoteChannel."
        )
        self.rrid = rrid


class State(Enum):
    """What an entry's value is."""

    UNSET = "unset"
    SET = "set"
    FREED = "freed"


class _Event(Enum):
    SET = "set"
    FREE = "free"


# The whole life of an entry. A move that is not here is illegal.
_MOVES: Mapping[State, Mapping[_Event, State]] = MappingProxyType(
    {
        State.UNSET: {_Event.SET: State.SET, _Event.FREE: State.FREED},
        State.SET: {_Event.FREE: State.FREED},
        # A call may end after everybody lost interest in its result, which is then nobody's.
        State.FREED: {_Event.SET: State.FREED},
    }
)


class Entry:
    """What the owner knows of one reference. Made by `RefTable` alone."""

    __slots__ = ("counts", "created", "kind", "pinned", "rrid", "state", "told", "value", "waiters")

    rrid: RRID
    #: What the reference is; None while it is known only from a use that came before its creation.
    kind: Kind | None
    #: Never FREED while in the table.
    state: State
    #: The value, captured error or channel; None unless SET. Freeing leaves it, to be dropped unlocked.
    value: Any
    #: Process id -> references held there. No zeros, no dead process; below zero while an ADD is late.
    counts: dict[int, int]
    #: (Process id, reporter) -> its share of that count. No zeros, no dead process, nothing audited.
    told: dict[tuple[int, int], int]
    #: The threads that wait for the value; empty once SET. Freeing leaves them, to be failed unlocked.
    waiters: list[Any]
    #: NEW has come.
    created: bool
    #: The counts do not tell yet: NEW has not come and still can, or it has and nobody held it so far.
    pinned: bool

    def __init__(self, rrid: RRID, kind: Kind | None = None) -> None:
        self.rrid = rrid
        self.kind = kind
        self.state = State.UNSET
        self.value = None
        self.counts = {}
        self.told = {}
        self.waiters = []
        self.created = False
        self.pinned = True

    def _move(self, event: _Event) -> State:
        """Make the move that `event` is, and return the state before it."""
        before = self.state
        after = _MOVES[before].get(event)
        if after is None:
            raise RuntimeError(f"reference {tuple(self.rrid)}: {event.value} is illegal when {before.value}")
        self.state = after
        return before

    def __repr__(self) -> str:
        pinned = " pinned" if self.pinned else ""
        return (
            f"<Entry {tuple(self.rrid)} {self.kind or 'unknown'} {self.state.value}{pinned} "
            f"counts={self.counts} waiters={len(self.waiters)}>"
        )


#: An entry no longer in the table: drop its value and fail its waiters, outside the lock.
Freed: TypeAlias = Entry
#: An entry, and its new counts, what is told of them, and whether it is pinned.
_Change: TypeAlias = tuple[Entry, dict[int, int], dict[tuple[int, int], int], bool]


class RefTable:
    """All references this process owns.

    Not thread-safe: the caller holds one lock around each call, and keeps user code (finalizers of
    dropped values among it) out of it by dropping what a call returned after the lock is let go.

    Attributes
    ----------
    entries : dict of RRID to Entry
        Every key is its entry's `rrid`, and every entry is pinned or has a count above zero.
    dead : set of int
        Processes known lost. They appear in no entry's counts.
    closed : set of (int, int)
        Processes and their reporters whose audit is over: none of these appears in any entry's `told`.

    Examples
    --------
    Process 1 creates a reference here, forwards it to 3 and drops its own. The word of 3 that it
    dropped it too overtakes both:

    >>> table = RefTable()
    >>> entry = table.create(RRID(1, 7), "future", client=1)
    >>> table.add(RRID(1, 7), 3, -1)
    []
    >>> table.add(RRID(1, 7), 3, +1)
    []
    >>> table.set_value(entry, "a result")
    []
    >>> table.add(RRID(1, 7), 1, -1)
    [<Entry (1, 7) future freed counts={} waiters=0>]
    >>> table
    <RefTable 0 entries, 0 pinned, 0 dead processes>
    """

    __slots__ = ("closed", "dead", "entries")

    def __init__(self) -> None:
        self.entries: dict[RRID, Entry] = {}
        self.dead: set[int] = set()
        self.closed: set[tuple[int, int]] = set()

    def create(self, rrid: RRID, kind: Kind, client: int | None) -> Entry:
        """NEW: the reference exists, and `client` holds one.

        Parameters
        ----------
        rrid : RRID
            Its name.
        kind : {"future", "channel"}
            What it is.
        client : int or None
            The process that created it. None when nobody holds it yet and the owner itself will hand
            it out: the first ADD, before which nothing else can come, then stands for the creator's.

        Returns
        -------
        Entry
            The one that a use, an ADD or a DEL made before, if any. If the client is lost already and
            nobody else was heard of, the entry is FREED and in no table: a value set is dropped.

        Raises
        ------
        ValueError
            It was created before, or used as another kind. The table is unchanged.
        """
        entry = self.entries.get(rrid)
        if entry is None:
            entry = Entry(rrid, kind)
            if client in self.dead:
                entry._move(_Event.FREE)
                entry.pinned = False
                entry.created = True
                return entry
        elif entry.created:
            raise ValueError(f"reference {tuple(rrid)} is created twice: {entry!r}")
        elif entry.kind not in (None, kind):
            raise ValueError(f"reference {tuple(rrid)} is created as a {kind}, but used before: {entry!r}")
        counts = entry.counts
        if client is not None and client not in self.dead:
            counts = dict(counts)
            self._count(counts, client, +1)
        # The creator's own DELs come after NEW on its link, so its count is above zero now.
        pinned = not any(count > 0 for count in counts.values())
        self.entries[rrid] = entry  # the first change, and the last one that can fail
        entry.counts, entry.kind, entry.pinned, entry.created = counts, kind, pinned, True
        return entry

    def lookup(self, rrid: RRID) -> Entry:
        """Return the entry for `rrid`; made on demand, pinned, if the use came before the creation."""
        entry = self.entries.get(rrid)
        if entry is None:
            entry = self.entries[rrid] = Entry(rrid)
        return entry

    def get(self, rrid: RRID) -> Entry | None:
        """Return the entry for `rrid`, or None."""
        return self.entries.get(rrid)

    def add(self, rrid: RRID, pid: int, delta: int, reporter: int = 0) -> list[Freed]:
        """ADD (`delta` above zero) or DEL (below) of references that process `pid` holds.

        A `reporter` other than 0, nobody, told of them, or is named by who gives them back.

        Several words about one process may be summed up in one `delta`, as long as no ADD is moved
        behind the frame it announces.

        Returns
        -------
        list of Entry
            The entry, now out of the table and FREED, if this was its last reference; else empty.
        """
        if pid in self.dead or (reporter and (pid, reporter) in self.closed):
            return []
        entry = self.entries.get(rrid)
        if entry is None:
            # Its creation can never come, so there is nothing to keep the count for. The creator's own DEL is
            # preceded by its NEW, unless that was never written.
            if delta < 0 and (rrid.whence in self.dead or rrid.whence == pid):
                return []
            entry = Entry(rrid)
        counts, told = dict(entry.counts), entry.told
        self._count(counts, pid, delta)
        if reporter:
            told = dict(told)
            self._count(told, (pid, reporter), delta)
        pinned = entry.pinned and not ((entry.created and delta > 0) or rrid.whence in self.dead)
        freed = [] if pinned or max(counts.values(), default=0) > 0 else [entry]
        self.entries[rrid] = entry  # the first change, and the last one that can fail
        entry.counts, entry.told, entry.pinned = counts, told, pinned
        if freed:
            del self.entries[rrid]
            entry.state = State.FREED  # which may follow any state that an entry has in the table
        return freed

    def peer_lost(self, pid: int) -> list[Freed]:
        """Process `pid` is gone, and all it wrote to this process has been read.

        Returns
        -------
        list of Entry
            What nobody else holds, now out of the table and FREED: entries whose last references
            were there, and those made on demand whose creation was to come from there.
        """
        dead = self.dead | {pid}
        closed = {pair for pair in self.closed if pair[0] != pid}
        changes: list[_Change] = []
        for entry in self.entries.values():
            pinned = entry.pinned and entry.rrid.whence not in dead
            if pid in entry.counts or entry.told or pinned is not entry.pinned:
                counts = {each: count for each, count in entry.counts.items() if each != pid}
                told = {pair: count for pair, count in entry.told.items() if pair[0] != pid}
                changes.append((entry, counts, told, pinned))
        freed = self._over(changes)
        self.dead, self.closed = dead, closed  # the first change; none of them can fail
        self._apply(changes, freed)
        return freed

    def holders_reported_by(self, reporter: int) -> set[int]:
        """Return of whom a process told something that was not given back."""
        return {pair[0] for entry in self.entries.values() for pair in entry.told if pair[1] == reporter}

    def audited(self, pid: int, reporter: int, receipts: Mapping[RRID, int]) -> list[Freed]:
        """Process `pid` says what it has from a lost `reporter`: what that told of it becomes that.

        Returns
        -------
        list of Entry
            What nobody holds by that, now out of the table and FREED.
        """
        if pid in self.dead or (pid, reporter) in self.closed:
            return []
        closed = self.closed | {(pid, reporter)}
        changes: list[_Change] = []
        for entry in self.entries.values():
            was_told = entry.told.get((pid, reporter), 0)
            delta = receipts.get(entry.rrid, 0) - was_told
            if delta or was_told:
                counts = dict(entry.counts)
                self._count(counts, pid, delta)
                told = {pair: count for pair, count in entry.told.items() if pair != (pid, reporter)}
                changes.append((entry, counts, told, entry.pinned))
        freed = self._over(changes)
        self.closed = closed  # the first change; none of them can fail
        self._apply(changes, freed)
        return freed

    @staticmethod
    def _over(changes: list[_Change]) -> list[Entry]:
        """Return the entries that these changes end."""
        return [
            entry
            for entry, counts, _, pinned in changes
            if not pinned and max(counts.values(), default=0) <= 0
        ]

    def _apply(self, changes: list[_Change], freed: list[Entry]) -> None:
        """Make changes that were worked out before; no step of it can fail."""
        for entry, counts, told, pinned in changes:
            entry.counts, entry.told, entry.pinned = counts, told, pinned
        for entry in freed:
            del self.entries[entry.rrid]
            entry.state = State.FREED  # which may follow any state that an entry has in the table

    def set_value(self, entry: Entry, value: Any) -> list[Any]:
        """Give `entry` its value (a value, a captured error, a channel), once.

        Returns
        -------
        list
            The waiters, to be told outside the lock. Empty for a FREED entry, which keeps no value.

        Raises
        ------
        AlreadySet
            It has one, which stays.
        """
        if entry.state is State.SET:
            raise AlreadySet(entry.rrid)
        if entry._move(_Event.SET) is State.FREED:
            return []
        entry.value = value
        waiters, entry.waiters = entry.waiters, []
        return waiters

    @staticmethod
    def _count(counts: dict[_Key, int], key: _Key, delta: int) -> None:
        total = counts.get(key, 0) + delta
        if total:
            counts[key] = total
        else:
            counts.pop(key, None)

    @staticmethod
    def _is_held(entry: Entry) -> bool:
        return any(count > 0 for count in entry.counts.values())

    def _check(self) -> None:
        """Assert the invariants, in the words that stand at the fields."""
        for rrid, entry in self.entries.items():
            assert rrid == entry.rrid, f"every key is its entry's rrid: {rrid} {entry}"
            above = self._is_held(entry)
            assert entry.pinned or above, f"every entry is pinned or has a count above zero: {entry}"
            assert entry.state is not State.FREED, f"never FREED while in the table: {entry}"
            assert entry.value is None or entry.state is State.SET, f"value is None unless SET: {entry}"
            assert not entry.waiters or entry.state is State.UNSET, f"waiters is empty once SET: {entry}"
            assert 0 not in entry.counts.values(), f"no zeros in counts: {entry}"
            assert self.dead.isdisjoint(entry.counts), f"no dead process in counts: {entry}"
            assert 0 not in entry.told.values(), f"no zeros in told: {entry}"
            assert self.dead.isdisjoint({pid for pid, _ in entry.told}), f"no dead process in told: {entry}"
            assert self.closed.isdisjoint(entry.told), f"nothing audited in told: {entry}"
            assert entry.kind is not None or not entry.created, f"kind is known once created: {entry}"
            assert not (entry.pinned and entry.created and above), f"pinned, but somebody held it: {entry}"

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        pinned = sum(entry.pinned for entry in self.entries.values())
        return f"<RefTable {len(self.entries)} entries, {pinned} pinned, {len(self.dead)} dead processes>"
