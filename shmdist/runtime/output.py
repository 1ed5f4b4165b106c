"""What workers print: read from their pipes, cut into lines, shown on process 1."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque

_CHUNK = 1 << 16
_TAIL = 50  # lines of stderr kept for the error that tells of a worker's death
_LONGEST = 1 << 20  # bytes after which a line is shown though it has not ended


class _Pipe:
    """One pipe of one worker."""

    __slots__ = ("error", "fd", "pid", "rest", "tail")

    def __init__(self, fd: int, pid: int, error: bool, tail: deque[str]) -> None:
        self.fd = fd
        self.pid = pid
        self.error = error
        self.rest = b""
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
        self._showing = threading.RLock()  # guards the order in which lines are shown

    def add(self, fd: int, pid: int, *, error: bool, rest: bytes = b"") -> None:
        """Take a worker's pipe over; `rest` was read from it before."""
        os.set_blocking(fd, False)
        tail = self._tails.setdefault(pid, deque(maxlen=_TAIL))
        pipe = self._pipes[fd] = _Pipe(fd, pid, error, tail)
        self._cut(pipe, rest)

    def read(self, fd: int) -> bool:
        """Read what has come by a pipe; False at its end."""
        pipe = self._pipes.get(fd)
        if pipe is None:
            return False
        while True:
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                data = b""
            if not data:
                if pipe.rest:
                    self._line(pipe, pipe.rest)
                    pipe.rest = b""
                return False
            self._cut(pipe, data)
            if len(data) < _CHUNK:
                return True

    def _cut(self, pipe: _Pipe, data: bytes) -> None:
        *lines, rest = (pipe.rest + data).split(b"\n")
        for line in lines:
            self._line(pipe, line)
        if len(rest) > _LONGEST:
            self._line(pipe, rest)
            rest = b""
        pipe.rest = rest

    def _line(self, pipe: _Pipe, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if pipe.error:
            pipe.tail.append(text)
        self.lines.append((pipe.pid, text))

    def show(self) -> None:
        """Write the lines that have come through ``sys.stdout``; never raises an Exception."""
        with self._showing:
            while self.lines:
                try:
                    pid, text = self.lines.popleft()
                except IndexError:
                    return
                out = sys.stdout
                with contextlib.suppress(Exception):
                    out.write(f"      From worker {pid}:\t{text}\n")
                    if not self.lines:
                        out.flush()

    def tail(self, pid: int) -> list[str]:
        """Return the last lines that a worker wrote to its stderr."""
        return list(self._tails.get(pid, ()))

    def drain(self, pid: int) -> None:
        """Read what a worker that has died left in its pipes."""
        for fd, pipe in list(self._pipes.items()):
            if pipe.pid == pid:
                self.read(fd)

    def fds(self, pid: int) -> list[int]:
        """Return the descriptors of a worker's pipes."""
        return [fd for fd, pipe in list(self._pipes.items()) if pipe.pid == pid]

    def close(self, fd: int) -> None:
        """Close a pipe; it is in no poller any more."""
        if self._pipes.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forget(self, pid: int) -> None:
        """Forget the last lines of a worker that is gone."""
        self._tails.pop(pid, None)

    def abandon(self) -> None:
        """Close every pipe, in a forked child."""
        for fd in list(self._pipes):
            self.close(fd)
