"""Maps of several processes on the same workers, some of which die; workers that come and go."""

import os
import random
import signal
import threading

import pytest

import shmdist as sd
from tests.integration.helpers import until, within


def _threads():
    return len(os.listdir("/proc/self/task"))


def identity(i):
    threading.Event().wait(2e-4)
    return i


@pytest.mark.parametrize("seed", [random.randrange(10**6) for _ in range(4)])
def test_maps_of_all_processes_while_workers_are_killed(cluster, fresh, seed):
    """Each element comes back exactly once, in its place, or as the loss of a worker that did die."""
    print("seed", seed)
    dice = random.Random(seed)
    doomed = fresh(3)
    ospids = [sd.remotecall_fetch(os.getpid, pid) for pid in doomed]
    pool = sd.WorkerPool([*doomed, cluster[2]])

    def run(count, batch_size, retries):
        got = sd.pmap(
            identity,
            range(count),
            pool=pool,
            batch_size=batch_size,
            retry_delays=[0] * retries,
            on_error=lambda e: ("lost", e.pid) if isinstance(e, sd.ProcessExitedException) else e,
        )
        return [(i, value) for i, value in enumerate(got) if value != i]

    kinds = [(1500, None, 0), (600, 1, 0), (1500, 40, 4), (900, 7, 4)]
    futures = [sd.remotecall(run, pid, *kind) for pid in (1, 1, *cluster[:2]) for kind in kinds]
    timers = [threading.Timer(dice.random() * 0.6, os.kill, (ospid, signal.SIGKILL)) for ospid in ospids]
    for timer in timers:
        timer.start()
    with within(25):
        for number, future in enumerate(futures):
            odd = future.fetch(timeout=25)
            retried = kinds[number % len(kinds)][2]
            assert all(value[0] == "lost" and value[1] in doomed for _, value in odd), odd
            # A map has at most one element begun on a worker at the moment when that dies.
            assert len(odd) <= (0 if retried else len(doomed)), odd
    for timer in timers:
        timer.join()
    until(lambda: pool.workers() == [cluster[2]])


def test_threads_and_descriptors_stay_as_many(cluster):
    counts = []
    for _ in range(10):
        with sd.addprocs(2) as pids:
            assert sd.pmap(abs, range(50)) == list(range(50))
            sd.remotecall_fetch(sd.remotecall_fetch, cluster[0], abs, pids[0], 1)
        state = []
        for pid in [1, *cluster]:
            state.append(sd.remotecall_fetch(_threads, pid))
            state.append(len(sd.remotecall_fetch(os.listdir, pid, "/proc/self/fd")))
        counts.append(state)
    for first, last in zip(counts[2], counts[-1], strict=True):
        assert last <= first + 1, counts
