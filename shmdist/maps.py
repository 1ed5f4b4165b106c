"""``pmap`` and ``pgenerate``: a function over the elements of iterables, on workers."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shmdist.pools import CachingPool, as_pool, workers_of
from shmdist.runtime.node import current_node
from shmdist.scheduling.batch import BatchRunner
from shmdist.scheduling.batch_sizing import WINDOW, positive_integer
from shmdist.scheduling.engine import MapRun
from shmdist.scheduling.input_reader import Feed, Reader, outcomes_read_here
from shmdist.scheduling.inputs import as_of_now_here, is_channel, is_live, is_sequence, known_length
from shmdist.scheduling.local import on_this_thread, on_threads
from shmdist.scheduling.repeated_arrays import find_repeated
from shmdist.scheduling.retries import ExponentialBackOff, Retry


class _Progress:
    """Tells how far a map is: at most ten times a second, and at its end."""

    def __init__(self, how: Any, total: int | None) -> None:
        self._tell = how if callable(how) else self._print
        self._line = not callable(how)
        self._total = total
        self._done = 0
        self._next = 0.0

    def step(self, count: int) -> None:
        self._done += count
        if self._total is not None and self._done > self._total:
            self._total = None  # it was a guess, and too small
        now = time.monotonic()
        if now >= self._next and self._done != self._total:
            self._next = now + 0.1
            self._tell(self._done, self._total)

    def finish(self) -> None:
        self._tell(self._done, self._total)
        if self._line:
            sys.stderr.write("\n")

    @staticmethod
    def _print(done: int, total: int | None) -> None:
        part = f"{done}" if total is None else f"{done}/{total} ({100 * done // max(total, 1)} %)"
        sys.stderr.write(f"\rpmap: {part}")
        sys.stderr.flush()


def _length(iterables: tuple[Any, ...]) -> int | None:
    """Return how many elements there will be, when that is certain."""
    return min(map(len, iterables)) if all(map(is_sequence, iterables)) else None


def _expected(iterables: tuple[Any, ...]) -> int | None:
    """Return how many elements there will be as far as the iterables say; for people to see."""
    # A channel says how many it has just now.
    lengths = [None if _is_channel(each) else known_length(each) for each in iterables]
    return None if None in lengths else min(lengths)  # type: ignore[type-var]  # they are integers


def _elements(iterables: tuple[Any, ...]) -> Any:
    """Return the elements: those of one iterable as they are, of several as tuples."""
    return iterables[0] if len(iterables) == 1 else zip(*iterables, strict=False)


def _is_channel(thing: Any) -> bool:
    return hasattr(thing, "take") and hasattr(thing, "isopen")


def _is_pool(thing: Any) -> bool:
    return hasattr(thing, "take") and hasattr(thing, "workers")


def _arguments(name: str, f: Any, iterables: tuple[Any, ...], pool: Any) -> tuple[tuple[Any, ...], Any]:
    """Sort out the forms in which a map may be called."""
    if not callable(f):
        raise TypeError(f"{name}(f, *iterables): f must be callable, not {f!r:.80}")
    if iterables and _is_pool(iterables[0]) and pool is None:
        pool, iterables = iterables[0], iterables[1:]
    if not iterables:
        raise TypeError(f"{name}(f, *iterables) needs at least one iterable")
    for iterable in iterables:
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"{name}(f, *iterables): {iterable!r:.80} is not iterable")
    return iterables, pool


def _check_handler(name: str, handler: Any, example: str) -> None:
    if handler is not None and not callable(handler):
        raise TypeError(f"pmap: {name} must be callable, as in {example}, not {handler!r:.80}")


def _ship(f: Any, pool: Any, star: bool) -> Any:
    """Return `f` as a run takes it: of a CachingPool, what its workers may have already."""
    if not isinstance(pool, CachingPool):
        return BatchRunner(f, star)
    return pool.ship_as(f, _RUNNERS[star])


_RUNNERS = (BatchRunner, functools.partial(BatchRunner, star=True))


def pmap(
    f: Callable[..., Any],
    *iterables: Any,
    pool: Any = None,
    distributed: bool = True,
    batch_size: int | None = None,
    on_error: Callable[[BaseException], Any] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Callable[[Any, BaseException], Any] | None = None,
    progress: Any = False,
) -> list[Any]:
    """Run `f` on the elements of iterables, on workers; return the results in order.

    Parameters
    ----------
    f : callable
        Takes an element of each iterable. It is sent once to each worker, with what it
        closes over.
    *iterables : iterable
        The shortest ends the map. Read as workers need elements. A pool in front of them
        is taken as `pool`.
    pool : worker pool or list of int, optional
        A list, tuple or range of process ids is a pool of these. Default: the default worker pool.
    distributed : bool
        False: on threads of this process. Containers and arrays that a generator gives are values then as
        well; the threads work on the program's other objects themselves.
    batch_size : int, optional
        Elements a message carries. By default it follows from what an element takes.
    on_error : callable, optional
        Called here with an element's error; what it returns is that element's result.
    retry_delays : iterable of float
        Seconds before each further try of an element that failed.
    retry_check : callable, optional
        ``retry_check(state, error)`` says whether an element is tried again: a bool, or
        ``(state, bool)``. `state` is what it returned for this element before, first None.
    progress : bool or callable
        True: on ``sys.stderr``. A callable is told ``(done, total)``; `total` may be None.

    Returns
    -------
    list

    Raises
    ------
    RemoteException
        The first error that came, without `on_error`; what else runs is cancelled.
    ProcessExitedException
        The worker of an element is gone. Errors of both kinds are retried alike.
    KeyboardInterrupt
        Ctrl-C; what runs is cancelled.

    Notes
    -----
    May be used in functions that run on workers, and from several threads at once.

    References
    ----------
    Julia manual, `pmap`.

    Examples
    --------
    >>> pmap(lambda x: x * x, range(5))
    [0, 1, 4, 9, 16]
    """
    iterables, pool = _arguments("pmap", f, iterables, pool)
    pool = as_pool(pool, "pmap") if distributed else None
    _check_handler("on_error", on_error, "on_error=lambda error: None")
    _check_handler("retry_check", retry_check, "retry_check=lambda state, error: True")
    if batch_size is not None:
        batch_size = positive_integer("batch_size", batch_size)
    total = _length(iterables)
    if total == 0:
        return []
    retry = Retry(retry_delays, retry_check)
    run = _run(f, iterables, pool, distributed, total, batch_size, None, retry)
    bar = _Progress(progress, _expected(iterables)) if progress else None
    results: list[Any] = [] if total is None else [None] * total
    scattered: dict[int, Any] = {}  # of places beyond the end of `results`: there may be more than were known
    count = 0
    try:
        for places, values, error in run:
            if error is not None:
                if on_error is None:
                    raise error
                values = [on_error(error)]
            count += (size := len(values))
            first, length = places[0], len(results)
            if size == 1 and first < length:
                results[first] = values[0]
            elif type(places) is range and (first == length or first + size <= length):
                results[first : first + size] = values
            else:
                for place, value in zip(places, values, strict=True):
                    if place < len(results):
                        results[place] = value
                    else:
                        scattered[place] = value
            if bar is not None:
                bar.step(size)
    finally:
        run.close()
        error = None  # else error, traceback and this frame would be a circle, which holds the input
    if bar is not None:
        bar.finish()
    for place in range(len(results), count):
        results.append(scattered[place])
    del results[count:]
    return results


def _run(
    f: Any,
    iterables: tuple[Any, ...],
    pool: Any,
    distributed: bool,
    total: int | None,
    batch_size: int | None,
    room: Callable[[int], int] | None,
    retry: Retry,
) -> Any:
    """Return the generator of outcomes; `room` as a Run takes it, where results are wanted one by one."""
    star = len(iterables) > 1
    if not distributed:
        elements = _elements(iterables)
        if any(map(is_live, iterables)):
            elements = map(as_of_now_here, elements)
        return on_threads(f, star, iter(elements), retry)
    pids = workers_of(pool)
    if pids == [current_node().pid]:
        return on_this_thread(f, star, iter(_elements(iterables)), retry)
    asked, known = time.monotonic(), pids

    def members() -> list[int]:
        # Asking a pool may be a call to another process, so it is done now and then.
        nonlocal asked, known
        now = time.monotonic()
        if now - asked > 0.1:
            asked, known = now, list(pool.workers())
        return known

    live = any(map(is_live, iterables))
    elements = Feed(lambda: _elements(iterables)) if live else _elements(iterables)
    repeated = find_repeated(iterables)
    options: dict[str, Any] = {"total": total, "batch_size": batch_size, "room": room, "retry": retry}
    run = MapRun(_ship(f, pool, star), elements, members, known=repeated, **options)
    if not live:
        return run.outcomes()
    channels = all(map(is_channel, iterables))
    if room is None and not channels:
        return outcomes_read_here(run, elements)
    Reader(elements, interruptible=channels)
    return run.outcomes()


def pgenerate(
    f: Callable[..., Any], *iterables: Any, pool: Any = None, ordered: bool = True
) -> Iterator[Any]:
    """Run `f` on the elements of iterables, on workers; yield the results.

    Parameters
    ----------
    f : callable
        Takes an element of each iterable.
    *iterables : iterable
        May be endless: elements are read a few batches ahead of what is consumed.
    pool : worker pool or list of int, optional
        A list, tuple or range of process ids is a pool of these. Default: the default worker pool.
    ordered : bool
        False: results come as they are ready.

    Yields
    ------
    object
        Results. An error ends the iterator; so does closing it, which cancels what runs.

    References
    ----------
    Julia package ParallelUtilities; Julia manual, `pmap`.

    Examples
    --------
    >>> import itertools
    >>> squares = pgenerate(lambda x: x * x, itertools.count())
    >>> next(squares), next(squares)
    (0, 1)
    """
    iterables, pool = _arguments("pgenerate", f, iterables, pool)
    return _generate(f, iterables, as_pool(pool, "pgenerate"), ordered)


def _generate(f: Any, iterables: tuple[Any, ...], pool: Any, ordered: bool) -> Iterator[Any]:
    ahead = _Ahead(len(pool.workers()))
    run = _run(f, iterables, pool, True, _length(iterables), None, ahead.room, Retry((), None))
    waiting: dict[int, Any] = {}
    failed: dict[int, BaseException] = {}
    turn = 0
    try:
        for places, values, error in run:
            if not ordered:
                if error is not None:
                    raise error
                for value in values:
                    ahead.consumed += 1
                    yield value
                continue
            if error is not None:  # raised when its turn comes: what is before it comes first
                failed[places[0]] = error
                values = [None]
            waiting.update(zip(places, values, strict=True))
            while turn in waiting:
                if turn in failed:
                    raise failed[turn]
                ahead.consumed += 1
                turn += 1
                yield waiting.pop(turn - 1)
    finally:
        run.close()
        error = None  # else error, traceback and this frame would be a circle, which holds the input
        failed.clear()


class _Ahead:
    """Bounds how far the input is read ahead of what is consumed."""

    def __init__(self, workers: int) -> None:
        self._least = 2 * WINDOW * max(1, workers)
        self.consumed = 0
        self._began = time.monotonic()

    def room(self, drawn: int) -> int:
        """Return how many more elements may go out now: twice what the workers hold, or 50 ms of work."""
        rate = self.consumed / max(time.monotonic() - self._began, 0.2)
        most = max(self._least, min(4096, int(0.05 * rate)))
        return max(0, most - (drawn - self.consumed))


__all__ = ["ExponentialBackOff", "pgenerate", "pmap"]
