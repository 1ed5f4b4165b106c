"""A link: one connection to another process, its framing and its two locks.

Protocol
--------
Reading.  Only the holder of the process's reading baton (``runtime.dispatch``) calls
:meth:`Link.read`, so reading needs no lock.  Reads never block: what has come of a frame
is kept here until the rest comes, and a large frame is received straight into its final
memory, so a peer that stops in the middle of a frame holds up nobody else.

Writing.  A frame is complete in memory before its first byte is written.  ``_write``
guards the writing side.  Whoever holds it writes his frame, then whatever was posted
meanwhile in ``_outbox``, and looks once more after letting go, so that nothing posted
stays behind:

- :meth:`send` blocks until the frame is with the system.  The caller may change his
  arrays the moment it returns.
- :meth:`post` never blocks; readers use it.  What the system does not take at once, or
  what finds somebody else writing, is copied and left in the outbox, and the caller is
  told to have it flushed.  The holder of ``_write`` will mostly have done it by then, but
  he may give up at a socket that is full.  One flush is asked for at a time: ``_asked`` is
  set before the caller is told, and cleared by the flush once it holds ``_write``, so a
  part posted while it is set is a part that this flush will see.
- A sender that is interrupted before the first byte takes his frame back; after the
  first byte the rest is copied to the head of the outbox, for a half-written frame
  would be the end of the link.

Descriptors.  A frame may carry one descriptor, over AF_UNIX.  It is attached to the frame's
first bytes, so it is here before the frame is whole, and they come in the order of their
frames.  Links over AF_UNIX are therefore read with ``recvmsg``.

Blocks.  A buffer of a frame may be a token in the place of bytes (``messages``).  It becomes a
hold the moment the frame is whole, on the reading thread: whatever happens to the frame from
then on, the hold gives the block back when it is dropped.

End.  A read of no bytes, a reset, a frame that makes no sense (lengths that no memory can
have), a write that fails in the middle of a frame, or :meth:`close` end the link for both
directions; frames that were complete by then are still delivered.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from shmdist.wire import pulse
from shmdist.wire.incoming import Incoming
from shmdist.wire.messages import HEADER, Frame, Parts

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from typing import Protocol

    class Sharing(Protocol):
        """What a link asks of ``runtime.sharing``, or to another host of ``runtime.copies``."""

        def adopt(self, token: bytes, sender: int) -> Any:
            """Return the hold of a block."""

        def room(self, number: int, size: int, sender: int) -> Any:
            """Return where the bytes of a copy are received (``runtime.copies``)."""

        def place(self, payload: Any, size: int, pid: int, done: Parts) -> tuple[list[Any], bool]:
            """Return what stands for a payload's buffers, and whether its body is the last of them."""


_BUFFER = 1 << 18  # bytes read at once
_DIRECT = 1 << 15  # bodies above this are received straight into their own memory
_TURN = 1 << 23  # bytes of one link read before the others get their turn
_IOV_MAX = 1024  # parts a system call takes
_HEADER_SIZE = HEADER.size
_ANCILLARY = socket.CMSG_SPACE(16 * 4) if hasattr(socket, "CMSG_SPACE") else 0
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Part = bytes | bytearray | memoryview


class LinkClosed(OSError):
    """The link has ended; the frame was not sent, or not whole."""


class SendInterrupted(Exception):
    """The thread was interrupted while it waited to write.

    Attributes
    ----------
    begun : bool
        The frame will be sent whole in the background, for its beginning was written.
    """

    def __init__(self, begun: bool = False) -> None:
        super().__init__(begun)
        self.begun = begun


