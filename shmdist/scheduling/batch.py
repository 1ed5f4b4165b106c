"""A batch of elements on the worker that runs it.

A batch may be long, and one of its elements may take long. So that nothing need wait
behind it, the part of a running batch that has not begun can be taken out of it
(:func:`divide`), from another thread, without a lock that every element would pay for:

- the loop draws its elements from an iterator of a list that belongs to the batch alone;
- deleting the end of that list is one step for the interpreter, after which the iterator
  draws nothing from there;
- how far it had drawn by then, the iterator tells.

The batch then ends early, and answers with fewer values than it had elements.  Whoever
sent it compares the two: elements without a value have not begun here, and never will.
"""

from __future__ import annotations

import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from shmdist.errors import SerializationError, add_note, capture
from shmdist.runtime import forked_child
from shmdist.runtime.interrupts import current
from shmdist.runtime.node import Node, current_node
from shmdist.runtime.replies import pack_error
from shmdist.serialization import codec
from shmdist.serialization.isolated_items import IsolatedItems, LoadFailure, PartialList, pack
from shmdist.serialization.pickled_functions import kept
from shmdist.transport import native

_PROBE_SECONDS = 0.0005  # that a worker spends to find out what elements cost

#: What a batch came to, where it ran: the seconds it took; values, one for each element that
#: ended, None for those that failed; and packed errors by place in the batch, or None. A plain
#: tuple, for one is pickled for each batch. As it is sent, the values are packed.
Results = tuple[float, list[Any], "dict[int, Any] | None"]


class BatchRunner:
    """A function as it is sent for a run: takes batches, and notes how far it is.

    Parameters
    ----------
    f : callable
        The function.
    star : bool
        Elements are tuples of arguments.
    """

    __slots__ = ("f", "star")

    def __init__(self, f: Callable[..., Any], star: bool = False) -> None:
        self.f = f
        self.star = star

    def __reduce__(self) -> Any:
        return BatchRunner, (kept(self.f) or self.f, self.star)

    def _named_parts(self) -> Iterator[tuple[str, Any]]:
        yield from self.f._named_parts() if hasattr(self.f, "_named_parts") else [("the function", self.f)]

    def __call__(self, batch: Any, probe: bool = False) -> Any:
        """Run a batch that was sent here; returns its results as they are sent."""
        results = self.run(batch, probe, current().task.key, current_node().tasks.page)
        if len(results[1]) < 2:
            return results
        return results[0], pack(results[1]), results[2]

    def run(self, batch: Any, probe: bool, key: tuple[int, int], page: Any = None) -> Results:
        """Run `f` on each element; an error ends that element alone.

        Parameters
        ----------
        batch : list or range
            A list is emptied of what :func:`divide` takes away.
        probe : bool
            Stop after `_PROBE_SECONDS`, but not before the first element has ended.
        key : (int, int)
            Who sent it, and its number there.
        page : Page, optional
            Where to note the element that is begun.

        Returns
        -------
        Results
            Elements after the last value have not begun: the time of a probe was up, they
            were taken away, or the batch was ended by KeyboardInterrupt or another error
            that is no `Exception`.
        """
        f, star = self.f, self.star
        if type(batch) is PartialList:
            f, star = _Refusing(f, star), False
        elif type(batch) is not list:
            batch = list(batch)
        source = iter(batch)
        values: list[Any] = []
        errors: dict[int, Any] = {}
        several = len(batch) > 1
        if several:
            under_way = current_node().part(RunningBatches)
            under_way[key] = batch, source
        numbers, slot, free = _begin_notes(page, key)
        try:
            start = time.perf_counter()
            size = 1 if probe else len(batch)
            while _work(f, star, source, values, errors, numbers, slot + 1, size) and probe:
                if len(values) < size or time.perf_counter() - start > _PROBE_SECONDS:
                    break
                size = 2 * len(values)
            seconds = time.perf_counter() - start
        finally:
            if several:
                under_way.pop(key, None)
            if free is not None:
                free.append(slot)
        return seconds, values, errors or None

    def without_unsendable(self, results: Any) -> Any:
        """Return `results` with errors in the place of values that cannot be sent."""
        seconds, values, errors = results
        errors = dict(errors or {})
        values = list(values.items if type(values) is IsolatedItems else values)
        for place, value in enumerate(values):
            try:
                codec.dumps(value, "the result")
            except SerializationError as error:
                errors[place] = pack_error(capture(error))
                values[place] = None
        return seconds, pack(values), errors


