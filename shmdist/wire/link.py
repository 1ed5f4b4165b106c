"""A link: one connection to another process, its framing and its two locks.

Protocol
--------
Reading.  In ``wire.reader``: never blocks, and needs no lock, for one thread at a time does it.

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

Mailbox.  Between processes of one host short frames may go through shared memory, beside the
socket and in one order with what goes through that: ``wire.mailbox``, whose slots the two
sides of a link have in `mail_out` and `mail_in`.  A frame for which there is no room there
goes by the socket.  A receiver that sleeps is woken by a descriptor, `kick_out`, which `_kick`
keeps from being closed meanwhile: so :meth:`wake` waits for nobody who writes.  Several may be
woken together (``runtime.mail``).

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
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from shmdist.wire import pulse
from shmdist.wire.mailbox import MOST, UNSEEN, Sender
from shmdist.wire.messages import HEADER, Kind
from shmdist.wire.poller import ONE
from shmdist.wire.reader import Reader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_IOV_MAX = 1024  # parts a system call takes
_WAKE_UP = HEADER.pack(Kind.BEAT, 0, 0, 0, 0, 0, 0)  # has no other meaning than that it comes

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


#: Links by which something was left for receivers that sleep and are still to be woken, by who sends.
Unwoken: TypeAlias = "list[Link] | None"


class Link(Reader):
    """A connection to one process of the cluster.

    Parameters
    ----------
    connection : multiprocessing.connection.Connection
        Over a stream socket, already proven.  The link owns it from now on.
    pid : int
        The cluster's process id of the other side.
    """

    # Those that are rarely used. CPython keeps 29 others where a call finds them sooner than in a dict.
    __slots__ = ("_asked", "bridged", "connection", "has_bell", "hears_bells")

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
        super().__init__(self._sock.recv_into, with_fds=self.is_local)
        # -- starting calls in order: tickets given by the reader, and passed by the calls' threads
        self.calls_read = 0
        self.calls_started = 0
        self.gate = threading.Condition()  # guards waiting for `calls_started`
        self.gate_waiters = 0
        # -- writing
        self._write = threading.Lock()  # guards the writing side of the socket
        self._outbox: deque[Part] = deque()  # posted parts, in order; drained under `_write`
        self._asked = False  # somebody was told to flush, and has not begun yet
        self._sent = 0  # bytes written to the socket
        self.mail_out: Sender | None = None
        self._kick = threading.Lock()  # held while `kick_out` is written to, and while it is changed
        self.kick_out = -1  # descriptor that wakes the receiver
        self.hears_bells = False  # the receiver may be told by which bell it is woken (``runtime.mail``)
        self.has_bell = False  # and listens to it

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

    def send(
        self,
        parts: list[Part],
        interrupted: Callable[[], bool] = lambda: False,
        fd: int = -1,
        unwoken: Unwoken = None,
    ) -> None:
        """Write one or more whole frames, and wait until the system has taken them.

        Parameters
        ----------
        parts : list of bytes-like
            Header, body and buffers, each C-contiguous bytes.
        interrupted : callable
            Looked at while waiting; true gives up.
        fd : int
            A descriptor to send along; it stays the caller's.
        unwoken : list of Link, optional
            As for :meth:`leave`. Those in it are woken before this waits for anything.

        Raises
        ------
        LinkClosed
            The other side is gone.
        SendInterrupted
            Given up; the frame was not sent, or will be sent whole in the background.
        """
        if fd < 0 and self.leave(parts, unwoken):
            return
        while unwoken:
            unwoken.pop().wake()
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

    def leave(self, parts: list[Part], unwoken: Unwoken = None) -> bool:
        """Leave whole frames in the receiver's mailbox; False when they must be sent. Never blocks.

        A receiver that sleeps is woken, or its link appended to `unwoken`: then the caller sees to it,
        soon.
        """
        if self.mail_out is None:
            return False
        if len(parts) == 1:
            return self.leave_whole(parts[0], unwoken)
        return sum(map(len, parts)) <= MOST and self.leave_whole(b"".join(parts), unwoken)

    def leave_whole(self, whole: Part, unwoken: Unwoken = None) -> bool:
        """Leave whole frames that are one piece, as :meth:`leave`."""
        mail = self.mail_out
        if mail is None or not self._write.acquire(False):
            return False
        try:
            if self._outbox or self.closed:
                return False
            outcome = mail.put(whole, self._sent)
        finally:
            self._write.release()
            if self._outbox:
                self.flush(block=False)
        if outcome == UNSEEN:
            if unwoken is None:
                self.wake()
            else:
                unwoken.append(self)
        return outcome > 0

    def wake(self) -> None:
        """Wake the receiver, who may not have seen what was left. Never blocks."""
        with self._kick:
            if self.kick_out >= 0:
                with contextlib.suppress(OSError):  # it is set already, or has nobody left to wake
                    os.write(self.kick_out, ONE)
                return
        if not self.closed:
            # What is left over when the socket is full need not be seen to: that has woken the receiver.
            self._outbox.append(_WAKE_UP)
            self.flush(block=False)

    def take_kick(self, fd: int, bells: bool) -> None:
        """Wake the receiver by a descriptor from now on; it is the link's."""
        with self._kick:
            if self.closed or self.kick_out >= 0:
                os.close(fd)
            else:
                self.kick_out, self.hears_bells = fd, bells

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
                    self._sent += sent
                    return
            else:
                sent = self._sock.sendmsg(parts[:_IOV_MAX])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise LinkClosed(str(error)) from None
        self._sent += sent
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
                self._sent += sent
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
        whole = b"".join(parts)
        if not self.leave_whole(whole):
            self._outbox.append(whole)
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
            self._sent += sent
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

    # ------------------------------------------------------------------ end

    def shut(self) -> None:
        """End the link in both directions; the descriptor stays until :meth:`close`."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Give the descriptor back without ending the link; in a forked child."""
        self.closed = True
        self._forget_mail()
        with contextlib.suppress(OSError):
            self._sock.detach()
        with contextlib.suppress(OSError):
            self.connection.close()

    def _forget_mail(self) -> None:
        self.mail_in = self.mail_out = None
        fd, self.kick_out = self.kick_out, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """End the link and give the descriptor back.

        The caller makes sure that nobody reads the link any more and that its
        descriptor is in no poller.
        """
        self.shut()
        with self._write, self._kick:  # a sender may still be in a system call with the descriptor
            self._outbox.clear()
            self._forget_mail()
            with contextlib.suppress(OSError):
                self._sock.detach()
            with contextlib.suppress(OSError):
                self.connection.close()
            while self._fds:
                if (fd := self._fds.popleft()) >= 0:
                    os.close(fd)
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
