"""Maps on this process: there are no workers, or none are wanted."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from shmdist.errors import RemoteException, capture, remote_exception
from shmdist.runs import Outcome
from shmdist.runtime.node import current_node
from shmdist.runtime.strand import Cell, current, is_interrupt

_THREADS = 32  # of a map that is not distributed

Retry = Callable[[int, BaseException], "float | None"]


def _failed(error: BaseException) -> RemoteException:
    """Return an element's error as a map tells it."""
    wrapped = remote_exception(current_node().pid, capture(error))
    wrapped.__cause__ = error
    return wrapped


def on_this_thread(f: Any, star: bool, elements: Iterator[Any], retry: Retry) -> Iterator[Outcome]:
    """Run on the calling thread, one element after the other."""
    for place, element in enumerate(elements):
        while True:
            try:
                value = f(*element) if star else f(element)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                wrapped = _failed(error)
            else:
                yield (place,), [value], None
                break
            delay = retry(place, wrapped)
            if delay is None:
                yield (place,), [], wrapped
                break
            time.sleep(delay)


def on_threads(f: Any, star: bool, elements: Iterator[Any], retry: Retry) -> Iterator[Outcome]:
    """Run on threads of this process, many at a time.

    A thread cannot be ended. So when the map ends before them, by an error say, nobody waits
    for those that still run: what they come to is dropped, and they end with the program.
    """
    crew = _Crew(f, star)
    numbered = enumerate(elements)
    later: list[tuple[float, int, Any]] = []  # retries: when, place, element
    while True:
        while later and later[0][0] <= time.monotonic() and crew.running < _THREADS:
            crew.begin(*heapq.heappop(later)[1:])
        for place, element in itertools.islice(numbered, _THREADS - crew.running):
            crew.begin(place, element)
        if not crew.running and not later:
            return
        for place, element, value, error in crew.wait(later[0][0] if later else None):
            if error is None:
                yield (place,), [value], None
                continue
            wrapped = _failed(error)
            delay = retry(place, wrapped)
            if delay is None:
                yield (place,), [], wrapped
            else:
                heapq.heappush(later, (time.monotonic() + delay, place, element))


class _Crew:
    """Threads that run elements, and what these came to."""

    def __init__(self, f: Any, star: bool) -> None:
        self._f = f
        self._star = star
        self._dispatcher = current_node().dispatcher
        self._cell = Cell()
        self._ended: deque[tuple[int, Any, Any, BaseException | None]] = deque()
        self.running = 0

    def begin(self, place: int, element: Any) -> None:
        """Run an element on a thread of its own."""
        f, star = self._f, self._star

        def run() -> None:
            strand = current()
            depth, strand.depth = strand.depth, 0
            value: Any = None
            failure: BaseException | None = None
            try:
                value = f(*element) if star else f(element)
            except BaseException as error:
                failure = error
            strand.depth = depth
            self._ended.append((place, element, value, failure))
            self._dispatcher.complete(self._cell)

        self.running += 1
        self._dispatcher.start(run)

    def wait(self, until: float | None) -> list[tuple[int, Any, Any, BaseException | None]]:
        """Wait until an element has ended, or a time of the monotonic clock; return those that have."""
        if self.running or until is not None:
            timeout = None if until is None else max(0.0, until - time.monotonic())
            strand = current()
            strand.enter()
            try:
                self._cell.done = False
                if not self._ended:
                    self._dispatcher.wait(self._cell, timeout)
            finally:
                strand.leave()
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        self.running -= len(ended)
        return ended


__all__ = ["on_this_thread", "on_threads"]
