"""How large the batches of a map are, and how many of them a worker has.

The size follows from what elements have cost so far: large enough that messages do not
count, small enough that the end comes for all workers at about the same time. And however
little they cost, it follows from what they weigh: the input may be larger than memory.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from shmdist.serialization.arrays import SharedSource

if TYPE_CHECKING:
    from shmdist.serialization.pickler import Payload

WINDOW = 2  # batches of a run that a worker has at a time, at least
_DEEPEST = 64  # and at most, when they are short
_QUEUED_WORK_SECONDS = 0.001  # of work that a worker should have waiting
_MESSAGE_SECONDS = 15e-6  # that a message costs its receiver, roughly
_GROW = 16  # a batch is at most so many times as large as any that came back
_MAX_BATCH_SECONDS = 0.02  # of work in a batch, at most
_PROBED = 4096  # elements in the first batches, at most, when they are cheap to send
_FEW = 32  # elements of an input that may go out in one batch to each worker
_CHEAP = frozenset({int, float, bool, complex, type(None)})  # types of elements that are cheap to send
_LAST_BATCH_SECONDS = 0.002  # of work that may go out in one batch at the end
_MAX_BATCH_BYTES = 4 << 20  # of a batch, at most, when it has several elements
_MAX_QUEUED_BYTES = 16 << 20  # that a worker has waiting, at most, when it has more than `WINDOW` batches
_MIN_BATCH_SECONDS = 0.0001  # of work below which a smaller batch is not worth its message


class BatchSizer:
    """Decides about the batches of one run.

    Parameters
    ----------
    total : int, optional
        How many elements there are, if known.
    fixed : int, optional
        The size of all batches; default adaptive.
    cheap : bool
        Elements may well be sent twice.
    """

    __slots__ = ("cheap", "cost", "fixed", "largest", "last", "total", "weight")

    def __init__(self, total: int | None, fixed: int | None, cheap: bool) -> None:
        self.total = total
        self.fixed = fixed
        self.cheap = cheap
        self.cost: float | None = None  # seconds an element takes, of late
        self.last = 0  # the size of the batches in which the rest goes out, once that is decided
        self.weight = 0.0  # bytes of an element, of late
        self.largest = 1  # as many elements have come back together, at most

    def __repr__(self) -> str:
        return f"<BatchSizer fixed={self.fixed} cost={self.cost} largest={self.largest}>"

    def learn(self, seconds: float, count: int) -> None:
        """Take note of what some elements took."""
        cost = seconds / count
        self.cost = cost if self.cost is None else 0.5 * (self.cost + cost)
        if count > self.largest:
            # Of those that came back, and not of those that went out: else many batches that
            # go out at once would each be larger than the one before, whatever becomes of that.
            self.largest = count

    def weigh(self, payload: Payload, count: int) -> None:
        """Take note of the bytes that some elements are."""
        if payload.is_short:
            return
        nbytes = sum(map(len, payload.parts))
        if payload.known is None:  # else they are copied once, however often they are sent
            # Views of shared arrays go by reference, to workers of this host at least.
            nbytes += sum(len(buffer) for buffer in payload.buffers if type(buffer) is not SharedSource)
        weight = nbytes / count
        self.weight = max(weight, 0.5 * (self.weight + weight))

    def next(self, drawn: int, workers: int) -> int:
        """Return how many elements the next batch should have, when `drawn` are out or done."""
        if self.fixed is not None:
            return self.fixed
        size = self._by_cost(drawn, workers)
        return size if size * self.weight <= _MAX_BATCH_BYTES else max(1, int(_MAX_BATCH_BYTES / self.weight))

    def _by_cost(self, drawn: int, workers: int) -> int:
        """Return how many they should be, whatever they weigh."""
        if self.cost is None:
            # Unknown yet: some for the worker to try, for a while, if it costs little to send them again.
            # Of a short input each worker gets its share at once: a second message would take longer.
            total = self.total or 0
            few = min(_PROBED, -(-total // (workers if total <= _FEW else WINDOW * workers)))
            return max(1, few) if self.cheap else 1
        cost = max(self.cost, 1e-8)
        size = _MAX_BATCH_SECONDS / cost
        if self.total is not None:
            if self.last and cost * self.last < 2 * _LAST_BATCH_SECONDS:
                return self.last
            share = (self.total - drawn) / workers
            if cost * share < _LAST_BATCH_SECONDS:
                # The rest is little, and goes out in one batch each. The size is kept, for the
                # share of the rest becomes smaller as one after the other gets his.
                self.last = min(math.ceil(max(share, _MIN_BATCH_SECONDS / cost)), self.largest * _GROW)
                return self.last
            size = min(size, max(share / 2, _MIN_BATCH_SECONDS / cost))
        return max(1, min(int(size), self.largest * _GROW))

    @property
    def brief(self) -> bool:
        """Whether a batch is probably back in no time."""
        if self.cost is None:
            return self.fixed == 1
        return self.cost * (self.fixed or self.largest) < _MIN_BATCH_SECONDS

    def window(self, drawn: int, workers: int) -> int:
        """Return how many batches a worker should have: some work ahead, but no more."""
        if self.cost is None:
            return WINDOW
        size = self.next(drawn, workers)
        most = min(_DEEPEST, int(_MAX_QUEUED_BYTES / max(1.0, size * self.weight)))
        return max(WINDOW, min(most, int(_QUEUED_WORK_SECONDS / (self.cost * size + _MESSAGE_SECONDS))))


def positive_integer(name: str, number: Any) -> int:
    """Return a parameter that must be a positive integer, of numpy perhaps."""
    if isinstance(number, bool) or not hasattr(number, "__index__") or number.__index__() < 1:
        raise ValueError(f"{name} must be a positive integer or None, not {number!r:.80}")
    return operator.index(number)


def is_cheap(element: Any) -> bool:
    """Return whether elements like this one may be sent twice."""
    if type(element) is tuple:
        return len(element) < 8 and all(type(part) is not tuple and is_cheap(part) for part in element)
    return type(element) in _CHEAP or (type(element) is str and len(element) < 100)


__all__ = ["WINDOW", "BatchSizer", "is_cheap", "positive_integer"]
