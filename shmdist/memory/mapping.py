"""What the system offers of memory: unnamed memory, mappings, advice. Only this file uses memfd and mmap.

A piece of memory is a file without a name. On Linux it is a memfd; elsewhere a POSIX shared memory
object whose name is removed the moment it has been made.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

PAGE = mmap.PAGESIZE
LINUX = sys.platform == "linux"
DONTNEED, REMOVE, POPULATE_READ, POPULATE_WRITE = 4, 9, 22, 23  # Linux: advice to the system about pages


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


def unnamed_memory(name: str = "shmdist") -> int:
    """Return the descriptor of new shared memory that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    import _posixshmem  # type: ignore[import-not-found]  # the C half of multiprocessing.shared_memory
    import secrets

    path = f"/{name}-{secrets.token_hex(8)}"
    fd: int = _posixshmem.shm_open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    _posixshmem.shm_unlink(path)
    return fd


def reserve_pages(fd: int, offset: int, size: int) -> None:
    """Have the system keep these pages for the file.

    Raises
    ------
    OSError
        It has not so many.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, offset, size)


def map_file(fd: int, size: int) -> mmap.mmap:
    """Map a file, shared; it is unmapped when no view of it is left."""
    return mmap.mmap(fd, size)


def map_file_privately(fd: int, size: int, offset: int) -> mmap.mmap:
    """Map a part of a file such that what is written stays here; the object keeps a descriptor."""
    access = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=access, offset=offset)


_library: Any = None


def libc() -> Any:
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


def map_at(address: int, size: int, fd: int, offset: int, *, shared: bool = False) -> int:
    """Map a part of a file, privately or not; at `address`, over what is there, unless it is 0."""
    import ctypes

    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | (_MAP_FIXED if address else 0)
    found = libc().mmap(address or None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


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
        if LINUX:
            import ctypes

            self._base = map_at(0, size, fd, 0, shared=True)
            self.view = memoryview((ctypes.c_ubyte * size).from_address(self._base)).cast("B")
        else:
            self.view = memoryview(mmap.mmap(fd, size))

    def __del__(self) -> None:
        try:
            if self._base:
                libc().munmap(self._base, self._size)
        except Exception:
            pass  # made by halves, or the program is at its end and its modules are gone
