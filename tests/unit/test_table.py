"""The table of references: who holds what, when the last is gone, what order messages may come in."""

from __future__ import annotations

import doctest
import pickle
from collections.abc import Iterator

import pytest

import shmdist
import shmdist.refcount.table as module
from shmdist.errors import ShmdistError
from shmdist.refcount.table import RRID, AlreadySet, Entry, RefTable, State

R = RRID(1, 7)


@pytest.fixture
def table() -> Iterator[RefTable]:
    table = RefTable()
    yield table
    table._check()


def held(table: RefTable, *clients: int, rrid: RRID = R) -> Entry:
    """An entry created by the first client and forwarded to the others."""
    entry = table.create(rrid, "future", clients[0])
    for pid in clients[1:]:
        assert table.add(rrid, pid, +1) == []
    return entry


class TestOneHolder:
    def test_created_entry_is_found(self, table: RefTable) -> None:
        entry = table.create(R, "future", client=1)
        assert table.get(R) is entry
        assert table.lookup(R) is entry
        assert (entry.rrid, entry.kind, entry.state, entry.counts) == (R, "future", State.UNSET, {1: 1})
        assert len(table) == 1

    def test_drop_frees(self, table: RefTable) -> None:
        entry = held(table, 1)
        assert table.add(R, 1, -1) == [entry]
        assert entry.state is State.FREED
        assert table.get(R) is None
        assert len(table) == 0

    def test_freed_entry_hands_over_value_and_waiters(self, table: RefTable) -> None:
        """The table never drops a value itself: its finalizer would run inside the caller's lock."""
        unset, full = held(table, 1), held(table, 1, rrid=RRID(1, 8))
        waiter, value = object(), object()
        unset.waiters.append(waiter)
        table.set_value(full, value)
        assert table.add(R, 1, -1)[0].waiters == [waiter]
        assert table.add(RRID(1, 8), 1, -1)[0].value is value

    def test_sent_back_to_the_holder_counts_twice(self, table: RefTable) -> None:
        entry = held(table, 1, 1)
        assert table.add(R, 1, -1) == []
        assert table.add(R, 1, -1) == [entry]

    def test_deltas_may_be_summed_up(self, table: RefTable) -> None:
        entry = held(table, 1)
        table.add(R, 1, +4)
        assert table.add(R, 1, -5) == [entry]

    def test_second_creation_is_an_error_that_changes_nothing(self, table: RefTable) -> None:
        entry = held(table, 1)
        with pytest.raises(ValueError, match=r"\(1, 7\) is created twice"):
            table.create(R, "future", client=2)
        assert entry.counts == {1: 1}

    def test_held_by_nobody_until_the_first_add(self, table: RefTable) -> None:
        entry = table.create(R, "channel", client=None)
        assert entry.pinned
        table._check()
        assert table.add(R, 2, +1) == []
        assert table.add(R, 2, -1) == [entry]


class TestForwarding:
    def test_forwarder_drops_first(self, table: RefTable) -> None:
        entry = held(table, 1, 3)
        assert table.add(R, 1, -1) == []
        assert table.add(R, 3, -1) == [entry]

    def test_drop_overtakes_the_add(self, table: RefTable) -> None:
        entry = held(table, 1)
        assert table.add(R, 3, -1) == []
        assert entry.counts == {1: 1, 3: -1}
        assert table.add(R, 3, +1) == []
        assert entry.counts == {1: 1}
        assert table.add(R, 1, -1) == [entry]

    def test_chain_heard_of_backwards(self, table: RefTable) -> None:
        """1 forwards to 2, 2 to 3; the owner reads 3's link first and 1's last."""
        entry = held(table, 1)
        assert table.add(R, 3, -1) == []
        assert table.add(R, 3, +1) == []
        assert table.add(R, 2, -1) == []
        assert table.add(R, 2, +1) == []
        assert table.add(R, 1, -1) == [entry]


class TestBeforeCreation:
    def test_lookup_makes_the_entry_that_create_completes(self, table: RefTable) -> None:
        early = table.lookup(R)
        assert (early.kind, early.created, early.pinned) == (None, False, True)
        early.waiters.append("somebody")
        entry = table.create(R, "future", client=1)
        assert entry is early
        assert (entry.kind, entry.created, entry.pinned) == ("future", True, False)
        assert entry.waiters == ["somebody"]

    def test_value_set_early_stays(self, table: RefTable) -> None:
        table.set_value(table.lookup(R), 42)
        entry = table.create(R, "future", client=1)
        assert (entry.state, entry.value) == (State.SET, 42)

    def test_early_counts_to_zero_free_nothing(self, table: RefTable) -> None:
        """3 had it from the creator, forwarded it to 4, both dropped it: the creator still has it."""
        early = table.lookup(R)
        for pid, delta in [(4, +1), (4, -1), (3, -1)]:
            assert table.add(R, pid, delta) == []
        assert table.create(R, "future", client=1) is early
        assert table.add(R, 3, +1) == []
        assert table.add(R, 1, -1) == [early]

    def test_drop_of_an_unknown_reference_is_remembered(self, table: RefTable) -> None:
        assert table.add(R, 3, -1) == []
        entry = table.create(R, "future", client=1)
        assert table.add(R, 3, +1) == []
        assert table.add(R, 1, -1) == [entry]

    def test_used_as_another_kind(self, table: RefTable) -> None:
        table.lookup(R).kind = "channel"
        with pytest.raises(ValueError, match="created as a future, but used before"):
            table.create(R, "future", client=1)
        table._check()

    def test_get_makes_nothing(self, table: RefTable) -> None:
        assert table.get(R) is None
        assert len(table) == 0


