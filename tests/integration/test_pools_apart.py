"""Pools when members, owners and functions come and go; everywhere, a second time."""

import contextlib
import gc
import os
import pickle
import random
import signal
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import run_script, settled_state, tell_and_run, until, within


def test_takes_given_up_anywhere_lose_no_worker(cluster):
    pool = sd.WorkerPool(cluster)

    def give_up(seed):
        dice = random.Random(seed)
        for _ in range(100):
            try:
                pid = pool.take(timeout=dice.random() / 1000)
            except TimeoutError:
                continue
            pool.put(pid)

    for future in [sd.remotecall(give_up, pid, pid) for pid in [1, 1, *cluster]]:
        future.fetch(timeout=20)
    assert sorted(pool.take(timeout=5) for _ in cluster) == cluster
    assert not pool.isready()
    for pid in cluster:
        pool.put(pid)


def test_a_take_given_up_is_withdrawn(cluster):
    """Its owner must not keep a thread, or an entry, for each until some worker is free."""
    pool = sd.WorkerPool(cluster[:1])
    pool.take()

    def give_up():
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                pool.take(timeout=0.001)

    before = threading.active_count()
    sd.remotecall_fetch(give_up, cluster[1])
    until(lambda: not sd.remotecall_fetch(settled_state, cluster[1])["unclaimed takes"], 2)
    assert threading.active_count() <= before + 5
    pool.put(cluster[0])
    assert pool.take(timeout=1) == cluster[0]


def test_a_worker_is_not_lost_with_the_process_that_waits_for_it(fresh, cluster):
    pool = sd.WorkerPool(cluster[:1])
    pool.take()
    [waiter] = fresh()
    started = sd.RemoteChannel(lambda: sd.Channel(1))
    future = sd.remotecall(tell_and_run, waiter, started, sd.take, pool)
    os.kill(started.take(timeout=5), signal.SIGKILL)
    with pytest.raises(sd.ProcessExitedException):
        future.fetch(timeout=5)
    pool.put(cluster[0])
    assert pool.take(timeout=2) == cluster[0]


def test_a_pool_whose_owner_is_gone(fresh, cluster):
    [owner] = fresh()
    pool = sd.remotecall_fetch(lambda: sd.WorkerPool(cluster), owner)
    assert pool.workers() == cluster
    with pytest.raises(sd.ProcessExitedException):
        sd.remotecall_fetch(os._exit, owner, 1)
    for use in (
        pool.workers,
        pool.isready,
        pool.take,
        lambda: pool.put(cluster[0]),
        lambda: sd.pmap(abs, [1], pool=pool),
        lambda: sd.remotecall_fetch(abs, pool, 1),
    ):
        with within(2), pytest.raises(sd.ProcessExitedException):
            use()
    assert str(owner) in repr(pool)


def _kept_functions():
    return len(current_node().functions)


def test_a_caching_pool_with_a_new_member(fresh):
    pids = fresh(2)
    pool = sd.CachingPool(pids)
    data = list(range(10))

    def function(x):
        return data[x]

    assert sd.pmap(function, pool, range(10)) == data
    sd.rmprocs(pids[0])
    [new] = fresh()
    pool.push(new)
    assert sd.pmap(function, pool, range(10)) == data
    assert [sd.remotecall_fetch(function, pool, 3) for _ in range(4)] == [3] * 4
    members = pool.workers()
    assert sorted(members) == sorted([pids[1], new])
    del pool
    gc.collect()
    until(lambda: not any(sd.remotecall_fetch(_kept_functions, pid) for pid in members))


def test_nested_in_a_thread_of_the_call(cluster):
    """The call's own thread waits for another one of its own: the pool of one is still its worker's."""
    pool = sd.WorkerPool(cluster[:1])

    def outer():
        return sd.async_(_ask, pool).fetch(timeout=3)

    assert sd.remotecall_fetch(outer, pool) == cluster[0]


def _ask(pool):
    return sd.remotecall_fetch(sd.myid, pool)


def test_process_1_is_lent_while_the_first_workers_come():
    script = """
import threading, shmdist as sd
pool = sd.default_worker_pool()
for call in (sd.remotecall_fetch, sd.remotecall_wait):
    assert pool.workers() == [1]
    gate = threading.Event()
    task = sd.async_(call, lambda: gate.wait(10), pool)
    assert sd.timedwait(lambda: not pool.isready(), 5, 0.001) == "ok"
    with sd.addprocs(1) as pids:
        gate.set()
        assert sd.fetch(task.fetch(timeout=5)) is True
        assert pool.workers() == list(pids)
taken = pool.take()
with sd.addprocs(1):
    pool.put(taken)
print("fine")
"""
    assert run_script(script).clean() == "fine\n"


