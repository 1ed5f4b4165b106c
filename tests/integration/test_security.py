"""Strangers at a worker's door: refused before anything is unpickled, and nobody waits for them."""

import contextlib
import os
import pickle
import socket
from pathlib import Path

import pytest

import shmdist as sd
from shmdist.runtime.node import current_node
from shmdist.wire import door
from tests.integration.helpers import until, within


@pytest.fixture(params=["unix", "tcp"])
def address(request, fresh):
    """A worker, and one of the addresses at which it listens."""
    [pid] = fresh(1, restrict=request.param == "unix")
    family, place = next(a for a in current_node().peers[pid].addresses if a[0] == request.param)
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
    connection = door.knock(where)
    door.prove(connection, current_node().cookie, 99)
    connection.close()


def test_a_wrong_cookie_is_refused(address):
    _, where = address
    for cookie in (b"wrong", b"", b"x" * 10_000):
        with within(3), pytest.raises((sd.ShmdistError, OSError, ValueError)):
            door.prove(door.knock(where), cookie, 99)


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
    sd.remotecall_eval("shmdist.wire.door", pid, "DEADLINE = 0.3")
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
            _ = door.prove(door.knock(where), current_node().cookie, 99).done
            return True

    until(let_in, 5)


def test_a_member_can_join_past_silent_strangers(cluster, fresh):
    [pid] = fresh()
    where = current_node().peers[pid].addresses[0]
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(dial(where))
        with within(3):
            assert sd.remotecall_fetch(sd.remotecall_fetch, cluster[0], abs, pid, -4) == 4


def test_the_cookie_is_not_to_be_seen(cluster):
    cookie = sd.cluster_cookie().encode()
    for peer in current_node().peers.values():
        for name in ("cmdline", "environ"):
            assert cookie not in Path(f"/proc/{peer.ospid}/{name}").read_bytes()


def test_local_workers_are_not_reached_by_network(cluster):
    for pid in cluster:
        assert [family for family, _ in current_node().peers[pid].addresses] == ["unix"]

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
