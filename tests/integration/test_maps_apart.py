"""Elements of a map are apart from one another: however they are batched, no other notices what one does."""

import builtins
import itertools
import os
import sys
import threading
import types

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until, within


class UnreadableHere:
    """A result that process 1 cannot read."""

    def __reduce__(self):
        return _read_elsewhere, ()


def _read_elsewhere():
    if sd.myid() == 1:
        raise RuntimeError("cannot be read here")
    return UnreadableHere()


@pytest.mark.parametrize("batch_size", [None, 10])
def test_results_that_cannot_be_read_cost_themselves_alone(cluster, batch_size):
    got = sd.pmap(
        lambda i: UnreadableHere() if i == 500 else i,
        range(1000),
        batch_size=batch_size,
        on_error=lambda e: "unreadable",
    )
    assert [i for i, value in enumerate(got) if value != i] == [500]


def append_one(items):
    items.append(1)
    return len(items)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_what_an_element_does_to_its_argument_no_other_sees(cluster, batch_size):
    """As with calls of their own: it must not depend on what travels in one message."""
    assert set(sd.pmap(append_one, [[]] * 500, batch_size=batch_size)) == {1}


def the_same_list(_):
    if not hasattr(builtins, "_shmdist_test_list"):
        builtins._shmdist_test_list = []
    return builtins._shmdist_test_list


@pytest.mark.parametrize("batch_size", [None, 7])
def test_results_are_the_callers_own(cluster, batch_size):
    got = sd.pmap(the_same_list, range(500), batch_size=batch_size)
    got[250].append(1)
    assert sum(map(len, got)) == 1


def test_nothing_waits_in_the_batch_of_a_slow_element(cluster):
    """One of two thousand cheap ones blocks; while the other worker has nothing to do, all others end."""
    gate = sd.RemoteChannel(lambda: sd.Channel(1))
    ended = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    def work(i):
        if i == 1000:
            gate.take()
        ended.put(i)

    task = sd.async_(sd.pmap, work, range(2000), pool=sd.WorkerPool(cluster[:2]))
    try:
        until(lambda: len(ended) == 1999, 5, "all but the slow one have ended")
    finally:
        gate.put(None)
        task.wait(timeout=10)


def test_slow_elements_side_by_side_are_shared_out(cluster):
    gate = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    started = sd.RemoteChannel(lambda: sd.Channel(float("inf")))

    def work(i):
        if 10_000 <= i < 10_010:
            started.put(sd.myid())
            gate.take()

    task = sd.async_(sd.pmap, work, range(20_000), pool=sd.WorkerPool(cluster[:2]))
    try:
        assert {started.take(timeout=5) for _ in range(2)} == set(cluster[:2])
    finally:
        for _ in range(10):
            gate.put(None)
        task.wait(timeout=10)


def die_at_7(i):
    threading.Event().wait(0.02)
    if i == 7:
        os._exit(3)
    return i


@pytest.mark.parametrize("batch_size", [1, None, 10])
@pytest.mark.parametrize("where", ["process 1", "a worker"])
def test_wherever_a_map_runs_only_the_culprit_is_lost(fresh, cluster, where, batch_size):
    pool = sd.WorkerPool(fresh(2))

    def run():
        return sd.pmap(die_at_7, range(40), pool=pool, batch_size=batch_size, on_error=lambda e: "lost")

    got = run() if where == "process 1" else sd.remotecall_fetch(run, cluster[0])
    assert [i for i, value in enumerate(got) if value != i] == [7] and len(pool) == 1


def with_lanes_from(first, run):
    node = current_node()
    before, node.requests.lanes = node.requests.lanes, itertools.count(first)
    try:
        return run()
    finally:
        node.requests.lanes = before


