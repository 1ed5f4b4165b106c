"""What is sent, put, or given to a loop is a value: nobody's changes are seen by others, also on one process."""

import operator
import threading

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import helpers


def _merge(one, other):
    for key, values in other.items():
        one.setdefault(key, []).extend(values)
    return one


@pytest.fixture(params=["process 1", "one worker", "workers", "workers and process 1"])
def pool(request, cluster):
    places = {
        "process 1": [1],
        "one worker": cluster[:1],
        "workers": cluster,
        "workers and process 1": [1, *cluster],
    }
    return sd.WorkerPool(places[request.param])


@pytest.fixture(params=["static", "dynamic"])
def loops(request, pool):
    """Returns a loop with `operator.iadd`, or another reducer, on the pool."""

    def make(body, reducer=operator.iadd, **options):
        return sd.distributed(reducer, pool=pool, schedule=request.param, **options)(body)

    return make


class TestReducersThatChangeTheirArguments:
    def test_initial_stays(self, loops):
        for vectorized, body in ((False, lambda i: [i]), (True, list)):
            initial = []
            loop = loops(body, initial=initial, vectorized=vectorized)
            assert [loop(range(40)) for _ in range(3)] == [[*range(40)]] * 3
            empty = loop(range(0))
            assert empty == [] == initial and empty is not initial
            counts = {"a": [1]}
            loop = loops(lambda i: {"a": [1]}, _merge, initial=counts, vectorized=vectorized)
            assert loop(range(3)) == loop(range(3)) and counts == {"a": [1]}

    def test_what_the_body_returns_stays(self, loops):
        rows = [[0], [1], [2], [3]]
        for loop in (loops(lambda i: rows[i]), loops(lambda part: rows[part.start], vectorized=True)):
            loop(range(4))
            loop(range(4))
            assert rows == [[0], [1], [2], [3]]

    def test_the_input_stays(self, loops):
        for x in (np.ones((6, 3)), sd.shared.ones((6, 3))):
            for loop in (loops(lambda row: row), loops(lambda rows: rows[0], vectorized=True)):
                loop(x)
                assert (x == 1).all()


def test_a_shared_array_as_initial_stays(cluster):
    start = sd.shared.zeros(3)
    total = sd.distributed(operator.iadd, initial=start)(lambda i: np.ones(3))(range(5))
    assert (total == 5).all() and not start.any()


# ---------------------------------------------------------------------- channels and futures


class Box:
    """An ordinary object of the user's, of a module that can be imported."""

    def __init__(self, inner):
        self.inner = inner


BIG = 1 << 16  # elements: above the size from which arrays go through blocks


def _first(value):
    while not isinstance(value, (int, float)):
        value = value.inner if isinstance(value, Box) else value[0]
    return value


def _set_first(value, number):
    while isinstance(value, (Box, tuple)) or (isinstance(value, list) and not isinstance(value[0], int)):
        value = value.inner if isinstance(value, Box) else value[0]
    value[0] = number


def _values():
    """Return values whose first number is 0, by name; in every one it can be changed."""
    local = type("Local", (Box,), {"__module__": "__main__"})
    return {
        "list": [0],
        "tuple": ([0],),
        "small array": np.zeros(10),
        "medium array": np.zeros(1 << 12),
        "big array": np.zeros(BIG),
        "strided": np.zeros(2 * BIG)[::2],
        "two arrays": [np.zeros(BIG), np.zeros(BIG)],
        "object": Box(np.zeros(BIG)),
        "object by value": local([0]),
        "with a reference": [[0], sd.Future()],
        "with what cannot be pickled": [np.zeros(5), open],
    }


NAMES = list(_values())


def _take_first(channel):
    return float(_first(channel.take(timeout=20)))


@pytest.fixture(params=[0, 10], ids=["unbuffered", "buffered"])
def local_channel(request):
    size = request.param
    return sd.RemoteChannel(lambda: sd.Channel(size))


def _feed(channel, value):
    for number in range(4):
        _set_first(value, number)
        channel.put(value, timeout=20)
        _set_first(value, -1)


def _eat(channel):
    return [_take_first(channel) for _ in range(4)]


def test_what_is_put_is_a_value(cluster, local_channel):
    for name, value in _values().items():
        for pid in (1, cluster[0]):
            task = sd.async_(_feed, local_channel, value)
            try:
                taken = _eat(local_channel) if pid == 1 else sd.remotecall_fetch(_eat, pid, local_channel)
            finally:
                task.wait()
            assert taken == [0, 1, 2, 3], name


@pytest.mark.parametrize("where", ["here", "there"])
def test_what_is_fetched_is_the_callers_own(cluster, where):
    for name in NAMES:
        channel = sd.RemoteChannel(lambda: sd.Channel(10))
        value = _values()[name]
        if where == "here" or name in ("with what cannot be pickled", "object by value"):
            channel.put(value)
        else:
            sd.remotecall_fetch(lambda c, v: c.put(v), cluster[0], channel, value)
        for _ in range(2):
            seen = channel.fetch(timeout=20)
            assert _first(seen) == 0
            _set_first(seen, 5)
        assert sd.remotecall_fetch(lambda c: float(_first(c.fetch(timeout=20))), cluster[0], channel) == 0
        assert _first(channel.fetch(timeout=20)) == 0
        taken = channel.take(timeout=20)
        _set_first(taken, 7)
        assert _first(value) == 0 and len(channel) == 0


