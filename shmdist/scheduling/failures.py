"""Where elements have failed: they are tried elsewhere, and a worker on which everything fails gets less.

An element that failed goes to a worker on which it has not, and when it has failed on all, to
another one than last time. Where that one is busy it waits for it.

A worker on which everything fails at once, for want of a module say, is idle all the time, and
would take most of the input. So after `_STREAK` failures in a row it gets another batch only when
the others have done some elements meanwhile, the more the longer its streak is. That holds
while there are others that are better, and while something is out that will come back: so
there is always somebody who takes what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

_STREAK = 4  # failures in a row from which on a worker gets less
_SEARCH_LIMIT = 64  # elements that are looked at for one that a worker may have


class Failures:
    """Where elements of one run have failed, and which workers fail all they get."""

    def __init__(self) -> None:
        self.places: dict[int, list[int]] = {}  # the workers on which an element failed, by its place
        #: Failures in a row, and how many elements the others have done since its last batch; by worker.
        self.streaks: dict[int, list[int]] = {}

    def __repr__(self) -> str:
        return f"<Failures of {len(self.places)} elements, streaks {self.streaks}>"

    def note(self, place: int, pid: int) -> None:
        """Take note that an element has failed on a worker and is to be tried again."""
        self.places.setdefault(place, []).append(pid)

    def avoids(self, place: int, pid: int, pids: Collection[int]) -> bool:
        """Return whether an element should not go to worker `pid` of those that there are, `pids`."""
        failed = self.places.get(place)
        if failed is None or pid not in failed:
            return False
        if all(each in failed for each in pids):
            return pid == failed[-1] and len(pids) > 1
        return True

    def take(self, waiting: deque[tuple[int, Any]], pid: int, pids: Sequence[int]) -> tuple[int, Any] | None:
        """Take the first of the elements `waiting` that may go to worker `pid`; None if none may."""
        for number, (place, _) in enumerate(islice(waiting, _SEARCH_LIMIT)):
            if not self.avoids(place, pid, pids):
                found = waiting[number]
                del waiting[number]
                return found
        return None

    def finished(self, pid: int, count: int, failed: Collection[int] = ()) -> None:
        """Take note that `count` elements have ended on a worker, those numbered `failed` in errors."""
        last = 0
        while last < count and count - 1 - last in failed:
            last += 1
        if not last:
            self.streaks.pop(pid, None)
        else:
            streak = self.streaks.setdefault(pid, [0, 0])
            streak[0] = last + (streak[0] if last == count else 0)
        for each, streak in self.streaks.items():
            if each != pid:
                streak[1] += count - len(failed)

    def sent(self, pid: int) -> None:
        """Take note that a worker gets a batch."""
        if pid in self.streaks:
            self.streaks[pid][1] = 0

    def held_back(self, pids: Sequence[int]) -> set[int]:
        """Return the workers that get nothing for now."""
        long = {pid for pid in pids if self.streaks.get(pid, (0, 0))[0] >= _STREAK}
        if len(long) == len(pids):
            return set()
        return {pid for pid in long if self.streaks[pid][1] < self.streaks[pid][0] // 2}


__all__ = ["Failures"]
