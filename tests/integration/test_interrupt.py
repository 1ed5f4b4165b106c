"""interrupt(pid), and cancelling: the calls that run there end, and nothing else suffers."""

import time

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration.helpers import loop_for_ever, meet_and_wait, sleep_long, tell_and_run, until, within


@pytest.fixture
def started():
    """A channel by which calls tell that they have begun."""
    return sd.RemoteChannel(lambda: sd.Channel(100))


def assert_interrupted(future, timeout=2.0):
    with within(timeout), pytest.raises(sd.RemoteException) as caught:
        future.fetch(timeout=timeout)
    assert not isinstance(caught.value, KeyboardInterrupt)
    assert "KeyboardInterrupt" in str(caught.value)
    assert type(caught.value.captured.ex) is KeyboardInterrupt


def test_calls_that_have_not_begun_are_interrupted_too(cluster):
    for _ in range(10):
        futures = [sd.remotecall(sleep_long, cluster[0]) for _ in range(3)]
        sd.interrupt(cluster[0])
        for future in futures:
            assert_interrupted(future)
        assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


def test_idle_workers_are_unharmed(cluster):
    for _ in range(20):
        sd.interrupt(cluster[0])
        sd.interrupt(*cluster)
        sd.interrupt(cluster)
        sd.interrupt()
        assert [sd.remotecall_fetch(abs, pid, -pid) for pid in cluster] == cluster


@pytest.mark.parametrize("function", [sleep_long, loop_for_ever])
def test_one_running_call(cluster, started, function):
    future = sd.remotecall(tell_and_run, cluster[0], started, function)
    started.take(timeout=5)
    sd.interrupt(cluster[0])
    assert_interrupted(future)
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1


@pytest.mark.parametrize(("function", "args"), [(loop_for_ever, ()), (time.sleep, (0.6,))])
def test_several_calls_at_once(cluster, started, function, args):
    # A sleep on another thread than the main one cannot be ended; its caller need not wait for it.
    futures = [sd.remotecall(tell_and_run, cluster[0], started, function, *args) for _ in range(3)]
    for _ in futures:
        started.take(timeout=5)
    other = sd.remotecall(meet_and_wait, cluster[1], started, gate := sd.RemoteChannel())
    started.take(timeout=5)
    sd.interrupt(cluster[0])
    for future in futures:
        assert_interrupted(future, 0.5)
    assert sd.remotecall_fetch(abs, cluster[0], -1) == 1
    gate.put("unharmed")
    assert other.fetch(timeout=5) == "unharmed"


def test_calls_that_wait_in_the_runtime(cluster, started):
    a, b = cluster[:2]
    gate = sd.RemoteChannel(lambda: sd.Channel(1), b)
    local = sd.remotecall(lambda s: (s.put(1), sd.Channel(1).take()), a, started)
    far = sd.remotecall(meet_and_wait, a, started, gate)
    nested = sd.remotecall(lambda s: sd.remotecall_fetch(tell_and_run, b, s, sleep_long), a, started)
    for _ in range(3):
        started.take(timeout=5)
    sd.interrupt(a)
    for future in (local, far, nested):
        assert_interrupted(future)
    gate.put("not lost")
    assert gate.take(timeout=2) == "not lost"
    # What the nested call had running on b was cancelled with it.
    until(lambda: not [r for r in sd.remotecall_fetch(_running, b) if "_running" not in r])


def _running():
    from tests.integration.helpers import settled_state

    return settled_state()["running"]


def test_each_form_of_call(cluster, started):
    import threading

    caught = []

    def fetch():
        try:
            sd.remotecall_fetch(tell_and_run, cluster[0], started, loop_for_ever)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    started.take(timeout=5)
    sd.interrupt(cluster[0])
    thread.join(5)
    assert isinstance(caught[0], sd.RemoteException) and "KeyboardInterrupt" in str(caught[0])


def test_the_call_may_catch_it(cluster, started):
    def stubborn(started):
        try:
            started.put(1)
            while True:
                pass
        except KeyboardInterrupt:
            return "caught"

    for _ in range(5):
        future = sd.remotecall(stubborn, cluster[0], started)
        started.take(timeout=5)
        sd.interrupt(cluster[0])
        assert future.fetch(timeout=5) == "caught"


def test_an_interrupt_never_hits_the_next_call(cluster, started):
    """The interrupt races with the end of the call that it is meant for."""
    for _ in range(100):
        future = sd.remotecall(abs, cluster[0], -1)
        sd.interrupt(cluster[0])
        try:
            assert future.fetch(timeout=5) == 1
        except sd.RemoteException as error:
            assert "KeyboardInterrupt" in str(error)
        assert sd.remotecall_fetch(sum, cluster[0], range(100)) == 4950


def test_from_a_worker(cluster, started):
    future = sd.remotecall(tell_and_run, cluster[0], started, loop_for_ever)
    started.take(timeout=5)
    sd.remotecall_fetch(sd.interrupt, cluster[1], cluster[0])
    assert_interrupted(future)


def test_unknown_and_dead_processes():
    with pytest.raises(ValueError, match="999"):
        sd.interrupt(999)
    with pytest.raises(TypeError):
        sd.interrupt("2")


def test_threads_that_an_exception_does_not_reach_end_later(cluster, started):
    """A sleep on another thread than the main one: the caller has the error at once."""
    first = sd.remotecall(tell_and_run, cluster[0], started, loop_for_ever)
    started.take(timeout=5)
    second = sd.remotecall(tell_and_run, cluster[0], started, time.sleep, 0.5)
    started.take(timeout=5)
    sd.interrupt(cluster[0])
    assert_interrupted(first)
    assert_interrupted(second, 0.45)


def test_cancelled_calls_free_what_they_held(cluster, started):
    for _ in range(20):
        future = sd.remotecall(tell_and_run, cluster[0], started, loop_for_ever)
        started.take(timeout=5)
        assert future.cancel()
        with pytest.raises((sd.RemoteException, sd.Cancelled)):
            future.fetch(timeout=5)


def _lose_the_first(lost):
    """Let this process's next signal to a call come to nothing."""
    thread_state = current_node().reactor._main
    strike = type(thread_state).interrupt_call

    def lossy(self, task):
        if lost:
            strike(self, task)
        else:
            lost.append(task)

    type(thread_state).interrupt_call = lossy


def test_a_signal_that_comes_just_before_a_system_call_is_repeated(fresh, started):
    [pid] = fresh()
    sd.remotecall_wait(_lose_the_first, pid, [])
    future = sd.remotecall(tell_and_run, pid, started, sleep_long)
    started.take(timeout=5)
    sd.interrupt(pid)
    assert_interrupted(future)
    assert sd.remotecall_fetch(abs, pid, -1) == 1