def _work(
    f: Callable[..., Any],
    star: bool,
    source: Iterator[Any],
    values: list[Any],
    errors: dict[int, Any],
    numbers: Any,
    slot: int,
    limit: int,
) -> bool:
    """Run `f` until there are `limit` values; False when it was ended by an error that is no `Exception`.

    The number of the element that is begun is in ``numbers[slot]``.
    """
    while True:
        try:
            while len(values) < limit and not _advance(f, star, source, values, numbers, slot, limit):
                pass  # between two steps signals come through, and other threads
            return True
        except Exception as error:
            if forked_child.is_child():
                forked_child.end(error)
            errors[len(values)] = pack_error(capture(error))
            values.append(None)
        except BaseException as error:
            if forked_child.is_child():
                forked_child.end(error)
            # It may have come after the value was there; then the value is given up, lest
            # the next element, which has not begun, be taken to have ended.
            done = numbers[slot]
            del values[done:]
            errors[done] = pack_error(capture(error))
            values.append(None)
            return False


def _advance_in_python(
    f: Callable[..., Any],
    star: bool,
    source: Iterator[Any],
    values: list[Any],
    numbers: Any,
    slot: int,
    limit: int,
) -> bool:
    """Append `f` of elements to `values` until there are `limit` of these; true at the end of the source."""
    elements = enumerate(islice(source, limit - len(values)), len(values))
    if star:
        for numbers[slot], element in elements:
            values.append(f(*element))
    else:
        for numbers[slot], element in elements:
            values.append(f(element))
    return len(values) < limit


#: The same in C takes two thirds of the time, for elements that take none.
_advance = _advance_in_python if native.module is None else native.module.advance


class _Refusing:
    """A function of elements some of which could not be read: those it raises the error of."""

    def __init__(self, f: Callable[..., Any], star: bool) -> None:
        self.f = f
        self.star = star

    def __call__(self, element: Any) -> Any:
        if type(element) is LoadFailure:
            error = element.error
            add_note(error, codec.unreadable(error, f"the element (on process {current_node().pid})").args[0])
            raise error
        return self.f(*element) if self.star else self.f(element)


# ---------------------------------------------------------------------- dividing


class RunningBatches(dict[tuple[int, int], tuple[list[Any], Any]]):
    """The batches of several elements that run on a node: their elements and iterators, by call."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        os.register_at_fork(after_in_child=self._stop)

    def _stop(self) -> None:
        """Begin no further elements, in a forked child."""
        for batch, _ in self.values():
            batch.clear()


def divide(key: tuple[int, int]) -> int | None:
    """Take the later half of what has not begun out of a batch that runs here.

    Returns
    -------
    int or None
        How many elements it keeps, from its first one on. None: it has drawn its last
        element, or is not here any more; what it answers tells how far it came.
    """
    entry = current_node().part(RunningBatches).get(key)
    if entry is None:
        return None
    batch, source = entry
    drawn = _drawn(source)
    if drawn is None or drawn >= len(batch):
        return None
    keep = drawn + (len(batch) - drawn) // 2
    del batch[keep:]
    # It went on meanwhile, perhaps past the cut. But from now on it draws nothing there.
    drawn = _drawn(source)
    return None if drawn is None else max(keep, drawn)


def _drawn(source: Any) -> int | None:
    """Return how many elements an iterator of a list has given; None at its end."""
    state = source.__reduce__()
    return int(state[2]) if len(state) > 2 else None


# ---------------------------------------------------------------------- notes


def note_key(key: tuple[int, int]) -> int:
    """Return the number under which a call is noted: of its caller, and its number there."""
    return key[0] << 40 | key[1]


def _begin_notes(page: Any, key: tuple[int, int]) -> tuple[Any, int, deque[int] | None]:
    """Take a slot of the page for a batch; returns the page's numbers, the slot, and where it goes back.

    Without a page or a free slot, they are noted where nobody looks.
    """
    if page is None:
        return array("Q", [0]), -1, None
    free: deque[int] = page.free
    try:
        # The one that has been free for longest. So the note of a batch that has ended stays
        # for a good while: this process may die before the answer is sent.
        slot = free.popleft()
    except IndexError:
        return array("Q", [0]), -1, None
    numbers = page.numbers
    numbers[slot + 1] = 0
    numbers[slot] = note_key(key)
    return numbers, slot, free


__all__ = ["BatchRunner", "Results", "divide", "note_key"]
