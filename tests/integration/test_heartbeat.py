"""Hosts that fall silent, and those that only seem to."""

import contextlib
import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from tests.integration import helpers
from tests.integration.helpers import until, within
from tests.integration.sshd import Host, can_make_hosts, needs_sshd

pytestmark = needs_sshd
TIMEOUT = 2.0


def gone(ospid):
    return lambda: not helpers.is_alive(ospid)


def add(server, **params):
    [pid] = sd.addprocs([server.text], **server.params(**params))
    return pid, current_node().peers.members[pid].ospid


def waits_for(function):
    """Run `function` on a thread; return what gives its outcome, and when it came."""
    outcome = []

    def body():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)
        outcome.append(time.monotonic())

    thread = threading.Thread(target=body)
    thread.start()

    def result():
        thread.join(60)
        return outcome

    return result


@pytest.mark.parametrize("cut", [Host.line_down, Host.lose_all])
@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_a_call_under_way(host, server, cut, tunnel):
    pid, ospid = add(server, tunnel=tunnel)
    call = waits_for(lambda: sd.remotecall_fetch(time.sleep, pid, 60))
    until(lambda: current_node().requests.pending, 2)
    cut(host)
    at = time.monotonic()
    error, when = call()
    assert isinstance(error, sd.ProcessExitedException)
    assert "SHMDIST_HEARTBEAT_TIMEOUT" in str(error) and error.pid == pid
    assert when - at < TIMEOUT + 0.3
    assert pid not in sd.procs()
    until(gone(ospid), TIMEOUT + 1, "the worker ends itself")


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_no_call_under_way(host, server, tunnel):
    pid, ospid = add(server, tunnel=tunnel)
    host.lose_all()
    with within(TIMEOUT + 0.3):
        until(lambda: pid not in sd.procs(), TIMEOUT + 1)
    with within(0.5), pytest.raises(sd.ProcessExitedException):
        sd.remotecall_fetch(abs, pid, -1)
    until(gone(ospid), TIMEOUT + 1)


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_each_link_has_the_timeout_of_when_it_was_made(host, server, start, monkeypatch, tunnel):
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", "60")
    patient, _ = add(start("patient"), tunnel=tunnel)
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", f"{TIMEOUT:g}")
    pid, ospid = add(server, tunnel=tunnel)
    call = waits_for(lambda: sd.remotecall_fetch(time.sleep, pid, 60))
    until(lambda: current_node().requests.pending, 2)
    host.lose_all()
    with within(TIMEOUT + 0.3):
        error, _ = call()
    assert "SHMDIST_HEARTBEAT_TIMEOUT" in str(error) and error.pid == pid
    until(gone(ospid), TIMEOUT + 1)
    assert sd.remotecall_fetch(abs, patient, -1) == 1
    sd.rmprocs(patient)


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_a_write_that_is_blocked(host, server, tunnel):
    pid, ospid = add(server, tunnel=tunnel)
    assert sd.remotecall_fetch(abs, pid, -1) == 1
    host.lose_all()
    at = time.monotonic()
    call = waits_for(lambda: sd.remotecall_fetch(len, pid, np.ones(16 << 20)))
    error, when = call()
    assert isinstance(error, sd.ProcessExitedException)
    assert when - at < TIMEOUT + 0.5
    until(gone(ospid), TIMEOUT + 1)


def hold_the_interpreter(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return "done"


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_a_worker_that_holds_its_interpreter_lives(host, server, tunnel):
    pid, _ = add(server, tunnel=tunnel)
    call = sd.remotecall(hold_the_interpreter, pid, 3 * TIMEOUT)
    # More than the sockets between take: the write is blocked all the while.
    big = waits_for(lambda: sd.remotecall_fetch(len, pid, np.ones(8 << 20)))
    assert call.fetch(timeout=30) == "done"
    assert big()[0] == 8 << 20
    assert sd.remotecall_fetch(abs, pid, -1) == 1
    sd.rmprocs(pid)


@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_a_stopped_worker_lives(host, server, tunnel):
    pid, ospid = add(server, tunnel=tunnel)
    os.kill(ospid, signal.SIGSTOP)
    try:
        call = sd.remotecall(abs, pid, -1)
        assert sd.timedwait(lambda: pid not in sd.procs(), 2.5 * TIMEOUT) == "timed_out"
    finally:
        os.kill(ospid, signal.SIGCONT)
    assert call.fetch(timeout=5) == 1
    sd.rmprocs(pid)


def test_a_server_that_hangs_is_given_up(host, server):
    """Its kernel answers, so this takes longer than for a host that is silent."""
    pid, ospid = add(server, tunnel=True)
    hung = [helpers.parent(ospid)]
    while (above := helpers.parent(hung[-1])) not in (server.process.pid, 1):
        hung.append(above)
    call = waits_for(lambda: sd.remotecall_fetch(time.sleep, pid, 60))
    until(lambda: current_node().requests.pending, 2)
    try:
        for each in hung:
            os.kill(each, signal.SIGSTOP)
        at = time.monotonic()
        error, when = call()
    finally:
        for each in hung:
            os.kill(each, signal.SIGKILL)
    assert isinstance(error, sd.ProcessExitedException) and error.pid == pid
    assert when - at < 3 * TIMEOUT
    until(gone(ospid), TIMEOUT + 1)


def test_process_1_that_holds_its_interpreter_keeps_its_workers(host, server):
    pid, _ = add(server)
    hold_the_interpreter(2.5 * TIMEOUT)
    assert sd.remotecall_fetch(abs, pid, -1) == 1
    sd.rmprocs(pid)


def test_relayed_workers_learn_it_from_process_1(brief, start):
    if not can_make_hosts():
        pytest.skip("this machine does not let us make network namespaces (ip netns, from iproute2)")
    made = [Host(212), Host(213)]
    try:
        servers = [start(host.name, address=host.address, prefix=host.prefix) for host in made]
        first, second = (add(server)[0] for server in servers)
        ospid = current_node().peers.members[second].ospid
        assert sd.remotecall_fetch(sd.remotecall_fetch, first, abs, second, -3) == 3  # by process 1
        call = waits_for(lambda: sd.remotecall_fetch(sd.remotecall_fetch, first, time.sleep, second, 60))
        until(lambda: current_node().requests.pending, 2)
        at = time.monotonic()
        made[1].lose_all()
        error, when = call()
        assert isinstance(error, sd.ProcessExitedException | sd.RemoteException), error
        assert when - at < TIMEOUT + 0.5
        assert sd.remotecall_fetch(abs, first, -1) == 1
        until(gone(ospid), TIMEOUT + 1)
        sd.rmprocs(first)
    finally:
        for host in made:
            host.remove()


def test_an_idle_worker_uses_no_processor(host, server):
    pid, ospid = add(server)
    assert sd.remotecall_fetch(abs, pid, -1) == 1
    sd.timedwait(lambda: False, 0.5)
    before = helpers.cpu_ticks(ospid)
    sd.timedwait(lambda: False, 5.0)
    used = (helpers.cpu_ticks(ospid) - before) / os.sysconf("SC_CLK_TCK")
    assert used <= 0.03, "0.5 % of 5 s, and a tick; ten times as often as by default"
    sd.rmprocs(pid)


def test_nothing_looks_after_local_workers(fresh):
    fresh(1)
    heart = current_node().heartbeat
    with contextlib.suppress(AssertionError):
        until(lambda: not heart._running, 5)
    assert not [link for link in heart._links if not link.closed]
