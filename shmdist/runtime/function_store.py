"""Functions that were sent ahead of their calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shmdist.errors import add_note
from shmdist.serialization import codec
from shmdist.transport.messages import BROKEN, Frame


class FunctionStore:
    """Functions sent ahead of their calls, by sender and number; read on first use."""

    def __init__(self, give_back: Callable[[Any], None]) -> None:
        self._give_back = give_back  # of references in what is not read
        self._table: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return len(self._table)

    def put(self, frame: Frame) -> None:
        """Keep a FUNCTION frame; on the reading thread, so it is not read yet."""
        self._table[frame.link.pid, frame.call_id] = [[frame], threading.Lock(), None]

    def drop(self, pid: int, number: int) -> None:
        """Forget a function."""
        entry = self._table.pop((pid, number), None)
        if entry is not None:
            entry[0].clear()  # references in it go back, if it has not been read

    def forget(self, pid: int) -> None:
        """Forget all functions of a process that is gone."""
        for key in [key for key in self._table if key[0] == pid]:
            self.drop(*key)

    def get(self, pid: int, number: int) -> Any:
        """Return a function, reading it when it is asked for first.

        Raises
        ------
        LookupError
            It was dropped.
        Exception
            Whatever reading it raises; every call of it raises the same.
        """
        entry = self._table.get((pid, number))
        if entry is None:
            raise LookupError(f"function {number} of process {pid} is not kept here any more")
        if entry[2] is None:
            with entry[1]:  # several calls may want it at once; it is read one time
                if entry[2] is None:
                    try:
                        frame = entry[0].pop()  # one step: whoever has it sees to the references in it
                    except IndexError:
                        raise LookupError(f"function {number} of process {pid} was dropped") from None
                    entry[2] = self._read(frame)
        function, failure = entry[2]
        if failure is not None:
            raise failure
        return function

    def _read(self, frame: Frame) -> tuple[Any, Exception | None]:
        """Read a function, or say why it cannot be read."""
        try:
            if frame.flags & BROKEN:
                raise MemoryError("this process had no memory to receive the function")
            return codec.loads(frame, self._give_back), None
        except Exception as error:
            add_note(error, codec.unreadable(error, "the function").args[0])
            return None, error