def test_nested_in_any_thread_and_on_process_1(cluster):
    def outer(pool):
        got = []
        thread = threading.Thread(target=lambda: got.append(_ask(pool)))
        thread.start()
        thread.join(5)
        return got

    pool = sd.WorkerPool(cluster[:1])
    assert sd.remotecall_fetch(outer, pool, pool) == cluster[:1]
    for pool in (sd.WorkerPool([1]), sd.CachingPool([1])):
        task = sd.async_(sd.remotecall_fetch, lambda pool=pool: _ask(pool), pool)
        assert task.fetch(timeout=5) == 1
        task = sd.async_(sd.remotecall_fetch, lambda pool=pool: sd.async_(_ask, pool).fetch(), pool)
        assert task.fetch(timeout=5) == 1
        future = sd.remotecall(lambda pool=pool: sd.async_(_ask, pool).fetch(), pool)
        assert future.fetch(timeout=5) == 1
        until(pool.isready)


def test_calls_that_are_not_nested_wait_for_a_free_worker(cluster):
    sd.everywhere("import threading; alone = threading.Lock()", cluster)
    pool = sd.WorkerPool(cluster[:2])

    def job():
        import __main__

        if not __main__.alone.acquire(blocking=False):
            return False
        os.sched_yield()
        __main__.alone.release()
        return True

    def many():
        return all([sd.remotecall_fetch(job, pool) for _ in range(50)])

    tasks = [sd.async_(many) for _ in range(4)] + [sd.remotecall(many, cluster[2]) for _ in range(2)]
    assert all([task.fetch(timeout=20) for task in tasks])


def test_what_a_process_had_comes_back_when_it_dies(fresh, cluster):
    pool = sd.WorkerPool(cluster)
    started = sd.RemoteChannel(lambda: sd.Channel(9))
    [taker] = fresh()
    block = sd.RemoteChannel()

    def hold():
        pool.take()
        sd.remotecall(block.fetch, pool)
        sd.async_(sd.remotecall_fetch, block.fetch, pool)
        until(lambda: not pool.isready())
        started.put(os.getpid())
        block.fetch()

    sd.remote_do(hold, taker)
    ospid = started.take(timeout=5)
    assert not pool.isready()
    os.kill(ospid, signal.SIGKILL)
    assert sorted(pool.take(timeout=5) for _ in cluster) == cluster
    block.put(None)


def test_interrupted_calls_on_a_pool_lose_no_worker(cluster):
    pools = [sd.WorkerPool(cluster), sd.remotecall_fetch(lambda: sd.WorkerPool(cluster), cluster[0])]

    def calls():
        while True:
            for pool in pools:
                sd.remotecall_fetch(abs, pool, -1)
                sd.remotecall(abs, pool, -1).wait()
                pool.wait()

    dice = random.Random(7)
    for round_ in range(30):
        future = sd.remotecall(calls, [1, *cluster][round_ % 4])
        with contextlib.suppress(TimeoutError):
            future.fetch(timeout=dice.random() / 100)
        future.cancel()
        with pytest.raises((sd.RemoteException, sd.Cancelled)):
            future.fetch(timeout=5)
    for pool in pools:
        assert sorted(pool.take(timeout=5) for _ in cluster) == cluster
        assert not pool.isready()


def test_a_worker_given_back_twice_is_free_once(cluster):
    pool = sd.WorkerPool(cluster[:1])
    pid = pool.take()
    pool.put(pid)
    pool.put(pid)
    assert pool.take(timeout=1) == pid and not pool.isready()


def test_pools_that_are_dropped_leave_no_hook(cluster):
    hooks = current_node().peers.lost_hooks
    before = len(hooks)
    pools = [kind(cluster) for kind in (sd.WorkerPool, sd.CachingPool)]
    assert len(hooks) == before + 2
    del pools
    until(lambda: gc.collect() >= 0 and len(hooks) == before)


def test_clear_waits_for_the_calls_that_need_the_function(cluster):
    done = sd.RemoteChannel(lambda: sd.Channel(100))
    pool = sd.CachingPool(cluster)
    futures = [sd.remotecall(lambda x: x, pool, number) for number in range(30)]
    sd.clear(pool)
    assert [future.fetch(timeout=5) for future in futures] == list(range(30))
    for number in range(30):
        sd.remote_do(done.put, sd.CachingPool(cluster), number)  # the pool is gone at once
    assert sorted(done.take(timeout=5) for _ in range(30)) == list(range(30))


def test_a_function_that_was_sent_and_never_read_lets_its_references_go(cluster):
    pool = sd.CachingPool(cluster[:1])

    def function(_):
        return captured

    captured = sd.RemoteChannel(cluster[1])
    with pytest.raises(sd.SerializationError):
        sd.remotecall_fetch(function, pool, threading.Lock())
    pool.clear()  # the rest is for the fixture to see


