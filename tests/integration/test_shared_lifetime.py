"""How long memory lives: as long as a view of it, in any process, and not longer."""

import concurrent.futures
import gc
import os
import signal
import threading

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import Script, anonymous_bytes, settled_state, shared_bytes, until
from tests.integration.test_shared_aliasing import forget, keep
from tests.integration.test_shared_memory import warm

MIB = 1 << 20


def ospids():
    return [os.getpid(), *(peer.ospid for pid, peer in current_node().peers.members.items() if pid != 1)]


def lent(pid=1):
    state = settled_state if pid == 1 else None
    found = state() if state else sd.remotecall_fetch(settled_state, pid)
    return found["blocks lent"]


DERIVED = {
    "slice": lambda a: a[10:20],
    "transposed": lambda a: a.reshape(-1, 2).T,
    "strided": lambda a: a[::7],
    "reshaped": lambda a: a.reshape(2, -1),
    "in a dict": lambda a: {"x": [a[5:]]}["x"][0],
    "memoryview": lambda a: np.asarray(memoryview(a)[3:]),
    "other dtype": lambda a: a.view("i4"),
    "of no elements": lambda a: a[:0],
}


@pytest.mark.parametrize("shared", [False, True])
def test_views_outlive_the_array_and_its_maker(cluster, fresh, shared):
    [pid] = fresh()
    make = sd.shared.array if shared else np.array
    warm(pid, 8 * 50_000)
    views = {}
    for name, derive in DERIVED.items():
        whole = sd.remotecall_fetch(lambda n: make(np.arange(float(n))), pid, 50_000)
        views[name] = derive(whole)
        del whole
    before = {name: view.copy() for name, view in views.items()}
    gc.collect()
    for _ in range(20):  # blocks that came back would be written to by this
        sd.remotecall_fetch(lambda a: a * 0 - 1, pid, np.ones(50_000))
    ospid = sd.remotecall_fetch(os.getpid, pid)
    if shared:
        os.kill(ospid, signal.SIGKILL)
        until(lambda: pid not in sd.procs())
    else:
        sd.rmprocs(pid)
    for name, view in views.items():
        assert np.array_equal(view, before[name]), name
        view[...] = 1
        assert sd.remotecall_fetch(np.sum, cluster[0], view) == view.sum()


def test_a_shared_array_outlives_its_owner_and_is_passed_on(cluster, fresh):
    a, b = cluster[:2]
    [owner] = fresh()
    shared = sd.remotecall_fetch(sd.shared.zeros, owner, 1000)
    os.kill(current_node().peers.members[owner].ospid, signal.SIGKILL)
    until(lambda: owner not in sd.procs())

    def write(array, rest):
        array[sd.myid()] = 1
        return sd.remotecall_fetch(write, rest[0], array, rest[1:]) if rest else array

    back = sd.remotecall_fetch(write, a, shared, [b, a])
    back[0] = 5
    assert shared[a] == shared[b] == 1 and shared[0] == 5
    until(lambda: all(not sd.remotecall_fetch(settled_state, pid)["blocks held"] for pid in (a, b)))


def test_memory_goes_back_when_nobody_uses_it(cluster):
    """Of shared arrays, of blocks, and what receivers of a broadcast wrote into their own mappings."""
    a, b = cluster[:2]
    array = np.ones(4 * MIB)
    before = {pid: anonymous_bytes(current_node().peers.members[pid].ospid) for pid in (a, b)}
    segments = sd.remotecall_fetch(count_segments, b)
    warm(a, array.nbytes)
    sd.pmap(lambda n: array.__setitem__(slice(None), n), sd.CachingPool([a, b]), range(4), batch_size=1)
    shared = sd.shared.ones(64 * MIB, "B")
    assert shared_bytes(ospids()) > 90 * MIB
    sd.remotecall_wait(keep, a, "view", shared[5:6])
    # Its owner does not know to whom it was passed on.
    sd.remotecall_fetch(lambda array: sd.remotecall_fetch(len, b, array), a, shared)
    del shared
    until(lambda: {a: 1} in lent().values())  # and not b any more
    sd.remotecall_wait(forget, a)
    until(lambda: not lent())

    def all_is_back():
        private = [anonymous_bytes(current_node().peers.members[pid].ospid) - before[pid] for pid in (a, b)]
        mapped = sd.remotecall_fetch(count_segments, b)
        return shared_bytes(ospids()) < 8 * MIB and max(private) < 16 * MIB and mapped <= segments

    until(all_is_back, 12)


def test_a_process_that_only_received_gives_back_by_itself(fresh):
    """It never sends its owner anything again, and has made no block of its own."""
    owner, holder = fresh(2)
    shared = sd.remotecall_fetch(sd.shared.zeros, owner, 1000)
    sd.remotecall_wait(keep, holder, "array", shared)
    del shared
    sd.remotecall_wait(forget, holder)
    until(lambda: not sd.remotecall_fetch(lambda: len(current_node().sharing.arena.blocks), owner))


