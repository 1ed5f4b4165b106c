"""Relay: process 1 joins two workers that have no direct connection.

It connects to both, proves the cookie to both, and tells each by a HELLO who is at the other
end; from then on it moves bytes and understands none of them.  So a relayed link is a link
like any other to the two workers, and it ends as one: when either side closes, or process 1
is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from typing import Any

from shmdist.runtime.node import Node
from shmdist.serialization import codec
from shmdist.transport import listener
from shmdist.transport.link import Link
from shmdist.transport.messages import Frame, Hello, Kind

_CHUNK_BYTES = 1 << 18  # moved at once


def serve(node: Node, members: dict[int, Any], frame: Frame) -> None:
    """Answer a worker that asks to be joined to another one; on a thread of its own."""
    error = None
    try:
        _join(node, members, frame.link.pid, pickle.loads(frame.body))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    node.requests.answer(frame.link, frame.call_id, 0, codec.dumps(error))


def _join(node: Node, members: dict[int, Any], first: int, second: int) -> None:
    ends: list[socket.socket] = []
    try:
        for pid, other in ((second, first), (first, second)):
            member = members.get(pid)
            if member is None:
                raise LookupError(f"process {pid} is gone")
            connection = member.manager.connect(pid, member.config)
            listener.authenticate_as_client(connection, node.cookie, 1)
            ends.append(socket.socket(fileno=os.dup(connection.fileno())))
            link = Link(connection, pid)
            link.send(codec.frame(int(Kind.HELLO), 0, 0, 0, codec.dumps(Hello(other, "relayed"))))
            link.abandon()
            ends[-1].setblocking(True)
    except BaseException:
        for end in ends:
            end.close()
        raise
    left = threading.Semaphore(1)  # the second of the two movers finds it taken, and closes
    for source, sink in (ends, ends[::-1]):
        threading.Thread(target=_move, args=(source, sink, left), name="shmdist-relay", daemon=True).start()


def _move(source: socket.socket, sink: socket.socket, left: threading.Semaphore) -> None:
    """Move bytes until either end closes; then close both."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            sink.sendall(buffer[:count])
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    if not left.acquire(blocking=False):
        source.close()
        sink.close()


__all__ = ["serve"]
