"""Workers that die: who is told, how fast, with what facts; and that the others go on."""

import os
import signal
import threading

import pytest

import shmdist as sd
from tests.integration.helpers import (
    is_alive,
    kill_self,
    loop_for_ever,
    meet_and_wait,
    reference_count,
    sleep_long,
    tell_and_run,
    until,
    within,
)

SOON = 1.0  # seconds in which a death must be noticed


@pytest.fixture
def started():
    """A channel by which calls tell that they have begun."""
    return sd.RemoteChannel(lambda: sd.Channel(100))


@pytest.fixture
def others(cluster):
    """The shared workers, which must come through unharmed."""
    yield cluster
    assert [sd.remotecall_fetch(abs, pid, -pid) for pid in cluster] == cluster
    assert sd.remotecall_fetch(sd.remotecall_fetch, cluster[0], abs, cluster[1], -1) == 1


def kill(pid):
    """Kill a worker, and return its operating system's process id."""
    ospid = sd.remotecall_fetch(os.getpid, pid)
    os.kill(ospid, signal.SIGKILL)
    return ospid


def exited(call, pid):
    with within(SOON), pytest.raises(sd.ProcessExitedException) as caught:
        call()
    assert caught.value.pid == pid
    return caught.value


def test_exit_code_and_stderr(fresh, others):
    [pid] = fresh()

    def leave():
        import sys

        for n in range(60):
            print(f"line {n}", file=sys.stderr)
        os._exit(3)

    error = exited(lambda: sd.remotecall_fetch(leave, pid), pid)
    assert (error.exitcode, error.signal) == (3, None)
    assert error.host and error.ospid and not is_alive(error.ospid)
    assert list(error.stderr_tail) == [f"line {n}" for n in range(10, 60)]
    assert "exited with code 3" in str(error) and "line 59" in str(error)
    assert pid not in sd.workers() and pid not in sd.procs()
    for call in (sd.remotecall, sd.remotecall_fetch, sd.remotecall_wait, sd.remote_do):
        assert exited(lambda call=call: call(abs, pid, 1), pid).exitcode == 3
    for make in (sd.Future, sd.RemoteChannel):
        exited(lambda make=make: make(pid), pid)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGTERM", "SIGABRT"])
def test_signals(fresh, others, name):
    [pid] = fresh()
    error = exited(lambda: sd.remotecall_fetch(kill_self, pid, getattr(signal, name)), pid)
    assert error.signal == name and name in str(error)
    assert not error.oom


def test_killed_when_idle(fresh, others):
    [pid] = fresh()
    ospid = kill(pid)
    with within(SOON):
        until(lambda: pid not in sd.workers())
    exited(lambda: sd.remotecall_fetch(abs, pid, 1), pid)
    assert not is_alive(ospid)
    # The other workers know as well.
    for other in others:
        until(lambda other=other: pid not in sd.remotecall_fetch(sd.procs, other))
        with pytest.raises(sd.ProcessExitedException):
            sd.remotecall_fetch(sd.remotecall_fetch, other, abs, pid, 1)


@pytest.mark.parametrize("function", [sleep_long, loop_for_ever])
def test_killed_in_a_users_function(fresh, others, started, function):
    [pid] = fresh()
    futures = [sd.remotecall(tell_and_run, pid, started, function) for _ in range(3)]
    for _ in futures:
        ospid = started.take(timeout=5)
    os.kill(ospid, signal.SIGKILL)
    for future in futures:
        error = exited(future.fetch, pid)
        assert error.signal == "SIGKILL" and error.ospid == ospid
        exited(future.fetch, pid)  # and again
        exited(future.wait, pid)
        assert future.done() and isinstance(future.exception(), sd.ProcessExitedException)


def test_all_that_waits_for_it_is_told(fresh, others, started):
    [pid] = fresh()
    channel = sd.RemoteChannel(lambda: sd.Channel(1), pid)
    future = sd.Future(pid)
    errors = []

    def wait_for(operation):
        try:
            operation()
        except BaseException as error:
            errors.append(error)

    operations = [
        channel.take,
        channel.fetch,
        channel.wait,
        future.fetch,
        future.wait,
        lambda: next(iter(channel)),
    ]
    threads = [threading.Thread(target=wait_for, args=(each,)) for each in operations]
    for thread in threads:
        thread.start()
    nested = [sd.remotecall(sd.fetch, other, future) for other in others]
    running = sd.remotecall(tell_and_run, pid, started, sleep_long)
    ospid = started.take(timeout=5)
    until(lambda: sd.remotecall_fetch(_waiting, pid) >= len(operations) + len(nested))
    os.kill(ospid, signal.SIGKILL)
    with within(2 * SOON):
        for thread in threads:
            thread.join(5)
        for each in (running, *nested):
            with pytest.raises(sd.ProcessExitedException):
                each.fetch(timeout=5)
    assert len(errors) == len(operations)
    assert all(isinstance(error, sd.ProcessExitedException) for error in errors), errors


