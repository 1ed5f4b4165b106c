"""Many at once, and death, signals and stops at any moment."""

import gc
import os
import random
import signal
import threading
import time

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import reference_count, settled_state, sleep_long, until, within


def add_one(x):
    return x + 1


def test_a_thousand_blocked_calls(cluster):
    gate = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    futures = [sd.remotecall(gate.take, cluster[0]) for _ in range(1000)]
    with within(5):
        assert sd.remotecall_fetch(add_one, cluster[0], 1) == 2
    for n in range(1000):
        gate.put(n)
    assert sorted(future.fetch(timeout=30) for future in futures) == list(range(1000))


def test_a_thousand_sleeping_calls(cluster):
    futures = [sd.remotecall(time.sleep, cluster[0], 1.5) for _ in range(1000)]
    with within(5):
        assert sd.remotecall_fetch(add_one, cluster[0], 1) == 2
    with within(15):
        for future in futures:
            future.wait(timeout=15)


def test_eight_threads_at_once(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(50), cluster[1])
    errors = []

    def work(n):
        dice = random.Random(n)
        try:
            for i in range(60):
                pid = dice.choice(cluster)
                kind = dice.randrange(5)
                if kind == 0:
                    assert sd.remotecall_fetch(add_one, pid, i) == i + 1
                elif kind == 1:
                    channel.put(i)
                    channel.take(timeout=10)
                elif kind == 2:
                    assert sd.remotecall(list, pid, "ab").fetch(timeout=10) == ["a", "b"]
                elif kind == 3:
                    assert sd.pmap(add_one, range(20)) == list(range(1, 21))
                else:
                    with pytest.raises(ZeroDivisionError):
                        sd.remotecall_fetch(divmod, pid, 1, 0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    with within(40):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
    assert not errors, errors


def pass_on(ref, pids, rounds):
    """Hand a reference to the next worker of the ring, and forget it."""
    if rounds:
        return sd.remotecall_fetch(pass_on, pids[rounds % len(pids)], ref, pids, rounds - 1)
    return ref.fetch()


def test_references_round_a_ring(fresh):
    ring = list(fresh(4))
    for n in range(1000):
        ref = sd.remotecall(list, ring[n % 4], "ab")
        assert sd.remotecall_fetch(pass_on, ring[(n + 1) % 4], ref, ring, 4) == ["a", "b"]
        del ref
    gc.collect()
    until(lambda: not any(sd.remotecall_fetch(reference_count, pid) for pid in ring))
    for pid in ring:
        state = sd.remotecall_fetch(settled_state, pid)
        assert not any(state[key] for key in state if key != "descriptors"), state


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_it_receives_or_sends_256_mib(fresh, moment):
    numpy = pytest.importorskip("numpy")
    victim, other = fresh(2)
    ospid = sd.remotecall_fetch(os.getpid, victim)
    big = numpy.ones(256 << 20, dtype="u1")
    send = (lambda: sd.remotecall_fetch(len, victim, big)) if moment % 2 else None
    fetch = lambda: sd.remotecall_fetch(lambda: __import__("numpy").ones(256 << 20, dtype="u1"), victim)  # noqa: E731
    timer = threading.Timer(0.02 * (1 + moment), os.kill, (ospid, signal.SIGKILL))
    timer.start()
    try:
        with within(8):
            for _ in range(50):
                (send or fetch)()
            pytest.fail("it was not killed")
    except sd.ProcessExitedException as error:
        assert error.signal == "SIGKILL" and error.pid == victim
    timer.join()
    assert sd.remotecall_fetch(add_one, other, 1) == 2
    until(lambda: victim not in sd.procs())


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_of_a_map(fresh, seed):
    pids = list(fresh(3))
    ospids = {pid: sd.remotecall_fetch(os.getpid, pid) for pid in pids}
    dice = random.Random(seed)
    doomed = dice.sample(pids, 2)
    timers = [threading.Timer(dice.random() * 0.15, os.kill, (ospids[p], signal.SIGKILL)) for p in doomed]
    for timer in timers:
        timer.start()
    elements = 3000
    with within(20):
        got = sd.pmap(
            lambda i: (time.sleep(1e-4), i)[1],
            range(elements),
            pool=sd.WorkerPool(pids),
            retry_delays=[0] * 3,
        )
    for timer in timers:
        timer.join()
    assert got == list(range(elements))
    until(lambda: set(sd.workers()).isdisjoint(doomed))


@pytest.mark.parametrize("seed", range(4))
def test_killed_amid_channel_traffic(fresh, cluster, seed):
    victim, sender = fresh(2)
    channel = sd.RemoteChannel(lambda: sd.Channel(5), cluster[0])
    mine = sd.RemoteChannel(lambda: sd.Channel(5), cluster[1])
    ospid = sd.remotecall_fetch(os.getpid, victim)

    def feed(channel, n):
        for i in range(n):
            channel.put(i)

    def drain(channel):
        while True:
            channel.take()

    eater = sd.remotecall(drain, victim, channel)
    feeder = sd.remotecall(feed, sender, channel, 10**9)
    whole = sd.remotecall(feed, cluster[2], mine, 500)
    timer = threading.Timer(random.Random(seed).random() * 0.2, os.kill, (ospid, signal.SIGKILL))
    timer.start()
    assert [mine.take(timeout=10) for _ in range(500)] == list(range(500))
    whole.wait(timeout=5)
    timer.join()
    with pytest.raises(sd.ProcessExitedException):
        eater.fetch(timeout=5)
    sd.interrupt(sender)
    with pytest.raises(sd.RemoteException, match="KeyboardInterrupt"):
        feeder.fetch(timeout=5)
    while channel.isready():
        channel.take(timeout=1)


def test_a_stopped_worker_holds_up_nobody(fresh):
    stopped, other = fresh(2)
    ospid = sd.remotecall_fetch(os.getpid, stopped)
    os.kill(ospid, signal.SIGSTOP)
    try:
        waiting = [sd.remotecall(add_one, stopped, n) for n in range(10)]
        with within(2), pytest.raises(TimeoutError):
            waiting[0].fetch(timeout=0.2)
        with within(5):
            assert sd.pmap(add_one, range(500), pool=sd.WorkerPool([other])) == list(range(1, 501))
        blocked = sd.async_(sd.remotecall_fetch, len, stopped, bytes(50 << 20))  # more than the socket takes
        with within(5):
            assert [sd.remotecall_fetch(add_one, other, n) for n in range(100)] == list(range(1, 101))
    finally:
        os.kill(ospid, signal.SIGCONT)
    assert [future.fetch(timeout=5) for future in waiting] == list(range(1, 11))
    assert blocked.fetch(timeout=10) == 50 << 20


def test_ctrl_c_at_any_moment(cluster):
    """What was interrupted is gone, the rest is whole: fifty times."""
    channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")), cluster[0])
    dice = random.Random(7)
    waits = [
        lambda: sd.remotecall_fetch(sleep_long, cluster[0]),
        lambda: sd.fetch(sd.remotecall(sleep_long, cluster[1])),
        lambda: channel.take(),
        lambda: sd.pmap(lambda _: sleep_long(), range(20)),
        lambda: [sd.remotecall_fetch(add_one, cluster[2], 1) for _ in range(10**6)],
        lambda: [sd.pmap(add_one, range(300)) for _ in range(10**6)],
    ]
    main = threading.main_thread().ident
    for n in range(48):
        timer = threading.Timer(0.005 + 0.03 * dice.random(), signal.pthread_kill, (main, signal.SIGINT))
        began = time.monotonic()
        try:
            timer.start()
            waits[n % len(waits)]()
            pytest.fail("it was not interrupted")
        except KeyboardInterrupt:
            pass
        assert time.monotonic() - began < 2
        timer.join()
        channel.put(n)
        assert channel.take(timeout=2) == n
        with within(2):
            assert [sd.remotecall_fetch(add_one, pid, n) for pid in cluster] == [n + 1] * len(cluster)


def test_workers_come_and_go(fresh):
    node = current_node()
    before = None
    for n in range(10):
        pids = sd.addprocs(3)
        assert sd.pmap(add_one, range(50)) == list(range(1, 51))
        if n % 2:
            os.kill(sd.remotecall_fetch(os.getpid, pids[0]), signal.SIGKILL)
            until(lambda pids=pids: pids[0] not in sd.procs())
        sd.rmprocs([pid for pid in pids if pid in sd.procs()])
        state = (len(os.listdir("/proc/self/fd")), len(node.peers.all_links), len(node.inherited))
        if n == 1:
            before = state
    assert state[0] <= before[0] + 1 and state[2] <= before[2], (before, state)
