"""Output of workers: reads their pipes, cuts the text into lines, and writes them on a thread of its own.

A worker has two pipes, for its standard output and its standard error: two descriptors of process 1.
What comes by the first is written to ``sys.stdout``, what comes by the second to ``sys.stderr``.

Reading and writing
-------------------
The reading thread reads the pipes (:meth:`Outputs.read`) and queues whole lines. One thread at a time,
the *writer*, writes them: a job that begins with the first line queued and ends with the last one written.
No other thread writes, so that a terminal or a pager that stands still holds up this job alone.
Where the stream is a pipe, a terminal or a socket the writer first waits until the descriptor takes
more, and writes to it without any of Python's locks: who prints beside it can still be interrupted.

What is bounded
---------------
- A pipe of which `_MAX_QUEUED_BYTES` wait to be written is *paused*: no thread reads it, so that the worker's
  prints wait once its pipe is full too. It is read again when half of that is written.
- :meth:`Outputs.show` waits for what was printed before an answer came, for as long as something is written
  every `_STALL_SECONDS`. After that no thread waits (`stalled`) until something is written again.
- At the end of the program the writer gives up when nothing could be written for a second.

A text without a newline is taken for a line when an answer comes from its worker, or the pipe ends.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from math import inf
from typing import Any

from shmdist._log import Log
from shmdist.runtime.daemon_thread import DaemonThread
from shmdist.runtime.interrupts import current

_READ_BYTES = 1 << 16  # read at once
_MAX_READ_BYTES = 1 << 20  # of one pipe read before the links get their turn
_TAIL = 50  # lines of stderr kept for the error that tells of a worker's death
_MAX_LINE_BYTES = 1 << 20  # after which a line is shown though it has not ended
_MAX_QUEUED_BYTES = 1 << 18  # of one pipe that may wait to be written
_STALL_SECONDS = 0.25  # without anything written after which no answer waits for output
_WRITE_BYTES = 4096  # bytes: a pipe that takes anything takes so many (PIPE_BUF)
_PREFIX_OFF = ("0", "no", "off", "false")
_log = Log("output")

Job = Callable[[], None]


class _Pipe:
    """One pipe of one worker."""

    __slots__ = ("error", "fd", "last", "more", "paused", "pid", "rest", "tail", "taken", "waiting")

    def __init__(self, fd: int, pid: int, error: bool, tail: deque[str]) -> None:
        self.fd = fd
        self.pid = pid
        self.error = error
        self.rest = bytearray()  # the beginning of a line
        self.tail = tail
        self.last = 0  # the number of its last line
        self.taken = 0  # bytes read
        self.waiting = 0  # bytes read and not written
        self.paused = False  # it is not read, for too much waits
        self.more = False  # its last turn of reading has left something


def _run_on_a_thread(job: Job) -> None:
    DaemonThread(job, "shmdist-output").start()


def _nothing(fd: int) -> None:
    pass


class Outputs:
    """The pipes of all workers, and the lines read from them that wait to be written."""

    def __init__(self) -> None:
        self._pipes: dict[int, _Pipe] = {}
        self._tails: dict[int, deque[str]] = {}
        self.lines: deque[tuple[_Pipe, str, int]] = deque()  # pipe, line, and its number of bytes
        self.busy = False  # something was read that is not written; read without the lock
        self.stalled = False  # nothing has been written for long; no thread waits
        self._queued = self._written = 0  # lines, ever
        self._progress = 0  # how often something was written
        self._writer = 0  # the thread that writes
        self._asked = False  # a writer is on its way
        self._context: contextvars.Context | None = None  # of who waits: a notebook's cell, say
        self._patience = inf  # seconds that the writer waits for a stream
        self._start: Callable[[Job], None] | None = _run_on_a_thread
        self._pause: Callable[[int], None] = _nothing
        self._resume: Callable[[int], None] = _nothing
        # Guards all of this, the pipes, and reading from them. It is not held to wait or to write.
        # `ThreadPool` has its own, taken while this is held.
        self._changed = threading.Condition(threading.RLock())

    def __repr__(self) -> str:
        state = "stalled" if self.stalled else "writing" if self._writer else "idle"
        return f"<Outputs of {len(self._pipes)} pipes, {self._queued - self._written} lines wait, {state}>"

    def attach(
        self, start: Callable[[Job], None], pause: Callable[[int], None], resume: Callable[[int], None]
    ) -> None:
        """Take over what runs a job on another thread, stops the reading of a pipe, and lets it go on."""
        self._start, self._pause, self._resume = start, pause, resume

    # ------------------------------------------------------------------ reading

    def add(self, fd: int, pid: int, *, error: bool, rest: bytes = b"") -> None:
        """Take a worker's pipe over; `rest` was read from it before."""
        os.set_blocking(fd, False)
        tail = self._tails.setdefault(pid, deque(maxlen=_TAIL))
        with self._changed:
            pipe = self._pipes[fd] = _Pipe(fd, pid, error, tail)
            self._cut(pipe, rest)
            self._look()

    def read(self, fd: int) -> bool:
        """Read what has come by a pipe; at its end it is closed, and this returns False."""
        with self._changed:
            pipe = self._pipes.get(fd)
            if pipe is None:
                return False
            alive = self._read(pipe, _MAX_QUEUED_BYTES)
            if alive and pipe.waiting > _MAX_QUEUED_BYTES and not pipe.paused:
                pipe.paused = True
                self._pause(fd)
            self._look()
            if not alive:
                self.close(fd)  # here and now: once closed by another thread, the number may be a new pipe's
            return alive

    def _read(self, pipe: _Pipe, budget: float) -> bool:
        pipe.more = False
        for _ in range(_MAX_READ_BYTES // _READ_BYTES):
            try:
                data = os.read(pipe.fd, _READ_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                data = b""
            if not data:
                self._end_line(pipe)
                return False
            pipe.taken += len(data)
            self._cut(pipe, data)
            if len(data) < _READ_BYTES:
                return True
            if pipe.waiting > budget:
                break
        pipe.more = True
        return True

    def _cut(self, pipe: _Pipe, data: bytes) -> None:
        # Only what is new is looked through: a line may grow dot by dot.
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            pipe.rest += whole
            for line in pipe.rest.split(b"\n"):
                self._line(pipe, line)
            pipe.rest.clear()
        pipe.rest += rest
        if len(pipe.rest) > _MAX_LINE_BYTES:
            self._end_line(pipe)

    def _end_line(self, pipe: _Pipe) -> None:
        """Take what has come of a line for the whole of it."""
        if pipe.rest:
            self._line(pipe, pipe.rest)
            pipe.rest.clear()

    def _line(self, pipe: _Pipe, line: bytearray) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if pipe.error:
            pipe.tail.append(text)
        nbytes = len(line) + 1
        pipe.waiting += nbytes
        self._queued += 1
        pipe.last = self._queued
        self.lines.append((pipe, text, nbytes))

    def _look(self) -> None:
        """Have lines written, and note whether anything waits."""
        self.busy = self._queued != self._written or any(
            pipe.rest or pipe.paused or pipe.more for pipe in self._pipes.values()
        )
        if not self.lines or self._writer or self._asked or self._start is None:
            return
        self._asked = True
        try:
            self._start(self._write_all)
        except (RuntimeError, MemoryError) as error:  # no thread can be made now: the next look tries again
            self._asked = False
            _log.warning("no thread to write what workers print: %s", error)
        except BaseException:
            self._asked = False
            raise

    # ------------------------------------------------------------------ waiting for what was read

    def show(self, pids: Container[int]) -> None:
        """Wait until what these workers printed is written; see the module's docstring."""
        if self._writer == threading.get_ident():
            return  # a stream that calls the runtime
        with self._changed:
            pipes = [pipe for pipe in self._pipes.values() if pipe.pid in pids]
            left = [(pipe, pipe.taken + _available(pipe.fd)) for pipe in pipes if pipe.paused or pipe.more]
            if left and not self._await(
                lambda: all(pipe.taken >= end or not (pipe.paused or pipe.more) for pipe, end in left)
            ):
                return
            for pipe in pipes:
                if not (pipe.paused or pipe.more):
                    self._end_line(pipe)
            self._look()
            last = max([pipe.last for pipe in pipes], default=0)
            self._await(lambda: self._written >= last)

    def _await(self, reached: Callable[[], bool]) -> bool:
        """Wait while the writer gets on; False when it does not, or this thread is interrupted."""
        if reached():
            return True
        thread_state = current()
        self._context = contextvars.copy_context()
        seen, since = self._progress, time.monotonic()
        while not reached():
            if self.stalled or thread_state.has_deferred:
                return False
            if not self._writer and not self._asked:
                self._look()
            self._changed.wait(0.05)
            now = time.monotonic()
            if self._progress != seen:
                seen, since = self._progress, now
            elif now - since > _STALL_SECONDS:
                self.stalled = True
        return True

    # ------------------------------------------------------------------ writing

    def _write_all(self) -> None:
        """Write all lines; the writer's job."""
        with self._changed:
            self._asked = False
            if self._writer:
                return
            self._writer = threading.get_ident()
        try:
            while True:
                with self._changed:
                    lines = self._next()
                    context, self._context = self._context, None
                    if not lines:
                        self._writer = 0  # under the same lock as the last look: who queues one, starts anew
                        self._look()
                        self._changed.notify_all()
                        return
                error, text = lines[0][0].error, _text(lines)
                try:
                    if context is None:
                        self._write(error, text)
                    else:
                        context.run(self._write, error, text)
                except BaseException as failure:  # the program's stream: it costs the text alone
                    _log.info("what workers printed could not be written: %r", failure)
                with self._changed:
                    self._note_written(lines)
        finally:
            with self._changed:
                if self._writer == threading.get_ident():
                    self._writer = 0

    def _next(self) -> list[tuple[_Pipe, str, int]]:
        """Take the next lines of one stream."""
        taken: list[tuple[_Pipe, str, int]] = []
        room = _READ_BYTES
        while self.lines and room > 0 and self.lines[0][0].error == (taken or self.lines)[0][0].error:
            taken.append(self.lines.popleft())
            room -= taken[-1][2]
        return taken

    def _note_written(self, lines: list[tuple[_Pipe, str, int]]) -> None:
        self._note_progress()
        self._written += len(lines)
        for pipe, _, nbytes in lines:
            pipe.waiting -= nbytes
            if pipe.paused and pipe.waiting <= _MAX_QUEUED_BYTES // 2:
                pipe.paused = False
                pipe.more = True
                if self._pipes.get(pipe.fd) is pipe:
                    with contextlib.suppress(OSError, ValueError):  # its poller is closed
                        self._resume(pipe.fd)
        self._changed.notify_all()

    def _note_progress(self) -> None:
        self._progress += 1
        self.stalled = False

    def _write(self, error: bool, text: str) -> None:
        """Write to a stream of the program's."""
        stream = sys.stderr if error else sys.stdout
        if stream is None or self._patience < 0:
            return
        fd = _descriptor_that_may_block(stream)
        if fd < 0:
            _write_to(stream, text)
            return
        if not self._wait_for(fd):
            return
        stream.flush()  # what the program has printed itself stands before this
        try:
            data = text.encode(stream.encoding, stream.errors or "strict")
        except UnicodeError:
            data = text.encode(stream.encoding, "backslashreplace")
        view = memoryview(data)
        while view and self._wait_for(fd):
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(fd, view[:_WRITE_BYTES]) :]
                self._note_progress()

    def _wait_for(self, fd: int) -> bool:
        """Wait until a descriptor takes more; False when that is given up."""
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        begin = time.monotonic()
        while not poller.poll(0 if self._patience < 0 else 50):
            if time.monotonic() - begin > self._patience:
                self._patience = -1.0
            if self._patience < 0:
                return False
        return True

    # ------------------------------------------------------------------ the ends

    def tail(self, pid: int) -> list[str]:
        """Return the last lines that a worker wrote to its stderr."""
        return list(self._tails.get(pid, ()))

    def drain(self, pid: int) -> None:
        """Read what a worker that has died left in its pipes."""
        with self._changed:
            for pipe in self._pipes.values():
                # Not up to the pipe's end, which may be held open by a process that it has started.
                if pipe.pid == pid:
                    self._read(pipe, inf)
                    self._end_line(pipe)
            self._look()

    def fds(self, pid: int) -> list[int]:
        """Return the descriptors of a worker's pipes."""
        return [fd for fd, pipe in list(self._pipes.items()) if pipe.pid == pid]

    def close(self, fd: int) -> None:
        """Close a pipe, and have it read no more."""
        with self._changed:  # nobody is to read from what gets this number next
            if self._pipes.pop(fd, None) is not None:
                self._pause(fd)
                with contextlib.suppress(OSError):
                    os.close(fd)
                self._look()

    def forget(self, pid: int) -> None:
        """Forget the last lines of a worker that is gone."""
        self._tails.pop(pid, None)

    def finish(self, patience: float = 1.0) -> None:
        """Write what is left, at the end of the program; give up when nothing is taken for `patience` s."""
        with self._changed:
            self._patience = min(self._patience, patience)
            for pipe in self._pipes.values():
                self._end_line(pipe)
            mine = not self._writer
        if mine:  # late in its life, Python makes no threads any more
            self._write_all()
        with self._changed:
            seen, since = self._progress, time.monotonic()
            while self._writer and time.monotonic() - since < patience + 0.5:
                self._changed.wait(0.05)
                if self._progress != seen:
                    seen, since = self._progress, time.monotonic()
            self._start = None

    def abandon(self) -> None:
        """Close every pipe, in a forked child."""
        pipes, self._pipes = self._pipes, {}
        self._changed = threading.Condition(threading.RLock())  # its holder may be a thread of the parent
        self._start, self._writer, self.busy = None, 0, False
        self.lines.clear()  # the parent writes them
        self._written = self._queued
        for fd in pipes:
            with contextlib.suppress(OSError):
                os.close(fd)


def _text(lines: list[tuple[_Pipe, str, int]]) -> str:
    if os.environ.get("SHMDIST_PREFIX", "").lower() in _PREFIX_OFF:
        return "".join([f"{line}\n" for _, line, _ in lines])
    return "".join([f"      From worker {pipe.pid}:\t{line}\n" for pipe, line, _ in lines])


def _available(fd: int) -> int:
    """Return the number of bytes that lie in a pipe."""
    import fcntl
    import termios

    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _descriptor_that_may_block(stream: Any) -> int:
    """Return the descriptor of a plain text stream that leads to where a write may wait; else -1."""
    if type(stream) is not io.TextIOWrapper:
        return -1  # a notebook's, or a test's, or one that does more with the text
    try:
        fd: int = stream.fileno()
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError):
        return -1
    return fd if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode) else -1


def _write_to(stream: Any, text: str) -> None:
    """Write a text, also where the stream's encoding has not all of its characters."""
    try:
        stream.write(text)
    except UnicodeEncodeError as error:
        stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    stream.flush()


__all__ = ["Outputs"]
