"""The block allocator of a process: segments, blocks, and who holds them. Accounting alone.

Nothing here touches memory. A caller takes the lock that guards its arena, asks, and acts on
the answer.

Life of a block
---------------
The segments of an arena are cut into extents that lie side by side::

    COLD  --warm-->  BUSY  --done-->  WARM  --take-->  LENT  --last count gone-->  WARM
      ^                                 |
      +---- done ---- BUSY <----cool----+

- WARM: free, its pages are there and mapped. Only these are taken.
- COLD: free, its pages were given back to the system.
- BUSY: free, and its pages are being fetched or given back, outside the lock.
- A block that is given back is kept aside as it is, *quick* to be taken again: traffic mostly
  repeats its sizes. When nothing else fits, such extents are joined with their neighbours.
- LENT: a *block*. It has a serial number, never used again, and a count for each process
  that may look into it.

Who counts up, who down
-----------------------
The process whose arena it is keeps all counts of a block (it *owns* the block).

- Taking a block gives its taker one count. Lending it to a process gives that one a count;
  so does word from a holder who passes it on, which he sends before the block itself.
- A process gives its count back with one message when its last view is gone.
- The message of a count given back may overtake the one that gave it, when they come from
  two processes. So counts may be negative for a while. A block is free when no count is
  positive: whoever passes on has a count of his own, told in order, until his word is here.
- A process that is lost has its counts dropped, and is never counted again. What it told of
  others is audited (``runtime.count_audit``): it may have been killed before it sent what it told of.

Whole or not at all
-------------------
An error may come at any call in here: there is no memory, or no stack. What is true stands in few places:
which segments there are, which blocks are lent, with their counts, and which extents are BUSY. Each is
changed in one step, after all that can fail has been worked out. Everything else follows from these:
where an error came between two steps, it is made anew before the arena is used again (`_rebuild`).
"""

from __future__ import annotations

import functools
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from typing import Concatenate, ParamSpec, TypeVar

_ASIDE = 64  # extents kept aside, at most


class State(Enum):
    """State of an extent; see the module's docstring."""

    COLD = "cold"
    BUSY = "busy"
    WARM = "warm"
    LENT = "lent"


#: Which state may follow which.
_NEXT = {
    State.COLD: {State.BUSY},
    State.BUSY: {State.WARM, State.COLD},
    State.WARM: {State.LENT, State.BUSY},
    State.LENT: {State.WARM},
}


_Key = TypeVar("_Key")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _changed(table: dict[_Key, int], key: _Key, delta: int) -> dict[_Key, int]:
    """Return a copy of a table of counts in which one is changed; there are no zeros in it."""
    total = table.get(key, 0) + delta
    result = {**table, key: total}
    if not total:
        del result[key]
    return result


def _is_held(counts: dict[int, int]) -> bool:
    return max(counts.values(), default=0) > 0


def _whole(method: Callable[Concatenate[Arena, _P], _T]) -> Callable[Concatenate[Arena, _P], _T]:
    """Let the tables be made anew where the last method that changed them did not come to its end."""

    @functools.wraps(method)
    def run(self: Arena, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if self._torn:
            self._rebuild()
        self._torn = True
        result = method(self, *args, **kwargs)
        self._torn = self._failed
        return result

    return run


class Extent:
    """A part of a segment.

    Attributes
    ----------
    segment, offset, size : int
        Where it lies; bytes.
    state : State
        See the module's docstring.
    serial : int
        Of a lent one: its number.
    counts : dict of int to int
        Of a lent one: count by process; no zeros.
    told : dict of tuple to int
        Of a lent one: what of that holders have from others than the owner, by holder and who told
        of it; no zeros.
    quick : bool
        Warm, and kept aside.
    """

    __slots__ = ("counts", "offset", "quick", "segment", "serial", "size", "state", "told")

    def __init__(self, segment: int, offset: int, size: int, state: State) -> None:
        self.segment = segment
        self.offset = offset
        self.size = size
        self.state = state
        self.serial = 0
        self.counts: dict[int, int] = {}
        self.told: dict[tuple[int, int], int] = {}
        self.quick = False

    def __repr__(self) -> str:
        held = f" {self.serial} {self.counts}" if self.state is State.LENT else ""
        return f"<Extent {self.segment}:{self.offset:#x}+{self.size:#x} {self.state.value}{held}>"

    def move(self, state: State) -> None:
        """Change the state.

        Raises
        ------
        RuntimeError
            It cannot follow the present one.
        """
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state.value}")
        self.state = state


