"""Many calls at once: blocked ones, from many threads, of all kinds mixed."""

import random
import threading

import numpy as np

import shmdist as sd
from tests.integration.helpers import meet_and_wait, settled_state, until, within

SECONDS = 6.0  # how long the mixtures run


def test_a_thousand_blocked_calls_on_one_worker(cluster):
    started = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    gate = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    futures = [sd.remotecall(meet_and_wait, cluster[0], started, gate) for _ in range(1000)]
    with within(60):
        assert len({started.take(timeout=30) for _ in futures}) == 1000
    with within(5):
        for n in range(100):
            assert sd.remotecall_fetch(abs, cluster[0], -n) == n
    assert not any(future.isready() for future in futures)
    for n in range(1000):
        gate.put(n)
    assert sorted(future.fetch(timeout=30) for future in futures) == list(range(1000))


def test_a_thousand_blocked_calls_are_interrupted(cluster):
    started, gate = sd.RemoteChannel(lambda: sd.Channel(float("inf"))), sd.RemoteChannel()
    futures = [sd.remotecall(meet_and_wait, cluster[0], started, gate) for _ in range(300)]
    for _ in futures:
        started.take(timeout=30)
    sd.interrupt(cluster[0])
    for future in futures:
        assert isinstance(future.exception(timeout=20), sd.RemoteException)
    gate.put("not lost")
    assert gate.take(timeout=5) == "not lost"


class Mixture:
    """What one thread does over and over; each checks what it gets."""

    def __init__(self, pids, channel, seed):
        self.pids, self.channel, self.random = pids, channel, random.Random(seed)

    def fetch(self):
        n = self.random.random()
        assert sd.remotecall_fetch(lambda x: x, self.pid(), n) == n

    def call(self):
        futures = [sd.remotecall(divmod, self.pid(), n, 7) for n in range(20)]
        assert [future.fetch(timeout=20) for future in futures] == [divmod(n, 7) for n in range(20)]

    def nest(self):
        path = [self.pid() for _ in range(4)]
        assert sd.remotecall_fetch(_descend, path[0], path[1:]) == path[-1]

    def array(self):
        array = np.full(self.random.choice([10, 5000, 200_000]), self.random.random())
        assert np.array_equal(sd.remotecall_fetch(lambda a: a * 2, self.pid(), array), array * 2)

    def pass_item(self):
        self.channel.put((1, 2), timeout=20)
        assert self.channel.take(timeout=20) == (1, 2)

    def fail(self):
        try:
            sd.remotecall_fetch(int, self.pid(), "x")
        except ValueError:
            return
        raise AssertionError("no error came")

    def reference(self):
        future = sd.remotecall(list, self.pid(), "ab")
        assert sd.remotecall_fetch(lambda f: f.fetch(), self.pid(), future) == ["a", "b"]

    def time_out(self):
        future = sd.Future(self.pid())
        try:
            future.fetch(timeout=self.random.random() / 1000)
        except TimeoutError:
            return
        raise AssertionError("a future without value gave one")

    def cancel(self):
        pid = self.random.choice([pid for pid in self.pids if pid not in (1, sd.myid())])
        future = sd.remotecall(_loop, pid)
        assert future.cancel()
        try:
            assert isinstance(future.exception(timeout=20), sd.RemoteException)
        except sd.Cancelled:
            assert future.cancelled()

    def forget(self):
        sd.remotecall(list, self.pid(), "ab")

    def pid(self):
        return self.random.choice(self.pids)

    def run(self, until_set, errors):
        kinds = [
            getattr(self, name) for name in vars(type(self)) if name not in ("pid", "run") and name[0] != "_"
        ]
        while not until_set.is_set() and not errors:
            kind = self.random.choice(kinds)
            try:
                kind()
            except BaseException as error:
                errors.append((kind.__name__, error))


def _descend(path):
    return sd.remotecall_fetch(_descend, path[0], path[1:]) if path else sd.myid()


def _loop():
    while True:
        pass


def test_eight_threads_do_all_sorts_of_things(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(4), cluster[0])
    stop, errors = threading.Event(), []
    threads = [
        threading.Thread(target=Mixture(cluster, channel, seed).run, args=(stop, errors), daemon=True)
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors


def test_workers_do_all_sorts_of_things_to_one_another(cluster):
    """The same with the threads on the workers, which call each other and process 1."""
    channel = sd.RemoteChannel(lambda: sd.Channel(4), cluster[0])

    def work(pids, channel, seed, seconds):
        stop, errors = threading.Event(), []
        mixtures = [Mixture(pids, channel, seed + n) for n in range(3)]
        threads = [threading.Thread(target=each.run, args=(stop, errors), daemon=True) for each in mixtures]
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join(40)
        return [repr(error) for error in errors] + ["hangs" for thread in threads if thread.is_alive()]

    futures = [sd.remotecall(work, pid, [1, *cluster], channel, 10 * pid, SECONDS) for pid in cluster]
    assert [future.fetch(timeout=SECONDS + 60) for future in futures] == [[]] * len(cluster)


def test_one_future_many_waiters(cluster):
    """Threads that wait for one future with all kinds of patience."""
    for round_ in range(40):
        future = sd.Future(cluster[round_ % len(cluster)])
        got = []

        def wait(future=future, got=got):
            while True:
                try:
                    got.append(future.fetch(timeout=random.random() / 100))
                    return
                except TimeoutError:
                    pass

        threads = [threading.Thread(target=wait) for _ in range(8)]
        for thread in threads:
            thread.start()
        future.put("value")
        for thread in threads:
            thread.join(10)
        assert got == ["value"] * 8
    until(lambda: not settled_state()["pending"])
