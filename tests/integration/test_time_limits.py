"""Timeouts of any size, on everything that waits; and no item is lost to one."""

import math
import random
import threading
import time

import pytest

import shmdist as sd
from tests.integration.helpers import within

LONG = (3_000_000, 1e10, 1e18, math.inf)


def _things(pid):
    """Everything that waits, each with what makes it wait no more."""
    channel = sd.RemoteChannel(lambda: sd.Channel(4), pid)
    channel.put("item")
    local = sd.Channel(4)
    local.put("item")
    pool, caching = sd.WorkerPool([pid]), sd.CachingPool([pid])
    call = sd.remotecall(abs, pid, -1)
    future, task = sd.Future(pid).put(1), sd.async_(abs, -1)
    given = sd.remotecall(abs, 1, -2)
    return [
        call.wait,
        call.fetch,
        call.result,
        call.exception,
        call.isready,
        given.wait,
        given.fetch,
        future.wait,
        future.isready,
        future.fetch,
        task.wait,
        task.fetch,
        task.result,
        task.exception,
        channel.wait,
        channel.fetch,
        channel.isready,
        channel.isempty,
        channel.isopen,
        lambda timeout: channel.put("more", timeout=timeout),
        channel.take,
        local.wait,
        local.fetch,
        lambda timeout: local.put("more", timeout=timeout),
        local.take,
        pool.wait,
        pool.isready,
        lambda timeout: pool.put(pool.take(timeout), timeout),
        caching.wait,
        lambda timeout: caching.put(caching.take(timeout), timeout),
        lambda timeout: sd.fetch([future, channel, 5], timeout=timeout),
        lambda timeout: sd.wait((future, channel, pool), timeout=timeout),
        lambda timeout: sd.timedwait(lambda: True, timeout),
    ]


@pytest.mark.parametrize("where", ["here", "worker"])
def test_of_any_size(cluster, where):
    pid = 1 if where == "here" else cluster[0]
    for timeout in LONG:
        with within(10):
            for wait in _things(pid):
                wait(timeout=timeout)
    for wrong, kind in ((math.nan, ValueError), ("1", TypeError)):
        for wait in _things(pid):
            if (
                getattr(wait, "__self__", None).__class__.__name__.endswith("Pool")
                and wait.__name__ == "isready"
            ):
                continue  # known here, and told at once
            with pytest.raises(kind, match="timeout"):
                wait(timeout=wrong)


def test_long_ones_end_with_what_they_wait_for(cluster):
    for timeout in LONG:
        gate = threading.Event()
        channel = sd.RemoteChannel(lambda: sd.Channel(1), cluster[0])
        waiting = [sd.async_(channel.take, timeout), sd.async_(sd.remotecall(gate.wait, 1, 5).fetch, timeout)]
        while not all(task.running() for task in waiting):
            time.sleep(0)
        channel.put("item")
        gate.set()
        assert [task.fetch(timeout=5) for task in waiting] == ["item", True]


def test_negative_ones_are_tries(cluster):
    for channel in (sd.Channel(1), sd.RemoteChannel(lambda: sd.Channel(1), cluster[0])):
        with within(1), pytest.raises(TimeoutError):
            channel.take(timeout=-1)
        channel.put("item", timeout=-5)
        with within(1), pytest.raises(TimeoutError):
            channel.put("another", timeout=-1)
        assert channel.take(timeout=-math.inf) == "item"


def test_of_removal(fresh):
    pids = fresh(3)
    sd.rmprocs(pids[0], waitfor=math.inf)
    sd.rmprocs(pids[1], waitfor=1e18)
    for wrong, kind in ((math.nan, ValueError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match="waitfor"):
            sd.rmprocs(pids[2], waitfor=wrong)
    assert sd.remotecall_fetch(abs, pids[2], -1) == 1


@pytest.mark.parametrize("where", ["here", "local", "worker"])
def test_no_item_is_lost_to_one(cluster, where):
    """Takers and putters with short random limits: each number that was put is taken once, no other is."""
    owner = {"here": 1, "worker": cluster[0]}.get(where)
    channel = sd.Channel(2) if owner is None else sd.RemoteChannel(lambda: sd.Channel(2), owner)
    put, taken, over = [], [], threading.Event()

    def putter(first):
        dice = random.Random(first)
        for n in range(first, first + 150):
            try:
                channel.put(n, timeout=dice.choice((0, dice.random() / 2000)))
            except TimeoutError:
                continue
            put.append(n)

    def taker(seed):
        dice = random.Random(seed)
        while True:
            ending = over.is_set()
            try:
                taken.append(channel.take(timeout=dice.choice((0, dice.random() / 2000))))
            except TimeoutError:
                if ending:
                    return

    putters = [threading.Thread(target=putter, args=(1000 * n,)) for n in range(3)]
    takers = [threading.Thread(target=taker, args=(n,)) for n in range(3)]
    for thread in putters + takers:
        thread.start()
    for thread in putters:
        thread.join(30)
    over.set()
    for thread in takers:
        thread.join(30)
    assert put and sorted(taken) == sorted(put)
