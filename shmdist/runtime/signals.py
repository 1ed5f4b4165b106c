"""The program's handlers of signals, put off while their thread is inside the runtime.

Python calls them on the main thread, between any two bytecodes. One that raises, as after an alarm,
would there be the end of a half-read frame or of a lock; one that waits for a remote call would
wait for a thread that it keeps from reading. So where the thread enters the runtime, another
handler takes their places, which only notes the signal and wakes the thread; they are called where
nothing is half done (``Strand.deliver``), and get their places back where the thread leaves.

To ask for all handlers takes longer than half a call. So that is done on every 32nd entry, and
before the thread sleeps; from then on those that were found are taken over on each entry, as they
are at that time. A handler that the program sets inside the runtime, from another one, stays.
"""

from __future__ import annotations

# The C half of `signal`, which has no stubs: the wrapper costs two microseconds an entry.
import _signal  # type: ignore[import-not-found]  # has no stubs
import signal
from collections.abc import Callable
from typing import Any

#: Not SIGINT, which ``Strand`` sees to, nor those that no handler can be set for or that tell of a crash.
SIGNALS = tuple(
    int(number)
    for number in signal.valid_signals()
    if number < 32 and number not in {2, 9, 19, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
)
assert (signal.SIGINT, signal.SIGKILL) == (2, 9)


class Handlers:
    """The handlers of one thread.

    Parameters
    ----------
    note : callable
        Called in the place of a handler, with its arguments.

    Attributes
    ----------
    watched : list of int
        The signals that had handlers when these were last asked for.
    taken : dict of int to callable
        Handlers whose places are taken.
    caught : list of int
        Signals that have come.
    """

    __slots__ = ("caught", "note", "taken", "watched")

    def __init__(self, note: Callable[[int, Any], None]) -> None:
        self.note = note
        self.watched: list[int] = []
        self.taken: dict[int, Any] = {}
        self.caught: list[int] = []

    def look(self) -> None:
        """Ask for all handlers, and take over those that are new."""
        found = [number for number in SIGNALS if callable(_signal.getsignal(number))]
        if found != self.watched:
            self.watched = found
            self.take_over()

    def take_over(self) -> None:
        """Take the place of the handlers of the signals that are watched.

        Raises
        ------
        BaseException
            What one of them raised before it was its turn; then all have their places.
        """
        note, taken = self.note, self.taken
        try:
            for number in self.watched:
                if number in taken:
                    continue
                handler = _signal.getsignal(number)
                if callable(handler):
                    taken[number] = handler  # noted first: the signal may come right after
                    _signal.signal(number, note)
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Give all handlers their places back; those set meanwhile keep theirs.

        Raises
        ------
        BaseException
            What one of them raised when it had its place again; all have theirs all the same.
        """
        taken, note = self.taken, self.note
        try:
            while taken:
                number, handler = taken.popitem()
                if _signal.getsignal(number) is note:
                    _signal.signal(number, handler)
        finally:
            if taken:
                self.give_back()

    def handler(self, number: int) -> Any:
        """Return the program's handler of a signal."""
        now = _signal.getsignal(number)
        return self.taken.get(number) if now is self.note else now
