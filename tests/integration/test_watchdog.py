"""The process beside a worker on another host, which ends it when its road is cut and its interpreter held."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

import shmdist as sd
from shmdist.membership.controller import ClusterController
from shmdist.runtime.node import current_node
from tests.integration import helpers
from tests.integration.helpers import Script, until, within
from tests.integration.sshd import Host, needs_sshd

pytestmark = needs_sshd
TIMEOUT = 2.0
each_road = pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])


def watchers(host):
    """Return the watchers that live on a host."""
    return [ospid for ospid in host.processes() if helpers.name_of(ospid) == "shmdist-watcher"]


def add(host, server, **params):
    """Add a worker; return its id, its process and its watcher's."""
    before = watchers(host)
    [pid] = sd.addprocs([server.text], **server.params(**params))
    ospid = current_node().peers.members[pid].ospid
    [watcher] = set(watchers(host)) - set(before)
    return pid, ospid, watcher


def hold(seconds, mark=None):
    """Let nobody else have the interpreter; say so with a byte in a file."""
    c = ctypes.PyDLL(None)
    if mark is not None:
        c.write(os.open(mark, os.O_WRONLY | os.O_CREAT), b"x", 1)
    c.usleep(int(seconds * 1e6))
    return "done"


def hold_for_long(pid, folder):
    """Have a worker's interpreter held; return the call when it is."""
    mark = folder / f"held by {pid}"
    call = sd.remotecall(hold, pid, 600, str(mark))
    until(lambda: mark.exists() and mark.stat().st_size, 5)
    return call


def are_gone(*ospids):
    return lambda: not any(map(helpers.is_alive, ospids))


@each_road
@pytest.mark.parametrize("cut", [Host.line_down, Host.lose_all])
def test_a_road_is_cut(host, server, tmp_path, cut, tunnel):
    pid, *ospids = add(host, server, tunnel=tunnel)
    call = hold_for_long(pid, tmp_path)
    cut(host)
    with within(TIMEOUT + 0.1):
        until(are_gone(*ospids), 3 * TIMEOUT)
    with within(0.5), pytest.raises(sd.ProcessExitedException):
        call.fetch()


@each_road
def test_a_road_is_cut_that_is_full(host, server, tmp_path, tunnel):
    pid, *ospids = add(host, server, tunnel=tunnel)
    link = current_node().peers.links[pid]
    hold_for_long(pid, tmp_path)
    thread = threading.Thread(target=send_much, args=(pid,))
    thread.start()
    until(lambda: link.is_writing, 5)
    host.lose_all()
    with within(TIMEOUT + (0.6 if tunnel else 0.1)):  # what the server there still has counts as a sign
        until(are_gone(*ospids), 3 * TIMEOUT)
    thread.join(10)
    assert not thread.is_alive()


def send_much(pid):
    with contextlib.suppress(sd.ProcessExitedException):
        sd.remotecall_fetch(len, pid, np.ones(8 << 20))


@each_road
def test_a_road_that_is_whole(host, server, tunnel):
    """Also when a large array is stuck on it: see test_heartbeat."""
    pid, ospid, watcher = add(host, server, tunnel=tunnel)
    assert sd.remotecall_fetch(hold, pid, 2.5 * TIMEOUT) == "done"
    assert sd.remotecall_fetch(os.getpid, pid) == ospid
    assert watchers(host) == [watcher]
    sd.rmprocs(pid)
    until(are_gone(ospid, watcher))


def test_what_the_worker_started_goes_with_it(host, server, tmp_path):
    pid, ospid, watcher = add(host, server)
    child = sd.remotecall_fetch(start_a_program, pid)
    hold_for_long(pid, tmp_path)
    host.lose_all()
    until(are_gone(ospid, watcher, child), TIMEOUT + 1)


def start_a_program():
    return subprocess.Popen(["sleep", "600"]).pid


def test_the_channel_of_a_login_ends(host, server, tmp_path):
    """The login itself goes on, and so nothing else tells the worker."""
    pid, *ospids = add(host, server)
    call = hold_for_long(pid, tmp_path)
    close_channel(pid)
    until(are_gone(*ospids), TIMEOUT + 1)
    with within(2), pytest.raises(sd.ProcessExitedException):
        call.fetch()
    pid, *ospids = add(host, server)
    close_channel(pid)
    with within(0.5):
        until(are_gone(*ospids), what="an idle one ends in order, and at once")
    until(lambda: pid not in sd.procs())


def close_channel(pid):
    worker = current_node().part(ClusterController).members[pid].config.userdata
    with contextlib.suppress(EOFError):  # the worker may end, and the login after it, before all is said
        worker._channel.close()


@each_road
def test_none_is_left(host, server, tunnel):
    for end in (sd.rmprocs, kill_it):
        pid, *ospids = add(host, server, tunnel=tunnel)
        end(pid)
        until(are_gone(*ospids), 1)
        until(lambda: pid not in sd.procs())  # noqa: B023 - called here alone
    pid, *ospids = add(host, server, tunnel=tunnel)
    sd.remote_do(os._exit, pid, 3)
    until(are_gone(*ospids), 1)
    assert watchers(host) == []


