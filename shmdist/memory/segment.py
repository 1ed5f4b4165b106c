"""The one file that touches memfd and mmap."""

from __future__ import annotations

import mmap
import os
from typing import Any

_SIZE = 4096
SLOTS = _SIZE // 16


class Page:
    """A page of memory on which a worker notes how far it is, and which outlives it.

    Process 1 makes it and hands the descriptor down when it starts the worker; it has no
    name, so nothing can be left behind. A note is one aligned 8-byte store, so it costs
    nothing next to a message, and ``kill -9`` leaves it whole.

    Slot `s` holds two numbers: which call, and which of its elements.
    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("shmdist-page", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        #: The numbers: ``numbers[2 * slot]`` and ``numbers[2 * slot + 1]``.
        self.numbers = memoryview(self._map).cast("Q")

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def copy(self) -> dict[int, int]:
        """Return what was noted: element by call."""
        numbers = self.numbers
        return {numbers[2 * slot]: numbers[2 * slot + 1] for slot in range(SLOTS) if numbers[2 * slot]}

    def close(self) -> None:
        """Give everything back."""
        self.close_fd()
        self.numbers.release()
        self._map.close()


def make_page() -> Any:
    """Return a page, or None where the system has no unnamed memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return Page()
    except OSError:
        return None
