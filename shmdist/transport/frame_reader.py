"""The reading side of a link: from the bytes of a socket and the frames in a ring to whole frames.

Only the process's leader (``runtime.reactor``) reads, so it needs no lock.
Reads never block: what has come of a frame is kept here until the rest comes, and a large
frame is received straight into its final memory, so a peer that stops in the middle of a frame
holds up nobody else.

Descriptors that come with a frame are here before it is whole, and they come in the order of
their frames.  The system gives those of one frame at a time; one that it could not give, for
this process has as many open as it may, is kept as -1.

Errors.  *What has been received is kept, whatever raises after that* (no memory, say): its length is noted
before anything is done with it, and each step after that changes this object at its end, or not at
all. `unfinished` says that steps are left; the next :meth:`Reader.read` begins with them, and no
frame is lost or delivered twice. Only what makes no sense, :class:`messages.BadFrame`, ends the link.

Blocks.  A buffer of a frame may be a token in the place of bytes (``messages``).  It becomes a
hold the moment the frame is whole, on the reading thread: whatever happens to the frame from
then on, the hold gives the block back when it is dropped.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmdist.transport.frame_assembler import FrameAssembler
from shmdist.transport.messages import HEADER, BadFrame, Frame, OutgoingFrames
from shmdist.transport.ring import RingReader

if TYPE_CHECKING:
    from typing import Protocol

    class SharedMemory(Protocol):
        """What a link asks of ``runtime.sharing``, or to another host of ``runtime.host_copies``."""

        def adopt(self, token: bytes, sender: int) -> Any:
            """Return the hold of a block."""

        def room(self, number: int, size: int, sender: int) -> Any:
            """Return where the bytes of a copy are received."""

        def place(self, payload: Any, size: int, pid: int, done: OutgoingFrames) -> tuple[list[Any], bool]:
            """Return what stands for a payload's buffers, and whether its body is the last of them."""

        def revoke(self, parts: OutgoingFrames, payload: Any, pid: int) -> None:
            """Take back what was granted for a frame that is not written."""


_BUFFER_BYTES = 1 << 18  # read at once
_DIRECT = 1 << 15  # bodies above this are received straight into their own memory
_MAX_READ_BYTES = 1 << 23  # of one link read before the others get their turn
_HEADER_SIZE = HEADER.size
_ANCILLARY = socket.CMSG_SPACE(16 * 4) if hasattr(socket, "CMSG_SPACE") else 0
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_CTRUNC = int(getattr(socket, "MSG_CTRUNC", 0))
#: Stands for a descriptor that the system could not give.
_LOST = (socket.SOL_SOCKET, getattr(socket, "SCM_RIGHTS", 1), struct.pack("i", -1))