def kill_it(pid):
    os.kill(current_node().peers.members[pid].ospid, signal.SIGKILL)


MASTER = """
import sys
import shmdist as sd
from pathlib import Path
from tests.integration.test_watchdog import hold_for_long

pids = sd.addprocs([({text!r}, 2)], **{params!r})
hold_for_long(pids[0], Path({folder!r}))
print("up", flush=True)
{end}
"""


@each_road
@pytest.mark.parametrize("end", ["kill", "return"])
def test_none_is_left_of_a_program(host, server, tmp_path, tunnel, end):
    text = {"kill": "sys.stdin.read()", "return": "pass"}[end]
    code = MASTER.format(
        text=server.text, params=server.params(tunnel=tunnel), folder=str(tmp_path), end=text
    )
    script = Script(code, stdin="" if end == "kill" else None)
    assert script.line() == "up", script.process.stderr.read()
    assert len(watchers(host)) == 2 or end == "return"
    if end == "kill":
        script.process.kill()
        script.process.communicate()
    else:
        script.end().clean()
    until(lambda: not watchers(host), 5)
    assert host.processes() == [server.process.pid], "the server alone"


@each_road
def test_the_news_of_a_death_is_not_held_up(host, server, tunnel):
    """The watcher has copies of the socket and of the channel."""
    pid, ospid, _ = add(host, server, tunnel=tunnel)
    started = sd.RemoteChannel()
    call = sd.remotecall(helpers.tell_and_run, pid, started, time.sleep, 60)
    started.take(timeout=5)
    with within(0.3), pytest.raises(sd.ProcessExitedException):
        os.kill(ospid, signal.SIGKILL)
        call.fetch()


def wait_for_any():
    try:
        return os.wait()
    except ChildProcessError:
        return "no child"


def test_it_is_nobodys_child(host, server):
    pid, ospid, watcher = add(host, server)
    assert sd.remotecall_fetch(wait_for_any, pid) == "no child"
    assert watcher not in helpers.children(ospid)
    assert os.getsid(watcher) != os.getsid(ospid) and os.getpgid(watcher) != os.getpgid(ospid)
    sd.rmprocs(pid)


def test_it_holds_little_and_does_little(host, server):
    pid, _, watcher = add(host, server)
    count = 4 + 3  # the socket, the lifeline, the control, the worker; and the null device
    until(lambda: len(os.listdir(f"/proc/{watcher}/fd")) == count, 2)
    before = helpers.cpu_ticks(watcher)
    sd.timedwait(lambda: False, 4.0)
    used = (helpers.cpu_ticks(watcher) - before) / os.sysconf("SC_CLK_TCK")
    assert used <= 0.02, "ten times as often as by default"
    assert helpers.anonymous_bytes(watcher) < 16 << 20
    sd.rmprocs(pid)


def test_signals_and_its_own_death(host, server):
    """It is deaf to what asks it to end; without it, the worker lives as workers did before."""
    pid, ospid, watcher = add(host, server)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(watcher, signum)
    assert sd.remotecall_fetch(os.getpid, pid) == ospid
    assert helpers.is_alive(watcher)
    os.kill(watcher, signal.SIGKILL)
    until(are_gone(watcher))
    assert sd.remotecall_fetch(os.getpid, pid) == ospid
    close_channel(pid)
    until(are_gone(ospid))
    until(lambda: pid not in sd.procs())


def test_forked_children_of_the_worker(host, server):
    """They hold what the worker held; the watcher ends with the worker, all the same."""
    pid, ospid, watcher = add(host, server)
    child = sd.remotecall_fetch(fork, pid)
    os.kill(ospid, signal.SIGKILL)
    until(are_gone(ospid, watcher), 1)
    assert helpers.is_alive(child)
    os.kill(child, signal.SIGKILL)
    until(lambda: pid not in sd.procs())


def fork():
    child = os.fork()
    if not child:
        signal.pause()
    return child


@each_road
def test_a_worker_that_becomes_another_program(host, server, tunnel):
    """Its link ends with that; the watcher's copy does not keep it."""
    pid, ospid, watcher = add(host, server, tunnel=tunnel)
    sd.remote_do(os.execv, pid, "/bin/sleep", ["sleep", "600"])
    until(are_gone(watcher), 0.5)
    with within(1.5):  # for a second it is asked how the process ended, which it has not
        until(lambda: pid not in sd.procs())
    until(are_gone(ospid), what="it ends with its login")


def test_none_is_wanted(host, start, monkeypatch):
    monkeypatch.setenv("SHMDIST_HEARTBEAT_TIMEOUT", "0")
    server = start(host.name, address=host.address, prefix=host.prefix)
    with sd.addprocs([server.text], **server.params()) as (pid,):
        assert sd.remotecall_fetch(hold, pid, 0.1) == "done"
        assert watchers(host) == []
