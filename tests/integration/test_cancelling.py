"""What cancel() means: from then on the future is cancelled, for all who hold it."""

import asyncio
import concurrent.futures
import threading

import pytest

import shmdist as sd
from tests.integration.helpers import until, within


def hold(begun, gate):
    begun.put(sd.myid())
    gate.take()


def stubborn(begun, gate):
    """Go on, whatever comes; an interrupt comes once."""
    try:
        begun.put(sd.myid())
        return gate.take()
    except KeyboardInterrupt:
        return gate.take()


@pytest.fixture(params=["here", "worker"])
def place(cluster, request):
    return 1 if request.param == "here" else cluster[0]


@pytest.fixture
def channels():
    return sd.RemoteChannel(lambda: sd.Channel(9)), sd.RemoteChannel(lambda: sd.Channel(9))


@pytest.mark.parametrize("function", [hold, stubborn])
def test_it_is_cancelled(cluster, place, channels, function):
    begun, gate = channels
    future = sd.remotecall(function, place, begun, gate)
    assert begun.take(timeout=5) == place and "pending" in repr(future)
    with within(2):
        assert future.cancel() and future.cancelled() and future.done() and future.isready()
        assert not future.running() and "cancelled" in repr(future)
        for method in (future.fetch, future.result, future.exception):
            with pytest.raises(concurrent.futures.CancelledError) as caught:
                method(timeout=5)
            assert type(caught.value) is sd.Cancelled and function.__name__ in str(caught.value)
        assert future.wait() is future
        assert future.cancel(), "as in concurrent.futures: it is"
        other = sd.remotecall_fetch(lambda f: f, cluster[1], future)
        assert other.cancelled() and "cancelled" in repr(other)
    if function is stubborn:
        gate.put("end")
    assert sd.remotecall_fetch(abs, place, -1) == 1


def test_all_who_wait_are_told(cluster, place, channels):
    begun, gate = channels
    future = sd.remotecall(stubborn, place, begun, gate)
    begun.take(timeout=5)
    seen = sd.RemoteChannel(lambda: sd.Channel(9))

    def see(future, seen):
        seen.put("there")
        try:
            return future.fetch(timeout=10)
        except concurrent.futures.CancelledError:
            return future.cancelled(), "cancelled" in repr(future)

    far = sd.remotecall(see, cluster[1], future, seen)
    tasks = [sd.async_(see, future, seen) for _ in range(2)]
    waiting = [sd.async_(concurrent.futures.wait, [future], 10)]
    called = []
    future.add_done_callback(called.append)
    for _ in range(3):
        seen.take(timeout=5)
    with within(5):
        assert future.cancel()
        assert [task.fetch(timeout=5) for task in tasks] == [(True, True)] * 2
        assert waiting[0].fetch(timeout=5).done == {future}
        assert list(concurrent.futures.as_completed([future], timeout=5)) == [future]
        assert far.fetch(timeout=5) == (True, True)
    assert called == [future]
    gate.put("end")
    assert sd.remotecall_fetch(abs, place, -1) == 1
    assert called == [future]
    future.add_done_callback(called.append)
    assert called == [future, future]


