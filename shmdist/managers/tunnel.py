"""A worker's connection carried by a login: a channel on one side, a real socket on the other.

Two threads move the bytes, one for each direction.  Either end closes both.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import paramiko

#: Bytes that may be on their way to us: a second of a fast line, or a tenth of one around the world.
WINDOW = 1 << 24
_CHUNK = 1 << 18  # bytes moved at once


class TunnelConnection(Connection):
    """A connection over a local socket whose other end is on another host."""

    #: Neither descriptors nor shared memory go this way, though the socket is a local one.
    bridged = True


def bridge(channel: paramiko.Channel) -> TunnelConnection:
    """Return a connection whose bytes go through a channel."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
    for name, job in (("up", _up), ("down", _down)):
        threading.Thread(
            target=_move, args=(job, theirs, channel), name=f"shmdist-tunnel-{name}", daemon=True
        ).start()
    return TunnelConnection(ours.detach())


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
    buffer = memoryview(bytearray(_CHUNK))
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
