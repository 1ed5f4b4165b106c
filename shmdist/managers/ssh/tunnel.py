"""A worker's connection through an SSH login: a channel on one side, a socket on the other.

Two threads move the bytes, one for each direction.  Either end closes both.

A third one, for each login, asks its server for a sign of life.  The server answers though the
worker's interpreter is held for minutes, and from behind any number of jump hosts.  It also gives the
workers' watchers such signs, by their standard input: the tunnel itself may be full
(``worker.watchdog``).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import weakref
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from shmdist.transport import keepalive

if TYPE_CHECKING:
    import paramiko

    from shmdist.managers.ssh.remote_worker import RemoteWorker

#: Bytes that may be on their way to us: twice what ``ssh`` asks for.  OpenSSH's server may hold as many in
#: one piece, which grows by steps and is copied at each: with 16 MiB some transfers took 20 times as long.
WINDOW = 1 << 22
_CHUNK_BYTES = 1 << 18  # moved at once
_SILENT_TIMEOUTS = 1.5  # timeouts that a server may not answer while its kernel does


class ServerAliveMonitor:
    """Asks the server of a login for signs of life, counts its answers, and gives workers such signs."""

    def __init__(self, transport: paramiko.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._answers = 0
        self._answered = time.monotonic()
        self._workers: weakref.WeakSet[RemoteWorker] = weakref.WeakSet()
        self._adding = threading.Lock()  # guards `_workers`
        threading.Thread(target=self._run, name="shmdist-ssh-pulse", daemon=True).start()

    def _run(self) -> None:
        transport = self._transport
        with contextlib.suppress(Exception):
            while transport.is_active():
                self._beat()
                # No server knows it, so each refuses it, and that is an answer.
                transport.global_request("keepalive@openssh.com", wait=True)
                if transport.is_active():
                    self._answers += 1
                    self._answered = time.monotonic()
                transport.join(self._seconds / 4)  # a thread: so we sleep no longer than it lives

    def heard(self) -> Any:
        """Return what changes with each sign of life.

        That is an answer, and whatever else the kernel there sends: after a stall either side may wait
        for long before it sends again what was lost, and an answer waits behind that.  A server that hangs
        has a kernel too, so without any answer this is good for somewhat more than the timeout only.
        """
        sock = self._transport.sock
        limit = _SILENT_TIMEOUTS * self._seconds
        if isinstance(sock, socket.socket) and time.monotonic() - self._answered < limit:
            counts = keepalive.counts(sock)
            return self._answers, counts and counts[0]
        return self._answers

    def _beat(self) -> None:
        with self._adding:
            workers = list(self._workers)
        for worker in workers:
            worker.beat()

    def keep(self, worker: RemoteWorker) -> None:
        """Give a worker signs of life from now on."""
        with self._adding:
            self._workers.add(worker)

    def end(self) -> None:
        """Close the login without a word to its server."""
        self._transport.packetizer.close()


_pulses: weakref.WeakKeyDictionary[Any, ServerAliveMonitor] = weakref.WeakKeyDictionary()
_finding = threading.Lock()  # guards `_pulses`


def pulse_of(transport: paramiko.Transport) -> ServerAliveMonitor | None:
    """Return the one that asks for a login's signs of life; None where none are wanted."""
    seconds = keepalive.timeout()
    if not seconds:
        return None
    with _finding:
        found = _pulses.get(transport)
        if found is None:
            found = _pulses[transport] = ServerAliveMonitor(transport, seconds)
        return found


class TunnelConnection(Connection):
    """A connection over a local socket whose other end is on another host."""

    #: Neither descriptors nor shared memory go this way, though the socket is a local one.
    bridged = True
    pulse: ServerAliveMonitor | None = None

    def heard(self) -> Any:
        """Return what changes with each sign of life from the other host."""
        return self.pulse.heard() if self.pulse is not None else None

    def abort(self) -> None:
        """Close the login, whose host is gone: what waits to be sent there would wait for long."""
        if self.pulse is not None:
            self.pulse.end()


def bridge(channel: paramiko.Channel, worker: RemoteWorker) -> TunnelConnection:
    """Return a connection to a worker, whose bytes go through a channel."""
    ours, theirs = socket.socketpair()
    try:
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        for name, job in (("up", _up), ("down", _down)):
            threading.Thread(
                target=_move, args=(job, theirs, channel), name=f"shmdist-tunnel-{name}", daemon=True
            ).start()
        pulse = pulse_of(channel.get_transport())
        if pulse is not None:
            pulse.keep(worker)
        connection = TunnelConnection(ours.detach())
    except BaseException:  # Ctrl-C, or no thread: one of the two may run already
        ours.close()
        channel.close()
        theirs.close()
        raise
    connection.pulse = pulse
    return connection


def _move(job: Any, sock: socket.socket, channel: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, EOFError):
        job(sock, channel)
    # The other thread is woken by this, and comes here as well.
    with contextlib.suppress(Exception):
        channel.close()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if job is _down:
        sock.close()  # the other thread has been woken, and finds it closed


def _up(sock: socket.socket, channel: paramiko.Channel) -> None:
    """Move what this process sends."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := sock.recv_into(buffer):
        left = buffer[:count]
        while left:
            sent = channel.send(bytes(left))
            if not sent:
                return
            left = left[sent:]


def _down(sock: socket.socket, channel: paramiko.Channel) -> None:
    """Move what the worker sends."""
    # All that is there: a part of it would leave the channel to move the rest to the front each time.
    while data := channel.recv(WINDOW):
        sock.sendall(data)


__all__ = ["WINDOW", "TunnelConnection", "bridge"]
