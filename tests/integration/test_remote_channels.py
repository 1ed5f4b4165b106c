"""RemoteChannel: put, take, fetch, wait from everywhere; closing, iterating, timeouts; channels of the user's own."""

import pickle
import threading
from collections import deque

import pytest

import shmdist as sd
from tests.integration.helpers import reference_count, until, within


@pytest.fixture(params=["here", "there"])
def channel(request, cluster):
    """A channel of three places, on process 1 or on a worker."""
    return sd.RemoteChannel(lambda: sd.Channel(3), 1 if request.param == "here" else cluster[0])


def test_put_take_fetch_len(channel):
    assert sd.isempty(channel) and not sd.isready(channel) and sd.isopen(channel)
    assert sd.put(channel, "a") is channel
    channel.put("b")
    assert len(channel) == 2 and sd.isready(channel) and not channel.isempty()
    assert sd.fetch(channel) == channel.fetch() == "a"
    sd.wait(channel)
    assert sd.take(channel) == "a" and channel.take() == "b"
    assert len(channel) == 0 and channel.isempty() and bool(channel)


def test_every_operation_takes_a_timeout(channel):
    for operation in (channel.take, channel.fetch, channel.wait):
        with pytest.raises(TimeoutError), within(2):
            operation(timeout=0.02)
    for function in (sd.take, sd.fetch, sd.wait):
        with pytest.raises(TimeoutError):
            function(channel, timeout=0.02)
    for n in range(3):
        channel.put(n, timeout=1)
    with pytest.raises(TimeoutError):
        channel.put(3, timeout=0.02)
    with pytest.raises(TimeoutError):
        sd.put(channel, 3, timeout=0.02)
    assert [channel.take(timeout=1) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TimeoutError):
        channel.take(timeout=0.02)  # what timed out put nothing
    assert channel.isready(timeout=1) is False
    assert channel.isempty(timeout=1) is True
    assert channel.isopen(timeout=1) is True
    assert sd.isready(channel, timeout=1) is False and sd.isempty(channel, timeout=1) is True
    assert sd.isopen(channel, timeout=1) is True
    sd.close(channel, timeout=1)


def test_close_drain_iterate(channel):
    channel.put(1)
    channel.put(2)
    channel.close()
    assert not sd.isopen(channel)
    with pytest.raises(sd.ChannelClosed):
        channel.put(3)
    assert list(channel) == [1, 2]
    for operation in (channel.take, channel.fetch):
        with pytest.raises(sd.ChannelClosed):
            operation()
    sd.close(channel)  # again does no harm


def test_close_wakes_who_waits(cluster, channel):
    takers = [sd.remotecall(sd.take, pid, channel) for pid in cluster]
    until(lambda: sd.remotecall_fetch(_waiters, channel.where, sd.remoteref_id(channel)) == len(cluster))
    channel.close()
    for taker in takers:
        with pytest.raises(sd.ChannelClosed):
            taker.fetch(timeout=5)


def _waiters(rrid):
    return len(sd.channel_from_id(rrid)._takers)


def test_iteration_ends_when_a_producer_closes(cluster, channel):
    def produce(channel, n):
        for number in range(n):
            channel.put(number)
        channel.close()

    producer = sd.remotecall(produce, cluster[1], channel, 50)
    assert list(channel) == list(range(50))
    assert producer.fetch(timeout=5) is None


def test_a_full_channel_holds_the_putter(cluster, channel):
    def produce(channel, n):
        for number in range(n):
            channel.put(number)
        return n

    producer = sd.remotecall(produce, cluster[1], channel, 5)
    until(lambda: len(channel) == 3)
    with pytest.raises(TimeoutError):
        producer.fetch(timeout=0.05)
    assert channel.take() == 0 and channel.take() == 1
    assert producer.fetch(timeout=5) == 5
    assert [channel.take() for _ in range(3)] == [2, 3, 4]


def test_unbuffered_hands_over(cluster):
    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(lambda: sd.Channel(0), where)
        putter = sd.remotecall(sd.put, cluster[1], channel, "item")
        assert channel.take(timeout=5) == "item"
        assert isinstance(putter.fetch(timeout=5), sd.RemoteChannel)
        with pytest.raises(TimeoutError):
            channel.put("nobody takes", timeout=0.02)
        assert not channel.isready()
        taker = sd.remotecall(sd.take, cluster[1], channel)
        channel.put(2, timeout=5)
        assert taker.fetch(timeout=5) == 2


