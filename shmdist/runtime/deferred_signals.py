"""Defers the program's signal handlers while their thread is inside the runtime.

Python calls them on the main thread, between any two bytecodes. One that raises, as after an alarm,
would there be the end of a half-read frame or of a lock; one that waits for a remote call would
wait for a thread that it keeps from reading. So where the thread enters the runtime, another
handler takes their places, which only notes the signal and wakes the thread; they are called where
nothing is half done (``ThreadState.raise_deferred``), and get their places back where the thread leaves.

To ask for all handlers takes a tenth of a call. So that is done on every 32nd entry, and before the
thread sleeps; of SIGALRM, which soon comes once it has a handler, one asks on each entry. Those that
were found are taken over from then on on each entry, as they are at that time. A handler that the
program sets inside the runtime, from another one, stays.

SIGINT's place is taken last and given back first: what is done in its place (``ThreadState``) takes two
steps, and no handler may raise between them.
"""

from __future__ import annotations

# The C half of `signal`, which has no stubs: the wrapper costs two microseconds an entry.
import _signal  # type: ignore[import-not-found]  # has no stubs
import signal
from collections.abc import Callable
from typing import Any

_getsignal = _signal.getsignal

#: Not SIGINT, which ``ThreadState`` sees to, nor those that no handler can be set for or that tell of a
#: crash.
SIGNALS = tuple(
    int(number)
    for number in signal.valid_signals()
    if number < 32 and number not in {2, 9, 19, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
)
assert (signal.SIGINT, signal.SIGKILL) == (2, 9)
_ALRM = int(signal.SIGALRM)
_OFTEN = 31  # of so many entries and one, one asks for all handlers


class DeferredSignalHandlers:
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

    __slots__ = ("_alarm", "_entries", "caught", "note", "taken", "watched")

    def __init__(self, note: Callable[[int, Any], None]) -> None:
        self.note = note
        self.watched: list[int] = []
        self.taken: dict[int, Any] = {}
        self.caught: list[int] = []
        self._entries = -1
        self._alarm: Any = None  # the handler of SIGALRM when it was last asked for

    def enter(self) -> None:
        """Take the handlers' places, on entering the runtime.

        Raises
        ------
        BaseException
            What one of them raised before that; then the runtime is not entered.
        """
        self._entries = entries = self._entries + 1
        if not entries & _OFTEN or _getsignal(_ALRM) is not self._alarm:
            self.look()
        if self.watched:
            self.take_over()

    def look(self) -> None:
        """Ask for all handlers, and take over those that are new."""
        self._alarm = self.handler(_ALRM)
        found = [number for number in SIGNALS if callable(_getsignal(number))]
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
                handler = _getsignal(number)
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
                number = next(iter(taken))
                if _getsignal(number) is note:
                    _signal.signal(number, taken[number])
                del taken[number]  # last: one that is back already may raise at any point
        finally:
            if taken:
                self.give_back()

    def handler(self, number: int) -> Any:
        """Return the program's handler of a signal."""
        now = _getsignal(number)
        return self.taken.get(number) if now is self.note else now
