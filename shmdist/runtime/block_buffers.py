"""Buffers of a payload in blocks: stand-ins for those that lie in one already, and writing into one."""

from __future__ import annotations

from typing import Any

from shmdist.memory.leases import Lease, LeaseHandle
from shmdist.memory.segment import Segment
from shmdist.serialization.arrays import StridedSource


class ReturningBuffer:
    """A buffer of a result that lies in a block of the caller: stands for it without holding it."""

    __slots__ = ("lease", "nbytes", "offset")

    def __init__(self, lease: Lease, offset: int, nbytes: int) -> None:
        self.lease = lease
        self.offset = offset
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes


class Kept(StridedSource):
    """A buffer that was copied into a block of this process before it is known who gets it."""

    __slots__ = ("hold",)

    def __init__(self, hold: LeaseHandle) -> None:
        self.hold = hold
        self.nbytes = len(hold)

    def bytes(self) -> Any:
        """Return the block."""
        return memoryview(self.hold.array())

    def write_to(self, target: Any) -> None:
        """Copy the block."""
        target[:] = self.hold.array()


def address_of(buffer: Any) -> int:
    """Return where a buffer lies."""
    import numpy

    address: int = numpy.frombuffer(buffer, "B").__array_interface__["data"][0]
    return address


def write_pieces(segment: Segment, offset: int, pieces: list[Any], start: Any) -> None:
    """Write pieces into a segment, one after the other."""
    for piece in pieces:
        if isinstance(piece, StridedSource):
            piece.write_to(segment.array[offset : offset + piece.nbytes])
        else:
            segment.write(offset, piece, start)
        offset += len(piece)


__all__ = ["Kept", "ReturningBuffer", "address_of", "write_pieces"]