class TestDeath:
    def test_frees_what_only_the_dead_held(self, table: RefTable) -> None:
        mine, shared, other = (
            held(table, 1),
            held(table, 1, 2, rrid=RRID(1, 8)),
            held(table, 2, rrid=RRID(2, 1)),
        )
        table.add(R, 1, +3)
        assert table.peer_lost(1) == [mine]
        assert (shared.counts, other.counts) == ({2: 1}, {2: 1})
        assert table.peer_lost(2) == [shared, other]

    def test_the_dead_are_never_heard_again(self, table: RefTable) -> None:
        entry = held(table, 1)
        assert table.peer_lost(3) == []
        assert table.add(R, 3, +1) == []
        assert table.add(R, 3, -1) == []
        assert table.add(RRID(2, 2), 3, -1) == []
        assert entry.counts == {1: 1}
        assert len(table) == 1

    def test_a_negative_count_of_the_dead_goes_too(self, table: RefTable) -> None:
        entry = held(table, 1)
        table.add(R, 3, -1)
        table.peer_lost(3)
        assert table.add(R, 3, +1) == []
        assert entry.counts == {1: 1}
        assert table.add(R, 1, -1) == [entry]

    def test_what_the_dead_forwarded_stays(self, table: RefTable) -> None:
        entry = held(table, 1, 2)
        assert table.peer_lost(1) == []
        assert table.add(R, 2, -1) == [entry]

    def test_entry_whose_creation_can_never_come(self, table: RefTable) -> None:
        early = table.lookup(R)
        early.waiters.append("somebody")
        assert table.peer_lost(2) == []
        assert table.peer_lost(1) == [early]
        assert early.waiters == ["somebody"]

    def test_early_entry_that_others_hold_outlives_its_creator(self, table: RefTable) -> None:
        early = table.lookup(R)
        table.add(R, 3, +1)
        assert table.peer_lost(1) == []
        assert not early.pinned
        assert table.add(R, 3, -1) == [early]

    def test_creation_by_the_dead_is_stillborn(self, table: RefTable) -> None:
        table.peer_lost(1)
        entry = table.create(R, "future", client=1)
        assert entry.state is State.FREED
        assert len(table) == 0
        assert table.set_value(entry, "nobody's") == []
        assert entry.value is None

    def test_creation_by_the_dead_keeps_what_others_hold(self, table: RefTable) -> None:
        early = table.lookup(R)
        table.add(R, 3, +1)
        table.peer_lost(1)
        assert table.create(R, "future", client=1) is early
        assert early.counts == {3: 1}
        assert table.add(R, 3, -1) == [early]

    def test_words_about_an_unknown_reference_of_the_dead(self, table: RefTable) -> None:
        table.peer_lost(1)
        assert table.add(R, 3, -1) == []
        assert len(table) == 0
        assert table.add(R, 3, +1) == []
        assert table.get(R) is not None
        assert len(table.add(R, 3, -1)) == 1

    def test_use_of_an_unknown_reference_of_the_dead_ends_with_the_next_death(self, table: RefTable) -> None:
        table.peer_lost(1)
        entry = table.lookup(R)
        assert table.peer_lost(2) == [entry]

    def test_told_twice(self, table: RefTable) -> None:
        entry = held(table, 1)
        assert table.peer_lost(1) == [entry]
        assert table.peer_lost(1) == []


class TestValue:
    def test_set_returns_the_waiters_once(self, table: RefTable) -> None:
        entry = held(table, 1)
        entry.waiters += ["a", "b"]
        assert table.set_value(entry, None) == ["a", "b"]
        assert (entry.state, entry.value, entry.waiters) == (State.SET, None, [])

    def test_written_once(self, table: RefTable) -> None:
        entry = held(table, 1)
        table.set_value(entry, "first")
        with pytest.raises(AlreadySet, match=r"Future \(1, 7\) already has a value") as caught:
            table.set_value(entry, "second")
        assert caught.value.rrid == R
        assert isinstance(caught.value, ShmdistError)
        assert entry.value == "first"

    def test_set_after_free_keeps_nothing(self, table: RefTable) -> None:
        entry = held(table, 1)
        table.add(R, 1, -1)
        assert table.set_value(entry, "late") == []
        assert table.set_value(entry, "later") == []
        assert (entry.state, entry.value) == (State.FREED, None)

    def test_illegal_move_names_the_reference_state_and_event(self) -> None:
        entry = Entry(R)
        entry._move(module._Event.FREE)
        with pytest.raises(RuntimeError, match=r"\(1, 7\): free is illegal when freed"):
            entry._move(module._Event.FREE)


class TestTexts:
    def test_rrid(self) -> None:
        assert RRID.__module__ == "shmdist"
        assert repr(R) == "RRID(whence=1, id=7)"
        assert {R: 1}[RRID(1, 7)] == 1

    def test_reprs(self, table: RefTable) -> None:
        assert repr(table.lookup(R)) == "<Entry (1, 7) unknown unset pinned counts={} waiters=0>"
        assert repr(table) == "<RefTable 1 entries, 1 pinned, 0 dead processes>"

    def test_already_set_survives_pickling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shmdist, "RRID", RRID, raising=False)  # where its module says it is
        error = pickle.loads(pickle.dumps(AlreadySet(R)))
        assert (type(error), error.rrid, str(error)) == (AlreadySet, R, str(AlreadySet(R)))

    def test_check_finds_what_is_broken(self) -> None:
        table = RefTable()
        held(table, 1).counts[1] = 0
        with pytest.raises(AssertionError, match="pinned or has a count above zero"):
            table._check()

    @pytest.mark.parametrize("cls", [RRID, RefTable])
    def test_examples(self, cls: type) -> None:
        for example in doctest.DocTestFinder().find(cls, module=False, globs=vars(module)):
            assert doctest.DocTestRunner().run(example).failed == 0
