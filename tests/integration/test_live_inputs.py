"""Inputs that block, that wait for the map, or that change what they gave: what is drawn is a value, and is sent at once."""

import array
import contextlib
import contextvars
import gc
import itertools
import operator
import os
import queue
import signal
import sqlite3
import threading
import weakref

import numpy as np
import pytest

import shmdist as sd
from tests.integration.helpers import until, within

SIZES = [None, 1, 5]


# ---------------------------------------------------------------------- elements are values


class Record:
    def __init__(self):
        self.number = 0


class Sample:
    def __init__(self):
        self.data, self.tags, self.number = np.zeros(1, int), [0], 0


class Slotted:
    __slots__ = ("number",)


def set_sample(buffer, i):
    buffer.data[0] = buffer.tags[0] = buffer.number = i


def set_array(buffer, i):
    buffer[...] = i


def set_first(buffer, i):
    buffer[0] = i


def set_key(buffer, i):
    buffer["number"] = i


def set_inner(buffer, i):
    buffer[0][1][0] = i


def set_number(buffer, i):
    buffer.number = i


def set_pair(buffer, i):
    buffer[0][0] = buffer[1][0] = i


def number_of(element):
    """Return the number that is in an element of any of the kinds above."""
    while not isinstance(element, (int, np.integer)):
        if isinstance(element, Sample):
            assert element.data[0] == element.tags[0] == element.number
        if isinstance(element, (Record, Sample, Slotted)):
            element = element.number
        elif isinstance(element, dict):
            element = element["number"]
        elif isinstance(element, np.ndarray):
            assert element.min() == element.max()
            element = int(element.flat[0])
        else:
            element = element[-1]
    return int(element)


KINDS = {
    "small array": (lambda: np.empty(5, int), set_array),
    "array": (lambda: np.empty(5000, int), set_array),
    "large array": (lambda: np.empty(100_000, int), set_array),
    "strided": (lambda: np.empty((300, 300), int)[::2, ::3], set_array),
    "fortran": (lambda: np.empty((300, 300), int, order="F"), set_array),
    "array of lists": (lambda: np.array([None], object), set_first),
    "list": (lambda: [0], set_first),
    "list of lists": (lambda: [[1, [0]]], set_inner),
    "dict": (dict, set_key),
    "bytearray": (lambda: bytearray(1), set_first),
    "array.array": (lambda: array.array("i", [0]), set_first),
    "object": (Record, set_number),
    "sample": (Sample, set_sample),
    "slots": (Slotted, set_number),
    "pair of arrays": (lambda: (np.zeros(1, int), np.zeros(1, int)), set_pair),
    "list of arrays": (lambda: [np.zeros(1, int), np.zeros(1, int)], set_pair),
}


def reused(kind, n=12):
    """Yield one object again and again."""
    make, fill = KINDS[kind]
    buffer = make()
    for i in range(n):
        fill(buffer, i)
        yield buffer


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_is_what_it_was_when_it_was_drawn(cluster, kind):
    expected = list(range(12))
    for batch_size in SIZES:
        assert sd.pmap(number_of, reused(kind), batch_size=batch_size) == expected
    assert list(sd.pgenerate(number_of, reused(kind))) == expected
    assert sd.pmap(number_of, reused(kind), pool=[1, cluster[0]], batch_size=2) == expected
    assert sd.pmap(number_of, reused(kind), pool=[1]) == expected
    assert sd.distributed(operator.add)(number_of)(reused(kind)) == sum(expected)
    assert sd.distributed(operator.add, schedule="dynamic", chunk=2)(number_of)(reused(kind)) == sum(expected)
    assert sd.distributed(operator.add, pool=[1])(number_of)(reused(kind)) == sum(expected)
    if kind not in ("object", "sample", "slots"):
        assert sd.pmap(number_of, reused(kind), distributed=False) == expected


def test_views_of_one_buffer(cluster):
    def windows(n):
        buffer = np.zeros(1000, int)
        for i in range(n):
            buffer[i : i + 100] = i
            yield buffer[i : i + 100]

    for batch_size in SIZES:
        assert sd.pmap(number_of, windows(20), batch_size=batch_size) == list(range(20))


