"""A link: one connection to another process, its framing and its two locks.

Protocol
--------
Reading.  In ``transport.frame_reader``: never blocks, and needs no lock, for one thread at a time does it.

Writing.  A frame is complete in memory before its first byte is written.  ``_write``
guards the writing side.  Whoever holds it writes his frame, then whatever was posted
meanwhile in ``_outbox``, and looks once more after letting go, so that nothing posted
stays behind:

- :meth:`send` blocks until the frame is with the system, or for as long as the other side goes on
  reading.  The caller may change his arrays the moment it returns.
- A sender with `patience` waits so many seconds at most in which the system takes nothing.
  Then the other side is *stuck*: the rest of the frame, or the frame as a whole where
  another one is being written, is copied to the outbox, and the caller is told to have it
  flushed, as by :meth:`post`.  `_stuck_at` notes `_sent` of that moment.  As long as the two
  are equal, senders with patience do not wait again.  The outbox takes `most_queued` bytes of
  them; beyond that they wait as others do, so memory is bounded.
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
frames.  Links over AF_UNIX are therefore read with ``recvmsg``.  The outbox has copies of
descriptors, each closed when the beginning of its frame is written (``transport.outbox``).

Mailbox.  Between processes of one host short frames may go through shared memory, beside the
socket and in one order with what goes through that: ``transport.ring``, whose slots the two
sides of a link have in `ring_out` and `ring_in`.  A frame for which there is no room there
goes by the socket.  A receiver that sleeps is woken by a descriptor, `kick_out`, which `_kick`
keeps from being closed meanwhile: so :meth:`wake` waits for nobody who writes.  Several may be
woken together (``runtime.ring_exchange``).

Errors.  *What a call here raises tells whether the frame goes*: all that can fail is done before, so an
error leaves the frame unsent, but for :class:`SendInterrupted` with `begun`. Of a frame that has begun to
be written, the rest follows, or the link ends.

End.  A read of no bytes, a reset, a frame that makes no sense (lengths that no memory can
have), a write that fails in the middle of a frame, or :meth:`close` end the link for both
directions; frames that were complete by then are still delivered.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from shmdist.transport import keepalive
from shmdist.transport.frame_reader import Reader
from shmdist.transport.messages import HEADER, Kind
from shmdist.transport.outbox import Part, PartWithDescriptor, most_queued, skip, with_descriptor
from shmdist.transport.poller import ONE
from shmdist.transport.ring import MAX_MESSAGE_BYTES, UNSEEN, RingWriter

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

STUCK_SECONDS = 0.02  # in which a process may take nothing before what is sent to it is queued
_IOV_MAX = 1024  # parts a system call takes
_TRIES = 8  # times that the rest of a frame is tried to be written, whatever fails
_WAKE_UP = HEADER.pack(Kind.HEARTBEAT, 0, 0, 0, 0, 0, 0)  # has no other meaning than that it comes


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
Wakeups: TypeAlias = "list[Link] | None"


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
    __slots__ = (
        "_asked",
        "_behind",
        "_kick",
        "_queued",
        "_stuck_at",
        "bridged",
        "connection",
        "gate",
        "given_up",
        "hears_group_wakeup",
        "supports_group_wakeup",
    )

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
            keepalive.keep_alive(self._sock, keepalive.timeout())
        super().__init__(self._sock.recv_into, with_fds=self.is_local)
        # -- starting calls in order: tickets given by the reader, and passed by the calls' threads
        self.calls_read = 0
        self.calls_started = 0
        self.gate = threading.Lock()  # guards waiting for `calls_started`
        self.at_gate: dict[int, threading.Condition] = {}  # those who wait for their turn, by their tickets
        self.given_up: set[int] = set()  # tickets of calls that will not start; guarded by `gate`
        # -- writing
        self._write = threading.Lock()  # guards the writing side of the socket
        self._outbox: deque[Part] = deque()  # posted parts, in order; drained under `_write`
        self._asked = False  # somebody was told to flush, and has not begun yet
        self._sent = 0  # bytes written to the socket
        # Bytes in the outbox. Changed without a lock, for CPython switches threads at calls and jumps
        # alone; were a change lost, the bound would be less exact, and nothing else.
        self._queued = 0
        self._stuck_at = -1  # `_sent` when the other side was found to take nothing
        self._behind = False  # what was queued then is not all written
        self.ring_out: RingWriter | None = None
        self._kick = threading.Lock()  # held while `kick_out` is written to, and while it is changed
        self.kick_out = -1  # descriptor that wakes the receiver
        self.supports_group_wakeup = (
            False  # the receiver may be told of the group wake-up (``runtime.ring_exchange``)
        )
        self.hears_group_wakeup = False  # and listens to it

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<Link to process {self.pid}, {state}, fd {self.fd}, {len(self._outbox)} parts posted>"

    @property
    def socket(self) -> socket.socket:
        """The socket, for looking at."""
        return self._sock

    def start_next(self, slow: int) -> None:
        """Let the call start that is next, and not wait for `slow` any more; `gate` is held."""
        if self.calls_started == slow:
            self.calls_started = slow + 1
        while self.calls_started in self.given_up:
            self.given_up.discard(self.calls_started)
            self.calls_started += 1
        if self.at_gate:
            self.at_gate[min(self.at_gate)].notify()  # nobody else can start yet

    # ------------------------------------------------------------------ writing

    @property
    def is_writing(self) -> bool:
        """Whether something is being written, or waits to be."""
        return bool(self._outbox) or self._write.locked()

    @property
    def is_stuck(self) -> bool:
        """Whether the other side has been found to take nothing, and has taken nothing since."""
        return self._stuck_at == self._sent

    @property
    def is_blocked(self) -> bool:
        """Whether something is queued since the other side was found to take nothing."""
        return self._behind and bool(self._outbox)

    @property
    def end(self) -> int:
        """How many bytes will have been written when all that is queued now is."""
        return self._sent + self._queued

    def has_written(self, end: int) -> bool:
        """Whether the system has taken so many bytes."""
        return self._sent >= end

    def note_stuck(self) -> None:
        """Note that the other side takes nothing: what is sent with patience is queued at once."""
        self._stuck_at = self._sent

    def send(
        self,
        parts: list[Part],
        interrupted: Callable[[], bool] = lambda: False,
        fd: int = -1,
        wakeups: Wakeups = None,
        patience: float = math.inf,
    ) -> bool:
        """Write one or more whole frames, and wait until the system has taken them.

        Parameters
        ----------
        parts : list of bytes-like
            Header, body and buffers, each C-contiguous bytes.
        interrupted : callable
            Looked at while waiting; true gives up.
        fd : int
            A descriptor to send along; it stays the caller's.
        wakeups : list of Link, optional
            As for :meth:`leave`. Those in it are woken before this waits for anything.
        patience : float
            Seconds in which the other side may take nothing before what is left is queued.

        Returns
        -------
        bool
            False when something was queued, and the caller must see to it that :meth:`flush` is
            called, from a thread that may block.

        Raises
        ------
        LinkClosed
            The other side is gone.
        SendInterrupted
            Given up; the frame was not sent, or will be sent whole in the background.
        """
        if fd < 0 and self.leave(parts, wakeups):
            return True
        while wakeups:
            wakeups[-1].wake()
            del wakeups[-1]
        whole = queued = False
        if self._write.acquire(False) or self._wait_for_writer(parts, interrupted, fd, patience):
            try:
                if self._outbox and not self._drain(self._limit(patience), interrupted):
                    queued = self._queue(parts, fd)
                    if not queued:
                        self._drain(math.inf, interrupted)
                if not queued:
                    whole = self._write_parts(parts, interrupted, fd, self._limit(patience))
            finally:
                self._write.release()
                if self._outbox:
                    try:
                        self.flush(block=False)
                    except Exception:
                        pass  # whose it is has asked for a flush
        if whole or not self._outbox or self._asked:  # nothing is called from here on, for it could fail
            return True
        self._asked = True
        return False

    def _limit(self, patience: float) -> float:
        """Return for how many seconds a sender with `patience` waits now."""
        return 0.0 if patience < math.inf and self.is_stuck else patience

    def _wait_for_writer(
        self, parts: list[Part], interrupted: Callable[[], bool], fd: int, patience: float
    ) -> bool:
        """Wait for `_write`, which another thread holds; False when `parts` were queued instead."""
        while True:
            sent = self._sent
            if self._write.acquire(timeout=min(0.05, self._limit(patience))):
                return True
            if interrupted():
                raise SendInterrupted
            if self.closed:
                raise LinkClosed("the link is closed")
            if patience < math.inf and sent == self._sent:
                if self._queue(parts, fd):
                    return False
                patience = math.inf

    def _queue(self, parts: list[Part], fd: int) -> bool:
        """Copy whole frames to the end of the outbox, as the other side is stuck; False when it is full."""
        self._stuck_at = self._sent
        if self._queued + sum(map(len, parts)) > most_queued():
            return False
        try:
            whole = with_descriptor(b"".join(parts), fd)
        except (MemoryError, OSError):
            return False
        self._behind = True
        self._put(whole)
        if self.closed:
            raise LinkClosed("the link is closed")
        return True

    def _put(self, whole: Part) -> None:
        """Put whole frames that are one piece at the end of the outbox."""
        size = len(whole)
        self._outbox.append(whole)
        self._queued += size

    def leave(self, parts: list[Part], wakeups: Wakeups = None) -> bool:
        """Leave whole frames in the receiver's ring segment; False when they must be sent. Never blocks.

        A receiver that sleeps is woken, or its link appended to `wakeups`: then the caller sees to it,
        soon.
        """
        if self.ring_out is None:
            return False
        if len(parts) == 1:
            return self.try_ring_one(parts[0], wakeups)
        return sum(map(len, parts)) <= MAX_MESSAGE_BYTES and self.try_ring_one(b"".join(parts), wakeups)

    def try_ring_one(self, whole: Part, wakeups: Wakeups = None) -> bool:
        """Leave whole frames that are one piece, as :meth:`leave`."""
        ring = self.ring_out
        if ring is None or not self._write.acquire(False):
            return False
        try:
            if self._outbox or self.closed:
                return False
            outcome = ring.put(whole, self._sent)
        finally:
            self._write.release()
            if self._outbox:
                try:
                    self.flush(block=False)
                except Exception:
                    pass  # whose it is has asked for a flush
        if outcome == UNSEEN:
            try:
                if wakeups is None:
                    self.wake()
                else:
                    wakeups.append(self)
            except Exception:
                self.wake()  # it is left, so that its receiver must know
        return outcome > 0

    def wake(self) -> None:
        """Wake the receiver, who may not have seen what was left. Never blocks."""
        with self._kick:
            if self.kick_out >= 0:
                try:
                    os.write(self.kick_out, ONE)
                except OSError:
                    pass  # it is set already, or has nobody left to wake
                return
        if not self.closed:
            # What is left over when the socket is full need not be seen to: that has woken the receiver.
            self._put(_WAKE_UP)
            self.flush(block=False)

    def set_wakeup_fd(self, fd: int, listens: bool) -> None:
        """Wake the receiver by a descriptor from now on; it is the link's."""
        with self._kick:
            if self.closed or self.kick_out >= 0:
                os.close(fd)
            else:
                self.kick_out, self.supports_group_wakeup = fd, listens

    def _write_parts(self, parts: list[Part], interrupted: Callable[[], bool], fd: int, limit: float) -> bool:
        """Write `parts`; False when the rest was queued. `_write` is held, and the outbox was empty."""
        if self.closed:
            raise LinkClosed("the link is closed")
        if fd < 0 and len(parts) == 1:
            size = len(parts[0])
            try:
                done = self._sock.send(parts[0])
            except BlockingIOError:
                done = 0
            except OSError as error:
                raise LinkClosed(str(error)) from None
            if done == size:
                self._sent += done
                return True
        else:
            done = self._send_more(parts, fd)
        self._sent += done
        failures = 0
        while True:
            kept, stopped = False, None
            try:
                if not (rest := skip(parts, done)):
                    return True
                if not self._wait_writable(limit):
                    self._stuck_at = self._sent
                    kept = self._queued + sum(map(len, rest)) <= most_queued() and self._keep(
                        rest, -1 if done else fd
                    )
                    limit = math.inf
                if not kept and interrupted():
                    if not done:
                        raise SendInterrupted
                    stopped = SendInterrupted(begun=True)
                    # No memory to keep the rest: a frame that has begun must end all the same.
                    kept = self._keep(rest, -1)
                if not kept:
                    sent = self._send_more(rest, -1 if done else fd)
                    done += sent
                    self._sent += sent
            except SendInterrupted:
                raise
            except Exception as error:
                failures += 1
                if not done:
                    raise
                if isinstance(error, LinkClosed) or failures > _TRIES:
                    self.shut()  # or the next frame would be taken for the rest of this one
                    raise LinkClosed(str(error)) from None
            if kept:
                if stopped is None:
                    return False
                try:
                    raise stopped
                finally:
                    del stopped  # else error, traceback and this frame would be a circle

    def _send_more(self, rest: list[Part], fd: int) -> int:
        """Write what the socket takes now, with a descriptor if there is one; returns the bytes."""
        try:
            return self._send_first(rest[0], fd) if fd >= 0 else self._sock.sendmsg(rest[:_IOV_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkClosed(str(error)) from None

    def _send_first(self, first: Part, fd: int) -> int:
        """Write the beginning of a frame with a descriptor."""
        return self._sock.sendmsg([first], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])

    def _keep(self, rest: list[Part], fd: int) -> bool:
        """Put the rest of a frame at the head of the outbox, with a descriptor; `_write` is held."""
        try:
            copy = with_descriptor(b"".join(rest), fd)  # the caller's arrays are his again
        except (MemoryError, OSError):
            return False
        size = len(copy)
        self._behind = True
        self._outbox.appendleft(copy)
        self._queued += size
        return True

    def _wait_writable(self, limit: float = math.inf) -> bool:
        """Wait a little for room to write; False when there was none for `limit` seconds.

        Raises
        ------
        LinkClosed
            The link is closed.
        """
        found = False
        if limit and not self.closed:
            poller = select.poll()
            poller.register(self.fd, select.POLLOUT)
            found = bool(poller.poll(min(0.05, limit) * 1000))
        if self.closed:
            raise LinkClosed("the link was closed while a frame was being written")
        return found or limit == math.inf

    def post(self, parts: Iterable[Part]) -> bool:
        """Write without ever blocking; what is left over waits in the outbox.

        Returns
        -------
        bool
            False when the caller must see to it that :meth:`flush` is called, from a
            thread that may block.
        """
        whole = b"".join(parts)
        if not self.try_ring_one(whole):
            self._put(whole)
        try:
            if self.flush(block=False):
                return True
        except Exception:
            pass  # it is queued
        if not self._outbox or self._asked:
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
                left = not self._drain(math.inf if block else 0.0)
            except LinkClosed:
                return True
            finally:
                self._write.release()
            if left and not block:
                return False
        return True

    def _drain(self, limit: float, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Write the outbox; False when nothing was taken for `limit` seconds. `_write` is held."""
        while self._outbox:
            first = self._outbox[0]
            fd = first.fd if type(first) is PartWithDescriptor else -1
            part = memoryview(first)
            size = len(part)
            try:
                sent = self._sock.send(part) if fd < 0 else self._send_first(part, fd)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._clear()
                raise LinkClosed(str(error)) from None
            self._sent += sent
            self._queued -= sent
            if sent == size:
                del self._outbox[0]
                continue
            if sent:
                self._outbox[0] = part[sent:]  # the descriptor has gone
            if not self._wait_writable(limit):
                if limit:
                    self._stuck_at = self._sent
                return False
            if interrupted():
                raise SendInterrupted
        self._behind = False
        return True

    def _clear(self) -> None:
        """Drop the outbox; the link has ended."""
        self._outbox.clear()
        self._queued = 0

    # ------------------------------------------------------------------ end

    def shut(self) -> None:
        """End the link in both directions; the descriptor stays until :meth:`close`."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Give the descriptor back without ending the link; in a forked child."""
        self.closed = True
        self._clear()
        self._forget_mail()
        with contextlib.suppress(OSError):
            self._sock.detach()
        with contextlib.suppress(OSError):
            self.connection.close()

    def _forget_mail(self) -> None:
        self.ring_in = self.ring_out = None
        fd, self.kick_out = self.kick_out, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """End the link and give the descriptor back.

        The caller makes sure that no thread reads the link any more, and that its descriptor is in no poller.
        """
        self.shut()
        self.drop_input()  # blocks, whose ends are noted: not while a lock is held
        with self._write, self._kick:  # a sender may still be in a system call with the descriptor
            self._clear()
            self._forget_mail()
            with contextlib.suppress(OSError):
                self._sock.detach()
            with contextlib.suppress(OSError):
                self.connection.close()
            while self._fds:
                if (fd := self._fds.popleft()) >= 0:
                    os.close(fd)
        with self.gate:
            for turn in self.at_gate.values():
                turn.notify()
