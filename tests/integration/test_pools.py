"""Worker pools, caching pools, the default pool, and clear."""

import contextlib
import operator
import os
import signal
import threading

import pytest

import shmdist as sd
from tests.integration.helpers import until, within


def whom():
    return sd.myid()


def test_a_pool_lends_and_takes_back(cluster):
    pool = sd.WorkerPool(cluster[:2])
    assert pool.workers() == cluster[:2] and len(pool) == 2 and sd.isready(pool)
    taken = [sd.take(pool), pool.take()]
    assert sorted(taken) == cluster[:2] and not pool.isready() and len(pool) == 2
    with within(2), pytest.raises(TimeoutError):
        pool.take(timeout=0.02)
    sd.put(pool, taken[0])
    sd.wait(pool)
    assert pool.take(timeout=1) == taken[0]
    pool.push(cluster[2])
    assert pool.take(timeout=1) == cluster[2] and len(pool) == 3


def test_wrong_workers(cluster):
    pool = sd.WorkerPool()
    with pytest.raises(ValueError, match="no process 999"):
        pool.push(999)
    with pytest.raises(ValueError, match="not of this pool"):
        pool.put(cluster[0])
    with pytest.raises(sd.ShmdistError, match="no workers"):
        pool.take()


def test_a_pool_is_used_from_other_processes(cluster):
    pool = sd.WorkerPool(cluster[:1])

    def borrow():
        pid = pool.take(timeout=5)
        free = pool.isready()
        pool.put(pid)
        return pid, free, len(pool), pool.workers()

    for pid in cluster:
        assert sd.remotecall_fetch(borrow, pid) == (cluster[0], False, 1, [cluster[0]])
    assert pool.isready()


def test_a_call_on_a_pool_has_its_worker_till_its_end(cluster):
    pool = sd.WorkerPool(cluster[:1])
    gate = sd.RemoteChannel(lambda: sd.Channel(1))
    future = sd.remotecall(gate.take, pool)
    assert not pool.isready()
    gate.put("through")
    assert future.fetch(timeout=5) == "through"
    assert pool.isready()
    assert sd.remotecall_fetch(whom, pool) == cluster[0] == sd.remotecall_wait(whom, pool).fetch()
    assert sd.remote(pool, whom)() == cluster[0]
    with pytest.raises(ZeroDivisionError):
        sd.remotecall_fetch(lambda: 1 / 0, pool)
    with pytest.raises(sd.SerializationError):
        sd.remotecall(threading.Lock().acquire, pool)
    assert pool.isready()
    sd.remote_do(whom, pool)
    assert pool.isready()


