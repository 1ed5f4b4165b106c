"""Futures that are awaited, subscribed to, or held by one another: many cost no thread each, and no more time."""

import asyncio
import concurrent.futures
import os
import threading

import numpy as np
import pytest

import shmdist as sd
from tests.integration import helpers

MANY = 300


def _made_there(n):
    return [sd.Future() for _ in range(n)]


def _put_all(futures):
    for number, future in enumerate(futures):
        future.put([number])


def _by_wait(futures, begin):
    begin()
    _, left = concurrent.futures.wait(futures, timeout=30)
    assert not left
    return [future.result() for future in futures]


def _by_await(futures, begin):
    async def gather():
        awaited = asyncio.gather(*futures)
        begin()
        return await awaited

    return asyncio.run(gather())


def _by_callback(futures, begin):
    called = threading.Semaphore(0)
    for future in futures:
        future.add_done_callback(lambda future: called.release())
    begin()
    assert all(called.acquire(timeout=30) for _ in futures)
    return [future.fetch(timeout=0) for future in futures]


@pytest.mark.parametrize("how", [_by_wait, _by_await, _by_callback])
@pytest.mark.parametrize("where", ["here", "there"])
def test_many_cost_no_thread_each(cluster, how, where):
    futures = _made_there(MANY) if where == "here" else sd.remotecall_fetch(_made_there, cluster[0], MANY)
    threads = []

    def begin():
        for future in futures:
            assert future._state == "PENDING"  # somebody subscribes
        threads.append(threading.active_count())
        if where == "here":
            _put_all(futures)
        else:
            sd.remotecall_fetch(_put_all, cluster[0], futures)

    before = threading.active_count()
    assert how(futures, begin) == [[number] for number in range(MANY)]
    assert threads[0] < before + 20


def test_values_and_errors(cluster):
    def fail():
        raise LookupError("there")

    def make(pid):
        return [sd.remotecall(np.ones, pid, 1 << 16), sd.remotecall(fail, pid), sd.remotecall(int, pid, "7")]

    futures = sd.remotecall_fetch(make, cluster[0], cluster[1])
    assert not concurrent.futures.wait(futures, timeout=30)[1]
    assert futures[0].result().sum() == 1 << 16 and futures[2].result() == 7
    error = futures[1].exception()
    assert isinstance(error, LookupError) and isinstance(error, sd.RemoteException)


def test_the_owner_dies(fresh):
    [pid] = fresh(1)
    futures = sd.remotecall_fetch(_made_there, pid, 20)
    called = threading.Semaphore(0)
    for future in futures:
        future.add_done_callback(lambda future: called.release())
    sd.remote_do(os._exit, pid, 1)
    assert all(called.acquire(timeout=30) for _ in futures)
    assert all(type(future.exception()) is sd.ProcessExitedException for future in futures)


def test_a_callback_that_waits_holds_up_no_other(cluster):
    first, second, third = sd.remotecall_fetch(_made_there, cluster[0], 3)
    seen = threading.Event()
    results = []
    first.add_done_callback(lambda future: results.append((second.fetch(timeout=20), seen.wait(20))))
    third.add_done_callback(lambda future: seen.set())
    first.put(1)
    third.put(3)
    assert seen.wait(20)
    second.put(2)
    helpers.until(lambda: results == [(2, True)], 20.0)


class Counted:
    """Counts how many times it was pickled."""

    times = 0

    def __reduce__(self):
        Counted.times += 1
        return Counted, ()


def test_futures_that_hold_one_another_are_pickled_once_or_twice(cluster):
    held = Counted()
    for _ in range(30):
        future = sd.Future().put([held, None])
        future.fetch()
        held = [future, 1]
    Counted.times = 0
    assert sd.remotecall_fetch(_depth, cluster[0], held) == 30
    assert Counted.times <= 4  # to see whether it can be, and in earnest; by name, and by value


def _depth(held):
    depth = 0
    while isinstance(held, list):
        if not isinstance(held[0], sd.Future):
            break
        held = held[0].fetch()[0]
        depth += 1
    return depth
