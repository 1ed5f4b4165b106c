"""Timeouts of what is asked of other processes: the owner judges what was done, though it be slow."""

import contextlib
import os
import pickle
import signal
import threading
import time

import pytest

import shmdist as sd
from shmdist.references import base
from shmdist.runtime.node import current_node
from tests.integration.helpers import until, within

OPEN = "does not answer"  # stands in the error when the owner was too slow even to say what it did


def _work(flag):
    while not flag:
        sum(range(100))


def _flag(name, value=None):
    """Return a list of this process; anything in it stops the loops that look at it."""
    flags = current_node().parts.setdefault("test flags", {})
    flag = flags.setdefault(name, [])
    if value is not None:
        flag.append(value)
        del flags[name]
    return flag


def _loop(name):
    _work(_flag(name))


@contextlib.contextmanager
def busy(pid):
    """Have four loops of Python run on a process, so that it answers late."""
    name = os.urandom(4).hex()
    sd.remotecall_fetch(_flag, pid, name)
    calls = [sd.remotecall(_loop, pid, name) for _ in range(4)]
    try:
        yield
    finally:
        sd.remotecall_fetch(_flag, pid, name, True)
        for call in calls:
            call.wait(timeout=10)


@contextlib.contextmanager
def stopped(pid):
    """Let a process stand still."""
    ospid = sd.remotecall_fetch(os.getpid, pid)
    os.kill(ospid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(ospid, signal.SIGCONT)


def is_open(error):
    return OPEN in str(error)


# ------------------------------------------------------------------ the owner is busy


def test_a_put_that_timed_out_has_put_nothing(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")), cluster[0])
    put, unknown = [], []
    with busy(cluster[0]):
        for n in range(60):
            try:
                channel.put(n, timeout=0.001)
                put.append(n)
            except TimeoutError as error:
                if is_open(error):
                    unknown.append(n)
    items = [channel.take(timeout=5) for _ in range(len(channel))]
    assert [item for item in items if item not in unknown] == put


def test_a_put_without_room_has_put_nothing(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(1), cluster[0])
    channel.put("first")
    unknown = []
    with busy(cluster[0]):
        for n in range(20):
            with pytest.raises(TimeoutError) as caught:
                channel.put(n, timeout=0.001)
            if is_open(caught.value):
                unknown.append(n)
    assert channel.take(timeout=5) == "first"
    assert channel.isempty() or channel.take(timeout=5) in unknown


def test_a_future_whose_put_timed_out_has_no_value(cluster):
    with busy(cluster[0]):
        for _ in range(30):
            future = sd.Future(cluster[0])
            try:
                future.put(1, timeout=0.001)
            except TimeoutError as error:
                if not is_open(error):
                    future.put(2)
            assert future.isready()


def test_one_taker_gets_items_in_order(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")), cluster[0])
    for n in range(60):
        channel.put(n)
    got, unknown = [], False
    with busy(cluster[0]):
        while len(got) < 60:
            try:
                got.append(channel.take(timeout=0.001))
            except TimeoutError as error:
                unknown |= is_open(error)
    assert sorted(got) == list(range(60))
    assert unknown or got == list(range(60))


# ------------------------------------------------------------------ a timeout of 0 is a try


@pytest.mark.parametrize("timeout", [0, 1e-9, -1])
def test_a_try_gets_what_is_there(cluster, timeout):
    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(lambda: sd.Channel(2), where)
        for operation in (channel.take, channel.fetch, channel.wait):
            with pytest.raises(TimeoutError):
                operation(timeout=timeout)
        assert channel.isready(timeout=timeout) is False and channel.isempty(timeout=timeout) is True
        channel.put("a", timeout=timeout)
        channel.put("b", timeout=timeout)
        with pytest.raises(TimeoutError):
            channel.put("no room", timeout=timeout)
        assert channel.isready(timeout=timeout) is True and channel.isopen(timeout=timeout) is True
        channel.wait(timeout=timeout)
        assert channel.fetch(timeout=timeout) == "a"
        assert [channel.take(timeout=timeout) for _ in range(2)] == ["a", "b"]
        channel.close(timeout=timeout)
        with pytest.raises(sd.ChannelClosed):
            channel.take(timeout=timeout)


def test_a_try_gets_a_value_that_is_there(cluster):
    for where in (1, cluster[0]):
        future = sd.Future(where)
        for function in (sd.fetch, sd.wait):
            with pytest.raises(TimeoutError):
                function(future, timeout=0)
        future.put([1], timeout=0)
        assert future.isready(timeout=0) and future.wait(timeout=0) is future
        assert future.fetch(timeout=0) == [1]
        call = sd.remotecall(list, where, "ab").wait()
        assert call.done() and call.result(timeout=0) == ["a", "b"]


class Slot:
    """A channel of the user's own, of one item."""

    def __init__(self):
        self.items = []
        self.changed = threading.Condition()

    def put(self, item):
        with self.changed:
            self.changed.wait_for(lambda: not self.items)
            self.items.append(item)
            self.changed.notify_all()

    def fetch(self):
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            return self.items[0]

    def take(self):
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            self.changed.notify_all()
            return self.items.pop()

    def isready(self):
        return bool(self.items)

    def close(self):
        pass


def test_a_try_at_a_channel_of_ones_own(cluster):
    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(Slot, where)
        with pytest.raises(TimeoutError):
            channel.take(timeout=0)
        channel.put("item", timeout=0)
        assert channel.fetch(timeout=0) == "item"
        assert channel.take(timeout=0) == "item"


# ------------------------------------------------------------------ the owner stands still


def test_an_owner_that_stands_still(fresh):
    [pid] = fresh()
    channel = sd.RemoteChannel(lambda: sd.Channel(5), pid)
    channel.put("first")
    with stopped(pid):
        for operation in (channel.take, channel.fetch, channel.isready, channel.wait, channel.close):
            with within(5), pytest.raises(TimeoutError, match=OPEN):
                operation(timeout=0.02)
        with within(5), pytest.raises(TimeoutError, match=OPEN):
            channel.put("second", timeout=0.02)
    assert channel.take(timeout=5) == "first"  # it went back to the head, if it was taken
    assert channel.isempty() or channel.take(timeout=5) == "second"


@pytest.mark.parametrize("limit", ["0", None])
def test_a_large_put_to_an_owner_that_stands_still(fresh, monkeypatch, limit):
    """More than the connection holds: it cannot even be written."""
    if limit is not None:
        monkeypatch.setenv("SHMDIST_ARENA_LIMIT", limit)
    [pid] = fresh(env={} if limit is None else {"SHMDIST_ARENA_LIMIT": limit})
    channel = sd.RemoteChannel(lambda: sd.Channel(5), pid)
    future = sd.Future(pid)
    with stopped(pid):
        for operation in (channel.put, future.put, channel.put):
            with within(5), pytest.raises(TimeoutError):
                operation(b"x" * (6 << 20), timeout=0.05)
        with within(5), pytest.raises(TimeoutError):
            channel.put("small", timeout=0.05)  # behind what has begun
        with within(5), pytest.raises(TimeoutError):
            channel.put([future, channel], timeout=0.05)  # base, which are counted first
        with within(5), pytest.raises(TimeoutError):
            channel.take(timeout=0)
    channel.put("last", timeout=10)
    items = [channel.take(timeout=10) for _ in range(len(channel))]
    assert items[-1] == "last"
    rrids = [sd.remoteref_id(future), sd.remoteref_id(channel)]
    del future, channel, operation, items
    until(lambda: not any(sd.remotecall_fetch(_has_entry, pid, rrid) for rrid in rrids))


def test_an_array_as_well(fresh):
    """It would go by shared memory, which its receiver has first to be told of."""
    np = pytest.importorskip("numpy")
    first, second = fresh(2)
    for _ in range(3):  # warm memory, which only the first one has mapped
        sd.remotecall_fetch(len, first, np.ones(1 << 19))
    channel = sd.RemoteChannel(lambda: sd.Channel(5), second)
    shared = sd.shared.ones(1 << 19)
    with stopped(second):
        for array in (np.ones(1 << 19), shared):
            with within(5), pytest.raises(TimeoutError):
                channel.put(array, timeout=0.05)
    channel.put("last", timeout=10)
    until(lambda: not sd.remotecall_fetch(_waiting, second))
    while channel.take(timeout=10) is not None and len(channel):
        pass
    channel.put(shared, timeout=10)
    assert channel.take(timeout=10)[0] == 1


def _has_entry(rrid):
    return current_node().counts.refs.get(rrid) is not None


def _waiting():
    return sorted(current_node().requests.waiting)


def test_an_interrupt_while_the_answer_is_awaited(fresh, monkeypatch):
    monkeypatch.setattr(base, "ANSWER_GRACE_SECONDS", 60)
    [pid] = fresh()
    channel = sd.RemoteChannel(lambda: sd.Channel(5), pid)
    channel.put("item")
    with stopped(pid):
        timer = threading.Timer(
            0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        )
        timer.start()
        with within(10), pytest.raises(KeyboardInterrupt):
            channel.take(timeout=0)
        timer.join()
    assert channel.take(timeout=5) == "item"


def test_a_pool_whose_owner_stands_still(fresh):
    [pid] = fresh()
    pool = sd.remotecall_fetch(lambda: sd.WorkerPool([1]), pid)
    assert pool.isready(timeout=0) and sd.isready(pool, timeout=0) and pool.workers(timeout=0) == [1]
    with stopped(pid):
        for operation in (
            lambda: sd.isready(pool, timeout=0.02),
            lambda: pool.isready(timeout=0.02),
            lambda: pool.workers(timeout=0.02),
            lambda: pool.push(1, timeout=0.02),
            lambda: pool.put(1, timeout=0.02),
            lambda: pool.take(timeout=0.02),
            lambda: pool.wait(timeout=0.02),
        ):
            with within(5), pytest.raises(TimeoutError):
                operation()
    assert pool.take(timeout=5) == 1  # on loan to nobody
    pool.put(1, timeout=5)
    pool.push(pid, timeout=5)
    assert pool.workers(timeout=5) == [1, pid] and len(pool) == 2
    with pytest.raises(ValueError, match="no process 999"):
        pool.push(999, timeout=5)
    assert pickle.loads(pickle.dumps(pool)) is not None


def test_local_pools_take_timeouts_too(cluster):
    for pool in (sd.WorkerPool(cluster[:1]), sd.CachingPool(cluster[:1])):
        assert pool.isready(timeout=1) and sd.isready(pool, timeout=1)
        pool.push(cluster[1], timeout=1)
        assert pool.workers(timeout=1) == cluster[:2]
        pool.put(pool.take(timeout=1), timeout=1)
        sd.wait(pool, timeout=1)


def test_time_passes_for_who_waits(cluster):
    """A timeout that is not up yet is not cut short."""
    channel = sd.RemoteChannel(lambda: sd.Channel(5), cluster[0])
    timer = threading.Timer(0.2, channel.put, ["late"])
    begun = time.monotonic()
    timer.start()
    assert channel.take(timeout=10) == "late"
    assert time.monotonic() - begun >= 0.2
    timer.join()
