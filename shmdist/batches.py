"""What a worker does with a batch of elements of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shmdist.errors import SerializationError, capture
from shmdist.memory.segment import SLOTS
from shmdist.runtime.node import current_node
from shmdist.runtime.replies import pack_error
from shmdist.runtime.strand import current
from shmdist.wire import codec

_PROBE = 0.0005  # seconds that a worker spends to find out what elements cost

#: What a batch came to, where it ran: the seconds it took; values, one for each element that
#: ended, None for those that failed; and packed errors by place in the batch, or None. A plain
#: tuple, for one is pickled for each batch.
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
        return BatchRunner, (self.f, self.star)

    def __call__(self, batch: list[Any], probe: bool = False) -> Results:
        """Run a batch."""
        return self.probe(batch) if probe else self.run(batch)

    def probe(self, batch: list[Any]) -> Results:
        """Run `f` on elements until `_PROBE` seconds are over; at least on one."""
        seconds, values, errors = self.run(batch[:1])
        size = 2
        while len(values) < len(batch) and seconds < _PROBE:
            done = len(values)
            part = batch[done : done + size]
            time_taken, more, more_errors = self.run(part, done)
            seconds += time_taken
            values += more
            if more_errors:
                errors = {**(errors or {}), **{done + place: error for place, error in more_errors.items()}}
            if len(more) < len(part):
                break  # interrupted
            size *= 2
        return seconds, values, errors

    def without_unsendable(self, results: Results) -> Results:
        """Return `results` with errors in the place of values that cannot be sent."""
        seconds, values, errors = results
        errors, values = dict(errors or {}), list(values)
        for place, value in enumerate(values):
            try:
                codec.dumps(value, "the result")
            except SerializationError as error:
                errors[place] = pack_error(capture(error))
                values[place] = None
        return seconds, values, errors

    def run(self, batch: list[Any], first: int = 0) -> Results:
        """Run `f` on each element; an error ends that element alone.

        KeyboardInterrupt and other errors that are no `Exception` end the batch: the
        elements after it have not begun.  `first` is the place of the first one in the
        batch that was sent.
        """
        f = self.f
        numbers, slot = _notes(first)
        values: list[Any] = []
        errors: dict[int, Any] = {}
        elements = enumerate(batch, first)
        done = first
        start = time.perf_counter()
        while True:
            try:
                if self.star:
                    for done, element in elements:
                        numbers[slot] = done
                        values.append(f(*element))
                else:
                    for done, element in elements:
                        numbers[slot] = done
                        values.append(f(element))
                break
            except Exception as error:
                errors[done - first] = pack_error(capture(error))
                values.append(None)
            except BaseException as error:
                errors[done - first] = pack_error(capture(error))
                values.append(None)
                break
        return time.perf_counter() - start, values, errors or None


_NOWHERE: Any = [0]


def _notes(first: int) -> tuple[Any, int]:
    """Return where to note the element that is begun: this worker's page, if it has one."""
    task = current().task
    page = current_node().settings.get("page")
    if task is None or page is None:
        return _NOWHERE, 0
    numbers = page.numbers
    slot = 2 * (task.frame.lane % SLOTS)
    numbers[slot + 1] = first
    numbers[slot] = task.frame.call_id
    return numbers, slot + 1