def count_segments():
    return len(current_node().sharing.holds.segments)


def test_a_thousand_rounds_leave_memory_as_it_was(cluster):
    pid = cluster[0]
    array = np.ones(MIB)
    seen = []
    for n in range(1000):
        back = sd.remotecall_fetch(lambda a: a, pid, array)
        assert back[-1] == 1
        if n in (50, 999):
            gc.collect()
            shared = shared_bytes(ospids())
            seen.append((shared, anonymous_bytes(), anonymous_bytes(current_node().peers.members[pid].ospid)))
    for name, first, last in zip(("shared", "here", "there"), *seen, strict=True):
        assert last - first < 10 * MIB, f"{name}: {first} bytes became {last}"
    del back
    assert not lent() and not lent(pid)


def test_many_small_shared_arrays_cost_few_descriptors(cluster):
    pid = cluster[0]
    before = len(os.listdir("/proc/self/fd"))
    there = sd.remotecall_fetch(lambda: len(os.listdir("/proc/self/fd")), pid)
    arrays = [sd.shared.full(100, n) for n in range(2000)]
    assert sd.remotecall_fetch(lambda arrays: [int(a[0]) for a in arrays], pid, arrays) == list(range(2000))
    assert len(os.listdir("/proc/self/fd")) - before < 40
    assert sd.remotecall_fetch(lambda: len(os.listdir("/proc/self/fd")), pid) - there < 40
    assert len(lent()) == 2000


# ---------------------------------------------------------------------- nothing stays lent


class Unreadable:
    def __reduce__(self):
        return _fail, ()


def _fail():
    raise ArithmeticError("cannot be read")


class Unsendable:
    def __reduce__(self):
        raise ArithmeticError("cannot be sent")


def nothing_is_lent(*pids):
    """Wait until nothing is lent by this process and by `pids`."""
    found = {}

    def nothing():
        found.update({pid: lent(pid) for pid in (1, *pids)})
        return not any(found.values())

    try:
        until(nothing, 5)
    except AssertionError:
        raise AssertionError(f"still lent: {found}") from None


def test_a_message_that_cannot_be_sent_or_read_keeps_no_block(cluster):
    pid = cluster[0]
    big = np.ones(MIB, "B")
    warm(pid, big.nbytes)
    shared = sd.shared.ones(10)
    for _ in range(3):
        with pytest.raises(sd.SerializationError):
            sd.remotecall_fetch(len, pid, big, shared, Unsendable(), big)
        with pytest.raises(ArithmeticError, match="cannot be read"):
            sd.remotecall_fetch(len, pid, big, Unreadable(), big)
        with pytest.raises(sd.SerializationError):
            sd.remotecall_fetch(lambda a, b: (a, b, Unsendable()), pid, big, shared)
        with pytest.raises(sd.SerializationError):
            sd.remotecall_fetch(lambda a: (a, Unreadable()), pid, big)
        with pytest.raises(sd.SerializationError):
            sd.pmap(len, sd.CachingPool([pid]), [big, [big, Unsendable()]])
    del shared
    nothing_is_lent(pid)


def test_errors_keep_no_block(cluster):
    """Nor do Futures of calls that failed: a traceback's frames hold the arguments."""
    pid = cluster[0]
    big = np.ones(MIB, "B")
    warm(pid, big.nbytes)

    def fail(a):
        try:
            raise ValueError("first")
        finally:
            a.no_such_attribute  # noqa: B018

    sd.remotecall_wait(gc.disable, pid)
    try:
        failed = sd.remotecall(fail, pid, big)
        for fetch in (
            failed.fetch,
            lambda: sd.remotecall_fetch(fail, pid, big),
            lambda: sd.pmap(fail, sd.CachingPool([pid]), [big]),
        ):
            with pytest.raises(AttributeError) as caught:
                fetch()
            del caught
        nothing_is_lent()
    finally:
        sd.remotecall_wait(gc.enable, pid)


def test_calls_that_are_cancelled_keep_no_block(cluster):
    pid = cluster[0]
    big = np.ones(MIB, "B")
    warm(pid, big.nbytes)
    started, gate = (sd.RemoteChannel(lambda: sd.Channel(20), 1) for _ in range(2))

    def wait(a):
        started.put(1)
        return gate.take()

    futures = [sd.remotecall(wait, pid, big) for _ in range(3)]
    [started.take() for _ in futures]
    [future.cancel() for future in futures]
    with pytest.raises(concurrent.futures.CancelledError):
        futures[0].fetch()  # the others are dropped unread
    del futures
    nothing_is_lent(pid)


