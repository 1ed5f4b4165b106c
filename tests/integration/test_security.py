"""Strangers at a worker's door: refused before anything is unpickled, and nobody waits for them."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.transport import listener
from shmdist.transport.handshake import Connector
from shmdist.worker.main import WorkerProcess
from tests.integration.helpers import ROOT, run_script, until, within


@pytest.fixture(params=["unix", "tcp"])
def address(request, fresh):
    """A worker, and one of the addresses at which it listens."""
    [pid] = fresh(1, restrict=request.param == "unix")
    family, place = next(a for a in current_node().peers.members[pid].addresses if a[0] == request.param)
    yield pid, (family, place)
    with within(2):
        assert sd.remotecall_fetch(abs, pid, -1) == 1


def dial(address):
    family, place = address
    if family == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
    else:
        sock = socket.create_connection(tuple(place))
    sock.settimeout(15)
    return sock


def test_the_right_cookie_is_let_in(address):
    _, where = address
    connection = listener.connect(where)
    listener.authenticate_as_client(connection, current_node().cookie, 99)
    connection.close()


def test_a_wrong_cookie_is_refused(address):
    _, where = address
    for cookie in (b"wrong", b"", b"x" * 10_000):
        with within(3), pytest.raises((sd.ShmdistError, OSError, ValueError)):
            listener.authenticate_as_client(listener.connect(where), cookie, 99)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["SHMDIST_BOMB"],)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"\xff" * 4096, os.urandom(100_000), b"\x7f\xff\xff\xff" * 10],
    ids=["http", "zeros", "ones", "random", "lengths"],
)
def test_junk(address, junk):
    pid, where = address
    sd.remotecall_eval("shmdist.transport.listener", pid, "HANDSHAKE_TIMEOUT = 0.3")
    with contextlib.suppress(OSError), dial(where) as sock:
        sock.sendall(junk)
        with within(13):
            while sock.recv(1 << 16):
                pass


def test_nothing_of_a_stranger_is_unpickled(address, tmp_path, monkeypatch):
    _, where = address
    monkeypatch.setenv("SHMDIST_BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(_Bomb())
    for frame in (bomb, len(bomb).to_bytes(4, "big") + bomb, b"\0" * 24 + bomb):
        with contextlib.suppress(OSError), dial(where) as sock:
            sock.sendall(frame)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
    assert not (tmp_path / "exploded").exists()


def test_silent_strangers_hold_up_nobody(address):
    pid, where = address
    with contextlib.ExitStack() as stack:
        for _ in range(80):  # more than are served at once
            with contextlib.suppress(OSError):
                stack.enter_context(dial(where))
        with within(2):
            assert [sd.remotecall_fetch(abs, pid, -n) for n in range(20)] == list(range(20))

    # When they have left, others are let in again.
    def let_in():
        with contextlib.suppress(sd.ShmdistError, OSError):
            _ = listener.authenticate_as_client(listener.connect(where), current_node().cookie, 99).done
            return True

    until(let_in, 5)


def state_of_worker():
    node = current_node()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    me = node.part(WorkerProcess)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "resident": resident,
        "refused": sum(door.refused for door in me.doors),
        "busy": sum(door._busy for door in me.doors),
    }


def has_mailboxes():
    link = current_node().peers.links[1]
    return not link.is_local or (link.ring_in is not None and link.kick_out >= 0)


def end_idle_threads_soon():
    from shmdist.runtime import threads

    threads._IDLE_SECONDS = 1.0


def test_five_hundred_that_stall(address, cluster):
    pid, where = address
    sd.remotecall_wait(end_idle_threads_soon, pid)
    for _ in range(20):  # after so many there are mailboxes, which cost descriptors
        assert sd.remotecall_fetch(abs, pid, -1) == 1
    until(lambda: sd.remotecall_fetch(has_mailboxes, pid))
    before = sd.remotecall_fetch(state_of_worker, pid)
    hello = Connector(b"a guess", 99).start()
    with contextlib.ExitStack() as stack:
        for number in range(500):
            sock = stack.enter_context(dial(where))
            with contextlib.suppress(OSError):
                sock.sendall((b"", hello[:-1], hello, b"\xff" * 127)[number % 4])
        with within(2):
            assert [sd.remotecall_fetch(abs, pid, -n) for n in range(20)] == list(range(20))
        with within(3):  # one that is new to it, while they all stand there
            assert sd.remotecall_fetch(sd.remotecall_fetch, cluster[0], abs, pid, -4) == 4
        during = sd.remotecall_fetch(state_of_worker, pid)
        assert during["busy"] <= 130 and during["threads"] < 160
        assert during["resident"] - before["resident"] < 32 << 20

    def recovered():
        now = sd.remotecall_fetch(state_of_worker, pid)
        return (
            now["busy"] == 0
            and now["refused"] - before["refused"] == 500
            and now["descriptors"] <= before["descriptors"] + 1  # the other worker's link
            and now["threads"] <= before["threads"] + 8
        )

    until(recovered, 25, "descriptors and threads are back")
    assert sd.remotecall_fetch(state_of_worker, pid)["resident"] - before["resident"] < 16 << 20


def test_refusals_are_counted_in_the_log(fresh):
    [pid] = fresh()
    sd.remotecall_eval("__main__", pid, LOG)
    where = current_node().peers.members[pid].addresses[0]
    for _ in range(3):
        with pytest.raises((sd.ShmdistError, OSError)):
            listener.authenticate_as_client(listener.connect(where), b"wrong", 99)

    def logged():
        return len(sd.remotecall_eval("__main__", pid, "list(logged)")) == 3

    until(logged, 5)
    last = sd.remotecall_eval("__main__", pid, "logged[-1]")
    assert last.startswith("a connection was refused, the 3. so far: ")


LOG = """
import logging
logged = []
class Keep(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())
logging.getLogger("shmdist.listener").addHandler(Keep())
logging.getLogger("shmdist.listener").setLevel("INFO")
"""


def test_a_recorded_handshake_opens_nothing(address):
    _, where = address
    sent = []

    class Recorder(Connector):
        def start(self):
            sent.append(super().start())
            return sent[-1]

        def feed(self, data):
            sent.append(super().feed(data))
            return sent[-1]

    connection, machine = listener.connect(where), Recorder(current_node().cookie, 99)
    listener._exchange(connection, machine, machine.start(), 5)
    connection.close()
    with dial(where) as sock:
        sock.sendall(sent[0])
        assert len(sock.recv(160, socket.MSG_WAITALL)) == 160
        with contextlib.suppress(OSError):
            sock.sendall(sent[1])
            assert b"cookie refused" in sock.recv(128, socket.MSG_WAITALL)
            assert sock.recv(1) == b""


def test_half_open_ones_are_given_up(address):
    pid, where = address
    sd.remotecall_eval("shmdist.transport.listener", pid, "HANDSHAKE_TIMEOUT = 0.3")
    for sent in (b"", Connector(b"x", 99).start()[:64], Connector(b"x", 99).start()):
        with dial(where) as sock:
            sock.sendall(sent)
            with within(3):  # we go on listening, and it has closed
                while sock.recv(1000):
                    pass


def test_a_worker_started_by_hand_listens_on_loopback(tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-m", "shmdist", "worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        worker.stdin.write("a cookie\n")
        worker.stdin.flush()
        assert worker.stdout.readline().rstrip().endswith("#127.0.0.1")
    finally:
        worker.kill()
        worker.communicate()


def test_the_cookie_is_random():
    script = "import shmdist as sd; print(sd.cluster_cookie())"
    cookies = {run_script(script).clean().strip() for _ in range(2)}
    assert len(cookies) == 2 and all(len(bytes.fromhex(cookie)) == 32 for cookie in cookies)


def test_a_member_can_join_past_silent_strangers(cluster, fresh):
    [pid] = fresh()
    where = current_node().peers.members[pid].addresses[0]
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(dial(where))
        with within(3):
            assert sd.remotecall_fetch(sd.remotecall_fetch, cluster[0], abs, pid, -4) == 4


def test_the_cookie_is_not_to_be_seen(cluster):
    cookie = sd.cluster_cookie().encode()
    for peer in current_node().peers.members.values():
        for name in ("cmdline", "environ"):
            assert cookie not in Path(f"/proc/{peer.ospid}/{name}").read_bytes()


def test_local_workers_are_not_reached_by_network(cluster):
    for pid in cluster:
        assert [family for family, _ in current_node().peers.members[pid].addresses] == ["unix"]

        def inet():
            import os

            paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            inodes = {os.readlink(path) for path in paths if os.path.exists(path)}
            lines = []
            for name in ("tcp", "tcp6"):
                with open(f"/proc/net/{name}") as file:
                    lines += [line.split() for line in file.readlines()[1:]]
            return [line for line in lines if f"socket:[{line[9]}]" in inodes]

        assert sd.remotecall_fetch(inet, pid) == []


def test_no_md5(monkeypatch, fresh):
    """As on machines that forbid it."""
    import hashlib

    def refuse(*args, **kwargs):
        raise ValueError("disabled for FIPS")

    monkeypatch.setattr(hashlib, "md5", refuse)
    [pid] = fresh()
    assert sd.remotecall_fetch(abs, pid, -1) == 1
