"""A frame of which the rest is still to come."""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from shmdist.wire.messages import BROKEN, HAS_REFS, IN_BLOCK, TOKEN, Frame, Kind

_COPY = int(Kind.COPY)
_MOST = 1 << 24  # buffers of a frame: many more than anybody sends, and still a table that fits
_NUMPY_FROM = 1 << 16  # bytes from which numpy's uncleared memory is worth asking for
_SCRATCH = memoryview(bytearray(1 << 16))  # where bytes go that nobody will see


def allocate(nbytes: int) -> Any:
    """Return fresh writable memory of `nbytes` bytes, not cleared where that is cheaper."""
    if nbytes >= _NUMPY_FROM:
        numpy = sys.modules.get("numpy")
        empty = getattr(numpy, "empty", None)  # numpy may be half imported by another thread
        if empty is not None:
            return memoryview(empty(nbytes, "B"))
    return bytearray(nbytes)


class Incoming:
    """A frame of which the rest is still to come: header, and memory being filled.

    `room` returns the memory for a buffer of a copy, given the frame's number and a size.

    Memory that cannot be had for a section makes the frame a broken one: its bytes are
    read past, what came of it is let go, and who waits for it is told.  Of a broken frame
    only the references are kept, so that they can be given back.
    """

    __slots__ = ("broken", "frame", "offset", "refs", "room", "sections", "table", "target", "todo", "tokens")

    def __init__(self, header: tuple[int, ...], room: Callable[[int, int], Any]) -> None:
        kind, flags, _, lane, nbuf, call_id, body_len = header
        if nbuf > _MOST:
            raise OSError("a frame has more buffers than make sense")
        self.frame = Frame(kind, flags, lane, call_id, b"", [])
        self.broken = False
        self.room: Callable[[int], Any] = partial(room, call_id) if kind == _COPY else allocate
        self.sections: list[Any] = []  # body and buffers, as far as they are begun
        self.refs = 1 if flags & HAS_REFS else -1  # index of the section that holds the references
        self.tokens: list[int] = []  # indices of the sections that are tokens
        self.todo = deque([body_len])  # sizes of the sections after the current one
        self.offset = 0
        self.table = bool(nbuf)  # the current section is the table of lengths
        self.target: Any = memoryview(bytearray(nbuf * 8)) if nbuf else self._next()

    def _next(self) -> Any:
        """Make room for the next section."""
        size = self.todo.popleft()
        self.offset = 0
        index = len(self.sections)
        memory: Any = None
        if not self.broken or index == self.refs or index in self.tokens:
            try:
                memory = self.room(size) if index else allocate(size)
            except (MemoryError, ValueError, OverflowError):
                self.broken = True
                kept = {self.refs, *self.tokens}
                self.sections = [part if at in kept else None for at, part in enumerate(self.sections)]
        self.sections.append(memory)
        return _Hole(size) if memory is None else memoryview(memory)

    def advance(self, count: int) -> bool:
        """Note that `count` bytes came; True when the frame is complete.

        Raises
        ------
        OSError
            The table of lengths makes no sense.
        """
        self.offset += count
        while self.offset == len(self.target):
            if self.table:
                self.table = False
                sizes = struct.unpack(f"<{len(self.target) // 8}Q", self.target)
                self.tokens = [index for index, size in enumerate(sizes, 1) if size & IN_BLOCK]
                self.todo.extend(size & ~IN_BLOCK for size in sizes)
                if max(self.todo) > sys.maxsize:
                    raise OSError("a buffer of a frame is longer than any memory")
                if any(sizes[index - 1] & ~IN_BLOCK != TOKEN.size for index in self.tokens):
                    raise OSError("a token of a frame has the wrong length")
            if not self.todo:
                return True
            self.target = self._next()
        return False

    def finish(self, adopt: Callable[[Any], Any]) -> Frame:
        """Return the complete frame; `adopt` makes a hold of each token."""
        frame = self.frame
        for index in self.tokens:
            try:
                self.sections[index] = adopt(self.sections[index])
            except LookupError:
                self.broken = True
        if not self.broken:
            frame.body = self.sections[0]
            frame.buffers = self.sections[1:]
            return frame
        frame.flags |= BROKEN
        if 0 < self.refs < len(self.sections) and self.sections[self.refs] is not None:
            frame.buffers = [self.sections[self.refs]]
        else:
            frame.flags &= ~HAS_REFS
        return frame


class _Hole:
    """Stands for memory that could not be had: as long as it, and forgets all."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        return _SCRATCH[: self._size - part.start]
