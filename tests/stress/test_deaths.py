"""Processes that are killed or stand still, at moments of chance and with much on its way."""

import os
import random
import signal
import threading
import time

import pytest

import shmdist as sd
from tests.integration.helpers import Script, is_alive, sleep_long, tell_and_run, until, within
from tests.integration.large import kill_in_transfer


@pytest.mark.parametrize("direction", ["receiving", "sending"])
def test_killed_with_256_mib_on_its_way(cluster, fresh, direction):
    kill_in_transfer(fresh, direction, 256 << 20)
    assert [sd.remotecall_fetch(abs, pid, -pid) for pid in cluster] == cluster


def test_killed_at_any_moment(cluster, fresh):
    """All calls end, in a second, with the value or with the right error; the others notice nothing."""
    for round_ in range(12):
        pids = fresh(2)
        victim = random.choice(pids)
        ospid = sd.remotecall_fetch(os.getpid, victim)
        outcomes, bad = [], []

        def work(pids=pids, victim=victim, outcomes=outcomes, bad=bad):
            while True:
                pid = random.choice([*pids, *cluster])
                try:
                    size = random.choice([1, 100, 100_000])
                    assert len(sd.remotecall_fetch(lambda x: x, pid, b"x" * size)) == size
                except sd.ProcessExitedException as error:
                    outcomes.append(error)
                    if pid != victim:
                        bad.append((pid, error))
                    return
                except BaseException as error:
                    bad.append((pid, error))
                    return

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        threading.Event().wait(random.random() / 20)
        os.kill(ospid, signal.SIGKILL)
        with within(5):
            for thread in threads:
                thread.join(5)
        assert not any(thread.is_alive() for thread in threads), f"round {round_}: a call hangs"
        assert not bad, bad
        assert all(death.signal == "SIGKILL" for death in outcomes)
        sd.rmprocs(*[pid for pid in pids if pid != victim])


def test_a_worker_that_stands_still_holds_up_no_other(cluster, fresh):
    """SIGSTOP: calls to it wait, also with large arguments; all others go on; then it goes on too."""
    [pid] = fresh()
    ospid = sd.remotecall_fetch(os.getpid, pid)
    big = b"x" * (8 << 20)
    os.kill(ospid, signal.SIGSTOP)
    try:
        got = []
        threads = [
            threading.Thread(target=lambda: got.append(len(sd.remotecall_fetch(lambda x: x, pid, big))))
        ]
        threads += [
            threading.Thread(target=lambda: got.append(sd.remotecall_fetch(abs, pid, -1))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        with within(5):
            for n in range(200):
                assert sd.remotecall_fetch(abs, cluster[n % len(cluster)], -n) == n
        assert got == []
        with pytest.raises(TimeoutError), within(2):
            sd.Future(cluster[0]).fetch(timeout=0.1)
    finally:
        os.kill(ospid, signal.SIGCONT)
    for thread in threads:
        thread.join(10)
    assert sorted(got) == [1, 1, 1, 1, 8 << 20]


def test_a_stopped_worker_is_removed(fresh):
    [pid] = fresh()
    ospid = sd.remotecall_fetch(os.getpid, pid)
    os.kill(ospid, signal.SIGSTOP)
    with within(10):
        sd.rmprocs(pid)
    assert not is_alive(ospid)


def test_a_program_with_a_stopped_worker_ends():
    script = Script(
        """
import os, signal, shmdist as sd
sd.addprocs(2)
os.kill(sd.remotecall_fetch(os.getpid, 2), signal.SIGSTOP)
"""
    )
    with within(6):
        assert script.end(6).code == 0


def test_adding_and_removing_while_others_call(cluster):
    stop, errors = threading.Event(), []

    def call():
        while not stop.is_set():
            try:
                pid = random.choice(sd.workers())
                sd.remotecall_fetch(sd.remotecall_fetch, pid, abs, random.choice(sd.procs()), -1)
            except (sd.ProcessExitedException, ValueError):
                continue  # it was there a moment ago
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        with sd.addprocs(2) as pids:
            sd.remotecall_fetch(sd.remotecall_fetch, pids[0], abs, pids[1], 1)
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not errors, errors


def test_kill_9_of_the_program_at_any_moment():
    for _ in range(6):
        script = Script(
            """
import threading, shmdist as sd
sd.addprocs(3)
print("up", flush=True)
def work():
    while True:
        sd.remotecall_fetch(lambda x: x, 2, b"x" * 1000000)
        sd.remotecall_fetch(sd.remotecall_fetch, 3, len, 4, b"x" * 100000)
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
"""
        )
        assert script.line() == "up"
        time.sleep(random.random() / 10)
        script.process.kill()
        assert script.end(5).code == -signal.SIGKILL


def test_interrupts_that_race(cluster):
    """Interrupts from all sides on calls of all lengths; every call ends, every worker lives."""
    stop, bad = threading.Event(), []

    def call():
        while not stop.is_set():
            try:
                sd.remotecall_fetch(time.sleep, random.choice(cluster), random.random() / 500)
                sd.remotecall_fetch(
                    sd.remotecall_fetch, random.choice(cluster), abs, random.choice(cluster), 1
                )
            except sd.RemoteException as error:
                if "KeyboardInterrupt" not in str(error):
                    bad.append(error)
            except BaseException as error:
                bad.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 5
    while time.monotonic() < end and not bad:
        sd.interrupt(random.choice(cluster))
        stop.wait(random.random() / 100)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert not bad, bad
    started = sd.RemoteChannel()
    future = sd.remotecall(tell_and_run, cluster[0], started, sleep_long)
    started.take(timeout=5)
    sd.interrupt(cluster[0])
    assert isinstance(future.exception(timeout=5), sd.RemoteException)
    until(lambda: sd.remotecall_fetch(abs, cluster[0], -1) == 1)
