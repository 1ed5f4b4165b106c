"""Ctrl-C in a terminal: one KeyboardInterrupt, soon, where the program waits; workers stay usable."""

import os
import sys
import time

import pytest

from tests.integration.helpers import ROOT, Script

pexpect = pytest.importorskip("pexpect")

HEAD = """
import os, sys, time, threading, shmdist as sd
from tests.integration.helpers import *
sd.addprocs(2)
def interrupted(wait):
    "Run wait(), in which Ctrl-C comes; tell how long that took."
    print("ready", flush=True)
    try:
        wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    else:
        print("not interrupted", flush=True)
    for pid in sd.workers():
        assert sd.remotecall_fetch(abs, pid, -pid) == pid
def check():
    until(lambda: not [r for pid in sd.workers() for r in sd.remotecall_fetch(settled_state, pid)["running"]])
    until(lambda: not any(sd.remotecall_fetch(settled_state, pid)["waiting"] for pid in sd.workers()))
    assert not settled_state()["pending"]
    print("checked", flush=True)
"""

WAITS = {
    "remotecall_fetch of Python": "interrupted(lambda: sd.remotecall_fetch(loop_for_ever, 2))",
    "remotecall_fetch of sleep": "interrupted(lambda: sd.remotecall_fetch(sleep_long, 2))",
    "fetch": "f = sd.remotecall(sleep_long, 2); interrupted(f.fetch)",
    "remotecall_wait": "interrupted(lambda: sd.remotecall_wait(sleep_long, 2))",
    "fetch with a timeout": "f = sd.remotecall(sleep_long, 2); interrupted(lambda: f.fetch(timeout=60))",
    "nested": "interrupted(lambda: sd.remotecall_fetch(sd.remotecall_fetch, 2, sleep_long, 3))",
    "future without value": "f = sd.Future(2); interrupted(f.fetch)",
    "future here": "f = sd.Future(); interrupted(f.fetch)",
    "local channel": "c = sd.Channel(1); interrupted(c.take); c.put(1); assert c.take(timeout=1) == 1",
    "take": "c = sd.RemoteChannel(2); interrupted(c.take); c.put('kept'); assert c.take(timeout=1) == 'kept'",
    "take here": "c = sd.RemoteChannel(); interrupted(c.take); c.put('kept'); assert c.take(timeout=1) == 'kept'",
    "put": "c = sd.RemoteChannel(2); c.put(1); interrupted(lambda: c.put(2)); assert len(c) == 1 and c.take() == 1",
    "wait": "c = sd.RemoteChannel(2); interrupted(c.wait)",
    "concurrent.futures.wait": "import concurrent.futures as cf; f = sd.remotecall(sleep_long, 2); interrupted(lambda: cf.wait([f])); f.cancel()",
    "the program's own loop": "interrupted(loop_for_ever)",
}


def run(source):
    """Start a program in a terminal of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return pexpect.spawn(sys.executable, ["-c", source], env=env, timeout=10, encoding="utf-8", echo=False)


def press_and_time(child):
    child.expect_exact("ready")
    # The process must be in its wait; that it is asleep is what can be seen of that from outside.
    deadline = time.monotonic() + 5
    from tests.integration.helpers import cpu_ticks

    ticks, still = cpu_ticks(child.pid), 0
    while still < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        now = cpu_ticks(child.pid)
        still, ticks = (still + 1, ticks) if now == ticks else (0, now)
    begun = time.monotonic()
    child.sendintr()
    child.expect_exact("interrupted")
    assert time.monotonic() - begun < 2


def test_every_wait():
    """One program goes through all of them: each must leave the cluster as it was."""
    child = run(
        HEAD + "\n".join(f"print({name!r}, flush=True)\n{source}\ncheck()" for name, source in WAITS.items())
    )
    for name in WAITS:
        child.expect_exact(name)
        press_and_time(child)
        child.expect_exact("checked")
    child.expect(pexpect.EOF)
    assert "Traceback" not in child.before and "Error" not in child.before, child.before
    child.close()
    assert child.exitstatus == 0


def test_uncaught_it_ends_the_program_as_always():
    child = run(HEAD + "print('ready', flush=True)\nsd.remotecall_fetch(sleep_long, 2)")
    child.expect_exact("ready")
    time.sleep(0.05)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.before.count("KeyboardInterrupt") == 1 and "Exception ignored" not in child.before, (
        child.before
    )
    assert child.exitstatus == 130 or child.signalstatus == 2


def test_the_programs_own_handler_is_kept():
    child = run(
        HEAD
        + """
import signal
seen = []
signal.signal(signal.SIGINT, lambda *a: (seen.append(a), print("handled", flush=True)))
print("ready", flush=True)
f = sd.remotecall(time.sleep, 2, 0.8)
f.fetch()
assert len(seen) == 1 and signal.getsignal(signal.SIGINT) not in (signal.SIG_DFL, None)
print("went on", flush=True)
"""
    )
    child.expect_exact("ready")
    time.sleep(0.2)
    child.sendintr()
    child.expect_exact("handled", timeout=0.6)
    child.expect_exact("went on")
    child.expect(pexpect.EOF)


def test_no_item_is_lost_that_came_with_ctrl_c():
    """The signal comes when the answer is there, and the take has not yet returned."""
    child = run(
        HEAD
        + """
import signal
from shmdist.runtime.reactor import Reactor
real = Reactor.wait
def wait(self, waiter, timeout=None):
    value = real(self, waiter, timeout)
    os.kill(os.getpid(), signal.SIGINT)
    return value
for where in (2, 1):
    c = sd.RemoteChannel(lambda: sd.Channel(3), where)
    for n in range(3): c.put(n)
    Reactor.wait = wait
    got = []
    try:
        got.append(c.take())
    except KeyboardInterrupt:
        pass
    Reactor.wait = real
    while len(got) < 3:
        got.append(c.take(timeout=1))
    assert got == [0, 1, 2], got
print("all there", flush=True)
"""
    )
    assert child.expect(["all there", pexpect.EOF]) == 0, child.before
    child.close(force=True)


def test_where_it_is_ignored_it_stays_ignored():
    """As in a program behind `&` in a script; workers can be interrupted all the same."""
    code = (
        HEAD
        + """
import signal
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
pids = sd.workers()
started = sd.RemoteChannel(lambda: sd.Channel(9))
blocked = sd.remotecall(meet_and_wait, 2, started, gate := sd.RemoteChannel())
started.take()
# From another thread: it comes while this one is in the runtime, and while it is in the program's code.
sender = threading.Thread(target=lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(100)])
sender.start()
for _ in range(200): assert sd.remotecall_fetch(abs, 3, -3) == 3
sender.join()
os.kill(os.getpid(), signal.SIGINT)
gate.put("unharmed")
assert blocked.fetch(timeout=5) == "unharmed"
for function in (loop_for_ever, sleep_long):
    futures = [sd.remotecall(tell_and_run, pid, started, function) for pid in pids]
    for _ in futures: started.take(timeout=5)
    sd.interrupt()
    for future in futures:
        error = future.exception(timeout=2)
        assert type(error.captured.ex) is KeyboardInterrupt, error
    assert [sd.remotecall_fetch(abs, pid, -pid) for pid in pids] == pids
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
"""
    )
    shell = 'trap \'\' INT; exec "$0" -c "$1"'
    Script(command=["sh", "-c", shell, sys.executable, code]).end().clean()
