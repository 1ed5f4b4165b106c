"""What waits in a link's outbox: parts of frames, some of which a descriptor goes with."""

from __future__ import annotations

import functools
import os

from shmdist._ending import Ending
from shmdist.memory.limits import total_memory

Part = bytes | bytearray | memoryview


@functools.cache
def most_queued() -> int:
    """Return how many bytes may wait for one process that does not read."""
    return min(256 << 20, total_memory() // 8)


class PartWithDescriptor(bytes):
    """A part with whose first byte a copy of a descriptor goes; that is closed when the part ends."""

    fd: int
    _closing: Ending


def with_descriptor(part: bytes, fd: int) -> bytes:
    """Return `part` with a copy of descriptor `fd`; as it is where `fd` is -1.

    Raises
    ------
    OSError, MemoryError
        There is none to be had.
    """
    if fd >= 0:
        part = PartWithDescriptor(part)
        part.fd = os.dup(fd)
        part._closing = Ending(functools.partial(os.close, part.fd))
    return part


def skip(parts: list[Part], count: int) -> list[Part]:
    """Return `parts` without their first `count` bytes."""
    index = 0
    for index, part in enumerate(parts):  # noqa: B007 - used after the loop
        size = len(part)
        if count < size:
            break
        count -= size
    else:
        return []
    rest = parts[index:]
    if count:
        rest[0] = memoryview(rest[0])[count:]
    return [part for part in rest if len(part)]


__all__ = ["Part", "PartWithDescriptor", "most_queued", "skip", "with_descriptor"]