def test_several_inputs(cluster):
    got = sd.pmap(lambda a, b, c: (number_of(a), b, number_of(c)), reused("array"), range(12), reused("list"))
    assert got == [(i, i, i) for i in range(12)]


def test_what_is_one_object_in_an_element_stays_one(cluster):
    def source():
        part, array = [1], np.zeros(3)
        for _ in range(4):
            yield [part, part]
            yield {"a": array, "b": array}
            element = [1]
            element.append(element)
            yield element

    def same(element):
        if isinstance(element, dict):
            return element["a"] is element["b"]
        return element[0] is element[1] or element[1] is element

    assert sd.pmap(same, source(), batch_size=5) == [True] * 12


def test_an_array_that_only_the_map_has_is_not_copied():
    from shmdist.scheduling.inputs import as_of_now

    def drawn(source):
        iterator = iter(source)
        element = next(iterator)
        address = element.ctypes.data
        copy = as_of_now(element)
        return copy.ctypes.data != address

    assert not drawn(np.zeros(9) for _ in range(2))
    held = np.zeros(9)
    assert drawn(iter([held])) and drawn(held[i:] for i in range(2))


def test_shared_arrays_and_references_stay_themselves(cluster):
    shared = sd.shared.zeros(3)
    channel = sd.RemoteChannel(lambda: sd.Channel(9))

    def write(element):
        element[0][0] += 1
        element[1].put(sd.myid())

    sd.pmap(write, ([shared, channel] for _ in range(3)), pool=cluster[:1], batch_size=1)
    assert shared[0] == 3 and len(channel) == 3


@pytest.mark.parametrize("batch_size", SIZES)
def test_a_retried_element_is_what_it_was_when_it_was_drawn(cluster, tmp_path, batch_size):
    def fail_once(buffer):
        mark = tmp_path / str(number_of(buffer))
        if not mark.exists():
            mark.touch()
            buffer[...] = -1
            raise OSError("once more")
        return number_of(buffer)

    for kind in ("array", "large array"):
        got = sd.pmap(fail_once, reused(kind), batch_size=batch_size, retry_delays=[0.001])
        assert got == list(range(12))
        for mark in tmp_path.iterdir():
            mark.unlink()


@pytest.mark.parametrize("batch_size", SIZES)
def test_after_a_death_elements_are_sent_as_they_were_drawn(fresh, tmp_path, batch_size):
    def die_once(buffer):
        if number_of(buffer) == 5 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return number_of(buffer)

    got = sd.pmap(die_once, reused("array", 40), pool=fresh(2), batch_size=batch_size, retry_delays=[0])
    assert got == list(range(40))


# ---------------------------------------------------------------------- inputs that wait


def pmap(f, source, **options):
    return sd.pmap(f, source, **options)


def generate(f, source, **options):
    return list(sd.pgenerate(f, source))


@pytest.mark.parametrize("run", [pmap, generate])
@pytest.mark.parametrize("batch_size", SIZES)
@pytest.mark.parametrize("first", [1, 7])
def test_what_is_drawn_is_sent_before_the_input_is_waited_for(cluster, run, batch_size, first):
    """The input goes on when the elements that it gave are done."""
    done = sd.shared.zeros(first)

    def source():
        yield from range(first)
        until(lambda: done.all(), 10, "all are done")
        yield first

    def work(i):
        if i < first:
            done[i] = 1
        return i

    with within(20):
        assert run(work, source(), batch_size=batch_size) == list(range(first + 1))