@pytest.mark.parametrize("kind", [sd.WorkerPool, sd.CachingPool])
@pytest.mark.parametrize("here", [False, True])
def test_who_hears_of_a_calls_end_finds_its_worker_free(cluster, kind, here):
    """Whatever it ended with, whoever of the threads has read that, and by whatever face it is heard."""
    pool = kind([1] if here else cluster[:1])
    seen = []

    def look(how):
        for number in range(150):
            future = sd.remotecall(operator.truediv, pool, 1, number % 2)
            how(future)
            seen.append(len(pool._state._items) == 1)

    def face(future):
        assert future.exception(timeout=5) is None or isinstance(future.exception(), ZeroDivisionError)

    def fetch(future):
        with contextlib.suppress(ZeroDivisionError):
            assert future.fetch(timeout=5) == 1

    stop = threading.Event()
    threads = [threading.Thread(target=_call_until, args=(stop, cluster[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with within(20):
            look(fetch)
            look(face)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(seen) == 300 and all(seen)


def test_no_dead_worker_is_lent(fresh):
    """To who waits when it dies in a call of the pool's."""
    pids = fresh(2)
    pool = sd.WorkerPool(pids)
    gate = sd.RemoteChannel(lambda: sd.Channel(1))
    busy = [sd.remotecall(gate.take, pool) for _ in pids]
    waiting = [sd.async_(sd.remotecall_fetch, whom, pool) for _ in range(4)]
    until(lambda: len(pool._state._takers) == 4)
    os.kill(sd.remotecall_fetch(os.getpid, pids[0]), signal.SIGKILL)
    with pytest.raises(sd.ProcessExitedException):
        busy[0].fetch(timeout=5)
    until(lambda: pool.workers() == pids[1:])
    assert len(pool._state._takers) == 4
    gate.put("through")
    assert busy[1].fetch(timeout=5) == "through"
    assert [each.fetch(timeout=5) for each in waiting] == pids[1:] * 4
    assert pool.isready()


def test_who_reads_waits_for_nobody(cluster):
    """Other processes that wait for a worker are told by another thread, and the lock is not waited for."""
    state = sd.WorkerPool(cluster[:1])._state
    told = []

    class Elsewhere:
        borrower = cluster[1]

        def resolve(self, pid):
            told.append((pid, threading.get_ident()))

    pid = state.take(1)
    state.take_async(Elsewhere())
    assert state.give_back_from_reader(pid)
    until(lambda: told)
    assert told[0][0] == pid and told[0][1] != threading.get_ident()
    with state._lock, within(1):
        assert not state.give_back_from_reader(pid)
    assert state.loans == {pid: [cluster[1]]}


def _call_until(stop, pid):
    while not stop.is_set():
        assert sd.remotecall_fetch(abs, pid, -1) == 1


def test_nested_calls_on_a_pool_of_one(cluster):
    pool = sd.WorkerPool(cluster[:1])

    def outer(depth):
        return 1 + sd.remotecall_fetch(outer, pool, depth - 1) if depth else 0

    with within(5):
        assert sd.remotecall_fetch(outer, pool, 3) == 3
    assert pool.isready()


def test_the_dead_leave_their_pools(fresh):
    pids = fresh(2)
    pool, caching = sd.WorkerPool(pids), sd.CachingPool(pids)
    sd.rmprocs(pids[0])
    until(lambda: pool.workers() == caching.workers() == pids[1:])
    assert pool.take(timeout=1) == pids[1]
    waiting = sd.async_(pool.take)
    sd.rmprocs(pids[1])
    with pytest.raises(sd.ShmdistError, match="no workers"):
        waiting.fetch(timeout=5)


class Captured:
    """Notes each time that it is read."""

    def __init__(self, loads):
        self.loads = loads

    def __reduce__(self):
        return _read, (self.loads,)


def _read(loads):
    loads.put(sd.myid())
    return Captured(loads)


def test_a_caching_pool_sends_a_function_once_to_each_worker(cluster):
    pool = sd.CachingPool(cluster)
    loads = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    big = Captured(loads)

    def function(x):
        return big is not None and x

    for x in range(1, 10):
        assert sd.remotecall_fetch(function, pool, x) == x
        assert sd.remotecall(function, pool, x).fetch() == x
    assert sd.pmap(function, pool, range(1, 50)) == list(range(1, 50))
    assert sd.pmap(function, pool, range(1, 50)) == list(range(1, 50))
    read = sorted(loads.take() for _ in range(len(loads)))
    assert len(read) <= 2 * len(cluster)  # once for calls, once for maps
    assert sd.clear(pool) is pool
    assert sd.remotecall_fetch(function, pool, 5) == 5
    assert len(loads) == 1
    pool.clear()
    with pytest.raises(sd.SerializationError):
        sd.remotecall_fetch(len, cluster[0], pool)


def test_clear_globals(cluster):
    sd.everywhere("cleared_a, cleared_b, kept = 1, 2, 3")
    sd.clear(["cleared_a", "cleared_b", "never_there"], cluster[:2])
    assert sd.remotecall_eval("__main__", cluster[0], "(cleared_a, cleared_b, kept)") == (None, None, 3)
    assert sd.remotecall_eval("__main__", cluster[2], "cleared_a") == 1
    sd.clear("cleared_a")
    assert sd.remotecall_eval("__main__", cluster[2], "cleared_a") is None


def test_the_default_pool_follows_the_cluster(cluster, fresh):
    assert sd.default_worker_pool().workers() == sd.workers()
    added = fresh(1)
    assert added[0] in sd.default_worker_pool().workers()
    assert sd.remotecall_fetch(lambda: sd.default_worker_pool().workers(), cluster[0]) == sd.workers()
    sd.rmprocs(*added)
    until(lambda: added[0] not in sd.default_worker_pool().workers())
    assert sd.remote(whom)() in cluster


def test_another_default_pool(cluster):
    before = sd.default_worker_pool()
    sd.set_default_worker_pool(sd.WorkerPool(cluster[:1]))
    try:
        assert sd.remote(whom)() == cluster[0] and set(sd.pmap(lambda _: sd.myid(), range(9))) == {cluster[0]}
    finally:
        sd.set_default_worker_pool(before)
    with pytest.raises(TypeError, match="worker pool"):
        sd.set_default_worker_pool(5)


class Own(sd.AbstractWorkerPool):
    """A pool of one's own."""

    def __init__(self, pids):
        self.free, self.all = list(pids), list(pids)
        self.lent = 0

    def push(self, pid):
        self.all.append(pid)
        self.free.append(pid)

    def put(self, pid, timeout=None):
        self.free.append(pid)

    def take(self, timeout=None):
        self.lent += 1
        return self.free.pop()

    def workers(self):
        return list(self.all)

    def isready(self):
        return bool(self.free)


def test_a_pool_of_ones_own(cluster):
    pool = Own(cluster[:1])
    assert sd.remotecall_fetch(whom, pool) == cluster[0] and pool.lent == 1 and pool.isready()
    assert sd.remote(pool, whom)() == cluster[0]
    assert set(sd.pmap(lambda _: sd.myid(), range(5), pool=pool)) == {cluster[0]}
    assert len(pool) == 1


def test_spawn_goes_where_least_is_to_do(cluster):
    gate = sd.RemoteChannel(lambda: sd.Channel(9))
    busy = [sd.spawnat(pid, gate.take) for pid in cluster[1:] for _ in range(2)]
    assert [sd.spawn(whom).fetch(timeout=5) for _ in range(4)] == [cluster[0]] * 4
    for _ in busy:
        gate.put(None)
    for future in busy:
        future.wait(timeout=5)
    assert {sd.spawn(whom).fetch(timeout=5) for _ in range(30)} == set(cluster)