class Doubler:
    def double(self, x):
        return 2 * x


def test_a_method_is_one_function(cluster):
    pool = sd.CachingPool(cluster)
    doubler = Doubler()
    assert [sd.remotecall_fetch(doubler.double, pool, x) for x in range(5)] == [0, 2, 4, 6, 8]
    assert "1 functions" in repr(pool)


def test_a_caching_pool_as_the_default_of_all(cluster, fresh):
    [new] = fresh()  # it has not asked for the default pool yet
    before = sd.default_worker_pool()
    sd.set_default_worker_pool(sd.CachingPool(cluster[:1]))
    try:
        assert sd.remotecall_fetch(lambda: sd.remote(sd.myid)(), new) == cluster[0]
    finally:
        sd.set_default_worker_pool(before)


def test_who_waits_when_the_last_worker_leaves_gets_process_1():
    script = """
import shmdist as sd
pids = sd.addprocs(2)
pool = sd.default_worker_pool()
taken = [pool.take(), pool.take()]
task = sd.async_(pool.take)
assert sd.timedwait(lambda: pool._state._takers, 5, 0.001) == "ok"
sd.rmprocs(*pids)
assert task.fetch(timeout=5) == 1 and pool.workers() == [1]
for pid in [*taken, 1]:
    pool.put(pid)
assert pool.take(timeout=1) == 1
print("fine")
"""
    assert run_script(script).clean() == "fine\n"


def test_a_pool_pickled_outside_is_inert(cluster):
    inert = pickle.loads(pickle.dumps(sd.WorkerPool(cluster)))
    assert "WorkerPool" in repr(inert)
    for use in (inert.take, inert.wait, inert.workers, inert.isready):
        with pytest.raises(sd.ShmdistError, match="outside a cluster"):
            use()


def test_bindings_of_a_def_are_those_of_the_last_time(cluster):
    def scaled():
        return binding_of_a_def  # noqa: F821 - bound below

    for value in (2, 3):
        sd.everywhere(scaled, None, binding_of_a_def=value)
        assert {sd.remotecall_eval("__main__", pid, "scaled()") for pid in [1, *cluster]} == {value}


def test_a_helper_that_was_sent_along_may_change():
    """As in a notebook whose cells are run again: old code must not stay behind on the workers."""
    script = """
import shmdist as sd
sd.addprocs(1)
for answer in (1, 2):
    exec(f"def helper(): return {answer}")
    @sd.everywhere
    def user():
        return helper()
    assert sd.remotecall_eval("__main__", 2, "user()") == user() == answer, answer
sd.everywhere("helper = lambda: 'its own'", [2])
sd.everywhere(user)
assert sd.remotecall_eval("__main__", 2, "user()") == "its own"
print("fine")
"""
    assert run_script(script).clean() == "fine\n"


class Counted:
    pickled = 0

    def __reduce__(self):
        type(self).pickled += 1
        return int, ()


def test_bindings_are_pickled_once_for_all(cluster):
    Counted.pickled = 0
    sd.everywhere("pass", cluster, big=Counted())
    assert Counted.pickled == 1


def test_everywhere_runs_side_by_side(cluster):
    barrier = sd.RemoteChannel(lambda: sd.Channel(9))
    gate = sd.RemoteChannel(lambda: sd.Channel(9))
    task = sd.async_(
        lambda: sd.everywhere("barrier.put(1); gate.take()", cluster, barrier=barrier, gate=gate)
    )
    for _ in cluster:
        barrier.take(timeout=5)
    for _ in cluster:
        gate.put(None)
    task.wait(timeout=5)
    sd.everywhere("del barrier, gate", cluster)


def test_a_worker_that_dies_under_everywhere_is_one_of_its_errors(fresh, cluster):
    [pid] = fresh()
    with pytest.raises(sd.CompositeException) as caught:
        sd.everywhere(f"import os, shmdist\nif shmdist.myid() == {pid}: os._exit(1)\nwent_on = 1")
    [error] = caught.value.exceptions
    assert isinstance(error, sd.ProcessExitedException) and error.pid == pid
    assert [sd.everywhere("went_on", other) for other in cluster] == [1] * len(cluster)


def test_sync_waits_for_all_whatever_ends_one(cluster):
    gate, ended = threading.Event(), []

    def last():
        ended.append(gate.wait(10))

    with pytest.raises(BaseException) as caught, sd.sync():
        sd.async_(exit_thread)
        sd.async_(last)
        threading.Timer(0.1, gate.set).start()
    assert ended == [True] and not isinstance(caught.value, AssertionError)


def exit_thread():
    raise SystemExit(3)
