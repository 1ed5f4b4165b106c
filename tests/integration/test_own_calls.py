"""Calls of a process to itself: they start in order, and none holds up another."""

import threading
import time

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import until, within


def everywhere_the_same(function, cluster):
    """Run `function` on process 1 and on a worker, which calls itself."""
    function()
    sd.remotecall_fetch(function, cluster[0])


def short_calls():
    me, begun = sd.myid(), []
    for future in [sd.remotecall(begun.append, me, n) for n in range(300)]:
        future.wait(timeout=20)
    assert begun == list(range(300))


def all_forms():
    me, begun = sd.myid(), []
    for n in range(0, 90, 5):
        sd.remote_do(begun.append, me, n)
        sd.remotecall(begun.append, me, n + 1)
        sd.remotecall_fetch(begun.append, me, n + 2)
        sd.spawnat(me, lambda n=n: begun.append(n + 3))
        sd.remotecall_wait(begun.append, me, n + 4)
    assert begun == list(range(90))


def long_and_short_ones():
    me, begun, gate = sd.myid(), [], threading.Event()

    def call(n):
        begun.append(n)
        if n % 3 == 0:
            gate.wait()
        elif n % 3 == 1:
            time.sleep(0.003)

    futures = [sd.remotecall(call, me, n) for n in range(60)]
    until(lambda: len(begun) == 60)
    assert begun == list(range(60))
    gate.set()
    for future in futures:
        future.wait(timeout=20)


def many_blocked_ones():
    me, gate, begun = sd.myid(), threading.Event(), threading.Semaphore(0)
    futures = [sd.remotecall(lambda: (begun.release(), gate.wait())[1], me) for _ in range(1000)]
    for _ in futures:
        assert begun.acquire(timeout=20)
    assert sd.remotecall_fetch(abs, me, -1) == 1
    assert sd.remotecall(abs, me, -1).fetch(timeout=20) == 1
    assert not any(future.isready() for future in futures)
    gate.set()
    assert all(future.fetch(timeout=20) for future in futures)


def calls_within_calls():
    me, log = sd.myid(), []

    def descend(n):
        log.append(n)
        if n:
            sd.remotecall(descend, me, n - 1)
            assert sd.remotecall_fetch(log.__len__, me) >= 12 - n
            assert sd.remotecall(abs, me, -n).fetch(timeout=20) == n

    sd.remotecall(descend, me, 10).wait(timeout=20)
    until(lambda: len(log) == 11)
    assert log == list(range(10, -1, -1))


def several_threads():
    me, begun = sd.myid(), []

    def call(who):
        for n in range(100):
            (sd.remotecall_fetch if n % 10 == 9 else sd.remotecall)(begun.append, me, (who, n))

    threads = [threading.Thread(target=call, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    until(lambda: len(begun) == 400)
    for who in range(4):
        assert [n for caller, n in begun if caller == who] == list(range(100))


@pytest.mark.parametrize(
    "calls",
    [short_calls, all_forms, long_and_short_ones, many_blocked_ones, calls_within_calls, several_threads],
)
def test_order(cluster, calls):
    everywhere_the_same(calls, cluster)
    own = current_node().reactor.own
    until(lambda: own.begun == own.made and not own._waiting and own._turn is None)


def test_everywhere_comes_after_earlier_calls(cluster):
    begun = []
    for n in range(50):
        sd.remotecall(begun.append, 1, n)
    sd.everywhere("x = len(begun)", begun=begun, procs=[1])
    assert sd.everywhere("del begun; globals().pop('x')", 1) == 50


def test_remote_do_does_not_hold_up_its_caller(cluster):
    gate, done = threading.Event(), threading.Event()
    with within(10):
        sd.remote_do(lambda: (gate.wait(20), done.set()), 1)
        assert not done.is_set()
        gate.set()
        assert done.wait(10)


def test_an_error_of_remote_do_is_printed(cluster, capfd):
    sd.remote_do(int, 1, "needle")
    sd.remote_do(exit, 1, 3)
    assert sd.remotecall_fetch(abs, 1, -1) == 1
    seen = []
    until(lambda: seen.append(capfd.readouterr().err) or "SystemExit: 3" in "".join(seen))
    assert "ValueError" in "".join(seen) and "needle" in "".join(seen)


def test_a_cancelled_call_holds_up_none(cluster):
    gate, begun = threading.Event(), threading.Event()

    def loop():
        begun.set()
        while not gate.is_set():
            time.sleep(0.001)

    looping = sd.remotecall(loop, 1)
    assert begun.wait(5)
    waiting = sd.remotecall(loop, 1)
    waiting.cancel()
    looping.cancel()
    assert sd.remotecall(abs, 1, -1).fetch(timeout=10) == 1
    for future in (looping, waiting):
        assert future.cancelled()
        with pytest.raises(sd.Cancelled):
            future.exception(timeout=10)


def _no_room(job):
    raise RuntimeError("there is no room for another thread")


def test_a_call_that_gets_no_thread_is_told_and_holds_up_none(cluster, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(current_node().reactor, "start", _no_room)
        with pytest.raises(RuntimeError, match="no room"):
            sd.remotecall(abs, 1, -1)
    assert sd.remotecall(abs, 1, -2).fetch(timeout=10) == 2


def test_a_finalizer_that_waits_before_a_call_begins_waits_for_no_call_behind_it():
    """In the moment between the taking of a call and its first step."""
    node, came = current_node(), []

    def held_up():
        came.append(sd.remotecall(abs, sd.myid(), -1).fetch(timeout=5))
        node.reactor.own._call(came.append, (2,), {})

    node.reactor.own.put(held_up)
    until(lambda: came == [1, 2])
    assert sd.remotecall(abs, sd.myid(), -1).fetch(timeout=5) == 1
