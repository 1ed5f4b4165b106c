"""Opens links: listens, connects, and authenticates both sides.

``multiprocessing.connection`` makes listeners, clients and connections.  Its own
challenge is not used: it is MD5 before Python 3.12, it is answered on the accepting
thread, and it has no deadline.

A stranger can hold up nobody.  The accepting thread only accepts; each handshake runs on
a thread of its own, with a deadline, and no more than `MOST` at once.  When one more comes, the
oldest gives way to it: who knows the cookie is done in milliseconds, and who stalls is soon
the oldest.  Nothing that a stranger sends is unpickled, no length of his is believed (see
``handshake``), and descriptors that he sends along are dropped by the kernel, for nobody asks
for them before he is known.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Client, Connection
from typing import Any

from shmdist._log import Log
from shmdist.errors import AuthenticationError, VersionMismatch
from shmdist.transport.handshake import Acceptor, Connector

MOST = 64  # handshakes at once; the oldest gives way to a further one
HANDSHAKE_TIMEOUT = 10.0  # for a handshake
_ABSTRACT = bool(sys.platform == "linux")  # AF_UNIX names that are no files
_log = Log("listener")

Address = tuple[str, Any]


def _exchange(connection: Connection, machine: Connector | Acceptor, first: bytes, timeout: float) -> None:
    """Run a handshake over a connection, within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    sock = socket.socket(fileno=os.dup(connection.fileno()))
    try:
        if first:
            sock.settimeout(timeout)
            sock.sendall(first)
        while not machine.done:
            data = b""
            while len(data) < machine.wants:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the handshake took too long")
                sock.settimeout(left)
                piece = sock.recv(machine.wants - len(data))
                if not piece:
                    raise AuthenticationError("the other side closed the connection during the handshake")
                data += piece
            try:
                answer = machine.feed(data)
            except (AuthenticationError, VersionMismatch) as error:
                if error.reply:
                    with contextlib.suppress(OSError):
                        sock.sendall(error.reply)
                raise
            if answer:
                sock.sendall(answer)
        sock.setblocking(True)
    finally:
        sock.close()


def authenticate_as_client(
    connection: Connection, cookie: bytes, pid: int, timeout: float = HANDSHAKE_TIMEOUT
) -> Connector:
    """Run the connecting side of the handshake; the connection is closed when it fails.

    Raises
    ------
    AuthenticationError, VersionMismatch, OSError
        With what the other side said.
    """
    machine = Connector(cookie, pid)
    try:
        _exchange(connection, machine, machine.start(), timeout)
    except BaseException:
        connection.close()
        raise
    return machine


def check(connection: Connection, cookie: bytes, pid: int, timeout: float | None = None) -> Acceptor:
    """Run the accepting side of the handshake; the connection is closed when it fails.

    Raises
    ------
    AuthenticationError, VersionMismatch, OSError
        The other side does not know the cookie, or does not say so within `timeout` seconds.
    """
    machine = Acceptor(cookie, pid)
    try:
        _exchange(connection, machine, b"", HANDSHAKE_TIMEOUT if timeout is None else timeout)
    except BaseException:
        connection.close()
        raise
    return machine


def connect(address: Address, timeout: float = HANDSHAKE_TIMEOUT) -> Connection:
    """Connect to an address; no handshake yet.

    Parameters
    ----------
    address : tuple
        ``("unix", path)`` or ``("tcp", (host, port))``.
    timeout : float
        Seconds.
    """
    family, place = address
    if family == "unix":
        return Client(place, "AF_UNIX")
    sock = socket.create_connection(tuple(place), timeout)
    sock.setblocking(True)
    return Connection(sock.detach())


def private_address() -> str:
    """Return an unused AF_UNIX address that leaves nothing behind in the file system.

    On Linux it is abstract: a name in the network namespace, gone with its last socket.
    Elsewhere it is a path in a folder that only this user may enter.
    """
    name = f"shmdist-{os.getpid()}-{os.urandom(8).hex()}"
    if _ABSTRACT:
        return f"\0{name}"
    import tempfile

    return os.path.join(tempfile.mkdtemp(prefix="shmdist-"), name)


