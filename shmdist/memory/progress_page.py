"""A page of memory on which a local worker notes how far it is, and which outlives it."""

from __future__ import annotations

import os
import threading
from collections import deque

from shmdist.memory.mapping import map_file, unnamed_memory

_PAGE_BYTES = 4096  # of a page for notes
SLOTS = _PAGE_BYTES // 16
LANES = 64  # lanes that have words of their own on a page; more of them share
BEGUN = 2 * SLOTS  # the first of these words
_SIZE = _PAGE_BYTES + 16 * LANES


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
            fd = unnamed_memory("shmdist-page")
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._map = map_file(fd, _SIZE)
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


def make_page() -> ProgressPage | None:
    """Return a page, or None where the system has no unnamed memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return ProgressPage()
    except OSError:
        return None
