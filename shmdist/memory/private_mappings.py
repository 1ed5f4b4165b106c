"""Private mappings of parts of a segment, and a cache of them for the next array at the same place.

Mapping the pages of a large part once more would take longer than a copy of them. To forget what
an array's user wrote, all the page table must be gone through, which takes a fifth of a copy. So
that is left to a quiet moment; when it could not wait, as many mappings more are made ready in the
next quiet moment as were short.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from shmdist.memory.mapping import DONTNEED, LINUX, PAGE, POPULATE_READ, libc, map_at, map_file_privately

Part = tuple[int, int]  # where it begins in the segment, and its size

_MIN_KEPT_BYTES = 1 << 20  # of a mapping from which on it is kept
_MOST = 8  # mappings of a segment that are kept


class PrivateView:
    """A mapping of a part of a segment that keeps what is written there to itself.

    Pages that were not written show what is in the segment, also what is written there later.
    The C library is called directly where it can be: the module ``mmap`` keeps a descriptor
    open for each mapping, and there may be thousands of these.

    Parameters
    ----------
    fd : int
        The segment's.
    start, size : int
        The part; bytes, multiples of the page size.
    """

    can_be_cleaned = LINUX

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.start = start
        self.size = size
        self._base = 0
        self._kept: Any = None
        if LINUX:
            self._base = map_at(0, size, fd, start)
            self.address = self._base
        else:
            import numpy

            self._kept = map_file_privately(fd, size, start)
            self.address = numpy.frombuffer(self._kept, "B").__array_interface__["data"][0]

    def __del__(self) -> None:
        try:
            if self._base:
                libc().munmap(self._base, self.size)
        except Exception:
            pass  # made by halves, or the program is at its end and its modules are gone

    def clean(self) -> None:
        """Forget what was written here, so that the segment's own bytes are seen again."""
        try:
            runs = _written(self._base, self.size)
        except OSError:
            runs = [(0, self.size)]
        for start, size in runs:
            libc().madvise(self._base + start, size, DONTNEED)

    def populate(self) -> None:
        """Have the pages mapped now, so that the first user need not do it page by page."""
        if self._base:
            libc().madvise(self._base, self.size, POPULATE_READ)


def _written(address: int, size: int) -> list[tuple[int, int]]:
    """Return offset and size of the parts of a private mapping that were written.

    The system tells of each page whether it is the file's (bit 61) or was made for this mapping.
    """
    import numpy

    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = numpy.frombuffer(os.pread(fd, size // PAGE * 8, address // PAGE * 8), "u8") >> 61
    finally:
        os.close(fd)
    if len(pages) < size // PAGE:
        raise OSError("the page map is shorter than the mapping")
    # Bits 62 and 63 of the entry: the page is swapped out, is in memory.
    own = numpy.flatnonzero((pages > 1) & (pages & 1 == 0))
    if not len(own):
        return []
    breaks = numpy.flatnonzero(numpy.diff(own) > 1)
    firsts = own[numpy.concatenate(([0], breaks + 1))]
    lasts = own[numpy.concatenate((breaks, [len(own) - 1]))]
    return [
        (int(first) * PAGE, int(last - first + 1) * PAGE) for first, last in zip(firsts, lasts, strict=True)
    ]


class MappingCache:
    """The private mappings of a segment that are not in use.

    ``make(start, size)`` maps a part. It is the segment's, and given each time: kept here, it
    would keep the segment until the next garbage collection.
    """

    def __init__(self) -> None:
        self._used: deque[PrivateView] = deque()  # as their users left them; anybody may append
        self._lock = threading.Lock()  # guards all else; held while one is cleaned
        self._clean: dict[Part, list[PrivateView]] = {}
        self._short: Counter[Part] = Counter()

    def __repr__(self) -> str:
        return f"<MappingCache: {len(self)} kept, {len(self._used)} of them to be cleaned>"

    def __len__(self) -> int:
        return len(self._used) + sum(map(len, list(self._clean.values())))

    def take(self, start: int, size: int, make: Callable[[int, int], PrivateView]) -> PrivateView:
        """Return a clean mapping of a part, for an array to use.

        Raises
        ------
        OSError
            There is no room for a mapping.
        """
        part = (start, size)
        if size >= _MIN_KEPT_BYTES:
            with self._lock:
                clean = self._clean.get(part)
                if clean:
                    return clean.pop()
                for view in list(self._used):
                    if (view.start, view.size) == part:
                        self._used.remove(view)
                        view.clean()
                        self._short[part] += 1
                        return view
        return make(start, size)

    def rest(self, view: PrivateView) -> None:
        """Take a mapping back that nothing looks into any more. It never blocks."""
        if view.can_be_cleaned and view.size >= _MIN_KEPT_BYTES and len(self) < _MOST:
            self._used.append(view)

    def tidy(self, make: Callable[[int, int], PrivateView]) -> None:
        """Make what is kept ready for the next arrays; in a quiet moment."""
        while self._used:
            with self._lock:
                try:
                    view = self._used.popleft()
                except IndexError:
                    break  # it was taken meanwhile
                view.clean()
                self._clean.setdefault((view.start, view.size), []).append(view)
        while self._short:
            with self._lock:
                part, number = self._short.popitem()
            for _ in range(min(number, _MOST - len(self))):
                try:
                    view = make(*part)
                    view.populate()
                except OSError:
                    return
                with self._lock:
                    self._clean.setdefault(part, []).append(view)

    def drop(self) -> None:
        """Take down what is kept."""
        with self._lock:
            self._used.clear()
            self._clean.clear()
            self._short.clear()