@pytest.mark.parametrize("lane", ["same", "other"])
def test_the_culprit_is_known_while_a_map_of_another_process_runs(fresh, cluster, lane):
    """Each process numbers its lanes: the notes of two must not overwrite one another."""
    pool = sd.WorkerPool(fresh(3))
    running = sd.RemoteChannel(lambda: sd.Channel(float("inf")))
    first = 5000 if lane == "same" else 5100

    def many():
        work = [running] * 400
        return with_lanes_from(
            first, lambda: sd.pmap(note_and_pause, work, pool=pool, batch_size=20, retry_delays=[0] * 9)
        )

    other = sd.remotecall(many, cluster[0])
    for _ in range(10):
        running.take(timeout=5)
    got = with_lanes_from(5000, lambda: sd.pmap(die_at_7, range(40), pool=pool, on_error=lambda e: e))
    assert [i for i, value in enumerate(got) if value != i] == [7] and len(pool) == 2
    assert other.fetch(timeout=10) == [None] * 400


def note_and_pause(running):
    running.put(None)
    threading.Event().wait(0.001)


def test_what_ends_a_process_ends_only_its_element(cluster):
    def leave(i):
        if i == 50:
            sys.exit(3)
        return i

    got = sd.pmap(leave, range(100), on_error=lambda e: type(e))
    assert got[50] is sd.RemoteException and got[:50] + got[51:] == [i for i in range(100) if i != 50]


def test_a_function_of_a_module_that_only_the_caller_has(cluster):
    module = types.ModuleType("shmdist_test_only_here")
    exec("def f(x): return x", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        with pytest.raises(ModuleNotFoundError, match="shmdist_test_only_here") as caught:
            sd.pmap(module.f, range(100))
        assert isinstance(caught.value, sd.RemoteException)
        got = sd.pmap(module.f, range(100), on_error=lambda e: isinstance(e, ModuleNotFoundError))
        assert got == [True] * 100
    finally:
        del sys.modules[module.__name__]
    assert sd.pmap(abs, range(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "keywords",
    [
        {"on_error": lambda e: {}["mine"]},
        {"retry_delays": [0], "retry_check": lambda s, e: {}["mine"]},
        {"on_error": lambda e: 1, "progress": lambda done, total: {}["mine"]},
    ],
)
def test_errors_of_the_callers_own_functions_come_through(cluster, keywords):
    with pytest.raises(KeyError, match="mine"):
        sd.pmap(lambda x: [][x], range(100), **keywords)


def test_an_input_that_uses_the_cluster_itself(cluster):
    assert sd.pmap(abs, (sum(sd.pmap(abs, range(3))) for _ in range(20))) == [3] * 20


def test_a_pool_without_workers_is_told_as_such(cluster):
    with pytest.raises(sd.ShmdistError, match="no workers"):
        sd.pmap(abs, [1], pool=sd.WorkerPool())
    with pytest.raises(sd.ShmdistError, match="no workers"):
        sd.distributed(max, pool=sd.WorkerPool())(abs)([1])


@pytest.mark.parametrize("batch_size", ["x", float("inf"), float("nan"), [1], 2.5])
def test_batch_sizes_that_are_none(cluster, batch_size):
    with pytest.raises((ValueError, TypeError), match="batch_size"):
        sd.pmap(abs, [1], batch_size=batch_size)


def test_the_input_is_not_read_on_when_all_workers_are_dead(fresh):
    """It may be endless. Twenty rounds, for it depends on which of the two deaths is noticed first."""

    def source():
        yield from range(100_000)
        raise AssertionError("the input is read on")

    def die(i):
        if i > 20:
            os._exit(1)

    for _ in range(20):
        with within(10), pytest.raises(sd.ProcessExitedException):
            sd.pmap(die, source(), pool=sd.WorkerPool(fresh(2)))


def test_pgenerate_goes_on_in_another_thread(cluster):
    generator = sd.pgenerate(abs, range(2000))
    got = [next(generator)]
    thread = threading.Thread(target=lambda: got.extend(generator))
    thread.start()
    for n in range(200):
        assert sd.remotecall_fetch(abs, cluster[0], -n) == n
    thread.join(10)
    assert got == list(range(2000))


def test_not_distributed_an_error_does_not_wait_for_the_rest(cluster):
    gate = threading.Event()
    threading.Timer(3, gate.set).start()
    try:
        with within(1), pytest.raises(ZeroDivisionError):
            sd.pmap(lambda i: gate.wait(5) if i else 1 / i, range(4), distributed=False)
    finally:
        gate.set()
