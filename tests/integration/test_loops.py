"""@distributed in all its forms, and splitrange."""

import operator
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmdist as sd
from tests.integration.helpers import settled_state, until, within


def test_with_a_reducer(cluster):
    @sd.distributed(operator.add)
    def total(i):
        return i * i

    assert total(range(1000)) == sum(i * i for i in range(1000))
    assert total([1, 2, 3]) == 14
    assert total(range(1)) == 0
    assert total(iter([1, 2])) == 5


def test_a_reducer_that_looks_like_a_body(cluster):
    def add(a, b=0):
        return a + b

    assert sd.distributed(add)(lambda i: i)(range(30)) == 435
    pool = sd.WorkerPool(cluster[:1])
    assert sd.distributed(add, pool=pool, initial=5, schedule="dynamic")(lambda i: i)(range(30)) == 440

    @sd.distributed(add)
    def total(i):
        return i

    assert total(range(30), pool=pool) == 435

    seen = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    @sd.distributed
    def body(i, n=10):
        seen.put(i + n)

    class Numbers(list):
        def __call__(self):
            raise AssertionError("it is a sequence")

    body(Numbers([1, 2])).wait(timeout=10)
    assert sorted(seen.take(timeout=5) for _ in range(2)) == [11, 12]
    with pytest.raises(TypeError, match="loops over a range"):
        sd.distributed(operator.add)(lambda i: i)(abs)


def test_run_at_once(cluster):
    @sd.distributed(max, range(100))
    def largest(i):
        return (i * 37) % 101

    assert largest == 100


def test_without_a_reducer_it_is_a_task(cluster):
    seen = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    @sd.distributed
    def loop(i):
        seen.put(i)

    task = loop(range(20))
    assert isinstance(task, sd.Task) and task.fetch(timeout=5) is None
    assert sorted(seen.take() for _ in range(20)) == list(range(20))

    @sd.distributed(None, range(3))
    def now(i):
        seen.put(i)

    now.wait(timeout=5)
    assert len(seen) == 3


def test_its_errors(cluster):
    @sd.distributed
    def loop(i):
        return 1 / i

    with pytest.raises(ZeroDivisionError):
        loop(range(10)).wait(timeout=5)

    @sd.distributed(operator.add)
    def total(i):
        return 1 / i

    with pytest.raises(ZeroDivisionError) as caught:
        total(range(10))
    assert caught.value.pid in cluster


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "dynamic"}, {"chunk": 3}, {"schedule": "dynamic", "chunk": 4}]
)
def test_reduced_in_order(cluster, options):
    """Joining lists is associative, and does not commute."""

    @sd.distributed(operator.add, **options)
    def joined(i):
        return [i]

    for n in (1, 2, 3, 50):
        assert joined(range(n)) == list(range(n))


def test_chunks_differ_by_one_at_most(cluster):
    @sd.distributed(operator.add, vectorized=True)
    def sizes(chunk):
        assert isinstance(chunk, range)
        return [(sd.myid(), len(chunk))]

    got = sizes(range(10))
    assert sorted(pid for pid, _ in got) == sorted(cluster)
    counts = [count for _, count in got]
    assert sum(counts) == 10 and max(counts) - min(counts) <= 1


def test_vectorized_over_an_array(cluster):
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(30_000.0).reshape(10_000, 3)

    @sd.distributed(operator.add, vectorized=True)
    def total(chunk):
        return chunk.sum(axis=0)

    assert (total(array) == array.sum(axis=0)).all()

    @sd.distributed(numpy.add)
    def rows(row):
        return row

    assert (rows(array[:100]) == array[:100].sum(axis=0)).all()


def test_initial_and_empty(cluster):
    @sd.distributed(operator.add, initial=[0])
    def joined(i):
        return [i]

    assert joined(range(1, 4)) == [0, 1, 2, 3] and joined([]) == [0]

    @sd.distributed(operator.add)
    def total(i):
        return i

    with pytest.raises(ValueError, match="initial"):
        total([])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="schedule"):
        sd.distributed(operator.add, schedule="guided")
    with pytest.raises(ValueError, match="chunk"):
        sd.distributed(operator.add, chunk=0)
    with pytest.raises(TypeError, match="reducer"):
        sd.distributed(5)
    with pytest.raises(TypeError, match="loops over"):
        sd.distributed(operator.add)(abs)(5)


def test_a_worker_dies(fresh):
    pool = sd.WorkerPool(fresh(2))

    @sd.distributed(operator.add, pool=pool)
    def total(i):
        if i == 7:
            os._exit(1)
        return i

    with within(5), pytest.raises(sd.ProcessExitedException):
        total(range(10))


@pytest.mark.parametrize("failure", ["error", "death"])
def test_a_failure_is_told_at_once(cluster, fresh, failure):
    """Though the parts before it go on, and would for long."""
    bad = fresh(1)[0]
    gate = sd.RemoteChannel()
    started = sd.RemoteChannel(lambda: sd.Channel(9))

    @sd.distributed(pool=sd.WorkerPool([*cluster, 1, bad]))
    def loop(i):
        started.put(sd.myid())
        if sd.myid() not in (bad, 1):
            gate.take()
        elif sd.myid() == bad:
            sd.take(stop)
            if failure == "death":
                os._exit(1)
            raise LookupError("deliberate")

    stop = sd.RemoteChannel()
    task = loop(range(5))
    for _ in range(5):
        started.take(timeout=5)
    stop.put(None)
    with within(1), pytest.raises(sd.ProcessExitedException if failure == "death" else LookupError):
        task.fetch(timeout=5)
    # The others were cancelled: they take nothing any more.
    until(lambda: not any(sd.remotecall_fetch(settled_state, pid)["running"] for pid in cluster))


def test_inside_a_worker(cluster):
    def inner(n):
        return sd.distributed(operator.add)(lambda i: i)(range(n))

    assert sd.remotecall_fetch(inner, cluster[0], 100) == 4950


@given(first=st.integers(-50, 50), count=st.integers(0, 60), parts=st.integers(1, 12))
def test_splitrange(first, count, parts):
    ranges = sd.splitrange(first, first + count - 1, parts)
    assert [i for part in ranges for i in part] == list(range(first, first + count))
    sizes = [len(part) for part in ranges]
    assert len(ranges) == min(parts, count) and (not sizes or max(sizes) - min(sizes) <= 1)
    assert sizes == sorted(sizes, reverse=True)


def test_splitrange_wants_a_part():
    with pytest.raises(ValueError, match="at least one"):
        sd.splitrange(1, 5, 0)
