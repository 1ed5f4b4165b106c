"""Ctrl-C while workers are launched on other hosts: one KeyboardInterrupt, and nothing is left."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import pytest

import shmdist as sd
from shmdist.managers.ssh import manager, tunnel
from shmdist.runtime.node import current_node
from shmdist.transport import listener
from tests.integration import helpers
from tests.integration.helpers import until
from tests.integration.sshd import FakeServer, descriptors, needs_sshd, threads_of_logins

pytestmark = needs_sshd


@pytest.fixture(autouse=True)
def heeded():
    """SIGINT is ignored where the tests run in the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def offspring(ospid):
    found = helpers.children(ospid)
    return found.union(*map(offspring, found))


def interrupted(server, when, machines, fake=None, **params):
    """Press Ctrl-C when `when` holds, while workers are launched; nothing of that may be left."""
    before, procs, mine = descriptors(), sd.procs(), helpers.children()
    threads = set(threads_of_logins())  # the test's own
    running = offspring(server.process.pid)

    def press():
        until(when, 20)
        pressed.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    pressed = []
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sd.addprocs(machines, **params)
        assert time.monotonic() - pressed[0] < 10, "no step is waited for to the end of its time"
    finally:
        thread.join()
    assert sd.procs() == procs
    until(lambda: offspring(server.process.pid) <= running, 10, "no remote process is left")
    until(lambda: set(threads_of_logins()) <= threads, 10, f"no thread is left: {threads_of_logins()}")
    before += len(fake._open) if fake is not None else 0
    until(lambda: descriptors() <= before, 10, f"no more than {before} descriptors: {descriptors()}")
    assert helpers.children() <= mine
    # And the cluster can be used.
    with sd.addprocs([(server.text, 2)], **server.params()) as pids:
        assert sd.pmap(abs, [-1, -2, -3]) == [1, 2, 3]
        assert sd.remotecall_fetch(sd.myid, pids[1]) == pids[1]


@pytest.fixture
def warm(sshd):
    """What the first launch brings stays."""
    with sd.addprocs([sshd.text], **sshd.params()):
        pass
    until(lambda: not threads_of_logins(), 10)
    return sshd


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["silent", "half open"])
def test_at_login(warm, says):
    """Beside a good host, whose workers may be up."""
    with FakeServer(lambda connection: connection.sendall(says)) as fake:
        texts = [f"127.0.0.1:{fake.port}", f"root@127.0.0.1:{fake.port}", (warm.text, 2)]
        interrupted(warm, lambda: fake.count >= 1, texts, fake, **warm.params())
        for connection in fake._open:
            connection.settimeout(5)
            with contextlib.suppress(ConnectionError):
                while connection.recv(1 << 16):
                    pass  # what it said before it was closed


def test_at_a_host_that_does_not_answer(warm):
    """Its backlog is full, so that the connection is not made."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            begun = time.monotonic()
            texts = [f"127.0.0.1:{full.getsockname()[1]}"]
            interrupted(warm, lambda: time.monotonic() > begun + 0.3, texts, **warm.params())


def test_at_a_busy_server(warm):
    """Which is tried again and again."""
    with FakeServer(lambda connection: connection.close()) as fake:
        interrupted(warm, lambda: fake.count >= 4, [f"127.0.0.1:{fake.port}"], fake, **warm.params())


def test_while_the_workers_start(warm):
    """They never say anything, beside others that are up."""
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    again = warm.text.replace("root@", "")
    before = offspring(warm.process.pid)
    interrupted(
        warm,
        lambda: len(offspring(warm.process.pid) - before) >= 5,
        [(warm.text, 3), (again, 2)],
        **warm.params(exename={warm.text: silent, again: sys.executable}),
    )


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.3, 0.4, 0.6])
def test_at_any_moment(warm, seconds):
    """However far they are; when they are there already, the last ones never come up."""
    begun = time.monotonic()
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    again = warm.text.replace("root@", "")
    interrupted(
        warm,
        lambda: time.monotonic() > begun + seconds,
        [(warm.text, 4), again],
        tunnel=True,
        **warm.params(exename={warm.text: sys.executable, again: silent}),
    )


@pytest.mark.parametrize("step", ["connect", "authenticate_as_client"])
def test_while_process_1_connects(warm, monkeypatch, step):
    """To workers whose host answers nothing."""
    reached = threading.Event()

    def wait(*_):
        reached.set()
        time.sleep(1000)

    with monkeypatch.context() as patch:
        if step == "connect":
            patch.setattr(manager.SSHManager, "connect", wait)
        else:
            patch.setattr(listener, "authenticate_as_client", wait)
        later = threading.Thread(target=lambda: (reached.wait(20), time.sleep(0.1), patch.undo()))
        later.start()
        try:
            interrupted(
                warm, lambda: reached.is_set() and not later.is_alive(), [(warm.text, 2)], **warm.params()
            )
        finally:
            later.join()
    assert not current_node().requests.pending


def test_while_they_join(warm):
    """A worker that is stopped takes the connection, and answers nothing."""
    before = offspring(warm.process.pid)
    stopped = set()

    def stop_them():
        for ospid in offspring(warm.process.pid) - before:
            with contextlib.suppress(OSError):
                with open(f"/proc/{ospid}/cmdline") as file:
                    worker = file.read().startswith(sys.executable)
                if worker and ospid not in stopped:
                    os.kill(ospid, signal.SIGSTOP)
                    stopped.add(ospid)
        return len(stopped) == 2

    try:
        interrupted(warm, stop_them, [(warm.text, 2)], **warm.params())
    finally:
        for ospid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(ospid, signal.SIGCONT)
    until(lambda: not any(map(helpers.is_alive, stopped)), 10, "they end when they can")


@pytest.mark.parametrize("name", ["up", "down"])
def test_while_a_tunnel_is_made(monkeypatch, name):
    """Its sockets are closed at once, whichever of its threads runs."""

    class Channel:
        closed = threading.Event()

        def recv(self, size):
            self.closed.wait(10)
            return b""

        def close(self):
            self.closed.set()

    def start(thread):
        if thread.name.endswith(name):
            raise KeyboardInterrupt
        real(thread)

    before, channel, real = descriptors(), Channel(), threading.Thread.start
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(threading.Thread, "start", start)
        tunnel.bridge(channel, None)
    assert channel.closed.is_set()
    until(lambda: descriptors() == before)
    assert caught  # whose traceback holds what was made