def test_unlimited(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(float("inf")), cluster[0])
    for n in range(500):
        channel.put(n)
    assert len(channel) == 500
    assert [channel.take() for _ in range(500)] == list(range(500))


def test_default_forms(cluster):
    here = sd.RemoteChannel()
    assert here.where == 1
    there = sd.RemoteChannel(cluster[0])
    assert there.where == sd.RemoteChannel(pid=cluster[0]).where == cluster[0]
    there.put(1)
    with pytest.raises(TimeoutError):
        there.put(2, timeout=0.02)  # it holds one
    assert there.take() == 1
    assert "on process" in repr(there)


def test_factory_runs_on_the_owner(cluster):
    def make():
        channel = sd.Channel(1)
        channel.put(sd.myid())
        return channel

    assert sd.RemoteChannel(make, cluster[1]).take() == cluster[1]


def test_factories_that_fail(cluster):
    for pid in (1, cluster[0]):
        with pytest.raises(ZeroDivisionError):
            sd.RemoteChannel(lambda: 1 / 0, pid)
        with pytest.raises(TypeError, match="put"):
            sd.RemoteChannel(lambda: 5, pid)
    with pytest.raises(TypeError):
        sd.RemoteChannel("factory", cluster[0])


def test_used_by_all_processes_at_once(cluster, channel):
    def work(channel, n):
        for _ in range(n):
            channel.put(channel.take() + 1)

    channel.put(0)
    for future in [sd.remotecall(work, pid, channel, 30) for pid in [*cluster, 1]]:
        future.fetch(timeout=15)
    assert channel.take(timeout=1) == 30 * (len(cluster) + 1)


def test_a_take_that_timed_out_loses_no_item(cluster, channel):
    """The timeout races with an item that is put at that moment."""
    lost = 0
    for n in range(60):
        putter = sd.remotecall(sd.put, cluster[1], channel, n)
        try:
            item = channel.take(timeout=0.0005)
        except TimeoutError:
            item = channel.take(timeout=2)
        lost += item != n
        putter.wait(timeout=5)
    assert lost == 0


def test_an_item_that_goes_back_is_the_next_one(cluster, channel):
    for _ in range(20):
        try:
            taken = [channel.take(timeout=0.0002)]
        except TimeoutError:
            taken = []
        channel.put(1)
        channel.put(2)
        taken += [channel.take(timeout=2) for _ in range(2 - len(taken))]
        assert taken == [1, 2]


def test_an_item_that_cannot_be_sent_stays(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(2), cluster[0])

    def put_lock(rrid):
        import threading

        sd.channel_from_id(rrid).put(threading.Lock())

    sd.remotecall_fetch(put_lock, cluster[0], sd.remoteref_id(channel))
    for operation in (channel.fetch, channel.take):
        with pytest.raises(sd.SerializationError, match="lock"):
            operation()
    assert len(channel) == 1
    with pytest.raises(sd.SerializationError, match="lock"):
        channel.put(threading.Lock())


def test_references_through_channels(cluster, channel):
    future = sd.remotecall(list, cluster[1], "abc")
    inner = sd.RemoteChannel(lambda: sd.Channel(1), cluster[1])
    channel.put({"future": future, "channel": inner})
    del future, inner
    assert len(channel) == 1
    got = sd.remotecall_fetch(lambda c: c.take(), cluster[2], channel)
    assert got["future"].fetch(timeout=5) == ["a", "b", "c"]
    got["channel"].put(5)
    assert got["channel"].take(timeout=5) == 5


def test_freed_when_the_last_reference_is_gone(cluster):
    before = sd.remotecall_fetch(reference_count, cluster[0])
    channel = sd.RemoteChannel(lambda: sd.Channel(1), cluster[0])
    channel.put("x")
    holder = sd.remotecall(lambda c: [c], cluster[1], channel).wait()
    del channel
    assert holder[0].take(timeout=5) == "x"
    assert sd.remotecall_fetch(reference_count, cluster[0]) == before + 1
    del holder
    until(lambda: (reference_count(), sd.remotecall_fetch(reference_count, cluster[0]) == before)[1])