def _nothing_comes(_: Any) -> int:
    """Receive from a link that has ended."""
    return 0


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
        self.sharing: SharedMemory | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._end = 0  # of the bytes in it
        self._start = 0  # of those that are not taken yet
        self._at = 0  # how far `_take_frames` came
        self._incoming: FrameAssembler | None = None
        self._ancillary: list[Any] = []  # what came with the bytes received last
        self._fds: deque[int] = deque()  # descriptors that have come, not yet taken
        self._receive = self._receive_with_fds if with_fds else receive
        self.reads = 0  # how often something was read
        self._received = 0  # bytes
        self.ring_in: RingReader | None = None
        self._messages: list[memoryview] | None = None  # of the ring segment, being taken
        self._message_start = 0  # of what is left of the first of them
        self.unfinished = False  # what has come is not taken

    def drop_input(self) -> None:
        """Let go of what has come of a frame that will not be whole; no thread reads any more.

        It may hold blocks of others, and `_receive` the link itself: that must not wait for the collector.
        """
        self._incoming = self._messages = None
        self._receive = _nothing_comes

    def read(self, frames: list[Frame]) -> bool:
        """Append the frames that have come whole; False at the end of the link.

        Only the leader may call this.  Never blocks.
        """
        budget = _MAX_READ_BYTES
        receive = self._receive
        self.reads += 1
        try:
            if self.unfinished:
                self._take_in(frames)
            while budget > 0:
                incoming = self._incoming
                end = self._end
                if incoming is not None:
                    room: Any = incoming.target[incoming.offset :]
                else:
                    room = self._view[end:] if end else self._buffer
                try:
                    count = receive(room)
                except BlockingIOError:
                    return True
                except (OSError, MemoryError):  # after the second one the bytes may be gone
                    count = 0
                if incoming is not None:
                    incoming.offset += count
                else:
                    self._end = end + count
                self._received += count
                budget -= count
                self.unfinished = True
                self._take_in(frames)
                if not count:
                    return False
                if count < len(room) and (incoming is None or self._incoming is incoming):
                    return True  # a short read: the socket is empty
        except BadFrame:
            self._messages, self._incoming, self._start, self._end = None, None, 0, 0
            self.unfinished = False
            return False
        return True

    def _take_in(self, frames: list[Frame]) -> None:
        """Take the frames out of what has been received; again if that failed."""
        if self._ancillary:
            self._take_fds()
        if self.ring_in is not None:
            self.read_mail(frames)  # it was sent before what has come here
        incoming = self._incoming
        if incoming is None or self._end:
            self._parse(frames)
        elif incoming.advance():
            self._deliver(incoming, frames)
        if self.ring_in is not None and self._incoming is None and not self._end:
            self.ring_in.seen(self._received)
        self.unfinished = False

    def read_mail(self, frames: list[Frame]) -> None:
        """Append the frames that were left in the ring segment; for the leader, again if that failed.

        Raises
        ------
        BadFrame
            They make no sense.
        """
        ring = self.ring_in
        if ring is None:
            return
        messages = self._messages
        if messages is None:
            try:
                messages = ring.open()
            except OSError as error:
                raise BadFrame(str(error)) from None
            if not messages:
                return
            self._message_start = 0
            self._messages = messages
        try:
            while messages:
                message = messages[0]
                end = len(message)
                self._at = self._message_start
                try:
                    self._take_frames(message, end, frames)
                finally:
                    self._message_start = self._at
                if self._at < end or self._incoming is not None:
                    raise BadFrame("there is a part of a frame in the ring segment")
                self._message_start = 0
                del messages[0]
        except BadFrame:
            messages.clear()
            ring.done()  # also of what is delivered already: never twice
            raise
        ring.done()
        self._messages = None

    def _parse(self, frames: list[Frame]) -> None:
        """Take the whole frames out of the read buffer, and begin a large one."""
        self._at = self._start
        try:
            self._take_frames(self._view, self._end, frames)
        finally:
            self._start = self._at
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
        elif start:
            # Keep the beginning of the next frame at the front, so that there is room for it.
            self._view[: end - start] = bytes(self._view[start:end])
            self._start, self._end = 0, end - start

    def _take_frames(self, view: memoryview, end: int, frames: list[Frame]) -> None:
        """Take the whole frames out of `view` from `_at` on, which is kept, and begin a large one."""
        unpack, start = HEADER.unpack_from, self._at
        incoming = self._incoming
        try:
            while True:
                if incoming is None:
                    if end - start < _HEADER_SIZE:
                        break
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
                        raise BadFrame("the body of a frame is longer than any memory")
                    incoming = FrameAssembler(header, self._room)
                    self._incoming, start = incoming, body
                complete = incoming.advance()
                while not complete and start < end:
                    room = incoming.target[incoming.offset :]
                    count = min(len(room), end - start)
                    room[:count] = view[start : start + count]
                    start += count
                    incoming.offset += count
                    complete = incoming.advance()
                if not complete:
                    break
                self._deliver(incoming, frames)
                incoming = None
        finally:
            self._at = start

    def _receive_with_fds(self, room: Any) -> int:
        """Receive bytes, and the descriptors that are with them, which are taken after that."""
        count, ancillary, flags, _ = self._sock.recvmsg_into((room,), _ANCILLARY, _CLOEXEC)
        if ancillary:
            self._ancillary = ancillary
        elif flags & _CTRUNC:
            self._ancillary = [_LOST]
        return count

    def _take_fds(self) -> None:
        """Take the descriptors that came."""
        found: list[int] = []
        for level, kind, data in self._ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        self._fds.extend(found)
        self._ancillary = []

    def take_fd(self, frame: Frame) -> int:
        """Return the descriptor of a frame that is being handled, -1 when it was lost on the way.

        It stays with the frame, for when that is handled again after an error.
        """
        if not frame.buffers:
            if self._fds:
                frame.buffers = [self._fds[0]]
                del self._fds[0]
            else:
                frame.buffers = [-1]
        fd: int = frame.buffers[0]
        return fd

    def give_fd_back(self, frame: Frame) -> None:
        """Put a descriptor back that belongs to a later frame."""
        self._fds.appendleft(frame.buffers[0])
        frame.buffers[0] = -1

    def _adopt(self, token: Any) -> Any:
        if self.sharing is None:
            raise LookupError("a token came by a link that shares no memory")
        return self.sharing.adopt(token, self.pid)

    def _room(self, number: int, size: int) -> Any:
        if self.sharing is None:
            raise MemoryError("a copy came by a link that shares no memory")
        return self.sharing.room(number, size, self.pid)

    def _deliver(self, incoming: FrameAssembler, frames: list[Frame]) -> None:
        frame = incoming.finish(self._adopt)
        frame.link = self
        frames.append(frame)
        self._incoming = None
