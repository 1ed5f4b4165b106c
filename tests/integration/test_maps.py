"""pmap and pgenerate: every keyword, errors, retries, deaths, nesting."""

import gc
import os
import threading

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until, within


def square(x):
    return x * x


def inverse(x):
    return 1 / x


def whom(_):
    return sd.myid()


def test_results_in_order(cluster):
    for n in (0, 1, 2, 7, 1000, 20_000):
        assert sd.pmap(square, range(n)) == [i * i for i in range(n)]


def test_several_iterables_end_with_the_shortest(cluster):
    assert sd.pmap(pow, [2, 3, 4], [5, 2]) == [32, 9]
    assert sd.pmap(lambda a, b, c: (a, b, c), "ab", range(9), iter([7, 8, 9])) == [("a", 0, 7), ("b", 1, 8)]


def test_generators_of_unknown_length(cluster):
    assert sd.pmap(square, (i for i in range(3000))) == [i * i for i in range(3000)]
    assert sd.pmap(square, iter(())) == []


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_batch_size(cluster, batch_size):
    assert sd.pmap(square, range(100), batch_size=batch_size) == [i * i for i in range(100)]


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_wrong_batch_size(cluster, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        sd.pmap(square, [1], batch_size=batch_size)


def test_wrong_arguments(cluster):
    with pytest.raises(TypeError, match="callable"):
        sd.pmap(5, [1])
    with pytest.raises(TypeError, match="iterable"):
        sd.pmap(square)
    with pytest.raises(TypeError, match="not iterable"):
        sd.pmap(square, 5)


def test_all_workers_take_part(cluster):
    started = sd.RemoteChannel(lambda: sd.Channel(9))
    go = sd.RemoteChannel(lambda: sd.Channel(9))

    def meet(_):
        started.put(sd.myid())
        go.take()
        return sd.myid()

    task = sd.async_(sd.pmap, meet, range(len(cluster)))
    there = {started.take(timeout=5) for _ in cluster}
    for _ in cluster:
        go.put(None)
    assert there == set(cluster) == set(task.fetch(timeout=5))


def test_the_pool_may_be_named_in_both_ways(cluster):
    pool = sd.WorkerPool(cluster[:1])
    assert set(sd.pmap(whom, pool, range(20))) == {cluster[0]} == set(sd.pmap(whom, range(20), pool=pool))
    caching = sd.CachingPool(cluster[1:])
    assert set(sd.pmap(whom, caching, range(200))) <= set(cluster[1:])
    sd.clear(caching)


def test_not_distributed(cluster):
    assert set(sd.pmap(whom, range(10), distributed=False)) == {1}
    barrier = threading.Barrier(4)
    with within(5):  # on threads: four wait for one another
        sd.pmap(lambda _: barrier.wait(5), range(4), distributed=False)


def test_the_first_error_is_raised_and_the_rest_cancelled(cluster):
    started = sd.RemoteChannel(lambda: sd.Channel(99))

    def fail_or_wait(i):
        if i == 0:
            started.take()
            raise ValueError("element 0")
        started.put(i)
        threading.Event().wait(60)

    with within(5), pytest.raises(ValueError, match="element 0") as caught:
        sd.pmap(fail_or_wait, range(len(cluster)), batch_size=1)
    assert isinstance(caught.value, sd.RemoteException) and caught.value.pid in cluster


def test_on_error_is_per_element(cluster):
    seen = []
    got = sd.pmap(inverse, [1, 0, 2, 0, 4], on_error=lambda e: seen.append(e) or "bad")
    assert got == [1, "bad", 0.5, "bad", 0.25]
    assert (
        all(isinstance(e, ZeroDivisionError) and isinstance(e, sd.RemoteException) for e in seen)
        and len(seen) == 2
    )
    mixed = sd.pmap(inverse, [i % 10 for i in range(5000)], on_error=lambda e: None)
    assert mixed == [1 / (i % 10) if i % 10 else None for i in range(5000)]


@pytest.mark.parametrize(
    "delays", [[0.001] * 3, (d for d in [0.001] * 3), sd.ExponentialBackOff(3, 0.001, jitter=0)]
)
def test_retries_are_per_element(cluster, tmp_path, delays):
    def flaky(i):
        mark = tmp_path / str(i)
        tries = int(mark.read_text()) if mark.exists() else 0
        mark.write_text(str(tries + 1))
        if tries < i % 4:
            raise OSError(i)
        return tries

    assert sd.pmap(flaky, range(12), retry_delays=delays) == [i % 4 for i in range(12)]


def test_retry_check_both_forms(cluster):
    asked = []

    def check(state, error):
        asked.append((state, str(error.captured.ex)))
        return (state or 0) + 1, (state or 0) < 2

    got = sd.pmap(inverse, [0], retry_delays=[0] * 9, retry_check=check, on_error=lambda e: "given up")
    assert got == ["given up"] and [state for state, _ in asked] == [None, 1, 2]
    got = sd.pmap(inverse, [0], retry_delays=[0] * 9, retry_check=lambda state, e: False, on_error=type)
    assert issubclass(got[0], ZeroDivisionError)


def test_progress(cluster, capsys):
    told = []
    sd.pmap(square, range(300), progress=lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert counts == sorted(counts) and counts[-1] == 300 and {total for _, total in told} == {300}
    sd.pmap(square, iter(range(10)), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (10, None)
    sd.pmap(square, range(10), progress=True)
    assert "10/10" in capsys.readouterr().err


def test_elements_that_cannot_be_sent_cost_themselves_alone(cluster):
    elements = [threading.Lock() if i == 5 else i for i in range(20)]
    got = sd.pmap(lambda x: x, elements, on_error=lambda e: type(e))
    assert got[5] is sd.SerializationError and got[:5] + got[6:] == [i for i in range(20) if i != 5]


def test_results_that_cannot_be_sent_cost_themselves_alone(cluster):
    got = sd.pmap(lambda i: threading.Lock() if i == 50 else i, range(100), on_error=lambda e: e)
    assert isinstance(got[50], sd.SerializationError) and isinstance(got[50], sd.RemoteException)
    assert got[:50] + got[51:] == [i for i in range(100) if i != 50]


class Poison:
    """Cannot be read on a worker."""

    def __init__(self, pid):
        self.pid = pid

    def __setstate__(self, state):
        if sd.myid() != state["pid"]:
            raise RuntimeError("cannot be read here")
        self.__dict__ = state


def test_elements_that_cannot_be_read_cost_themselves_alone(cluster):
    elements = [Poison(1) if i == 3 else i for i in range(10)]
    got = sd.pmap(lambda x: x, elements, batch_size=5, on_error=lambda e: "unreadable")
    assert got == [0, 1, 2, "unreadable", 4, 5, 6, 7, 8, 9]


def test_an_error_of_the_input_comes_through(cluster):
    def broken():
        yield from range(10)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        sd.pmap(square, broken())


class Counted:
    """Counts how often it is pickled, and notes each time that it is read."""

    pickled = 0

    def __init__(self, loads):
        self.loads = loads

    def __call__(self, x):
        return x + 1

    def __reduce__(self):
        type(self).pickled += 1
        return _read_counted, (self.loads,)


def _read_counted(loads):
    loads.put(sd.myid())
    return Counted(loads)


def test_the_function_is_pickled_once_and_sent_once_to_each_worker(cluster):
    loads = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    Counted.pickled = 0
    assert sd.pmap(Counted(loads), range(1000), batch_size=3) == list(range(1, 1001))
    assert Counted.pickled == 1
    read = [loads.take() for _ in range(len(loads))]
    assert len(read) == len(set(read)) <= len(cluster)


def test_workers_forget_the_function(cluster):
    gc.collect()  # maps and pools that earlier tests left in circles
    sd.pmap(square, range(100))
    kept = {}

    def forgotten():
        kept.update({pid: sd.remotecall_fetch(_kept_functions, pid) for pid in cluster})
        return not any(kept.values())

    try:
        until(forgotten)
    except AssertionError:
        pytest.fail(f"kept: {kept}")


def test_workers_forget_what_everywhere_ran_when_they_are_interrupted_at_once(cluster):
    for _ in range(30):
        sd.everywhere("forgotten_at_once = 1", cluster)
        sd.interrupt(*cluster)
    until(lambda: not any(sd.remotecall_fetch(_kept_functions, pid) for pid in cluster))


def _kept_functions():
    """Return the functions that are kept, each with what it is once it is read."""
    return {key: repr(entry[2]) for key, entry in list(current_node().functions._table.items())}


# ---------------------------------------------------------------------- deaths


def die_at_7(i):
    if i == 7:
        os._exit(3)
    return i


def test_an_element_that_kills_its_worker_costs_itself_alone(fresh):
    pool = sd.WorkerPool(fresh(2))
    got = sd.pmap(die_at_7, range(100), pool=pool, on_error=lambda e: e)
    assert isinstance(got[7], sd.ProcessExitedException) and got[7].exitcode == 3
    assert got[:7] + got[8:] == [i for i in range(100) if i != 7]
    until(lambda: len(pool) == 1)


def test_with_retries_an_element_that_lost_its_worker_runs_elsewhere(fresh, tmp_path):
    def die_once(i):
        mark = tmp_path / "died"
        if i == 30 and not mark.exists():
            mark.touch()
            os._exit(1)
        return i

    pool = sd.WorkerPool(fresh(2))
    assert sd.pmap(die_once, range(60), pool=pool, retry_delays=[0]) == list(range(60))


def test_all_workers_die(fresh):
    pool = sd.WorkerPool(fresh(2))
    with within(10):
        got = sd.pmap(lambda i: os._exit(1), range(20), pool=pool, on_error=lambda e: type(e))
    assert got == [sd.ProcessExitedException] * 20


def test_a_worker_that_joins_the_pool_helps(fresh, cluster):
    pool = sd.WorkerPool(cluster[:1])
    joined = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    def work(i):
        joined.put(sd.myid())
        threading.Event().wait(0.01)
        return sd.myid()

    def push(_):
        if len(pool) == 1:
            pool.push(cluster[1])

    got = sd.pmap(work, range(60), pool=pool, batch_size=1, progress=lambda done, total: push(done))
    assert set(got) == set(cluster[:2])


# ---------------------------------------------------------------------- nesting and threads


@pytest.mark.parametrize("workers", [1, 3])
def test_nested(cluster, workers):
    pool = sd.WorkerPool(cluster[:workers])
    with within(15):
        got = sd.pmap(lambda i: sum(sd.pmap(square, range(i), pool=pool)), range(8), pool=pool)
    assert got == [sum(j * j for j in range(i)) for i in range(8)]


def test_nested_with_the_default_pool(cluster):
    with within(15):
        assert sd.pmap(lambda i: sum(sd.pmap(square, range(4))), range(8)) == [14] * 8


def test_from_many_threads_with_one_worker(cluster):
    pool = sd.WorkerPool(cluster[:1])
    got = {}

    def run(n):
        got[n] = sd.pmap(lambda x: x + n, range(200), pool=pool)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    with within(15):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(15)
    assert got == {n: [x + n for x in range(200)] for n in range(8)}


def test_no_element_waits_behind_a_slow_one_while_a_worker_is_free(cluster):
    pool = sd.WorkerPool(cluster[:2])
    gate = sd.RemoteChannel(lambda: sd.Channel(1))
    ended = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    def work(i):
        if i == 0:
            gate.take()
        ended.put(i)

    task = sd.async_(sd.pmap, work, range(12), pool=pool)
    with within(10):  # all others end though element 0 does not
        assert sorted(ended.take(timeout=5) for _ in range(11)) == list(range(1, 12))
    gate.put(None)
    task.wait(timeout=5)


# ---------------------------------------------------------------------- pgenerate


def test_pgenerate(cluster):
    assert list(sd.pgenerate(square, range(500))) == [i * i for i in range(500)]
    assert sorted(sd.pgenerate(square, range(500), ordered=False)) == [i * i for i in range(500)]
    assert list(sd.pgenerate(pow, [2, 3], [3, 2])) == [8, 9]
    assert list(sd.pgenerate(square, [])) == []


def test_pgenerate_reads_a_bounded_number_ahead(cluster):
    drawn = 0

    def source():
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn

    generator = sd.pgenerate(square, source())
    for i in range(1, 6):
        assert next(generator) == i * i
    assert drawn <= 5 + 16 * len(cluster)
    generator.close()


def test_pgenerate_ends_with_an_error_and_with_close(cluster):
    generator = sd.pgenerate(inverse, iter([1, 2, 0, 4]))
    assert next(generator) == 1
    with pytest.raises(ZeroDivisionError):
        list(generator)
    generator = sd.pgenerate(lambda _: threading.Event().wait(60), range(10))
    generator.close()
    started = sd.RemoteChannel(lambda: sd.Channel(99))

    def begin(i):
        started.put(i)
        if i:
            threading.Event().wait(60)
        return i

    generator = sd.pgenerate(begin, range(10))
    assert next(generator) == 0
    with within(5):
        generator.close()


def test_pgenerate_yields_what_is_ready_though_the_next_takes_long(cluster):
    """The first ends at once, so a worker that had got both would begin the second before it answers."""
    generator = sd.pgenerate(lambda i: threading.Event().wait(60 * i), range(10))
    with within(5):
        assert next(generator) is False
        generator.close()


def test_arrays_as_elements(cluster):
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.full(50_000, i, dtype=float) for i in range(12)]
    sums = sd.pmap(lambda a: a.sum(), arrays)
    assert sums == [50_000.0 * i for i in range(12)]
    back = sd.pmap(lambda a: a * 2, arrays)
    assert all((b == 2 * a).all() and b.flags.writeable for a, b in zip(arrays, back, strict=True))


def test_without_workers():
    script = """
import shmdist as sd
assert sd.pmap(lambda x: x + 1, range(5)) == [1, 2, 3, 4, 5]
assert list(sd.pgenerate(abs, [-1, 2])) == [1, 2]
assert sd.pmap(lambda x: 1 / x, [0, 1], on_error=lambda e: e.pid) == [1, 1.0]
print("fine")
"""
    from tests.integration.helpers import run_script

    assert run_script(script).clean() == "fine\n"