class Arena:
    """The segments of one process, and what is lent of them.

    Parameters
    ----------
    grain : int
        Blocks begin at multiples of this and have multiples of it as size; bytes.
    """

    def __init__(self, grain: int) -> None:
        self.grain = grain
        self.total = 0  # bytes in all segments
        self.lent = 0  # bytes in lent blocks
        self.cold = 0  # bytes in cold extents
        self.blocks: dict[int, Extent] = {}  # lent ones, by serial number
        self.gone: set[int] = set()  # processes that are lost
        self.closed: set[tuple[int, int]] = set()  # holders and reporters whose audit is over
        self._serial = 0
        self._sizes: dict[int, int] = {}  # of segments
        self._starts: dict[tuple[int, int], Extent] = {}  # by segment and offset
        self._ends: dict[tuple[int, int], Extent] = {}  # by segment and the offset after it
        self._free: dict[State, list[tuple[int, int, int]]] = {State.WARM: [], State.COLD: []}
        self._quick: dict[int, list[Extent]] = {}  # warm extents kept aside, by size
        self._aside = 0  # how many
        self._busy: dict[int, Extent] = {}  # by identity
        self._torn = False  # a method that changes the tables runs, or did not come to its end
        self._failed = False  # it did, but what follows from its change must be made anew

    def __repr__(self) -> str:
        return (
            f"<Arena {len(self._sizes)} segments, {self.total >> 10} KiB, lent {self.lent >> 10} KiB "
            f"in {len(self.blocks)} blocks, cold {self.cold >> 10} KiB>"
        )

    # ------------------------------------------------------------------ extents

    def _enter(self, extent: Extent) -> None:
        self._starts[extent.segment, extent.offset] = extent
        self._ends[extent.segment, extent.offset + extent.size] = extent
        if extent.state in self._free:
            insort(self._free[extent.state], (extent.size, extent.segment, extent.offset))
        if extent.state is State.COLD:
            self.cold += extent.size

    def _remove(self, extent: Extent) -> None:
        del self._starts[extent.segment, extent.offset]
        del self._ends[extent.segment, extent.offset + extent.size]
        if extent.state in self._free:
            free = self._free[extent.state]
            del free[bisect_left(free, (extent.size, extent.segment, extent.offset))]
        if extent.state is State.COLD:
            self.cold -= extent.size

    def _join(self, extent: Extent) -> None:
        """Enter a free extent, which is in no table, joined with its neighbours."""
        state = extent.state
        before = self._ends.get((extent.segment, extent.offset))
        if before is not None and before.state is state and not before.quick:
            self._remove(before)
            extent.offset, extent.size = before.offset, before.size + extent.size
        after = self._starts.get((extent.segment, extent.offset + extent.size))
        if after is not None and after.state is state and not after.quick:
            self._remove(after)
            extent.size += after.size
        self._enter(extent)

    def _gather(self) -> None:
        """Join the extents that were kept aside with their neighbours."""
        quick, self._quick, self._aside = self._quick, {}, 0
        for extents in quick.values():
            for extent in extents:
                del self._starts[extent.segment, extent.offset]
                del self._ends[extent.segment, extent.offset + extent.size]
                extent.quick = False
                self._join(extent)

    def _cut(self, extent: Extent, size: int, state: State) -> Extent:
        """Take the first `size` bytes of a free extent, in a new state."""
        self._remove(extent)
        if extent.size > size:
            rest = Extent(extent.segment, extent.offset + size, extent.size - size, extent.state)
            extent.size = size
            self._enter(rest)
        extent.move(state)
        self._enter(extent)
        return extent

    def _find(self, state: State, size: int, among: Container[int] | None) -> Extent | None:
        """Return the smallest free extent of at least `size` bytes, in the segments `among`."""
        free = self._free[state]
        for index in range(bisect_left(free, (size, -1, -1)), len(free)):
            _, segment, offset = free[index]
            if among is None or segment in among:
                return self._starts[segment, offset]
        return None

    def _round(self, nbytes: int) -> int:
        return max(1, -(-nbytes // self.grain)) * self.grain

    def _rebuild(self) -> None:
        """Make all that follows from segments, blocks and busy extents: the rest of the segments is free.

        It is COLD, though its pages may be there: then they are only reserved again.
        """
        for block in list(self.blocks.values()):
            block.counts = {pid: count for pid, count in block.counts.items() if pid not in self.gone}
            block.told = {pair: count for pair, count in block.told.items() if pair[0] not in self.gone}
            if not _is_held(block.counts):
                del self.blocks[block.serial]
        taken: dict[int, list[Extent]] = {segment: [] for segment in self._sizes}
        for extent in (*self.blocks.values(), *self._busy.values()):
            taken[extent.segment].append(extent)
        extents: list[Extent] = []
        for segment, size in self._sizes.items():
            position = 0
            for extent in sorted(taken[segment], key=lambda each: each.offset):
                if extent.offset > position:
                    extents.append(Extent(segment, position, extent.offset - position, State.COLD))
                extents.append(extent)
                position = extent.offset + extent.size
            if size > position:
                extents.append(Extent(segment, position, size - position, State.COLD))
        self.total = sum(self._sizes.values())
        self.lent = sum(block.size for block in self.blocks.values())
        self.cold = self._aside = 0
        self._starts, self._ends, self._quick = {}, {}, {}
        self._free = {State.WARM: [], State.COLD: []}
        for extent in extents:
            self._enter(extent)
        self._torn = self._failed = False

    # ------------------------------------------------------------------ growing and shrinking

    @_whole
    def add_segment(self, segment: int, size: int) -> None:
        """Enter a new segment, all of it warm."""
        if segment in self._sizes:
            raise RuntimeError(f"segment {segment} is in the arena already")
        self._sizes[segment] = size
        self.total += size
        self._enter(Extent(segment, 0, size, State.WARM))

    @_whole
    def drop_segment(self, segment: int) -> bool:
        """Forget a segment; False, and nothing is changed, when a part of it is not cold and free."""
        extent = self._starts.get((segment, 0))
        if extent is None or extent.size != self._sizes[segment] or extent.state is not State.COLD:
            return False
        self._remove(extent)
        self.total -= self._sizes.pop(segment)
        return True

    @_whole
    def begin_warming(self, nbytes: int) -> Extent | None:
        """Return a cold extent of at least `nbytes`, which is BUSY until :meth:`end` is told."""
        size = self._round(nbytes)
        extent = self._find(State.COLD, size, None)
        if extent is None:
            return None
        self._cut(extent, size, State.BUSY)
        self._busy[id(extent)] = extent
        return extent

    @_whole
    def begin_cooling(self) -> list[Extent]:
        """Return all warm extents, which are BUSY until :meth:`end` is told."""
        self._gather()
        extents = [self._starts[segment, offset] for _, segment, offset in self._free[State.WARM]]
        for extent in extents:
            self._cut(extent, extent.size, State.BUSY)
        self._busy = {**self._busy, **{id(extent): extent for extent in extents}}
        return extents

    @_whole
    def end(self, extent: Extent, state: State) -> None:
        """A BUSY extent has become warm or cold."""
        if self._busy.get(id(extent)) is not extent:
            raise RuntimeError(f"{extent!r} is not busy")
        del self._busy[id(extent)]
        self._remove(extent)
        extent.move(state)
        self._join(extent)

    @_whole
    def has_warm(self, nbytes: int) -> bool:
        """Return whether a block of `nbytes` could be taken now."""
        size = self._round(nbytes)
        if self._quick.get(size):
            return True
        self._gather()
        return self._find(State.WARM, size, None) is not None

    def segments(self) -> list[int]:
        """Return the segments."""
        return list(self._sizes)

    # ------------------------------------------------------------------ blocks

    @_whole
    def take(self, nbytes: int, pid: int, among: Container[int] | None = None) -> Extent | None:
        """Take a block of at least `nbytes`, with one count for `pid`.

        Parameters
        ----------
        nbytes : int
            Bytes.
        pid : int
            Who holds it from now on.
        among : container of int, optional
            The segments it may lie in.

        Returns
        -------
        Extent or None
            None when there is no warm one.
        """
        size = self._round(nbytes)
        quick = self._quick.get(size)
        if quick and (among is None or quick[-1].segment in among):
            extent: Extent | None = quick.pop()
            assert extent is not None
            self._aside -= 1
            extent.quick = False
            extent.move(State.LENT)
        else:
            extent = self._find(State.WARM, size, among)
            if extent is None and self._aside:
                self._gather()
                extent = self._find(State.WARM, size, among)
            if extent is None:
                return None
            self._cut(extent, size, State.LENT)
        self._serial += 1
        extent.serial = self._serial
        extent.counts = {pid: 1}
        self.lent += size
        self.blocks[extent.serial] = extent  # last: from here on it is lent
        return extent

    @_whole
    def change(self, serial: int, pid: int, delta: int, reporter: int = 0) -> bool:
        """Change the count of `pid` for a block; True when the block is free by that.

        Unknown blocks and lost processes are none of our business any more, nor is what a `reporter`
        (0 for nobody) told before it was lost, once that is audited: nothing is changed.
        """
        block = self.blocks.get(serial)
        if block is None or pid in self.gone:
            return False
        told = block.told
        if reporter:
            if (pid, reporter) in self.closed:
                return False
            told = _changed(told, (pid, reporter), delta)
        return self._set(((block, _changed(block.counts, pid, delta), told),))

    def _set(
        self,
        changes: Sequence[tuple[Extent, dict[int, int], dict[tuple[int, int], int]]],
        closing: tuple[int, int] | None = None,
    ) -> bool:
        """Give blocks new counts, worked out before, all of them; True when one is free by that."""
        over = [block for block, counts, _ in changes if not _is_held(counts)]
        if closing is not None:
            self.closed.add(closing)
        for block, counts, told in changes:
            block.counts, block.told = counts, told
        try:
            for block in over:
                self._put_aside(block)
        except (MemoryError, RecursionError):
            self._failed = True  # the counts are right, and who gave one back must not do so again
        return bool(over)

    @_whole
    def hand_over(self, serial: int, giver: int, taker: int) -> bool:
        """Make one count of `giver` one of `taker`; False when that is lost, and its count is not made."""
        block = self.blocks.get(serial)
        if block is not None:
            counts = block.counts if giver in self.gone else _changed(block.counts, giver, -1)
            counts = counts if taker in self.gone else _changed(counts, taker, +1)
            self._set(((block, counts, block.told),))
        return taker not in self.gone

    @_whole
    def lend(self, serial: int, pid: int) -> bool:
        """Give `pid` a count; False when it is lost, and nothing is changed."""
        if pid in self.gone:
            return False
        block = self.blocks.get(serial)
        if block is not None:
            self._set(((block, _changed(block.counts, pid, +1), block.told),))
        return True

    @_whole
    def lose(self, pid: int) -> bool:
        """Drop all counts of a lost process; True when a block is free by that."""
        self.gone.add(pid)
        self.closed = {pair for pair in self.closed if pair[0] != pid}
        return self._set(
            [
                (
                    block,
                    {each: count for each, count in block.counts.items() if each != pid},
                    {pair: count for pair, count in block.told.items() if pair[0] != pid},
                )
                for block in self.blocks.values()
                if pid in block.counts or block.told
            ]
        )

    def holders_reported_by(self, reporter: int) -> set[int]:
        """Return of whom a process told something that was not given back."""
        return {pair[0] for block in self.blocks.values() for pair in block.told if pair[1] == reporter}

    @_whole
    def audited(self, pid: int, reporter: int, receipts: Mapping[int, int]) -> bool:
        """A holder says what it has from a lost process, by block; True when a block is free by that."""
        if pid in self.gone or (pid, reporter) in self.closed:
            return False
        changes = []
        for block in self.blocks.values():
            delta = receipts.get(block.serial, 0) - block.told.get((pid, reporter), 0)
            told = {pair: count for pair, count in block.told.items() if pair != (pid, reporter)}
            changes.append((block, _changed(block.counts, pid, delta), told))
        return self._set(changes, (pid, reporter))

    def _put_aside(self, block: Extent) -> None:
        """A block that nobody holds is free."""
        del self.blocks[block.serial]
        self.lent -= block.size
        block.counts, block.told = {}, {}
        block.move(State.WARM)
        block.quick = True
        self._quick.setdefault(block.size, []).append(block)
        self._aside += 1
        if self._aside > _ASIDE:
            self._gather()

    # ------------------------------------------------------------------ proof

    def _check(self) -> None:
        """Assert what must hold between any two calls."""
        if self._torn:
            self._rebuild()
        position: dict[int, int] = dict.fromkeys(self._sizes, 0)
        former: dict[int, Extent] = {}
        lent = cold = 0
        for (segment, offset), extent in sorted(self._starts.items()):
            assert (segment, offset) == (extent.segment, extent.offset), extent
            assert offset == position[segment], f"a gap or an overlap before {extent}"
            assert extent.size > 0 and extent.size % self.grain == 0, extent
            assert self._ends[segment, offset + extent.size] is extent, extent
            position[segment] = offset + extent.size
            last = former.get(segment)
            if last is not None and last.state is extent.state:
                apart = extent.state in (State.LENT, State.BUSY) or last.quick or extent.quick
                assert apart, f"{last} and {extent} should be one"
            former[segment] = extent
            if extent.state is State.LENT:
                assert self.blocks[extent.serial] is extent, extent
                assert any(count > 0 for count in extent.counts.values()), f"nobody holds {extent}"
                assert all(extent.counts.values()), f"a count of zero is kept in {extent}"
                assert not self.gone & extent.counts.keys(), f"a lost process holds {extent}"
                assert all(extent.told.values()), f"what was told is kept though it is zero: {extent}"
                assert not self.gone & {pid for pid, _ in extent.told}, f"told of a lost process: {extent}"
                assert not self.closed & extent.told.keys(), f"told, and audited: {extent}"
                lent += extent.size
            assert (id(extent) in self._busy) == (extent.state is State.BUSY), extent
            cold += extent.size if extent.state is State.COLD else 0
        assert position == self._sizes and self.total == sum(self._sizes.values())
        assert len(self._ends) == len(self._starts)
        assert lent == self.lent and cold == self.cold
        assert len(self.blocks) == sum(e.state is State.LENT for e in self._starts.values())
        for state, free in self._free.items():
            found = [e for e in self._starts.values() if e.state is state and not e.quick]
            assert free == sorted((e.size, e.segment, e.offset) for e in found)
        aside = [extent for extents in self._quick.values() for extent in extents]
        assert {id(e) for e in aside} == {id(e) for e in self._starts.values() if e.quick}
        assert len(aside) == self._aside and all(e.state is State.WARM for e in aside)
        assert all(e.size == size for size, extents in self._quick.items() for e in extents)
