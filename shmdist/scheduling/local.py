"""Maps on this process: there are no workers, or none are wanted."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from shmdist.errors import local_exception
from shmdist.references.future import LocalTask
from shmdist.runtime.interrupts import collecting, current, is_interrupt
from shmdist.runtime.node import current_node
from shmdist.runtime.waiting import Waiter
from shmdist.scheduling.element_errors import name_element
from shmdist.scheduling.engine import Outcome
from shmdist.scheduling.local_thread import run_on_thread

_THREADS = 32  # of a map that is not distributed

Retry = Callable[[int, BaseException], "float | None"]


def on_this_thread(f: Any, star: bool, elements: Iterator[Any], retry: Retry) -> Iterator[Outcome]:
    """Run on the calling thread, one element after the other."""
    for place, element in enumerate(elements):
        while True:
            try:
                value = f(*element) if star else f(element)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                wrapped = local_exception(current_node().pid, error)
            else:
                yield (place,), [value], None
                break
            name_element(wrapped, place, element)
            delay = retry(place, wrapped)
            if delay is None:
                yield (place,), [], wrapped
                break
            time.sleep(delay)


def on_threads(f: Any, star: bool, elements: Iterator[Any], retry: Retry) -> Iterator[Outcome]:
    """Run on threads of this process, many at a time.

    When the map ends before them, by an error say, those that still run are interrupted, and
    no thread waits for them: what they come to is dropped.
    """
    crew = _Crew(f, star)
    try:
        yield from _on_crew(crew, elements, retry)
    finally:
        crew.interrupt()


def _on_crew(crew: _Crew, elements: Iterator[Any], retry: Retry) -> Iterator[Outcome]:
    numbered: Iterator[tuple[int, Any]] = enumerate(elements)
    failure: Exception | None = None
    later: list[tuple[float, int, Any]] = []  # retries: when, place, element
    while True:
        while later and later[0][0] <= time.monotonic() and crew.running < _THREADS:
            crew.begin(*heapq.heappop(later)[1:])
        try:
            for place, element in itertools.islice(numbered, _THREADS - crew.running):
                crew.begin(place, element)
        except Exception as caught:  # of the input: what it gave before that is run first
            if is_interrupt(caught):
                raise
            numbered, failure = enumerate(()), caught
        if not crew.running and not later:
            break
        for place, element, value, error in crew.wait(later[0][0] if later else None):
            if error is None:
                yield (place,), [value], None
                continue
            wrapped = local_exception(current_node().pid, error)
            name_element(wrapped, place, element)
            delay = retry(place, wrapped)
            if delay is None:
                yield (place,), [], wrapped
            else:
                heapq.heappush(later, (time.monotonic() + delay, place, element))
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # else error, traceback and this frame would be a circle


class _Crew:
    """Threads that run elements, and what these came to."""

    def __init__(self, f: Any, star: bool) -> None:
        self._f = f
        self._star = star
        self._node = current_node()
        self._tasks: dict[int, LocalTask] = {}  # those that run, by place
        self._waiter = Waiter()
        self._ended: deque[tuple[int, Any, Any, BaseException | None]] = deque()
        self.running = 0

    def begin(self, place: int, element: Any) -> None:
        """Run an element on a thread of its own."""

        def ended(value: Any, failure: BaseException | None) -> None:
            self._ended.append((place, element, value, failure))
            self._node.reactor.complete(self._waiter)

        with current():  # an interrupt must not come between the start and the note of it
            arguments = element if self._star else (element,)
            self._tasks[place] = run_on_thread(self._node, self._f, arguments, ended)
            self.running += 1

    def interrupt(self) -> None:
        """End those that still run."""
        if collecting():  # an abandoned generator
            self._node.counts.hand_over(self.interrupt)
            return
        with current():
            for task in list(self._tasks.values()):
                task.interrupt()

    def wait(self, until: float | None) -> list[tuple[int, Any, Any, BaseException | None]]:
        """Wait until an element has ended, or a time of the monotonic clock; return those that have."""
        if self.running or until is not None:
            timeout = None if until is None else max(0.0, until - time.monotonic())
            thread_state = current()
            thread_state.enter()
            try:
                self._waiter.done = False
                if not self._ended:
                    self._node.reactor.wait(self._waiter, timeout)
            finally:
                thread_state.leave()
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        self.running -= len(ended)
        for place, *_ in ended:
            del self._tasks[place]
        return ended


__all__ = ["on_this_thread", "on_threads"]