def test_ids(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(7), cluster[0])
    rrid = sd.remoteref_id(channel)
    assert rrid == (rrid.whence, rrid.id) and rrid.whence == 1
    assert sd.remotecall_fetch(lambda r: sd.channel_from_id(r).size, cluster[0], rrid) == 7
    assert sd.remotecall_fetch(sd.remoteref_id, cluster[1], channel) == rrid
    with pytest.raises(sd.ShmdistError, match="no channel"):
        sd.channel_from_id(rrid)  # it does not live here
    with pytest.raises(TypeError):
        sd.remoteref_id(5)
    future = sd.remotecall_fetch(lambda: sd.Future(), cluster[1])
    assert sd.remoteref_id(future).whence == cluster[1]


def test_equality_and_hash(cluster, channel):
    again = sd.remotecall_fetch(lambda c: c, cluster[1], channel)
    assert again == channel and hash(again) == hash(channel) and len({again, channel}) == 1
    assert channel != sd.RemoteChannel()
    assert "inert" in repr(pickle.loads(pickle.dumps(channel)))


class Stack:
    """A channel of the user's own: last in, first out, and without any timeout."""

    def __init__(self):
        self.items = deque()
        self.changed = threading.Condition()
        self.opened = True

    def put(self, item):
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def take(self):
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            return self.items.pop()

    def fetch(self):
        with self.changed:
            self.changed.wait_for(lambda: self.items)
            return self.items[-1]

    def wait(self):
        self.fetch()

    def isready(self):
        return bool(self.items)

    def isopen(self):
        return self.opened

    def close(self):
        self.opened = False

    def __len__(self):
        return len(self.items)


def test_channels_of_ones_own(cluster):
    class Local(Stack):  # by value: the worker cannot import it
        pass

    for where in (1, cluster[0]):
        channel = sd.RemoteChannel(Local, where)
        for n in range(3):
            sd.put(channel, n)
        assert len(channel) == 3 and channel.isready() and not sd.isempty(channel)
        assert channel.fetch() == 2
        assert [sd.take(channel) for _ in range(3)] == [2, 1, 0]
        taker = sd.remotecall(sd.take, cluster[1], channel)
        channel.put("later")
        assert taker.fetch(timeout=5) == "later"
        channel.close()
        assert not channel.isopen()


def test_a_channel_of_ones_own_with_a_timeout(cluster):
    class Local(Stack):
        pass

    for where in (cluster[0], 1):
        channel = sd.RemoteChannel(Local, where)
        channel.put("there", timeout=1)
        assert channel.take(timeout=1) == "there"
        with pytest.raises(TimeoutError):
            channel.take(timeout=0.02)
        channel.put("not lost")
        assert channel.take(timeout=2) == "not lost"


def test_a_channel_without_wait_isopen_len(cluster):
    """What a channel must have is what Julia's manual asks for; the rest says what is missing."""

    class Least:
        def __init__(self):
            self.items = []

        def put(self, item):
            self.items.append(item)

        def take(self):
            return self.items.pop()

        def fetch(self):
            return self.items[-1]

        def isready(self):
            return bool(self.items)

        def close(self):
            pass

    channel = sd.RemoteChannel(Least, cluster[0])
    channel.put(4)
    with within(5), pytest.raises((TypeError, AttributeError, sd.RemoteException)):
        len(channel)
    with within(5), pytest.raises((TypeError, AttributeError, sd.RemoteException)):
        channel.isopen()
    assert channel.take() == 4


def test_local_channels_hand_over_objects_themselves():
    channel = sd.Channel(2)
    thing = [1]
    sd.put(channel, thing)
    assert sd.fetch(channel) is thing and sd.take(channel) is thing
    assert sd.isempty(channel) and len(channel) == 0 and sd.isopen(channel)
    sd.close(channel)
    assert list(channel) == []


def test_a_timeout_is_kept_while_others_get_their_answers(cluster):
    channel = sd.RemoteChannel(cluster[0])
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            sd.remotecall_fetch(abs, cluster[1], -1)

    tasks = [sd.async_(busy) for _ in range(3)]
    try:
        for _ in range(10):
            with within(1), pytest.raises(TimeoutError):
                channel.take(timeout=0.01)
    finally:
        stop.set()
    for task in tasks:
        task.wait(timeout=5)
