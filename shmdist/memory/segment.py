"""Segments of shared memory. This is the only file that uses memfd and mmap.

A segment is memory without a name. On Linux it is a memfd; elsewhere a POSIX shared memory
object whose name is removed the moment it has been made. Other processes get it as a
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
import mmap
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from shmdist.memory.limits import address_space, available_memory
from shmdist.memory.private_mappings import MappingCache

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = mmap.PAGESIZE
_PAGE_BYTES = 4096  # of a page for notes
SLOTS = _PAGE_BYTES // 16
LANES = 64  # lanes that have words of their own on a page; more of them share
BEGUN = 2 * SLOTS  # the first of these words
_SIZE = _PAGE_BYTES + 16 * LANES
_DONTNEED, _REMOVE, _POPULATE_READ, _POPULATE_WRITE = 4, 9, 22, 23  # Linux: advice to the system about pages
_LINUX = sys.platform == "linux"
_TWO_THREADS_BYTES = 16 << 20  # from which on two threads copy
_COPY_BYTES = 4 << 20  # that one of them copies at a time
_SPARE = 16  # the system keeps one part in so many of the memory it has
_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole_pages(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def try_to_map(nbytes: int) -> None:
    """See whether this process has so much address space left; touches none of it, and keeps none.

    Raises
    ------
    OSError
        It has not.
    """
    mmap.mmap(-1, nbytes).close()


class ProgressPage:
    """A page of memory on which a worker notes how far it is, and which outlives it.

    Process 1 makes it and hands the descriptor down when it starts the worker; it has no
    name, so nothing can be left behind. A note is one aligned 8-byte store, so it costs
    nothing next to a message, and ``kill -9`` leaves it whole.

    Slot `s` holds two numbers: which call, and which of its elements.

    Calls that the worker has not begun
    -----------------------------------
    Process 1 can take calls of a lane back without the worker's help, which may stand still. They lie in
    a socket or a ring segment then, and will be read one day; so both say what they do before they do it.
    After the notes come two words for each lane, numbers of calls that only grow:

    - *begun*: the worker raises it to the call that it is about to begin, *then* looks at *withdrawn*.
      It begins if its number is above that; if not, it answers that the call was not run.
    - *withdrawn*: process 1 raises it to the last call that it wants back, *then* looks at *begun*. What is
      above that is its own again. What is not, stays with the worker, whose answer tells what it did.

    Between the two steps each side has a fence, so at least one sees what the other did: no call is both
    begun and taken back. Both may see it; then the worker does not begin it, and says so. Calls of a
    lane begin in the order of their numbers, and those of lanes that share words are never begun too
    early by that, but perhaps not taken back.
    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("shmdist-page", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        #: The numbers: ``numbers[2 * slot]`` and ``numbers[2 * slot + 1]``; then the words of the lanes.
        self.numbers = memoryview(self._map).cast("Q")
        #: Indices in `numbers` of the slots that are free, the one that has been so for longest first.
        self.free = deque(range(0, 2 * SLOTS, 2))
        # Guards raising a word, which the other process never does. Its being let go of and taken again is
        # a fence on all systems of CPython.
        self._raising = threading.Lock()

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def copy(self) -> dict[int, int]:
        """Return what was noted: element by call."""
        numbers = self.numbers
        return {numbers[2 * slot]: numbers[2 * slot + 1] for slot in range(SLOTS) if numbers[2 * slot]}

    def begin(self, lane: int, call_id: int) -> bool:
        """Note that a call is about to begin; False when it has been taken back."""
        word = BEGUN + lane % LANES
        self._raise(word, call_id)
        return self.numbers[word + LANES] < call_id

    def begun(self, lane: int) -> int:
        """Return the number of a call of a lane that may have begun; none above it has."""
        return self.numbers[BEGUN + lane % LANES]

    def withdraw(self, lane: int, call_id: int) -> int:
        """Take the calls of a lane back up to `call_id`, and above the number that is returned."""
        word = BEGUN + lane % LANES
        self._raise(word + LANES, call_id)
        return self.numbers[word]

    def _raise(self, word: int, number: int) -> None:
        """Raise a word of this process's to `number`; what is read after that is read after that."""
        lock = self._raising
        lock.acquire()
        try:
            if self.numbers[word] < number:
                self.numbers[word] = number
        finally:
            lock.release()
        lock.acquire()
        lock.release()

    def close(self) -> None:
        """Give everything back; whoever uses it after that gets a ValueError."""
        self.close_fd()
        self.numbers.release()
        self._map.close()


def make_page() -> Any:
    """Return a page, or None where the system has no unnamed memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return ProgressPage()
    except OSError:
        return None


def _unnamed() -> int:
    """Return the descriptor of new shared memory that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("shmdist", os.MFD_CLOEXEC)
    import _posixshmem  # type: ignore[import-not-found]  # the C half of multiprocessing.shared_memory
    import secrets

    name = f"/shmdist-{secrets.token_hex(8)}"
    fd: int = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    _posixshmem.shm_unlink(name)
    return fd


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
        self._map = mmap.mmap(fd, size)
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
        fd = _unnamed()
        try:
            reserved = size if reserved is None else reserved
            _ask_for(reserved)
            os.ftruncate(fd, size)
            _reserve(fd, 0, reserved)
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
        _reserve(self.fd, offset, size)

    def touch(self, offset: int, size: int) -> None:
        """Have reserved pages mapped now, so that the first copy need not do it page by page."""
        self._advise(offset, size, _POPULATE_WRITE)  # an old kernel refuses: then the first copy does it

    def give_back(self, offset: int, size: int) -> None:
        """Give pages back to the system; they must be reserved before they are used again."""
        self._advise(offset, size, _REMOVE)

    def _advise(self, offset: int, size: int, advice: int) -> None:
        """Advise the system. Not by the module mmap, which keeps the interpreter to itself meanwhile."""
        if _LINUX:
            _libc().madvise(self.address + offset, size, advice)

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
        _map_at(self.address + start, size, self.fd, start, shared=shared)


def _ask_for(size: int) -> None:
    """Raise the error that says that there is not so much memory, and some to spare."""
    available = available_memory()
    if size > available - min(available // _SPARE, 1 << 30):
        raise OSError(errno.ENOMEM, f"{size} bytes are asked for, and {available} are there")


def _reserve(fd: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, size)


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

    can_be_cleaned = _LINUX

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.start = start
        self.size = size
        self._base = 0
        self._kept: Any = None
        if _LINUX:
            self._base = _map_at(0, size, fd, start)
            self.address = self._base
        else:
            import numpy

            access = mmap.PROT_READ | mmap.PROT_WRITE
            self._kept = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=access, offset=start)
            self.address = numpy.frombuffer(self._kept, "B").__array_interface__["data"][0]

    def __del__(self) -> None:
        try:
            if self._base:
                _libc().munmap(self._base, self.size)
        except Exception:
            pass  # made by halves, or the program is at its end and its modules are gone

    def clean(self) -> None:
        """Forget what was written here, so that the segment's own bytes are seen again."""
        try:
            runs = _written(self._base, self.size)
        except OSError:
            runs = [(0, self.size)]
        for start, size in runs:
            _libc().madvise(self._base + start, size, _DONTNEED)

    def populate(self) -> None:
        """Have the pages mapped now, so that the first user need not do it page by page."""
        if self._base:
            _libc().madvise(self._base, self.size, _POPULATE_READ)


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


class Window:
    """Memory of another process, mapped for as long as this object lives; it keeps no descriptor.

    Parameters
    ----------
    fd : int
        Its descriptor, which stays the caller's.
    size : int
        Bytes, a multiple of the page size.

    Attributes
    ----------
    view : memoryview
        The memory. It must not be used when the window is gone.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._size = size
        self._base = 0
        if _LINUX:
            import ctypes

            self._base = _map_at(0, size, fd, 0, shared=True)
            self.view = memoryview((ctypes.c_ubyte * size).from_address(self._base)).cast("B")
        else:
            self.view = memoryview(mmap.mmap(fd, size))

    def __del__(self) -> None:
        try:
            if self._base:
                _libc().munmap(self._base, self._size)
        except Exception:
            pass  # made by halves, or the program is at its end and its modules are gone


_library: Any = None


def _libc() -> Any:
    """Return the C library's mapping functions."""
    global _library
    if _library is None:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        _library = library
    return _library


_MAP_FIXED = 0x10
_FAILED = (1 << (8 * (8 if sys.maxsize > 2**32 else 4))) - 1


def _map_at(address: int, size: int, fd: int, offset: int, *, shared: bool = False) -> int:
    """Map a part of a file, privately or not; at `address`, over what is there, unless it is 0."""
    import ctypes

    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | (_MAP_FIXED if address else 0)
    found = _libc().mmap(address or None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)
