"""What notes its end surely."""

from __future__ import annotations

from collections.abc import Callable


class Ending:
    """Calls a function of C when it ends; nothing of Python's runs there.

    A ``__del__`` in Python may never begin: where an interrupt comes that moment, Python prints it, and goes
    on without. What must be known, as that a count is to be given back, is therefore noted by one of these,
    which whoever has the count holds. Python looks the finalizer up in its type, and finds a slot there.

    Parameters
    ----------
    note : callable
        Written in C, as a deque's ``append`` in a ``functools.partial``.

    Attributes
    ----------
    __del__ : callable
        What is called. Where it is `VOID`, nothing is noted; to set it is one step, which cannot fail.

    Examples
    --------
    >>> from functools import partial
    >>> ended = []
    >>> ending = Ending(partial(ended.append, "this"))
    >>> del ending
    >>> ended
    ['this']
    """

    __slots__ = ("__del__",)
    __del__: Callable[[], object]

    def __init__(self, note: Callable[[], object]) -> None:
        self.__del__ = note


VOID: Callable[[], object] = int

__all__ = ["VOID", "Ending"]
