"""Leases and the holds that stand for them: found by address, taken apart when the last view is gone."""

import gc
import pickle
import threading

import numpy as np
import pytest

from shmdist.memory.leases import OWN, PRIVATE, SHARED, Lease, LeaseHandle, LeaseTable
from shmdist.memory.mapping import PAGE
from shmdist.memory.segment import Segment


@pytest.fixture
def segment():
    return Segment.make(7, 3, 64 * PAGE)


@pytest.fixture
def holds():
    holds = LeaseTable(threading.Lock(), lambda: holds.woken.append(True))
    holds.woken = []
    return holds


def make(holds, segment, mode=OWN, serial=1, offset=PAGE, nbytes=100):
    return LeaseHandle(holds, Lease(segment, serial, offset, nbytes, mode))


@pytest.mark.parametrize("use", [lambda a: a[3:5], lambda a: a.view("u2")[::2], lambda a: memoryview(a)[1:]])
def test_the_last_view_ends_the_hold(holds, segment, use):
    hold = make(holds, segment)
    lease, view = hold.lease, use(hold.array())
    del hold
    gc.collect()
    assert holds.drain() == [] and len(holds) == 1
    del view
    assert holds.drain() == [lease] and lease.dead and not len(holds)
    holds._check()


def test_one_that_was_never_looked_into_ends_as_well(holds, segment):
    lease = make(holds, segment).lease
    assert holds.drain() == [lease]


def test_finalizers_wake_only_when_nobody_looks(holds, segment):
    holds.idle = False
    make(holds, segment)
    assert not holds.woken
    holds.idle = True
    make(holds, segment)
    assert holds.woken
    assert len(holds.drain()) == 2


def test_a_finalizer_takes_no_lock(holds, segment):
    hold = make(holds, segment)
    array = hold.array()
    with holds._lock:
        del hold, array
        assert len(holds.drain()) == 1


@pytest.mark.parametrize("mode", [OWN, SHARED])
def test_writing_reaches_the_segment(holds, segment, mode):
    array = make(holds, segment, mode).array()
    array[:3] = 1, 2, 3
    assert bytes(segment.view[PAGE : PAGE + 3]) == b"\1\2\3"


def test_a_private_one_keeps_what_is_written(holds, segment):
    segment.view[PAGE + 8 : PAGE + 10] = b"ab"
    first = make(holds, segment, PRIVATE, offset=PAGE + 8).array()
    second = make(holds, segment, PRIVATE, offset=PAGE + 8).array()
    first[0] = 0
    assert second[:2].tobytes() == b"ab" == bytes(segment.view[PAGE + 8 : PAGE + 10])
    assert len(first) == 100


def test_without_room_for_a_mapping_it_is_a_copy(holds, segment, monkeypatch):
    def refuse(offset, nbytes):
        raise OSError("no room")

    monkeypatch.setattr(segment, "private", refuse)
    segment.view[PAGE : PAGE + 2] = b"ab"
    array = make(holds, segment, PRIVATE).array()
    array[0] = 0
    assert bytes(segment.view[PAGE : PAGE + 2]) == b"ab" and array[1] == ord("b")
    assert len(holds.drain()) == 1  # the block is not needed any more


class TestFinding:
    def test_by_address(self, holds, segment):
        arrays = [make(holds, segment, serial=i, offset=i * PAGE).array() for i in range(5)]
        for number, array in enumerate(arrays):
            start = array.__array_interface__["data"][0]
            assert holds.find(start, 100).serial == number == holds.find(start + 99, 1).serial
            assert holds.find(start + 99, 2) is None and holds.find(start - 1, 1) is None
        assert holds.find(0, 1) is None and holds.find(1 << 62, 1) is None
        holds._check()

    def test_of_one_block_any_lease_will_do(self, holds, segment):
        first, second = (make(holds, segment, SHARED).array() for _ in range(2))
        start = first.__array_interface__["data"][0]
        assert holds.shared == 2
        del first
        holds.drain()
        assert holds.find(start, 10).serial == 1 and holds.shared == 1
        del second
        holds.drain()
        assert holds.find(start, 10) is None and holds.shared == 0


def test_a_moving_one_is_not_given_back(holds, segment):
    hold = make(holds, segment)
    lease = hold.lease
    lease.moving = True
    del hold
    assert holds.drain() == [] and lease.dead


def test_a_pinned_one_waits(holds, segment):
    hold = make(holds, segment)
    lease = hold.lease
    lease.pins = 1
    del hold
    assert holds.drain() == [] and holds.dead == [lease]


def test_a_hold_cannot_be_pickled(holds, segment):
    with pytest.raises(TypeError, match="belongs to its process"):
        pickle.dumps(make(holds, segment))


def test_segments_of_the_dead_live_as_long_as_leases(holds, segment):
    holds.orphans[7, 3] = segment
    assert holds.segment(7, 3) is segment
    with pytest.raises(LookupError):
        holds.segment(7, 4)


def test_reprs(holds, segment):
    hold = make(holds, segment)
    assert repr(hold) == "<LeaseHandle <Lease own block 1 of process 7, 100 bytes>>"
    assert "LeaseTable 0 in" in repr(holds) and "Segment 3 of process 7" in repr(segment)
    assert np.asarray(hold.array()).base is hold and len(hold) == 100
