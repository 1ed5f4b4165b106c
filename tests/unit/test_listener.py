"""The door: who knows the cookie comes in, and strangers hold up nobody, whatever they send or do not send."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import pytest

from shmdist.errors import AuthenticationError
from shmdist.transport import listener as module
from shmdist.transport.handshake import Connector
from shmdist.transport.listener import Listener, authenticate_as_client, connect, private_address
from tests.unit.test_channels import Threads

COOKIE = b"a cookie"
SECONDS = 10.0


class House:
    """A door, the threads behind it, and who was let in."""

    def __init__(self, family: str) -> None:
        self.threads = Threads()
        self.admitted: SimpleQueue[Connection] = SimpleQueue()
        self.open: list[Any] = []
        self.start: Callable[[Callable[[], None]], Any] = self.threads.start
        address = private_address() if family == "AF_UNIX" else ("127.0.0.1", 0)
        self.door = Listener(
            family, address, COOKIE, lambda: 5, lambda job: self.start(job), self.admitted.put
        )
        self.address = ("unix" if family == "AF_UNIX" else "tcp", self.door.address)
        self.run = self.threads.start(self.door.run)
        self.greeted = threading.Semaphore(0)

    def connect(self) -> Connection:
        connection = connect(self.address, SECONDS)
        self.open.append(connection)
        return connection

    def socket(self) -> socket.socket:
        """Knock as a stranger, who has a bare socket."""
        sock = socket.socket(fileno=os.dup(self.connect().fileno()))
        self.open.pop().close()
        sock.settimeout(SECONDS)
        self.open.append(sock)
        return sock

    def enter(self, cookie: bytes = COOKIE) -> Connection:
        """Come in properly; returns the inner side."""
        outer = self.connect()
        authenticate_as_client(outer, cookie, 7, SECONDS)
        inner = self.admitted.get(timeout=SECONDS)
        self.open.append(inner)
        outer.send_bytes(b"knock knock")
        assert inner.recv_bytes() == b"knock knock"
        return inner

    def close(self) -> None:
        self.door.close()
        self.run()
        for thing in self.open:
            thing.close()
        for thread in self.threads.all:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert self.admitted.empty()


@pytest.fixture(params=["AF_UNIX", "AF_INET"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    house = House(request.param)
    yield house
    house.close()
    assert house.door._busy == 0


def refused(sock: socket.socket) -> bool:
    """Wait until the door has turned this one away."""
    try:
        while sock.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


class Bomb:
    gone_off = False

    def __reduce__(self) -> Any:
        return _go_off, ()


def _go_off() -> None:
    Bomb.gone_off = True


class TestAdmission:
    def test_the_right_cookie(self, house: House) -> None:
        for _ in range(3):
            house.enter()
        assert house.door.refused == 0

    def test_what_both_learn(self, house: House) -> None:
        outer = house.connect()
        machine = authenticate_as_client(outer, COOKIE, 7, SECONDS)
        assert machine.peer_pid == 5
        house.admitted.get(timeout=SECONDS).close()

    def test_many_at_once(self, house: House) -> None:
        results = [
            house.threads.start(lambda: authenticate_as_client(house.connect(), COOKIE, 7, SECONDS))
            for _ in range(20)
        ]
        for result in results:
            assert result().peer_pid == 5
        for _ in results:
            house.open.append(house.admitted.get(timeout=SECONDS))

    def test_blocking_again_afterwards(self, house: House) -> None:
        inner = house.enter()
        assert os.get_blocking(inner.fileno())
        assert os.get_blocking(house.open[-2].fileno())


class TestStrangers:
    def test_a_wrong_cookie(self, house: House) -> None:
        outer = house.connect()
        with pytest.raises(AuthenticationError, match="cookie"):
            authenticate_as_client(outer, b"another", 7, SECONDS)
        assert outer.closed
        house.enter()
        for thread in house.threads.all[1:]:  # the greetings: the door's side sees the end later than ours
            thread.join(SECONDS)
        assert house.door.refused == 1

    def test_a_wrong_proof_is_told(self, house: House) -> None:
        sock = house.socket()
        sock.sendall(Connector(COOKIE, 7).start())
        assert len(sock.recv(160, socket.MSG_WAITALL)) == 160
        sock.sendall(bytes(32))
        assert b"cookie refused" in sock.recv(128, socket.MSG_WAITALL)
        assert refused(sock)

    @pytest.mark.parametrize(
        "garbage",
        [
            b"GET / HTTP/1.1\r\n\r\n" + b"x" * 500,
            pickle.dumps(Bomb()) * 10,
            struct.pack(">i", 2**31 - 1) + b"x" * 500,  # a length, in multiprocessing's framing
            struct.pack("!i", -1) + struct.pack("!Q", 2**62) + b"x" * 500,
            bytes(1000),
        ],
        ids=["http", "pickle", "length", "long length", "zeros"],
    )
    def test_garbage(self, house: House, garbage: bytes) -> None:
        sock = house.socket()
        sock.sendall(garbage)
        assert refused(sock)
        house.enter()
        assert house.door.refused == 1
        assert not Bomb.gone_off

    def test_a_pickle_behind_a_true_hello(self, house: House) -> None:
        sock = house.socket()
        sock.sendall(Connector(COOKIE, 7).start() + pickle.dumps(Bomb()).ljust(32, b"."))
        assert refused(sock)
        assert not Bomb.gone_off

    def test_silence(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT", 0.03)
        sock = house.socket()
        assert refused(sock)
        monkeypatch.undo()
        house.enter()

    def test_drops_of_bytes_do_not_move_the_deadline(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT", 0.06)
        sock = house.socket()
        sock.settimeout(0.01)
        hello = Connector(COOKIE, 7).start()
        for i in range(100):
            try:
                sock.sendall(hello[i : i + 1])
                if not sock.recv(100):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("it was listened to for more than its time")

    def test_a_silent_one_holds_up_nobody(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        silent = [house.socket() for _ in range(3)]
        house.enter()
        for sock in silent:
            sock.close()

    @pytest.mark.parametrize("sent", [0, 1, 127])
    def test_gone_in_the_middle(self, house: House, sent: int) -> None:
        sock = house.socket()
        sock.sendall(Connector(COOKIE, 7).start()[:sent])
        sock.shutdown(socket.SHUT_WR)
        assert refused(sock)
        house.enter()

    def test_gone_before_the_answer(self, house: House) -> None:
        sock = house.socket()
        sock.sendall(Connector(COOKIE, 7).start())
        sock.close()
        house.enter()

    def test_a_flood(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MOST", 3)
        silent = [house.socket() for _ in range(30)]
        assert all(refused(sock) for sock in silent[:24])  # of the last few, some may have been one too many
        while True:  # as above: a good one may come while six threads are still about to end
            outer = house.connect()
            try:
                authenticate_as_client(outer, COOKIE, 7, SECONDS)
                break
            except (AuthenticationError, OSError):
                continue
        house.open.append(house.admitted.get(timeout=SECONDS))
        assert house.door.refused >= 24
        assert len(house.door._greeted) <= 3
        for sock in silent:
            sock.close()

    def test_a_good_one_comes_in_past_any_number_that_stall(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MOST", 3)
        silent = [house.socket() for _ in range(3)]
        for _ in range(20):
            # Those that gave way end their threads first: when these are slow, everybody is turned away.
            while house.door._busy > 3:
                time.sleep(0.001)
            house.enter()
            silent.append(house.socket())
        for sock in silent:
            sock.close()

    def test_descriptors_of_a_stranger_are_not_kept(self) -> None:
        house = House("AF_UNIX")
        sock = house.socket()
        theirs, ours = os.pipe()
        socket.send_fds(sock, [Connector(COOKIE, 7).start()], [ours] * 10)
        os.close(ours)
        assert len(sock.recv(160, socket.MSG_WAITALL)) == 160  # it waits for the proof now
        with os.fdopen(theirs, "rb") as pipe:
            assert pipe.read() == b""  # nobody else has the other end
        sock.close()
        house.close()


class TestTrouble:
    def test_no_thread_to_be_had(self, house: House) -> None:
        def start(job: Callable[[], None]) -> None:
            raise RuntimeError("can't start new thread")

        house.start = start
        assert refused(house.socket())
        house.start = house.threads.start
        house.enter()

    def test_no_descriptor_to_be_had(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        sock = house.socket()
        monkeypatch.setattr(module, "_exchange", _out_of_descriptors)
        monkeypatch.setattr(module, "_same_user", _out_of_descriptors)
        other = house.socket()
        assert refused(other)
        monkeypatch.undo()
        sock.close()
        house.enter()

    def test_accepting_fails_for_a_while(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        accept = house.door._listener.accept
        failures = iter([OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")])

        def failing() -> Any:
            for error in failures:
                raise error
            return accept()

        monkeypatch.setattr(house.door._ended, "wait", lambda seconds: None)
        monkeypatch.setattr(house.door._listener, "accept", failing)
        house.enter()
        house.enter()
        assert next(failures, None) is None

    def test_another_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        house = House("AF_UNIX")
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        if user:
            assert refused(house.socket())
            assert house.door.refused == 1
        monkeypatch.undo()
        house.enter()
        house.close()


def _out_of_descriptors(*args: Any) -> None:
    raise OSError(errno.EMFILE, "too many open files")


class TestClosing:
    def test_ends_the_accepting(self, house: House) -> None:
        house.enter()
        house.door.close()
        house.door.close()
        house.run()
        with pytest.raises(OSError):
            house.connect()

    def test_leaves_who_is_in(self, house: House) -> None:
        inner = house.enter()
        outer = house.open[-2]
        house.door.close()
        outer.send_bytes(b"still")
        assert inner.recv_bytes() == b"still"


class TestKnocking:
    @pytest.mark.parametrize("family", ["unix", "tcp"])
    def test_nobody_listens(self, family: str) -> None:
        if family == "unix":
            address: Any = private_address()
        else:
            with socket.create_server(("127.0.0.1", 0)) as server:
                address = server.getsockname()
        with pytest.raises(OSError):
            connect((family, address), SECONDS)

    def test_a_listener_that_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            connection = connect(("tcp", server.getsockname()), SECONDS)
            with pytest.raises(TimeoutError):
                authenticate_as_client(connection, COOKIE, 7, 0.03)
            assert connection.closed

    def test_a_listener_that_says_something_else(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(b"SSH-2.0-OpenSSH\r\n".ljust(160))
        with pytest.raises(AuthenticationError, match="no shmdist process"):
            authenticate_as_client(Connection(ours.detach()), COOKIE, 7, SECONDS)
        theirs.close()

    def test_a_listener_that_goes(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with pytest.raises((AuthenticationError, OSError)):
            authenticate_as_client(Connection(ours.detach()), COOKIE, 7, SECONDS)

    def test_private_addresses(self) -> None:
        addresses = {private_address() for _ in range(10)}
        assert len(addresses) == 10
        assert all(str(os.getpid()) in address for address in addresses)
