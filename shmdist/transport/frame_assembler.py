"""Assembles a frame of which only a part has come."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from shmdist.transport.messages import BROKEN, HAS_REFS, IN_BLOCK, TOKEN, BadFrame, Frame, Kind

_HOST_COPY = int(Kind.HOST_COPY)
#: Frames that may arrive broken: their senders are told so.
_ANSWERED = {int(kind) for kind in (Kind.CALL, Kind.REFERENCE_OP, Kind.RESULT, Kind.FUNCTION, Kind.HOST_COPY)}
_MOST = 1 << 24  # buffers of a frame: many more than anybody sends, and still a table that fits
_NUMPY_FROM_BYTES = 1 << 16  # from which numpy's uncleared memory is worth asking for
_SCRATCH = memoryview(bytearray(1 << 16))  # where bytes go that nobody will see


def allocate(nbytes: int) -> Any:
    """Return fresh writable memory of `nbytes` bytes, not cleared where that is cheaper."""
    if nbytes >= _NUMPY_FROM_BYTES:
        numpy = sys.modules.get("numpy")
        empty = getattr(numpy, "empty", None)  # numpy may be half imported by another thread
        if empty is not None:
            return memoryview(empty(nbytes, "B"))
    return bytearray(nbytes)


class FrameAssembler:
    """A frame of which the rest is still to come: header, and memory being filled.

    `room` returns the memory for a buffer of a copy, given the frame's number and a size.

    Memory that cannot be had for a section makes the frame a broken one: its bytes are
    read past, what came of it is let go, and who waits for it is told.  Of a broken frame
    only the references are kept, so that they can be given back.

    *Each step is taken whole or not at all*, whatever raises in it: the reader notes in `offset` how
    many bytes came, and calls :meth:`advance`, again if that failed.
    """

    __slots__ = ("broken", "frame", "offset", "refs", "room", "sections", "table", "target", "todo", "tokens")

    def __init__(self, header: tuple[int, ...], room: Callable[[int, int], Any]) -> None:
        kind, flags, _, lane, nbuf, call_id, body_len = header
        if nbuf > _MOST:
            raise BadFrame("a frame has more buffers than make sense")
        self.frame = Frame(kind, flags, lane, call_id, b"", [])
        self.broken = False
        self.room: Callable[[int], Any] = partial(room, call_id) if kind == _HOST_COPY else allocate
        self.sections: list[Any] = []  # body and buffers, as far as they are begun
        self.refs = 1 if flags & HAS_REFS else -1  # index of the section that holds the references
        self.tokens: list[int] = []  # indices of the sections that are tokens
        self.todo = [body_len]  # sizes of the sections after the table
        self.offset = 0
        self.table = bool(nbuf)  # the current section is the table of lengths
        self.target: Any = memoryview(bytearray(nbuf * 8)) if nbuf else None
        if not nbuf:
            self._begin_section()

    def _begin_section(self) -> None:
        """Make room for the next section."""
        index = len(self.sections)
        size = self.todo[index]
        memory: Any = None
        if not self.broken or index == self.refs or index in self.tokens:
            try:
                memory = self.room(size) if index else allocate(size)
            except (MemoryError, ValueError, OverflowError):
                if index == self.refs or index in self.tokens or self.frame.kind not in _ANSWERED:
                    raise  # it is short: to be tried again, for what it stands for must not get lost
                kept = {self.refs, *self.tokens}
                self.sections = [part if at in kept else None for at, part in enumerate(self.sections)]
                self.broken = True
        target = _DiscardBuffer(size) if memory is None else memoryview(memory)
        self.sections.append(memory)
        self.target, self.offset = target, 0

    def _read_table(self) -> None:
        """Read the lengths of the buffers.

        Raises
        ------
        BadFrame
            They make no sense.
        """
        sizes = struct.unpack(f"<{len(self.target) // 8}Q", self.target)
        tokens = [index for index, size in enumerate(sizes, 1) if size & IN_BLOCK]
        todo = [*self.todo, *(size & ~IN_BLOCK for size in sizes)]
        if max(todo) > sys.maxsize:
            raise BadFrame("a buffer of a frame is longer than any memory")
        if any(todo[index] != TOKEN.size for index in tokens):
            raise BadFrame("a token of a frame has the wrong length")
        self.tokens, self.todo, self.table = tokens, todo, False

    def advance(self) -> bool:
        """Go on after what has come up to `offset`; True when the frame is complete.

        Raises
        ------
        BadFrame
            The table of lengths makes no sense.
        """
        while self.offset == len(self.target):
            if self.table:
                self._read_table()
            if len(self.sections) == len(self.todo):
                return True
            self._begin_section()
        return False

    def finish(self, adopt: Callable[[Any], Any]) -> Frame:
        """Return the complete frame; `adopt` makes a hold of each token."""
        frame = self.frame
        while self.tokens:
            index = self.tokens[-1]
            try:
                self.sections[index] = adopt(self.sections[index])
            except LookupError:
                self.broken = True
            del self.tokens[-1]
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


class _DiscardBuffer:
    """Stands for memory that could not be had: as long as it, and forgets all."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        return _SCRATCH[: self._size - part.start]