def test_a_channel_that_is_served_has_values(cluster):
    channel = sd.Channel(5)
    plain = [0]
    channel.put(plain)
    assert channel.fetch() is plain and channel.take() is plain  # between threads, as in queue.Queue
    served = sd.RemoteChannel(lambda: channel)
    channel.put(plain)
    plain[0] = 1
    assert served.fetch() == [0] and channel.fetch() == [0] and channel.take() == [0]
    served.put(plain)
    plain[0] = 2
    assert next(iter(channel)) == [1]


class Stack:
    """A channel of the user's own."""

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
        self.items.clear()


def test_channels_of_the_users_own(cluster):
    channel = sd.RemoteChannel(Stack)
    value = [0]
    channel.put(value)
    channel.put(value, timeout=5)
    value[0] = 1
    channel.fetch().append(2)
    channel.fetch(timeout=5).append(2)
    assert channel.take() == [0] and channel.take(timeout=5) == [0]


def test_a_put_that_timed_out_has_not_put(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(0))
    with pytest.raises(TimeoutError):
        channel.put(np.ones(BIG), timeout=0.01)
    assert len(channel) == 0
    with pytest.raises(TimeoutError):
        channel.take(timeout=0)


def test_a_take_that_timed_out_takes_nothing(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(5))

    def try_to_take(channel):
        try:
            channel.take(timeout=0.01)
        except TimeoutError:
            return "timed out"

    assert sd.remotecall_fetch(try_to_take, cluster[0], channel) == "timed out"
    channel.put(np.full(BIG, 3.0))
    assert channel.take(timeout=5)[0] == 3


def test_identities_stay(cluster):
    """What is no value but a thing is put as it is, within its process."""
    channel = sd.RemoteChannel(lambda: sd.Channel(10))
    local = type("Local", (), {"__module__": "__main__"})
    things = [test_identities_stay, local, threading, threading.Lock(), channel, sd.Channel(1), len]
    for thing in things:
        channel.put([thing])
        assert channel.take()[0] is thing
    shared = sd.shared.zeros(BIG)
    channel.put({"shared": shared, "own": [0]})
    shared[0] = 5
    got = channel.take()
    assert sd.shared.is_shared(got["shared"]) and got["shared"][0] == 5
    channel.put(shared)
    assert sd.remotecall_fetch(lambda c: c.take()[:1].fill(6), cluster[0], channel) is None
    assert shared[0] == 6


class Unreadable:
    """Can be pickled, and not read."""

    def __reduce__(self):
        return int, ("no number",)


def test_an_item_that_cannot_be_read(cluster):
    channel = sd.RemoteChannel(lambda: sd.Channel(10))
    channel.put(Unreadable())
    channel.put("next")
    for _ in range(2):
        with pytest.raises(sd.SerializationError, match="no number"):
            channel.fetch()
    with pytest.raises(sd.SerializationError, match="no number"):
        channel.take()
    assert channel.take() == "next"


def test_memory_of_items_comes_back(cluster):
    """Both a taken item's and a dropped one's; the check after each test looks at the counts."""
    channel = sd.RemoteChannel(lambda: sd.Channel(1000))
    before = _counted()
    for _ in range(3):
        for _ in range(4):
            channel.put(np.ones(BIG))
        assert sd.remotecall_fetch(_take_first, cluster[0], channel) == 1
        assert sd.remotecall_fetch(lambda c: c.fetch()[0], cluster[0], channel) == 1
        assert channel.take()[0] == 1

    def held(
        channel=channel,
    ):  # while no block is at hand, what is put lies in plain memory, and one is being made
        channel.put(np.ones(BIG))
        return _counted() > before

    helpers.until(held, 20.0)
    channel.close()
    del channel, held
    helpers.until(lambda: _counted() <= before, 20.0, "no more blocks than before")


def _counted():
    return len(current_node().sharing.state()["lent"])


def test_futures_put_here(cluster):
    for name, value in _values().items():
        future = sd.Future()
        future.put(value)
        _set_first(value, 5)
        assert _first(future.fetch()) == 0, name
        if name not in ("with what cannot be pickled", "object by value"):
            future = sd.Future()
            future.put(value)
            _set_first(value, 6)
            assert sd.remotecall_fetch(lambda f: float(_first(f.fetch())), cluster[0], future) == 5, name


# ---------------------------------------------------------------------- calls to oneself


def _change(value, other=None, *, option=None):
    found = float(_first(value))
    _set_first(value, 9)
    if option is not None:
        _set_first(option, 9)
    return found, value is other


def test_arguments_of_calls_to_oneself(cluster):
    for name in NAMES:
        value, option = _values()[name], [0]
        gate = threading.Event()
        holding = sd.remotecall(gate.wait, 1, 20)
        calls = [sd.remotecall(_change, 1, value, value, option=option), sd.spawnat(1, _change, value)]
        done = sd.RemoteChannel(lambda: sd.Channel(1))
        sd.remote_do(lambda v, c: c.put(_change(v)[0]), 1, value, done)
        _set_first(value, 5)
        gate.set()
        assert [call.fetch() for call in calls] == [(0, True), (0, False)]
        assert holding.fetch() and done.take(timeout=20) == 0
        assert sd.remotecall_fetch(_change, 1, value, value, option=option) == (5, True)
        assert _first(value) == 5 and option == [0]