def test_results_are_given_out_while_the_input_is_waited_for(cluster):
    """The input gives an element when it has been told of the result before it."""
    told = queue.Queue()

    def source():
        yield 1
        yield from iter(lambda: told.get(timeout=10), None)

    got = []
    with within(20):
        for value in sd.pgenerate(lambda x: 2 * x, source()):
            got.append(value)
            told.put(value if len(got) < 6 else None)
    assert got == [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("batch_size", SIZES)
def test_retries_run_while_the_input_is_waited_for(cluster, tmp_path, batch_size):
    mark = tmp_path / "tried"
    done = sd.shared.zeros(1)

    def source():
        yield 0
        until(lambda: done[0], 10, "it is tried again")
        yield 1

    def fail_once(i):
        if i == 0 and not mark.exists():
            mark.touch()
            raise OSError("once more")
        done[0] = 1
        return i

    with within(20):
        assert sd.pmap(fail_once, source(), batch_size=batch_size, retry_delays=[0.01]) == [0, 1]


class Broken(Exception):
    pass


def breaks(n):
    yield from range(n)
    raise Broken("the input broke")


@pytest.mark.parametrize("n", [0, 1, 5, 500])
@pytest.mark.parametrize("workers", ["some", "none"])
def test_what_is_due_comes_before_the_error_of_the_input(cluster, n, workers):
    got = []
    pool = [1] if workers == "none" else cluster
    with pytest.raises(Broken) as caught:
        for value in sd.pgenerate(abs, breaks(n), pool=pool):
            got.append(value)
    assert got == list(range(n)) and caught.traceback[-1].name == "breaks"
    for batch_size in SIZES:
        done = sd.shared.zeros(max(n, 1))

        def work(i, done=done):
            done[i] = 1

        with pytest.raises(Broken):
            sd.pmap(work, breaks(n), batch_size=batch_size, pool=pool)
        assert done.sum() == n
    ran = []
    with pytest.raises(Broken):
        sd.pmap(ran.append, breaks(n), distributed=False)
    assert sorted(ran) == list(range(n))


def test_an_input_that_changes_while_it_is_read(cluster):
    elements = {i: i for i in range(5000)}

    def add(done, _):
        elements[-done] = 0

    with pytest.raises(RuntimeError, match="changed size"):
        sd.pmap(abs, elements, batch_size=1, progress=add)


def test_an_input_that_uses_the_cluster(cluster):
    def source():
        for i in range(5):
            yield sum(sd.pmap(abs, (j for j in range(i)))) + sd.remotecall_fetch(abs, cluster[0], -1)

    expected = [sum(range(i)) + 1 for i in range(5)]
    with within(20):
        assert sd.pmap(abs, source()) == expected == list(sd.pgenerate(abs, source()))
        assert sd.pmap(abs, sd.pgenerate(abs, source())) == expected
        assert list(sd.pgenerate(abs, sd.pgenerate(abs, source()))) == expected
        assert sd.remotecall_fetch(lambda: sd.pmap(abs, source()), cluster[0]) == expected


def test_an_error_ends_a_map_over_an_endless_input(cluster):
    drawn = itertools.count()

    def fail_at_50(i):
        return 1 // (i - 50)

    with within(20), pytest.raises(ZeroDivisionError):
        sd.pmap(fail_at_50, drawn, batch_size=1)
    assert next(drawn) > 50


# ---------------------------------------------------------------------- threads and contexts

variable = contextvars.ContextVar("variable", default=0)


def test_an_input_that_needs_what_the_caller_holds(cluster):
    """A lock that its holder may take again, for instance."""
    lock = threading.RLock()

    def source():
        for i in range(20):
            with lock:
                yield i

    with lock, within(10):
        assert sd.pmap(abs, source()) == list(range(20))


def test_threads_of_an_input_end_with_the_map(cluster):
    before = threading.active_count()
    for _ in range(50):
        results = sd.pgenerate(abs, itertools.count())
        assert next(results) == 0
        results.close()
        sd.pmap(abs, (i for i in range(5)))
    assert threading.active_count() < before + 20


def test_where_an_input_is_read(cluster):
    """By pmap on the calling thread, also when it is slow; by pgenerate on one other; in the caller's context."""
    threads = []
    gate = threading.Event()

    def source():
        for i in range(20):
            threads.append(threading.get_ident())
            assert variable.get() == 7
            if i in (5, 10):
                gate.wait(0.05)
            yield i

    token = variable.set(7)
    try:
        assert sd.pmap(abs, source()) == list(range(20))
        assert set(threads) == {threading.get_ident()}
        threads.clear()
        assert list(sd.pgenerate(abs, source())) == list(range(20))
        assert len(set(threads)) == 1
    finally:
        variable.reset(token)


def test_rows_of_a_database(cluster):
    """A cursor belongs to the thread that made it."""
    with sqlite3.connect(":memory:") as database:
        database.execute("create table t (x)")
        database.executemany("insert into t values (?)", [(i,) for i in range(100)])
        rows = database.execute("select x from t order by x")
        assert sd.pmap(operator.itemgetter(0), rows) == list(range(100))
        rows = database.execute("select x from t order by x")
        assert sd.pmap(operator.itemgetter(0), (row for row in rows), batch_size=5) == list(range(100))
    database.close()


# ---------------------------------------------------------------------- early ends


def test_close_lets_go_of_the_input(cluster):
    ended = threading.Event()

    def source():
        try:
            yield from itertools.count()
        finally:
            ended.set()

    gc.disable()
    try:
        results = sd.pgenerate(abs, source())
        assert [next(results) for _ in range(5)] == list(range(5))
        results.close()
        assert ended.wait(5)
        ended.clear()
        with contextlib.suppress(ZeroDivisionError):
            sd.pmap(lambda i: 1 // (i - 3), source())
        assert ended.is_set()
    finally:
        gc.enable()


def test_close_leaves_the_programs_own_iterator_alone(cluster):
    source = (i for i in range(1000))
    results = sd.pgenerate(abs, source)
    assert next(results) == 0
    results.close()
    assert next(source) < 200


def test_close_does_not_wait_for_an_input_that_blocks(cluster):
    gate, reading, ended = threading.Event(), threading.Event(), threading.Event()

    def source():
        try:
            yield 1
            reading.set()
            gate.wait(20)
            yield 2
        finally:
            ended.set()

    results = sd.pgenerate(abs, source())
    assert next(results) == 1
    assert reading.wait(5)
    with within(5):
        results.close()
    assert not ended.is_set()
    gate.set()
    assert ended.wait(5)


@pytest.mark.parametrize("run", [pmap, generate])
@pytest.mark.parametrize("what", ["generator", "channel"])
def test_ctrl_c_while_the_input_blocks(cluster, run, what):
    channel = sd.RemoteChannel(lambda: sd.Channel(9))
    gate = threading.Event()
    seen = sd.RemoteChannel(lambda: sd.Channel(9))

    def source():
        yield 1
        gate.wait(20)

    def interrupt():
        seen.take(timeout=10)
        os.kill(os.getpid(), signal.SIGINT)

    channel.put(1)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with within(5), pytest.raises(KeyboardInterrupt):
            run(seen.put, source() if what == "generator" else channel)
    finally:
        gate.set()
        thread.join(10)
    channel.put(2)  # nothing waits at the channel any more
    assert channel.take(timeout=5) == (2 if what == "channel" else 1)


@pytest.mark.parametrize("make", [lambda: sd.Channel(9), lambda: sd.RemoteChannel(lambda: sd.Channel(9))])
@pytest.mark.parametrize("run", [pmap, generate])
def test_an_error_ends_a_map_over_a_channel_that_is_empty(cluster, make, run):
    channel = make()
    channel.put(0)
    with within(5), pytest.raises(ZeroDivisionError):
        run(lambda i: 1 / i, channel)
    channel.put(1)
    assert channel.take(timeout=5) == 1


@pytest.mark.parametrize("run", [pmap, generate])
def test_a_map_that_is_over_holds_nothing_of_its_input(cluster, run):
    alive = weakref.WeakSet()

    def source(error):
        for i in range(20):
            item = Record()
            alive.add(item)
            item.number = i
            if i == 10:
                threading.Event().wait(0.02)
            yield item
        if error:
            raise Broken

    gc.collect()
    gc.disable()
    try:
        assert run(number_of, source(False)) == list(range(20))
        until(lambda: not alive, 5, "elements are gone")
        with pytest.raises(Broken):
            run(number_of, source(True))
        until(lambda: not alive, 5, "elements are gone after an error")
    finally:
        gc.enable()
