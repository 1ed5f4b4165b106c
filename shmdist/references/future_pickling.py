"""What a pickled Future takes along: it can always be pickled, whatever its value is."""

from __future__ import annotations

import functools
import pickle
import threading
from typing import Any, TypeAlias

from shmdist.errors import RemoteException, ShmdistError, remote_exception
from shmdist.serialization import codec

#: (True, value) or (False, error)
Outcome: TypeAlias = "tuple[bool, Any]"


#: Whether the outcome of a future can be sent, by its id; with the future, which keeps the id its own.
Verdicts: TypeAlias = "dict[int, tuple[Any, bool]]"


class _Pickling(threading.local):
    """What this thread knows of the futures inside of what it pickles, by the id of each."""

    verdicts: Verdicts | None = None  # those of the pickle that is being tried
    inside: frozenset[int] = frozenset()  # those whose outcome is being pickled


_pickling = _Pickling()


class _Kept(tuple[Any, ...]):
    """A reference to a future in a pickle, and that future."""

    _future: Any = None

    def __del__(self) -> None:
        future = self._future
        if future is None:
            return  # an interrupt came before it was noted
        future._keepers.pop()
        if future._outcome is not None and not future._keepers and not future._revived:
            future.__del__()  # it gives the count back as one that is dropped: this is a finalizer as well


def keeping(future: Any) -> tuple[Any, ...]:
    """Return the name of a future and its owner, for a pickle that goes to another process.

    The owner keeps the value, whoever fetches it, while that pickle is there: it may be sent late, or often.
    """
    future._keep()
    kept = _Kept((future._rrid, future._where))
    kept._future = future
    return kept


def can_go(future: Any, outcome: Outcome, known: Verdicts) -> bool:
    """Return whether a future's outcome can be sent, by trying.

    `known` is what is known of futures in the same pickle. Each is tried once: a future
    may hold another one, which holds another one, and so on.
    """
    outermost = _pickling.verdicts is None
    verdicts = _pickling.verdicts = known if _pickling.verdicts is None else _pickling.verdicts
    try:
        key = id(future)
        if key not in verdicts:
            verdicts[key] = future, False  # should it be met inside its own value
            verdicts[key] = future, codec.can_send(outcome)
        return verdicts[key][1]
    finally:
        if outermost:
            _pickling.verdicts = None


def packed(future: Any, outcome: Outcome | None, protocol: Any) -> Any:
    """Return the outcome for a pickle that belongs to no cluster; None when it cannot be pickled."""
    if outcome is None or codec.is_simple(outcome[1]):
        return outcome
    around = _pickling.inside
    if id(future) in around:
        return None  # it is part of its own value
    _pickling.inside = around | {id(future)}
    try:
        alone = functools.partial(codec.pickle_whole, by_name=False)
        # In one piece: once the outer pickler has begun with it, there is no way back.
        for dump in (functools.partial(pickle.dumps, protocol=protocol), alone):
            try:
                return dump(outcome)
            except MemoryError:
                raise
            except Exception:
                continue
    finally:
        _pickling.inside = around
    return None if outcome[0] else (False, stand_in(outcome[1]))


def unpacked(outcome: Any) -> Outcome | None:
    """Return what :func:`packed` was given."""
    made: Outcome | None = pickle.loads(outcome) if type(outcome) is bytes else outcome
    return made


def stand_in(error: BaseException) -> BaseException:
    """Return an error that can be sent in the place of one that cannot."""
    if isinstance(error, RemoteException):
        return remote_exception(error.pid, error.captured.stand_in())
    return ShmdistError(f"{type(error).__name__}: {error}")


__all__ = ["Outcome", "can_go", "keeping", "packed", "stand_in", "unpacked"]