def test_await(cluster, channels):
    begun, gate = channels

    async def main():
        future = sd.remotecall(hold, cluster[0], begun, gate)
        begun.take(timeout=5)
        asyncio.get_running_loop().call_soon(future.cancel)
        with pytest.raises(asyncio.CancelledError):
            await future
        assert future.cancelled()
        task = asyncio.ensure_future(_await(sd.remotecall(hold, cluster[0], begun, gate)))
        await asyncio.sleep(0)
        begun.take(timeout=5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


async def _await(future):
    return await future


def test_before_it_began(cluster):
    gate, begun, ran = threading.Event(), threading.Event(), []
    first = sd.remotecall(lambda: (begun.set(), gate.wait(5)), 1)
    assert begun.wait(5)
    second = sd.remotecall(ran.append, 1, 1)
    cancelled = second.cancel()
    gate.set()
    first.fetch(timeout=5)
    assert sd.remotecall(abs, 1, -1).fetch(timeout=5) == 1
    assert second.cancelled() == cancelled and ran == ([] if cancelled else [1])


def test_a_worker_goes_back_to_its_pool_when_the_call_has_ended(cluster, channels):
    begun, gate = channels
    pool = sd.WorkerPool(cluster[:1])
    future = sd.remotecall(stubborn, pool, begun, gate)
    begun.take(timeout=5)
    assert future.cancel()
    with pytest.raises(TimeoutError):
        pool.take(timeout=0.05)
    gate.put("end")
    assert pool.take(timeout=5) == cluster[0]


def test_an_ended_call_cannot_be_cancelled(place):
    for future in (sd.remotecall(abs, place, -1), sd.remotecall(int, place, "x")):
        future.wait(timeout=5)
        assert not future.cancel() and not future.cancelled()
    assert "failed" in repr(future)
    assert isinstance(future.exception(), ValueError) and "failed" in repr(future)


def test_many_that_end_as_they_are_cancelled(cluster, place):
    for n in range(200):
        future = sd.remotecall(abs, place, -n)
        if future.cancel():
            assert future.cancelled()
            with pytest.raises(sd.Cancelled):
                future.fetch(timeout=5)
        else:
            assert not future.cancelled() and future.fetch(timeout=5) == n
    until(lambda: sd.remotecall_fetch(abs, place, -1) == 1)


def test_a_group_of_cancelled_calls_is_told(cluster, channels):
    begun, gate = channels
    with pytest.raises(sd.CompositeException) as caught, sd.sync():
        future = sd.remotecall(hold, cluster[0], begun, gate)
        begun.take(timeout=5)
        future.cancel()
        sd.remotecall(abs, cluster[0], -1)
    assert [type(error) for error in caught.value.exceptions] == [sd.Cancelled]


# ---------------------------------------------------------------------- lists of references


def test_fetch_takes_a_list(cluster):
    import collections

    Point = collections.namedtuple("Point", "x y")
    futures = [sd.remotecall(pow, pid, 2, pid) for pid in (1, *cluster)]
    values = [2**pid for pid in (1, *cluster)]
    channel = sd.RemoteChannel(lambda: sd.Channel(1), cluster[0])
    channel.put("item")
    assert sd.wait(futures) is futures
    assert sd.fetch(futures) == values
    assert sd.fetch(tuple(futures)) == tuple(values)
    assert sd.fetch((futures[0], 7, "ab", None)) == (2, 7, "ab", None)
    assert sd.fetch([channel, sd.async_(abs, -1), [futures[1], ("x", futures[0])]]) == [
        "item",
        1,
        [2 ** cluster[0], ("x", 2)],
    ]
    point = sd.fetch(Point(futures[0], 5))
    assert type(point) is Point and point == (2, 5)
    assert sd.fetch([]) == [] and sd.fetch(()) == () and sd.wait([1, "a"]) == [1, "a"]
    assert channel.take() == "item"
    thing = {"a": futures[0]}
    assert sd.fetch(thing) is thing


def test_the_time_of_a_list_is_for_all(cluster):
    futures = [sd.Future() for _ in range(5)]
    for do in (sd.fetch, sd.wait):
        with within(2), pytest.raises(TimeoutError):
            do(futures, timeout=0.1)
    for n, future in enumerate(futures):
        future.put(n)
    assert sd.fetch(futures, timeout=0) == [0, 1, 2, 3, 4]


def test_errors_in_a_list(cluster):
    futures = [sd.remotecall(int, pid, text) for pid, text in zip(cluster, ("1", "x", "y"), strict=True)]
    assert sd.wait(futures, timeout=5) is futures
    with pytest.raises(ValueError, match="'x'"):
        sd.fetch(futures, timeout=5)
    assert futures[0].fetch() == 1
    with pytest.raises(ValueError, match="'y'"):
        futures[2].fetch(timeout=5)
