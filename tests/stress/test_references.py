"""References passed about a thousand times; nothing is left in any table."""

import gc
import os
import random
import signal
import threading

import shmdist as sd
from tests.integration.helpers import reference_count, until


def _pass_on(ref, path):
    return sd.remotecall_fetch(_pass_on, path[0], ref, path[1:]) if path else ref


def _throw_on(ref, path):
    if path:
        sd.remote_do(_throw_on, path[0], ref, path[1:])


def _left(pids):
    gc.collect()
    return {pid: sd.remotecall_fetch(reference_count, pid) for pid in pids}


def test_a_thousand_times_round_a_ring_of_four(cluster, fresh):
    ring = [*cluster[:3], *fresh(1)]
    before = _left([1, *ring])
    for n in range(500):
        ref = sd.Future(ring[n % 4]) if n % 2 else sd.RemoteChannel(ring[n % 4])
        start = random.randrange(4)
        path = ring[start:] + ring[:start]
        assert sd.remotecall_fetch(_pass_on, path[0], ref, path[1:] + path[:1]) == ref
    for n in range(500):
        ref = sd.remotecall(list, ring[n % 4], "ab")
        sd.remote_do(_throw_on, ring[(n + 1) % 4], ref, [random.choice(ring) for _ in range(5)])
    del ref
    until(lambda: _left([1, *ring]) == before, 20)


def _pass_about_and_kill(pid, owners, among):
    """Have references of `owners` go about `among` others and `pid`, which is killed amid that."""
    ospid = sd.remotecall_fetch(os.getpid, pid)
    stop = threading.Event()

    def pass_about():
        while not stop.is_set():
            try:
                ref = sd.remotecall(list, random.choice(owners), "ab")
                first, *path = among()
                sd.remote_do(_throw_on, first, ref, path)
                sd.RemoteChannel(pid)
            except sd.ProcessExitedException:
                return

    threads = [threading.Thread(target=pass_about) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: sd.remotecall_fetch(reference_count, pid) > 5, 5)
    os.kill(ospid, signal.SIGKILL)
    stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_holders_that_are_killed_in_between(cluster, fresh):
    before = _left([1, *cluster])
    for _ in range(10):
        [pid] = fresh()
        _pass_about_and_kill(pid, cluster, lambda pid=pid: [*random.choices(cluster, k=3), pid])
    until(lambda: _left([1, *cluster]) == before, 20)


def test_forwarders_that_are_killed_in_between(cluster, fresh):
    """One killed between a count and what it counts leaves no count, though its receivers live on."""
    before = _left([1, *cluster])
    receivers = fresh(2)
    for _ in range(10):
        [pid] = fresh()
        _pass_about_and_kill(
            pid,
            cluster,
            lambda pid=pid: [random.choice([pid, *cluster]), pid, *random.sample(receivers, 2), pid],
        )
    until(lambda: _left([1, *cluster]) == before, 20)


def test_items_of_channels_under_timeouts(cluster):
    """Takes that give up at any moment, from all processes: each item comes exactly once."""

    def take_all(channel):
        got = []
        while True:
            try:
                got.append(channel.take(timeout=random.random() / 500))
            except TimeoutError:
                continue
            except sd.ChannelClosed:
                return got

    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(lambda: sd.Channel(3), where)
        takers = [sd.remotecall(take_all, pid, channel) for pid in [1, 1, *cluster]]
        for n in range(2000):
            channel.put(n, timeout=20)
        until(lambda channel=channel: len(channel) == 0, 20)
        # An item on its way back to the channel when it closes must not be lost either.
        threading.Event().wait(0.1)
        channel.close()
        got = [item for taker in takers for item in taker.fetch(timeout=20)]
        assert sorted(got) == list(range(2000))
