"""When a failed element of a map is tried again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class ExponentialBackOff:
    """Delays that grow: for ``retry_delays``.

    Parameters
    ----------
    n : int
        How many delays.
    first_delay, max_delay : float
        Seconds.
    factor : float
        Each delay is so many times the one before.
    jitter : float
        Each delay varies by up to this fraction, at random.

    References
    ----------
    Julia manual, `ExponentialBackOff`.

    Examples
    --------
    >>> list(ExponentialBackOff(3, first_delay=1, factor=2, jitter=0))
    [1, 2, 4]
    """

    __module__ = "shmdist"

    def __init__(
        self,
        n: int = 1,
        first_delay: float = 0.05,
        max_delay: float = 10.0,
        factor: float = 5.0,
        jitter: float = 0.1,
    ) -> None:
        if n < 0 or first_delay < 0 or max_delay < 0 or factor < 0 or not 0 <= jitter <= 1:
            raise ValueError("ExponentialBackOff: all parameters must be >= 0, and jitter <= 1")
        self.n, self.first_delay, self.max_delay, self.factor, self.jitter = (
            n,
            first_delay,
            max_delay,
            factor,
            jitter,
        )

    def __repr__(self) -> str:
        return (
            f"ExponentialBackOff(n={self.n}, first_delay={self.first_delay}, max_delay={self.max_delay}, "
            f"factor={self.factor}, jitter={self.jitter})"
        )

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[float]:
        import random

        delay = min(self.first_delay, self.max_delay)
        for _ in range(self.n):
            yield delay
            delay *= self.factor
            if self.jitter:
                delay *= 1 - self.jitter + 2 * self.jitter * random.random()
            delay = min(delay, self.max_delay)


class _Replayed:
    """Lets each element go through the delays, though they may come from a generator."""

    def __init__(self, delays: Iterable[float]) -> None:
        if isinstance(delays, (str, bytes)) or not hasattr(delays, "__iter__"):
            raise TypeError(
                f"retry_delays must be an iterable of seconds, such as [0.1, 1], not {delays!r:.80}"
            )
        self._source = iter(delays)
        self._once = self._source is delays
        self._delays = delays
        self._seen: list[float] = []

    def fresh(self) -> Iterator[float]:
        return self._replay() if self._once else iter(self._delays)

    def _replay(self) -> Iterator[float]:
        for index in itertools.count():
            if index == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[index]


class Retry:
    """Decides whether an element that failed is tried again."""

    def __init__(self, delays: Iterable[float], check: Callable[[Any, BaseException], Any] | None) -> None:
        self._delays = _Replayed(delays)
        self._check = check
        self._states: dict[int, tuple[Iterator[Any], Any]] = {}

    def __call__(self, place: int, error: BaseException) -> float | None:
        """Return the seconds until the next try of the element at `place`, or None."""
        delays, state = self._states.get(place, (None, None))
        if delays is None:
            delays = self._delays.fresh()
        delay = next(delays, self)
        if delay is self:
            self._states.pop(place, None)
            return None
        if self._check is not None:
            answer = self._check(state, error)
            again = answer
            if isinstance(answer, tuple):
                state, again = answer
            if not again:
                self._states.pop(place, None)
                return None
        self._states[place] = (delays, state)
        return _seconds(delay)


def _seconds(delay: Any) -> float:
    """Return a delay as a number; less than 0 is at once."""
    try:
        return max(0.0, float(delay))
    except (TypeError, ValueError):
        raise TypeError(f"retry_delays must give seconds, not {delay!r:.80}") from None


__all__ = ["ExponentialBackOff", "Retry"]
