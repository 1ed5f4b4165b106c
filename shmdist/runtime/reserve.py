"""Memory and descriptors kept back for reporting an error when there are no others."""

from __future__ import annotations

import os

_BYTES = 1 << 20  # as much as the interpreter asks the system for at once
_DESCRIPTORS = 4  # for the files that are read to show an error's lines, and a module


class Reserve:
    """Memory and descriptors that are given up when there are none, so that the error can be told.

    Neither costs anything while it is kept: nothing is ever written to the memory.
    """

    def __init__(self) -> None:
        self._memory: bytearray | None = None
        self._fds: list[int] = []
        self.fill()

    @property
    def descriptors(self) -> int:
        """How many descriptors are kept."""
        return len(self._fds)

    def open(self) -> None:
        """Give all of it up; :meth:`fill` is to follow when the error has been told."""
        self._memory = None
        while self._fds:
            try:
                os.close(self._fds.pop())
            except (IndexError, OSError):
                pass  # another thread was faster, or a function has closed what is not its own

    def fill(self) -> None:
        """Keep back what can be had."""
        try:
            if self._memory is None:
                self._memory = bytearray(_BYTES)
            while len(self._fds) < _DESCRIPTORS:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except (OSError, MemoryError):
            pass  # the next time
