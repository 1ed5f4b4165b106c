"""The reading side of a link: from the bytes of a socket, and what lies in the mailbox, to frames.

Only the holder of the process's reading baton (``runtime.dispatch``) reads, so it needs no lock.
Reads never block: what has come of a frame is kept here until the rest comes, and a large
frame is received straight into its final memory, so a peer that stops in the middle of a frame
holds up nobody else.

Descriptors that come with a frame are here before it is whole, and they come in the order of
their frames.  The system gives those of one frame at a time; one that it could not give, for
this process has as many open as it may, is kept as -1.

Blocks.  A buffer of a frame may be a token in the place of bytes (``messages``).  It becomes a
hold the moment the frame is whole, on the reading thread: whatever happens to the frame from
then on, the hold gives the block back when it is dropped.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist.wire.incoming import Incoming
from shmdist.wire.mailbox import Receiver
from shmdist.wire.messages import HEADER, Frame, Parts

if TYPE_CHECKING:
    from typing import Protocol

    class Sharing(Protocol):
        """What a link asks of ``runtime.sharing``, or to another host of ``runtime.copies``."""

        def adopt(self, token: bytes, sender: int) -> Any:
            """Return the hold of a block."""

        def room(self, number: int, size: int, sender: int) -> Any:
            """Return where the bytes of a copy are received."""

        def place(self, payload: Any, size: int, pid: int, done: Parts) -> tuple[list[Any], bool]:
            """Return what stands for a payload's buffers, and whether its body is the last of them."""


_BUFFER = 1 << 18  # bytes read at once
_DIRECT = 1 << 15  # bodies above this are received straight into their own memory
_TURN = 1 << 23  # bytes of one link read before the others get their turn
_HEADER_SIZE = HEADER.size
_ANCILLARY = socket.CMSG_SPACE(16 * 4) if hasattr(socket, "CMSG_SPACE") else 0
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Reader:
    """The reading side of a link.

    Parameters
    ----------
    receive : callable
        The socket's ``recv_into``.
    with_fds : bool
        Descriptors may come with the bytes.
    """

    pid: int
    _sock: socket.socket

    def __init__(self, receive: Callable[[Any], int], *, with_fds: bool) -> None:
        #: What places buffers in shared memory, when this link may use it; set by who adds it.
        self.sharing: Sharing | None = None
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._end = 0  # of the bytes in it
        self._incoming: Incoming | None = None
        self._fds: deque[int] = deque()  # descriptors that have come, not yet taken
        self._receive = self._receive_with_fds if with_fds else receive
        self.reads = 0  # how often something was read
        self._received = 0  # bytes
        self.mail_in: Receiver | None = None

    def read(self, frames: list[Frame]) -> bool:
        """Append the frames that have come whole; False at the end of the link.

        Only the baton's holder may call this.  Never blocks.
        """
        budget = _TURN
        receive = self._receive
        self.reads += 1
        try:
            while budget > 0:
                incoming = self._incoming
                end = self._end
                if incoming is not None:
                    room: Any = incoming.target[incoming.offset :]
                else:
                    room = self._view[end:] if end else self._buffer
                count = receive(room)
                if self.mail_in is not None:
                    self.read_mail(frames)  # it was sent before what has come here
                if not count:
                    return False
                budget -= count
                self._received += count
                if incoming is not None:
                    if incoming.advance(count):
                        self._incoming = None
                        self._deliver(incoming.finish(self._adopt), frames)
                    elif count < len(room):
                        return True
                else:
                    self._end = end + count
                    self._parse(frames)
                if self._incoming is None:
                    if self.mail_in is not None and not self._end:
                        self.mail_in.seen(self._received)
                    if incoming is None and end + count < _BUFFER:
                        return True  # a short read: the socket is empty
        except BlockingIOError:
            return True
        except (OSError, MemoryError):  # no memory for even a small frame
            if self.mail_in is not None:
                with contextlib.suppress(OSError, MemoryError):
                    self.read_mail(frames)
            return False
        return True

    def read_mail(self, frames: list[Frame]) -> None:
        """Append the frames that were left in the mailbox; for the baton's holder.

        Raises
        ------
        OSError
            They make no sense.
        """
        mail = self.mail_in
        if mail is None:
            return
        messages = mail.open()
        if not messages:
            return
        try:
            for message in messages:
                if (
                    self._take_frames(message, len(message), frames) < len(message)
                    or self._incoming is not None
                ):
                    raise OSError("there is a part of a frame in the mailbox")
        finally:
            mail.done()  # also of what is delivered already when one makes no sense: never twice

    def _parse(self, frames: list[Frame]) -> None:
        """Take the whole frames out of the read buffer, and begin a large one."""
        end = self._end
        start = self._take_frames(self._view, end, frames)
        if start == end:
            end = 0
        elif start:
            # Keep the beginning of the next frame at the front, so that there is room for it.
            end -= start
            self._view[:end] = bytes(self._view[start : start + end])
        self._end = end

    def _take_frames(self, view: memoryview, end: int, frames: list[Frame]) -> int:
        """Take the whole frames out of `view` up to `end`, and begin a large one; returns how far it came."""
        start = 0
        unpack = HEADER.unpack_from
        while end - start >= _HEADER_SIZE:
            kind, flags, _spare, lane, nbuf, call_id, body_len = header = unpack(view, start)
            body = start + _HEADER_SIZE
            if not nbuf:
                stop = body + body_len
                if stop <= end:
                    frame = Frame(kind, flags, lane, call_id, bytes(view[body:stop]), [])
                    frame.link = self
                    frames.append(frame)
                    start = stop
                    continue
                if body_len < _DIRECT:
                    break  # the rest of a small frame: wait for it here
            if body_len > sys.maxsize:
                raise OSError("the body of a frame is longer than any memory")
            incoming = Incoming(header, self._room)
            start = body
            complete = incoming.advance(0) if not len(incoming.target) else False
            while not complete and start < end:
                room = incoming.target[incoming.offset :]
                count = min(len(room), end - start)
                room[:count] = view[start : start + count]
                start += count
                complete = incoming.advance(count)
            if complete:
                self._deliver(incoming.finish(self._adopt), frames)
            else:
                self._incoming = incoming
        return start

    def _receive_with_fds(self, room: Any) -> int:
        """Receive bytes, and the descriptors that are with them."""
        count, ancillary, flags, _ = self._sock.recvmsg_into((room,), _ANCILLARY, _CLOEXEC)
        if flags & socket.MSG_CTRUNC and not ancillary:
            self._fds.append(-1)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
        return count

    def take_fd(self) -> int:
        """Return the descriptor of the frame that is being handled, -1 when it was lost on the way."""
        return self._fds.popleft() if self._fds else -1

    def give_fd_back(self, fd: int) -> None:
        """Put a descriptor back that belongs to a later frame."""
        self._fds.appendleft(fd)

    def _adopt(self, token: Any) -> Any:
        if self.sharing is None:
            raise LookupError("a token came by a link that shares no memory")
        return self.sharing.adopt(token, self.pid)

    def _room(self, number: int, size: int) -> Any:
        if self.sharing is None:
            raise MemoryError("a copy came by a link that shares no memory")
        return self.sharing.room(number, size, self.pid)

    def _deliver(self, frame: Frame, frames: list[Frame]) -> None:
        frame.link = self
        frames.append(frame)