@pytest.mark.parametrize("where", ["here", "there"])
def test_interrupts_of_transfers_keep_no_block(fresh, where):
    [pid] = fresh()
    big = np.ones(24 * MIB, "B")
    main = threading.main_thread().ident
    ospid = sd.remotecall_fetch(os.getpid, pid)
    interrupted = 0
    for n in range(50):
        done = threading.Event()

        def strike(delay=n % 17 / 1000, done=done):
            if done.wait(delay):
                return
            if where == "here":
                signal.pthread_kill(main, signal.SIGINT)
            else:
                sd.interrupt(pid)

        striker = threading.Thread(target=strike)
        try:
            striker.start()
            try:
                sd.remotecall_fetch(lambda a: [a.sum() for _ in range(3)] and a[1:], pid, big)
            finally:
                done.set()
            striker.join()
            sum(range(1000))  # a signal sent just before is seen in here
        except KeyboardInterrupt:
            interrupted += 1
        except sd.RemoteException as error:
            assert isinstance(error.captured.ex, KeyboardInterrupt)
            interrupted += 1
        striker.join()
    until(lambda: sd.remotecall_fetch(os.getpid, pid) == ospid)
    assert interrupted
    nothing_is_lent(pid)


def test_a_caller_need_not_wait_for_a_worker_that_stands_still(fresh):
    """Ctrl-C ends the wait for its word that it has mapped the memory."""
    [pid] = fresh()
    big = np.ones(MIB)
    shared = sd.shared.zeros(1000)
    ospid = current_node().peers.members[pid].ospid
    os.kill(ospid, signal.SIGSTOP)
    try:
        for value in (shared, big, shared):
            timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sd.remotecall_fetch(len, pid, value)
            timer.join()
    finally:
        os.kill(ospid, signal.SIGCONT)
    sd.remotecall_wait(lambda a: a.fill(4), pid, shared)
    assert shared[3] == 4
    del shared, value
    nothing_is_lent(pid)


def test_a_worker_that_dies_while_it_is_sent_to(fresh, recwarn):
    for n in range(4):
        [pid] = fresh()
        ospid = current_node().peers.members[pid].ospid
        shared = sd.shared.zeros(1000)
        big = np.ones(2 * MIB)
        if n % 2:
            warm(pid, big.nbytes)
        killer = threading.Timer(n / 200, os.kill, (ospid, signal.SIGKILL))
        killer.start()
        with pytest.raises(sd.ProcessExitedException):
            while True:
                sd.remotecall_fetch(lambda a, b: a, pid, big, shared)
        killer.join()
        until(lambda pid=pid: pid not in sd.procs(), 5)
        del shared
    nothing_is_lent()
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("how", ["dropped", "killed"])
def test_what_is_given_back_late_goes_back_to_the_system(fresh, monkeypatch, how):
    """A block that was in use for longer than the maintainer waits is not forgotten when it comes back."""
    [pid] = fresh()
    monkeypatch.setattr("shmdist.runtime.maintenance.IDLE_SECONDS", 0.2)
    sharing = current_node().sharing
    warm(pid, 4 * MIB)
    sd.remotecall_wait(keep, pid, "late", np.ones(4 * MIB, "B"))
    assert lent(), "the array went by the socket"

    def all_cold():
        arena = sharing.arena
        return arena.total == arena.lent + arena.cold

    until(lambda: all_cold() and sharing.holds.idle, 8)
    if how == "dropped":
        sd.remotecall_fetch(forget, pid)
        sd.remotecall_fetch(settled_state, pid)
    else:
        os.kill(current_node().peers.members[pid].ospid, signal.SIGKILL)
    until(lambda: sharing.arena.total == sharing.arena.cold, 8, "memory is given back")


def test_a_segment_in_the_making_is_known_and_none_is_made_for_the_dead():
    Script(
        """
import threading, time
import numpy as np
import shmdist as sd
from shmdist.runtime import maintenance as maintainer
from shmdist.runtime.node import current_node
from tests.integration.helpers import settled_state, until

pids = sd.addprocs(2)
sd.remotecall_fetch(len, pids[0], np.ones(1 << 17))
until(lambda: len(current_node().sharing.holds.segments), 5)
touch, begun, go_on = maintainer._touch, threading.Event(), threading.Event()
def slowly(*where):
    begun.set()
    assert go_on.wait(10)
    touch(*where)
maintainer._touch = slowly
before = settled_state()["descriptors"]
segments = len(current_node().sharing.holds.segments)
want = current_node().sharing.maintainer.want
want([64 << 20], pids[0])
assert begun.wait(5)
assert settled_state()["descriptors"] == before
want([512 << 20], pids[1])
sd.rmprocs(pids[1])
go_on.set()
until(lambda: len(current_node().sharing.holds.segments) == segments + 1, 5)
time.sleep(0.3)
assert settled_state()["descriptors"] <= before
assert len(current_node().sharing.holds.segments) == segments + 1
"""
    ).end(30).clean()
