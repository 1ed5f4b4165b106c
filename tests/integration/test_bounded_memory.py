"""Memory stays within bounds, however much goes through; and a program ends though much is still on its way."""

import gc
import itertools
import os
import threading
import weakref

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import anonymous_bytes, shared_bytes, until

MIB = 1 << 20
SIZE = 4 * MIB
ITEMS = 100
BOUND = ITEMS * SIZE // 2  # bytes in use at once: enough for all that may be ahead, in any order of events


def ospids(pids):
    return [os.getpid(), *(current_node().peers.members[pid].ospid for pid in pids)]


def used(pids):
    """Return the bytes of memory of this process and some workers, shared memory counted once."""
    found = ospids(pids)
    return sum(map(anonymous_bytes, found)) + shared_bytes(found)


def make(n):
    return np.full(SIZE, n % 200, "B")


def first(array):
    return int(array[0])


def elements_of_a_map(pids):
    """The map returns when it has read all of them; so they look themselves."""
    most = 0
    before = used(pids)

    def read():
        nonlocal most
        for n in range(ITEMS):
            most = max(most, used(pids) - before)
            yield make(n)

    found = sd.pmap(first, sd.WorkerPool(pids), read())
    assert most < BOUND, f"{most >> 20} MiB were in use at once"
    return found


def generated_slowly_read(pids):
    for n, array in enumerate(sd.pgenerate(make, range(ITEMS), pool=sd.WorkerPool(pids), ordered=False)):
        if n < 5:
            threading.Event().wait(0.1)  # the workers could make them all in the meantime
        yield first(array)


def futures_dropped_unfetched(pids):
    for n in range(ITEMS):
        sd.remotecall(make, pids[n % len(pids)], n).wait()
        yield n % 200


def futures_fetched_and_kept(pids):
    """A future that was fetched frees the remote value; here it keeps only what came."""
    kept = []
    for n in range(ITEMS):
        future = sd.remotecall(make, pids[n % len(pids)], n)
        yield first(future.fetch())
        kept.append(future)
        del kept[:-3]


def futures_forwarded_and_ignored(pids):
    for n in range(ITEMS):
        future = sd.remotecall(make, pids[0], n).wait()
        yield sd.remotecall_fetch(lambda future, n: n % 200, pids[1], future, n)


def through_a_channel(pids):
    channel = sd.RemoteChannel(lambda: sd.Channel(3), pids[0])

    def produce():
        for n in range(ITEMS):
            channel.put(make(n))
        channel.close()

    sd.remote_do(produce, pids[1])
    yield from map(first, channel)


STREAMS = [
    elements_of_a_map,
    generated_slowly_read,
    futures_dropped_unfetched,
    futures_fetched_and_kept,
    futures_forwarded_and_ignored,
    through_a_channel,
]


@pytest.mark.parametrize("stream", STREAMS)
def test_large_values_stream_through(cluster, stream):
    """Many times as many as may be in use at once."""
    pids = cluster[:2]
    gc.collect()
    before = used(pids)
    seen, most = [], 0
    for value in stream(pids):
        seen.append(value)
        most = max(most, used(pids) - before)
    assert sorted(seen) == sorted(n % 200 for n in range(ITEMS))
    assert most < BOUND, f"{most >> 20} MiB were in use at once"


def hold_up(n):
    """Make what is behind the first element wait, so that it is given to others."""
    if n == 0:
        threading.Event().wait(0.05)
    return 1 // (n + 1)


@pytest.mark.parametrize("end", ["all done", "an error amid them"])
def test_a_map_that_is_over_holds_none_of_its_elements(cluster, end):
    """Whether or not the collector of cycles comes by."""
    alive = weakref.WeakSet()

    class Element:
        def __init__(self, number):
            self.number = number
            alive.add(self)

        def __reduce__(self):
            return int, (self.number,)

    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            if end == "all done":
                assert sum(sd.pmap(hold_up, map(Element, range(300)))) == 1
            else:
                with pytest.raises(ZeroDivisionError):
                    sd.pmap(hold_up, map(Element, [0, *range(1, 100), -1, *range(100, 300)]))
            until(lambda: not alive, 2, "elements are gone")
    finally:
        gc.enable()


# ---------------------------------------------------------------------- many rounds

ROUNDS = 400


def plain_call(pid, n):
    assert sd.remotecall_fetch(abs, pid, -n) == n


def dropped_future(pid, n):
    sd.remotecall(abs, pid, -n)


def reference_sent(pid, n):
    future = sd.remotecall(abs, pid, -n)
    assert sd.remotecall_fetch(sd.fetch, pid, future) == n


def error(pid, n):
    with pytest.raises(ZeroDivisionError):
        sd.remotecall_fetch(divmod, pid, n, 0)


def short_array(pid, n):
    assert sd.remotecall_fetch(lambda a: a + 1, pid, np.full(20, n))[5] == n + 1


def views_of_an_array(pid, n):
    """The array itself is dropped before its views are."""
    back = sd.remotecall_fetch(lambda a: a, pid, np.full(6000, n))
    views = [back[5:], {"reshaped": back.reshape(2, -1).T}, memoryview(back)[::2]]
    del back
    assert views[0][0] == views[1]["reshaped"][0, 0] == views[2][0] == n


def shared_array(pid, n):
    assert sd.remotecall_fetch(lambda a: a, pid, sd.shared.full(50, n))[5] == n


def item_of_a_channel(pid, n):
    channel = sd.RemoteChannel(lambda: sd.Channel(1), pid)
    channel.put(n)
    assert channel.take() == n


KINDS = [
    plain_call,
    dropped_future,
    reference_sent,
    error,
    short_array,
    views_of_an_array,
    shared_array,
    item_of_a_channel,
]


def objects():
    return len(gc.get_objects()) if gc.collect() >= 0 else 0


def test_many_rounds_leave_memory_as_it_was(cluster):
    pid = cluster[0]

    def memory():
        """Objects by number, for a leak of few bytes a round; bytes in pieces of 64 KiB."""
        there, shared = ospids([pid])[1], shared_bytes(ospids([pid]))
        return {
            "objects here": objects(),
            "objects there": sd.remotecall_fetch(objects, pid),
            "bytes here": anonymous_bytes() >> 16,
            "bytes there": anonymous_bytes(there) >> 16,
            "bytes shared": shared >> 16,
        }

    def rounds(number):
        for n, kind in itertools.product(range(number), KINDS):
            kind(pid, n)

    def grown():
        return {
            name: now - before[name] for name, now in memory().items() if now - before[name] >= ROUNDS // 3
        }

    rounds(ROUNDS // 2)
    before = memory()
    rounds(ROUNDS)
    until(lambda: not grown(), 8, "memory as it was")