def _waiting():
    from shmdist.runtime.node import current_node

    return len(current_node().requests.waiting)


def test_a_full_channel_of_the_dead(fresh, others):
    [pid] = fresh()
    channel = sd.RemoteChannel(lambda: sd.Channel(1), pid)
    channel.put(1)
    putter = sd.remotecall(sd.put, others[0], channel, 2)
    until(lambda: sd.remotecall_fetch(_waiting, pid) == 1)
    kill(pid)
    with within(SOON), pytest.raises(sd.ProcessExitedException):
        putter.fetch(timeout=5)
    for operation in (
        channel.take,
        channel.isready,
        channel.close,
        lambda: channel.put(3),
        lambda: len(channel),
    ):
        exited(operation, pid)


def test_values_fetched_before_stay(fresh, others):
    [pid] = fresh()
    fetched, left = sd.remotecall(list, pid, "ab"), sd.remotecall(list, pid, "cd").wait()
    assert fetched.fetch() == ["a", "b"]
    kill(pid)
    until(lambda: pid not in sd.procs())
    assert fetched.fetch() == ["a", "b"]
    exited(left.fetch, pid)


def test_small_results_arrive_with_the_news(fresh):
    [pid] = fresh()
    future = sd.remotecall(abs, pid, -5).wait()
    kill(pid)
    until(lambda: pid not in sd.procs())
    assert future.fetch() == 5


def test_a_dead_holder_holds_nothing(fresh, others):
    [pid] = fresh()
    before = sd.remotecall_fetch(reference_count, others[0])
    future = sd.remotecall(list, others[0], "abc").wait()
    channel = sd.RemoteChannel(others[0])
    sd.remotecall_fetch(_keep, pid, future, channel)
    del future, channel
    assert until(
        lambda: (reference_count(), sd.remotecall_fetch(reference_count, others[0]))[1] == before + 2
    )
    kill(pid)
    until(lambda: sd.remotecall_fetch(reference_count, others[0]) == before)


def _keep(*things):
    _kept.extend(things)


_kept = []


def test_what_the_dead_waited_for_is_withdrawn(fresh, others, started):
    [pid] = fresh()
    gate = sd.RemoteChannel(lambda: sd.Channel(1), others[0])
    sd.remotecall(meet_and_wait, pid, started, gate)
    started.take(timeout=5)
    until(lambda: sd.remotecall_fetch(_waiting, others[0]) == 1)
    kill(pid)
    until(lambda: sd.remotecall_fetch(_waiting, others[0]) == 0)
    gate.put("for the living")
    assert gate.take(timeout=2) == "for the living"


@pytest.mark.parametrize("direction", ["receiving", "sending"])
def test_killed_with_a_large_message_on_its_way(fresh, others, direction):
    """64 MiB here; 256 MiB, and many rounds, in the stress tests."""
    from tests.integration.large import kill_in_transfer

    kill_in_transfer(fresh, direction, 64 << 20)


def test_a_child_of_the_worker_may_live_on(fresh, others):
    """It holds the worker's pipes and links open, and the death is noticed all the same."""
    [pid] = fresh()

    def spawn_child():
        import subprocess

        return subprocess.Popen(["sleep", "30"], start_new_session=True, close_fds=False).pid

    child = sd.remotecall_fetch(spawn_child, pid)
    try:
        future = sd.remotecall(sleep_long, pid)
        kill(pid)
        exited(future.fetch, pid)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_worker_that_becomes_another_program(fresh, others):
    """Its link ends and its process does not; that is told as soon."""
    [pid] = fresh()
    error = exited(lambda: sd.remotecall_fetch(os.execv, pid, "/bin/sleep", ["sleep", "30"]), pid)
    until(lambda: not is_alive(error.ospid))


def test_many_die_at_once(fresh, others):
    pids = fresh(3)
    futures = [sd.remotecall(sleep_long, pid) for pid in pids]
    for pid in pids:
        kill(pid)
    with within(2):
        for future in futures:
            with pytest.raises(sd.ProcessExitedException):
                future.fetch(timeout=2)
    until(lambda: not set(pids) & set(sd.procs()))


def test_callbacks_and_waiters_of_concurrent_futures_are_told(fresh):
    import concurrent.futures

    [pid] = fresh()
    future = sd.remotecall(sleep_long, pid)
    told = threading.Event()
    future.add_done_callback(lambda f: told.set())
    kill(pid)
    done, _ = concurrent.futures.wait([future], timeout=2)
    assert done == {future} and told.wait(2)
    assert isinstance(future.exception(), sd.ProcessExitedException)
