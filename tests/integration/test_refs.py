"""Distributed reference counting: after any way of passing references about, nothing is left."""

import gc
import threading
import weakref

import pytest

import shmdist as sd
from tests.integration.helpers import reference_count, until


@pytest.fixture
def counts(cluster):
    """Returns the number of references on each process, beyond those that were there before."""

    def look():
        gc.collect()
        return {pid: sd.remotecall_fetch(reference_count, pid) for pid in [1, *cluster]}

    before = look()
    return lambda: {pid: now - before[pid] for pid, now in look().items()}


def all_gone(counts):
    until(lambda: not any(counts().values()))


def test_ring(cluster, counts):
    """A reference goes round all workers; each keeps it until the next has it."""

    def pass_on(ref, path):
        return sd.remotecall_fetch(pass_on, path[0], ref, path[1:]) if path else ref

    for make in (lambda: sd.Future(cluster[0]), lambda: sd.RemoteChannel(cluster[0])):
        for _ in range(20):
            ref = make()
            back = sd.remotecall_fetch(pass_on, cluster[0], ref, [*cluster[1:], *cluster, 1, *cluster])
            assert back == ref
            del ref, back
    all_gone(counts)


def test_ring_without_waiting(cluster, counts):
    """The same with futures of calls, so that drops overtake counts."""

    def pass_on(ref, path):
        if path:
            sd.remote_do(pass_on, path[0], ref, path[1:])

    for n in range(40):
        ref = sd.remotecall(list, cluster[n % len(cluster)], "ab")
        sd.remote_do(pass_on, cluster[(n + 1) % len(cluster)], ref, [*cluster, 1, *cluster[::-1]])
        del ref
    all_gone(counts)


def test_forwarded_and_never_used(cluster, counts):
    future = sd.remotecall(list, cluster[0], "ab")
    sd.remotecall_fetch(lambda f: None, cluster[1], future)
    del future
    all_gone(counts)


def test_kept_by_a_third(cluster, counts):
    future = sd.remotecall(list, cluster[0], "ab").wait()
    sd.remotecall_fetch(keep, cluster[1], future)
    del future
    until(lambda: counts()[cluster[0]] == 1)
    assert sd.remotecall_fetch(fetch_kept, cluster[1]) == ["a", "b"]
    until(lambda: counts()[cluster[0]] == 0)  # it was fetched
    sd.remotecall_fetch(forget_kept, cluster[1])
    all_gone(counts)


kept = []


def keep(ref):
    kept.append(ref)


def fetch_kept():
    return kept[0].fetch()


def forget_kept():
    kept.clear()


def test_in_a_channel_that_is_dropped(cluster, counts):
    channel = sd.RemoteChannel(lambda: sd.Channel(10), cluster[0])
    for pid in cluster:
        channel.put([sd.remotecall(list, pid, "ab"), sd.RemoteChannel(pid)])
    del channel
    all_gone(counts)


def test_in_a_future_that_is_dropped(cluster, counts):
    outer = sd.remotecall(lambda: [sd.remotecall(list, pid, "ab") for pid in sd.workers()], cluster[0]).wait()
    del outer
    all_gone(counts)


def test_channels_that_hold_each_other(cluster):
    """A cycle across processes is never freed by counting; taking one item out of it frees all."""
    one, other = sd.RemoteChannel(cluster[0]), sd.RemoteChannel(cluster[1])
    one.put(other)
    other.put(one)
    assert one.take() == other


def test_of_calls_that_fail(cluster, counts):
    def fail(ref):
        raise LookupError(ref)

    for _ in range(10):
        with pytest.raises(LookupError):
            sd.remotecall_fetch(fail, cluster[0], sd.remotecall(list, cluster[1], "ab"))
        future = sd.remotecall(fail, cluster[1], sd.Future(cluster[0]))
        with pytest.raises(LookupError):
            future.fetch()
        del future
    all_gone(counts)


def test_of_calls_never_fetched(cluster, counts):
    for n in range(100):
        sd.remotecall(lambda n: sd.RemoteChannel(), cluster[n % len(cluster)], n)
    all_gone(counts)


def test_values_are_freed_without_the_collector(cluster):
    """No reference cycle holds a dropped future."""
    gc.collect()
    gc.disable()
    try:
        future = sd.remotecall(list, cluster[0], "ab").wait()
        gone = weakref.ref(future)
        del future
        assert gone() is None
        future = sd.remotecall(list, cluster[0], "ab")
        future.fetch()
        gone = weakref.ref(future)
        del future
        assert gone() is None
    finally:
        gc.enable()


class Thing:
    """Something a weak reference can be made to."""


def test_arguments_and_results_are_let_go(cluster):
    """Nothing of the library holds what a call was given or gave, here or there."""
    thing = Thing()
    gone = weakref.ref(thing)
    assert sd.remotecall(lambda t: type(t).__name__, 1, thing).fetch() == "Thing"
    sd.remotecall_fetch(lambda t: None, cluster[0], thing)
    del thing
    until(lambda: (gc.collect(), gone() is None)[1], what="the argument of a call on this process is freed")

    def there():
        import gc

        gc.collect()
        return sum(type(each).__name__ == "Thing" for each in gc.get_objects())

    sd.remotecall_fetch(lambda t: None, cluster[0], Thing())
    sd.remotecall(lambda t: t, cluster[0], Thing()).fetch()
    sd.remotecall(lambda t: t, cluster[0], Thing()).wait()
    until(lambda: (gc.collect(), sd.remotecall_fetch(there, cluster[0]) == 0)[1])


def test_dropped_on_many_threads(cluster, counts):
    def work():
        for n in range(40):
            ref = sd.remotecall(list, cluster[n % len(cluster)], "ab")
            sd.remotecall_fetch(lambda f: f.fetch() if f else None, cluster[(n + 1) % len(cluster)], ref)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    all_gone(counts)


def test_as_keys_and_in_weak_containers(cluster, counts):
    table = weakref.WeakValueDictionary()
    future = sd.remotecall(list, cluster[0], "ab")
    table[sd.remoteref_id(future)] = future
    assert {future: 1}[future] == 1
    del future
    all_gone(counts)
    assert not table
