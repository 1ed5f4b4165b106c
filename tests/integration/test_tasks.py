"""async_, sync, timedwait."""

import asyncio
import concurrent.futures
import threading

import pytest

import shmdist as sd
from tests.integration.helpers import within


def test_waits_that_time_out_leave_nothing():
    gate = threading.Event()
    task = sd.async_(gate.wait)
    for _ in range(20):
        with pytest.raises(TimeoutError):
            task.fetch(timeout=0.001)
        with pytest.raises(TimeoutError):
            task.wait(timeout=0)
    assert len(task._done_callbacks) == 1 and not task._waiter.locks
    others = [sd.async_(task.fetch) for _ in range(3)]
    gate.set()
    assert [other.fetch(timeout=5) for other in others] == [True] * 3


def test_a_task_has_every_face():
    task = sd.async_(divmod, 7, 2)
    assert task.fetch() == (3, 1) == task.result(timeout=1) == sd.fetch(task)
    assert task.wait() is task and task.isready() and task.done() and task.exception() is None
    assert concurrent.futures.wait([task]).done == {task}
    assert asyncio.run(_await(sd.async_(pow, 2, 4))) == 16
    got = []
    sd.async_(abs, -3).add_done_callback(lambda t: got.append(t.result()))
    sd.timedwait(lambda: got, 5, 0.001)
    assert got == [3]


async def _await(thing):
    return await thing


def test_a_task_fails_with_its_own_error():
    task = sd.async_(int, "x")
    for ask in (task.fetch, task.wait, task.result):
        with pytest.raises(ValueError, match="invalid literal"):
            ask()
    assert isinstance(task.exception(), ValueError)


def test_a_task_times_out_and_goes_on():
    event = threading.Event()
    task = sd.async_(event.wait, 10)
    for ask in (task.fetch, task.wait, task.result, task.exception):
        with within(2), pytest.raises(TimeoutError):
            ask(timeout=0.01)
    assert not task.isready()
    event.set()
    assert task.fetch(timeout=5) is True


def test_sync_waits_for_all(cluster):
    gate = threading.Event()
    with sd.sync():
        tasks = [sd.async_(gate.wait, 5), sd.spawn(abs, -1), sd.remotecall(abs, cluster[0], -2)]
        sd.async_(lambda: tasks.append(sd.spawn(abs, -3)))  # begun inside a task of the block
        sd.distributed(lambda i: None)(range(3))
        gate.set()
    assert all(task.isready() for task in tasks) and len(tasks) == 4


def test_sync_tells_all_errors(cluster):
    with pytest.raises(sd.CompositeException) as caught, sd.sync():
        sd.spawn(int, "x")
        sd.async_(lambda: 1 / 0)
        sd.spawn(abs, 1)
    assert {ValueError, ZeroDivisionError} == {
        kind
        for kind in (ValueError, ZeroDivisionError)
        for e in caught.value.exceptions
        if isinstance(e, kind)
    }
    assert len(caught.value.exceptions) == 2


def test_sync_and_an_error_of_its_block(cluster):
    with pytest.raises(LookupError, match="mine"), sd.sync():
        sd.spawn(abs, 1)
        raise LookupError("mine")
    with pytest.raises(sd.CompositeException) as caught, sd.sync():
        sd.spawn(int, "x")
        raise LookupError("mine")
    assert len(caught.value.exceptions) == 2


def test_sync_tells_what_is_no_exception_too(cluster):
    def leave():
        raise SystemExit(3)

    with pytest.raises(sd.CompositeException) as caught, sd.sync():
        sd.async_(leave)
        sd.spawn(leave)
    assert [type(error) for error in caught.value.exceptions] == [sd.RemoteException] * 2
    assert [type(error.captured.ex) for error in caught.value.exceptions] == [SystemExit] * 2


def test_sync_nests(cluster):
    with sd.sync():
        outer = sd.spawn(abs, -1)
        with pytest.raises(sd.CompositeException), sd.sync():
            sd.spawn(int, "x")
    assert outer.isready()


def test_timedwait():
    assert sd.timedwait(lambda: True, 1) == "ok"
    with within(1):
        assert sd.timedwait(lambda: False, 0.05, 0.01) == "timed_out"
    counts = iter(range(100))
    assert sd.timedwait(lambda: next(counts) > 3, 5, 0.001) == "ok"
    with pytest.raises(ValueError, match="pollint"):
        sd.timedwait(lambda: True, 1, 0)


def test_async_wants_a_function():
    with pytest.raises(TypeError, match="callable"):
        sd.async_(5)
