"""What of a future goes along in a pickle: it can always be pickled, whatever its value is like."""

from __future__ import annotations

import functools
import pickle
import threading
from typing import Any, TypeAlias

from shmdist.errors import RemoteException, ShmdistError, remote_exception
from shmdist.wire import codec

#: (True, value) or (False, error)
Outcome: TypeAlias = "tuple[bool, Any]"


class _Pickling(threading.local):
    """What this thread knows of the futures inside of what it pickles, by the id of each."""

    verdicts: dict[int, bool] | None = None  # whether its outcome can be sent
    inside: frozenset[int] = frozenset()  # those whose outcome is being pickled


_pickling = _Pickling()


def can_go(future: Any, outcome: Outcome) -> bool:
    """Tell whether a future's outcome can be sent, by trying."""
    outermost = _pickling.verdicts is None
    verdicts = _pickling.verdicts = {} if _pickling.verdicts is None else _pickling.verdicts
    try:
        key = id(future)
        if key not in verdicts:
            verdicts[key] = False  # should it be met inside its own value
            verdicts[key] = codec.can_send(outcome)
        return verdicts[key]
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
        # In one piece: once the outer pickler has begun with it, there is no way back.
        for dump in (functools.partial(pickle.dumps, protocol=protocol), codec.pickle_whole):
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


__all__ = ["Outcome", "can_go", "packed", "stand_in", "unpacked"]
