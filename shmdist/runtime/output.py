"""What workers print: read from their pipes, cut into lines, shown on process 1."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque

_CHUNK = 1 << 16  # bytes read at once
_TURN = 1 << 20  # bytes of one pipe read before the links get their turn
_TAIL = 50  # lines of stderr kept for the error that tells of a worker's death
_LONGEST = 1 << 20  # bytes after which a line is shown though it has not ended


class _Pipe:
    """One pipe of one worker."""

    __slots__ = ("error", "fd", "pid", "rest", "tail")

    def __init__(self, fd: int, pid: int, error: bool, tail: deque[str]) -> None:
        self.fd = fd
        self.pid = pid
        self.error = error
        self.rest = bytearray()  # the beginning of a line
        self.tail = tail


class Outputs:
    """The pipes of all workers, and the lines read from them that wait to be shown.

    :meth:`read` runs on the reading thread, which must not be held up by a slow terminal;
    :meth:`show` runs where the line may wait: in the thread that is about to return a
    result, or on a standby thread.
    """

    def __init__(self) -> None:
        self._pipes: dict[int, _Pipe] = {}
        self._tails: dict[int, deque[str]] = {}
        self.lines: deque[tuple[int, str]] = deque()  # worker and line; append and pop are atomic
        self._reading = threading.Lock()  # guards `_pipes`, reading from them, and their rests
        self._showing = threading.RLock()  # guards the order in which lines are shown, and `_inside`
        self._inside = False  # lines are being shown

    def add(self, fd: int, pid: int, *, error: bool, rest: bytes = b"") -> None:
        """Take a worker's pipe over; `rest` was read from it before."""
        os.set_blocking(fd, False)
        tail = self._tails.setdefault(pid, deque(maxlen=_TAIL))
        with self._reading:
            pipe = self._pipes[fd] = _Pipe(fd, pid, error, tail)
            self._cut(pipe, rest)

    def read(self, fd: int) -> bool:
        """Read what has come by a pipe; False at its end."""
        with self._reading:
            pipe = self._pipes.get(fd)
            return pipe is not None and self._read(pipe)

    def _read(self, pipe: _Pipe) -> bool:
        for _ in range(_TURN // _CHUNK):
            try:
                data = os.read(pipe.fd, _CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                data = b""
            if not data:
                self._end_line(pipe)
                return False
            self._cut(pipe, data)
            if len(data) < _CHUNK:
                return True
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
        if len(pipe.rest) > _LONGEST:
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
        self.lines.append((pipe.pid, text))

    def show(self) -> None:
        """Write the lines that have come through ``sys.stdout``; never raises an Exception."""
        with self._showing:
            if self._inside:
                return  # a stream, or a signal handler, that calls the runtime: the outer call goes on
            self._inside = True
            try:
                while self.lines:
                    # It stays in `lines` until it is written: who finds `lines` empty may go on.
                    pid, text = self.lines[0]
                    out = sys.stdout
                    with contextlib.suppress(Exception):
                        out.write(f"      From worker {pid}:\t{text}\n")
                        if len(self.lines) == 1:
                            out.flush()
                    self.lines.popleft()
            finally:
                self._inside = False

    def tail(self, pid: int) -> list[str]:
        """Return the last lines that a worker wrote to its stderr."""
        return list(self._tails.get(pid, ()))

    def drain(self, pid: int) -> None:
        """Read what a worker that has died left in its pipes."""
        with self._reading:
            for pipe in self._pipes.values():
                # Not up to the pipe's end, which may be held open by a process that it has started.
                if pipe.pid == pid:
                    self._read(pipe)
                    self._end_line(pipe)

    def fds(self, pid: int) -> list[int]:
        """Return the descriptors of a worker's pipes."""
        return [fd for fd, pipe in list(self._pipes.items()) if pipe.pid == pid]

    def close(self, fd: int) -> None:
        """Close a pipe; it is in no poller any more."""
        with self._reading:  # nobody is to read from what gets this number next
            if self._pipes.pop(fd, None) is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def forget(self, pid: int) -> None:
        """Forget the last lines of a worker that is gone."""
        self._tails.pop(pid, None)

    def abandon(self) -> None:
        """Close every pipe, in a forked child."""
        pipes, self._pipes = self._pipes, {}
        self._reading = threading.Lock()  # its holder may be a thread of the parent
        self._showing, self._inside = threading.RLock(), False
        self.lines.clear()  # the parent shows them
        for fd in pipes:
            with contextlib.suppress(OSError):
                os.close(fd)
