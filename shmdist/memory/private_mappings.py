"""A cache of private mappings, for the next array at the same place.

Mapping the pages of a large part once more would take longer than a copy of them. To forget what
an array's user wrote, all the page table must be gone through, which takes a fifth of a copy. So
that is left to a quiet moment; when it could not wait, as many mappings more are made ready in the
next quiet moment as were short.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmdist.memory.segment import PrivateView

    Part = tuple[int, int]  # where it begins in the segment, and its size

_MIN_KEPT_BYTES = 1 << 20  # of a mapping from which on it is kept
_MOST = 8  # mappings of a segment that are kept


class MappingCache:
    """The private mappings of a segment that are not in use.

    ``make(start, size)`` maps a part. It is the segment's, and given each time: kept here, it
    would keep the segment until the next garbage collection.
    """

    def __init__(self) -> None:
        self._used: deque[PrivateView] = deque()  # as their users left them; anybody may append
        self._lock = threading.Lock()  # guards all else; held while one is cleaned
        self._clean: dict[Part, list[PrivateView]] = {}
        self._short: Counter[Part] = Counter()

    def __repr__(self) -> str:
        return f"<MappingCache: {len(self)} kept, {len(self._used)} of them to be cleaned>"

    def __len__(self) -> int:
        return len(self._used) + sum(map(len, list(self._clean.values())))

    def take(self, start: int, size: int, make: Callable[[int, int], PrivateView]) -> PrivateView:
        """Return a clean mapping of a part, for an array to use.

        Raises
        ------
        OSError
            There is no room for a mapping.
        """
        part = (start, size)
        if size >= _MIN_KEPT_BYTES:
            with self._lock:
                clean = self._clean.get(part)
                if clean:
                    return clean.pop()
                for view in list(self._used):
                    if (view.start, view.size) == part:
                        self._used.remove(view)
                        view.clean()
                        self._short[part] += 1
                        return view
        return make(start, size)

    def rest(self, view: PrivateView) -> None:
        """Take a mapping back that nothing looks into any more. It never blocks."""
        if view.can_be_cleaned and view.size >= _MIN_KEPT_BYTES and len(self) < _MOST:
            self._used.append(view)

    def tidy(self, make: Callable[[int, int], PrivateView]) -> None:
        """Make what is kept ready for the next arrays; in a quiet moment."""
        while self._used:
            with self._lock:
                try:
                    view = self._used.popleft()
                except IndexError:
                    break  # it was taken meanwhile
                view.clean()
                self._clean.setdefault((view.start, view.size), []).append(view)
        while self._short:
            with self._lock:
                part, number = self._short.popitem()
            for _ in range(min(number, _MOST - len(self))):
                try:
                    view = make(*part)
                    view.populate()
                except OSError:
                    return
                with self._lock:
                    self._clean.setdefault(part, []).append(view)

    def drop(self) -> None:
        """Take down what is kept."""
        with self._lock:
            self._used.clear()
            self._clean.clear()
            self._short.clear()
