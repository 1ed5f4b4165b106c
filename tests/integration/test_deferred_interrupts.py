"""No lock of a link is ever held, or word on references half noted, where an interrupt may be raised."""

import operator

import numpy as np
import pytest

import shmdist as sd


def watch():
    """Have the runtime note what it does on a thread of the user's while nothing puts interrupts off."""
    from shmdist.runtime.counts import ReferenceCounts
    from shmdist.runtime.interrupts import current
    from shmdist.transport.link import Link

    bare = []

    def watched(kind, name):
        function = getattr(kind, name)

        def run(*args, **kwargs):
            thread_state = current()
            if (thread_state.main or thread_state.task is not None) and not thread_state.runtime_depth:
                bare.append(f"{kind.__name__}.{name}")
            return function(*args, **kwargs)

        setattr(kind, name, run)
        return lambda: setattr(kind, name, function)

    names = [(Link, name) for name in ("send", "leave", "post", "flush")]
    names += [(ReferenceCounts, name) for name in ("create", "set_value", "flush_released")]
    undo = [watched(*name) for name in names]
    return bare, undo


def traffic(pids):
    a, b = pids
    large = np.ones(1 << 18)
    for _ in range(3):
        for call in (sd.remotecall_fetch, sd.remotecall_wait, sd.remote_do):
            call(abs, a, -1)
        future = sd.remotecall(abs, b, -1)
        future.wait()
        assert future.fetch() == sd.spawn(abs, -1).fetch() == sd.spawnat(a, abs, -1).fetch() == 1
        assert sd.remotecall_fetch(np.sum, a, large) == 1 << 18
        assert sd.remotecall_fetch(np.ones, a, 1 << 18).all()
        assert sd.pmap(lambda n: n + 1, range(100)) == list(range(1, 101))
        assert sd.pmap(np.sum, [large] * 4) == [1 << 18] * 4
        assert list(sd.pgenerate(abs, [-1, -2])) == [1, 2]
        with pytest.raises(sd.RemoteException):
            sd.pmap(len, [1, 2, 3])
        assert sd.distributed(operator.add, range(10))(lambda n: n) == 45
        sd.distributed(None, range(10))(lambda n: n).wait()
        pool = sd.CachingPool([a, b])
        sd.pmap(lambda n: n + 1, range(10), pool=pool)
        pool.clear()
        for channel in (sd.RemoteChannel(lambda: sd.Channel(3), a), sd.RemoteChannel(lambda: sd.Channel(3))):
            channel.put(1)
            sd.remotecall_fetch(lambda channel: channel.put(2), b, channel)
            assert [channel.take(), channel.take()] == [1, 2]
            channel.close()
        for future in (sd.Future(), sd.Future(a)):
            future.put(3)
            assert future.fetch() == 3
        sd.everywhere("test_put_off = 1", [a, b])
        sd.interrupt(a)


def of_all(pids):
    bare, undo = watch()
    try:
        traffic(pids)
    finally:
        for each in undo:
            each()
    return sorted(set(bare))


def test_on_process_1(cluster):
    assert of_all(cluster[:2]) == []


def test_on_a_worker(fresh):
    asker, *others = fresh(3)
    assert sd.remotecall_fetch(of_all, asker, others) == []


def test_the_watch_itself(cluster):
    from shmdist.runtime.node import current_node
    from shmdist.transport.link import Link

    bare, undo = watch()
    try:
        link = current_node().peers.links[cluster[0]]
        assert isinstance(link, Link)
        link.flush(block=False)
    finally:
        for each in undo:
            each()
    assert bare == ["Link.flush"]