class Listener:
    """A listening socket and the thread that accepts at it.

    Parameters
    ----------
    family : {"AF_UNIX", "AF_INET", "AF_INET6"}
        What to listen on.
    address : str or tuple
        Where.
    cookie : bytes
        What those who connect must prove to know.
    pid : callable
        Returns this process's id in the cluster.
    start : callable
        Runs a job on another thread.
    admit : callable
        Given each proven connection; owns it.
    """

    def __init__(
        self,
        family: str,
        address: Any,
        cookie: bytes,
        pid: Callable[[], int],
        start: Callable[[Callable[[], None]], None],
        admit: Callable[[Connection], None],
    ) -> None:
        self._listener = connection.Listener(address, family, backlog=128)
        self._unix = family == "AF_UNIX"
        self._cookie, self._pid, self._start, self._admit = cookie, pid, start, admit
        self._count = threading.Lock()  # guards the three below
        self._greeted: dict[Connection, None] = {}  # handshakes that run, the oldest first
        self._busy = 0  # the same, and those that gave way and whose threads have not seen it yet
        self.refused = 0  # strangers turned away
        self._ended = threading.Event()

    @property
    def address(self) -> Any:
        """The address that is listened on."""
        return self._listener.address

    def run(self) -> None:
        """Accept for ever; the body of a thread."""
        while not self._ended.is_set():
            try:
                connection = self._listener.accept()
            except OSError as error:
                if self._ended.is_set():
                    return
                _log.warning("accepting failed: %s", error)
                self._ended.wait(0.1)  # out of descriptors, say: others may be given back
                continue
            if self._ended.is_set():  # it came while the listener was being closed
                connection.close()
                return
            self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        """Have a stranger greeted, or turn him away; raises nothing that would end the accepting."""
        with self._count:
            self._busy += 1
            full = self._busy > 2 * MOST  # they come faster than threads end
            self._greeted[connection] = None
            if full or len(self._greeted) > MOST:
                self._give_way()
        try:
            if full or (self._unix and not _same_user(connection)):
                self._refuse(connection, "too many handshakes" if full else "it is another user's")
            else:
                self._start(lambda: self._greet(connection))
        except Exception as error:  # out of descriptors, or of threads
            self._refuse(connection, error)

    def _give_way(self) -> None:
        """End the oldest handshake; `_count` is held, so its connection is open."""
        oldest = next(iter(self._greeted))
        del self._greeted[oldest]
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(oldest.fileno()))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its thread sees the end, and closes it
            sock.close()

    def _leave(self, connection: Connection) -> None:
        """Note that a handshake is over; `_count` is held."""
        self._busy -= 1
        self._greeted.pop(connection, None)

    def _refuse(self, connection: Connection, reason: object) -> None:
        with self._count:
            self._leave(connection)
            self.refused += 1
            count = self.refused
        connection.close()
        _log.info("a connection was refused, the %d. so far: %s", count, reason)

    def _greet(self, connection: Connection) -> None:
        """Run the accepting side of the handshake."""
        try:
            _exchange(connection, Acceptor(self._cookie, self._pid()), b"", HANDSHAKE_TIMEOUT)
        except Exception as error:
            self._refuse(connection, error)
            return
        with self._count:
            self._leave(connection)
        self._admit(connection)

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        # Closing alone does not wake a thread that is in accept(): it would let one more in.
        socket_listener = getattr(self._listener, "_listener", None)
        sock = getattr(socket_listener, "_socket", None)
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.close()


def _same_user(connection: Connection) -> bool:
    """Return whether the other side of a local connection runs as this user (or as root)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the folder of the socket keeps others out
    sock = socket.socket(fileno=os.dup(connection.fileno()))
    try:
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    finally:
        sock.close()
    return uid in (os.geteuid(), 0)
