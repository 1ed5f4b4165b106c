"""Segments of shared memory.

A segment is memory without a name (``memory.mapping``). Other processes get it as a
descriptor over a link, so that nothing can be left behind, whoever is killed when, and
``/dev/shm`` may be as small as it likes.

Pages are reserved before they are written. Writing to a page that cannot be had is the end
of a process (SIGBUS); reserving it is an ``OSError``. And before that, the system is asked what
it has: a memfd has no limit, and the system would rather kill some process than refuse one page.

A mapping is never unmapped while anything looks into it: it is an object, which every view
holds, and ends with the last of them. So there is no ``close`` to call too early.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from shmdist.memory.limits import address_space, available_memory
from shmdist.memory.mapping import (
    LINUX,
    PAGE,
    POPULATE_WRITE,
    REMOVE,
    libc,
    map_at,
    map_file,
    reserve_pages,
    unnamed_memory,
    whole_pages,
)
from shmdist.memory.private_mappings import MappingCache, PrivateView

_TWO_THREADS_BYTES = 16 << 20  # from which on two threads copy
_COPY_BYTES = 4 << 20  # that one of them copies at a time
_SPARE = 16  # the system keeps one part in so many of the memory it has
_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Segment:
    """Shared memory, mapped into this process.

    Parameters
    ----------
    owner, number : int
        Which process made it, and its number there: what others know it by.
    size : int
        Bytes, a multiple of the page size.
    fd : int
        Its descriptor, owned by the segment from now on; after an error it is the caller's still.

    Attributes
    ----------
    view : memoryview
        The memory. Views of views keep the mapping.
    """

    def __init__(self, owner: int, number: int, size: int, fd: int) -> None:
        self.owner = owner
        self.number = number
        self.size = size
        self.fd = -1
        self._array: Any = None
        self._address = 0
        self.spares = MappingCache()
        if size > address_space() // 2:  # the program will want some for itself
            raise OSError(errno.ENOMEM, "there is little address space left")
        self._map = map_file(fd, size)
        self.view = memoryview(self._map)
        self.fd = fd

    @classmethod
    def make(cls, owner: int, number: int, size: int, reserved: int | None = None) -> Segment:
        """Make a segment all of whose pages are reserved, or as many bytes of them as is said.

        Raises
        ------
        OSError
            There is not so much memory, or a limit of this process or its group forbids it.
        """
        fd = unnamed_memory()
        try:
            reserved = size if reserved is None else reserved
            _ask_for(reserved)
            os.ftruncate(fd, size)
            reserve_pages(fd, 0, reserved)
            return cls(owner, number, size, fd)
        except BaseException:
            os.close(fd)
            raise

    def __repr__(self) -> str:
        return f"<Segment {self.number} of process {self.owner}, {self.size >> 10} KiB, fd {self.fd}>"

    def __del__(self) -> None:
        # A mapping that something still looks into stays; it needs no descriptor.
        try:
            self.close_fd()
        except Exception:
            pass  # made by halves, or the program is at its end and its modules are gone

    def close_fd(self) -> None:
        """Close the descriptor; the mapping ends with its last view."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def array(self) -> Any:
        """The memory as a numpy array of bytes."""
        if self._array is None:
            import numpy

            self._array = numpy.frombuffer(self._map, "B")
        return self._array

    @property
    def address(self) -> int:
        """Where the mapping begins in this process."""
        if not self._address:
            import ctypes

            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        return self._address

    def write(self, offset: int, source: Any, start: Callable[[Callable[[], None]], None]) -> None:
        """Copy contiguous bytes into the segment; other threads run meanwhile when they are many.

        `start` runs a job on another thread: of very many bytes it may copy a part.
        """
        nbytes = len(source)
        numpy = sys.modules.get("numpy")
        if numpy is None or nbytes < 1 << 16 or not hasattr(numpy, "copyto"):
            self.view[offset : offset + nbytes] = source
            return
        target = self.array[offset : offset + nbytes]
        bytes_ = numpy.frombuffer(source, "B")
        if nbytes < _TWO_THREADS_BYTES or _CPUS < 2:
            numpy.copyto(target, bytes_)
        else:
            _copy_together(target, bytes_, start)

    def reserve(self, offset: int, size: int) -> None:
        """Reserve pages that were given back.

        Raises
        ------
        OSError
            There is not so much memory.
        """
        _ask_for(size)
        reserve_pages(self.fd, offset, size)

    def touch(self, offset: int, size: int) -> None:
        """Have reserved pages mapped now, so that the first copy need not do it page by page."""
        self._advise(offset, size, POPULATE_WRITE)  # an old kernel refuses: then the first copy does it

    def give_back(self, offset: int, size: int) -> None:
        """Give pages back to the system; they must be reserved before they are used again."""
        self._advise(offset, size, REMOVE)

    def _advise(self, offset: int, size: int, advice: int) -> None:
        """Advise the system. Not by the module mmap, which keeps the interpreter to itself meanwhile."""
        if LINUX:
            libc().madvise(self.address + offset, size, advice)

    def private(self, offset: int, nbytes: int) -> PrivateView:
        """Map a part such that what is written there stays this mapping's own; `spares` takes it back.

        Raises
        ------
        OSError
            There is no room for the mapping.
        """
        start = offset // PAGE * PAGE
        return self.spares.take(start, whole_pages(offset + nbytes - start), self._map_privately)

    def tidy_spares(self) -> None:
        """Make the private mappings that are not in use ready for the next arrays; in a quiet moment."""
        self.spares.tidy(self._map_privately)

    def _map_privately(self, start: int, size: int) -> PrivateView:
        return PrivateView(self.fd, start, size)

    def part(self, offset: int, nbytes: int, *, shared: bool) -> None:
        """Map whole pages of the segment anew in their place, shared, or such that writes stay here.

        Raises
        ------
        OSError
            The system refuses.
        """
        start = offset // PAGE * PAGE
        size = whole_pages(offset + nbytes - start)
        map_at(self.address + start, size, self.fd, start, shared=shared)


def _ask_for(size: int) -> None:
    """Raise the error that says that there is not so much memory, and some to spare."""
    available = available_memory()
    if size > available - min(available // _SPARE, 1 << 30):
        raise OSError(errno.ENOMEM, f"{size} bytes are asked for, and {available} are there")


def _copy_together(target: Any, source: Any, start: Callable[[Callable[[], None]], None]) -> None:
    """Copy an array of bytes, with the help of another thread if one comes in time."""
    import numpy

    pieces = -(-len(source) // _COPY_BYTES)
    numbers = itertools.count()  # of pieces; next() is one atomic step
    helping: list[bool] = []
    helped = threading.Lock()
    helped.acquire()

    def work() -> None:
        while (number := next(numbers)) < pieces:
            part = slice(number * _COPY_BYTES, (number + 1) * _COPY_BYTES)
            numpy.copyto(target[part], source[part])

    def help_out() -> None:
        helping.append(True)
        try:
            work()
        finally:
            helped.release()

    with contextlib.suppress(RuntimeError):  # no thread can be had: then alone
        start(help_out)
    work()
    # A helper that comes only now finds no piece left.
    if helping:
        helped.acquire()