class Link:
    """A connection to one process of the cluster.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Over a stream socket, already proven.  The link owns it from now on.
    pid : int
        The cluster's process id of the other side.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.closed = False
        self.fd = connection.fileno()
        self._sock = socket.socket(fileno=self.fd)
        self._sock.setblocking(False)
        unix = self._sock.family == getattr(socket, "AF_UNIX", None)
        # Descriptors and shared memory go by it; not so where it is carried on to another host.
        self.bridged = getattr(connection, "bridged", False)
        self.is_local = unix and not self.bridged
        if not unix:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pulse.keep_alive(self._sock, pulse.timeout())
        #: What places buffers in shared memory, when this link may use it; set by who adds it.
        self.sharing: Sharing | None = None
        # -- reading: the baton's holder only
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._incoming: Incoming | None = None
        self._fds: deque[int] = deque()  # descriptors that have come, not yet taken
        self._receive = self._receive_with_fds if self.is_local else self._sock.recv_into
        # -- starting calls in order: tickets given by the reader, and passed by the calls' threads
        self.calls_read = 0
        self.calls_started = 0
        self.gate = threading.Condition()  # guards waiting for `calls_started`
        self.gate_waiters = 0
        # -- writing
        self._write = threading.Lock()  # guards the writing side of the socket
        self._outbox: deque[Part] = deque()  # posted parts, in order; drained under `_write`
        self._asked = False  # somebody was told to flush, and has not begun yet

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<Link to process {self.pid}, {state}, fd {self.fd}, {len(self._outbox)} parts posted>"

    @property
    def socket(self) -> socket.socket:
        """The socket, for looking at."""
        return self._sock

    # ------------------------------------------------------------------ writing

    @property
    def is_writing(self) -> bool:
        """Whether something is being written, or waits to be."""
        return bool(self._outbox) or self._write.locked()

    def send(self, parts: list[Part], interrupted: Callable[[], bool] = lambda: False, fd: int = -1) -> None:
        """Write one or more whole frames, and wait until the system has taken them.

        Parameters
        ----------
        parts : list of bytes-like
            Header, body and buffers, each C-contiguous bytes.
        interrupted : callable
            Looked at while waiting; true gives up.
        fd : int
            A descriptor to send along; it stays the caller's.

        Raises
        ------
        LinkClosed
            The other side is gone.
        SendInterrupted
            Given up; the frame was not sent, or will be sent whole in the background.
        """
        write = self._write
        if not write.acquire(False):
            while not write.acquire(timeout=0.05):
                if interrupted():
                    raise SendInterrupted
                if self.closed:
                    raise LinkClosed("the link is closed")
        try:
            if self._outbox:
                self._drain(block=True, interrupted=interrupted)
            self._write_parts(parts, interrupted, fd)
        finally:
            write.release()
            if self._outbox:
                self.flush(block=False)

    def _write_parts(self, parts: list[Part], interrupted: Callable[[], bool], fd: int) -> None:
        """Write `parts`; `_write` is held."""
        if self.closed:
            raise LinkClosed("the link is closed")
        first = parts[0]
        try:
            if fd >= 0:
                sent = self._send_first(first, fd)
            elif len(parts) == 1:
                sent = self._sock.send(first)
                if sent == len(first):
                    return
            else:
                sent = self._sock.sendmsg(parts[:_IOV_MAX])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise LinkClosed(str(error)) from None
        rest = _skip(parts, sent)
        started = sent > 0
        while rest:
            if not self._wait_writable():
                raise LinkClosed("the link was closed while a frame was being written")
            if interrupted():
                if not started:
                    raise SendInterrupted
                if self._keep(rest):
                    raise SendInterrupted(begun=True)
                # No memory to keep the rest: a frame that has begun must end all the same.
            try:
                if fd >= 0 and not started:
                    sent = self._send_first(first, fd)
                else:
                    sent = self._sock.sendmsg(rest[:_IOV_MAX])
            except BlockingIOError:
                continue
            except OSError as error:
                if started:
                    self.shut()  # or the next frame would be taken for the rest of this one
                raise LinkClosed(str(error)) from None
            if sent:
                started = True
                rest = _skip(rest, sent)

    def _send_first(self, first: Part, fd: int) -> int:
        """Write the beginning of a frame with a descriptor."""
        return self._sock.sendmsg([first], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])

    def _keep(self, rest: list[Part]) -> bool:
        """Put the rest of a frame at the head of the outbox; `_write` is held."""
        try:
            copies = [bytes(part) for part in rest]  # the caller's arrays are his again
        except MemoryError:
            return False
        self._outbox.extendleft(reversed(copies))
        return True

    def _wait_writable(self) -> bool:
        """Wait a little for room to write; False when the link is closed."""
        if self.closed:
            return False
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        poller.poll(50)
        return not self.closed

    def post(self, parts: Iterable[Part]) -> bool:
        """Write without ever blocking; what is left over waits in the outbox.

        Returns
        -------
        bool
            False when the caller must see to it that :meth:`flush` is called, from a
            thread that may block.
        """
        self._outbox.append(b"".join(parts))
        if self.flush(block=False) or self._asked:
            return True
        self._asked = True
        return False

    def flush(self, *, block: bool) -> bool:
        """Write what was posted; False when something may be left."""
        if block and not self._outbox:
            self._asked = False
        while self._outbox and not self.closed:
            if not self._write.acquire(block):
                return False  # its holder looks at the outbox after letting go, but may give up
            try:
                if block:
                    self._asked = False
                self._drain(block=block, interrupted=lambda: False)
                left = bool(self._outbox)
            except LinkClosed:
                return True
            finally:
                self._write.release()
            if left and not block:
                return False
        return True

    def _drain(self, *, block: bool, interrupted: Callable[[], bool]) -> None:
        """Write the outbox; `_write` is held."""
        while self._outbox:
            part = self._outbox[0]
            try:
                sent = self._sock.send(part)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._outbox.clear()
                raise LinkClosed(str(error)) from None
            if sent == len(part):
                self._outbox.popleft()
                continue
            if sent:
                self._outbox[0] = memoryview(part)[sent:]
            if not block:
                return
            if not self._wait_writable():
                raise LinkClosed("the link is closed")
            if interrupted():
                raise SendInterrupted

    # ------------------------------------------------------------------ reading

    def read(self, frames: list[Frame]) -> bool:
        """Append the frames that have come whole; False at the end of the link.

        Only the baton's holder may call this.  Never blocks.
        """
        budget = _TURN
        receive = self._receive
        try:
            while budget > 0:
                incoming = self._incoming
                if incoming is not None:
                    room: Any = incoming.target[incoming.offset :]
                    count = receive(room)
                    if not count:
                        return False
                    budget -= count
                    if incoming.advance(count):
                        self._incoming = None
                        self._deliver(incoming.finish(self._adopt), frames)
                    elif count < len(room):
                        return True
                    continue
                end = self._end
                count = receive(self._view[end:] if end else self._buffer)
                if not count:
                    return False
                budget -= count
                self._end = end + count
                self._parse(frames)
                if self._incoming is None and end + count < _BUFFER:
                    return True  # a short read: the socket is empty
        except BlockingIOError:
            return True
        except (OSError, MemoryError):  # no memory for even a small frame
            return False
        return True

    def _parse(self, frames: list[Frame]) -> None:
        """Take the whole frames out of the read buffer, and begin a large one."""
        start, end = self._start, self._end
        unpack = HEADER.unpack_from
        while end - start >= _HEADER_SIZE:
            kind, flags, _spare, lane, nbuf, call_id, body_len = header = unpack(self._buffer, start)
            body = start + _HEADER_SIZE
            if not nbuf:
                stop = body + body_len
                if stop <= end:
                    frame = Frame(kind, flags, lane, call_id, bytes(self._view[body:stop]), [])
                    self._deliver(frame, frames)
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
                room[:count] = self._view[start : start + count]
                start += count
                complete = incoming.advance(count)
            if complete:
                self._deliver(incoming.finish(self._adopt), frames)
            else:
                self._incoming = incoming
        if start == end:
            start = end = 0
        elif start:
            # Keep the beginning of the next frame at the front, so that there is room for it.
            left = end - start
            self._view[:left] = bytes(self._view[start:end])
            start, end = 0, left
        self._start, self._end = start, end

    def _receive_with_fds(self, room: Any) -> int:
        """Receive bytes, and the descriptors that are with them."""
        count, ancillary, _, _ = self._sock.recvmsg_into((room,), _ANCILLARY, _CLOEXEC)
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

    # ------------------------------------------------------------------ end

    def shut(self) -> None:
        """End the link in both directions; the descriptor stays until :meth:`close`."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Give the descriptor back without ending the link; in a forked child."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.detach()
        with contextlib.suppress(OSError):
            self.connection.close()

    def close(self) -> None:
        """End the link and give the descriptor back.

        The caller makes sure that nobody reads the link any more and that its
        descriptor is in no poller.
        """
        self.shut()
        with self._write:  # a sender may still be in a system call with the descriptor
            self._outbox.clear()
            with contextlib.suppress(OSError):
                self._sock.detach()
            with contextlib.suppress(OSError):
                self.connection.close()
            while self._fds:
                os.close(self._fds.popleft())
        with self.gate:
            self.gate.notify_all()


def _skip(parts: list[Part], count: int) -> list[Part]:
    """Return `parts` without their first `count` bytes."""
    index = 0
    for index, part in enumerate(parts):  # noqa: B007 - used after the loop
        size = len(part)
        if count < size:
            break
        count -= size
    else:
        return []
    rest = parts[index:]
    if count:
        rest[0] = memoryview(rest[0])[count:]
    return [part for part in rest if len(part)]
